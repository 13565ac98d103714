package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
)

func versions(t *testing.T, test func(t *testing.T, major int)) {
	for _, major := range []int{17, 18} {
		t.Run(map[int]string{17: "PostgreSQL 17", 18: "PostgreSQL 18"}[major], func(t *testing.T) {
			t.Parallel()
			test(t, major)
		})
	}
}

// TestOpenTransaction: at its marker an open transaction's changes are there, with the kept and without the rolled
// back savepoints.
func TestOpenTransaction(t *testing.T) {
	t.Parallel()
	versions(t, func(t *testing.T, major int) {
		n := newNode(t, major, Limits{})
		c := n.client()
		c.run("CREATE TABLE t (id int PRIMARY KEY, v text)")
		c.exec("BEGIN; INSERT INTO t VALUES (1, 'a'), (2, 'b')")
		c.exec("SAVEPOINT s; UPDATE t SET v = 'c' WHERE id = 1; SAVEPOINT u; DELETE FROM t; ROLLBACK TO u; RELEASE s")
		c.exec("SAVEPOINT s; INSERT INTO t VALUES (3, 'x'); ROLLBACK TO s; UPDATE t SET id = 4 WHERE id = 2")
		r, nudges := c.ready()
		if t.Failed() {
			return
		}
		want := []string{
			"INSERT public.t id=t1 v=ta", "INSERT public.t id=t2 v=tb", "UPDATE public.t id=t1 v=tc",
			"UPDATE public.t FROM id=t2 v=n id=t4 v=tb",
		}
		if got := render(t, r); !slices.Equal(got, want) {
			t.Errorf("changes\n%q, want\n%q", got, want)
		}
		if nudges != 0 || r.set.Rows != 4 || r.set.Barrier || r.set.Base != 7 || r.set.Seen != 9 || r.set.Database != "postgres" {
			t.Errorf("nudges %d, set %+v", nudges, r.set)
		}
		c.exec("COMMIT")
		if len(n.sink.strays) > 0 {
			t.Error("a marked transaction is called a stray")
		}
	})
}

// TestSpeculativeInsert: the server holds changes back behind a speculative insert that was not confirmed. The seal
// shows it, and the nudge gets them out.
func TestSpeculativeInsert(t *testing.T) {
	t.Parallel()
	versions(t, func(t *testing.T, major int) {
		n := newNode(t, major, Limits{})
		c := n.client()
		c.run("CREATE TABLE t (id int PRIMARY KEY, u int UNIQUE); INSERT INTO t VALUES (1, 1), (2, 2)")
		c.run(`CREATE FUNCTION upsert(i int, w int) RETURNS text LANGUAGE plpgsql AS $$
			BEGIN
				INSERT INTO t VALUES (i, w) ON CONFLICT (id) DO NOTHING;
				RETURN 'inserted';
			EXCEPTION WHEN unique_violation THEN
				DELETE FROM t WHERE u = w;
				RETURN 'deleted';
			END $$`)
		for _, test := range []struct{ name, sql, want string }{
			{"savepoint", "DELETE FROM t WHERE id = 2", "DELETE public.t FROM id=t2 u=n"},
			{"function", "SELECT upsert(9, 1)", "DELETE public.t FROM id=t1 u=n"},
		} {
			c.exec("BEGIN")
			if test.name == "savepoint" {
				c.exec("SAVEPOINT s")
				if c.try("INSERT INTO t VALUES (9, 2) ON CONFLICT (id) DO NOTHING") == nil {
					t.Fatal("no unique violation")
				}
				c.exec("ROLLBACK TO s")
			}
			c.exec(test.sql)
			r, nudges := c.ready()
			if t.Failed() {
				return
			}
			if nudges != 1 {
				t.Errorf("%s: %d nudges, want one", test.name, nudges)
			}
			if got := render(t, r); !slices.Equal(got, []string{test.want}) {
				t.Errorf("%s: %q", test.name, got)
			}
			c.exec("COMMIT")
		}
	})
}

// TestSealMustBeLast: a change after the seal makes the transaction incomplete, until it is sealed again.
func TestSealMustBeLast(t *testing.T) {
	t.Parallel()
	n := newNode(t, 18, Limits{})
	c := n.client()
	c.run("CREATE TABLE t (id int PRIMARY KEY)")
	c.exec("BEGIN; INSERT INTO t VALUES (1)")
	gid := n.newGID()
	c.exec(sealSQL(gid) + "; INSERT INTO t VALUES (2)")
	if r := c.mark(gid, false); r.set != nil || r.err != nil {
		t.Errorf("unsealed: %+v", r)
	}
	if r := c.mark(n.newGID(), false); r.set != nil || r.err != nil {
		t.Errorf("another's seal: %+v", r)
	}
	// A seal inside a savepoint goes with it.
	gid = n.newGID()
	c.exec("SAVEPOINT s; " + sealSQL(gid) + "; INSERT INTO quorate.nudge VALUES (1); ROLLBACK TO s")
	if r := c.mark(gid, false); r.set != nil || r.err != nil {
		t.Errorf("seal rolled back: %+v", r)
	}
	r, _ := c.ready()
	if got := render(t, r); len(got) != 2 {
		t.Errorf("changes %q", got)
	}
	c.exec("COMMIT")
}

// TestEmpty: what leaves nothing to replicate gives an empty write set.
func TestEmpty(t *testing.T) {
	t.Parallel()
	n := newNode(t, 18, Limits{})
	c := n.client()
	c.run("CREATE TABLE t (id int PRIMARY KEY); CREATE UNLOGGED TABLE un (id int)")
	c.run("INSERT INTO t VALUES (1)")
	for _, sql := range []string{
		"CREATE TEMP TABLE tmp (id int); INSERT INTO tmp SELECT generate_series(1, 1000)",
		"INSERT INTO un VALUES (1)",
		"SELECT * FROM t FOR UPDATE",
		"NOTIFY x",
		"INSERT INTO quorate.nudge VALUES (1)",
		"SELECT pg_logical_emit_message(true, 'app', 'hello'); SELECT pg_logical_emit_message(true, 'quorate.seal', 'nonsense')",
		"SAVEPOINT s; INSERT INTO t VALUES (2); ROLLBACK TO s",
	} {
		c.exec("BEGIN; SELECT pg_current_xact_id()")
		c.exec(sql)
		set := c.commit()
		if set == nil {
			return
		}
		if !set.Empty() || set.Rows != 0 || len(set.Keys) != 0 {
			t.Errorf("%s: %+v", sql, set)
		}
	}
	if len(n.sink.strays) > 0 {
		t.Errorf("stray %+v", <-n.sink.strays)
	}
}

// TestForeignMarkers: a marker nobody waits for, or nonsense, is ignored.
func TestForeignMarkers(t *testing.T) {
	t.Parallel()
	n := newNode(t, 18, Limits{})
	c := n.client()
	for _, content := range []string{"", "x", "1-a-1", "1-a-1 5 6", "1-a-1.0 5 6 7", "1-a-1.0 5 6 7 8", "1-a-1.0 x 6 7", "1-a-1.x 5 6 7", "1-abc-999.feed 1 0 0"} {
		c.exec("SELECT pg_logical_emit_message(false, 'quorate.marker', '" + content + "', true)")
	}
	c.run("CREATE TABLE t (id int PRIMARY KEY)")
	if got := counter(t, n, "quorate_capture_markers_total", "ignored"); got != 9 {
		t.Errorf("%v ignored, want 9", got)
	}
}

// TestStray: changes that commit without a seal are reported, also those after a seal.
func TestStray(t *testing.T) {
	t.Parallel()
	n := newNode(t, 18, Limits{})
	c := n.client()
	c.run("CREATE TABLE t (id int PRIMARY KEY)")
	want := func(changes uint64) {
		t.Helper()
		select {
		case s := <-n.sink.strays:
			if s.changes != changes {
				t.Errorf("stray with %d changes, want %d", s.changes, changes)
			}
		case <-time.After(patience):
			t.Error("stray not reported")
		}
	}
	c.exec("INSERT INTO t VALUES (1), (2)")
	want(2)
	c.exec("BEGIN; INSERT INTO t VALUES (3); SAVEPOINT s; INSERT INTO t VALUES (4); ROLLBACK TO s; COMMIT")
	want(1)
	c.exec("TRUNCATE t")
	want(1)
	c.exec("CREATE TABLE u (id int)")
	want(1)
	c.exec("BEGIN; INSERT INTO t VALUES (5)")
	c.ready()
	c.exec("INSERT INTO t VALUES (6); COMMIT")
	want(1)
	// Nothing of these.
	c.exec("BEGIN; INSERT INTO t VALUES (7); ROLLBACK")
	c.exec("BEGIN; SET LOCAL session_replication_role = replica; INSERT INTO quorate.nudge VALUES (1); COMMIT")
	c.run("INSERT INTO t VALUES (8)")
	if len(n.sink.strays) > 0 {
		t.Errorf("stray %+v", <-n.sink.strays)
	}
}

// TestReplicationOrigin: what an apply worker writes does not come back.
func TestReplicationOrigin(t *testing.T) {
	t.Parallel()
	n := newNode(t, 18, Limits{})
	c := n.client()
	c.run("CREATE TABLE t (id int PRIMARY KEY)")
	w := n.client()
	w.exec("SELECT pg_replication_origin_create('apply'); SELECT pg_replication_origin_session_setup('apply'); SET session_replication_role = replica")
	w.exec("BEGIN; INSERT INTO t VALUES (1); SELECT pg_replication_origin_xact_setup('0/7', now()); COMMIT")
	if set := c.run("INSERT INTO t VALUES (2)"); set.Rows != 1 {
		t.Errorf("%d rows", set.Rows)
	}
	if len(n.sink.strays) > 0 {
		t.Error("an applied transaction is called a stray")
	}
}

// TestReconnect: after the connection is lost, an open transaction comes again, whole, after a nudge.
func TestReconnect(t *testing.T) {
	t.Parallel()
	versions(t, func(t *testing.T, major int) {
		n := newNode(t, major, Limits{})
		c, other := n.client(), n.client()
		c.run("CREATE TABLE t (id int PRIMARY KEY)")
		c.exec("BEGIN; INSERT INTO t VALUES (1); SAVEPOINT s; INSERT INTO t VALUES (2); ROLLBACK TO s; INSERT INTO t VALUES (3)")
		other.run("INSERT INTO t VALUES (10)") // flushes, so that the open transaction is in the stream
		ready := n.capture.Ready()
		other.exec("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'quorate'")
		// A marker while nobody listens is not lost.
		gid := n.newGID()
		answer := n.sink.expect(gid)
		c.exec(sealSQL(gid))
		c.exec(markerSQL(gid))
		r := c.await(answer)
		for range 5 {
			if r.set != nil || r.err != nil {
				break
			}
			c.nudge()
			r = c.mark(gid, true)
		}
		if r.set == nil {
			t.Fatalf("no write set: %v", r.err)
		}
		want := []string{"INSERT public.t id=t1", "INSERT public.t id=t3"}
		if got := render(t, r); !slices.Equal(got, want) {
			t.Errorf("changes %q", got)
		}
		if n.capture.Ready() == ready {
			t.Error("Ready did not change with the connection")
		}
		c.exec("COMMIT")
		c.run("INSERT INTO t VALUES (4)")
		if len(n.sink.strays) > 0 {
			t.Errorf("stray %+v", <-n.sink.strays)
		}
	})
}

// TestConfirmed: the slot moves on without being asked.
func TestConfirmed(t *testing.T) {
	t.Parallel()
	n := newNode(t, 18, Limits{StatusInterval: 20 * time.Millisecond})
	c := n.client()
	c.run("CREATE TABLE t (id int PRIMARY KEY)")
	var at string
	if err := c.conn.QueryRow(t.Context(), "SELECT pg_current_wal_lsn()::text").Scan(&at); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; {
		var past bool
		if err := c.conn.QueryRow(t.Context(), "SELECT confirmed_flush_lsn >= $1::pg_lsn FROM pg_replication_slots WHERE slot_name = 'quorate'", at).Scan(&past); err != nil {
			t.Fatal(err)
		}
		if past {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the slot stands still")
		}
	}
}

// TestLarge: 200,000 rows pass through with little memory.
func TestLarge(t *testing.T) {
	t.Parallel()
	n := newNode(t, 18, Limits{})
	c := n.client()
	c.run("CREATE TABLE t (id int PRIMARY KEY, a text, b text)")
	runtime.GC()
	var before, stats runtime.MemStats
	runtime.ReadMemStats(&before)
	stop, peak := make(chan struct{}), make(chan uint64, 1)
	go func() {
		var highest uint64
		for {
			select {
			case <-stop:
				peak <- highest
				return
			case <-time.After(5 * time.Millisecond):
				runtime.ReadMemStats(&stats)
				highest = max(highest, stats.HeapInuse)
			}
		}
	}()
	const many = 60_000 // TestLargeTransaction has more
	c.exec(fmt.Sprintf("BEGIN; INSERT INTO t SELECT i, repeat('x', 400), repeat('y', 400) FROM generate_series(1, %d) i", many))
	c.exec("SAVEPOINT s; UPDATE t SET a = 'z' WHERE id <= 15000; ROLLBACK TO s")
	began := time.Now()
	r, _ := c.ready()
	t.Logf("marker to write set: %v", time.Since(began))
	if t.Failed() {
		return
	}
	rd, rows, size := newReader(t), 0, 0
	count := func(framed []byte) {
		if len(framed) > 1<<20 {
			t.Errorf("part of %d bytes", len(framed))
		}
		size += len(framed)
		for _, m := range split(t, framed) {
			if line := rd.read(m); line != "" {
				rows++
				if !strings.HasPrefix(line, fmt.Sprintf("INSERT public.t id=t%d a=txx", rows)) {
					t.Fatalf("row %d is %s", rows, line)
				}
			}
		}
	}
	for {
		part, err := r.parts.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		count(part)
	}
	if err := r.parts.Close(); err != nil {
		t.Error(err)
	}
	count(r.set.Changes)
	close(stop)
	highest := <-peak
	t.Logf("%d bytes, %d parts, heap %d MiB above the start", size, r.set.Chunks, (int64(highest)-int64(before.HeapInuse))>>20)
	if rows != many || r.set.Rows != many {
		t.Errorf("%d rows, set says %d", rows, r.set.Rows)
	}
	if want := uint32(size >> 20); r.set.Chunks < want {
		t.Errorf("%d chunks for %d bytes", r.set.Chunks, size)
	}
	if highest > before.HeapInuse+64<<20 {
		t.Errorf("heap grew from %d to %d MiB", before.HeapInuse>>20, highest>>20)
	}
	if len(r.set.Keys) > 10 || !slices.Contains(r.set.Keys, txn.KeyUse{Key: TableKey("postgres", "public", "t"), Mode: txn.ModeExclusive}) {
		t.Errorf("%d keys", len(r.set.Keys))
	}
	c.exec("ROLLBACK")
}

// TestSpill: tiny limits change nothing but where things are kept.
func TestSpill(t *testing.T) {
	t.Parallel()
	n := newNode(t, 18, Limits{TransactionMemory: 1000, Memory: 3000, PartSize: 700})
	setup := n.client()
	setup.run("CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text)")
	var wg sync.WaitGroup
	for w := range 4 {
		c := n.client()
		wg.Go(func() {
			for round := range 5 {
				var want []string
				c.exec("BEGIN")
				for i := range 40 {
					table, id := "tu"[i%2:i%2+1], w*1000+round*100+i
					insert := fmt.Sprintf("INSERT INTO %s VALUES (%d, repeat('v', %d))", table, id, i)
					if i%3 == 0 {
						c.exec("SAVEPOINT s; " + insert + "; ROLLBACK TO s")
						continue
					}
					c.exec(insert)
					want = append(want, fmt.Sprintf("INSERT public.%s id=t%d v=t%s", table, id, strings.Repeat("v", i)))
				}
				r, _ := c.ready()
				if r.set == nil {
					return
				}
				if got := render(t, r); !slices.Equal(got, want) {
					t.Errorf("client %d round %d:\n%q, want\n%q", w, round, got, want)
				}
				if r.set.Chunks == 0 {
					t.Error("not cut into parts")
				}
				c.exec("COMMIT")
			}
		})
	}
	wg.Wait()
	if counter(t, n, "quorate_capture_spilled_bytes_total", "") == 0 {
		t.Error("nothing was spilled")
	}
	if got := counter(t, n, "quorate_capture_memory_bytes", ""); got != 0 {
		t.Errorf("%v bytes left in the books", got)
	}
}

// TestGivesUp: Run does not try for ever, neither to connect nor, connection after connection, to get past a change that the
// server cannot decode. What is wrong with the slot pg.Install mends, also when the server has invalidated it.
func TestGivesUp(t *testing.T) {
	t.Parallel()
	server := newServer(t, 17)
	config := parseConfig(t, server)
	conn := pgtest.Connect(t, server, "postgres")
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	install := func() {
		t.Helper()
		if _, err := pg.Install(t.Context(), conn.PgConn(), pg.Identity{Cluster: "test", Node: 1, MaxNodes: 4}); err != nil {
			t.Fatal(err)
		}
	}
	// follow runs a capture until it gives up, or after ready for as long as the test wants.
	follow := func(ready func(stop func())) error {
		t.Helper()
		catalog := pg.NewCatalog(config)
		defer func() {
			if err := catalog.Close(context.Background()); err != nil {
				t.Error(err)
			}
		}()
		c := New(Config{
			Conn: config, Database: "postgres", Catalog: catalog, Sink: newRecorder(), SpillDir: t.TempDir(), RetryFor: time.Second,
			Logger: slog.New(slog.NewTextHandler(t.Output(), nil)), Registerer: prometheus.NewRegistry(),
		})
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		select {
		case err := <-done:
			return err
		case <-c.Ready():
			ready(cancel)
			return <-done
		}
	}
	stops := func(stop func()) { stop() }
	lost := func(stop func()) {}
	gaveUp := func(when, reason string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), "no further for 1s") || !strings.Contains(err.Error(), reason) {
			t.Errorf("%s: Run: %v", when, err)
		}
	}
	if err := follow(stops); !errors.Is(err, context.Canceled) {
		t.Fatalf("Run: %v", err)
	}
	for left := 1; left > 0; { // it is active until the server has noticed
		if err := conn.QueryRow(t.Context(), "SELECT count(*) FROM pg_replication_slots WHERE active").Scan(&left); err != nil {
			t.Fatal(err)
		}
	}
	exec("SELECT pg_drop_replication_slot('quorate')")
	gaveUp("the slot is gone", `"quorate" does not exist`, follow(lost))
	install()
	if err := follow(stops); !errors.Is(err, context.Canceled) {
		t.Errorf("with another slot: Run: %v", err)
	}

	exec("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
	exec("SELECT pg_reload_conf()")
	for status := ""; status != "lost"; {
		exec("SELECT pg_logical_emit_message(false, 'filler', repeat('x', 10000000))")
		exec("SELECT pg_switch_wal()")
		exec("CHECKPOINT")
		if err := conn.QueryRow(t.Context(), "SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'quorate'").Scan(&status); err != nil {
			t.Fatal(err)
		}
	}
	exec("ALTER SYSTEM RESET max_slot_wal_keep_size")
	exec("SELECT pg_reload_conf()")
	gaveUp("the slot is invalidated", "slot", follow(lost))
	install()
	if err := follow(stops); !errors.Is(err, context.Canceled) {
		t.Errorf("in place of an invalidated slot: Run: %v", err)
	}

	// Connections can be made, and each ends at the same place.
	exec("SET session_replication_role = replica")
	exec("DROP PUBLICATION quorate")
	exec("CREATE TABLE undecodable (id int)")
	exec("INSERT INTO undecodable VALUES (1)")
	gaveUp("a change cannot be decoded", `publication "quorate" does not exist`, follow(lost))
}

// TestRunRefusesSpillDirectory: what trying again does not mend is an error at once.
func TestRunRefusesSpillDirectory(t *testing.T) {
	c := New(Config{Conn: &pgconn.Config{}, SpillDir: t.TempDir() + "/none", Registerer: prometheus.NewRegistry()})
	if err := c.Run(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Run: %v", err)
	}
}

// TestOldSpillFiles: what an earlier process left is removed, what is not ours is not.
func TestOldSpillFiles(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"quorate-capture-1.spill", "other"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeSpill(dir); err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) != 1 || filepath.Base(left[0]) != "other" {
		t.Errorf("left %v, %v", left, err)
	}
}

func TestMetrics(t *testing.T) {
	n := newNode(t, 18, Limits{})
	if problems, err := testutil.GatherAndLint(n.registry); err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
}

// counter reads a metric.
func counter(t *testing.T, n *node, name, label string) float64 {
	t.Helper()
	families, err := n.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if label == "" || m.GetLabel()[0].GetValue() == label {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	t.Fatalf("no metric %s %s", name, label)
	return 0
}

// TestDDL: statements come in their place among the rows, and not from a savepoint that was rolled back.
func TestDDL(t *testing.T) {
	t.Parallel()
	n := newNode(t, 18, Limits{})
	c := n.client()
	set := c.run("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1); ALTER TABLE t ADD v text; INSERT INTO t VALUES (2, 'b')")
	if !set.Barrier {
		t.Error("no barrier")
	}
	var verbs []string
	for _, line := range render(t, result{set: set}) {
		verbs = append(verbs, strings.Fields(line)[0])
	}
	if want := []string{"DDL", "INSERT", "DDL", "INSERT"}; !slices.Equal(verbs, want) {
		t.Errorf("%v, want %v", verbs, want)
	}
	// The server gives a message the top-level xid, wherever it was emitted.
	c.exec("BEGIN; INSERT INTO t VALUES (3)")
	emit := `WITH x AS (INSERT INTO quorate.nudge VALUES (0) RETURNING xmin::text AS xid)
		SELECT pg_logical_emit_message(true, 'quorate.ddl', '{"sql": "%s", "tables": [], "xid": ' || xid || '}') FROM x;`
	c.exec("SAVEPOINT s; " + fmt.Sprintf(emit, "gone") + "ROLLBACK TO s;" + fmt.Sprintf(emit, "kept") + "SAVEPOINT u;" + fmt.Sprintf(emit, "kept too") + "RELEASE u")
	r, _ := c.ready()
	c.exec("COMMIT")
	got := strings.Join(render(t, r), "\n")
	if strings.Contains(got, "gone") || !strings.Contains(got, "kept") || !strings.Contains(got, "kept too") {
		t.Errorf("changes %s", got)
	}
	// One that does not say where it was emitted cannot be judged once a savepoint is rolled back.
	c.exec("BEGIN; INSERT INTO t VALUES (4); SAVEPOINT s; INSERT INTO t VALUES (5)")
	c.exec(`SELECT pg_logical_emit_message(true, 'quorate.ddl', '{"tables": []}'); ROLLBACK TO s`)
	if r := c.mark(n.newGID(), true); r.err == nil {
		t.Errorf("a floating message was accepted: %+v", r)
	}
	c.exec("ROLLBACK")
}

// TestCreateTableAs: the event trigger speaks when the rows are there already; peers are told before them, and nothing of a table
// that came to nothing.
func TestCreateTableAs(t *testing.T) {
	t.Parallel()
	n := newNode(t, 18, Limits{})
	c := n.client()
	c.run("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1), (2)")
	verbs := func(sql string) (all []string) {
		t.Helper()
		for _, line := range render(t, result{set: c.run(sql)}) {
			all = append(all, strings.Fields(line)[0])
		}
		return all
	}
	for _, test := range []struct {
		sql  string
		want []string
	}{
		{"CREATE TABLE a AS SELECT * FROM t", []string{"DDL", "INSERT", "INSERT"}},
		{"CREATE TABLE b AS SELECT * FROM t WITH NO DATA", []string{"DDL"}},
		{"CREATE TABLE c AS TABLE t; INSERT INTO c VALUES (3)", []string{"DDL", "INSERT", "INSERT", "INSERT"}},
		{"CREATE TABLE d AS SELECT WHERE false; ALTER TABLE d ADD x int; INSERT INTO d VALUES (1)", []string{"DDL", "DDL", "INSERT"}},
		{"CREATE TABLE IF NOT EXISTS a AS SELECT 1; INSERT INTO t VALUES (3)", []string{"INSERT"}},
		{"SAVEPOINT s; CREATE TABLE e AS TABLE t; ROLLBACK TO s; CREATE TABLE e AS SELECT 1", []string{"DDL", "INSERT"}},
		{"SELECT 1 AS id INTO f", []string{"DDL", "INSERT"}},
	} {
		if got := verbs(test.sql); !slices.Equal(got, test.want) {
			t.Errorf("%s: %v, want %v", test.sql, got, test.want)
		}
	}
	// One that no event trigger sees must not become rows of a table that others do not have.
	c.exec("BEGIN; EXPLAIN ANALYZE CREATE TABLE hidden AS SELECT 1 AS id")
	r := c.mark(n.newGID(), true)
	for r.err == nil && r.set == nil {
		c.nudge()
		r = c.mark(n.newGID(), true)
	}
	if r.err == nil {
		t.Errorf("accepted: %+v", r)
	}
	c.exec("ROLLBACK")
}

// TestDDLOfUsers: a role that may make functions and set anything can neither have peers run what it has not run here, nor
// keep from them what it has.
func TestDDLOfUsers(t *testing.T) {
	t.Parallel()
	n := newNode(t, 18, Limits{})
	c := n.client()
	c.exec("CREATE ROLE mallory; GRANT CREATE, USAGE ON SCHEMA public TO mallory")
	c.exec("SET ROLE mallory")
	for _, sql := range []string{
		"SELECT quorate.emit_ddl('DROP TABLE t', 'DROP TABLE', 'public', '[]', 'mallory', 0)",
		"SELECT quorate.extension_script()",
		"SELECT quorate.in_extension_script()",
		"SELECT quorate.on_ddl_end()",
	} {
		if err := c.try(sql); err == nil {
			t.Errorf("%s: no error", sql)
		}
	}
	set := c.run("SET quorate.extension_script = 'running'; SET quorate.ddl = '{}'; CREATE TABLE own (id int PRIMARY KEY)")
	lines := render(t, result{set: set})
	if len(lines) != 1 || !strings.Contains(lines[0], "CREATE TABLE own") || !strings.Contains(lines[0], `"role": "mallory"`) {
		t.Errorf("peers are told %v", lines)
	}
}
