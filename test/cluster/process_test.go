package cluster_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/quorate/quorate/test/cluster"
)

// position returns the newest transaction, by its place in the order, that any node has made visible.
func position(t *testing.T, ctx context.Context, c *cluster.Cluster) uint64 {
	t.Helper()
	out, err := c.Status(ctx, 1, "-o", "json")
	check(t, err)
	var status struct {
		Members []struct {
			AppliedCSN uint64 `json:"applied_csn"`
		}
	}
	if err := json.Unmarshal(out, &status); err != nil {
		t.Fatalf("read status: %v\n%s", err, out)
	}
	var newest uint64
	for _, m := range status.Members {
		newest = max(newest, m.AppliedCSN)
	}
	if newest == 0 {
		t.Fatalf("status tells of no transaction: %s", out)
	}
	return newest
}

func TestStatus(t *testing.T) {
	c, ctx := shared(t)
	if c.Attached() {
		t.Skip("an attached cluster has no address for its status")
	}
	for i := 1; i <= c.Nodes; i++ {
		table, err := c.Status(ctx, i)
		check(t, err)
		for n := 1; n <= c.Nodes; n++ {
			if !strings.Contains(string(table), fmt.Sprint(n)) {
				t.Errorf("status of node %d does not name node %d:\n%s", i, n, table)
			}
		}
		if !strings.Contains(strings.ToLower(string(table)), "leader") {
			t.Errorf("status of node %d names no leader:\n%s", i, table)
		}
	}
}

// TestLargeTransaction: two hundred thousand rows in one transaction reach every node, and no sidecar holds them in
// memory. The race detector's own memory would count, so this cluster is built without.
func TestLargeTransaction(t *testing.T) {
	const rows, fewer, bound = 200_000, 15_000, 256 << 20
	c, ctx := private(t, cluster.Options{Binary: command(t, false)})
	create(t, ctx, c, "CREATE TABLE wide (id int PRIMARY KEY, a text, b text, n bigint)")
	conn := gateway(t, ctx, c, 2)
	begin := time.Now()
	must(t, ctx, conn, "INSERT INTO wide SELECT i, md5(i::text), repeat(md5((i + 1)::text), 4), 0 FROM generate_series(1, $1::int) i", rows)
	t.Logf("%d rows inserted in %v", rows, time.Since(begin).Round(time.Millisecond))
	begin = time.Now()
	check(t, c.Verify(ctx))
	t.Logf("on all nodes %v later", time.Since(begin).Round(time.Millisecond))

	// While another large one is under way, small ones commit. It stands for the whole table, so that one of them that is ordered
	// between its COMMIT and itself has it begin anew.
	var group sync.WaitGroup
	group.Go(func() {
		if err := retry(ctx, func() error {
			_, err := conn.Exec(ctx, "UPDATE wide SET n = n + 1 WHERE id > $1", rows-fewer)
			return err
		}); err != nil {
			t.Errorf("large update: %v", err)
		}
	})
	small := gateway(t, ctx, c, 3)
	for range 20 {
		if err := retry(ctx, func() error {
			_, err := small.Exec(ctx, "UPDATE wide SET n = n + 1 WHERE id = 1")
			return err
		}); err != nil {
			t.Fatalf("small update: %v", err)
		}
	}
	group.Wait()
	everywhere(t, ctx, c, int64(fewer+20), "SELECT sum(n)::bigint FROM wide")

	// And one that is rolled back leaves nothing.
	must(t, ctx, conn, "BEGIN")
	must(t, ctx, conn, "DELETE FROM wide WHERE id > $1", rows-fewer)
	must(t, ctx, conn, "ROLLBACK")
	check(t, c.Verify(ctx))
	for i := 1; i <= c.Nodes; i++ {
		pid, err := c.SidecarPID(i)
		check(t, err)
		peak, err := cluster.PeakRSS(pid)
		check(t, err)
		t.Logf("sidecar %d: at most %d MiB", i, peak>>20)
		if peak > bound {
			t.Errorf("the sidecar of node %d held %d MiB, more than %d", i, peak>>20, bound>>20)
		}
	}
	check(t, c.Stop())
}

// TestStopAndResume: a demo that was stopped has all its data when it starts again; a sidecar that was killed, and
// nothing else, comes back by itself and gets what it missed.
func TestStopAndResume(t *testing.T) {
	c, ctx := private(t, options(t))
	create(t, ctx, c, "CREATE TABLE ledger (id int PRIMARY KEY, node int, v text)")
	write := func(node, first, n int) {
		t.Helper()
		conn, err := c.Connect(ctx, node)
		check(t, err)
		for id := first; id < first+n; id++ {
			must(t, ctx, conn, "INSERT INTO ledger VALUES ($1, $2, repeat('x', 200))", id, node)
		}
		check(t, conn.Close(ctx))
	}
	for i := 1; i <= c.Nodes; i++ {
		write(i, i*1000, 20)
	}
	check(t, c.Verify(ctx))

	begin := time.Now()
	check(t, c.Stop())
	t.Logf("stopped in %v", time.Since(begin).Round(time.Millisecond))
	begin = time.Now()
	check(t, c.Resume(ctx))
	t.Logf("resumed in %v", time.Since(begin).Round(time.Millisecond))
	everywhere(t, ctx, c, int64(60), "SELECT count(*) FROM ledger")
	for i := 1; i <= c.Nodes; i++ {
		write(i, i*1000+100, 20)
	}
	before := useLed(t, ctx, c)

	// Killed with a transaction open and others coming in.
	victim := gateway(t, ctx, c, 2)
	must(t, ctx, victim, "BEGIN")
	must(t, ctx, victim, "INSERT INTO ledger VALUES (-1)")
	check(t, c.KillNode(ctx, 2))
	if _, err := victim.Exec(ctx, "COMMIT"); err == nil {
		t.Error("a session through a sidecar that was killed has committed")
	}
	write(1, 1200, 20)
	write(3, 3200, 20)
	begin = time.Now()
	check(t, c.RunNode(ctx, 2))
	t.Logf("node 2 came back in %v", time.Since(begin).Round(time.Millisecond))
	write(2, 2200, 20)
	everywhere(t, ctx, c, int64(180), "SELECT count(*) FROM ledger WHERE id > 0")
	everywhere(t, ctx, c, int64(0), "SELECT count(*) FROM ledger WHERE id < 0")
	check(t, c.Verify(ctx))

	// Once more, under load: what was acknowledged is there, what failed may or may not be.
	killUnderLoad(t, ctx, c)
	awaitUsageLed(t, ctx, c, before) // nothing is left of the dead
	check(t, c.Stop())
}

// killUnderLoad kills the sidecar of node 3 while all nodes write, starts it again, and audits what was acknowledged.
func killUnderLoad(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	create(t, ctx, c, "CREATE TABLE audit (id text PRIMARY KEY)")
	var mu sync.Mutex
	acknowledged := map[string]bool{}
	stop := make(chan struct{})
	var group sync.WaitGroup
	for i := 1; i <= c.Nodes; i++ {
		group.Go(func() {
			var conn *pgx.Conn
			defer func() {
				if conn != nil {
					_ = conn.Close(ctx)
				}
			}()
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				if conn == nil || conn.IsClosed() {
					var err error
					if conn, err = c.Connect(ctx, i); err != nil {
						conn = nil
						time.Sleep(20 * time.Millisecond) // it is down
						continue
					}
				}
				id := fmt.Sprintf("%d-%d", i, n)
				if _, err := conn.Exec(ctx, "INSERT INTO audit VALUES ($1)", id); err == nil {
					mu.Lock()
					acknowledged[id] = true
					mu.Unlock()
				}
			}
		})
	}
	time.Sleep(500 * time.Millisecond) // of load before
	killed := c.KillNode(ctx, 3)
	time.Sleep(500 * time.Millisecond) // of load on the majority that is left
	ran := c.RunNode(ctx, 3)
	time.Sleep(500 * time.Millisecond) // of load after
	close(stop)
	group.Wait()
	check(t, killed)
	check(t, ran)
	check(t, c.Verify(ctx))
	conn := direct(t, ctx, c, 3)
	rows, err := conn.Query(ctx, "SELECT id FROM audit")
	check(t, err)
	present, err := pgx.CollectRows(rows, pgx.RowTo[string])
	check(t, errors.Join(err, conn.Close(ctx)))
	for _, id := range present {
		delete(acknowledged, id)
	}
	t.Logf("%d rows after the kill", len(present))
	if len(acknowledged) > 0 {
		t.Errorf("%d acknowledged rows are lost, for example %v", len(acknowledged), anyKey(acknowledged))
	}
}

func anyKey(m map[string]bool) string {
	for k := range m {
		return k
	}
	return ""
}
