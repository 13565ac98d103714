package cluster_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/test/cluster"
)

// TestRecovery kills parts of one cluster, one after the other and under load: everything that was acknowledged is
// there afterwards, nothing that was refused, nothing twice; the nodes are equal, and what was killed came back.
func TestRecovery(t *testing.T) {
	parallel(t)
	recoverFrom(t, options(t), []fault{
		{"PostgresKilled", postgresKilled},
		{"BackendKilled", backendKilled},
		{"AsynchronousCommitsLost", asynchronousCommitsLost},
		{"PostgresCannotStart", postgresCannotStart},
		{"FollowerKilled", followerKilled},
		{"LeaderKilled", leaderKilled},
		{"NodeKilled", nodeKilled},
		{"AllKilled", allKilled},
		{"SessionDiesBeforeItsTurn", sessionDiesBeforeItsTurn},
		{"SlotDropped", slotDropped},
		{"ConnectionsExhausted", connectionsExhausted},
		{"PostgresDiskFull", postgresDiskFull},
		{"SpillDiskFull", spillDiskFull},
		{"Diverged", diverged},
	})
}

// TestRecoveryFullDisks is the same for disks on which a node can do nothing more.
func TestRecoveryFullDisks(t *testing.T) {
	forStress(t)
	parallel(t)
	recoverFrom(t, options(t), []fault{
		{"RaftLogDiskFull", raftLogDiskFull},
		{"WALDiskFull", walDiskFull},
	})
}

// TestRecoveryAttached is the same for nodes that are attached to servers which somebody else starts again, with the faults for
// which it matters who that is. It is for make stress.
func TestRecoveryAttached(t *testing.T) {
	forStress(t)
	parallel(t)
	o := options(t)
	o.Supervised = true
	recoverFrom(t, o, []fault{
		{"PostgresKilled", postgresKilled},
		{"NodeKilled", nodeKilled},
		{"BackendKilled", backendKilled},
		{"AsynchronousCommitsLost", asynchronousCommitsLost},
		{"PostgresCannotStart", postgresCannotStart},
		{"FollowerKilled", followerKilled},
		{"LeaderKilled", leaderKilled},
		{"AllKilled", allKilled},
		{"SessionDiesBeforeItsTurn", sessionDiesBeforeItsTurn},
	})
}

type fault struct {
	name string
	run  func(t *testing.T, ctx context.Context, c *cluster.Cluster)
}

func recoverFrom(t *testing.T, o cluster.Options, faults []fault) {
	c, _ := private(t, o)
	ctx := t.Context() // each fault has a bound of its own
	create(t, ctx, c,
		"CREATE TABLE entries (id text PRIMARY KEY, writer text NOT NULL)",
		"CREATE TABLE counters (writer text PRIMARY KEY, n bigint NOT NULL)",
		"CREATE TABLE spots (id int PRIMARY KEY, v text NOT NULL)",
		"INSERT INTO spots SELECT i, '' FROM generate_series(1, 10) i")
	for _, f := range faults {
		if !t.Run(f.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(ctx, 2*testTimeout) // some start a node four times, beside other tests
			defer cancel()
			f.run(t, ctx, c)
			if err := c.Verify(ctx); err != nil {
				t.Error(err)
			}
		}) {
			break // what follows would only say so again
		}
	}
	check(t, c.Stop())
}

// load is writers on every node. Each transaction inserts a row and counts it, so that a transaction that was applied
// twice, or by half, shows.
type load struct {
	t     *testing.T
	c     *cluster.Cluster
	begin time.Time
	stop  context.CancelFunc
	ended sync.WaitGroup

	mu      sync.Mutex
	told    map[string]bool     // ids of transactions whose outcome the client was told
	commits map[int][]time.Time // by node
}

// What is tested is that nothing is lost, not how much can be done: writers are few, and rest between two transactions, so that
// what is broken has a processor to mend itself on.
const (
	writersPerNode = 3
	writersRest    = 60 * time.Millisecond
)

func startLoad(t *testing.T, ctx context.Context, c *cluster.Cluster) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	l := &load{t: t, c: c, begin: time.Now(), stop: cancel, told: map[string]bool{}, commits: map[int][]time.Time{}}
	t.Cleanup(cancel)
	for i := 1; i <= c.Nodes; i++ {
		for w := range writersPerNode {
			l.ended.Go(func() { l.write(ctx, i, fmt.Sprintf("%s/%d.%d", t.Name(), i, w)) })
		}
	}
	l.awaitCommits(ctx, 10)
	return l
}

// write commits again and again, whatever happens to its node.
func (l *load) write(ctx context.Context, node int, writer string) {
	var conn *pgconn.PgConn
	defer func() {
		if conn != nil {
			_ = conn.Close(context.WithoutCancel(ctx))
		}
	}()
	known := false
	for n := 0; ctx.Err() == nil; n++ {
		if conn == nil || conn.IsClosed() {
			session, err := l.c.Connect(ctx, node)
			if err != nil {
				select {
				case <-ctx.Done():
				case <-time.After(writersRest): // it is down, and only asking tells when it is up again
				}
				continue
			}
			conn = session.PgConn()
		}
		counter := "UPDATE counters SET n = n + 1 WHERE writer = '" + writer + "'"
		if !known {
			counter = "INSERT INTO counters VALUES ('" + writer + "', 1) ON CONFLICT (writer) DO UPDATE SET n = counters.n + 1"
		}
		id := fmt.Sprintf("%s.%d", writer, n)
		// A COMMIT that is under way must not be given up: its outcome is what is tested.
		_, err := conn.Exec(context.WithoutCancel(ctx), "BEGIN; INSERT INTO entries VALUES ('"+id+"', '"+writer+"'); "+counter+"; COMMIT").ReadAll()
		if err != nil && !conn.IsClosed() && conn.TxStatus() != 'I' {
			_, _ = conn.Exec(context.WithoutCancel(ctx), "ROLLBACK").ReadAll()
		}
		l.mu.Lock()
		switch {
		case err == nil:
			known = true
			l.told[id] = true
			l.commits[node] = append(l.commits[node], time.Now())
		case slices.Contains([]string{"40001", "25006", "53000", "57P03"}, cluster.SQLState(err)):
			l.told[id] = false
		}
		l.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(writersRest):
		}
	}
}

// awaitCommits waits until every node has committed n more.
func (l *load) awaitCommits(ctx context.Context, n int, nodes ...int) {
	l.t.Helper()
	if len(nodes) == 0 {
		for i := 1; i <= l.c.Nodes; i++ {
			nodes = append(nodes, i)
		}
	}
	before := l.counts()
	eventually(l.t, ctx, func() error {
		now := l.counts()
		for _, i := range nodes {
			if now[i]-before[i] < n {
				return fmt.Errorf("node %d commits nothing: %d more", i, now[i]-before[i])
			}
		}
		return nil
	})
}

func (l *load) counts() map[int]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	counts := map[int]int{}
	for i, times := range l.commits {
		counts[i] = len(times)
	}
	return counts
}

// longestPause is the longest time without a commit on any of these nodes after since.
func (l *load) longestPause(since time.Time, nodes ...int) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	var times []time.Time
	for _, i := range nodes {
		times = append(times, l.commits[i]...)
	}
	slices.SortFunc(times, time.Time.Compare)
	var longest time.Duration
	last := since
	for _, at := range times {
		if at.After(since) {
			longest = max(longest, at.Sub(last))
			last = at
		}
	}
	return longest
}

// finish ends the load and audits it.
func (l *load) finish(ctx context.Context) {
	l.t.Helper()
	l.stop()
	l.ended.Wait()
	check(l.t, l.c.Settle(ctx))
	for i := 1; i <= l.c.Nodes; i++ {
		conn := direct(l.t, ctx, l.c, i)
		rows, err := conn.Query(ctx, "SELECT id FROM entries WHERE writer LIKE $1", l.t.Name()+"/%")
		check(l.t, err)
		present := map[string]bool{}
		for rows.Next() {
			var id string
			check(l.t, rows.Scan(&id))
			present[id] = true
		}
		check(l.t, rows.Err())
		for id, committed := range l.told {
			if committed && !present[id] {
				l.t.Errorf("node %d: acknowledged transaction %s is lost", i, id)
			}
			if !committed && present[id] {
				l.t.Errorf("node %d: transaction %s was refused and is there", i, id)
			}
		}
		equals(l.t, ctx, conn, true, `SELECT coalesce(bool_and(c.n = (SELECT count(*) FROM entries e WHERE e.writer = c.writer)), true)
			FROM counters c WHERE c.writer LIKE $1`, l.t.Name()+"/%")
		check(l.t, conn.Close(ctx))
	}
}

// asking is how often what takes a process, a page of metrics or a transaction is looked at: each look takes from what is waited for.
const asking = 100 * time.Millisecond

// eventually looks again and again until there is no error.
func eventually(t *testing.T, ctx context.Context, look func() error) {
	t.Helper()
	eventuallyEvery(t, ctx, 5*time.Millisecond, look)
}

func eventuallyEvery(t *testing.T, ctx context.Context, interval time.Duration, look func() error) {
	t.Helper()
	for {
		err := look()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal(err)
		case <-time.After(interval):
		}
	}
}

type member struct {
	ID     int
	Role   string
	State  string
	Reason string
	Writes bool   `json:"accepts_writes"`
	CSN    uint64 `json:"applied_csn"`
}

// members is what a node says of all.
func members(ctx context.Context, c *cluster.Cluster, asked int) ([]member, error) {
	out, err := c.Status(ctx, asked, "-o", "json")
	if err != nil {
		return nil, err
	}
	var status struct{ Members []member }
	if err := json.Unmarshal(out, &status); err != nil {
		return nil, fmt.Errorf("read status: %w\n%s", err, out)
	}
	return status.Members, nil
}

// leaderOf returns the leader and one that follows.
func leaderOf(t *testing.T, ctx context.Context, c *cluster.Cluster) (leader, follower int) {
	t.Helper()
	eventuallyEvery(t, ctx, asking, func() error {
		all, err := members(ctx, c, 1)
		if err != nil {
			return err
		}
		leader, follower = 0, 0
		for _, m := range all {
			if m.Role == "leader" {
				leader = m.ID
			} else if m.State == "active" {
				follower = m.ID
			}
		}
		if leader == 0 || follower == 0 {
			return fmt.Errorf("no leader, or no active follower: %+v", all)
		}
		return nil
	})
	return leader, follower
}

// lead makes a node the leader.
func lead(t *testing.T, ctx context.Context, c *cluster.Cluster, i int) {
	t.Helper()
	eventuallyEvery(t, ctx, asking, func() error { // others may be elected meanwhile
		if leader, _ := leaderOf(t, ctx, c); leader == i {
			return nil
		}
		_, err := c.Command(ctx, "transfer-leadership", "--address", c.GRPC(i), "--to", strconv.Itoa(i))
		return err
	})
}

// awaitState waits until node i says of itself that it is in a state, for a reason with these words.
func awaitState(t *testing.T, ctx context.Context, c *cluster.Cluster, i int, state, reason string) {
	t.Helper()
	eventuallyEvery(t, ctx, asking, func() error { return isState(ctx, c, i, state, reason) })
}

func isState(ctx context.Context, c *cluster.Cluster, i int, state, reason string) error {
	all, err := members(ctx, c, i)
	if err != nil {
		return err
	}
	for _, m := range all {
		if m.ID == i && (m.State != state || !strings.Contains(m.Reason, reason) || m.Writes != (state == "active")) {
			return fmt.Errorf("node %d is %+v, want state %q and reason %q", i, m, state, reason)
		}
	}
	return nil
}

func others(c *cluster.Cluster, but ...int) (nodes []int) {
	for i := 1; i <= c.Nodes; i++ {
		if !slices.Contains(but, i) {
			nodes = append(nodes, i)
		}
	}
	return nodes
}

func kill(t *testing.T, pid int, err error) {
	t.Helper()
	check(t, err)
	check(t, syscall.Kill(pid, syscall.SIGKILL))
}

func postgresKilled(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	leader, follower := leaderOf(t, ctx, c)
	for _, i := range []int{follower, leader} {
		l := startLoad(t, ctx, c)
		killed := time.Now()
		pid, err := c.PostmasterPID(i)
		kill(t, pid, err)
		l.awaitCommits(ctx, 20, others(c, i)...)
		l.awaitCommits(ctx, 20, i)
		awaitState(t, ctx, c, i, "active", "")
		t.Logf("PostgreSQL of node %d killed (leader %v): no commit for %v there, for %v on the others", i, i == leader,
			l.longestPause(killed, i).Round(time.Millisecond), l.longestPause(killed, others(c, i)...).Round(time.Millisecond))
		l.finish(ctx)
	}
}

// backendKilled: one server process that dies makes PostgreSQL start all of them anew, under the same postmaster.
func backendKilled(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	l := startLoad(t, ctx, c)
	conn := direct(t, ctx, c, 2)
	killed := time.Now()
	kill(t, int(conn.PgConn().PID()), nil)
	l.awaitCommits(ctx, 20)
	awaitState(t, ctx, c, 2, "active", "")
	t.Logf("a backend of node 2 killed: no commit for %v there, for %v on the others",
		l.longestPause(killed, 2).Round(time.Millisecond), l.longestPause(killed, 1, 3).Round(time.Millisecond))
	l.finish(ctx)
}

// asynchronousCommitsLost: a node that only applies loses what its PostgreSQL had not written, and applies it again.
func asynchronousCommitsLost(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	conn := direct(t, ctx, c, 2)
	for _, sql := range []string{"ALTER SYSTEM SET wal_writer_delay = '10s'", "ALTER SYSTEM SET wal_writer_flush_after = '100MB'"} {
		must(t, ctx, conn, sql)
	}
	must(t, ctx, conn, "SELECT pg_reload_conf()")
	writer, watcher := gateway(t, ctx, c, 1), direct(t, ctx, c, 2)
	awaitQuery(t, ctx, watcher, "SELECT current_setting('wal_writer_delay') = '10s'")
	lost := 0
	for attempt := range 20 { // what is not written by chance of a flush in between
		for n := range 20 {
			must(t, ctx, writer, "UPDATE spots SET v = $1 WHERE id = 1", fmt.Sprint(attempt, n))
		}
		awaitQuery(t, ctx, watcher, "SELECT v = $1 FROM spots WHERE id = 1", fmt.Sprint(attempt, 19))
		applied := number(t, metric(t, ctx, c, 2, "quorate_apply_applied_csn"))
		pid, err := c.PostmasterPID(2)
		kill(t, pid, err)
		eventuallyEvery(t, ctx, asking, func() error { return c.Settle(ctx) })
		watcher = direct(t, ctx, c, 2)
		if lost = applied - number(t, metric(t, ctx, c, 2, "quorate_node_start_csn")); lost > 0 {
			break
		}
	}
	if lost <= 0 {
		t.Error("nothing was lost in any attempt: nothing is tested")
	}
	t.Logf("%d transactions were lost and applied again", lost)
	for _, sql := range []string{"ALTER SYSTEM RESET wal_writer_delay", "ALTER SYSTEM RESET wal_writer_flush_after", "SELECT pg_reload_conf()"} {
		must(t, ctx, watcher, sql)
	}
}

// postgresCannotStart: while its PostgreSQL cannot start, a node says so to everybody who asks, tries again, and needs
// nobody when the cause is gone.
func postgresCannotStart(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	l := startLoad(t, ctx, c)
	restore := spoil(t, c, 2)
	pid, err := c.PostmasterPID(2)
	kill(t, pid, err)
	awaitState(t, ctx, c, 2, "recovering", "the node's PostgreSQL server is not running")
	_, err = c.Connect(ctx, 2)
	if cluster.SQLState(err) != "57P03" || !strings.Contains(err.Error(), "the node's PostgreSQL server is not running") {
		t.Errorf("connect to the node meanwhile: %v", err)
	}
	if m := metric(t, ctx, c, 2, `quorate_node_state{state="recovering"}`); m != "1" {
		t.Errorf("metric of the state is %q", m)
	}
	l.awaitCommits(ctx, 20, 1, 3)
	// A sidecar that starts now does not give up either.
	check(t, c.KillNode(ctx, 2))
	check(t, c.StartNode(2))
	awaitState(t, ctx, c, 2, "recovering", "the node's PostgreSQL server is not running")
	l.awaitCommits(ctx, 20, 1, 3)
	restore()
	l.awaitCommits(ctx, 20, 2)
	awaitState(t, ctx, c, 2, "active", "")
	l.finish(ctx)
}

func followerKilled(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	_, follower := leaderOf(t, ctx, c)
	sidecarKilled(t, ctx, c, follower)
}

func leaderKilled(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	leader, _ := leaderOf(t, ctx, c)
	sidecarKilled(t, ctx, c, leader)
}

func sidecarKilled(t *testing.T, ctx context.Context, c *cluster.Cluster, i int) {
	l := startLoad(t, ctx, c)
	killed := time.Now()
	check(t, c.KillNode(ctx, i))
	l.awaitCommits(ctx, 20, others(c, i)...)
	started := time.Now()
	check(t, c.StartNode(i))
	l.awaitCommits(ctx, 20, i)
	t.Logf("sidecar of node %d killed: no commit for %v on the others; the node commits %v after its start", i,
		l.longestPause(killed, others(c, i)...).Round(time.Millisecond), l.longestPause(started, i).Round(time.Millisecond))
	l.finish(ctx)
}

// nodeKilled kills the sidecar and the PostgreSQL of the leader.
func nodeKilled(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	leader, _ := leaderOf(t, ctx, c)
	l := startLoad(t, ctx, c)
	killed := time.Now()
	killWhole(t, ctx, c, leader)
	l.awaitCommits(ctx, 20, others(c, leader)...)
	check(t, c.StartNode(leader))
	l.awaitCommits(ctx, 20, leader)
	t.Logf("node %d, the leader, killed with its PostgreSQL: no commit for %v on the others", leader,
		l.longestPause(killed, others(c, leader)...).Round(time.Millisecond))
	l.finish(ctx)
}

// killWhole kills a node's processes, first the one or the other.
func killWhole(t *testing.T, ctx context.Context, c *cluster.Cluster, i int) {
	t.Helper()
	steps := []func(){
		func() { check(t, c.KillNode(ctx, i)) },
		func() { pid, err := c.PostmasterPID(i); kill(t, pid, err) },
	}
	if rand.IntN(2) == 0 {
		slices.Reverse(steps)
	}
	for _, step := range steps {
		step()
	}
}

// allKilled kills everything, and starts it in any order.
func allKilled(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	l := startLoad(t, ctx, c)
	for i := 1; i <= c.Nodes; i++ {
		killWhole(t, ctx, c, i)
	}
	order := rand.Perm(c.Nodes)
	for k := range order {
		order[k]++
	}
	started := time.Now()
	last := len(order) - 1
	for _, i := range order[:last] {
		check(t, c.StartNode(i))
	}
	l.awaitCommits(ctx, 20, order[:last]...)
	t.Logf("a majority commits %v after it was started", time.Since(started).Round(time.Millisecond))
	check(t, c.StartNode(order[last]))
	l.awaitCommits(ctx, 20)
	t.Logf("all nodes commit %v after they were started, in the order %v", time.Since(started).Round(time.Millisecond), order)
	l.finish(ctx)
}

// sessionDiesBeforeItsTurn: a transaction is decided and waits behind another one when its session is ended. It is
// committed all the same, and its client is told so.
func sessionDiesBeforeItsTurn(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	blocker, watcher := direct(t, ctx, c, 1), direct(t, ctx, c, 1)
	must(t, ctx, blocker, "BEGIN READ WRITE")
	must(t, ctx, blocker, "SELECT FROM spots WHERE id = 1 FOR UPDATE")
	doomed := gateway(t, ctx, c, 1)
	pid := doomed.PgConn().PID()
	must(t, ctx, doomed, "BEGIN")
	must(t, ctx, doomed, "UPDATE spots SET v = 'doomed' WHERE id = 2")
	// Node 1 cannot apply this one while the blocker has the row.
	must(t, ctx, gateway(t, ctx, c, 2), "UPDATE spots SET v = 'ahead' WHERE id = 1")
	awaitQuery(t, ctx, watcher, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE 'quorate_apply%' AND wait_event_type = 'Lock')")
	before := metric(t, ctx, c, 1, `quorate_coord_transactions_total{reason="none"}`)
	done := make(chan error)
	go func() {
		_, err := doomed.Exec(ctx, "COMMIT")
		done <- err
	}()
	eventually(t, ctx, func() error {
		if metric(t, ctx, c, 1, `quorate_coord_transactions_total{reason="none"}`) == before {
			return errors.New("the transaction is not decided")
		}
		return nil
	})
	must(t, ctx, watcher, "SELECT pg_terminate_backend($1)", pid)
	if err := <-done; err != nil {
		t.Errorf("COMMIT of the session that was ended: %v", err)
	}
	everywhere(t, ctx, c, "ahead,doomed", "SELECT string_agg(v, ',' ORDER BY id) FROM spots WHERE id < 3")
}

// connectionsExhausted: a node that gets no connection to its PostgreSQL fences itself, says why, and goes on when there
// are some again.
func connectionsExhausted(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	l := startLoad(t, ctx, c)
	first := direct(t, ctx, c, 3)
	taken := []*pgx.Conn{first}
	take := func() {
		for {
			conn, err := c.Direct(ctx, 3)
			if ctx.Err() != nil || cluster.SQLState(err) == "53300" {
				return
			}
			if err == nil {
				taken = append(taken, conn)
			}
		}
	}
	take()
	l.awaitCommits(ctx, 20) // what has its connections goes on
	// The node's own are ended, again if it got them back before their places were taken.
	eventually(t, ctx, func() error {
		must(t, ctx, first, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND application_name LIKE 'quorate%'")
		take()
		return isState(ctx, c, 3, "recovering", "too many clients")
	})
	l.awaitCommits(ctx, 20, 1, 2)
	for _, conn := range taken {
		_ = conn.Close(ctx) // the node may have ended it
	}
	l.awaitCommits(ctx, 20)
	awaitState(t, ctx, c, 3, "active", "")
	l.finish(ctx)
}

// slotDropped: without its slot a node captures nothing. COMMITs wait for it, but not for ever: the node makes another.
func slotDropped(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	l := startLoad(t, ctx, c)
	before := number(t, metric(t, ctx, c, 2, "quorate_node_recoveries_total"))
	conn := direct(t, ctx, c, 2)
	dropped := time.Now()
	eventually(t, ctx, func() error { // capture may be back before it is dropped
		_, err := conn.Exec(ctx, `SELECT pg_terminate_backend(active_pid, 1000), pg_drop_replication_slot(slot_name)
			FROM pg_replication_slots WHERE slot_name = 'quorate'`)
		return err
	})
	eventuallyEvery(t, ctx, asking, func() error {
		if number(t, metric(t, ctx, c, 2, "quorate_node_recoveries_total")) == before {
			return errors.New("the node goes on without a slot")
		}
		return nil
	})
	awaitState(t, ctx, c, 2, "active", "")
	l.awaitCommits(ctx, 20)
	if bound := metric(t, ctx, c, 2, "quorate_postgres_wal_kept_limit_bytes"); number(t, bound) != 32<<30 { // twice limits.clone_wal
		t.Errorf("what a slot may keep is %q", bound)
	}
	t.Logf("the slot of node 2 dropped: no commit for %v there, for %v on the others",
		l.longestPause(dropped, 2).Round(time.Millisecond), l.longestPause(dropped, 1, 3).Round(time.Millisecond))
	l.finish(ctx)
}

// postgresDiskFull: the table's disk on one node is full. It fences itself, the others go on, and when there is room
// again it catches up by itself.
func postgresDiskFull(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	for i := 1; i <= c.Nodes; i++ {
		dir := filepath.Join(c.NodeDir(i), "small")
		check(t, os.Mkdir(dir, 0o755))
		if i == 2 {
			mountSmall(t, dir, "1m")
		}
		own(t, dir, filepath.Join(c.NodeDir(i), "pgdata"))
		conn := direct(t, ctx, c, i)
		must(t, ctx, conn, "SET default_transaction_read_only = off")
		must(t, ctx, conn, "CREATE TABLESPACE small LOCATION '"+dir+"'")
		check(t, conn.Close(ctx))
	}
	create(t, ctx, c, "CREATE TABLE filled (id int PRIMARY KEY, v text) TABLESPACE small")
	conn := gateway(t, ctx, c, 1)
	must(t, ctx, conn, "ALTER TABLE filled ALTER v SET STORAGE plain")
	must(t, ctx, conn, "INSERT INTO filled SELECT i, repeat('x', 5000) FROM generate_series(1, 500) i")
	awaitState(t, ctx, c, 2, "recovering", "No space left on device")
	_, err := c.Connect(ctx, 2)
	if cluster.SQLState(err) != "57P03" || !strings.Contains(err.Error(), "No space left on device") {
		t.Errorf("connect to the node meanwhile: %v", err)
	}
	must(t, ctx, conn, "INSERT INTO filled VALUES (0)")
	check(t, syscall.Mount("tmpfs", filepath.Join(c.NodeDir(2), "small"), "tmpfs", syscall.MS_REMOUNT, "size=50m"))
	awaitState(t, ctx, c, 2, "active", "")
	everywhere(t, ctx, c, int64(501), "SELECT count(*) FROM filled")
	must(t, ctx, conn, "DROP TABLE filled")
	check(t, c.Settle(ctx))
	for i := 1; i <= c.Nodes; i++ {
		conn := direct(t, ctx, c, i)
		must(t, ctx, conn, "SET default_transaction_read_only = off")
		must(t, ctx, conn, "DROP TABLESPACE small")
		check(t, conn.Close(ctx))
	}
}

// spillDiskFull: a large transaction that cannot be recorded fails alone.
func spillDiskFull(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	mountSmall(t, filepath.Join(c.NodeDir(1), "spill"), "1m")
	create(t, ctx, c, "CREATE TABLE spilled (id int PRIMARY KEY, v text)")
	conn := gateway(t, ctx, c, 1)
	_, err := conn.Exec(ctx, "INSERT INTO spilled SELECT i, repeat(md5(i::text), 100) FROM generate_series(1, 5000) i")
	if cluster.SQLState(err) != "53000" {
		t.Errorf("a transaction whose changes found no room: %v", err)
	}
	must(t, ctx, conn, "INSERT INTO spilled VALUES (1)")
	awaitState(t, ctx, c, 1, "active", "")
	everywhere(t, ctx, c, int64(1), "SELECT count(*) FROM spilled")
}

// mountSmall mounts a file system of this size until the end of the test.
func mountSmall(t *testing.T, dir, size string) {
	t.Helper()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("a small file system cannot be mounted here: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// own gives dir to the owner of like.
func own(t *testing.T, dir, like string) {
	t.Helper()
	info, err := os.Stat(like)
	check(t, err)
	of := info.Sys().(*syscall.Stat_t)
	check(t, os.Chown(dir, int(of.Uid), int(of.Gid)))
}

// diverged: a row that is gone on one node makes that node stop, for good, when the log changes the row; it votes on.
// With the row put back it goes on where it stopped, when it is started again.
func diverged(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	leader, victim := leaderOf(t, ctx, c)
	behind := direct(t, ctx, c, victim)
	for _, sql := range []string{"SET default_transaction_read_only = off", "SET session_replication_role = replica", "DELETE FROM spots WHERE id = 7"} {
		must(t, ctx, behind, sql)
	}
	l := startLoad(t, ctx, c)
	open := gateway(t, ctx, c, victim)
	must(t, ctx, gateway(t, ctx, c, leader), "UPDATE spots SET v = 'seven' WHERE id = 7")
	awaitState(t, ctx, c, victim, "failed", `UPDATE public.spots (id=7): touched 0 rows, not 1`)
	if _, err := c.Connect(ctx, victim); cluster.SQLState(err) != "57P03" || !strings.Contains(err.Error(), "diverged") {
		t.Errorf("connect to the node: %v", err)
	}
	if _, err := open.Exec(ctx, "SELECT 1"); err == nil {
		t.Error("a session of the node goes on")
	}
	if m := metric(t, ctx, c, victim, `quorate_node_state{state="failed"}`); m != "1" {
		t.Errorf("metric of the state is %q", m)
	}
	l.awaitCommits(ctx, 20, others(c, victim)...)
	// It still votes: with another node down, it is needed.
	third := others(c, victim, leader)[0]
	check(t, c.KillNode(ctx, third))
	l.awaitCommits(ctx, 20, leader)
	check(t, c.StartNode(third))

	behind = direct(t, ctx, c, victim)
	for _, sql := range []string{"SET default_transaction_read_only = off", "SET session_replication_role = replica", "INSERT INTO spots VALUES (7, '')"} {
		must(t, ctx, behind, sql)
	}
	check(t, behind.Close(ctx))
	check(t, c.KillNode(ctx, victim))
	check(t, c.StartNode(victim))
	l.awaitCommits(ctx, 20)
	l.finish(ctx)
	everywhere(t, ctx, c, "seven", "SELECT v FROM spots WHERE id = 7")
}

// metric is the value of one of a node's metrics, "" if there is none of that name.
func metric(t *testing.T, ctx context.Context, c *cluster.Cluster, i int, name string) string {
	t.Helper()
	all, err := c.Metrics(ctx, i)
	check(t, err)
	value, ok := all[name]
	if !ok {
		return ""
	}
	return strconv.FormatFloat(value, 'g', -1, 64)
}

func number(t *testing.T, text string) int {
	t.Helper()
	f, err := strconv.ParseFloat(text, 64)
	check(t, err)
	return int(f)
}

// spoil makes the next start of node i's PostgreSQL fail, until restore is called.
func spoil(t *testing.T, c *cluster.Cluster, i int) (restore func()) {
	t.Helper()
	name := filepath.Join(c.NodeDir(i), "pgdata", "global", "pg_control")
	check(t, os.Rename(name, name+".away"))
	return func() { check(t, os.Rename(name+".away", name)) }
}
