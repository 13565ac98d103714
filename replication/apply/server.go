package apply

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/logkey"
)

// identify tells one life of the server's shared memory from the next, by its checkpointer: that is replaced only
// when all server processes are, after a restart of the server or the crash of any one process. In either case the
// asynchronous commits that were not on disk are gone. In the first moments of a life it is not there yet.
const identify = `SELECT pid || ' ' || backend_start FROM pg_stat_activity WHERE backend_type = 'checkpointer'`

// ServerLife tells one life of a server's shared memory from the next: it changes when the server is restarted, or any
// of its processes crashes. Whatever was not on disk then is gone.
func ServerLife(ctx context.Context, conn *pgconn.PgConn) (string, error) {
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		results, err := conn.Exec(ctx, identify).ReadAll() // the simple protocol is all that a walsender speaks
		if err != nil {
			return "", fmt.Errorf("identify server: %w", err)
		}
		if rows := results[0].Rows; len(rows) == 1 {
			return string(rows[0][0]), nil
		}
		if err := pause(ctx, wait); err != nil {
			return "", fmt.Errorf("identify server: %w", err)
		}
	}
}

// connect opens a connection to the server, which must be in the life of it that the Pipeline began in: how much of what
// was visible is still there in a later one has to be found out as after a crash.
func (p *Pipeline) connect(ctx context.Context) (*pgconn.PgConn, error) {
	c, err := p.cfg.Connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	if err := p.Verify(ctx, c); err != nil {
		_ = c.Close(ctx)
		return nil, err
	}
	return c, nil
}

// Verify returns an error wrapping ErrServerLost if conn leads to another life of the server than the Pipeline's.
func (p *Pipeline) Verify(ctx context.Context, conn *pgconn.PgConn) error {
	life, err := ServerLife(ctx, conn)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.life == "" {
		p.life = life
	}
	if p.life != life {
		return fmt.Errorf("transaction %d may be lost: %w", p.Applied(), ErrServerLost)
	}
	return nil
}

// watchServer holds a connection only to notice at once that it ends. Workers may all be idle when the server crashes;
// a local transaction of its next life must not become visible.
func (p *Pipeline) watchServer(ctx context.Context) error {
	lost := time.Now()
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		held, err := p.holdConnection(ctx)
		p.mu.Lock()
		p.suspended = true
		p.mu.Unlock()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, ErrServerLost) {
			return err
		}
		if away(err) {
			return fmt.Errorf("%w: %w", ErrServerLost, err)
		}
		if held {
			wait, lost = 10*time.Millisecond, time.Now()
		}
		if time.Since(lost) > p.cfg.RetryFor {
			return fmt.Errorf("no connection to watch PostgreSQL with for %v: %w", p.cfg.RetryFor, err)
		}
		p.log.Warn("the connection that watches PostgreSQL ended, reconnecting", logkey.Error, err)
		if err := pause(ctx, wait); err != nil {
			return err
		}
	}
}

// away reports whether a failure to connect means that there is no server, or one that is starting or stopping: not
// that it has too many clients, say.
func away(err error) bool {
	var refused *pgconn.PgError
	if errors.As(err, &refused) {
		return refused.Code == "57P03"
	}
	var dial *net.OpError
	return errors.As(err, &dial) && dial.Op == "dial"
}

// holdConnection connects, verifies, lets commits go on and returns when the connection has ended.
func (p *Pipeline) holdConnection(ctx context.Context) (held bool, err error) {
	s, err := p.namedSession(ctx, "watch")
	if err != nil {
		return false, err
	}
	defer s.close()
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

// namedSession opens a session without an origin.
func (p *Pipeline) namedSession(ctx context.Context, name string) (*session, error) {
	c, err := p.connect(ctx)
	if err != nil {
		return nil, err
	}
	err = exec(ctx, c, sessionSettings+"; SET application_name = '"+sessionPrefix+name+"'")
	if err == nil {
		err = prepareProgress(ctx, c)
	}
	if err != nil {
		_ = c.Close(ctx)
		return nil, fmt.Errorf("prepare session: %w", err)
	}
	return hijack(ctx, c)
}
