package apply

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"pgregory.net/rapid"

	"github.com/quorate/quorate/txn"
)

// TestRows: all kinds of changes, merged into large groups and one by one, for which there are other statements.
func TestRows(t *testing.T) {
	for _, test := range []struct {
		major int
		alone bool
	}{{17, false}, {17, true}, {18, false}, {18, true}} {
		t.Run(fmt.Sprintf("%d alone=%v", test.major, test.alone), func(t *testing.T) {
			c := newCluster(t, test.major, `
CREATE TABLE account (id int PRIMARY KEY, balance numeric, note text);
CREATE TABLE "odd ""name" ("A b" text, "select" int, PRIMARY KEY ("select", "A b"));
CREATE TABLE ident (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, other bigint GENERATED ALWAYS AS IDENTITY, v text, toast text);
CREATE TABLE generated (id serial PRIMARY KEY, a int, twice int GENERATED ALWAYS AS (a * 2) STORED, b text);
CREATE TABLE toasted (id int PRIMARY KEY, big text, small int);
ALTER TABLE toasted ALTER big SET STORAGE EXTERNAL;
CREATE TABLE twins (a int, b numeric, j json, p point); ALTER TABLE twins REPLICA IDENTITY FULL;
CREATE TABLE fullkey (id int PRIMARY KEY, b numeric, j json); ALTER TABLE fullkey REPLICA IDENTITY FULL;
CREATE TABLE alternative (a text NOT NULL, b int); CREATE UNIQUE INDEX a_key ON alternative (a); ALTER TABLE alternative REPLICA IDENTITY USING INDEX a_key;
CREATE TABLE keyonly (id int PRIMARY KEY); CREATE TABLE nothing ();
CREATE TABLE part (id int, v text, PRIMARY KEY (id)) PARTITION BY RANGE (id);
CREATE TABLE part1 PARTITION OF part FOR VALUES FROM (0) TO (100); CREATE TABLE part2 PARTITION OF part FOR VALUES FROM (100) TO (200);
CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child (extra int) INHERITS (parent); ALTER TABLE child ADD PRIMARY KEY (id);
CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN posint AS int CHECK (value > 0);
CREATE TABLE types (k mood, d posint, ar int[], r int4range, n numeric, f float8, ts timestamptz, iv interval, by bytea, js jsonb, i inet, b bool, c char(5), x bit(3),
  PRIMARY KEY (k, d, ar, r, n, f, ts, iv, by, js, i, b, c, x), v text);
CREATE TABLE fk (id int PRIMARY KEY REFERENCES account DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE one (one int PRIMARY KEY, r int NOT NULL); CREATE TABLE r (r int PRIMARY KEY, one text NOT NULL);
CREATE FUNCTION public.next_r() RETURNS text LANGUAGE sql AS 'SELECT max(r)::text FROM r'; CREATE FUNCTION public.never() RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT (1/0)::text';
CREATE TABLE defaults (id text PRIMARY KEY DEFAULT public.next_r(), v text DEFAULT public.next_r() || 'x', w text DEFAULT public.never());
CREATE TABLE dropped (id int PRIMARY KEY, gone int, v text); ALTER TABLE dropped DROP gone;
CREATE DOMAIN solid AS text NOT NULL CHECK (value <> ''); CREATE TABLE solids (id solid PRIMARY KEY, v solid, big bigserial, twice text GENERATED ALWAYS AS (v || v) STORED);
`)
			registry := prometheus.NewRegistry()
			cfg := c.config()
			cfg.Registerer, cfg.Statements = registry, 5 // so that statements are evicted all the time
			p := start(t, cfg)
			const types = `('ok', 3, '{1,NULL,2}', '[1,5)', 1.50, 0.1, '2024-02-03 04:05:06.789+02', '1 mon -2 days 03:00', '\xdeadbeef', '{"a": 1.0}', '10.0.0.1/8', true, 'ab', b'101', 'v')`
			items := c.run(
				"INSERT INTO account SELECT n, n * 1.50, NULL FROM generate_series(1, 10) n",
				"UPDATE account SET balance = balance + 1 WHERE id < 4",
				"UPDATE account SET id = id + 100, note = 'it''s' WHERE id = 5",
				"DELETE FROM account WHERE id = 7; INSERT INTO account VALUES (7)",
				`INSERT INTO "odd ""name" VALUES ('x', 1), ('y', 2); UPDATE "odd ""name" SET "A b" = 'z' WHERE "select" = 2`,
				"INSERT INTO ident (v, toast) SELECT n::text, (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 400) i) FROM generate_series(1, 5) n",
				"UPDATE ident SET v = v || 'x'; UPDATE ident SET other = DEFAULT, v = 'y' WHERE id = 2",
				"UPDATE ident SET id = DEFAULT WHERE id = 3",
				"INSERT INTO ident (id, v) OVERRIDING SYSTEM VALUE VALUES (50, 'explicit')",
				"INSERT INTO generated (a) VALUES (1), (2); UPDATE generated SET a = a + 10 WHERE id = 2",
				"INSERT INTO toasted SELECT n, repeat(md5(n::text), 300), 0 FROM generate_series(1, 3) n",
				"UPDATE toasted SET small = id; UPDATE toasted SET id = 100 WHERE id = 2; UPDATE toasted SET big = big",
				"INSERT INTO twins SELECT 1, 1.0, '{\"a\" : 1}', '(1,2)' FROM generate_series(1, 3); INSERT INTO twins VALUES (1, 1.00, '{\"a\": 1}', '(1,2)'), (NULL, NULL, NULL, NULL)",
				"DELETE FROM twins WHERE ctid = (SELECT ctid FROM twins WHERE b::text = '1.0' LIMIT 1); UPDATE twins SET p = '(3,4)' WHERE b::text = '1.00'; UPDATE twins SET a = 9 WHERE a IS NULL",
				"INSERT INTO fullkey VALUES (1, 1.0, '{}'), (2, 2, '[]'); UPDATE fullkey SET b = 3, id = 5 WHERE id = 1; DELETE FROM fullkey WHERE id = 2",
				"INSERT INTO alternative VALUES ('a', 1), ('b', 2); UPDATE alternative SET b = 3 WHERE a = 'a'; DELETE FROM alternative WHERE a = 'b'",
				"INSERT INTO keyonly VALUES (1), (2); UPDATE keyonly SET id = id WHERE id = 1; UPDATE keyonly SET id = 3 WHERE id = 2; INSERT INTO nothing DEFAULT VALUES",
				"INSERT INTO part VALUES (1, 'a'), (101, 'b'); UPDATE part SET id = 150 WHERE id = 1; UPDATE part SET v = 'c' WHERE id = 101",
				"INSERT INTO parent VALUES (1); INSERT INTO child VALUES (1, 2); UPDATE parent SET id = id + 1",
				"INSERT INTO types VALUES "+types+"; UPDATE types SET v = 'w'; UPDATE types SET ar = '{7}', f = 'NaN', r = 'empty'",
				"INSERT INTO one VALUES (1, 1), (2, 2); UPDATE one SET r = 5 WHERE one = 1; UPDATE one SET one = 7 WHERE one = 1; DELETE FROM one WHERE r = 2",
				"INSERT INTO r VALUES (1, 'a'), (2, 'b'); UPDATE r SET one = 'c' WHERE r = 1; UPDATE r SET r = 7 WHERE r = 1; DELETE FROM r WHERE one = 'b'",
				"INSERT INTO dropped VALUES (1, 'a'), (2, 'b'); UPDATE dropped SET v = 'c' WHERE id = 1; DELETE FROM dropped WHERE id = 2",
				"INSERT INTO defaults (v, w) VALUES (DEFAULT, 'w'); UPDATE defaults SET v = 'y'; UPDATE defaults SET id = 'k'; DELETE FROM defaults",
				"INSERT INTO solids VALUES ('a', 'x'), ('b', 'y'); UPDATE solids SET v = 'z' WHERE id = 'a'; UPDATE solids SET id = 'c' WHERE id = 'a'; DELETE FROM solids WHERE id = 'b'",
				"INSERT INTO fk VALUES (1); DELETE FROM account WHERE id = 2",
				"TRUNCATE generated, keyonly RESTART IDENTITY",
				"INSERT INTO generated (a) VALUES (1)",
				"TRUNCATE account CASCADE; TRUNCATE part",
				"SELECT pg_logical_emit_message(true, 'application', 'not for us')",
			)
			for _, item := range items {
				p.enqueue(item)
				if test.alone {
					p.await(item.CSN)
				}
			}
			p.await(items[len(items)-1].CSN)
			c.equal("account", `"odd ""name"`, "ident", "generated", "toasted", "twins", "fullkey", "alternative", "keyonly", "nothing",
				"part", "part1", "part2", "only parent", "child", "types", "fk", "one", "r", "dropped", "defaults", "solids")
			if problems, err := testutil.GatherAndLint(registry); err != nil || len(problems) > 0 {
				t.Errorf("metrics: %v %v", problems, err)
			}
		})
	}
}

// TestEqualityOfExtension: with search_path = pg_catalog, citext's = would silently become text's.
func TestEqualityOfExtension(t *testing.T) {
	c := newCluster(t, 18, `CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext; CREATE TABLE word (w ext.citext PRIMARY KEY, n int);
		CREATE COLLATION nocase (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
		CREATE TABLE folded (w text COLLATE nocase PRIMARY KEY, n int)`)
	p := start(t, c.config())
	p.apply(c.run(
		"INSERT INTO word VALUES ('Alpha', 1); INSERT INTO folded VALUES ('Alpha', 1)",
		"UPDATE word SET n = 2; UPDATE word SET w = 'ALPHA'; UPDATE word SET n = 3 WHERE w = 'alpha'",
		"UPDATE folded SET n = 2; UPDATE folded SET w = 'ALPHA'; UPDATE folded SET n = 3 WHERE w = 'alpha'"))
	c.equal("word", "folded")
}

func TestDDL(t *testing.T) {
	c := newCluster(t, 18, `CREATE TABLE t (id int PRIMARY KEY, v int)`)
	c.exec(c.src, "CREATE ROLE builder; GRANT CREATE ON DATABASE src TO builder")
	c.exec(c.dst, "GRANT CREATE ON DATABASE dst TO builder")
	var changed atomic.Int32
	cfg := c.config()
	cfg.Changed = func() { changed.Add(1) }
	p := start(t, cfg)
	ddl := func(sql, tag, role, path string) string {
		q := func(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }
		return fmt.Sprintf("SELECT pg_logical_emit_message(true, 'quorate.ddl', jsonb_build_object('sql', %s, 'search_path', %s, 'role', %s, 'tag', %s, 'tables', '[]'::jsonb, 'settings', '{\"DateStyle\": \"SQL, DMY\"}'::jsonb)::text)",
			q(sql), q(path), q(role), q(tag))
	}
	both := func(sql, tag string) string {
		return ddl(sql, tag, "postgres", "public") + "; SET search_path = public; " + sql
	}
	items := c.run(
		"INSERT INTO t VALUES (1, 1)",
		both("ALTER TABLE t ADD COLUMN d date DEFAULT '03/02/2024'", "ALTER TABLE")+"; UPDATE t SET v = 2",
	)
	// The default must be read under the origin's DateStyle.
	items = append(items, c.run(
		ddl("CREATE TABLE public.made (id int, v text)", "CREATE TABLE AS", "postgres", "pg_catalog")+"; CREATE TABLE made AS SELECT g AS id, 'x'::text AS v FROM generate_series(1, 5) g; ALTER TABLE made REPLICA IDENTITY FULL",
		both("ALTER TABLE t ALTER v TYPE text USING 'n' || v", "ALTER TABLE")+"; UPDATE t SET v = 'text now'",
		both("ALTER TABLE t DROP COLUMN d", "ALTER TABLE")+"; "+both("CREATE TABLE u (id int PRIMARY KEY)", "CREATE TABLE")+"; INSERT INTO u VALUES (1)",
		ddl("CREATE SCHEMA own", "CREATE SCHEMA", "builder", "public")+"; SET ROLE builder; CREATE SCHEMA own; RESET ROLE",
		"INSERT INTO t VALUES (3, 'three')",
	)...)
	p.apply(items)
	c.equal("t", "made", "u")
	if got := c.text(c.dst, "SELECT nspowner::regrole FROM pg_namespace WHERE nspname = 'own'"); got != "builder" {
		t.Errorf("schema belongs to %s", got)
	}
	if changed.Load() == 0 {
		t.Error("catalog caches were not told")
	}
}

func FuzzChanges(f *testing.F) {
	f.Add([]byte("I\x00\x00\x00\x01N\x00\x01t\x00\x00\x00\x01x"))
	f.Add([]byte("R\x00\x00\x00\x01s\x00t\x00d\x00\x01\x01c\x00\x00\x00\x00\x17\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, message []byte) {
		var c rowChange
		if c.parse(message) == nil && c.operation == 'I' && len(c.old) != 0 {
			t.Error("INSERT with an old row")
		}
		_, _ = parseRelation(message)
		_, _ = parseTruncate(message)
		_, _, _ = parseLogical(message)
		for rest := message; len(rest) > 0; {
			var err error
			if _, rest, err = nextMessage(rest); err != nil {
				break
			}
		}
	})
}

// history makes random transactions on a few tables with few rows, so that they conflict and hand values on.
func history(r *rand.Rand, n int) []string {
	var all []string
	for range n {
		var sql []string
		for range 1 + r.IntN(3) {
			id, other, v := r.IntN(12), r.IntN(12), r.IntN(8)
			switch r.IntN(7) {
			case 0:
				sql = append(sql, fmt.Sprintf("INSERT INTO a VALUES (%d, %d, %d) ON CONFLICT DO NOTHING", id, v, v))
			case 1:
				sql = append(sql, fmt.Sprintf("UPDATE a SET n = n + 1 WHERE id = %d", id))
			case 2:
				sql = append(sql, fmt.Sprintf("DELETE FROM a WHERE id = %d", id))
			case 3: // hands a unique value from one row to another
				sql = append(sql, fmt.Sprintf("UPDATE a SET u = NULL WHERE u = %d; UPDATE a SET u = %[1]d WHERE id = %d", v, id))
			case 4:
				sql = append(sql, fmt.Sprintf("UPDATE a SET id = %d WHERE id = %d AND NOT EXISTS (SELECT FROM a WHERE id = %[1]d)", other, id))
			case 5:
				sql = append(sql, fmt.Sprintf("INSERT INTO b SELECT %d, %d FROM generate_series(1, %d)", id, v, 1+r.IntN(20)))
			case 6:
				sql = append(sql, fmt.Sprintf("DELETE FROM b WHERE ctid IN (SELECT ctid FROM b WHERE id = %d LIMIT 3)", id))
			}
		}
		if r.IntN(60) == 0 {
			sql = append(sql, "TRUNCATE b")
		}
		all = append(all, strings.Join(sql, "; "))
	}
	return all
}

const historySchema = `CREATE TABLE a (id int PRIMARY KEY, u int UNIQUE, n int);
CREATE TABLE b (id int, v int); ALTER TABLE b REPLICA IDENTITY FULL;
CREATE TABLE mark (csn bigint);`

// TestRandomHistories: any number of workers and any grouping give the same as executing one after another.
func TestRandomHistories(t *testing.T) {
	c := newCluster(t, 18, historySchema)
	applied := txn.CSN(0)
	rapid.Check(t, func(r *rapid.T) {
		seed := rapid.Uint64().Draw(r, "seed")
		cfg := c.config()
		cfg.Start = applied
		cfg.Workers = rapid.IntRange(1, 6).Draw(r, "workers")
		cfg.GroupItems = rapid.IntRange(1, 20).Draw(r, "group")
		cfg.MaxItems = rapid.IntRange(1, 100).Draw(r, "queue")
		cfg.Logger = nil
		items := c.run(history(rand.New(rand.NewPCG(seed, 1)), rapid.IntRange(1, 80).Draw(r, "length"))...)
		p := start(t, cfg)
		p.apply(items)
		applied = p.Applied()
		if err := p.stopped(); err != nil {
			r.Fatal(err)
		}
		c.equal("a", "b")
		if t.Failed() {
			r.FailNow()
		}
	})
}

// prefixReader asserts, until stopped, that what it sees is a prefix: of n transactions that each insert their number, never
// one without all before it.
func prefixReader(c *cluster, table string) (stop func()) {
	conn := c.connect("dst")
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	var looks, last int64
	wg.Go(func() {
		for ctx.Err() == nil {
			var count, highest int64
			if err := conn.QueryRow(context.Background(), "SELECT count(*), coalesce(max(n), 0) FROM "+table).Scan(&count, &highest); err != nil {
				c.t.Errorf("read: %v", err)
				return
			}
			if count != highest || count < last {
				c.t.Errorf("saw %d rows, the highest %d, after %d", count, highest, last)
				return
			}
			last = count
			looks++
			time.Sleep(time.Millisecond) // what is looked at needs a processor, too
		}
	})
	return func() {
		cancel()
		wg.Wait()
		c.t.Logf("%d looks", looks)
	}
}

func TestVisibilityOrder(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE seq (n int PRIMARY KEY, pad text); CREATE TABLE work (id int PRIMARY KEY, n int); INSERT INTO work SELECT g, 0 FROM generate_series(0, 9) g;")
	var transactions []string
	for n := 1; n <= 300; n++ {
		// Transactions of very different length, some in conflict.
		transactions = append(transactions, fmt.Sprintf("INSERT INTO seq SELECT %d, repeat('x', %d); UPDATE work SET n = n + 1 WHERE id %% %d = 0", n, n*37%5000, 1+n%10))
	}
	items := c.run(transactions...)
	cfg := c.config()
	cfg.GroupItems = 3
	stop := prefixReader(c, "seq")
	p := start(t, cfg)
	p.apply(items)
	stop()
	c.equal("seq", "work")
}

// held is a local transaction for tests: a session that runs it and holds its COMMIT back.
type held struct {
	conn      *pgx.Conn
	committed atomic.Bool
	visible   atomic.Uint64
	releases  atomic.Int32
	released  chan struct{} // takes one for the first Release
	hang      bool          // does not react to Release

	mu    sync.Mutex
	over  bool
	ended func(bool) // once released
}

// hold begins a transaction in dst and returns it with the item for its write set, which is that of item.
func (c *cluster) hold(item Item, sql string) (Item, *held) {
	c.t.Helper()
	h := &held{conn: c.connect("dst"), released: make(chan struct{}, 1)}
	c.exec(h.conn, "BEGIN; SET LOCAL synchronous_commit = off; "+sql)
	set := *item.Set
	if _, err := fmt.Sscan(c.text(h.conn, "SELECT pg_current_xact_id()"), &set.XID); err != nil {
		c.t.Fatal(err)
	}
	item.Set, item.Local = &set, h
	return item, h
}

func (h *held) Release(ended func(bool)) {
	if h.releases.Add(1) == 1 {
		h.released <- struct{}{}
	}
	h.mu.Lock()
	h.ended = ended
	over := h.over
	h.mu.Unlock()
	switch {
	case over:
		ended(h.committed.Load())
	case h.hang:
	default:
		go func() {
			err := h.conn.PgConn().Exec(context.Background(), "COMMIT").Close()
			h.committed.Store(err == nil)
			ended(err == nil)
		}()
	}
}

// end is the word of a session that has ended its transaction by itself.
func (h *held) end() {
	h.mu.Lock()
	h.over = true
	ended := h.ended
	h.mu.Unlock()
	if ended != nil {
		ended(h.committed.Load())
	}
}

func (h *held) PID() uint32         { return h.conn.PgConn().PID() }
func (h *held) Visible(csn txn.CSN) { h.visible.Store(uint64(csn)) }

var _ Local = (*held)(nil)

// TestLocals interleaves local transactions, some of which are lost in every way there is, with remote ones.
func TestLocals(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE seq (n int PRIMARY KEY)")
	var transactions []string
	for n := 1; n <= 60; n++ {
		transactions = append(transactions, fmt.Sprintf("INSERT INTO seq VALUES (%d)", n))
	}
	items := c.run(transactions...)
	cfg := c.config()
	cfg.LocalTimeout = 300 * time.Millisecond
	cfg.GroupItems = 4
	p := start(t, cfg)
	stop := prefixReader(c, "seq")
	lost := map[txn.CSN]*held{}
	var all []*held
	for i, item := range items {
		n := i + 1
		if n%3 == 0 {
			var h *held
			item, h = c.hold(item, fmt.Sprintf("INSERT INTO seq VALUES (%d)", n))
			all = append(all, h)
			switch n {
			case 12: // rolled back by its session
				c.exec(h.conn, "ROLLBACK")
				h.end()
				lost[item.CSN] = h
			case 24: // its process is killed
				c.exec(c.dst, fmt.Sprintf("SELECT pg_terminate_backend(%d)", h.PID()))
				lost[item.CSN] = h
			case 36: // hangs
				h.hang = true
				lost[item.CSN] = h
			case 48: // committed, but its session does not know
				h.hang = true
			}
		}
		p.enqueue(item)
		if n == 48 {
			p.await(47)
			h := all[len(all)-1]
			c.exec(h.conn, "COMMIT")
			h.end()
		}
	}
	p.await(60)
	stop()
	c.equal("seq")
	for csn, h := range lost {
		deadline := time.Now().Add(5 * time.Second)
		for h.visible.Load() != uint64(csn) && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond)
		}
		if got := h.visible.Load(); got != uint64(csn) {
			t.Errorf("lost transaction %d was told %d", csn, got)
		}
		h.ended(true) // late: it is booked, and must not be again
	}
	for _, h := range all {
		if h.releases.Load() > 1 || h.visible.Load() != 0 && h.committed.Load() {
			t.Errorf("released %d times, committed %v, visible as %d", h.releases.Load(), h.committed.Load(), h.visible.Load())
		}
	}
}

// TestBlockers: a committed transaction waits for nobody who is not decided.
func TestBlockers(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t SELECT g, 0 FROM generate_series(1, 20) g;")
	var mu sync.Mutex
	sessions := map[uint32]func(){} // of the gateway
	evicted := map[uint32]bool{}
	cfg := c.config()
	cfg.TerminateAfter = 200 * time.Millisecond
	cfg.Evict = func(b Blockade) bool {
		mu.Lock()
		defer mu.Unlock()
		abort, ok := sessions[b.PID]
		if ok && !evicted[b.PID] {
			evicted[b.PID] = true
			abort()
		}
		return ok
	}
	p := start(t, cfg)
	gateway := func(sql string) *pgx.Conn {
		conn := c.connect("dst")
		c.exec(conn, "BEGIN; "+sql)
		return conn
	}
	admin := c.connect("dst")
	cancelBackend := func(conn *pgx.Conn) func() {
		return func() {
			if err := admin.PgConn().Exec(context.Background(), fmt.Sprintf("SELECT pg_cancel_backend(%d)", conn.PgConn().PID())).Close(); err != nil {
				t.Errorf("cancel: %v", err)
			}
		}
	}
	register := func(conn *pgx.Conn, abort func()) {
		mu.Lock()
		defer mu.Unlock()
		sessions[conn.PgConn().PID()] = abort
	}
	quick := func(what string, items []Item) {
		t.Helper()
		begin := time.Now()
		p.apply(items)
		if d := time.Since(begin); d > 3*time.Second {
			t.Errorf("%s: took %v", what, d)
		}
	}

	rolledBack := make(chan error, 2)
	rollback := func(conn *pgx.Conn) func() {
		return func() { go func() { rolledBack <- conn.PgConn().Exec(context.Background(), "ROLLBACK").Close() }() }
	}
	idle := gateway("UPDATE t SET n = 5 WHERE id = 1")
	register(idle, rollback(idle))
	quick("idle session", c.run("UPDATE t SET n = 1 WHERE id = 1"))

	active := gateway("SELECT * FROM t WHERE id = 2 FOR UPDATE")
	register(active, cancelBackend(active))
	slept := make(chan error, 1)
	go func() { slept <- active.PgConn().Exec(context.Background(), "SELECT pg_sleep(60)").Close() }()
	quick("active session", c.run("UPDATE t SET n = 1 WHERE id = 2"))
	if err := <-slept; err == nil {
		t.Error("the active blocker was not cancelled")
	}

	direct := gateway("UPDATE t SET n = 5 WHERE id = 3") // not the gateway's, and idle: cancelling does nothing
	quick("direct session", c.run("DELETE FROM t WHERE id = 3"))
	if err := direct.PgConn().Exec(t.Context(), "COMMIT").Close(); err == nil {
		t.Error("the direct blocker was not terminated")
	}

	// A local ALTER TABLE waits for a reader, and our statement for it.
	shared := gateway("SELECT count(*) FROM t")
	register(shared, func() { t.Error("the reader blocks nobody directly") })
	waiter := gateway("SELECT 1")
	register(waiter, cancelBackend(waiter))
	locked := make(chan error, 1)
	go func() {
		locked <- waiter.PgConn().Exec(context.Background(), "LOCK TABLE t IN ACCESS EXCLUSIVE MODE; COMMIT").Close()
	}()
	c.eventually("SELECT count(*) FROM pg_locks WHERE NOT granted", "1")
	quick("queue behind a lock", c.run("UPDATE t SET n = 1 WHERE id = 4"))
	if err := <-locked; err == nil {
		t.Error("the waiting lock was not cancelled")
	}

	// TRUNCATE needs the reader to go.
	register(shared, rollback(shared))
	quick("reader", c.run("TRUNCATE t"))
	for range 2 {
		if err := <-rolledBack; err != nil {
			t.Error(err)
		}
	}
	c.equal("t")
}

// TestContention: whoever must give way is told what for, row by row, also where several transactions are applied as one.
func TestContention(t *testing.T) {
	c := newCluster(t, 18, `CREATE TABLE "odd one" (a text, "b c" int, n int, u int UNIQUE, PRIMARY KEY (a, "b c"));
INSERT INTO "odd one" SELECT 'x, y', g, 0, g FROM generate_series(1, 300) g;
CREATE TABLE part (id int PRIMARY KEY, n int) PARTITION BY RANGE (id); CREATE TABLE leaf PARTITION OF part FOR VALUES FROM (0) TO (1000);
INSERT INTO part SELECT g, 0 FROM generate_series(1, 300) g;`)
	told := make(chan Blockade, 1)
	rolledBack := make(chan error, 1)
	var blocker *pgx.Conn
	cfg := c.config()
	cfg.Evict = func(b Blockade) bool {
		if b.Where != (Contention{}) { // the first time
			told <- b
			go func() { rolledBack <- blocker.PgConn().Exec(context.Background(), "ROLLBACK").Close() }()
		}
		return true
	}
	p := start(t, cfg)
	const most = `UPDATE "odd one" SET n = n + 1 WHERE "b c" `
	for _, tc := range []struct {
		blocker      string
		transactions []string
		want         string // table, which of the transactions, its row
	}{
		{most + "= 7", []string{most + "= 8", most + "BETWEEN 3 AND 250"}, "public.odd one row 1 [x, y 7]"},
		{`SELECT FROM "odd one" WHERE "b c" = 9 FOR UPDATE`, []string{`DELETE FROM "odd one" WHERE "b c" = 9`}, "public.odd one row 0 [x, y 9]"},
		{`UPDATE "odd one" SET n = 5 WHERE "b c" = 10`, []string{`UPDATE "odd one" SET a = 'z' WHERE "b c" IN (10, 11)`}, "public.odd one row 0 [x, y 10]"},
		{`INSERT INTO "odd one" VALUES ('q', 1, 0, 1000)`, []string{`INSERT INTO "odd one" VALUES ('r', 1, 0, 1000)`}, "public.odd one unique 0 [r 1]"},
		{`INSERT INTO "odd one" VALUES ('q', 1, 0, 1001)`, []string{`INSERT INTO "odd one" VALUES ('r', 2, 0, 1002), ('q', 1, 0, 1003)`}, "public.odd one"},
		{"UPDATE part SET n = 5 WHERE id = 12", []string{"UPDATE part SET n = 6 WHERE id < 20"}, "public.leaf row 0 [12]"},
		{"LOCK TABLE part IN SHARE MODE", []string{"UPDATE part SET n = 7 WHERE id < 20"}, "public.leaf whole"},
		{"SELECT FROM part", []string{"TRUNCATE part"}, "public.leaf whole"},
	} {
		blocker = c.connect("dst")
		c.exec(blocker, "BEGIN; "+tc.blocker)
		items := c.run(tc.transactions...)
		for i := range items { // so that they are merged
			items[i].Index = items[len(items)-1].Index
		}
		p.apply(items)
		b := <-told
		if err := <-rolledBack; err != nil {
			t.Error(err)
		}
		got := b.Where.Table
		switch w := b.Where; {
		case w.Whole:
			got += " whole"
		case w.Row != nil:
			kind := "row"
			if w.Unique {
				kind = "unique"
			}
			found := candidates([]Item{{Set: w.Row}}, "INSERT INTO "+`"public"."odd one" `)
			for _, begin := range []string{`UPDATE ONLY "public"."odd one" `, `DELETE FROM ONLY "public"."odd one" `, `UPDATE ONLY "public"."leaf" `} {
				found = append(found, candidates([]Item{{Set: w.Row}}, begin)...)
			}
			if len(found) != 1 {
				t.Fatalf("%s: %d rows in %q", tc.blocker, len(found), w.Row.Changes)
			}
			got += fmt.Sprintf(" %s %d %v", kind, w.CSN-items[0].CSN, found[0].key)
		}
		if got != tc.want || b.PID != blocker.PgConn().PID() || b.By != items[len(items)-1].CSN {
			t.Errorf("%s: process %d is in the way of %d at %q, want %q", tc.blocker, b.PID, b.By, got, tc.want)
		}
	}
	c.equal(`"odd one"`, "part")

	// To find out what somebody waits for never makes the one wait who is to help, nor does it run a user's functions.
	m := &monitor{p: p.Pipeline}
	defer m.disconnect()
	if err := m.connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.exec(c.dst, `CREATE TYPE e AS ENUM ('a'); CREATE TABLE mine (k e PRIMARY KEY); INSERT INTO mine VALUES ('a');
CREATE FUNCTION evil(e) RETURNS text LANGUAGE plpgsql AS $$BEGIN RAISE 'called'; END$$; CREATE CAST (e AS text) WITH FUNCTION evil(e)`)
	mine := relationMessage{schema: "public", name: "mine", columns: []relationColumn{{name: "k", key: true}}}
	if key, err := m.rowAt(t.Context(), "public", "mine", "(0,1)", &mine); len(key) != 1 || key[0] != "a" {
		t.Errorf("the row is %q, %v", key, err)
	}
	locker := c.connect("dst")
	c.exec(locker, "BEGIN; LOCK TABLE mine")
	limited, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var server *pgconn.PgError
	if _, err := m.rowAt(limited, "public", "mine", "(0,1)", &mine); !errors.As(err, &server) || server.Code != "55P03" {
		t.Errorf("of a table that is locked: %v", err)
	}
}

// TestLaterHolderGivesWay: a held transaction that blocks an earlier one, which its keys do not tell, is rolled back
// and executed again.
func TestLaterHolderGivesWay(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE t (id int PRIMARY KEY, n int); CREATE TABLE gate (id int PRIMARY KEY); INSERT INTO t VALUES (1, 0); INSERT INTO gate VALUES (1);")
	items := c.run("UPDATE gate SET id = 1", "DELETE FROM gate; UPDATE t SET n = n + 1", "UPDATE t SET n = n * 10")
	items[2].Set.Keys = nil
	items, local := items, (*held)(nil)
	items[0], local = c.hold(items[0], "UPDATE gate SET id = 1")
	local.hang = true
	cfg := c.config()
	p := start(t, cfg)
	p.idleWorkers(4)
	p.enqueue(items...) // 2 waits for 1; 3 does not, and holds the row of 2
	c.eventually("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'quorate_apply_%' AND state = 'idle in transaction'", "1")
	c.exec(local.conn, "COMMIT")
	local.committed.Store(true)
	local.end()
	p.await(3)
	c.equal("t", "gate")
}

// TestDivergence: what does not touch what it should stops the pipeline, says why, and leaves nothing of its transaction.
func TestDivergence(t *testing.T) {
	const contents = "SELECT string_agg(t::text, ' ' ORDER BY t) FROM t"
	for name, test := range map[string]struct{ before, transaction, want string }{
		"missing row":            {"DELETE FROM t WHERE id = 1", "UPDATE t SET v = 'x' WHERE id = 1", "apply transaction 1 UPDATE public.t (id=1): touched 0 rows, not 1"},
		"missing row to delete":  {"DELETE FROM t WHERE id = 1", "DELETE FROM t WHERE id = 1", "apply transaction 1 DELETE public.t (id=1): touched 0 rows, not 1"},
		"missing row of another": {"UPDATE t SET id = 3", "UPDATE t SET id = 2 WHERE id = 1", "apply transaction 1 UPDATE public.t (id=1): touched 0 rows, not 1"},
		"trigger that drops a row": {`CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER f BEFORE INSERT ON t FOR EACH ROW WHEN (NEW.id = 3) EXECUTE FUNCTION f(); ALTER TABLE t ENABLE ALWAYS TRIGGER f`,
			"INSERT INTO t VALUES (3, 'three')", "apply transaction 1 INSERT public.t (id=3): touched 0 rows, not 1"},
		"rule that drops a row": {"CREATE RULE r AS ON DELETE TO t DO INSTEAD NOTHING; ALTER TABLE t ENABLE ALWAYS RULE r", "DELETE FROM t WHERE id = 1",
			"apply transaction 1 DELETE public.t (id=1): touched 0 rows, not 1"},
		"extra row": {"INSERT INTO t VALUES (2, '')", "INSERT INTO t VALUES (2, 'two')", "apply transaction 1 INSERT public.t (id=2): ERROR: duplicate key"},
		"extra row among many": {"INSERT INTO t VALUES (77, '')", "INSERT INTO t SELECT g, 'new' FROM generate_series(60, 100) g",
			"apply transaction 1 INSERT public.t (id=77): ERROR: duplicate key"},
		"missing table": {"DROP TABLE t", "DELETE FROM t", "apply transaction 1 public.t: there is no such table here"},
		"other columns": {"ALTER TABLE t ADD extra int", "DELETE FROM t", "apply transaction 1 public.t: has 2 columns at the origin, 3 here"},
		"other names":   {"ALTER TABLE t RENAME v TO w", "DELETE FROM t", `apply transaction 1 public.t: column "v" does not exist here`},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, 18, "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'one');")
			c.exec(c.dst, test.before)
			var before string
			if name != "missing table" {
				before = c.text(c.dst, contents)
			}
			p := start(t, c.config())
			p.enqueue(c.run("INSERT INTO t VALUES (900, 'first'); "+test.transaction, "INSERT INTO t VALUES (5)")...)
			err := p.failure()
			if !errors.Is(err, txn.ErrDiverged) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %s", err, test.want)
			}
			if p.Applied() != 0 {
				t.Errorf("applied %d", p.Applied())
			}
			if err := p.WaitFor(t.Context(), 1); !errors.Is(err, txn.ErrDiverged) {
				t.Errorf("waiting for what will not come: %v", err)
			}
			if name != "missing table" {
				if after := c.text(c.dst, contents); after != before {
					t.Errorf("t holds %s, and before %s", after, before)
				}
			}
			if progress, err := Progress(t.Context(), c.connect("dst").PgConn()); err != nil || progress != 0 {
				t.Errorf("progress %d, %v", progress, err)
			}
		})
	}
}

// watchedConn is a connection to a server whose every write goes through a hook.
type watchedConn struct {
	net.Conn
	write func(c net.Conn, b []byte) (int, error)
}

func (c watchedConn) Write(b []byte) (int, error) { return c.write(c.Conn, b) }

// watch lets all that the pipeline writes go through a hook.
func (c *cluster) watch(cfg *Config, write func(c net.Conn, b []byte) (int, error)) {
	c.t.Helper()
	conf, err := pgconn.ParseConfig(c.server.ConnString("dst"))
	if err != nil {
		c.t.Fatal(err)
	}
	dial := conf.DialFunc
	conf.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		return watchedConn{conn, write}, err
	}
	cfg.Connect = func(ctx context.Context) (*pgconn.PgConn, error) { return pgconn.ConnectConfig(ctx, conf) }
}

// TestOneRoundTrip: COMMIT goes with the changes when it is their turn, and waits for it when it is not.
func TestOneRoundTrip(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 0), (2, 0);")
	cfg := c.config()
	cfg.Workers, cfg.FlushEvery, cfg.BlockedAfter = 1, time.Hour, time.Hour
	var writes atomic.Int64
	c.watch(&cfg, func(conn net.Conn, b []byte) (int, error) {
		writes.Add(1)
		return conn.Write(b)
	})
	p := start(t, cfg)
	const changes = "UPDATE t SET n = n + 1 WHERE id = 1; INSERT INTO t VALUES (3, 3); UPDATE t SET id = 4 WHERE id = 3; DELETE FROM t WHERE id = 4"
	p.apply(c.run(changes)) // now everything is prepared
	for _, items := range [][]Item{c.run(changes), c.run(changes)} {
		before := writes.Load()
		p.apply(items)
		if n := writes.Load() - before; n != 1 {
			t.Errorf("a transaction has cost %d round trips", n)
		}
	}

	// Behind a local transaction it waits for its turn, executed.
	items := c.run("INSERT INTO t VALUES (10, 0)", changes)
	first, local := c.hold(items[0], "INSERT INTO t VALUES (10, 0)")
	local.hang = true
	before := writes.Load()
	p.enqueue(first, items[1])
	c.eventually("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'quorate_apply_%' AND state = 'idle in transaction'", "1")
	if n := writes.Load() - before; n != 1 {
		t.Errorf("changes have cost %d round trips", n)
	}
	c.exec(local.conn, "COMMIT")
	local.committed.Store(true)
	local.end()
	p.await(items[1].CSN)
	if n := writes.Load() - before; n != 2 {
		t.Errorf("a transaction that had to wait has cost %d round trips", n)
	}
	c.equal("t")
}

// TestConnectionLostWithCommit: when the connection breaks after COMMIT was sent with the changes, the progress tells whether it
// arrived.
func TestConnectionLostWithCommit(t *testing.T) {
	for _, arrives := range []bool{true, false} {
		t.Run(fmt.Sprintf("arrives=%v", arrives), func(t *testing.T) {
			c := newCluster(t, 18, "CREATE TABLE t (id int PRIMARY KEY)")
			cfg := c.config()
			cfg.Workers, cfg.FlushEvery, cfg.BlockedAfter = 1, time.Hour, time.Hour
			var armed atomic.Bool
			var p *started
			c.watch(&cfg, func(conn net.Conn, b []byte) (int, error) {
				if !armed.CompareAndSwap(true, false) {
					return conn.Write(b)
				}
				if in := p.inFlight.Load(); in != 2 {
					t.Errorf("in flight is %d", in)
				}
				if arrives {
					if _, err := conn.Write(b); err != nil {
						return 0, err
					}
					c.eventually("SELECT count(*) FROM t", "2")
				}
				_ = conn.Close() // the reply, or the rest, gets lost
				return len(b), nil
			})
			p = start(t, cfg)
			p.apply(c.run("INSERT INTO t VALUES (1)"))
			p.idleWorkers(1)
			armed.Store(true)
			p.apply(c.run("INSERT INTO t VALUES (2)"))
			if armed.Load() {
				t.Error("no connection broke")
			}
			p.apply(c.run("INSERT INTO t VALUES (3)"))
			c.equal("t")
		})
	}
}

// TestSeenBehindOwnTransaction: who asks what he has seen, before he can commit or give way, does not wait for changes that
// wait for him.
func TestSeenBehindOwnTransaction(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 0);")
	cfg := c.config()
	blocked := make(chan struct{}, 1)
	cfg.Evict = func(Blockade) bool {
		select {
		case blocked <- struct{}{}:
		default:
		}
		return true
	}
	p := start(t, cfg)
	p.apply(c.run("UPDATE t SET n = 9")) // it is connected, and lets commits through
	session := c.connect("dst")
	c.exec(session, "BEGIN; UPDATE t SET n = 5")
	p.enqueue(c.run("UPDATE t SET n = 1")...)
	select {
	case <-blocked:
	case <-p.Pipeline.stopped:
		t.Fatal("the pipeline has stopped")
	}
	if p.inFlight.Load() != 2 {
		t.Error("COMMIT was not sent with the changes")
	}
	if seen, err := p.Seen(t.Context()); err != nil || seen != 1 {
		t.Errorf("seen %d, %v", seen, err)
	}
	c.exec(session, "ROLLBACK")
	p.await(2)
	c.equal("t")
}

// TestRowChangedMeanwhile: a change that has waited for somebody who then commits all the same, behind the node's back, finds the row
// as that one left it.
func TestRowChangedMeanwhile(t *testing.T) {
	for _, major := range []int{17, 18} {
		for _, test := range []struct {
			first, change string
			found         bool
		}{
			{"UPDATE t SET n = 5", "UPDATE t SET n = 1", true},
			{"UPDATE t SET n = 5", "DELETE FROM t", true},
			{"DELETE FROM t", "UPDATE t SET n = 1", false},
			{"UPDATE t SET id = 7", "DELETE FROM t", false},
		} {
			t.Run(fmt.Sprintf("%d: %s, %s", major, test.first, test.change), func(t *testing.T) {
				c := newCluster(t, major, "CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 0);")
				cfg := c.config()
				session := c.connect("dst")
				var once sync.Once
				cfg.Evict = func(Blockade) bool {
					once.Do(func() {
						if err := session.PgConn().Exec(t.Context(), "COMMIT").Close(); err != nil {
							t.Error(err)
						}
					})
					return true
				}
				p := start(t, cfg)
				p.apply(c.run("UPDATE t SET n = 9"))
				c.exec(session, "BEGIN; "+test.first)
				p.enqueue(c.run(test.change)...)
				if test.found {
					p.await(2)
					c.equal("t")
				} else if err := p.failure(); !errors.Is(err, txn.ErrDiverged) || !strings.Contains(err.Error(), "touched 0 rows, not 1") {
					t.Errorf("got %v", err)
				}
			})
		}
	}
}

// TestKeyThatIsNone: what the log tells of a row may be less than what is unique here. Then how many rows a change has touched is
// looked at before it is committed.
func TestKeyThatIsNone(t *testing.T) {
	t.Run("generated column", func(t *testing.T) { // PostgreSQL 18 refuses such a DELETE
		c := newCluster(t, 17, "CREATE TABLE t (a int, b int, c int GENERATED ALWAYS AS (b % 10) STORED, PRIMARY KEY (a, c)); INSERT INTO t VALUES (1, 1), (1, 2), (2, 2);")
		p := start(t, c.config())
		p.apply(c.run("DELETE FROM t WHERE a = 2"))
		p.enqueue(c.run("DELETE FROM t WHERE b = 1")...)
		if err := p.failure(); !errors.Is(err, txn.ErrDiverged) || !strings.Contains(err.Error(), "touched 2 rows, not 1") {
			t.Errorf("got %v", err)
		}
		if rows := c.text(c.dst, "SELECT count(*) FROM t"); rows != "2" {
			t.Errorf("%s rows are left", rows)
		}
	})
	t.Run("collation", func(t *testing.T) {
		c := newCluster(t, 18, `CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
CREATE TABLE t (v text COLLATE loose NOT NULL, n int); CREATE UNIQUE INDEX t_v ON t (v COLLATE "C"); ALTER TABLE t REPLICA IDENTITY USING INDEX t_v;
INSERT INTO t VALUES ('a', 1), ('A', 2);`)
		p := start(t, c.config())
		p.apply(c.run("UPDATE t SET n = 3 WHERE n = 1"))
		p.apply(c.run("DELETE FROM t WHERE n = 2"))
		c.equal("t")
	})
}

// TestCommittedAllTheSame: what a trigger does that came to be behind the node's back is told, with what it means.
func TestCommittedAllTheSame(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE t (id int PRIMARY KEY)")
	cfg := c.config()
	cfg.Workers = 1
	p := start(t, cfg)
	p.apply(c.run("INSERT INTO t VALUES (1)"))
	c.exec(c.dst, `CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER f BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION f(); ALTER TABLE t ENABLE ALWAYS TRIGGER f`)
	p.enqueue(c.run("INSERT INTO t VALUES (2)")...)
	if err := p.failure(); !errors.Is(err, txn.ErrDiverged) || !strings.Contains(err.Error(), "is committed, and a restart") || !strings.Contains(err.Error(), "touched 0 rows, not 1") {
		t.Errorf("got %v", err)
	}
}

// TestGatheredRows: rows that go out many at a time are there when something else happens to their table, and what a trigger
// sees is what it would see without.
func TestGatheredRows(t *testing.T) {
	c := newCluster(t, 18, `
CREATE TABLE a (id int PRIMARY KEY, v text UNIQUE, w text); CREATE TABLE b (id int PRIMARY KEY, v text); CREATE TABLE nothing ();
DO $$BEGIN
	FOR m IN 1..12 LOOP EXECUTE format('CREATE TABLE m%s (id int PRIMARY KEY, n int)', m); END LOOP;
	EXECUTE 'CREATE TABLE broad (id int PRIMARY KEY' || (SELECT string_agg(', c' || g || ' int DEFAULT ' || g, '') FROM generate_series(1, 99) g) || ')';
END$$;
CREATE TABLE watched (id int PRIMARY KEY, seen bigint); CREATE TABLE calls (n bigint);
CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN SELECT count(*) INTO NEW.seen FROM public.a; RETURN NEW; END$$;
CREATE FUNCTION count_calls() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN INSERT INTO public.calls VALUES (1); RETURN NULL; END$$;`)
	// Here only, so that what they do is not replicated.
	c.exec(c.dst, `CREATE TRIGGER look BEFORE INSERT ON watched FOR EACH ROW EXECUTE FUNCTION look(); ALTER TABLE watched ENABLE ALWAYS TRIGGER look;
CREATE TRIGGER calls AFTER INSERT ON watched FOR EACH STATEMENT EXECUTE FUNCTION count_calls(); ALTER TABLE watched ENABLE REPLICA TRIGGER calls;`)
	p := start(t, c.config())
	p.apply(c.run(
		"INSERT INTO a SELECT g, 'a' || g FROM generate_series(1, 333) g",
		"INSERT INTO a VALUES (1001, 'x'), (1002, NULL); UPDATE a SET v = 'y' WHERE id = 1001; INSERT INTO a VALUES (1003, 'x'); DELETE FROM a WHERE id = 1003; INSERT INTO a VALUES (1004, 'x')",
		"DO $$BEGIN FOR g IN 1..150 LOOP INSERT INTO a VALUES (2000 + g, 'l' || g); INSERT INTO b VALUES (g, 'b'); IF g % 50 = 0 THEN UPDATE b SET v = 'c' WHERE id = g; END IF; END LOOP; END$$",
		"INSERT INTO nothing DEFAULT VALUES; INSERT INTO nothing DEFAULT VALUES; INSERT INTO nothing DEFAULT VALUES; INSERT INTO nothing DEFAULT VALUES",
		"INSERT INTO a SELECT 3000 + g, NULL, repeat('x', 20000) FROM generate_series(1, 20) g",
		// More tables than rows are gathered for at a time, and one with more columns than a statement of 64 rows may have.
		"DO $$BEGIN FOR g IN 1..60 LOOP FOR m IN 1..12 LOOP EXECUTE format('INSERT INTO m%s VALUES (%s, %s)', m, g, g * m); END LOOP; END LOOP; END$$",
		"INSERT INTO broad (id) SELECT g FROM generate_series(1, 150) g",
	))
	c.equal("a", "b", "nothing", "m1", "m8", "m9", "m12", "broad")
	before := c.text(c.dst, "SELECT count(*) FROM a")
	p.apply(c.run("INSERT INTO a VALUES (5001), (5002); INSERT INTO watched VALUES (1), (2); INSERT INTO a VALUES (5003); INSERT INTO watched VALUES (3)"))
	if seen := c.text(c.dst, "SELECT string_agg((seen - "+before+")::text, ' ' ORDER BY id) FROM watched"); seen != "2 2 3" {
		t.Errorf("a trigger sees the rows of another table before it: %s", seen)
	}
	if calls := c.text(c.dst, "SELECT count(*) FROM calls"); calls != "3" {
		t.Errorf("%s calls of a trigger for 3 rows", calls)
	}
}

func TestCorruptWriteSet(t *testing.T) {
	c := newCluster(t, 18, "")
	p := start(t, c.config())
	p.enqueue(Item{CSN: 1, Index: 1, Set: &txn.WriteSet{Changes: []byte{200, 1, 'I'}}})
	if err := p.failure(); !errors.Is(err, txn.ErrCorrupt) {
		t.Errorf("got %v", err)
	}
}

// TestKilledWorkers kills the workers' server processes again and again.
func TestKilledWorkers(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE seq (n int PRIMARY KEY); CREATE TABLE work (id int PRIMARY KEY, n int); INSERT INTO work SELECT g, 0 FROM generate_series(0, 9) g;")
	var transactions []string
	for n := 1; n <= 400; n++ {
		transactions = append(transactions, fmt.Sprintf("INSERT INTO seq VALUES (%d); UPDATE work SET n = n + 1 WHERE id = %d", n, n%10))
	}
	items := c.run(transactions...)
	cfg := c.config()
	cfg.GroupItems = 2
	p := start(t, cfg)
	stop := prefixReader(c, "seq")
	killer := c.connect("dst")
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			err := killer.PgConn().Exec(context.Background(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
				WHERE application_name LIKE 'quorate_apply_%' AND random() < 0.5`).Close()
			if err != nil {
				t.Errorf("kill: %v", err)
			}
			time.Sleep(15 * time.Millisecond)
		}
	})
	for _, item := range items {
		p.enqueue(item)
		time.Sleep(time.Millisecond)
	}
	cancel()
	wg.Wait()
	p.await(400)
	stop()
	c.equal("seq", "work")
	if err := p.stopped(); err != nil {
		t.Fatal(err)
	}
	progress, err := Progress(t.Context(), c.dst.PgConn())
	if err != nil || progress != 400 {
		t.Errorf("progress %d, %v", progress, err)
	}
}

// TestRestart restarts the server in the middle of remote transactions: the Pipeline says so, and the next one goes on
// from the progress.
func TestRestart(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE seq (n int PRIMARY KEY)")
	var transactions []string
	for n := 1; n <= 300; n++ {
		transactions = append(transactions, fmt.Sprintf("INSERT INTO seq VALUES (%d)", n))
	}
	items := c.run(transactions...)
	want := c.text(c.src, "SELECT count(*), sum(n) FROM seq")
	p := start(t, c.config())
	p.apply(items[:100])
	p.enqueue(items[100:200]...)
	if err := c.server.Restart(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := p.failure(); !errors.Is(err, ErrServerLost) {
		t.Fatalf("got %v", err)
	}
	conn := c.connect("dst")
	if err := p.Verify(t.Context(), conn.PgConn()); !errors.Is(err, ErrServerLost) {
		t.Errorf("a connection to the restarted server: %v", err)
	}
	cfg := c.config()
	var err error
	if cfg.Start, err = Progress(t.Context(), conn.PgConn()); err != nil {
		t.Fatal(err)
	}
	if cfg.Life, err = ServerLife(t.Context(), conn.PgConn()); err != nil {
		t.Fatal(err)
	}
	again := start(t, cfg)
	again.apply(items)
	if got := c.text(conn, "SELECT count(*), sum(n) FROM seq"); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if err := again.Verify(t.Context(), conn.PgConn()); err != nil {
		t.Errorf("a connection to the same server: %v", err)
	}
}

// TestCrash kills the server so that asynchronous commits are lost, but none of those that were flushed, be it a
// worker's or a session's. From the progress on everything applies again exactly once.
func TestCrash(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE seq (n int PRIMARY KEY)")
	c.exec(c.dst, "ALTER SYSTEM SET wal_writer_delay = '10s'")
	c.exec(c.dst, "ALTER SYSTEM SET wal_writer_flush_after = '100MB'")
	c.exec(c.dst, "SELECT pg_reload_conf()")
	var transactions []string
	for n := 1; n <= 200; n++ {
		transactions = append(transactions, fmt.Sprintf("INSERT INTO seq VALUES (%d)", n))
	}
	items := c.run(transactions...)
	cfg := c.config()
	cfg.FlushEvery = time.Hour
	p := start(t, cfg)
	p.apply(items[:99])
	own, session := c.hold(items[99], "INSERT INTO seq VALUES (100)")
	p.apply([]Item{own})
	if err := p.Flush(t.Context(), 100); err != nil || p.Durable() != 100 || !session.committed.Load() {
		t.Fatalf("flush: %v, durable %d, session committed %v", err, p.Durable(), session.committed.Load())
	}
	p.apply(items[100:150])
	// The crash of one process takes the shared memory of all with it.
	killOneBackend(t, c)
	err := p.failure()
	if !errors.Is(err, ErrServerLost) {
		t.Fatalf("got %v", err)
	}
	conn := c.reconnect("dst")
	if err := p.Flush(t.Context(), 150); !errors.Is(err, ErrServerLost) || p.Durable() != 100 {
		t.Errorf("flush of what the crash took: %v, durable %d", err, p.Durable())
	}
	progress, err := Progress(t.Context(), conn.PgConn())
	if err != nil {
		t.Fatal(err)
	}
	if got := c.text(conn, "SELECT count(*) FROM seq"); got != fmt.Sprint(progress) || progress < 100 || progress >= 150 {
		t.Errorf("%s rows at progress %d, of 150 and 100 flushed", got, progress)
	}
	cfg.Start = progress
	again := start(t, cfg)
	again.apply(items)
	if got := c.text(conn, "SELECT count(*), sum(n) FROM seq"); got != "200|20100" {
		t.Errorf("got %s", got)
	}
}

// TestDurableByItself: what is visible becomes durable after a while.
func TestDurableByItself(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE seq (n int PRIMARY KEY)")
	items := c.run("INSERT INTO seq VALUES (1)", "INSERT INTO seq VALUES (2)")
	cfg := c.config()
	cfg.FlushEvery = 10 * time.Millisecond
	p := start(t, cfg)
	p.apply(items)
	for deadline := time.Now().Add(10 * time.Second); p.Durable() < 2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("durable %d", p.Durable())
		}
	}
}

func TestLargeTransaction(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE big (id int PRIMARY KEY, v text)")
	items := c.run("INSERT INTO big SELECT g, md5(g::text) FROM generate_series(1, 200000) g", "UPDATE big SET v = 'x' WHERE id % 1000 = 0")
	item := &items[0]
	var parts [][]byte
	const partSize = 1 << 20
	for rest := item.Set.Changes; len(rest) > 0; {
		begin := rest
		for len(begin)-len(rest) < partSize && len(rest) > 0 {
			var err error
			if _, rest, err = nextMessage(rest); err != nil {
				t.Fatal(err)
			}
		}
		part := begin[:len(begin)-len(rest)]
		parts = append(parts, bytes.Clone(part))
	}
	item.Set.Changes = parts[len(parts)-1]
	item.Set.Chunks = uint32(len(parts) - 1)
	for i := range parts[:len(parts)-1] {
		item.Chunks = append(item.Chunks, txn.LogIndex(i))
	}
	cfg := c.config()
	cfg.Part = func(index txn.LogIndex) ([]byte, error) { return parts[index], nil }
	p := start(t, cfg)
	begin := time.Now()
	var highest atomic.Uint64
	done := watchHeap(&highest)
	p.apply(items)
	done()
	t.Logf("200,000 rows in %v, heap at most %d MiB more", time.Since(begin).Round(time.Millisecond), highest.Load()>>20)
	if highest.Load() > 64<<20 {
		t.Errorf("heap grew by %d MiB", highest.Load()>>20)
	}
	c.equal("big")
}

func TestSkipAndIndex(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE t (id int PRIMARY KEY)")
	items := c.run("INSERT INTO t VALUES (1)", "INSERT INTO t VALUES (2)")
	p := start(t, c.config())
	p.Skip(4)
	if got := p.AppliedIndex(); got != 4 {
		t.Errorf("index %d", got)
	}
	items[0].Index, items[1].Index = 5, 5
	p.apply(items)
	if got := p.AppliedIndex(); got != 4 {
		t.Errorf("index %d, but entry 5 may hold more", got)
	}
	p.Skip(5)
	p.Skip(3)
	if got := p.AppliedIndex(); got != 5 {
		t.Errorf("index %d", got)
	}
	if seen, err := p.Seen(t.Context()); err != nil || seen != 2 {
		t.Errorf("seen %d %v", seen, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := p.WaitFor(ctx, 3); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// TestHold: between Hold and release there is a moment at which exactly what was enqueued before is visible.
func TestHold(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE t (id int PRIMARY KEY)")
	items := c.run("INSERT INTO t VALUES (0)", "INSERT INTO t VALUES (1)", "INSERT INTO t VALUES (2)", "INSERT INTO t VALUES (3)")
	var local *held
	items[0], local = c.hold(items[0], "INSERT INTO t VALUES (0)")
	local.hang = true
	cfg := c.config()
	cfg.Workers = 1 // it is busy with the second, so the third would be merged with what follows
	p := start(t, cfg)
	p.enqueue(items[:3]...)
	csn, release, err := p.Hold()
	if err != nil || csn != 3 {
		t.Fatalf("hold: %d, %v", csn, err)
	}
	if _, _, err := p.Hold(); err == nil {
		t.Error("held twice")
	}
	p.enqueue(items[3])
	c.exec(local.conn, "COMMIT")
	local.committed.Store(true)
	local.end()
	if err := p.WaitFor(t.Context(), 3); err != nil {
		t.Fatal(err)
	}
	for ready := false; !ready; time.Sleep(time.Millisecond) { // it has done everything but COMMIT
		p.mu.Lock()
		head, _ := p.queue.first()
		ready = head.state == stateReady
		p.mu.Unlock()
	}
	if got := c.text(c.dst, "SELECT count(*) FROM t"); p.Applied() != 3 || got != "3" {
		t.Errorf("applied %d, visible %s", p.Applied(), got)
	}
	release()
	if err := p.WaitFor(t.Context(), 4); err != nil {
		t.Fatal(err)
	}
	c.equal("t")
	if _, release, err = p.Hold(); err != nil {
		t.Fatal(err)
	}
	release()
}

// TestBackPressure: Enqueue waits when the queue is full and goes on when something became visible.
func TestBackPressure(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE t (id int PRIMARY KEY)")
	var transactions []string
	for n := range 20 {
		transactions = append(transactions, fmt.Sprintf("INSERT INTO t VALUES (%d)", n))
	}
	items := c.run(transactions...)
	var local *held
	items[0], local = c.hold(items[0], "INSERT INTO t VALUES (0)")
	local.hang = true
	cfg := c.config()
	cfg.MaxItems, cfg.BlockedAfter = 5, time.Minute
	p := start(t, cfg)
	p.enqueue(items[:5]...)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := p.Enqueue(ctx, items[5]); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	<-local.released // not before the Pipeline is connected
	seen := make(chan txn.CSN, 1)
	go func() {
		csn, err := p.Seen(context.Background())
		if err != nil {
			t.Error(err)
		}
		seen <- csn
	}()
	select {
	case csn := <-seen:
		t.Fatalf("seen %d while a COMMIT was in flight", csn)
	case <-time.After(20 * time.Millisecond):
	}
	c.exec(local.conn, "COMMIT")
	local.committed.Store(true)
	local.end()
	if csn := <-seen; csn < 1 {
		t.Errorf("seen %d", csn)
	}
	p.apply(items[5:])
	c.equal("t")
}

// TestProgress: the progress is what was applied, wherever in an era; and the tables that hold it stay small.
func TestProgress(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE t (id int PRIMARY KEY)")
	if progress, err := Progress(t.Context(), c.dst.PgConn()); err != nil || progress != 0 {
		t.Fatalf("at first: %d, %v", progress, err)
	}
	var transactions []string
	for n := range 40 {
		transactions = append(transactions, fmt.Sprintf("INSERT INTO t VALUES (%d)", n))
	}
	c.next = 2<<eraBits - 20 // the first 20 end an odd era
	items := c.run(transactions...)
	cfg := c.config()
	cfg.Start = items[0].CSN - 1
	cfg.GroupItems = 2
	cfg.FlushEvery = time.Hour
	p := start(t, cfg)
	p.idleWorkers(4)
	flush := func(what string, csn txn.CSN, table, rows string) {
		t.Helper()
		if err := p.Flush(t.Context(), csn); err != nil {
			t.Fatal(err)
		}
		if got := c.text(c.dst, "SELECT count(*) FROM "+table); got != rows {
			t.Errorf("%s: %s rows in %s, not %s", what, got, table, rows)
		}
	}
	// A node that writes progress only when it flushes truncates as well: no worker has come to this.
	c.exec(c.dst, "INSERT INTO quorate.applied_even SELECT generate_series(1, 1000)")
	flush("before anything is applied", cfg.Start, "quorate.applied_even", "1000")
	p.apply(items[:10])
	flush("of the era before", items[9].CSN, "quorate.applied_even", "0")
	p.apply(items[10:25])
	// Others may be in the next era before the table of the last one is truncated.
	c.exec(c.dst, fmt.Sprintf("INSERT INTO quorate.applied_odd VALUES (%d)", 3<<eraBits))
	before := c.text(c.dst, "SELECT count(*) FROM quorate.applied_odd")
	flush("of the next era", items[24].CSN, "quorate.applied_odd", before)
	c.exec(c.dst, fmt.Sprintf("DELETE FROM quorate.applied_odd WHERE csn = %d", 3<<eraBits))
	p.apply(items[25:30])
	if err := p.stopped(); err != nil {
		t.Fatal(err)
	}
	if progress, err := Progress(t.Context(), c.dst.PgConn()); err != nil || progress != items[29].CSN {
		t.Fatalf("progress %d, %v", progress, err)
	}
	cfg.Start = items[29].CSN
	again := start(t, cfg)
	again.apply(items)
	c.equal("t")
}

// TestAbortIsNoProgress: what a worker held when the sidecar died has not been applied.
func TestAbortIsNoProgress(t *testing.T) {
	c := newCluster(t, 18, "CREATE TABLE t (id int PRIMARY KEY)")
	items := c.run("INSERT INTO t VALUES (1)", "INSERT INTO t VALUES (2)", "INSERT INTO t VALUES (3)")
	item, local := c.hold(items[1], "INSERT INTO t VALUES (2)")
	local.hang = true
	p := start(t, c.config())
	p.enqueue(items[0], item, items[2])
	p.await(1)
	c.eventually("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'quorate_apply_%' AND state = 'idle in transaction'", "1")
	if err := p.stopped(); err != nil {
		t.Fatal(err)
	}
	if progress, err := Progress(t.Context(), c.dst.PgConn()); err != nil || progress != 1 {
		t.Errorf("progress %d, %v", progress, err)
	}
}
