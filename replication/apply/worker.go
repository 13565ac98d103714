package apply

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/invariant"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
)

// errEvicted: the held transaction was rolled back because it blocked an earlier one.
var errEvicted = errors.New("blocked an earlier transaction")

// worker executes one entry after another on a session of its own.
type worker struct {
	p       *Pipeline
	number  int // of its origin
	work    chan *entry
	since   atomic.Int64 // when the oldest outstanding statements were sent, in Unix nanoseconds; 0: none
	session *session     // set under Pipeline.mu by the worker, which alone uses it, see session; nil: not connected
	entry   *entry       // under Pipeline.mu: what it is at, for the monitor
}

func newWorker(p *Pipeline, number int) *worker {
	return &worker{p: p, number: number, work: make(chan *entry, 1)}
}

// loop connects before the first entry comes, so that it need not wait, and then takes what schedule gives.
func (w *worker) loop(ctx context.Context) error {
	defer w.disconnect()
	if err := w.connect(ctx); err != nil {
		return err
	}
	for {
		w.p.mu.Lock()
		w.p.idle = append(w.p.idle, w)
		w.p.schedule()
		w.p.mu.Unlock()
		select {
		case e := <-w.work:
			if err := w.complete(ctx, e); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// connect opens the session. Most failures mean that the server is away, which watchServer finds out at once.
func (w *worker) connect(ctx context.Context) error {
	begin := time.Now()
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		s, err := openSession(ctx, w.p.connect, w.number, w.p.cfg.Statements, &w.since)
		if err == nil {
			s.generation = w.p.generation.Load()
			w.p.mu.Lock()
			w.session = s
			w.p.mu.Unlock()
			return nil
		}
		if errors.Is(err, ErrServerLost) {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Since(begin) > w.p.cfg.RetryFor {
			return fmt.Errorf("apply worker cannot reach PostgreSQL for %v: %w", w.p.cfg.RetryFor, err)
		}
		w.p.log.Warn("apply worker cannot reach PostgreSQL, retrying", logkey.Error, err)
		if err := pause(ctx, wait); err != nil {
			return err
		}
	}
}

func (w *worker) disconnect() {
	w.p.mu.Lock()
	s := w.session
	w.session = nil
	w.p.mu.Unlock()
	if s != nil {
		s.close()
	}
	w.since.Store(0)
}

// complete brings e to be visible. It returns an error only if that is impossible.
func (w *worker) complete(ctx context.Context, e *entry) error {
	w.p.mu.Lock()
	w.entry, e.worker = e, w
	w.p.mu.Unlock()
	defer func() {
		w.p.mu.Lock()
		w.entry = nil
		w.p.mu.Unlock()
	}()
	w.p.wakeMonitor()

	var failing time.Time // since when it fails although everything before it is visible
	ordered := false      // it is executed row by row, to know which one fails
	for {
		if w.session == nil {
			if err := w.connect(ctx); err != nil {
				return err
			}
		}
		// With everything earlier visible, a failure has no excuse.
		exact := w.p.Applied() >= e.first-1
		start := time.Now()
		w.session.ordered = ordered
		err := w.execute(e)
		if err == nil {
			w.p.metrics.executed(time.Since(start))
			err = w.commit(e)
		}
		if errors.Is(err, errConnection) {
			err = w.fate(ctx, e, err)
		}
		if err == nil {
			w.p.visible(e)
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		w.p.metrics.retry(err)
		if err := w.recover(ctx, e, err, exact, &failing, &ordered); err != nil {
			return err
		}
	}
}

// recover makes the worker able to execute e once more, at the moment when that can help, or returns why it cannot.
func (w *worker) recover(ctx context.Context, e *entry, cause error, exact bool, failing *time.Time, ordered *bool) error {
	log := w.p.log.With(logkey.CSN, uint64(e.last))
	if errors.Is(cause, errConnection) {
		log.Warn("apply worker lost its connection, applying again", logkey.Error, cause)
		w.disconnect()
		return nil // fate has seen to e's state
	}
	if w.session == nil {
		return cause // the fate of its COMMIT could not be asked for
	}
	if w.session.committed {
		return fmt.Errorf("what the server should have refused is committed, and a restart will not find it again: %w", cause)
	}
	if !errors.Is(cause, errEvicted) {
		if err := w.session.rollback(); err != nil {
			w.disconnect()
		}
	}
	w.p.rerun(e)
	if yield := w.p.takeYield(e); yield > 0 {
		log.Debug("transaction gave way to an earlier one", "blocked", uint64(yield))
		return w.p.WaitFor(ctx, yield)
	}
	if errors.Is(cause, errEvicted) {
		return nil
	}
	var server *pgconn.PgError
	isServer := errors.As(cause, &server)
	var diverged *Divergence
	if !errors.As(cause, &diverged) && !isServer {
		return cause // the write set or the log cannot be read
	}
	if !exact {
		log.Debug("transaction failed beside earlier ones, applying it after them", logkey.Error, cause)
		return w.p.WaitFor(ctx, e.first-1)
	}
	if diverged != nil && diverged.Expected > 1 { // a statement of many rows: executed one by one, the culprit is known
		*ordered = true
		return nil
	}
	if !isServer || !transient(server.Code) {
		if diverged == nil {
			diverged = &Divergence{CSN: e.last, Cause: cause}
		}
		if diverged.CSN == 0 {
			diverged.CSN = e.last
		}
		return diverged
	}
	if failing.IsZero() {
		*failing = time.Now()
	}
	if time.Since(*failing) > w.p.cfg.RetryFor {
		// The server's error alone: cause would call it a divergence, which this is not.
		return fmt.Errorf("apply transaction %d: still failing after %v: %w", e.last, w.p.cfg.RetryFor, server)
	}
	log.Warn("transaction cannot be applied at present, retrying", logkey.SQLState, server.Code, logkey.Error, cause)
	return pause(ctx, min(max(time.Since(*failing)/4, time.Millisecond), time.Second))
}

// transient reports whether a failure with this SQLSTATE says nothing about the data: a deadlock or serialization
// failure with a session that was in the way, a cancelled statement, lacking resources, a failing disk.
func transient(sqlstate string) bool {
	switch sqlstate {
	case "40001", "40P01", "55P03", "57014", "25006":
		return true
	}
	switch sqlstate[:2] {
	case "53", "57", "58":
		return true
	}
	return false
}

// fewRows is up to how many changes are made in a way that lets the server find out whether they touch what they should. That
// costs 6 µs for each UPDATE or DELETE, on a machine where the round trip that it saves both sides costs 150.
const fewRows = 16

// execute runs the changes of all items in an open transaction. If it is e's turn by the time that the last of them are
// sent, and nothing depends on how they are answered, COMMIT goes with them.
func (w *worker) execute(e *entry) error {
	s := w.session
	s.committed = false
	if generation := w.p.generation.Load(); s.generation != generation {
		s.generation = generation
		s.forgetPlans()
		if err := s.simple("DEALLOCATE ALL"); err != nil {
			return err
		}
	}
	s.few = e.rows <= fewRows
	s.begin(e.last)
	for i := range e.items {
		if err := w.item(&e.items[i]); err != nil {
			return err
		}
	}
	s.insertAll()
	if !s.doubtful && w.p.claim(e) {
		s.commit()
	}
	return s.finish()
}

func (w *worker) item(item *Item) error {
	w.session.current = w.session.current[:0]
	for _, index := range item.Chunks {
		if w.p.cfg.Part == nil {
			return fmt.Errorf("apply transaction %d: read chunk %d: no log to read it from", item.CSN, index)
		}
		part, err := w.p.cfg.Part(index)
		if err != nil {
			return fmt.Errorf("apply transaction %d: read chunk %d: %w", item.CSN, index, err)
		}
		if err := w.changes(item.CSN, part); err != nil {
			return err
		}
		// A row change refers to the part until its reply is read; do not hold two parts.
		if err := w.session.finish(); err != nil {
			return err
		}
	}
	return w.changes(item.CSN, item.Set.Changes)
}

func (w *worker) changes(csn txn.CSN, changes []byte) error {
	for len(changes) > 0 {
		message, rest, err := nextMessage(changes)
		if err == nil {
			changes = rest
			switch message[0] {
			case 'I', 'U', 'D':
				err = w.session.applyRow(csn, message)
			case 'R':
				err = w.session.relation(message)
			case 'T':
				err = w.session.truncate(csn, message)
			case 'M':
				err = w.session.logical(csn, message)
			case 'Y', 'O': // types are known by the column; the origin by the write set
			default:
				err = fmt.Errorf("read change: %w: unknown message %q", txn.ErrCorrupt, message[0])
			}
		}
		if err != nil {
			var d *Divergence
			if errors.As(err, &d) && d.CSN == 0 {
				d.CSN = csn
			}
			if errors.Is(err, txn.ErrCorrupt) {
				return fmt.Errorf("apply transaction %d: %w", csn, err)
			}
			return err
		}
	}
	return nil
}

// commit waits for e's turn and until it is committed, unless it is. Whoever books the entry before it writes the COMMIT;
// here the reply is read, so that no other goroutine stands between the two.
func (w *worker) commit(e *entry) error {
	if w.session.committed {
		return nil
	}
	start := time.Now()
	w.p.mu.Lock()
	invariant.Check(e.state == stateRunning, "apply: transaction %d is executed and not running", e.last)
	e.state = stateReady
	r := w.p.advance()
	w.p.mu.Unlock()
	r.do(w.p)

	if err := w.session.awaitEnd(); err != nil {
		return err
	}
	if !w.session.committed {
		return errEvicted
	}
	w.p.metrics.published(time.Since(start))
	return nil
}

// fate finds out, after the connection was lost, whether e is committed, and returns nil if so: if its COMMIT was sent, the
// progress tells. Taking the origin again, in connect, has ended the old server process first.
func (w *worker) fate(ctx context.Context, e *entry, cause error) error {
	w.p.mu.Lock()
	sent := e.state == stateCommitting
	if !sent {
		e.state = stateRunning // from here on nobody writes a COMMIT
	}
	w.p.mu.Unlock()
	if !sent {
		return cause
	}
	begin := time.Now()
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		w.disconnect()
		if err := w.connect(ctx); err != nil {
			return err
		}
		rows, err := w.session.query("SELECT " + highestProgress)
		if err != nil {
			w.disconnect() // without an answer e must not be executed again: see recover
			if time.Since(begin) > w.p.cfg.RetryFor {
				return fmt.Errorf("read progress: %w", err)
			}
			w.p.log.Warn("cannot read progress, asking again", logkey.CSN, uint64(e.last), logkey.Error, err)
			if err := pause(ctx, wait); err != nil {
				return err
			}
			continue
		}
		progress, err := parseProgress(rows)
		if err != nil {
			return err
		}
		if progress >= e.last {
			return nil
		}
		w.p.log.Warn("a connection was lost with a COMMIT on its way, which did not arrive: applying again", logkey.CSN, uint64(e.last), logkey.Error, cause)
		return errEvicted // nothing to roll back
	}
}

// rerun makes e one that is being executed, whatever it was.
func (p *Pipeline) rerun(e *entry) {
	p.mu.Lock()
	if e.state == stateCommitting {
		p.inFlight.Store(0)
	}
	e.state = stateRunning
	p.mu.Unlock()
}

func (p *Pipeline) takeYield(e *entry) txn.CSN {
	p.mu.Lock()
	defer p.mu.Unlock()
	yield := e.yield
	e.yield = 0
	return yield
}
