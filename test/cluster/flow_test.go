package cluster_test

import (
	"context"
	"fmt"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/quorate/quorate/test/cluster"
)

// TestFlowControl freezes the PostgreSQL of one node. The others wait for it, but not for ever: the node gives up being
// active, which ends its clients' sessions, and is active again when it has caught up. Nothing is lost. Afterwards
// the leader is left alone: where reads without quorum are refused, they end at once.
func TestFlowControl(t *testing.T) {
	parallel(t)
	c, ctx := configured(t, "limits: {lag: 64, lag_patience: 1s}\nreads_without_quorum: refuse")
	create(t, ctx, c,
		"CREATE TABLE entries (id text PRIMARY KEY, writer text NOT NULL)",
		"CREATE TABLE counters (writer text PRIMARY KEY, n bigint NOT NULL)")
	l := startLoad(t, ctx, c)
	leader, slow := leaderOf(t, ctx, c)
	idle := gateway(t, ctx, c, slow)
	must(t, ctx, idle, "SELECT")

	thaw := freezePostgres(t, c, slow)
	awaitState(t, ctx, c, slow, "catching-up", "the others do not wait any more")
	if slowed := number(t, metric(t, ctx, c, leader, "quorate_node_flow_control_seconds_count")); slowed == 0 {
		t.Error("nobody was slowed down before")
	}
	refused(t, ctx, idle, "57P03", "SELECT")
	l.awaitCommits(ctx, 100, others(c, slow)...)

	thaw()
	awaitState(t, ctx, c, slow, "active", "")
	l.awaitCommits(ctx, 10)
	l.finish(ctx)
	check(t, c.Verify(ctx))
	refusesReads(t, ctx, c)
	check(t, c.Stop())
}

// freezePostgres stops all processes of a node's server.
func freezePostgres(t *testing.T, c *cluster.Cluster, i int) (thaw func()) {
	t.Helper()
	pid, err := c.PostmasterPID(i)
	check(t, err)
	processes, err := cluster.Tree(pid)
	check(t, err)
	thaw = func() {
		for _, p := range processes {
			_ = syscall.Kill(p.PID, syscall.SIGCONT) // some may have ended
		}
	}
	t.Cleanup(thaw)
	for _, p := range processes {
		_ = syscall.Kill(p.PID, syscall.SIGSTOP)
	}
	return thaw
}

// TestStressFrozen freezes the PostgreSQL of one node while the others write on: what it has not applied is in its log, and in
// nobody's memory.
func TestStressFrozen(t *testing.T) {
	forStress(t)
	c, _ := configured(t, "limits: {lag: 64, lag_patience: 1s, apply_memory: 8MiB}")
	ctx, cancel := context.WithTimeout(t.Context(), 5*testTimeout) // for as much as a slow disk takes
	defer cancel()
	create(t, ctx, c, "CREATE TABLE heavy (id int PRIMARY KEY, v text NOT NULL)")
	leader, slow := leaderOf(t, ctx, c)
	grown := watchMemory(t, ctx, c)
	thaw := freezePostgres(t, c, slow)
	writer := gateway(t, ctx, c, leader)
	const pending = 300 // megabytes, more than twice what buffers, caches and garbage take
	for i := range pending {
		eventually(t, ctx, func() error {
			return execute(ctx, writer.PgConn(), fmt.Sprintf("INSERT INTO heavy VALUES (%d, repeat('x', 1000000)) ON CONFLICT DO NOTHING", i))
		})
	}
	for i, bytes := range grown() {
		t.Logf("node %d needs %.0f MB more while %d MB wait", i+1, bytes/1e6, pending)
		if bytes > pending*1e6/2 {
			t.Errorf("node %d holds %.0f MB more in memory", i+1, bytes/1e6)
		}
	}
	thaw()
	awaitState(t, ctx, c, slow, "active", "")
	everywhere(t, ctx, c, int64(pending), "SELECT count(*) FROM heavy")
	check(t, c.Stop())
}

// watchMemory looks at the heaps of all sidecars until the function that it returns is called, which tells by how much each has
// grown at most.
func watchMemory(t *testing.T, ctx context.Context, c *cluster.Cluster) (grown func() []float64) {
	ctx, cancel := context.WithCancel(ctx)
	first, most := make([]float64, c.Nodes), make([]float64, c.Nodes)
	var watching sync.WaitGroup
	for i := range c.Nodes {
		read := func() float64 {
			m, err := c.Metrics(ctx, i+1)
			if err != nil && ctx.Err() == nil {
				t.Error(err)
			}
			return m["go_memstats_heap_inuse_bytes"]
		}
		first[i] = read()
		watching.Go(func() {
			for ctx.Err() == nil {
				most[i] = max(most[i], read()-first[i])
				time.Sleep(50 * time.Millisecond)
			}
		})
	}
	t.Cleanup(cancel)
	return func() []float64 {
		cancel()
		watching.Wait()
		return most
	}
}

// refusesReads freezes all but the leader. It does not wait for max_staleness, which is 10 s.
func refusesReads(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	leader, _ := leaderOf(t, ctx, c)
	reader := gateway(t, ctx, c, leader)
	cut := time.Now()
	thaw := freeze(t, c, others(c, leader)...)
	var err error
	for err == nil && ctx.Err() == nil {
		err = execute(ctx, reader.PgConn(), "SELECT count(*) FROM entries")
	}
	if waited := time.Since(cut); cluster.SQLState(err) != "57P03" || waited > quorumTimeout+2*time.Second {
		t.Errorf("reads end after %v, with %v", waited, err)
	}
	if _, err := c.Connect(ctx, leader); cluster.SQLState(err) != "57P03" {
		t.Errorf("connect: %v", err)
	}
	thaw()
	executeAnew(t, ctx, c, leader, "SELECT count(*) FROM entries")
}
