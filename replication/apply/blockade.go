package apply

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
)

// The monitor ends what blocks a worker: a decided transaction must not wait for one that is not, and never waits in
// the server's own queues longer than a moment. It looks only at statements that take suspiciously long.

// idleTicks is after how many looks at idle workers the monitor goes to sleep.
const idleTicks = 20

// wakeMonitor tells the monitor that there is work to watch.
func (p *Pipeline) wakeMonitor() {
	if p.asleep.CompareAndSwap(true, false) {
		p.busy <- struct{}{} // has room: only who wakes it sends
	}
}

// blocked is a worker whose statement has been running for a while.
type blocked struct {
	worker *worker
	pid    uint32
	csn    txn.CSN
	since  int64
}

// watch is what the monitor remembers of one such statement.
type watch struct {
	since int64
	next  time.Time // when to ask again
	wait  time.Duration
}

// siege is what was done against one blocking process.
type siege struct {
	csn     txn.CSN // what is blocked
	since   time.Time
	seen    time.Time
	next    time.Time
	attempt time.Duration
}

type monitor struct {
	p       *Pipeline
	conn    *pgconn.PgConn
	watches map[*worker]*watch
	sieges  map[uint32]*siege
}

func (p *Pipeline) breakBlockades(ctx context.Context) error {
	m := &monitor{p: p, watches: map[*worker]*watch{}, sieges: map[uint32]*siege{}}
	defer m.disconnect()
	ticker := time.NewTicker(p.cfg.BlockedAfter)
	defer ticker.Stop()
	for idle := 0; ; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		if m.anyBusy() {
			idle = 0
			if err := m.look(ctx); err != nil && ctx.Err() == nil {
				// The server is away or starting; the workers say so and wait for it.
				p.log.Debug("blockade monitor cannot ask PostgreSQL", logkey.Error, err)
				m.disconnect()
			}
			continue
		}
		if idle++; idle < idleTicks {
			continue
		}
		ticker.Stop()
		p.asleep.Store(true)
		if !m.anyBusy() || !p.asleep.CompareAndSwap(true, false) { // nobody began in between, or it has woken us
			select {
			case <-p.busy:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		idle = 0
		ticker.Reset(p.cfg.BlockedAfter)
	}
}

func (m *monitor) anyBusy() bool {
	m.p.mu.Lock()
	defer m.p.mu.Unlock()
	for _, w := range m.p.workers {
		if w.entry != nil {
			return true
		}
	}
	return false
}

// monitorLockTimeout keeps the monitor, which ends waiting, from waiting itself: a table at which it looks may be what
// somebody wants for himself alone, who waits for the worker that the monitor is to help.
const monitorLockTimeout = "20ms"

func (m *monitor) connect(ctx context.Context) error {
	if m.conn != nil {
		return nil
	}
	c, err := m.p.cfg.Connect(ctx)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	m.conn = c
	return exec(ctx, c, sessionSettings+"; SET lock_timeout = '"+monitorLockTimeout+"'; SET application_name = '"+sessionPrefix+"monitor'")
}

func (m *monitor) disconnect() {
	if m.conn != nil {
		_ = m.conn.Close(context.Background()) // closed already or of no more use
		m.conn = nil
	}
}

// look finds the statements that are due to be asked about, and acts on what blocks them.
func (m *monitor) look(ctx context.Context) error {
	now := time.Now()
	var due []blocked
	m.p.mu.Lock()
	for _, w := range m.p.workers {
		since := w.since.Load()
		if since == 0 || w.session == nil || w.entry == nil {
			delete(m.watches, w)
			continue
		}
		known := m.watches[w]
		if known == nil || known.since != since {
			known = &watch{since: since, next: time.Unix(0, since).Add(m.p.cfg.BlockedAfter), wait: m.p.cfg.BlockedAfter}
			m.watches[w] = known
		}
		if !now.Before(known.next) {
			known.wait = min(2*known.wait, 40*m.p.cfg.BlockedAfter)
			known.next = now.Add(known.wait)
			due = append(due, blocked{worker: w, pid: w.session.pid, csn: w.entry.last, since: since})
		}
	}
	m.p.mu.Unlock()
	if len(due) == 0 {
		return nil
	}
	return m.ask(ctx, due, now)
}

// ask asks the server who blocks the workers. pg_blocking_pids also names those who wait ahead of it in a queue, for
// example a local ACCESS EXCLUSIVE behind a reader.
func (m *monitor) ask(ctx context.Context, due []blocked, now time.Time) error {
	if err := m.connect(ctx); err != nil {
		return err
	}
	byPID := map[string]blocked{}
	pids := make([]string, len(due))
	for i, b := range due {
		pids[i] = strconv.FormatUint(uint64(b.pid), 10)
		byPID[pids[i]] = b
	}
	asked := time.Now() // not now: connecting may have taken long
	rows, err := query(ctx, m.conn, `SELECT DISTINCT w.pid, b.pid FROM unnest($1::int[]) AS w(pid), unnest(pg_blocking_pids(w.pid)) AS b(pid)`,
		"{"+strings.Join(pids, ",")+"}")
	if err != nil {
		return err
	}
	for pid, s := range m.sieges {
		if now.Sub(s.seen) > m.p.cfg.TerminateAfter+100*m.p.cfg.BlockedAfter {
			delete(m.sieges, pid)
		}
	}
	for _, row := range rows {
		pid, err := strconv.ParseUint(row[1], 10, 32)
		if err != nil {
			return fmt.Errorf("read blocking process: %w", err)
		}
		b := byPID[row[0]]
		if b.worker.since.Load() != b.since {
			continue // it has gone on meanwhile: who blocks it now blocks another transaction
		}
		if pid == 0 {
			m.p.log.Error("a prepared transaction, which is not ours, blocks a committed one; roll it back", logkey.CSN, uint64(b.csn))
			continue
		}
		// While it is blocked, look again soon.
		if known := m.watches[b.worker]; known != nil && known.since == b.since {
			known.wait = m.p.cfg.BlockedAfter
			known.next = now.Add(known.wait)
		}
		if err := m.unblock(ctx, b, uint32(pid), asked); err != nil {
			return err
		}
	}
	return nil
}

// unblock acts against process pid, which has been found to block b since it was asked about, now.
func (m *monitor) unblock(ctx context.Context, b blocked, pid uint32, now time.Time) error {
	ours, cancel, rollback := m.p.giveWay(pid, b)
	if rollback != nil {
		m.p.metrics.evicted("worker")
		rollback.writeRollback()
	}
	if ours && !cancel {
		return nil
	}
	s := m.sieges[pid]
	if s == nil || s.csn != b.csn { // it gave way before, and has come again
		s = &siege{csn: b.csn, since: now, next: now, attempt: m.p.cfg.BlockedAfter}
		m.sieges[pid] = s
	}
	s.seen = now
	if now.Before(s.next) {
		return nil
	}
	s.attempt = min(2*s.attempt, m.p.cfg.TerminateAfter/4)
	s.next = now.Add(s.attempt)
	first := s.since.Equal(now)
	log := m.p.log.With(logkey.PID, pid, logkey.CSN, uint64(b.csn))
	var where Contention
	if first && !ours {
		var err error
		if where, err = m.findContention(ctx, b); err != nil {
			var server *pgconn.PgError
			if !errors.As(err, &server) {
				return err
			}
			log.Debug("cannot tell where a process is in the way", logkey.Error, err)
		}
	}
	switch {
	case ours:
		m.p.metrics.evicted("worker")
		return m.signal(ctx, "pg_cancel_backend", pid)
	case m.p.cfg.Evict != nil && m.p.cfg.Evict(Blockade{PID: pid, By: b.csn, Seen: now, Where: where}):
		if first {
			log.Info("asked the gateway to abort a session that blocks a committed transaction")
			m.p.metrics.evicted("session")
		}
		if now.Sub(s.since) < 10*m.p.cfg.TerminateAfter {
			return nil
		}
		log.Warn("terminating a session that the gateway could not stop")
		return m.signal(ctx, "pg_terminate_backend", pid)
	case now.Sub(s.since) < m.p.cfg.TerminateAfter:
		if first {
			log.Info("cancelling a process that blocks a committed transaction")
			m.p.metrics.evicted("other")
		}
		return m.signal(ctx, "pg_cancel_backend", pid)
	}
	log.Warn("terminating a process that blocks a committed transaction")
	return m.signal(ctx, "pg_terminate_backend", pid)
}

func (m *monitor) signal(ctx context.Context, function string, pid uint32) error {
	_, err := query(ctx, m.conn, "SELECT "+function+"($1::int)", strconv.FormatUint(uint64(pid), 10))
	var server *pgconn.PgError
	if errors.As(err, &server) {
		m.p.log.Warn("cannot signal a blocking process", logkey.PID, pid, logkey.Error, err)
		return nil
	}
	return err
}

// giveWay handles a blocker that the order knows. ours: nothing else is to be done about it, unless cancel is set: it
// is a worker whose statement must be cancelled. rollback: it is a held transaction, on whose session ROLLBACK must be
// written. Earlier transactions are left alone: they commit in their turn.
func (p *Pipeline) giveWay(pid uint32, b blocked) (ours, cancel bool, rollback *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, w := range p.workers {
		if w.session == nil || w.session.pid != pid {
			continue
		}
		e := w.entry
		if e == nil || e.last <= b.csn {
			return true, false, nil
		}
		e.yield = max(e.yield, b.csn)
		switch e.state {
		case stateReady:
			e.state = stateEvicted
			return true, false, w.session
		case stateRunning:
			return true, true, nil
		}
		return true, false, nil
	}
	for i := range p.queue.len() {
		if e := p.queue.at(i); e.last >= b.csn {
			break
		} else if e.local != nil && e.local.PID() == pid {
			return true, false, nil
		}
	}
	return false, false, nil
}

func isConnection(err error) bool { return errors.Is(err, errConnection) }
