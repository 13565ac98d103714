// Package workload runs clients against one PostgreSQL, or several that claim to be one, and records what they did and
// what they were told: histories for test/check to judge. It knows its database by connection strings and nothing else.
//
//	w, err := workload.New(workload.Options{Nodes: urls, Seed: 1})
//	err = w.Setup(ctx)           // makes the tables, by way of the first node
//	w.Run(ctx)                   // until the context ends
//	                             // the caller waits until all nodes have caught up
//	err = w.Final(ctx)           // reads everything on all nodes
//	report := check.Judge(w.History(), check.PerNode)
package workload

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/test/check"
)

// Options of a Workload. Everything but Nodes has a default.
type Options struct {
	// Nodes are connection strings. Node 1 of the history is the first.
	Nodes []string
	// Seed decides what each client does. What comes of it depends on timing too.
	Seed uint64
	// Kinds of workloads, from Kinds(); none means all.
	Kinds []string
	// Clients is how many run each kind on each node; 0 means 1.
	Clients int
	// Roam lets a client that has lost its connection go on to the next node; else it comes back to its own.
	Roam bool
	// Name is a query for what the database calls the transaction that runs, to be asked for at its end and kept in the
	// history; empty means not to ask. With it every transaction is a block.
	Name string
	// Pause is the longest that a client waits between two transactions; 0 means that it does not.
	Pause time.Duration
	// Timeout bounds each transaction, connecting included; 0 means 30 s. One that takes longer is broken off.
	Timeout time.Duration
}

// Workload is a number of clients and the history that they make.
type Workload struct {
	options Options
	begun   time.Time
	value   atomic.Int64 // the last that was given out: whatever is written is written once
	process atomic.Int64
	// levels are what to say for an isolation level, commit is how to commit. Tests plant faults here.
	levels map[check.Isolation]string
	commit func(context.Context, *pgx.Conn) (pgconn.CommandTag, error)

	mu      sync.Mutex
	history check.History
}

// New returns a workload that has done nothing yet.
func New(o Options) (*Workload, error) {
	if len(o.Nodes) == 0 {
		return nil, errors.New("new workload: no nodes")
	}
	for _, kind := range o.Kinds {
		if kinds[kind] == nil {
			return nil, fmt.Errorf("new workload: kind %q is none of %q", kind, Kinds())
		}
	}
	if len(o.Kinds) == 0 {
		o.Kinds = Kinds()
	}
	if o.Clients == 0 {
		o.Clients = 1
	}
	if o.Timeout == 0 {
		o.Timeout = 30 * time.Second
	}
	return &Workload{
		options: o, begun: time.Now(),
		levels: map[check.Isolation]string{check.RepeatableRead: "REPEATABLE READ", check.ReadCommitted: "READ COMMITTED"},
		commit: func(ctx context.Context, conn *pgx.Conn) (pgconn.CommandTag, error) { return conn.Exec(ctx, "COMMIT") },
	}, nil
}

// Kinds returns the names of all workloads.
func Kinds() []string { return slices.Sorted(maps.Keys(kinds)) }

// tables are made by Setup, in this order.
var tables = []string{
	"CREATE TABLE w_list (key text PRIMARY KEY, v bigint[] NOT NULL)",
	"CREATE TABLE w_register (key text PRIMARY KEY, v bigint NOT NULL)",
	"CREATE TABLE w_counter (key text PRIMARY KEY, n bigint NOT NULL)",
	"CREATE TABLE w_account (key text PRIMARY KEY, balance bigint NOT NULL CHECK (balance >= 0))",
	"CREATE TABLE w_seat (id bigint PRIMARY KEY, key text NOT NULL CONSTRAINT w_seat_once UNIQUE)",
	"CREATE TABLE w_parent (key text PRIMARY KEY, id bigint NOT NULL)",
	"CREATE TABLE w_child (id bigint PRIMARY KEY, parent text NOT NULL CONSTRAINT w_child_of REFERENCES w_parent)",
	"CREATE TABLE w_bulk (id bigint, part int, text text NOT NULL, PRIMARY KEY (id, part))",
}

// Setup makes the tables anew, by way of the first node, and opens the accounts of the bank. Nothing else may run. What
// other nodes do not have yet when Run begins, their clients do not find; nothing depends on that.
func (w *Workload) Setup(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, w.options.Nodes[0])
	if err != nil {
		return fmt.Errorf("set up workload: %w", err)
	}
	defer closeConn(conn)
	statements := append([]string{"DROP TABLE IF EXISTS w_bulk, w_child, w_parent, w_seat, w_account, w_counter, w_register, w_list"}, tables...)
	for _, key := range counters {
		statements = append(statements, fmt.Sprintf("INSERT INTO w_counter VALUES ('%s', 0)", key))
	}
	for _, sql := range statements {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("set up workload: %s: %w", sql, err)
		}
	}
	op := check.Op{Start: w.now(), Process: int(w.process.Add(1)), Node: 1, Kind: "bank", Isolation: check.RepeatableRead, Outcome: check.OK}
	sql := "INSERT INTO w_account VALUES "
	for i, account := range accounts {
		if i > 0 {
			sql += ", "
		}
		sql += fmt.Sprintf("('%s', %d)", account, opening)
		op.Do = append(op.Do, check.Action{Do: check.Open, Key: account, Value: opening})
	}
	if _, err := conn.Exec(ctx, sql); err != nil {
		return fmt.Errorf("set up workload: %s: %w", sql, err)
	}
	op.End = w.now()
	w.record(op)
	return nil
}

// Run runs all clients until the context ends; transactions that run by then are finished. Errors are what
// clients expect: they are in the history.
func (w *Workload) Run(ctx context.Context) {
	var group sync.WaitGroup
	n := uint64(0)
	for node := range w.options.Nodes {
		for _, kind := range w.options.Kinds {
			for range w.options.Clients {
				n++
				c := &client{w: w, kind: kind, node: node + 1, random: rand.New(rand.NewPCG(w.options.Seed, n))}
				group.Go(func() { c.run(ctx) })
			}
		}
	}
	group.Wait()
}

// Final reads everything on every node, to be called when all clients have ended and all nodes have caught up.
func (w *Workload) Final(ctx context.Context) error {
	written := map[check.Verb]map[string]bool{check.Append: {}, check.Write: {}}
	for _, op := range w.History() {
		for _, a := range op.Do {
			if keys := written[a.Do]; keys != nil {
				keys[a.Key] = true
			}
		}
	}
	for node, url := range w.options.Nodes {
		if err := w.final(ctx, node+1, url, written); err != nil {
			return fmt.Errorf("read final state of node %d: %w", node+1, err)
		}
	}
	return nil
}

func (w *Workload) final(ctx context.Context, node int, url string, written map[check.Verb]map[string]bool) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	op := check.Op{
		Start: w.now(), Process: int(w.process.Add(1)), Node: node, Kind: "final",
		Isolation: check.RepeatableRead, Outcome: check.OK, Final: true,
	}
	err = pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		t := &transaction{q: tx, op: &op}
		for _, key := range slices.Sorted(maps.Keys(written[check.Append])) {
			if err := t.list(ctx, key); err != nil {
				return err
			}
		}
		for _, key := range slices.Sorted(maps.Keys(written[check.Write])) {
			if _, err := t.read(ctx, key); err != nil {
				return err
			}
		}
		for _, key := range counters {
			if _, err := t.count(ctx, key); err != nil {
				return err
			}
		}
		return errors.Join(t.balances(ctx), t.scanSeats(ctx), t.scanFamily(ctx), t.scanBulks(ctx))
	})
	if err != nil {
		return err
	}
	op.End = w.now()
	w.record(op)
	return nil
}

// History returns what has been recorded so far.
func (w *Workload) History() check.History {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.history)
}

func (w *Workload) record(op check.Op) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.history = append(w.history, op)
}

func (w *Workload) now() time.Duration { return time.Since(w.begun) }
