package sqllex

import (
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/jackc/pgx/v5"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
)

var kindNames = map[Kind]string{Maybe: "maybe", Write: "write", Plain: "plain", Begin: "begin", Commit: "commit", Rollback: "rollback",
	Subtransact: "sub", Deallocate: "deallocate", SetReadOnly: "readonly", SetIsolation: "isolation"}

// texts renders statements as kind:text, with ! and the number of a refusal.
func texts(sql string, o Options) string {
	var out []string
	for _, s := range Split([]byte(sql), o, nil) {
		x := kindNames[s.Kind] + ":" + sql[s.Start:s.End]
		if s.Refusal != NotRefused {
			x += fmt.Sprintf("!%d", s.Refusal)
		}
		out = append(out, x)
	}
	return strings.Join(out, " | ")
}

func TestSplit(t *testing.T) {
	for _, c := range []struct{ sql, want string }{
		{"", ""},
		{" ; ;; -- x\n /* ; */", ""},
		{"SELECT 1", "maybe:SELECT 1"},
		{" select 1 ; -- end\n", "maybe:select 1"},
		{"SELECT 'a;b'; COMMIT", "maybe:SELECT 'a;b' | commit:COMMIT"},
		{"SELECT 'it''s; '; END", "maybe:SELECT 'it''s; ' | end:END"},
		{`SELECT '\'; COMMIT; --'`, `maybe:SELECT '\' | commit:COMMIT`},
		{`SELECT E'\'; COMMIT; --'; ROLLBACK`, `maybe:SELECT E'\'; COMMIT; --' | rollback:ROLLBACK`},
		{"SELECT E'a'\n'\\'; COMMIT; --'", "maybe:SELECT E'a'\n'\\'; COMMIT; --'"},
		{"SELECT E'a' -- c\n'\\'; COMMIT; --'", "maybe:SELECT E'a' -- c\n'\\'; COMMIT; --'"},
		{"SELECT E'a' '\\'; COMMIT; --'", "maybe:SELECT E'a' '\\' | commit:COMMIT"},
		{`SELECT U&'\0041;'; COMMIT`, `maybe:SELECT U&'\0041;' | commit:COMMIT`},
		{`SELECT "a;""b"; COMMIT`, `maybe:SELECT "a;""b" | commit:COMMIT`},
		{`SELECT U&"a;b"; COMMIT`, `maybe:SELECT U&"a;b" | commit:COMMIT`},
		{"SELECT $$;$x$;$$; COMMIT", "maybe:SELECT $$;$x$;$$ | commit:COMMIT"},
		{"SELECT $a$;$$;$b$;$a$; COMMIT", "maybe:SELECT $a$;$$;$b$;$a$ | commit:COMMIT"},
		{"SELECT a$$ FROM b; COMMIT", "maybe:SELECT a$$ FROM b | commit:COMMIT"},
		{"SELECT $1$$;$$; COMMIT", "maybe:SELECT $1$$;$$ | commit:COMMIT"},
		{"SELECT 1 /* /* ; */ ; */ ; COMMIT", "maybe:SELECT 1 | commit:COMMIT"},
		{"SELECT 1 +-- ; \n 2; COMMIT", "maybe:SELECT 1 +-- ; \n 2 | commit:COMMIT"},
		{"SELECT 2 */* ; */ 3; COMMIT", "maybe:SELECT 2 */* ; */ 3 | commit:COMMIT"},
		{"CREATE RULE r AS ON INSERT TO t DO ALSO (INSERT INTO a VALUES (1); INSERT INTO b VALUES (2)); COMMIT",
			"write:CREATE RULE r AS ON INSERT TO t DO ALSO (INSERT INTO a VALUES (1); INSERT INTO b VALUES (2)) | commit:COMMIT"},
		{"CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT CASE WHEN true THEN 2 END; END; COMMIT",
			"write:CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT CASE WHEN true THEN 2 END; END | commit:COMMIT"},
		{"CREATE OR REPLACE PROCEDURE p() BEGIN ATOMIC INSERT INTO t VALUES (1); END; SELECT 1",
			"write:CREATE OR REPLACE PROCEDURE p() BEGIN ATOMIC INSERT INTO t VALUES (1); END | maybe:SELECT 1"},
		{"BEGIN; END", "begin:BEGIN | commit:END"},
		{"SELECT 'open; COMMIT", "maybe:SELECT 'open; COMMIT"},
		{"é; COMMIT", "maybe:é | commit:COMMIT"},
	} {
		want := strings.ReplaceAll(c.want, "end:END", "commit:END")
		if got := texts(c.sql, Options{}); got != want {
			t.Errorf("%q\n got %s\nwant %s", c.sql, got, want)
		}
	}
	if got := texts(`SELECT '\'; COMMIT; --'; END`, Options{BackslashQuotes: true}); got != `maybe:SELECT '\'; COMMIT; --' | commit:END` {
		t.Errorf("backslash quotes: %s", got)
	}
}

func TestKinds(t *testing.T) {
	for want, list := range map[Kind][]string{
		Maybe: {"SELECT a FROM t WHERE b = 1", "(SELECT 1)", "WITH x AS (SELECT 1) SELECT * FROM x", "VALUES (1)", "TABLE t", "EXPLAIN ANALYZE DELETE FROM t",
			"FETCH 1 FROM c", "COPY t TO STDOUT", "COPY (SELECT 1 FROM t) TO STDOUT", "SELECT count(*), lower(a), pg_catalog.now() FROM t",
			"SELECT a FROM t WHERE b IN (1, 2) AND EXISTS (SELECT 1)", "SELECT CAST(a AS numeric(10, 2)) FROM t", "DECLARE c CURSOR FOR SELECT 1",
			"SHOW transaction_read_only", "SELECT a FROM t FOR UPDATE", "SELECT lower (a) FROM t", "SELECT pg_sleep(1)", "nonsense"},
		Write: {"INSERT INTO t VALUES (1)", "update t set a = 1", "DELETE FROM t", "MERGE INTO t USING s ON true WHEN MATCHED THEN DELETE", "TRUNCATE t",
			"COPY t FROM STDIN", "COPY t (a, b) FROM STDIN", "copy public.t from stdin", "CREATE TABLE x (a int)", "DROP TABLE x", "CALL p()", "DO $$ $$", "EXECUTE p(1)",
			"SELECT f(1)", "SELECT nextval('s')", "SELECT public.lower('x')", `SELECT "lower"('x')`, "SELECT a.b.c(1)", "WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x",
			"REFRESH MATERIALIZED VIEW v", "GRANT SELECT ON t TO x", "REVOKE ALL ON SCHEMA s FROM x", "COMMENT ON TABLE t IS 'x'", "CREATE INDEX i ON t (a)",
			"CREATE USER MAPPING FOR x SERVER s", "SELECT f /* x */ (1)", "VALUES (g(1))", "ALTER TABLE t ADD COLUMN a int",
			"CREATE PUBLICATION p FOR TABLE t", "GRANT USAGE ON FOREIGN SERVER s TO x", "CREATE SCHEMA quorate_app"},
		Plain: {"SET a = 1", "SHOW work_mem", "RESET a", "LISTEN x", "NOTIFY x, 'y'", "UNLISTEN *", "VACUUM t", "ANALYZE", "CHECKPOINT", "REINDEX TABLE t",
			"REINDEX TABLE CONCURRENTLY t", "CLUSTER t USING i", "PREPARE p AS SELECT 1", "LOAD 'x'", "CLOSE c", "LOCK TABLE t", "SET search_path TO a, b",
			"DISCARD TEMP", "SET LOCAL work_mem = '1MB'", "SET TIME ZONE 'UTC'"},
		Begin:        {"BEGIN", "begin work", "BEGIN ISOLATION LEVEL READ COMMITTED", "START TRANSACTION READ ONLY", "BEGIN TRANSACTION DEFERRABLE"},
		Commit:       {"COMMIT", "END", "commit work", "END TRANSACTION", "COMMIT AND CHAIN", "COMMIT WORK AND NO CHAIN"},
		Rollback:     {"ROLLBACK", "ABORT", "rollback work", "ROLLBACK AND CHAIN", "ABORT TRANSACTION AND NO CHAIN"},
		Subtransact:  {"SAVEPOINT a", "RELEASE a", "RELEASE SAVEPOINT a", "ROLLBACK TO a", "ROLLBACK WORK TO SAVEPOINT a", "ROLLBACK TRANSACTION TO a"},
		Deallocate:   {"DEALLOCATE a", "DEALLOCATE PREPARE a", "DEALLOCATE ALL", "DISCARD ALL"},
		SetReadOnly:  {"SET default_transaction_read_only = on", "RESET default_transaction_read_only", "RESET ALL", "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", `SET "default_transaction_read_only" TO off`},
		SetIsolation: {"SET TRANSACTION READ ONLY", "SET LOCAL TRANSACTION ISOLATION LEVEL READ COMMITTED", "SET TRANSACTION SNAPSHOT '1-1'"},
	} {
		for _, sql := range list {
			got := Split([]byte(sql), Options{}, nil)
			if len(got) != 1 || got[0].Kind != want || got[0].Refusal != NotRefused {
				t.Errorf("%s: %+v, want kind %s", sql, got, kindNames[want])
			}
		}
	}
}

func TestRefusals(t *testing.T) {
	for want, list := range map[Refusal][]string{
		Serializable: {"BEGIN ISOLATION LEVEL SERIALIZABLE", "START TRANSACTION READ WRITE, ISOLATION LEVEL SERIALIZABLE", "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
			"SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE", "SET default_transaction_isolation TO 'serializable'",
			"SET LOCAL transaction_isolation = SERIALIZABLE", "SELECT set_config('default_transaction_isolation', 'serializable', true)"},
		TwoPhase:          {"PREPARE TRANSACTION 'x'", "COMMIT PREPARED 'x'", "ROLLBACK PREPARED 'x'"},
		ConcurrentIndex:   {"CREATE INDEX CONCURRENTLY i ON t (a)", "CREATE UNIQUE INDEX CONCURRENTLY ON t (a)", "DROP INDEX CONCURRENTLY i", "ALTER TABLE t DETACH PARTITION p CONCURRENTLY"},
		DatabaseDDL:       {"CREATE DATABASE x", "DROP DATABASE x", "ALTER DATABASE x SET a = 1", "GRANT CONNECT ON DATABASE x TO y"},
		TablespaceDDL:     {"CREATE TABLESPACE x LOCATION 'y'", "GRANT CREATE ON TABLESPACE x TO y"},
		RoleDDL:           {"CREATE ROLE x", "ALTER USER x SET a = 1", "DROP GROUP x", "GRANT a TO b", "REVOKE a FROM b", "REASSIGN OWNED BY a TO b", "CREATE USER x"},
		SharedComment:     {"COMMENT ON DATABASE x IS 'y'", "COMMENT ON ROLE x IS 'y'", "SECURITY LABEL FOR p ON ROLE x IS 'y'"},
		AlterSystem:       {"ALTER SYSTEM SET a = 1", "GRANT SET ON PARAMETER a TO b"},
		Subscription:      {"CREATE SUBSCRIPTION x CONNECTION 'y' PUBLICATION z", "DROP SUBSCRIPTION x"},
		OwnPublication:    {"DROP PUBLICATION quorate", `ALTER PUBLICATION "quorate" SET (publish = 'insert')`},
		EventTrigger:      {"CREATE EVENT TRIGGER x ON ddl_command_end EXECUTE FUNCTION f()", "DROP EVENT TRIGGER x", "COMMENT ON EVENT TRIGGER x IS 'y'"},
		LargeObject:       {"SELECT lo_create(0)", "SELECT pg_catalog.lo_unlink(1)", "SELECT lowrite(1, 'x')", "ALTER LARGE OBJECT 1 OWNER TO x", "GRANT SELECT ON LARGE OBJECT 1 TO x"},
		CatalogLock:       {"LOCK pg_class", "LOCK TABLE ONLY pg_catalog.pg_proc IN SHARE MODE"},
		ReplicationRole:   {"SET session_replication_role = replica", `SET SESSION "session_replication_role" TO 'local'`, "SELECT pg_catalog.set_config('session_replication_role', 'replica', false)"},
		ExplainedCreation: {"EXPLAIN ANALYZE CREATE TABLE x AS SELECT 1", "explain (analyse, verbose) select * into x from y", "EXPLAIN ANALYZE VERBOSE CREATE MATERIALIZED VIEW x AS SELECT 1"},
		NotRefused:        {"RESET quorate.node", "SET quorated = 1", "SET other.quorate = 1", "EXPLAIN CREATE TABLE x AS SELECT 1", "EXPLAIN ANALYZE INSERT INTO x SELECT 'create'", "EXPLAIN ANALYZE MERGE INTO x USING y ON true WHEN MATCHED THEN DELETE"},
		OwnSetting: {"SET quorate.node = 8", "SET LOCAL quorate.limits.lag TO DEFAULT", `SET SESSION "quorate" . cluster = 'x'`, `SET "quorate.node" = 8`,
			"SELECT set_config('Quorate.node', '8', false)"},
		OwnSchema: {"DROP SCHEMA quorate CASCADE", "ALTER SCHEMA quorate RENAME TO x", "DROP TABLE quorate.nudge", "CREATE FUNCTION quorate.f() RETURNS int LANGUAGE sql AS ''"},
	} {
		for _, sql := range list {
			got := Split([]byte(sql), Options{}, nil)
			if len(got) != 1 || got[0].Refusal != want {
				t.Errorf("%s: %+v, want refusal %d", sql, got, want)
			}
		}
	}
}

func TestDetails(t *testing.T) {
	one := func(sql string) Statement { return Split([]byte(sql), Options{}, nil)[0] }
	if !one("COMMIT AND CHAIN").Chain || one("COMMIT AND NO CHAIN").Chain || !one("END TRANSACTION AND CHAIN").Chain {
		t.Error("AND CHAIN")
	}
	if !one("BEGIN READ ONLY").AccessMode || !one("START TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE").AccessMode || one("BEGIN ISOLATION LEVEL READ COMMITTED").AccessMode {
		t.Error("access mode")
	}
	for sql, want := range map[string]ReadOnlyWish{"SET default_transaction_read_only = on": WishOn, "SET default_transaction_read_only TO 'tr'": WishOn,
		"SET default_transaction_read_only TO 1": WishOn, "SET default_transaction_read_only TO off": WishOff, "SET default_transaction_read_only TO DEFAULT": WishDefault,
		"RESET ALL": WishDefault, "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE": WishOff, "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY": WishOn} {
		if got := one(sql).Wish; got != want {
			t.Errorf("%s: wish %d, want %d", sql, got, want)
		}
	}
	for _, sql := range []string{"SHOW transaction_read_only", "SELECT current_setting('default_transaction_read_only')", "SHOW DEFAULT_TRANSACTION_READ_ONLY"} {
		if !one(sql).AsksReadOnly {
			t.Errorf("%s does not ask", sql)
		}
	}
	for sql, want := range map[string][2]bool{"SELECT quorate.current_gid()": {true, false}, "SELECT Quorate.Transaction_Status($1)": {false, true},
		`SELECT "quorate"."current_gid"(), quorate."transaction_status"($1)`: {true, true}, `SELECT "Current_Gid", """transaction_status" FROM "`: {},
		"SELECT 'current_gid', $$transaction_status$$ -- current_gid": {}} {
		if st := one(sql); [2]bool{st.AsksGID, st.AsksStatus} != want {
			t.Errorf("%s: asks %v, %v", sql, st.AsksGID, st.AsksStatus)
		}
	}
	for sql, want := range map[string]Views{"SELECT * FROM quorate.nodes": 1, "TABLE Quorate . Heartbeats": 2, "SELECT 1 FROM quorate.status s, quorate.events": 4 | 32,
		"SELECT quorate.nudge, nodes, x.quorate, y.nodes, 'quorate.nodes' -- quorate.nodes": 0, "SELECT (quorate).nodes FROM q": 0, "SELECT quorate.transactions.gid FROM quorate.conflicts": 8 | 16,
		`SELECT * FROM "quorate"."nodes", "quorate".events, QUORATE."status"`: 1 | 32 | 4, `SELECT "nodes" FROM "Quorate"."nodes", "quorate"."Nodes", "quorate.nodes", x."nodes"`: 0} {
		if got := one(sql).Views; got != want {
			t.Errorf("%s: views %b, want %b", sql, got, want)
		}
	}
	if one("SELECT a FROM t WHERE b = 1").Fingerprint != one("select A  from T /* x */ where b=23").Fingerprint {
		t.Error("fingerprints differ by constants, case or spacing")
	}
	if one("SELECT a FROM t").Fingerprint == one("SELECT a FROM u").Fingerprint {
		t.Error("fingerprints of different tables are alike")
	}
	s := one("DEALLOCATE PREPARE Foo")
	if s.NameEnd-s.NameStart != 3 || s.All || !one("DISCARD ALL").All {
		t.Errorf("deallocate: %+v", s)
	}
}

// TestBuiltins compares the list with the servers' own.
func TestBuiltins(t *testing.T) {
	for _, major := range []int{17, 18} {
		conn := pgtest.Connect(t, pgtest.Start(t, pgtest.Options{Major: major, Tmpfs: true}), "postgres")
		rows, err := conn.Query(t.Context(), `SELECT DISTINCT proname FROM pg_proc
			WHERE pronamespace = 'pg_catalog'::regnamespace AND provolatile = 'v'`)
		if err != nil {
			t.Fatal(err)
		}
		volatile, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		listed := map[string]bool{}
		for name := range strings.FieldsSeq(builtinList) {
			listed[name] = true
		}
		for _, name := range volatile {
			if listed[name] {
				t.Errorf("PostgreSQL %d: %s is volatile", major, name)
			}
		}
	}
}

// TestSplitIsComplete: what lies outside statements is blank, and every statement read alone is itself.
func TestSplitIsComplete(t *testing.T) {
	piece := rapid.SampledFrom([]string{"SELECT 1", "'a;b'", "E'\\''", "$$;$$", "$x$ ; $x$", ";", " ", "\n", "-- ;\n", "/* ; */", "COMMIT", "BEGIN", "(", ")",
		"\"q;\"", "U&'x'", "1.5e3", "$1", "a", "é", "INSERT INTO t", ".", "'", "\\", "$", "/*", "CREATE FUNCTION", "BEGIN ATOMIC", "END", "CASE"})
	rapid.Check(t, func(t *rapid.T) {
		check(t, []byte(strings.Join(rapid.SliceOf(piece).Draw(t, "pieces"), "")))
	})
}

type failer interface {
	Fatalf(format string, args ...any)
}

func check(t failer, sql []byte) {
	for _, o := range []Options{{}, {BackslashQuotes: true}} {
		at := 0
		for _, s := range Split(sql, o, nil) {
			if s.Start < at || s.End <= s.Start || s.End > len(sql) || s.Kind == 0 {
				t.Fatalf("%q: %+v after %d", sql, s, at)
			}
			p := parser{scanner: scanner{src: sql[at:s.Start], backslash: o.BackslashQuotes}}
			for {
				tok := p.next()
				if tok.kind == tokEnd {
					break
				}
				if tok.kind != tokOther || tok.char != ';' {
					t.Fatalf("%q: %q lies outside all statements", sql, sql[at:s.Start])
				}
			}
			at = s.End
		}
	}
}

func FuzzSplit(f *testing.F) {
	for _, s := range []string{"SELECT 1; COMMIT", "E'\\'", "$a$ $a", "/* /*", "CREATE FUNCTION f() BEGIN ATOMIC ; END", "set_config('a',", "U&", "DEALLOCATE", "GRANT", "COPY"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, sql []byte) { check(t, sql) })
}

func BenchmarkSplit(b *testing.B) {
	sql := []byte("SELECT abalance FROM pgbench_accounts WHERE aid = 12345;")
	var dst []Statement
	b.ReportAllocs()
	for b.Loop() {
		dst = Split(sql, Options{}, dst[:0])
	}
}
