package apply

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
)

// localEnded takes the word of a released transaction's session. It runs on the session's goroutine: if the next COMMIT waited for
// another goroutine to wake up, so would every one in the chain.
func (p *Pipeline) localEnded(e *entry, committed bool) {
	p.mu.Lock()
	late := e.ended || p.failure != nil
	e.ended = true
	p.mu.Unlock()
	switch {
	case late:
	case committed:
		p.metrics.published(time.Since(e.released))
		p.visible(e)
	default:
		p.lost <- e
	}
}

// overdueLocal returns the released transaction whose session has said nothing for LocalTimeout, if there is one.
func (p *Pipeline) overdueLocal() *entry {
	p.mu.Lock()
	defer p.mu.Unlock()
	head, ok := p.queue.first()
	if !ok || head.local == nil || head.state != stateCommitting || head.ended || time.Since(head.released) < p.cfg.LocalTimeout {
		return nil
	}
	head.ended = true
	return head
}

// finishLocals brings released local transactions to an end whose sessions do not say that they committed. One that did
// not commit is applied from the log: the log, not the session, is the truth.
func (p *Pipeline) finishLocals(ctx context.Context) error {
	w := p.workers[0] // connects only when a transaction is lost
	defer w.disconnect()
	defer p.overdue.Stop()
	for {
		var e *entry
		select {
		case e = <-p.lost:
		case <-p.overdue.C:
			e = p.overdueLocal()
		case <-ctx.Done():
			return ctx.Err()
		}
		if e == nil {
			continue
		}
		level := slog.LevelWarn
		if e.local.PID() == 0 { // of an earlier life of the node: there may be many, and nothing is wrong
			level = slog.LevelDebug
		}
		p.log.Log(ctx, level, "a local transaction did not confirm its COMMIT", logkey.CSN, uint64(e.last), logkey.PID, e.local.PID(), logkey.XID, uint64(e.items[0].Set.XID))
		committed, err := w.settle(ctx, e)
		if err != nil {
			return err
		}
		if committed {
			p.visible(e)
			e.local.Visible(e.last) // its session has not seen that it did commit
			continue
		}
		p.rerun(e)
		if err := w.complete(ctx, e); err != nil {
			return err
		}
		e.local.Visible(e.last)
	}
}

// settle brings a local transaction whose fate is not known to an end, and tells which.
func (w *worker) settle(ctx context.Context, e *entry) (committed bool, err error) {
	xid := strconv.FormatUint(uint64(e.items[0].Set.XID), 10)
	pid := strconv.FormatUint(uint64(e.local.PID()), 10)
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		if w.session == nil {
			if err := w.connect(ctx); err != nil {
				return false, err
			}
		}
		rows, err := w.session.query(`SELECT coalesce(pg_xact_status($1::text::xid8), 'unknown')`, xid)
		if errors.Is(err, errConnection) {
			w.disconnect()
			continue
		}
		if err != nil {
			return false, fmt.Errorf("ask for the status of local transaction %d: %w", e.last, err)
		}
		switch rows[0][0] {
		case "committed":
			return true, nil
		case "aborted":
			return false, nil
		case "in progress":
			// Only this transaction's own process is ended: the session may have gone on to others by the time
			// its process is found, but then the transaction is no longer in progress.
			_, err := w.session.query(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid = $1::int AND backend_xid = ($2::text::xid8)::xid`, pid, xid)
			if errors.Is(err, errConnection) {
				w.disconnect()
			} else if err != nil {
				return false, fmt.Errorf("terminate the session of local transaction %d: %w", e.last, err)
			}
		default:
			return false, fmt.Errorf("local transaction %d: the server no longer knows what became of transaction id %s: %w", e.last, xid, txn.ErrDiverged)
		}
		if err := pause(ctx, wait); err != nil {
			return false, err
		}
	}
}
