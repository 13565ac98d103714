package apply

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/logkey"
)

// identify tells one life of the server's shared memory from the next, by its checkpointer: that is replaced only
// when all server processes are, after a restart of the server or the crash of any one process. In either case the
// asynchronous commits that were not on disk are gone. Beside it stands the workers' progress.
const identify = `SELECT (SELECT pid || ' ' || backend_start FROM pg_stat_activity WHERE backend_type = 'checkpointer'), ` + highestProgress

// verify is called for every new session before it is used. If the server has lost its memory since the last one, it
// decides whether everything that was visible still is. Commits are in WAL order, so only the latest matters: if a
// worker made it, the progress tells. A local one's xid may have been given out again by now, so then, and
// while local transactions are queued, the answer has to come from where the recovery after a crash gets it.
func (p *Pipeline) verify(s *session) error {
	rows, err := s.query(identify)
	if err != nil {
		return fmt.Errorf("identify server: %w", err)
	}
	progress, err := parseProgress(rows)
	if err != nil {
		return err
	}
	s.epoch = rows[0][0]

	p.mu.Lock()
	defer p.mu.Unlock()
	if p.epoch == "" {
		if progress > p.cfg.Start {
			return fmt.Errorf("start after transaction %d, but %d is applied: %w", p.cfg.Start, progress, ErrServerRestarted)
		}
		p.epoch = s.epoch
	}
	if p.epoch == s.epoch {
		return nil
	}
	applied := p.Applied()
	if applied != p.cfg.Start && !(p.fromLog && progress >= applied) {
		return fmt.Errorf("transaction %d may be lost: %w", applied, ErrServerRestarted)
	}
	for i := range p.queue.len() {
		if e := p.queue.at(i); e.local != nil {
			return fmt.Errorf("local transaction %d may have committed: %w", e.last, ErrServerRestarted)
		}
	}
	p.log.Info("the server restarted and has lost nothing that was visible", logkey.CSN, uint64(applied))
	p.epoch = s.epoch
	return nil
}

func (p *Pipeline) isCurrent(epoch string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.epoch == epoch
}

// watchServer holds a connection only to notice at once that it ends. Workers may all be idle when the server crashes;
// a local transaction of its next life must not become visible before verify has looked.
func (p *Pipeline) watchServer(ctx context.Context) error {
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		held, err := p.holdConnection(ctx)
		p.mu.Lock()
		p.suspended = true
		p.mu.Unlock()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, ErrServerRestarted) {
			return err
		}
		if held {
			wait = 10 * time.Millisecond
		}
		p.log.Warn("the connection that watches PostgreSQL ended, reconnecting", logkey.Error, err)
		if err := pause(ctx, wait); err != nil {
			return err
		}
	}
}

// holdConnection connects, verifies, lets commits go on and returns when the connection has ended.
func (p *Pipeline) holdConnection(ctx context.Context) (held bool, err error) {
	c, err := p.cfg.Connect(ctx)
	if err != nil {
		return false, fmt.Errorf("connect: %w", err)
	}
	s, err := watchingSession(ctx, c)
	if err != nil {
		return false, err
	}
	defer s.close()
	if err := p.verify(s); err != nil {
		return false, err
	}
	p.mu.Lock()
	p.suspended = false
	r := p.advance()
	p.mu.Unlock()
	r.do(p)
	for {
		if _, err := s.receive(); err != nil {
			return true, err
		}
	}
}

func watchingSession(ctx context.Context, c *pgconn.PgConn) (*session, error) {
	err := exec(ctx, c, sessionSettings+"; SET application_name = '"+sessionPrefix+"watch'")
	if err == nil {
		err = prepareProgress(ctx, c)
	}
	if err != nil {
		_ = c.Close(ctx)
		return nil, fmt.Errorf("prepare session: %w", err)
	}
	return hijack(ctx, c)
}
