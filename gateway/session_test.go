package gateway

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/quorate/quorate/txn"
)

// TestSession runs every session test on PostgreSQL 18 and 17, one server each.
func TestSession(t *testing.T) {
	for _, major := range []int{18, 17} {
		t.Run(fmt.Sprint(major), func(t *testing.T) {
			f := newFixture(t, major)
			for _, c := range []struct {
				name string
				run  func(*testing.T, *fixture)
			}{
				{"Simple", testSimple}, {"Pieces", testPieces}, {"Extended", testExtended}, {"Pipeline", testPipeline},
				{"Repeat", testRepeat}, {"Copy", testCopy}, {"Verdicts", testVerdicts}, {"ExtendedVerdicts", testExtendedVerdicts},
				{"Deferred", testDeferred}, {"Refused", testRefused}, {"SideDoor", testSideDoor}, {"Cancel", testCancel},
				{"Evict", testEvict}, {"EvictExtended", testEvictExtended}, {"EvictCopy", testEvictCopy}, {"LateCancel", testLateCancel},
				{"EvictSlowReader", testEvictSlowReader}, {"LetThrough", testLetThrough},
				{"Notify", testNotify}, {"Cursors", testCursors}, {"Temporary", testTemporary}, {"Deallocate", testDeallocate},
				{"Pgx", testPgx}, {"Startup", testStartup}, {"ClientGone", testClientGone}, {"EndSessions", testEndSessions}, {"Malformed", testMalformed},
				{"BackendGone", testBackendGone}, {"NoQuorum", testNoQuorum}, {"CutOff", testCutOff}, {"Functions", testFunctions}, {"Views", testViews}, {"Pgbench", testPgbench},
			} {
				t.Run(c.name, func(t *testing.T) {
					f.wipe()
					c.run(t, f)
				})
			}
		})
	}
}

func testSimple(t *testing.T, f *fixture) {
	c := f.connect(t)
	before, _ := f.coord.counts()
	expect(t, c, "", " I")
	expect(t, c, "SELECT 1", "(1) SELECT 1 I")
	expect(t, c, "INSERT INTO t VALUES (1, 'a')", "INSERT 0 1 I")
	expect(t, c, "INSERT INTO t VALUES (1, 'a')", "!23505 I")
	expect(t, c, "INSERT INTO t VALUES (2, 'b') RETURNING id", "(2) INSERT 0 1 I")
	expect(t, c, "BEGIN", "BEGIN T")
	expect(t, c, "SELECT count(*) FROM t", "(2) SELECT 1 T")
	expect(t, c, "COMMIT", "COMMIT I")
	expect(t, c, "BEGIN", "BEGIN T")
	expect(t, c, "INSERT INTO t VALUES (3, 'c')", "INSERT 0 1 T")
	expect(t, c, "SAVEPOINT s", "SAVEPOINT T")
	expect(t, c, "INSERT INTO t VALUES (3, 'c')", "!23505 E")
	expect(t, c, "SELECT 1", "!25P02 E")
	expect(t, c, "ROLLBACK TO s", "ROLLBACK T")
	expect(t, c, "RELEASE s", "RELEASE T")
	expect(t, c, "END WORK", "COMMIT I")
	expect(t, c, "START TRANSACTION READ ONLY", "START TRANSACTION T")
	expect(t, c, "DELETE FROM t", "!25006 E")
	expect(t, c, "COMMIT", "ROLLBACK I")
	expect(t, c, "BEGIN ISOLATION LEVEL READ COMMITTED", "BEGIN T")
	expect(t, c, "SHOW transaction_isolation", "(read committed) SHOW T")
	expect(t, c, "DELETE FROM t WHERE id = 3", "DELETE 1 T")
	expect(t, c, "ROLLBACK", "ROLLBACK I")
	expect(t, c, "BEGIN; SELECT 1", "BEGIN (1) SELECT 1 T")
	expect(t, c, "INSERT INTO t VALUES (4, 'd')", "INSERT 0 1 T")
	expect(t, c, "COMMIT AND CHAIN", "COMMIT T")
	expect(t, c, "INSERT INTO t VALUES (5, 'e')", "INSERT 0 1 T")
	expect(t, c, "COMMIT AND NO CHAIN", "COMMIT I")
	expect(t, c, "BEGIN READ ONLY", "BEGIN T")
	expect(t, c, "COMMIT AND CHAIN", "COMMIT T")
	expect(t, c, "INSERT INTO t VALUES (6, 'e')", "!25006 E")
	expect(t, c, "ROLLBACK AND CHAIN", "ROLLBACK T")
	expect(t, c, "ROLLBACK", "ROLLBACK I")
	expect(t, c, "SELECT count(*) FROM t", "(5) SELECT 1 I")
	expect(t, c, "SELEC", "!42601 I")
	expect(t, c, "CREATE TABLE made AS SELECT 1 AS a", "SELECT 1 I")
	expect(t, c, "DROP TABLE made", "DROP TABLE I")
	if after, _ := f.coord.counts(); after-before != 7 {
		t.Errorf("%d commits were ordered, want 7", after-before)
	}
}

func testPieces(t *testing.T, f *fixture) {
	c := f.connect(t)
	expect(t, c, "INSERT INTO t VALUES (1); INSERT INTO t VALUES (2)", "INSERT 0 1 INSERT 0 1 I")
	expect(t, c, "INSERT INTO t VALUES (3); INSERT INTO t VALUES (1)", "INSERT 0 1 !23505 I")
	expect(t, c, "SELECT count(*) FROM t", "(2) SELECT 1 I")
	expect(t, c, "BEGIN; INSERT INTO t VALUES (3); COMMIT", "BEGIN INSERT 0 1 COMMIT I")
	expect(t, c, "INSERT INTO t VALUES (4); BEGIN; INSERT INTO t VALUES (5); ROLLBACK; SELECT max(id) FROM t",
		"INSERT 0 1 BEGIN INSERT 0 1 ROLLBACK (3) SELECT 1 I")
	expect(t, c, "INSERT INTO t VALUES (4); COMMIT; INSERT INTO t VALUES (5); ROLLBACK; SELECT max(id) FROM t",
		"INSERT 0 1 COMMIT INSERT 0 1 ROLLBACK (4) SELECT 1 I")
	expect(t, c, "INSERT INTO t VALUES (6); SAVEPOINT a", "INSERT 0 1 !25P01 I")
	expect(t, c, "BEGIN; SELECT 1/0; COMMIT", "BEGIN !22012 E")
	expect(t, c, "ROLLBACK; INSERT INTO t VALUES (7)", "ROLLBACK INSERT 0 1 I")
	expect(t, c, "BEGIN; SAVEPOINT a; INSERT INTO t VALUES (8); ROLLBACK TO a; COMMIT AND CHAIN; INSERT INTO t VALUES (9); COMMIT; SELECT count(*) FROM t",
		"BEGIN SAVEPOINT INSERT 0 1 ROLLBACK COMMIT INSERT 0 1 COMMIT (6) SELECT 1 I")

	_, err := c.Exec(timeout(t), "INSERT INTO t VALUES (20); BEGIN; SELECT 'é'; SELECT nonsense").ReadAll()
	var e *pgconn.PgError
	if !asPgError(err, &e) || e.Position != int32(strings.Index("INSERT INTO t VALUES (20); BEGIN; SELECT 'e'; SELECT nonsense", "nonsense")+1) {
		t.Errorf("error in the middle of a text: %+v", err)
	}
	expect(t, c, "ROLLBACK", "ROLLBACK I")
	expect(t, c, "SELECT count(*) FROM t", "(6) SELECT 1 I")
}

func testExtended(t *testing.T, f *fixture) {
	w := f.wire(t, nil)
	steps := []struct {
		send []pgproto3.FrontendMessage
		want string
	}{
		{join(all("SELECT 1"), syncMessage), "1 2 T (1) SELECT_1 I"},
		{join(all("INSERT INTO t VALUES (1, $1)", "a"), syncMessage), "1 2 n INSERT_0_1 I"},
		{join(all("INSERT INTO t VALUES (1, $1)", "a"), syncMessage), "1 2 n !23505 I"},
		{join(parse("ins", "INSERT INTO t VALUES ($1)"), syncMessage), "1 I"},
		{join(bind("", "ins", "2"), execute(""), syncMessage), "2 INSERT_0_1 I"},
		{join(parse("ins", "COMMIT"), syncMessage), "!42P05 I"},
		{join(all("BEGIN"), syncMessage), "1 2 n BEGIN T"},
		{join(bind("", "ins", "3"), execute(""), syncMessage), "2 INSERT_0_1 T"},
		{join(all("COMMIT"), syncMessage), "1 2 n COMMIT I"},
		// As JDBC does it: BEGIN and the first statement in one batch.
		{join(all("BEGIN"), bind("", "ins", "4"), execute(""), syncMessage), "1 2 n BEGIN 2 INSERT_0_1 T"},
		{join(parse("fin", "COMMIT"), syncMessage), "1 T"},
		{join(bind("", "fin"), describe(""), execute(""), syncMessage), "2 n COMMIT I"},
		// A whole transaction in one batch.
		{join(all("BEGIN"), bind("", "ins", "5"), execute(""), bind("", "fin"), execute(""), syncMessage), "1 2 n BEGIN 2 INSERT_0_1 2 COMMIT I"},
		{join(all("BEGIN"), bind("", "ins", "5"), execute(""), bind("", "fin"), execute(""), syncMessage), "1 2 n BEGIN 2 !23505 E"},
		{join(all("ROLLBACK"), syncMessage), "1 2 n ROLLBACK I"},
		// An implicit transaction of several statements.
		{join(bind("", "ins", "6"), execute(""), bind("", "ins", "7"), execute(""), syncMessage), "2 INSERT_0_1 2 INSERT_0_1 I"},
		{join(bind("", "ins", "8"), execute(""), bind("", "ins", "7"), execute(""), syncMessage), "2 INSERT_0_1 2 !23505 I"},
		{join(all("SELECT count(*) FROM t"), syncMessage), "1 2 T (7) SELECT_1 I"},
		// BEGIN behind something else.
		{join(bind("", "ins", "8"), execute(""), all("BEGIN"), bind("", "ins", "9"), execute(""), syncMessage), "2 INSERT_0_1 1 2 n BEGIN 2 INSERT_0_1 T"},
		{join(all("COMMIT AND CHAIN"), bind("", "ins", "10"), execute(""), syncMessage), "1 2 n COMMIT 2 INSERT_0_1 T"},
		{join(all("END"), all("SELECT count(*) FROM t"), syncMessage), "1 2 n COMMIT 1 2 T (10) SELECT_1 I"},
		{join(bind("", "ins", "11"), execute(""), all("COMMIT"), bind("", "ins", "12"), execute(""), syncMessage), "2 INSERT_0_1 1 2 n COMMIT 2 INSERT_0_1 I"},
		{join(all("SAVEPOINT a"), syncMessage), "1 2 n !25P01 I"},
		{join(all("COMMIT"), syncMessage), "1 2 n ?25P01 COMMIT I"},
		{join(all(""), syncMessage), "1 2 n empty I"},
		{join(parse("", "SELECT 1; SELECT 2"), syncMessage), "!42601 I"},
		{join(&pgproto3.Close{ObjectType: 'S', Name: "ins"}, parse("ins", "SELECT 5"), bind("", "ins"), execute(""), syncMessage), "3 1 2 (5) SELECT_1 I"},
		{join(syncMessage), "I"},
	}
	for _, s := range steps {
		w.send(s.send...)
		if got := w.until(1); got != s.want {
			t.Errorf("%s\n got %s\nwant %s", describeAll(s.send), got, s.want)
		}
	}

	// Flush: the client wants to see before it goes on.
	w.send(parse("", "INSERT INTO t VALUES ($1)"), &pgproto3.Describe{ObjectType: 'S'}, flush)
	for _, want := range []string{"1", "t", "n"} {
		if got := render(w.receive()); got != want {
			t.Fatalf("after Flush: got %s, want %s", got, want)
		}
	}
	w.send(bind("", "", "30"), execute(""), syncMessage)
	if got := w.until(1); got != "2 INSERT_0_1 I" {
		t.Errorf("after Flush and Sync: %s", got)
	}
	w.send(join(all("SELECT nonsense"), flush)...)
	if got := render(w.receive()); got != "!42703" {
		t.Errorf("error before Sync: %s", got)
	}
	w.send(join(all("SELECT 1"), syncMessage)...)
	if got := w.until(1); got != "I" {
		t.Errorf("after the error: %s", got)
	}
}

func describeAll(messages []pgproto3.FrontendMessage) string {
	var out []string
	for _, m := range messages {
		switch m := m.(type) {
		case *pgproto3.Parse:
			out = append(out, "P "+m.Query)
		default:
			out = append(out, strings.TrimPrefix(fmt.Sprintf("%T", m), "*pgproto3."))
		}
	}
	return strings.Join(out, ", ")
}

// testPipeline sends many batches and queries without waiting.
func testPipeline(t *testing.T, f *fixture) {
	w := f.wire(t, nil)
	w.send(join(parse("i", "INSERT INTO t VALUES ($1)"), syncMessage)...)
	w.until(1)
	var m []pgproto3.FrontendMessage
	var want []string
	for i := range 50 {
		m = append(m, bind("", "i", fmt.Sprint(i)), execute(""), syncMessage)
		want = append(want, "2 INSERT_0_1 I")
	}
	m = append(m, query("BEGIN"))
	want = append(want, "BEGIN T")
	for i := range 50 {
		m = append(m, bind("", "i", fmt.Sprint(100+i)), execute(""), syncMessage)
		want = append(want, "2 INSERT_0_1 T")
	}
	m = append(m, query("SAVEPOINT a"), bind("", "i", "100"), execute(""), syncMessage, query("ROLLBACK TO a"), query("COMMIT"),
		query("SELECT count(*) FROM t"), query("BEGIN"), query("SELECT 1/0"), query("COMMIT"), query("SELECT 5"))
	want = append(want, "SAVEPOINT T 2 !23505 E ROLLBACK T COMMIT I T (100) SELECT_1 I BEGIN T !22012 E ROLLBACK I T (5) SELECT_1 I")
	go func() {
		for _, x := range m {
			w.f.Send(x)
		}
		_ = w.f.Flush()
	}()
	if got := w.until(50 + 1 + 50 + 9); got != strings.Join(want, " ") {
		t.Errorf("got  %s\nwant %s", got[700:], strings.Join(want, " ")[700:])
	}
}

// testRepeat: statements that turn out to write.
func testRepeat(t *testing.T, f *fixture) {
	c := f.connect(t)
	expect(t, c, "CREATE FUNCTION w(int) RETURNS int LANGUAGE sql VOLATILE AS 'INSERT INTO t VALUES ($1) RETURNING id'", "CREATE FUNCTION I")
	expect(t, c, "CREATE VIEW wv AS SELECT w(77) AS x", "CREATE VIEW I")
	t.Cleanup(func() { f.direct("DROP VIEW wv; DROP FUNCTION w") })
	expect(t, c, "SELECT w(1)", "(1) SELECT 1 I")
	repeats := func() float64 { return counter(t, f, "quorate_gateway_statement_repeats_total") }
	before := repeats()
	expect(t, c, "SELECT * FROM wv", "(77) SELECT 1 I")
	expect(t, c, "DELETE FROM t WHERE id = 77", "DELETE 1 I")
	expect(t, c, "select  *  from WV -- again", "(77) SELECT 1 I")
	expect(t, c, "DELETE FROM t WHERE id = 77", "DELETE 1 I")
	if n := repeats() - before; n != 1 {
		t.Errorf("%v repetitions, want 1", n)
	}
	expect(t, c, "WITH x AS (INSERT INTO t VALUES (2) RETURNING id) SELECT * FROM x", "(2) SELECT 1 I")
	expect(t, c, "WITH x AS (UPDATE t SET v = 'x' WHERE id = 2 RETURNING id) SELECT * FROM x", "(2) SELECT 1 I")
	expect(t, c, "SELECT id FROM t WHERE id = 2 FOR UPDATE", "(2) SELECT 1 I")
	expect(t, c, "SELECT id INTO made FROM t", "SELECT 2 I")
	expect(t, c, "DROP TABLE made", "DROP TABLE I")
	expect(t, c, "PREPARE p AS INSERT INTO t VALUES ($1)", "PREPARE I")
	expect(t, c, "EXECUTE p(3)", "INSERT 0 1 I")
	if got := run(t, c, "EXPLAIN (ANALYZE, COSTS off) DELETE FROM t WHERE id = 3"); !strings.HasSuffix(got, "EXPLAIN I") {
		t.Error(got)
	}
	expect(t, c, "SELECT count(*) FROM t WHERE id = 3", "(0) SELECT 1 I")

	w := f.wire(t, nil)
	w.send(join(parse("n", "SELECT w.x FROM wv w"), bind("", "n"), describe(""), execute(""), syncMessage)...)
	if got := w.until(1); got != "1 2 T (77) SELECT_1 I" {
		t.Errorf("repeated batch: %s", got)
	}
	f.direct("BEGIN; DELETE FROM t WHERE id = 77; SELECT pg_logical_emit_message(true, 'quorate.seal', ''); COMMIT")
	w.send(join(bind("", "n"), describe(""), execute(""), syncMessage)...)
	if got := w.until(1); got != "2 T (77) SELECT_1 I" {
		t.Errorf("remembered batch: %s", got)
	}
}

func testCopy(t *testing.T, f *fixture) {
	c := f.connect(t)
	big := strings.Repeat("x", 20000)
	var in strings.Builder
	for i := range 200 {
		fmt.Fprintf(&in, "%d\t%s\n", i, big)
	}
	if tag, err := c.CopyFrom(timeout(t), strings.NewReader(in.String()), "COPY t FROM STDIN"); err != nil || tag.RowsAffected() != 200 {
		t.Errorf("copy in: %v %v", tag, err)
	}
	var out bytes.Buffer
	if _, err := c.CopyTo(timeout(t), &out, "COPY (SELECT * FROM t ORDER BY id) TO STDOUT"); err != nil || out.String() != in.String() {
		t.Errorf("copy out: %v, %d bytes", err, out.Len())
	}
	if _, err := c.CopyFrom(timeout(t), strings.NewReader("7\tq\n"), "COPY t FROM STDIN"); err == nil {
		t.Error("copy of a duplicate went through")
	}
	expect(t, c, "SELECT count(*) FROM t", "(200) SELECT 1 I")
	// One message that fits no buffer, both ways.
	huge := strings.Repeat("y", 3<<20)
	expect(t, c, "INSERT INTO t VALUES (1000, '"+huge+"')", "INSERT 0 1 I")
	r := c.ExecParams(timeout(t), "SELECT v FROM t WHERE id = $1 AND v = $2", [][]byte{[]byte("1000"), []byte(huge)}, nil, nil, nil).Read()
	if r.Err != nil || len(r.Rows) != 1 || string(r.Rows[0][0]) != huge {
		t.Errorf("large parameter: %v, %d rows", r.Err, len(r.Rows))
	}
	expect(t, c, "BEGIN", "BEGIN T")
	if _, err := c.CopyFrom(timeout(t), strings.NewReader("2000\tq\n"), "COPY t FROM STDIN"); err != nil {
		t.Error(err)
	}
	expect(t, c, "COMMIT", "COMMIT I")
	expect(t, c, "SELECT v FROM t WHERE id = 2000", "(q) SELECT 1 I")
}

func testVerdicts(t *testing.T, f *fixture) {
	c := f.connect(t)
	insert := func(id int) { expect(t, c, fmt.Sprintf("INSERT INTO t VALUES (%d)", id), "INSERT 0 1 T") }
	block := func(id int) {
		expect(t, c, "BEGIN", "BEGIN T")
		insert(id)
	}
	block(1)
	f.coord.next(txn.Event{Step: txn.StepAbort, Reason: txn.AbortConflict, With: 7})
	expect(t, c, "COMMIT", "!40001 I")
	block(1)
	f.coord.next(txn.Event{Step: txn.StepAbort, Reason: txn.AbortNoQuorum})
	expect(t, c, "COMMIT", "!25006 I")
	block(1)
	f.coord.next(txn.Event{Step: txn.StepAbort, Reason: txn.AbortBehind})
	expect(t, c, "COMMIT", "!40001 I")
	f.coord.next(txn.Event{Step: txn.StepAbort, Reason: txn.AbortConflict})
	expect(t, c, "INSERT INTO t VALUES (1)", "!40001 I")
	f.coord.next(txn.Event{Step: txn.StepAbort, Reason: txn.AbortHorizon})
	expect(t, c, "BEGIN; INSERT INTO t VALUES (1); COMMIT; SELECT 1", "BEGIN INSERT 0 1 !40001 I")
	f.coord.next(txn.Event{Step: txn.StepNudge}, txn.Event{Step: txn.StepNudge}, txn.Event{Step: txn.StepRelease})
	expect(t, c, "INSERT INTO t VALUES (1)", "INSERT 0 1 I")
	block(2)
	f.coord.next(txn.Event{Step: txn.StepNudge}, txn.Event{Step: txn.StepRelease})
	expect(t, c, "COMMIT AND CHAIN", "COMMIT T")
	insert(3)
	f.coord.next(txn.Event{Step: txn.StepLocal})
	expect(t, c, "COMMIT", "COMMIT I")
	expect(t, c, "SELECT count(*) FROM t", "(3) SELECT 1 I")
	if n := f.ask("SELECT count(*)::text FROM quorate.nudge"); n != "0" {
		t.Errorf("%s rows in the nudge table", n)
	}

	f.coord.mu.Lock()
	f.coord.refuse = fmt.Errorf("partitioned: %w", txn.ErrNoQuorum)
	f.coord.mu.Unlock()
	expect(t, c, "INSERT INTO t VALUES (9)", "!25006 I")
	f.coord.mu.Lock()
	f.coord.refuse = nil
	f.coord.mu.Unlock()
	expect(t, c, "SELECT count(*) FROM t", "(3) SELECT 1 I")

	// Unknown: the session ends.
	drained(f)
	f.coord.next(txn.Event{Step: txn.StepUnknown})
	_, err := c.Exec(timeout(t), "INSERT INTO t VALUES (10)").ReadAll()
	var e *pgconn.PgError
	if !asPgError(err, &e) || e.Code != "08007" {
		t.Errorf("unknown outcome: %v", err)
	}
	gid := (<-f.coord.begun).gid.String()
	if e != nil && !strings.Contains(e.Message, gid) {
		t.Errorf("%q does not name %s", e.Message, gid)
	}
}

// drained forgets the scripted commits of before.
func drained(f *fixture) {
	for {
		select {
		case <-f.coord.begun:
		default:
			return
		}
	}
}

func testExtendedVerdicts(t *testing.T, f *fixture) {
	w := f.wire(t, nil)
	insert := func(id string) []pgproto3.FrontendMessage { return all("INSERT INTO t VALUES ($1)", id) }
	for _, s := range []struct {
		event txn.Event
		send  []pgproto3.FrontendMessage
		want  string
	}{
		{txn.Event{Step: txn.StepAbort, Reason: txn.AbortConflict}, join(insert("1"), syncMessage), "1 2 n !40001 I"},
		{txn.Event{Step: txn.StepAbort, Reason: txn.AbortConflict},
			join(all("BEGIN"), insert("1"), all("COMMIT"), syncMessage), "1 2 n BEGIN 1 2 n INSERT_0_1 !40001 I"},
		{txn.Event{Step: txn.StepAbort, Reason: txn.AbortConflict},
			join(all("BEGIN"), insert("1"), all("COMMIT"), all("SELECT 1"), syncMessage, query("SELECT 2")), "1 2 n BEGIN 1 2 n INSERT_0_1 !40001 I"},
		{txn.Event{Step: txn.StepLocal}, join(insert("1"), syncMessage), "1 2 n INSERT_0_1 I"},
		{txn.Event{Step: txn.StepNudge}, join(), ""},
	} {
		if len(s.send) == 0 {
			continue
		}
		f.coord.next(s.event)
		w.send(s.send...)
		if got := w.until(1); got != s.want {
			t.Errorf("%s\n got %s\nwant %s", describeAll(s.send), got, s.want)
		}
		if _, ok := s.send[len(s.send)-1].(*pgproto3.Query); ok {
			if got := w.until(1); got != "T (2) SELECT_1 I" {
				t.Errorf("after it: %s", got)
			}
		}
	}
}

// testDeferred: errors that come at COMMIT.
func testDeferred(t *testing.T, f *fixture) {
	c := f.connect(t)
	expect(t, c, "BEGIN; INSERT INTO d VALUES (1); INSERT INTO d VALUES (1)", "BEGIN INSERT 0 1 INSERT 0 1 T")
	expect(t, c, "COMMIT", "!23505 I")
	expect(t, c, "BEGIN; INSERT INTO d VALUES (1); INSERT INTO d VALUES (1); COMMIT", "BEGIN INSERT 0 1 INSERT 0 1 !23505 I")
	expect(t, c, "INSERT INTO d VALUES (1), (1)", "!23505 I")
	s := f.session(c.PID())
	s.wmu.Lock()
	if s.preparedReady != nil {
		t.Error("it is taken for certain which form of the ready statement exists after a failure that may have come before it was prepared")
	}
	s.wmu.Unlock()
	w := f.wire(t, nil)
	w.send(join(all("BEGIN"), all("INSERT INTO d VALUES (1), (1)"), all("COMMIT"), syncMessage)...)
	if got := w.until(1); got != "1 2 n BEGIN 1 2 n INSERT_0_2 !23505 I" {
		t.Errorf("extended: %s", got)
	}
	w.send(join(all("INSERT INTO d VALUES (1), (1)"), syncMessage)...)
	if got := w.until(1); got != "1 2 n !23505 I" {
		t.Errorf("extended, outside a block: %s", got)
	}
	// A WITH HOLD cursor whose query fails at COMMIT, after the verdict: the log has the last word.
	drained(f)
	expect(t, c, "BEGIN; INSERT INTO d VALUES (5); DECLARE h CURSOR WITH HOLD FOR SELECT 1/(6-g) FROM generate_series(1,9) g", "BEGIN INSERT 0 1 DECLARE CURSOR T")
	f.coord.next(txn.Event{Step: txn.StepRelease}, txn.Event{Step: txn.StepVisible})
	expect(t, c, "COMMIT", "COMMIT I")
	_, err := c.Exec(timeout(t), "SELECT 1").ReadAll()
	var e *pgconn.PgError
	if !asPgError(err, &e) || e.Code != "57P01" {
		t.Errorf("after a failing holdable cursor: %v", err)
	}
	if <-(<-f.coord.begun).lostCh; false {
		t.Error("not reached")
	}
}

func testRefused(t *testing.T, f *fixture) {
	c := f.connect(t)
	for _, sql := range []string{
		"BEGIN ISOLATION LEVEL SERIALIZABLE", "SET default_transaction_isolation = serializable",
		"SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE", "PREPARE TRANSACTION 'x'", "COMMIT PREPARED 'x'",
		"CREATE INDEX CONCURRENTLY ON t (v)", "CREATE DATABASE x", "CREATE ROLE x", "GRANT postgres TO postgres", "ALTER SYSTEM SET work_mem = 1",
		"SELECT lo_create(0)", "SET session_replication_role = replica", "SELECT set_config('session_replication_role', 'replica', false)",
		"LOCK pg_class", "CREATE EVENT TRIGGER x ON ddl_command_end EXECUTE FUNCTION y()", "DROP SCHEMA quorate CASCADE", "CREATE SUBSCRIPTION s",
	} {
		expect(t, c, sql, "!0A000 I")
		expect(t, c, "BEGIN", "BEGIN T")
		expect(t, c, sql, "!0A000 E")
		expect(t, c, "ROLLBACK", "ROLLBACK I")
	}
	// What the lexer does not see is caught when the transaction is about to commit.
	expect(t, c, "DO $$ BEGIN PERFORM set_config('session_replication_role', 'rep'||'lica', true); INSERT INTO t VALUES (1); END $$", "!0A000 I")
	expect(t, c, "SELECT set_config('default_transaction_isolation', 'serial'||'izable', false)", "(serializable) SELECT 1 I")
	expect(t, c, "INSERT INTO t VALUES (1)", "!0A000 I")
	expect(t, c, "RESET default_transaction_isolation", "RESET I")
	expect(t, c, "SELECT count(*) FROM t", "(0) SELECT 1 I")
	// A session's first opaque statement changes how its transactions are made ready, and DEALLOCATE ALL does not change that back.
	c = f.connect(t)
	expect(t, c, "INSERT INTO t VALUES (1)", "INSERT 0 1 I")
	for range 2 {
		expect(t, c, "DO $$ BEGIN CREATE ROLE nobody_else; END $$", "!0A000 I")
		expect(t, c, "UPDATE t SET id = id + 1", "UPDATE 1 I")
		expect(t, c, "DEALLOCATE ALL", "DEALLOCATE ALL I")
	}
	w := f.wire(t, nil)
	w.send(join(all("CREATE DATABASE x"), syncMessage)...)
	if got := w.until(1); got != "!0A000 I" {
		t.Errorf("extended: %s", got)
	}
	w.send(join(all("BEGIN"), all("CREATE DATABASE x"), syncMessage)...)
	if got := w.until(1); got != "1 2 n BEGIN !0A000 E" {
		t.Errorf("extended, in a block: %s", got)
	}
	w.send(&pgproto3.FunctionCall{Function: 1})
	if got := w.until(1); got != "!0A000 E" {
		t.Errorf("function call: %s", got)
	}
}

// testSideDoor: whatever a client sets, what it writes goes through the gateway. The audit at the end sees the rest.
func testSideDoor(t *testing.T, f *fixture) {
	c := f.connect(t, func(cfg *pgconn.Config) {
		cfg.RuntimeParams["options"] = "-c default_transaction_read_only=off -c work_mem=5MB"
		cfg.RuntimeParams["default_transaction_read_only"] = "off"
	})
	inner := func() string {
		return f.ask("SELECT 1::text WHERE pg_is_in_recovery() = false")
	}
	_ = inner()
	expect(t, c, "SHOW work_mem", "(5MB) SHOW I")
	if got := c.ParameterStatus("default_transaction_read_only"); got != "off" {
		t.Errorf("reported: %s", got)
	}
	expect(t, c, "SHOW default_transaction_read_only", "(off) SHOW I")
	expect(t, c, "SELECT current_setting('default_transaction_read_only'), current_setting('transaction_read_only')", "(off,off) SELECT 1 I")
	write := "SELECT 'INSERT INTO t VALUES (9)' AS x"
	for i, sql := range []string{
		"SET default_transaction_read_only = off", "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
		"SELECT set_config('default_transaction_read_only', 'off', false)", "SELECT set_config('default_' || 'transaction_read_only', 'off', false)",
		"DO $$ BEGIN EXECUTE 'SET default_transaction_read_only = off'; END $$", "RESET ALL", "RESET default_transaction_read_only",
		"BEGIN; SET default_transaction_read_only = off; COMMIT", "BEGIN; SET default_transaction_read_only = off; ROLLBACK", "DISCARD ALL",
		"UPDATE pg_settings SET setting = 'off' WHERE name = 'default_transaction_read_only'",
	} {
		run(t, c, sql)
		expect(t, c, write, "(INSERT INTO t VALUES (9)) SELECT 1 I")
		expect(t, c, fmt.Sprintf("INSERT INTO t VALUES (%d)", i), "INSERT 0 1 I")
		if got := run(t, c, "VALUES (1)"); got != "(1) SELECT 1 I" {
			t.Error(got)
		}
		// The server's own view, asked without the words the gateway looks for.
		if got := run(t, c, "SELECT setting FROM pg_settings WHERE name LIKE 'default_tran%only'"); got != "(on) SELECT 1 I" {
			t.Errorf("after %s the side door is open: %s", sql, got)
		}
	}
	// A client that wants to be read only is.
	expect(t, c, "SET default_transaction_read_only = on", "SET I")
	expect(t, c, "INSERT INTO t VALUES (100)", "!25006 I")
	expect(t, c, "BEGIN", "BEGIN T")
	expect(t, c, "INSERT INTO t VALUES (100)", "!25006 E")
	expect(t, c, "ROLLBACK", "ROLLBACK I")
	if got := c.ParameterStatus("default_transaction_read_only"); got != "on" {
		t.Errorf("reported: %s", got)
	}
	expect(t, c, "BEGIN READ WRITE; INSERT INTO t VALUES (100); COMMIT", "BEGIN INSERT 0 1 COMMIT I")
	expect(t, c, "SET default_transaction_read_only TO DEFAULT", "SET I")
	expect(t, c, "INSERT INTO t VALUES (101)", "INSERT 0 1 I")
	// COMMIT under other names, and strings that look like one.
	expect(t, c, `BEGIN; INSERT INTO t VALUES (102, E'\'; COMMIT; --'); /* ; */ COMMIT`, "BEGIN INSERT 0 1 COMMIT I")
	expect(t, c, "SET standard_conforming_strings = off", "SET I")
	expect(t, c, `BEGIN; INSERT INTO t VALUES (103, '\'; COMMIT; --'); COMMIT`, "BEGIN INSERT 0 1 COMMIT I")
	expect(t, c, "SELECT v FROM t WHERE id = 103", "('; COMMIT; --) SELECT 1 I")
}

func testCancel(t *testing.T, f *fixture) {
	c := f.connect(t)
	for _, sql := range []string{"SELECT pg_sleep(20)", "INSERT INTO t SELECT 1 FROM pg_sleep(20)"} {
		done := make(chan string, 1)
		go func() { done <- run(t, c, sql) }()
		f.await("SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'PgSleep'", "1")
		if err := c.CancelRequest(timeout(t)); err != nil {
			t.Fatal(err)
		}
		if got := <-done; got != "!57014 I" {
			t.Errorf("%s: %s", sql, got)
		}
		expect(t, c, "SELECT 1", "(1) SELECT 1 I")
	}
	// With a wrong key nothing happens.
	w := f.wire(t, nil)
	conn, err := net.Dial("tcp", f.g.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	b, err := (&pgproto3.CancelRequest{ProcessID: w.pid, SecretKey: bytes.Repeat([]byte{1}, len(w.key))}).Encode(nil)
	if err != nil {
		t.Fatal(err)
	}
	w.send(query("SELECT pg_sleep(0.3)"))
	if _, err := conn.Write(b); err != nil {
		t.Fatal(err)
	}
	if got := w.until(1); got != "T () SELECT_1 I" {
		t.Errorf("after a cancel request with a wrong key: %s", got)
	}
}

// await waits until the server answers want.
func (f *fixture) await(sql, want string) {
	f.t.Helper()
	var got string
	for range 500 {
		if got = f.ask(sql); got == want {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	f.t.Fatalf("%s: %s, want %s", sql, got, want)
}

// locked reports how many backends hold a lock on table t, other than the asker's.
const locked = "SELECT count(DISTINCT pid)::text FROM pg_locks WHERE relation = 't'::regclass AND pid <> pg_backend_pid() AND granted"

// laterEntry is an entry that is not visible yet, however many transactions a test commits.
const laterEntry = 1 << 40

func (f *fixture) evict(t testing.TB, c *pgconn.PgConn) {
	t.Helper()
	if !f.g.Evict(c.PID(), laterEntry, time.Now()) {
		t.Fatal("the gateway does not know its session")
	}
	f.await(locked, "0")
}

func testEvict(t *testing.T, f *fixture) {
	if f.g.Evict(1, 1, time.Now()) {
		t.Error("process 1 is a session")
	}
	c := f.connect(t)
	block := func() { expect(t, c, "BEGIN; INSERT INTO t VALUES (1)", "BEGIN INSERT 0 1 T") }

	block() // idle in transaction, then any statement
	f.evict(t, c)
	_, err := c.Exec(timeout(t), "SELECT 1").ReadAll()
	var e *pgconn.PgError
	if !asPgError(err, &e) || e.Code != "40001" || !strings.Contains(e.Message, fmt.Sprint("replicated transaction ", laterEntry)) || c.TxStatus() != 'E' {
		t.Errorf("evicted: %v, status %c", err, c.TxStatus())
	}
	expect(t, c, "SELECT 1", "!25P02 E")
	expect(t, c, "COMMIT", "ROLLBACK I")
	expect(t, c, "SELECT count(*) FROM t", "(0) SELECT 1 I")

	// A transaction that began after another was seen in the way is spared, also when it is the next of a chain.
	for _, end := range []string{"ROLLBACK; BEGIN", "COMMIT AND CHAIN"} {
		block()
		seen := time.Now()
		run(t, c, end)
		expect(t, c, "INSERT INTO t VALUES (2)", "INSERT 0 1 T")
		if !f.g.Evict(c.PID(), laterEntry, seen) {
			t.Error("the gateway does not know its session")
		}
		expect(t, c, "COMMIT", "COMMIT I")
		run(t, c, "DELETE FROM t")
	}

	block() // then COMMIT
	f.evict(t, c)
	expect(t, c, "COMMIT", "!40001 I")

	block() // then ROLLBACK
	f.evict(t, c)
	expect(t, c, "ROLLBACK", "ROLLBACK I")

	block() // then several statements in one text
	f.evict(t, c)
	expect(t, c, "SELECT 1; COMMIT", "!40001 E")
	expect(t, c, "ROLLBACK", "ROLLBACK I")

	block() // failed, but a savepoint keeps the locks
	expect(t, c, "SAVEPOINT a; SELECT 1/0", "SAVEPOINT !22012 E")
	f.evict(t, c)
	expect(t, c, "ROLLBACK TO a", "!3B001 E")
	expect(t, c, "ROLLBACK", "ROLLBACK I")

	// A statement is running, in a block and outside.
	for sql, want := range map[string]string{
		"BEGIN; INSERT INTO t VALUES (1); SELECT pg_sleep(20)": "BEGIN INSERT 0 1 !40001 E",
		"INSERT INTO t VALUES (1); SELECT pg_sleep(20)":        "INSERT 0 1 !40001 I",
		"SELECT pg_sleep(20) FROM (SELECT count(*) FROM t) x":  "!40001 I",
	} {
		done := make(chan string, 1)
		go func() { done <- run(t, c, sql) }()
		f.await("SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'PgSleep'", "1")
		f.evict(t, c)
		if got := <-done; got != want {
			t.Errorf("%s\n got %s\nwant %s", sql, got, want)
		}
		run(t, c, "ROLLBACK")
	}

	// Waiting for the verdict: rolled back at once; the log has the last word.
	for _, last := range []struct {
		event txn.Event
		want  string
	}{
		{txn.Event{Step: txn.StepAbort, Reason: txn.AbortConflict}, "!40001 I"},
		{txn.Event{Step: txn.StepVisible, CSN: 50}, "COMMIT I"},
	} {
		drained(f)
		block()
		f.coord.holdNext()
		done := make(chan string, 1)
		go func() {
			var out []string
			mrr := c.Exec(timeout(t), "COMMIT")
			for mrr.NextResult() {
				if tag, err := mrr.ResultReader().Close(); err == nil {
					out = append(out, tag.String())
				}
			}
			if err := mrr.Close(); err != nil && asPgError(err, &e) {
				out = append(out, "!"+e.Code)
			}
			if !c.IsClosed() {
				out = append(out, string(c.TxStatus()))
			}
			done <- strings.Join(out, " ")
		}()
		commit := <-f.coord.begun
		<-commit.waiting
		f.evict(t, c)
		<-commit.lostCh
		commit.events <- txn.Event{Step: txn.StepNudge} // these were said before
		commit.events <- txn.Event{Step: txn.StepNudge}
		commit.events <- last.event
		if got := <-done; got != last.want {
			t.Errorf("evicted while waiting for the verdict: %s, want %s", got, last.want)
		}
	}
	if _, err := c.Exec(timeout(t), "SELECT 1").ReadAll(); !asPgError(err, &e) || e.Code != "57P01" || !c.IsClosed() {
		t.Errorf("the session goes on after its transaction was committed from the log: %v", err)
	}
}

// testLetThrough: others write a session's COMMIT for it, but only the one that it waits for, and not what Evict has undone.
func testLetThrough(t *testing.T, f *fixture) {
	const count = "SELECT count(*)::text FROM t"
	w := f.wire(t, nil)
	hold := func() *testCommit {
		drained(f)
		f.coord.holdNext()
		w.send(query("BEGIN"), query("INSERT INTO t VALUES (1)"), query("COMMIT"))
		commit := <-f.coord.begun
		<-commit.waiting
		return commit
	}
	evict := func(commit *testCommit) {
		if !f.g.Evict(w.pid, laterEntry, time.Now()) {
			t.Fatal("the gateway does not know its session")
		}
		<-commit.lostCh
	}

	commit := hold()
	commit.through(txn.GID{Node: 1, Incarnation: 0xabc, Sequence: commit.gid.Sequence - 1})
	evict(commit)
	commit.through(commit.gid) // too late
	commit.events <- txn.Event{Step: txn.StepRelease}
	commit.events <- txn.Event{Step: txn.StepAbort, Reason: txn.AbortConflict}
	if got := w.until(3); got != "BEGIN T INSERT_0_1 T !40001 I" {
		t.Errorf("evicted: %s", got)
	}
	if got := f.ask(count); got != "0" {
		t.Errorf("%s rows of a transaction that was rolled back", got)
	}

	commit = hold()
	commit.through(commit.gid)
	commit.through(commit.gid)
	f.await(count, "1") // before the session has heard of it
	if !f.g.Evict(w.pid, laterEntry, time.Now()) {
		t.Fatal("the gateway does not know its session")
	}
	commit.events <- txn.Event{Step: txn.StepRelease}
	if got := w.until(3); got != "BEGIN T INSERT_0_1 T COMMIT I" {
		t.Errorf("let through: %s", got)
	}
	w.send(query("SELECT 1"))
	if got := w.until(1); got != "T (1) SELECT_1 I" {
		t.Errorf("then: %s", got)
	}

	// Whatever others write for the session must not be so much that they could wait for the client's server.
	drained(f)
	w.send(join(all("BEGIN"), all("INSERT INTO t VALUES (2)"), syncMessage)...)
	w.until(1)
	f.coord.holdNext()
	messages := join(parse("", "COMMIT"), bind("", ""))
	for range 2 * maxThrough {
		messages = append(messages, describe(""))
	}
	w.send(join(messages, execute(""), syncMessage)...)
	commit = <-f.coord.begun
	<-commit.waiting
	s := f.session(w.pid)
	commit.through(commit.gid)
	s.mu.Lock()
	if s.through || s.phase != phaseDeciding {
		t.Error("others write a COMMIT of any length")
	}
	s.mu.Unlock()
	commit.events <- txn.Event{Step: txn.StepRelease}
	if got := w.until(1); !strings.HasSuffix(got, " n n COMMIT I") {
		t.Errorf("a long COMMIT: %s", got[max(0, len(got)-100):])
	}
}

func (f *fixture) session(pid uint32) *session {
	f.g.mu.Lock()
	defer f.g.mu.Unlock()
	return f.g.sessions[pid]
}

// testLateCancel: a cancel request that comes late does not meet the next statement.
func testLateCancel(t *testing.T, f *fixture) {
	// Requests to cancel pass through here, and are held back until they are let through.
	cfg := f.config()
	server := cfg.ServerAddress
	arrived, through := make(chan struct{}, 1), make(chan struct{})
	gate, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			client, err := gate.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer client.Close()
				first := make([]byte, 8)
				if _, err := io.ReadFull(client, first); err != nil {
					return
				}
				if binary.BigEndian.Uint32(first[4:]) == versionCancel {
					arrived <- struct{}{}
					<-through
				}
				backend, err := net.Dial("tcp", server)
				if err != nil {
					t.Error(err)
					return
				}
				defer backend.Close()
				if _, err := backend.Write(first); err != nil {
					return
				}
				var back sync.WaitGroup
				back.Go(func() {
					_, _ = io.Copy(client, backend)
					_ = client.Close()
				})
				_, _ = io.Copy(backend, client)
				_ = backend.Close()
				back.Wait()
			})
		}
	})
	cfg.ServerAddress = gate.Addr().String()
	g := New(cfg)
	if err := g.Open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(g.Close(), gate.Close()); err != nil {
			t.Error(err)
		}
		conns.Wait()
	})
	c := f.connect(t, func(cfg *pgconn.Config) { cfg.Port = uint16(g.Addr().(*net.TCPAddr).Port) })

	expect(t, c, "BEGIN; INSERT INTO t VALUES (1)", "BEGIN INSERT 0 1 T")
	const waiting = "SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
	for key, late := range []struct{ sql, want string }{{"SELECT pg_advisory_lock_shared(9)", "() SELECT 1 T"}, {"COMMIT", "COMMIT I"}} {
		f.direct(fmt.Sprintf("SELECT pg_advisory_lock(%d), pg_advisory_lock(%d)", key, 9+key))
		first := make(chan string, 1)
		go func() { first <- run(t, c, fmt.Sprintf("SELECT pg_advisory_lock(%d)", key)) }()
		f.await(waiting, "1")
		cancelled := make(chan error, 1)
		go func() { cancelled <- c.CancelRequest(timeout(t)) }()
		<-arrived
		f.direct(fmt.Sprintf("SELECT pg_advisory_unlock(%d)", key))
		if got := <-first; got != "() SELECT 1 T" { // it has ended by itself
			t.Fatal(got)
		}
		second := make(chan string, 1)
		go func() { second <- run(t, c, late.sql) }()
		select { // there is no event: it must not begin
		case got := <-second:
			t.Fatalf("%s while a cancel request was on its way: %s", late.sql, got)
		case <-time.After(100 * time.Millisecond):
		}
		if f.ask(waiting) != "0" {
			t.Errorf("%s has begun while a cancel request was on its way", late.sql)
		}
		through <- struct{}{}
		if err := <-cancelled; err != nil {
			t.Error(err)
		}
		f.direct(fmt.Sprintf("SELECT pg_advisory_unlock(%d)", 9+key))
		if got := <-second; got != late.want {
			t.Errorf("%s after the statement that was to be cancelled: %s", late.sql, got)
		}
	}
}

func testEvictExtended(t *testing.T, f *fixture) {
	w := f.wire(t, nil)
	w.send(join(all("BEGIN"), all("INSERT INTO t VALUES (1)"), syncMessage)...)
	w.until(1)
	evict := func() {
		if !f.g.Evict(w.pid, laterEntry, time.Now()) {
			t.Fatal("unknown session")
		}
		f.await(locked, "0")
	}
	evict()
	w.send(join(all("INSERT INTO t VALUES (2)"), syncMessage)...)
	if got := w.until(1); got != "!40001 E" {
		t.Errorf("evicted: %s", got)
	}
	w.send(join(all("ROLLBACK"), syncMessage)...)
	if got := w.until(1); got != "1 2 n ROLLBACK I" {
		t.Errorf("rollback: %s", got)
	}
	w.send(join(parse("c", "COMMIT"), all("BEGIN"), all("INSERT INTO t VALUES (1)"), syncMessage)...)
	w.until(1)
	evict()
	w.send(join(bind("", "c"), execute(""), syncMessage)...)
	if got := w.until(1); got != "!40001 I" {
		t.Errorf("commit: %s", got)
	}
	w.send(join(all("SELECT count(*) FROM t"), syncMessage)...)
	if got := w.until(1); got != "1 2 T (0) SELECT_1 I" {
		t.Errorf("after it: %s", got)
	}
}

func testEvictCopy(t *testing.T, f *fixture) {
	for _, begin := range []bool{false, true} {
		w := f.wire(t, nil)
		if begin {
			w.send(query("BEGIN"))
			w.until(1)
		}
		w.send(query("COPY t FROM STDIN"))
		if got := render(w.receive()); got != "G" {
			t.Fatal(got)
		}
		w.send(&pgproto3.CopyData{Data: []byte("1\ta\n")})
		f.await(locked, "1")
		if !f.g.Evict(w.pid, laterEntry, time.Now()) {
			t.Fatal("unknown session")
		}
		f.await(locked, "0")
		w.send(&pgproto3.CopyData{Data: []byte("2\tb\n")}, &pgproto3.CopyDone{})
		want := "!40001 I"
		if begin {
			want = "!40001 E"
		}
		if got := w.until(1); got != want {
			t.Errorf("evicted COPY: %s, want %s", got, want)
		}
		w.send(query("ROLLBACK"))
		w.until(1)
		w.send(query("SELECT count(*) FROM t"))
		if got := w.until(1); got != "T (0) SELECT_1 I" {
			t.Errorf("after it: %s", got)
		}
	}
}

// testEvictSlowReader: a client that does not read keeps its server from noticing anything.
func testEvictSlowReader(t *testing.T, f *fixture) {
	w := f.wire(t, nil)
	w.send(query("BEGIN; INSERT INTO t VALUES (1)"))
	w.until(1)
	w.send(query("SELECT repeat('x', 1000) FROM generate_series(1, 200000)"))
	f.await("SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'ClientWrite'", "1")
	if !f.g.Evict(w.pid, laterEntry, time.Now()) {
		t.Fatal("unknown session")
	}
	f.await(locked, "0")
	rows := 0
	for {
		m := w.receive()
		if _, ok := m.(*pgproto3.DataRow); ok {
			rows++
			continue
		}
		if e, ok := m.(*pgproto3.ErrorResponse); ok {
			if e.Code != "40001" {
				t.Errorf("error %s", e.Code)
			}
			break
		}
	}
	if got := w.until(1); got != "E" || rows == 0 || rows == 200000 {
		t.Errorf("after %d rows: %s", rows, got)
	}
	w.send(query("ROLLBACK"))
	if got := w.until(1); got != "ROLLBACK I" {
		t.Errorf("rollback: %s", got)
	}
}

func testNotify(t *testing.T, f *fixture) {
	listener, talker := f.connect(t), f.connect(t)
	expect(t, listener, "LISTEN ch", "LISTEN I")
	expect(t, talker, "NOTIFY ch, 'one'", "NOTIFY I")
	expect(t, talker, "BEGIN; INSERT INTO t VALUES (1); NOTIFY ch, 'two'; COMMIT", "BEGIN INSERT 0 1 NOTIFY COMMIT I")
	var got []string
	listener2, err := listener.Hijack()
	if err != nil {
		t.Fatal(err)
	}
	defer listener2.Conn.Close()
	_ = listener2.Conn.SetDeadline(time.Now().Add(20 * time.Second))
	for len(got) < 2 {
		m, err := listener2.Frontend.Receive()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, render(m))
	}
	if strings.Join(got, " ") != "notify:ch:one notify:ch:two" {
		t.Errorf("notifications: %v", got)
	}
}

func testCursors(t *testing.T, f *fixture) {
	c := f.connect(t)
	expect(t, c, "INSERT INTO t SELECT g FROM generate_series(1, 5) g", "INSERT 0 5 I")
	expect(t, c, "BEGIN", "BEGIN T")
	expect(t, c, "DECLARE h CURSOR WITH HOLD FOR SELECT id FROM t ORDER BY id", "DECLARE CURSOR T")
	expect(t, c, "FETCH 1 FROM h", "(1) FETCH 1 T")
	expect(t, c, "INSERT INTO t VALUES (6)", "INSERT 0 1 T")
	expect(t, c, "COMMIT", "COMMIT I")
	expect(t, c, "FETCH 2 FROM h", "(2) (3) FETCH 2 I")
	expect(t, c, "CLOSE h", "CLOSE CURSOR I")
	expect(t, c, "DECLARE x CURSOR FOR SELECT 1", "!25P01 I")
	// A holdable cursor that writes at COMMIT, behind the seal.
	expect(t, c, "CREATE FUNCTION hw() RETURNS int LANGUAGE sql VOLATILE AS 'INSERT INTO t VALUES (99) RETURNING id'", "CREATE FUNCTION I")
	t.Cleanup(func() { f.direct("DROP FUNCTION hw") })
	expect(t, c, "BEGIN; DECLARE h CURSOR WITH HOLD FOR SELECT hw()", "BEGIN DECLARE CURSOR T")
	expect(t, c, "COMMIT", "!25006 I")
	// Portals that are suspended in the extended protocol.
	w := f.wire(t, nil)
	w.send(join(all("BEGIN"), parse("", "SELECT id FROM t ORDER BY id"), bind("p", ""), &pgproto3.Execute{Portal: "p", MaxRows: 2}, syncMessage)...)
	if got := w.until(1); got != "1 2 n BEGIN 1 2 (1) (2) s T" {
		t.Error(got)
	}
	w.send(&pgproto3.Execute{Portal: "p", MaxRows: 2}, syncMessage)
	if got := w.until(1); got != "(3) (4) s T" {
		t.Error(got)
	}
	w.send(join(all("COMMIT"), syncMessage)...)
	if got := w.until(1); got != "1 2 n COMMIT I" {
		t.Error(got)
	}
}

func testTemporary(t *testing.T, f *fixture) {
	c := f.connect(t)
	f.coord.next(txn.Event{Step: txn.StepLocal})
	expect(t, c, "CREATE TEMP TABLE tt (a int)", "CREATE TABLE I")
	f.coord.next(txn.Event{Step: txn.StepLocal})
	expect(t, c, "INSERT INTO tt VALUES (1)", "INSERT 0 1 I")
	expect(t, c, "BEGIN; INSERT INTO tt VALUES (2); INSERT INTO t VALUES (2); COMMIT", "BEGIN INSERT 0 1 INSERT 0 1 COMMIT I")
	expect(t, c, "SELECT sum(a) FROM tt", "(3) SELECT 1 I")
}

func testDeallocate(t *testing.T, f *fixture) {
	c := f.connect(t)
	expect(t, c, "INSERT INTO t VALUES (1)", "INSERT 0 1 I")
	expect(t, c, "DEALLOCATE ALL", "DEALLOCATE ALL I")
	expect(t, c, "INSERT INTO t VALUES (2)", "INSERT 0 1 I")
	expect(t, c, "BEGIN; DISCARD ALL", "BEGIN !25001 E")
	expect(t, c, "ROLLBACK", "ROLLBACK I")
	expect(t, c, "INSERT INTO t VALUES (3)", "INSERT 0 1 I")
	expect(t, c, "DISCARD ALL", "DISCARD ALL I")
	expect(t, c, "BEGIN; INSERT INTO t VALUES (4); COMMIT", "BEGIN INSERT 0 1 COMMIT I")
	// Behind the gateway's back: an error once, then all is well.
	expect(t, c, "CREATE FUNCTION da() RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$", "CREATE FUNCTION I")
	t.Cleanup(func() { f.direct("DROP FUNCTION da") })
	run(t, c, "SELECT da()")
	run(t, c, "INSERT INTO t VALUES (5)")
	run(t, c, "ROLLBACK")
	run(t, c, "DELETE FROM t WHERE id = 5")
	expect(t, c, "INSERT INTO t VALUES (5)", "INSERT 0 1 I")
	da := func(c *pgconn.PgConn) { // so that the gateway does not notice
		run(t, c, "BEGIN")
		run(t, c, "SELECT da()")
		run(t, c, "ROLLBACK")
	}
	da(c)
	expect(t, c, "BEGIN", "BEGIN T") // answered before the server has heard of it
	expect(t, c, "INSERT INTO t VALUES (7)", "!40001 I")
	expect(t, c, "SELECT count(*) FROM t WHERE id = 7", "(0) SELECT 1 I")
	expect(t, c, "BEGIN", "BEGIN T")
	expect(t, c, "INSERT INTO t VALUES (7)", "INSERT 0 1 T")
	expect(t, c, "COMMIT", "COMMIT I")

	w := f.wire(t, nil)
	w.send(join(parse("x", "SELECT 1"), syncMessage)...)
	w.until(1)
	w.send(query("BEGIN"), query("SELECT da()"), query("ROLLBACK"), query("BEGIN"))
	w.until(4)
	w.send(join(all("INSERT INTO t VALUES (8)"), all("INSERT INTO t VALUES (9)"), syncMessage)...)
	if got := w.until(1); got != "!40001 I" {
		t.Error(got)
	}
	w.send(query("BEGIN"), query("INSERT INTO t VALUES (8)"), query("INSERT INTO t VALUES (9)"), query("ROLLBACK"))
	if got := w.until(4); got != "BEGIN T INSERT_0_1 T INSERT_0_1 T ROLLBACK I" {
		t.Error(got)
	}
	// x is gone from the server, but what the gateway cannot know to be gone must not become a COMMIT.
	w.send(join(all("BEGIN"), all("INSERT INTO t VALUES (6)"), parse("x", "COMMIT"), bind("", "x"), execute(""), syncMessage)...)
	if got := w.until(1); got != "1 2 n BEGIN 1 2 n INSERT_0_1 !42P05 E" {
		t.Error(got)
	}
	w.send(query("ROLLBACK"), join(&pgproto3.Close{ObjectType: 'S', Name: "x"}, syncMessage)[0], syncMessage)
	w.until(2)
	w.send(join(all("BEGIN"), all("INSERT INTO t VALUES (6)"), parse("x", "COMMIT"), bind("", "x"), execute(""), syncMessage)...)
	if got := w.until(1); got != "1 2 n BEGIN 1 2 n INSERT_0_1 1 2 COMMIT I" {
		t.Error(got)
	}
}

func testPgx(t *testing.T, f *fixture) {
	ctx := timeout(t)
	for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe,
		pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol} {
		f.wipe()
		cfg, err := pgx.ParseConfig(f.url("postgres"))
		if err != nil {
			t.Fatal(err)
		}
		cfg.DefaultQueryExecMode = mode
		c, err := pgx.ConnectConfig(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			if _, err := c.Exec(ctx, "INSERT INTO t VALUES ($1, $2)", i, "v"); err != nil {
				t.Fatalf("%v: %v", mode, err)
			}
		}
		err = pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "UPDATE t SET v = $1", "w")
			return err
		})
		if err != nil {
			t.Fatalf("%v: %v", mode, err)
		}
		b := &pgx.Batch{}
		for i := range 20 {
			b.Queue("INSERT INTO t VALUES ($1, $2)", 100+i, "b")
			b.Queue("SELECT count(*) FROM t WHERE id >= $1", 100)
		}
		if err := c.SendBatch(ctx, b).Close(); err != nil {
			t.Fatalf("%v: batch: %v", mode, err)
		}
		var n int
		if err := c.QueryRow(ctx, "SELECT count(*) FROM t WHERE v = ANY($1)", []string{"w", "b"}).Scan(&n); err != nil || n != 23 {
			t.Errorf("%v: %d rows, %v", mode, n, err)
		}
		if _, err := c.CopyFrom(ctx, pgx.Identifier{"t"}, []string{"id"}, pgx.CopyFromRows([][]any{{500}, {501}})); err != nil {
			t.Errorf("%v: copy: %v", mode, err)
		}
		if err := c.Close(ctx); err != nil {
			t.Error(err)
		}
	}
}

func testStartup(t *testing.T, f *fixture) {
	for _, c := range []struct {
		params map[string]string
		code   string
	}{
		{map[string]string{"database": "template1"}, "0A000"},
		{map[string]string{"replication": "database"}, "0A000"},
		{map[string]string{"default_transaction_isolation": "serializable"}, "0A000"},
		{map[string]string{"options": "-c session_replication_role=replica"}, "0A000"},
		{map[string]string{"options": `--default-transaction-isolation=serializable`}, "0A000"},
		{map[string]string{"client_encoding": "SJIS"}, "0A000"},
		{map[string]string{"user": "nobody_here"}, "28000"},
		{map[string]string{"options": "-c nonsense=1=2"}, "42704"},
	} {
		w, m := f.dial(t, c.params)
		if _, ok := m.(*pgproto3.AuthenticationOk); ok {
			m = w.receive()
		}
		e, ok := m.(*pgproto3.ErrorResponse)
		if !ok || e.Code != c.code || e.Severity != "FATAL" {
			t.Errorf("%v: %#v", c.params, m)
		}
	}
	w := f.wire(t, map[string]string{"application_name": "app", "replication": "off", "options": `-c work_mem=7MB -c search_path=a,\ b`})
	w.send(query("SHOW application_name"), query("SHOW search_path"))
	if got := w.until(2); got != "T (app) SHOW I T (a, b) SHOW I" {
		t.Error(got)
	}
	// Encryption that is not to be had, and a startup packet that is none.
	conn, err := net.Dial("tcp", f.g.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	for _, code := range []uint32{versionGSS, versionSSL} {
		_, _ = conn.Write([]byte{0, 0, 0, 8, byte(code >> 24), byte(code >> 16), byte(code >> 8), byte(code)})
		answer := make([]byte, 1)
		if _, err := io.ReadFull(conn, answer); err != nil || answer[0] != 'N' {
			t.Errorf("%d: %q %v", code, answer, err)
		}
	}
	_, _ = conn.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
	if b, _ := io.ReadAll(conn); !bytes.Contains(b, []byte("08P01")) {
		t.Errorf("answer to nonsense: %q", b)
	}

	// Too many, and not accepting.
	cfg := f.config()
	cfg.Registerer = nil
	cfg.MaxConnections = 1
	var closed error
	var mu sync.Mutex
	cfg.Accepting = func() error { mu.Lock(); defer mu.Unlock(); return closed }
	small := *f
	small.g = New(cfg)
	if err := small.g.Open(); err != nil {
		t.Fatal(err)
	}
	one := small.wire(t, nil)
	if _, m := small.dial(t, nil); m.(*pgproto3.ErrorResponse).Code != "53300" {
		t.Errorf("one too many: %#v", m)
	}
	// Drain lets the transaction end.
	one.send(query("BEGIN; INSERT INTO t VALUES (1)"))
	one.until(1)
	drained := make(chan error, 1)
	go func() { drained <- small.g.Drain(timeout(t)) }()
	select {
	case err := <-drained:
		t.Errorf("drained in the middle of a transaction: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	one.send(query("COMMIT"))
	if got := one.until(2); got != "COMMIT I !57P01 closed" {
		t.Errorf("drained: %s", got)
	}
	if err := <-drained; err != nil {
		t.Error(err)
	}
	if err := small.g.Close(); err != nil {
		t.Error(err)
	}
	cfg.MaxConnections = 5
	closed = fmt.Errorf("joining")
	small.g = New(cfg)
	if err := small.g.Open(); err != nil {
		t.Fatal(err)
	}
	if _, m := small.dial(t, nil); m.(*pgproto3.ErrorResponse).Code != "57P03" {
		t.Errorf("not accepting: %#v", m)
	}
	mu.Lock()
	closed = nil
	mu.Unlock()
	idle := small.wire(t, nil)
	if err := small.g.Close(); err != nil {
		t.Error(err)
	}
	if got := idle.until(1); got != "!57P01 closed" {
		t.Errorf("closed: %s", got)
	}
}

// testClientGone: a client that vanishes while its commit waits does not disturb the commit.
func testClientGone(t *testing.T, f *fixture) {
	drained(f)
	w := f.wire(t, nil)
	f.coord.holdNext()
	w.send(query("BEGIN"), query("INSERT INTO t VALUES (1)"), query("COMMIT"))
	commit := <-f.coord.begun
	before, _ := f.coord.counts()
	_ = w.conn.Close()
	time.Sleep(50 * time.Millisecond) // the gateway may notice now, and must do nothing about it
	commit.events <- txn.Event{Step: txn.StepRelease}
	f.await("SELECT count(*)::text FROM t", "1")
	for range 100 {
		if after, _ := f.coord.counts(); after == before+1 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if after, _ := f.coord.counts(); after != before+1 {
		t.Error("the commit was not booked")
	}
	// One that vanishes before has its transaction rolled back, also while a statement runs.
	w = f.wire(t, nil)
	w.send(query("BEGIN; INSERT INTO t VALUES (2)"))
	w.until(1)
	w.send(query("SELECT pg_sleep(20)"))
	f.await("SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'PgSleep'", "1")
	_ = w.conn.Close()
	f.await(locked, "0")
}

func testMalformed(t *testing.T, f *fixture) {
	for name, b := range map[string][]byte{
		"unknown type":     {'?', 0, 0, 0, 4},
		"short length":     {'Q', 0, 0, 0, 3},
		"negative length":  {'Q', 0xff, 0xff, 0xff, 0xff},
		"no terminator":    {'Q', 0, 0, 0, 5, 'x'},
		"empty query":      {'Q', 0, 0, 0, 4},
		"zero in query":    {'Q', 0, 0, 0, 7, 'x', 0, 0},
		"short parse":      {'P', 0, 0, 0, 5, 0},
		"short bind":       {'B', 0, 0, 0, 5, 0},
		"short execute":    {'E', 0, 0, 0, 5, 0},
		"short close":      {'C', 0, 0, 0, 4},
		"short describe":   {'D', 0, 0, 0, 4},
		"long sync":        {'S', 0, 0, 0, 5, 0},
		"password at rest": {'p', 0, 0, 0, 5, 0},
	} {
		w := f.wire(t, nil)
		if _, err := w.conn.Write(b); err != nil {
			t.Fatal(err)
		}
		if got := w.until(1); got != "!08P01 closed" {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// testBackendGone: the server ends the backend, in the middle of a commit and before.
func testBackendGone(t *testing.T, f *fixture) {
	kill := func(pid uint32) {
		f.ask("SELECT pg_terminate_backend($1)::text", int32(pid))
		f.await(fmt.Sprintf("SELECT count(*)::text FROM pg_stat_activity WHERE pid = %d", pid), "0")
	}
	w := f.wire(t, nil)
	kill(w.pid)
	if got := w.until(1); got != "!57P01 closed" {
		t.Errorf("idle: %s", got)
	}
	for _, last := range []struct {
		event txn.Event
		want  string
	}{
		{txn.Event{Step: txn.StepVisible}, "BEGIN T INSERT_0_1 T COMMIT I !57P01 closed"},
		{txn.Event{Step: txn.StepAbort, Reason: txn.AbortConflict}, "BEGIN T INSERT_0_1 T !40001 !08006 closed"},
		{txn.Event{Step: txn.StepUnknown}, "BEGIN T INSERT_0_1 T !08007 closed"},
	} {
		drained(f)
		w := f.wire(t, nil)
		f.coord.holdNext()
		w.send(query("BEGIN"), query("INSERT INTO t VALUES (1)"), query("COMMIT"))
		commit := <-f.coord.begun
		<-commit.waiting
		kill(w.pid)
		commit.through(commit.gid)
		commit.events <- txn.Event{Step: txn.StepRelease}
		<-commit.lostCh
		commit.events <- last.event
		if got := w.until(9); got != last.want {
			t.Errorf("backend gone: %s, want %s", got, last.want)
		}
	}
}

// testEndSessions: without the server, sessions end; a commit that waits for the log's word gets it first.
func testEndSessions(t *testing.T, f *fixture) {
	for _, last := range []struct {
		event txn.Event
		want  string
	}{
		{txn.Event{Step: txn.StepVisible}, "BEGIN T INSERT_0_1 T COMMIT I !57P01 closed"},
		{txn.Event{Step: txn.StepAbort, Reason: txn.AbortConflict}, "BEGIN T INSERT_0_1 T !40001 !08006 closed"},
		{txn.Event{Step: txn.StepUnknown}, "BEGIN T INSERT_0_1 T !08007 closed"},
	} {
		drained(f)
		idle, busy, w := f.wire(t, nil), f.wire(t, nil), f.wire(t, nil)
		busy.send(query("BEGIN"), query("INSERT INTO t VALUES (2)"))
		busy.until(2)
		f.coord.holdNext()
		w.send(query("BEGIN"), query("INSERT INTO t VALUES (1)"), query("COMMIT"))
		commit := <-f.coord.begun
		<-commit.waiting
		ended := make(chan error, 1)
		go func() { ended <- f.g.EndSessions(timeout(t)) }()
		for _, other := range []*wire{idle, busy} {
			if got := other.until(1); got != "!08006 closed" {
				t.Errorf("another session: %s", got)
			}
		}
		select {
		case err := <-ended:
			t.Errorf("ended before the commit was told: %v", err)
		default:
		}
		commit.events <- last.event
		if got := w.until(9); got != last.want {
			t.Errorf("waiting commit: %s, want %s", got, last.want)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	f.wire(t, nil) // new ones are let in
	if s := (&session{}); !errors.Is(f.g.register(s, f.g.serverLife()-1), errServerLost) {
		t.Error("a session whose server connection is of an earlier life was let in")
	}
}

func testPgbench(t *testing.T, f *fixture) {
	pgbench := program(t, "pgbench")
	if pgbench == "" {
		return
	}
	host, port, _ := net.SplitHostPort(f.g.Addr().String())
	bench := func(args ...string) string {
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		defer cancel()
		out, err := exec.CommandContext(ctx, pgbench, append([]string{"-h", host, "-p", port, "-U", "postgres"}, append(args, "postgres")...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("pgbench %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	bench("-i", "-s", "1", "-q")
	for _, mode := range []string{"simple", "extended", "prepared"} {
		for _, script := range []string{"tpcb-like", "simple-update", "select-only"} {
			bench("-n", "-M", mode, "-b", script, "-c", "4", "-t", "15", "--max-tries", "100")
		}
	}
	want := f.ask("SELECT sum(delta)::text FROM pgbench_history")
	if got := f.ask("SELECT sum(abalance)::text FROM pgbench_accounts"); got != want {
		t.Errorf("sum of balances %s, history %s", got, want)
	}
	if n := f.ask("SELECT count(*)::text FROM pgbench_history"); n != fmt.Sprint(3*2*4*15) {
		t.Errorf("%s transactions, want %d", n, 3*2*4*15)
	}
}

func asPgError(err error, e **pgconn.PgError) bool {
	for err != nil {
		if p, ok := err.(*pgconn.PgError); ok {
			*e = p
			return true
		}
		u, ok := err.(interface{ Unwrap() error })
		if !ok {
			return false
		}
		err = u.Unwrap()
	}
	return false
}

func counter(t testing.TB, f *fixture, name string) float64 {
	families, err := f.g.cfg.Registerer.(interface {
		Gather() ([]*metricFamily, error)
	}).Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range families {
		if m.GetName() == name {
			return m.GetMetric()[0].GetCounter().GetValue()
		}
	}
	return 0
}
