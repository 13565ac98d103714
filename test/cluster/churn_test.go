package cluster_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/quorate/quorate/test/cluster"
	"github.com/quorate/quorate/test/faults"
)

// seedVariable draws the same kills again in TestGrowAmongKills. Whom they meet, and in the middle of what, depends on the
// machine as well.
const seedVariable = "QUORATE_SEED"

// TestGrowAmongKills is TestGrowAndShrink's long form where, at random moments, a joiner, its donor, the leader or another node
// is killed: its PostgreSQL, its sidecar or both. Every change gets done in the end, if it is asked for again where that is
// needed, and nothing that was acknowledged is lost. It takes minutes, so it runs with stressVariable only; what happens to
// joiner and donor is in TestJoinInterrupted too.
func TestGrowAmongKills(t *testing.T) {
	forStress(t)
	seed := rand.Uint64()
	if text := os.Getenv(seedVariable); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("%s: %v", seedVariable, err)
		}
	}
	t.Logf("%s=%d", seedVariable, seed)
	c, _ := grown(t, 8)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Minute)
	defer cancel()
	w := newWriters(t, ctx, c)
	defer w.stop()
	k := &killer{
		t: t, c: c, w: w, injector: faults.NewInjector(c, nil), random: rand.New(rand.NewPCG(seed, 0)),
		ids: map[int]int{}, kills: map[string]int{},
		// A copy takes a moment only, so who makes one is waited for by a hand of its own.
		hands: []*hand{{roles: []string{"leader", "follower"}, most: 4 * time.Second}, {roles: []string{"joiner", "donor"}, most: time.Second}},
	}
	for _, h := range k.hands {
		k.draw(h)
	}
	k.arrived(ctx, 1)
	k.join(ctx, 2, 1)
	k.join(ctx, 3, 1)
	k.join(ctx, 4, 2)
	k.join(ctx, 5, 3)
	for place := 1; place <= 3; place++ {
		k.join(ctx, place+5, 4)
		k.leave(ctx, place, 5)
	}
	k.leave(ctx, 4, 5)
	k.leave(ctx, 5, 6)
	k.mend(ctx)
	left := slices.Sorted(maps.Keys(k.ids))
	for _, place := range left {
		check(t, c.AwaitState(ctx, place, "active"))
		before := w.count(place)
		eventually(t, ctx, func() error {
			if w.count(place) == before {
				return fmt.Errorf("nothing is written at %d", place)
			}
			return nil
		})
	}
	w.end(ctx, left...)
	for _, place := range left {
		checkNoClone(t, ctx, c, place)
	}
	t.Logf("kills: %v", k.kills)
}

// killer changes a cluster, and kills what it is made of meanwhile. All is done by one goroutine, but for what is asked of nodes.
type killer struct {
	t        *testing.T
	c        *cluster.Cluster
	w        *writers
	injector *faults.Injector
	random   *rand.Rand
	ids      map[int]int // of the nodes, by place
	joining  int         // the place where one joins, or 0
	hands    []*hand
	down     []downed
	kills    map[string]int
}

// rough is for how long each change is made hard. Then it must get done.
const rough = 10 * time.Second

// downed is a fault to be mended.
type downed struct {
	fault *faults.Active
	until time.Time
}

func (k *killer) join(ctx context.Context, place, by int) {
	k.t.Helper()
	check(k.t, k.c.Join(place, by))
	k.joining = place
	k.until(ctx, fmt.Sprintf("join at %d by way of %d", place, by), func(ctx context.Context) error {
		return k.state(ctx, place, "active")
	})
	k.joining = 0
	k.arrived(ctx, place)
}

// arrived gives a node clients.
func (k *killer) arrived(ctx context.Context, place int) {
	k.t.Helper()
	var id int
	k.until(ctx, fmt.Sprintf("ask the node at %d for its id", place), func(ctx context.Context) (err error) {
		id, err = k.c.ID(ctx, place)
		return err
	})
	k.ids[place] = id
	for n := range 2 {
		k.w.running.Go(func() { k.w.persist(ctx, place, fmt.Sprintf("%d-%d-%d", place, n, rand.Int64())) })
	}
}

func (k *killer) leave(ctx context.Context, place, by int) {
	k.t.Helper()
	k.w.setLeaving(place, true)
	id := fmt.Sprint(k.ids[place])
	k.until(ctx, fmt.Sprintf("leave of the node at %d by way of %d", place, by), func(ctx context.Context) error {
		if k.state(ctx, place, "removed") == nil {
			return nil // although the answer may have been lost
		}
		if _, err := k.c.Command(ctx, "leave", id, "--address", k.c.GRPC(by), "--patience", "5s"); err != nil {
			return err
		}
		return k.state(ctx, place, "removed")
	})
	k.mend(ctx) // it may be down
	check(k.t, k.c.AwaitState(ctx, place, "removed"))
	check(k.t, k.c.StopNode(place))
	delete(k.ids, place)
}

// state reports an error unless the node at a place says that it is in a state.
func (k *killer) state(ctx context.Context, place int, state string) error {
	self, members, err := k.c.Members(ctx, place)
	if err != nil {
		return err
	}
	for _, m := range members {
		if m.ID == self && m.State == state {
			return nil
		}
	}
	return fmt.Errorf("node %d is not %s: %+v", self, state, members)
}

// until does something again and again, beside which it kills, until it is done.
func (k *killer) until(ctx context.Context, what string, do func(context.Context) error) {
	k.t.Helper()
	const again, patience, interval = 200 * time.Millisecond, 30 * time.Second, 20 * time.Millisecond
	began := time.Now()
	asked, cancel := context.WithCancel(ctx)
	defer cancel()
	var last error // written by the goroutine, read when it has ended
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			once, cancel := context.WithTimeout(asked, patience)
			last = do(once)
			cancel()
			if last == nil || asked.Err() != nil {
				return
			}
			select {
			case <-time.After(again):
			case <-asked.Done():
			}
		}
	}()
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-done:
			if ctx.Err() != nil {
				k.t.Fatalf("%s: %v", what, last)
			}
			k.t.Logf("%s: done after %v", what, time.Since(began).Round(time.Millisecond))
			return
		case now := <-ticker.C:
			for len(k.down) > 0 && k.down[0].until.Before(now) {
				k.heal(ctx)
			}
			k.checkRunning()
			if now.Sub(began) < rough {
				for _, h := range k.hands {
					k.kill(ctx, h)
				}
			}
		}
	}
}

// checkRunning fails the test if a sidecar has ended that nobody has killed.
func (k *killer) checkRunning() {
	k.t.Helper()
	for _, place := range append(slices.Collect(maps.Keys(k.ids)), k.joining) {
		killed := slices.ContainsFunc(k.down, func(d downed) bool { return slices.Contains(d.fault.Hit, place) })
		if place != 0 && !killed && !k.c.NodeRuns(place) {
			k.t.Fatalf("the node at %d has ended by itself", place)
		}
	}
}

// kill kills what a hand wants killed, if its time has come and its victim is there, and draws the next.
func (k *killer) kill(ctx context.Context, h *hand) {
	k.t.Helper()
	switch {
	case h.role == "joiner" && k.joining == 0, h.role == "donor" && !k.cloning():
		h.since = time.Time{}
		return
	case h.since.IsZero():
		h.since = time.Now()
	}
	if time.Since(h.since) < h.wait {
		return
	}
	place := k.find(ctx, h.role)
	if place == 0 {
		return // between two leaders
	}
	fault, err := k.injector.InjectAt(ctx, h.kind, place, k.random.Uint64())
	check(k.t, err)
	k.t.Logf("%s of %s, at %d, for %v", h.kind, h.role, place, h.lasts)
	k.kills[string(h.kind)+" of "+h.role]++
	k.down = append(k.down, downed{fault, time.Now().Add(h.lasts)})
	if h.kind != faults.PostgresKilled {
		eventually(k.t, ctx, func() error { // or it would not be started again
			if k.c.NodeRuns(place) {
				return fmt.Errorf("the node at %d does not die", place)
			}
			return nil
		})
	}
	k.draw(h)
}

// hand kills one node after another.
type hand struct {
	roles []string
	most  time.Duration // that a victim is let live

	role  string
	kind  faults.Kind
	wait  time.Duration // from when there is one in that role
	lasts time.Duration // until it is started again
	since time.Time     // there has been one; zero: there is none
}

// draw draws what a hand does next.
func (k *killer) draw(h *hand) {
	kinds := []faults.Kind{faults.PostgresKilled, faults.SidecarKilled, faults.NodeKilled}
	h.kind, h.role = kinds[k.random.IntN(len(kinds))], h.roles[k.random.IntN(len(h.roles))]
	h.wait, h.lasts = time.Duration(k.random.Int64N(int64(h.most))), time.Duration(k.random.Int64N(int64(1500*time.Millisecond)))
	h.since = time.Time{}
}

// cloning reports whether a node makes a copy of another one's data.
func (k *killer) cloning() bool {
	_, err := os.Stat(filepath.Join(k.c.NodeDir(k.joining), "pgdata.clone"))
	return k.joining != 0 && err == nil
}

// find returns the place of a node that has a role now, 0 if there is none.
func (k *killer) find(ctx context.Context, role string) int {
	leader := 0
	if id := faults.LeaderOf(ctx, k.c); id != 0 {
		for place, is := range k.ids {
			if is == id {
				leader = place
			}
		}
	}
	switch role {
	case "joiner":
		return k.joining
	case "leader":
		return leader
	case "donor":
		for place := range k.ids {
			if clones(ctx, k.c, place) > 0 {
				return place
			}
		}
		return 0
	}
	others := slices.DeleteFunc(slices.Sorted(maps.Keys(k.ids)), func(place int) bool { return place == leader })
	if len(others) == 0 {
		return 0
	}
	return others[k.random.IntN(len(others))]
}

// heal mends what was broken first.
func (k *killer) heal(ctx context.Context) {
	k.t.Helper()
	check(k.t, k.injector.Heal(ctx, k.down[0].fault))
	k.down = k.down[1:]
}

// mend mends everything.
func (k *killer) mend(ctx context.Context) {
	k.t.Helper()
	for len(k.down) > 0 {
		k.heal(ctx)
	}
}

// clones returns how many sessions the PostgreSQL at a place has for nodes that copy it; 0 if it does not say.
func clones(ctx context.Context, c *cluster.Cluster, place int) (n int) {
	const patience = 500 * time.Millisecond
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	conn, err := c.Direct(ctx, place)
	if err != nil {
		return 0
	}
	defer func() { _ = conn.Close(ctx) }() // nothing more is expected of it
	if err := conn.QueryRow(ctx, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'quorate clone'").Scan(&n); err != nil {
		return 0
	}
	return n
}

// checkNoClone waits until nothing of a copy, finished or broken off, is left at a place: neither where it was taken nor where it
// was made.
func checkNoClone(t *testing.T, ctx context.Context, c *cluster.Cluster, place int) {
	t.Helper()
	conn, err := c.Direct(ctx, place)
	check(t, err)
	defer func() { check(t, conn.Close(ctx)) }()
	eventually(t, ctx, func() error {
		rows, err := conn.Query(ctx, `SELECT 'slot ' || slot_name FROM pg_replication_slots WHERE slot_type = 'physical'
			UNION ALL SELECT 'backup ' || pid FROM pg_stat_progress_basebackup
			UNION ALL SELECT 'session ' || pid FROM pg_stat_activity WHERE application_name = 'quorate clone'`)
		check(t, err)
		left, err := pgx.CollectRows(rows, pgx.RowTo[string])
		check(t, err)
		files, err := filepath.Glob(filepath.Join(c.NodeDir(place), "pgdata?*"))
		check(t, err)
		if left = append(left, files...); len(left) > 0 {
			return fmt.Errorf("of a copy there is left at %d: %v", place, left)
		}
		return nil
	})
}

// persist is write of a client whose node may be killed at any moment: it comes back until its node leaves.
func (w *writers) persist(ctx context.Context, place int, who string) {
	const patience, pause = 20 * time.Second, 50 * time.Millisecond
	var conn *pgx.Conn
	defer func() {
		if conn != nil {
			_ = conn.Close(context.WithoutCancel(ctx)) // it may be gone already
		}
	}()
	departures := w.departures(place)
	for n := 0; w.ctx.Err() == nil; n++ {
		ctx, cancel := context.WithTimeout(ctx, patience)
		var err error
		if conn == nil {
			conn, err = w.c.Connect(ctx, place)
		}
		if err == nil {
			_, err = w.once(ctx, conn, fmt.Sprintf("%s-%d", who, n), place)
		}
		cancel()
		if err == nil {
			continue
		}
		if conn != nil && conn.IsClosed() {
			conn = nil
		}
		if conn == nil && w.mayLeave(place, departures) {
			return
		}
		select {
		case <-time.After(pause):
		case <-w.ctx.Done():
		}
	}
}
