package gateway

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/quorate/quorate/txn"
)

// installFunctions takes the functions from what a node installs.
func (f *fixture) installFunctions() {
	f.t.Helper()
	schema, err := os.ReadFile("../replication/pg/schema.sql")
	if err != nil {
		f.t.Fatal(err)
	}
	for _, name := range []string{"current_gid", "transaction_status"} {
		text := regexp.MustCompile(`(?s)CREATE OR REPLACE FUNCTION quorate\.` + name + `\(.*?\nEND \$\$;`).Find(schema)
		if text == nil {
			f.t.Fatalf("schema.sql has no function %s", name)
		}
		f.direct("SET session_replication_role = replica; " + string(text) + "; RESET session_replication_role")
	}
}

func testFunctions(t *testing.T, f *fixture) {
	f.installFunctions()
	c := f.connect(t)
	gid := func(sql string) string {
		t.Helper()
		out := run(t, c, sql)
		if m := regexp.MustCompile(`\((1-abc-\d+)\)`).FindStringSubmatch(out); m != nil {
			return m[1]
		}
		t.Errorf("%s: %s", sql, out)
		return ""
	}
	// what is told before is what it is committed as
	expect(t, c, "BEGIN", "BEGIN T")
	first := gid("SELECT quorate.current_gid()")
	expect(t, c, "SAVEPOINT s", "SAVEPOINT T")
	expect(t, c, "INSERT INTO t SELECT 1, quorate.current_gid()", "INSERT 0 1 T")
	expect(t, c, "ROLLBACK TO s", "ROLLBACK T")
	if again := gid("INSERT INTO t SELECT 2, quorate.current_gid() RETURNING v"); again != first {
		t.Errorf("after a savepoint it is %s, and was %s", again, first)
	}
	f.coord.holdNext()
	committed := make(chan string, 1)
	go func() { committed <- run(t, c, "COMMIT AND CHAIN") }()
	held := <-f.coord.begun
	if held.GID().String() != first {
		t.Errorf("committed as %s, and told %s", held.GID(), first)
	}
	held.events <- txn.Event{Step: txn.StepRelease}
	if got := <-committed; got != "COMMIT T" {
		t.Error(got)
	}
	second := gid("SELECT quorate.current_gid()")
	if second == first {
		t.Error("two transactions have one GID")
	}
	expect(t, c, "ROLLBACK AND CHAIN", "ROLLBACK T")
	if third := gid("SELECT quorate.current_gid()"); third == second {
		t.Error("a transaction that was rolled back lends its GID to the next")
	}
	expect(t, c, "SELECT 1/0", "!22012 E")
	expect(t, c, "SELECT quorate.current_gid()", "!25P02 E")
	expect(t, c, "COMMIT", "ROLLBACK I")
	expect(t, c, "SELECT quorate.current_gid()", "!0A000 I")
	expect(t, c, "BEGIN; DO $$BEGIN PERFORM quorate.current_gid(); END$$", "BEGIN !0A000 E")
	expect(t, c, "ROLLBACK", "ROLLBACK I")
	gid("BEGIN; SELECT quorate.current_gid(); COMMIT")

	for node, status := range []string{StatusUnknown, StatusCommitted, StatusAborted, StatusInDoubt} {
		g := fmt.Sprintf("%d-abc-1", node+4)
		for _, sql := range []string{"SELECT quorate.transaction_status('%s')", "SELECT 'x' || quorate . transaction_status ( '%s' ) AS y"} {
			want := strings.TrimSpace(strings.Repeat("x", strings.Count(sql, "'x'"))) + status
			expect(t, c, fmt.Sprintf(sql, g), "("+want+") SELECT 1 I")
		}
	}
	expect(t, c, "SELECT quorate.transaction_status(v) FROM (VALUES ('1-abc-7'), ('2-abc-8')) x(v)", "(committed) (aborted) SELECT 2 I")
	expect(t, c, "BEGIN; SELECT quorate.transaction_status('1-abc-7')", "BEGIN (committed) SELECT 1 T")
	expect(t, c, "SELECT quorate.transaction_status('2-abc-7')", "(aborted) SELECT 1 T")
	expect(t, c, "ROLLBACK", "ROLLBACK I")
	expect(t, c, "SELECT quorate.transaction_status('nonsense')", "!22023 I")
	expect(t, c, "SELECT quorate.transaction_status('1-abc-' || '70')", "!0A000 I")
	expect(t, c, "SELECT quorate.transaction_status(NULL)", "() SELECT 1 I")
	f.set(t, ReadOnly)
	expect(t, c, "SELECT quorate.transaction_status('3-abc-9')", "(in doubt) SELECT 1 I")
	f.access.Store(uint32(ReadWrite))

	// drivers
	for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol} {
		conn, err := pgx.Connect(timeout(t), f.url("postgres"))
		if err != nil {
			t.Fatal(err)
		}
		ask := func(q interface {
			QueryRow(context.Context, string, ...any) pgx.Row
		}, sql string, args ...any) (s string) {
			t.Helper()
			if err := q.QueryRow(timeout(t), sql, append([]any{mode}, args...)...).Scan(&s); err != nil {
				t.Errorf("%v: %s: %v", mode, sql, err)
			}
			return s
		}
		for range 2 { // the second time it is prepared
			if got := ask(conn, "SELECT quorate.transaction_status($1)", "2-abc-5"); got != StatusAborted {
				t.Errorf("%v: %q", mode, got)
			}
			tx, err := conn.Begin(timeout(t))
			if err != nil {
				t.Fatal(err)
			}
			one, two := ask(tx, "SELECT quorate.current_gid()"), ask(tx, "SELECT quorate.current_gid()")
			if one != two || !strings.HasPrefix(one, "1-abc-") {
				t.Errorf("%v: %q, then %q", mode, one, two)
			}
			if got := ask(tx, "SELECT quorate.transaction_status($1)", "5-abc-5"); got != StatusCommitted {
				t.Errorf("%v: %q", mode, got)
			}
			if err := tx.Commit(timeout(t)); err != nil {
				t.Error(err)
			}
		}
		_ = conn.Close(context.Background())
	}

	// in a pipeline, with something behind it, and after an error
	w := f.wire(t, nil)
	w.send(join(all("BEGIN"), all("SELECT quorate.transaction_status($1)", "1-abc-1"), all("SELECT 1"), syncMessage)...)
	if got := w.until(1); got != "1 2 n BEGIN 1 2 T (committed) SELECT_1 1 2 T (1) SELECT_1 T" {
		t.Error(got)
	}
	w.send(join(all("SELECT 1/0"), all("SELECT quorate.transaction_status('2-abc-1')"), all("SELECT quorate.current_gid()"), syncMessage)...)
	if got := w.until(1); got != "1 !22012 E" {
		t.Error(got)
	}
	w.send(query("ROLLBACK"))
	w.until(1)
}
