package cluster_test

import (
	"syscall"
	"testing"

	"github.com/quorate/quorate/test/cluster"
)

// TestFlowControl freezes the PostgreSQL of one node. The others wait for it, but not for ever: the node gives up being
// active, which ends its clients' sessions, and is active again when it has caught up. Nothing is lost.
func TestFlowControl(t *testing.T) {
	t.Parallel()
	c, ctx := private(t, options(t))
	configure(t, ctx, c, "limits: {lag: 64, lag_patience: 1s}")
	create(t, ctx, c,
		"CREATE TABLE entries (id text PRIMARY KEY, writer text NOT NULL)",
		"CREATE TABLE counters (writer text PRIMARY KEY, n bigint NOT NULL)")
	l := startLoad(t, ctx, c)
	leader, slow := leaderOf(t, ctx, c)
	idle := gateway(t, ctx, c, slow)
	must(t, ctx, idle, "SELECT")

	pid, err := c.PostmasterPID(slow)
	check(t, err)
	processes, err := cluster.Tree(pid)
	check(t, err)
	thaw := func() {
		for _, p := range processes {
			_ = syscall.Kill(p.PID, syscall.SIGCONT) // some may have ended
		}
	}
	t.Cleanup(thaw)
	for _, p := range processes {
		_ = syscall.Kill(p.PID, syscall.SIGSTOP)
	}

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
	check(t, c.Stop())
}
