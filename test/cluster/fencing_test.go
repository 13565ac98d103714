package cluster_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/test/cluster"
)

// Of TestFencing's nodes.
const (
	quorumTimeout = 2100 * time.Millisecond // three heartbeat timeouts
	maxStaleness  = 6 * time.Second
	commitTimeout = 6 * time.Second
)

// TestFencing freezes sidecars, so that a node is cut off or has slept through what the others did. Nothing it says
// then is false, and nothing it said before was.
func TestFencing(t *testing.T) {
	c, ctx := configured(t, fmt.Sprintf("max_staleness: %v\ncommit_timeout: %v", maxStaleness, commitTimeout))
	create(t, ctx, c,
		"CREATE TABLE entries (id text PRIMARY KEY, writer text NOT NULL)",
		"CREATE TABLE counters (writer text PRIMARY KEY, n bigint NOT NULL)",
		"CREATE TABLE spots (id int PRIMARY KEY, v text NOT NULL)",
		"CREATE TABLE bulk (of text, id int, PRIMARY KEY (of, id))",
		"INSERT INTO spots SELECT i, '' FROM generate_series(1, 10) i")
	for _, s := range []struct {
		name string
		run  func(t *testing.T, ctx context.Context, c *cluster.Cluster)
	}{
		{"FollowerFrozen", followerFrozen},
		{"LeaderFrozen", leaderFrozen},
		{"LeaderAlone", leaderAlone},
	} {
		if !t.Run(s.name, func(t *testing.T) {
			s.run(t, ctx, c)
			if err := c.Verify(ctx); err != nil {
				t.Error(err)
			}
		}) {
			break // what follows would only say so again
		}
	}
	check(t, c.Stop())
}

// freeze stops sidecars as a debugger would, or a starved hypervisor. thaw may be called twice.
func freeze(t *testing.T, c *cluster.Cluster, nodes ...int) (thaw func()) {
	t.Helper()
	var pids []int
	for _, i := range nodes {
		pid, err := c.SidecarPID(i)
		check(t, err)
		pids = append(pids, pid)
		t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) }) // it may have ended
		check(t, syscall.Kill(pid, syscall.SIGSTOP))
		for stopped := false; !stopped; { // a thread that is running goes on for a moment
			threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
			check(t, err)
			stopped = len(threads) > 0
			for _, name := range threads {
				stat, err := os.ReadFile(name)
				_, state, _ := strings.Cut(string(stat), ") ")
				stopped = stopped && (err != nil || strings.HasPrefix(state, "T")) // one that has ended has stopped, too
			}
		}
	}
	return func() {
		for _, pid := range pids {
			check(t, syscall.Kill(pid, syscall.SIGCONT))
		}
	}
}

// executeAnew runs a statement in a session of its own, as soon as node i lets it.
func executeAnew(t *testing.T, ctx context.Context, c *cluster.Cluster, i int, sql string) {
	t.Helper()
	eventually(t, ctx, func() error {
		conn, err := c.Connect(ctx, i)
		if err != nil {
			return err
		}
		defer closeAtEnd(t, conn)
		return execute(ctx, conn.PgConn(), sql)
	})
}

func followerFrozen(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	_, follower := leaderOf(t, ctx, c)
	frozen(t, ctx, c, follower)
}

func leaderFrozen(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	leader, _ := leaderOf(t, ctx, c)
	frozen(t, ctx, c, leader)
}

// frozen freezes node i under load, for longer than reads may be stale. A question that has been waiting for it when it
// wakes up is not answered with what it knew before. Nor is one that comes when it hears from the majority again, but has
// not applied yet what was committed meanwhile.
func frozen(t *testing.T, ctx context.Context, c *cluster.Cluster, i int) {
	other := others(c, i)[0]
	must(t, ctx, gateway(t, ctx, c, other), "UPDATE spots SET v = 'old' WHERE id = 5")
	readers := make([]*pgx.Conn, 3)
	for k := range readers {
		readers[k] = gateway(t, ctx, c, i)
		awaitQuery(t, ctx, readers[k], "SELECT v = 'old' FROM spots WHERE id = 5")
	}
	must(t, ctx, readers[1], "BEGIN")
	must(t, ctx, readers[1], "DECLARE c CURSOR FOR SELECT v FROM spots")
	l := startLoad(t, ctx, c)

	began := time.Now()
	thaw := freeze(t, c, i)
	answers := make([]chan error, len(readers))
	for k, sql := range []string{"SELECT v FROM spots WHERE id = 5", "FETCH c", "UPDATE spots SET v = 'lost' WHERE id = 5"} {
		answers[k] = make(chan error, 1)
		go func() { answers[k] <- execute(ctx, readers[k].PgConn(), sql) }()
	}
	l.awaitCommits(ctx, 20, others(c, i)...)
	writer := gateway(t, ctx, c, other)
	// What takes node i a while to apply is committed before what is asked for.
	must(t, ctx, writer, "INSERT INTO bulk SELECT $1, n FROM generate_series(1, 30000) n", t.Name())
	check(t, retry(ctx, func() error { return execute(ctx, writer.PgConn(), "UPDATE spots SET v = 'new' WHERE id = 5") }))
	t.Logf("node %d frozen: no commit for %v on the others", i, l.longestPause(began, others(c, i)...).Round(time.Millisecond))
	time.Sleep(time.Until(began.Add(maxStaleness + 300*time.Millisecond)))
	// Woken up alone it cannot hear from a majority before it has judged the questions, however slowly it does that.
	thawOthers := freeze(t, c, others(c, i)...)
	woken := time.Now()
	thaw()
	for k := range readers {
		if err := <-answers[k]; cluster.SQLState(err) != "57P03" {
			t.Errorf("question %d, from before the node woke up, after %v: %v, want 57P03", k, time.Since(woken).Round(time.Millisecond), err)
		}
	}
	thawOthers()
	heard := time.Now()
	var v string
	eventually(t, ctx, func() error {
		conn, err := c.Connect(ctx, i)
		if err != nil {
			return err
		}
		defer closeAtEnd(t, conn)
		return conn.QueryRow(ctx, "SELECT v FROM spots WHERE id = 5").Scan(&v)
	})
	t.Logf("node %d answers %v after the others woke up", i, time.Since(heard).Round(time.Millisecond))
	if v != "new" {
		t.Errorf("the first answer is %q, which was overwritten more than %v before", v, maxStaleness)
	}
	l.awaitCommits(ctx, 20)
	l.finish(ctx)
	everywhere(t, ctx, c, "new", "SELECT v FROM spots WHERE id = 5")
}

func execute(ctx context.Context, conn *pgconn.PgConn, sql string) error {
	_, err := conn.Exec(ctx, sql).ReadAll()
	return err
}

// leaderAlone freezes all but the leader, and thaws them again.
func leaderAlone(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	leader, _ := leaderOf(t, ctx, c)
	idle, block, reader, late := gateway(t, ctx, c, leader), gateway(t, ctx, c, leader), gateway(t, ctx, c, leader), gateway(t, ctx, c, leader)
	must(t, ctx, block, "BEGIN")
	must(t, ctx, block, "UPDATE spots SET v = 'block' WHERE id = 1")
	const ask = "SELECT quorate.transaction_status($1)"
	gids := map[string]string{one[string](t, ctx, block, "SELECT quorate.current_gid()"): "aborted", "1-1-1": "unknown"}
	must(t, ctx, idle, "BEGIN")
	gids[one[string](t, ctx, idle, "SELECT quorate.current_gid()")] = "committed"
	must(t, ctx, idle, "UPDATE spots SET v = 'told' WHERE id = 6")
	must(t, ctx, idle, "COMMIT")
	must(t, ctx, reader, "BEGIN")
	equals(t, ctx, reader, "", "SELECT v FROM spots WHERE id = 1")

	cut := time.Now()
	thaw := freeze(t, c, others(c, leader)...)
	// One that the coordinator takes before anybody knows.
	ended := make(chan error, 1)
	var waited time.Duration
	go func() {
		err := execute(ctx, late.PgConn(), "UPDATE spots SET v = 'late' WHERE id = 2")
		waited = time.Since(cut)
		ended <- err
	}()

	writable := func() bool {
		return one[string](t, ctx, idle, "SHOW transaction_read_only") == "off"
	}
	for writable() {
		time.Sleep(5 * time.Millisecond)
	}
	noticed := time.Now()
	t.Logf("writes are refused %v after the quorum was lost", noticed.Sub(cut).Round(time.Millisecond))
	if waited := noticed.Sub(cut); waited > quorumTimeout+time.Second || waited < time.Second {
		t.Errorf("the node has noticed after %v", waited)
	}
	conn := gateway(t, ctx, c, leader)
	for gid, status := range gids {
		if status != "committed" {
			status = "in doubt" // what is not in the log here may be elsewhere
		}
		equals(t, ctx, conn, status, ask, gid)
	}
	refused(t, ctx, conn, "25006", "INSERT INTO spots VALUES (20, '')")
	refused(t, ctx, conn, "25006", "CREATE TABLE never (id int)")
	must(t, ctx, conn, "BEGIN READ WRITE")
	refused(t, ctx, conn, "25006", "UPDATE spots SET v = 'never' WHERE id = 3")
	must(t, ctx, conn, "ROLLBACK")
	equals(t, ctx, conn, int64(10), "SELECT count(*) FROM spots")
	if err := execute(ctx, block.PgConn(), "COMMIT"); cluster.SQLState(err) != "25006" || !strings.Contains(err.Error(), "no quorum") {
		t.Errorf("COMMIT of a block from before: %v", err)
	}
	must(t, ctx, reader, "COMMIT")
	if took := time.Since(noticed); took > 2*time.Second {
		t.Errorf("refusing took %v", took)
	}
	if got := idle.PgConn().ParameterStatus("default_transaction_read_only"); got != "on" {
		t.Errorf("an open session is told default_transaction_read_only = %q", got)
	}
	config, err := pgx.ParseConfig(cluster.URL(c.Gateway(leader)) + "&target_session_attrs=read-write")
	check(t, err)
	if found, err := pgx.ConnectConfig(ctx, config); err == nil {
		t.Error("a client that wants to write is content with the node")
		closeAtEnd(t, found)
	}

	// Nothing is too old yet. When it is, not even reads are answered.
	for err = nil; err == nil; time.Sleep(5 * time.Millisecond) {
		err = execute(ctx, conn.PgConn(), "SELECT 1")
	}
	if waited := time.Since(cut); cluster.SQLState(err) != "57P03" || waited > maxStaleness+time.Second {
		t.Errorf("reads end after %v, with %v", waited, err)
	}
	if _, err := c.Connect(ctx, leader); cluster.SQLState(err) != "57P03" || !strings.Contains(err.Error(), "no quorum") {
		t.Errorf("connect: %v", err)
	}
	all, err := members(ctx, c, leader)
	check(t, err)
	for _, m := range all {
		if m.ID == leader && (m.Writes || !strings.Contains(m.Reason, "no quorum")) {
			t.Errorf("status: %+v", m)
		}
	}

	// The one that was taken: it is in this node's log and nowhere else, so nobody can know.
	err = <-ended
	if cluster.SQLState(err) != "08007" || waited > commitTimeout+time.Second {
		t.Errorf("a commit that was under way ends after %v, with %v", waited, err)
	}
	undecided := regexp.MustCompile(`\d+-[0-9a-f]+-\d+`).FindString(fmt.Sprint(err))
	thaw()
	thawed := time.Now()
	executeAnew(t, ctx, c, leader, "UPDATE spots SET v = 'again' WHERE id = 4")
	t.Logf("the node writes %v after the others woke up", time.Since(thawed).Round(time.Millisecond))
	eventuallyEvery(t, ctx, asking, func() error { return c.Settle(ctx) }) // one of the others is enough for a write
	gids[undecided] = one[string](t, ctx, gateway(t, ctx, c, leader), ask, undecided)
	for i := 1; i <= c.Nodes; i++ {
		conn := gateway(t, ctx, c, i)
		for gid, status := range gids {
			equals(t, ctx, conn, status, ask, gid)
		}
		equals(t, ctx, conn, gids[undecided] == "committed", "SELECT v = 'late' FROM spots WHERE id = 2")
	}
	t.Logf("the commit whose outcome was unknown after %v is %s", waited.Round(time.Millisecond), gids[undecided])
	everywhere(t, ctx, c, "|again", "SELECT string_agg(v, '|' ORDER BY id) FROM spots WHERE id IN (1, 4)")
}
