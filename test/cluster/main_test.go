package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
	"github.com/quorate/quorate/test/cluster"
)

// testTimeout bounds one test on the shared cluster. It is a bound for the broken case and not a measure of speed.
const testTimeout = 60 * time.Second

// attachVariable names clusters that run already, to try the tests against: gateway and PostgreSQL of each node,
// for example "127.0.0.1:6001/127.0.0.1:6101,127.0.0.1:6002/127.0.0.1:6102". Tests that stop or kill processes are
// left out then.
const attachVariable = "QUORATE_ATTACH"

// stacksVariable, when set, makes a test that failed end the shared cluster with SIGQUIT, so that the log shows what
// every goroutine was doing.
const stacksVariable = "QUORATE_STACKS"

// fixtures are what tests share: compiled commands, and one cluster for all tests that do not stop anything.
var fixtures struct {
	sync.Mutex
	building sync.Mutex // guards bin and built, alone
	bin      string     // directory of the commands
	built    map[bool]string
	shared   *cluster.Cluster
	broken   error // why the shared cluster must not be used any more
	starts   int
}

func TestMain(m *testing.M) {
	code := m.Run()
	if err := dismantle(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func dismantle() error {
	err := stopShared()
	if fixtures.bin != "" {
		err = errors.Join(err, os.RemoveAll(fixtures.bin))
	}
	return err
}

// stopShared stops the shared cluster, if there is one.
func stopShared() error {
	f := &fixtures
	f.Lock()
	defer f.Unlock()
	if f.shared == nil || f.shared.Attached() {
		return nil
	}
	err := f.shared.Stop()
	if err != nil {
		err = errors.Join(err, errors.New(f.shared.Logs(40)))
	}
	err = errors.Join(err, f.shared.Destroy())
	f.shared, f.starts = nil, 0
	return err
}

// parallel has a test run beside others, when those that are not parallel are over, and with them the shared cluster: even one
// with nothing to do takes its share of the processors.
func parallel(t *testing.T) {
	t.Helper()
	t.Parallel()
	check(t, stopShared())
}

// command returns the compiled command.
func command(t *testing.T, race bool) string {
	t.Helper()
	f := &fixtures
	f.building.Lock()
	defer f.building.Unlock()
	if f.bin == "" {
		dir, err := cluster.TempDir("")
		check(t, err)
		f.bin, f.built = dir, map[bool]string{}
	}
	if f.built[race] == "" {
		path, err := cluster.Build(t.Context(), f.bin, race)
		check(t, err)
		f.built[race] = path
	}
	return f.built[race]
}

// options are those of nodes with the race detector, if this test has it.
func options(t *testing.T) cluster.Options {
	t.Helper()
	return cluster.Options{Binary: command(t, withRace), Asking: command(t, false)}
}

// shared returns the cluster of three that all tests share, and verifies at the end of the test that all nodes
// are equal and hold nothing back. A test that breaks it does not spoil the next ones: they get a new one, twice.
func shared(t *testing.T) (*cluster.Cluster, context.Context) {
	t.Helper()
	f := &fixtures
	f.Lock()
	defer f.Unlock()
	if attach := os.Getenv(attachVariable); attach != "" && f.shared == nil {
		var nodes []cluster.Endpoint
		for node := range strings.SplitSeq(attach, ",") {
			gateway, postgres, ok := strings.Cut(node, "/")
			if !ok {
				t.Fatalf("%s: %q is not gateway/postgres", attachVariable, node)
			}
			nodes = append(nodes, cluster.Endpoint{Gateway: gateway, Postgres: postgres})
		}
		f.shared = cluster.Attach(nodes)
	}
	if f.broken != nil && f.shared != nil && !f.shared.Attached() {
		check(t, f.shared.Destroy())
		f.shared = nil
	}
	if f.shared == nil {
		o := options(t)
		if f.starts++; f.starts > 3 {
			t.Fatalf("the shared cluster was broken %d times, at last by: %v", f.starts-1, f.broken)
		}
		begin := time.Now()
		c, err := cluster.Start(t.Context(), o)
		if err != nil {
			f.broken = err
			t.Fatal(err)
		}
		t.Logf("cluster started in %v", time.Since(begin).Round(time.Millisecond))
		f.shared, f.broken = c, nil
	}
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	t.Cleanup(cancel)
	t.Cleanup(func() { verifyShared(t, f.shared) })
	// Every test ends with a comparison of all rows: not also of what an earlier one has left, half a million of them.
	create(t, ctx, f.shared, "DROP TABLE IF EXISTS pgbench_accounts, pgbench_branches, pgbench_history, pgbench_tellers")
	return f.shared, ctx
}

func verifyShared(t *testing.T, c *cluster.Cluster) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if t.Failed() {
		t.Log(c.Activity(ctx)) // before anything is waited for
	}
	err := c.Verify(ctx)
	if err != nil {
		t.Error(err)
		fixtures.Lock()
		fixtures.broken = fmt.Errorf("%s: %w", t.Name(), err)
		fixtures.Unlock()
	}
	if t.Failed() && os.Getenv(stacksVariable) != "" && !c.Attached() {
		for i := 1; i <= c.Nodes; i++ {
			if pid, err := c.SidecarPID(i); err == nil {
				t.Logf("SIGQUIT to node %d: %v", i, syscall.Kill(pid, syscall.SIGQUIT))
			}
		}
		time.Sleep(time.Second) // for them to write
		t.Log(c.Logs(4000))
		t.Fatal("the cluster was ended to see what it was doing")
	}
	if t.Failed() {
		t.Log(c.Logs(25))
	}
}

// private starts a cluster for one test alone. It need not be stopped at the end, but whoever stops it must check
// the error.
func private(t *testing.T, o cluster.Options) (*cluster.Cluster, context.Context) {
	t.Helper()
	return privateBy(t, o, cluster.Start)
}

// configured is private with more in the configuration of the nodes than those of a demo have.
func configured(t *testing.T, more string) (*cluster.Cluster, context.Context) {
	t.Helper()
	o := options(t)
	o.Nodes, o.PGBin, o.Configuration = 3, pgtest.Install(t, 18).BinDir, more+"\n"
	return privateBy(t, o, cluster.FoundTogether)
}

func privateBy(t *testing.T, o cluster.Options, start func(context.Context, cluster.Options) (*cluster.Cluster, error)) (*cluster.Cluster, context.Context) {
	t.Helper()
	if os.Getenv(attachVariable) != "" {
		t.Skipf("%s is set, and this test stops processes", attachVariable)
	}
	begin := time.Now()
	c, err := start(t.Context(), o)
	check(t, err)
	t.Logf("cluster started in %v", time.Since(begin).Round(time.Millisecond))
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Logs(25))
		}
		if err := c.Destroy(); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 2*testTimeout)
	t.Cleanup(cancel)
	return c, ctx
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// gateway opens a session on node i, closed with the test.
func gateway(t *testing.T, ctx context.Context, c *cluster.Cluster, i int) *pgx.Conn {
	t.Helper()
	conn, err := c.Connect(ctx, i)
	check(t, err)
	closeAtEnd(t, conn)
	return conn
}

// gateways opens one session on each node; the first is at index 1, as nodes are counted.
func gateways(t *testing.T, ctx context.Context, c *cluster.Cluster) []*pgx.Conn {
	t.Helper()
	conns := make([]*pgx.Conn, c.Nodes+1)
	for i := 1; i <= c.Nodes; i++ {
		conns[i] = gateway(t, ctx, c, i)
	}
	return conns
}

// direct opens a session with the PostgreSQL of node i, closed with the test.
func direct(t *testing.T, ctx context.Context, c *cluster.Cluster, i int) *pgx.Conn {
	t.Helper()
	conn, err := c.Direct(ctx, i)
	check(t, err)
	closeAtEnd(t, conn)
	return conn
}

func closeAtEnd(t *testing.T, conn *pgx.Conn) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = conn.Close(ctx) // some tests break their connection on purpose
	})
}

func must(t *testing.T, ctx context.Context, conn *pgx.Conn, sql string, args ...any) pgconn.CommandTag {
	t.Helper()
	tag, err := conn.Exec(ctx, sql, args...)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return tag
}

// refused runs a statement that must fail with this SQLSTATE.
func refused(t *testing.T, ctx context.Context, conn *pgx.Conn, state, sql string, args ...any) {
	t.Helper()
	_, err := conn.Exec(ctx, sql, args...)
	if got := cluster.SQLState(err); got != state {
		t.Fatalf("%s: got %v, want SQLSTATE %s", sql, err, state)
	}
}

// one returns the single value of a query.
func one[T any](t *testing.T, ctx context.Context, conn *pgx.Conn, sql string, args ...any) T {
	t.Helper()
	var value T
	if err := conn.QueryRow(ctx, sql, args...).Scan(&value); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return value
}

// equals checks the single value of a query.
func equals[T comparable](t *testing.T, ctx context.Context, conn *pgx.Conn, want T, sql string, args ...any) {
	t.Helper()
	if got := one[T](t, ctx, conn, sql, args...); got != want {
		t.Fatalf("%s: got %v, want %v", sql, got, want)
	}
}

// everywhere settles the cluster and checks the single value of a query on every node.
func everywhere[T comparable](t *testing.T, ctx context.Context, c *cluster.Cluster, want T, sql string) {
	t.Helper()
	check(t, c.Settle(ctx))
	for i := 1; i <= c.Nodes; i++ {
		conn, err := c.Direct(ctx, i)
		check(t, err)
		got := one[T](t, ctx, conn, sql)
		check(t, conn.Close(ctx))
		if got != want {
			t.Errorf("node %d: %s: got %v, want %v", i, sql, got, want)
		}
	}
}

// retry runs fn until it ends without a conflict.
func retry(ctx context.Context, fn func() error) error {
	for {
		if err := fn(); !cluster.IsConflict(err) || ctx.Err() != nil {
			return err
		}
	}
}

// awaitQuery waits until a query that returns a boolean is true.
func awaitQuery(t *testing.T, ctx context.Context, conn *pgx.Conn, sql string, args ...any) {
	t.Helper()
	for !one[bool](t, ctx, conn, sql, args...) {
		select {
		case <-ctx.Done():
			t.Fatalf("await %s: %v", sql, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}
