package workload

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/test/check"
)

// client runs one kind of workload in one session after the other.
type client struct {
	w       *Workload
	kind    string
	node    int
	random  *rand.Rand
	conn    *pgx.Conn // nil when there is none
	process int       // of the session
	level   string    // its default isolation level, when it has been set
}

// querier is what statements are run on.
type querier interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// transaction is one transaction as it goes into the history.
type transaction struct {
	q      querier
	op     *check.Op
	value  func() int64
	random *rand.Rand
}

func (t *transaction) did(a check.Action) { t.op.Do = append(t.op.Do, a) }

// plan is what a client does next. A single one is one statement without BEGIN and COMMIT, unless names are asked for.
type plan struct {
	isolation check.Isolation
	single    bool
	run       func(ctx context.Context, t *transaction) error
}

// Back-off between attempts to connect.
const (
	firstBackoff = 10 * time.Millisecond
	lastBackoff  = time.Second
)

// run runs transactions until the context ends.
func (c *client) run(ctx context.Context) {
	defer c.disconnect()
	backoff := firstBackoff
	for ctx.Err() == nil {
		if c.conn == nil {
			if err := c.connect(ctx); err != nil {
				c.wait(ctx, backoff/2+rand.N(backoff/2))
				backoff = min(2*backoff, lastBackoff)
				if c.w.options.Roam {
					c.node = c.node%len(c.w.options.Nodes) + 1
				}
				continue
			}
			backoff = firstBackoff
		}
		c.transact(ctx, kinds[c.kind](c.random))
		if pause := c.w.options.Pause; pause > 0 {
			c.wait(ctx, time.Duration(c.random.Int64N(int64(pause))))
		}
	}
}

func (c *client) wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

func (c *client) connect(ctx context.Context) error {
	config, err := pgx.ParseConfig(c.w.options.Nodes[c.node-1])
	if err != nil {
		return err
	}
	if c.random.IntN(3) == 0 {
		config.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	}
	ctx, cancel := context.WithTimeout(ctx, c.w.options.Timeout)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return err
	}
	c.conn, c.process, c.level = conn, int(c.w.process.Add(1)), ""
	return nil
}

func (c *client) disconnect() {
	if c.conn != nil {
		closeConn(c.conn)
		c.conn = nil
	}
}

// closeConn ends a session of which nothing is expected any more.
func closeConn(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = conn.Close(ctx) // broken, most often, or about to be
}

// transact runs one transaction and records it. The end of the context does not break it off.
func (c *client) transact(ctx context.Context, p plan) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.w.options.Timeout)
	defer cancel()
	op := check.Op{Process: c.process, Node: c.node, Kind: c.kind, Isolation: p.isolation, Start: c.w.now()}
	t := &transaction{q: c.conn, op: &op, random: c.random, value: func() int64 { return c.w.value.Add(1) }}
	sent, err := c.attempt(ctx, p, t)
	op.End, op.Outcome = c.w.now(), outcome(sent, err)
	if err != nil {
		op.Error = err.Error()
	}
	if len(op.Do) > 0 {
		c.w.record(op)
	}
	// A transaction that is left open, or a session of which nobody knows, is not gone on with.
	if c.conn.IsClosed() || c.conn.PgConn().TxStatus() != 'I' || op.Outcome == check.Unknown {
		c.disconnect()
	}
}

// errRolledBack: COMMIT was answered by ROLLBACK.
var errRolledBack = errors.New("COMMIT was answered by ROLLBACK")

// attempt runs a transaction. It reports whether the statement that may have committed it was sent.
func (c *client) attempt(ctx context.Context, p plan, t *transaction) (sent bool, err error) {
	level := c.w.levels[p.isolation]
	if p.single && c.w.options.Name == "" {
		if c.level != level {
			if _, err := c.conn.Exec(ctx, "SET default_transaction_isolation = '"+strings.ToLower(level)+"'"); err != nil {
				return false, err
			}
			c.level = level
		}
		return true, p.run(ctx, t)
	}
	if _, err := c.conn.Exec(ctx, "BEGIN ISOLATION LEVEL "+level); err != nil {
		return false, err
	}
	err = p.run(ctx, t)
	if query := c.w.options.Name; err == nil && query != "" {
		err = c.conn.QueryRow(ctx, query).Scan(&t.op.Name)
	}
	if err != nil {
		if !c.conn.IsClosed() {
			_, rollback := c.conn.Exec(ctx, "ROLLBACK")
			err = errors.Join(err, rollback)
		}
		return false, err
	}
	tag, err := c.w.commit(ctx, c.conn)
	switch {
	case tag.String() == "COMMIT": // what comes after this answer, the end of the session for one, does not take it back
		err = nil
	case err == nil:
		err = errRolledBack
	}
	return true, err
}

// outcome is what a client knows after an error, or none. sent says that the server may have got the statement that
// commits; without it nothing is committed. (pgconn.SafeToRetry does not say so: it is also true of a connection that
// breaks when a statement was sent already, and then all is unknown.)
func outcome(sent bool, err error) check.Outcome {
	var pgErr *pgconn.PgError
	switch {
	case err == nil:
		return check.OK
	case !sent, errors.Is(err, errRolledBack), errors.Is(err, errGiveUp):
		return check.Failed
	case errors.As(err, &pgErr) && certain(pgErr.Code):
		return check.Failed
	default: // a broken connection, 08007, or an error that says nothing about the commit
		return check.Unknown
	}
}

// certain reports whether an SQLSTATE in answer to the statement that commits says that nothing is committed. What is
// not known for sure is not certain: an end of the session (57P01 and the like) may come after the commit.
func certain(state string) bool {
	if state == "40003" { // statement completion unknown
		return false
	}
	switch state[:min(2, len(state))] {
	case "40", // serialization failure, deadlock
		"23",       // constraints
		"25",       // read only: no quorum; in failed transaction
		"0A", "42": // not supported, no such table
		return true
	}
	return false
}
