package gateway

import (
	"context"
	"errors"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// viewOf is the content of quorate.conflicts in these tests, as Config.View returns it. Texts are such that they would do
// harm if they were taken for SQL.
func viewOf(_ context.Context, name string) Rows {
	switch name {
	case "conflicts":
		return Rows{Full: `[{"node": 1, "table": "o'\\x\"", "key": "secret"}]`, Public: `[{"node": 1, "table": "o'\\x\""}]`}
	case "heartbeats":
		return Rows{Full: "[]", Public: "[]", Missing: []string{"node 3 does not answer"}}
	}
	return Rows{Full: "[]", Public: "[]"}
}

func testViews(t *testing.T, f *fixture) {
	schema, err := os.ReadFile("../replication/pg/schema.sql")
	if err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{
		`(?s)CREATE OR REPLACE FUNCTION quorate\.seen\(.*?\nEND \$\$;`, `(?s)CREATE OR REPLACE VIEW quorate\.nodes.*?;\n`,
		`(?s)CREATE OR REPLACE VIEW quorate\.conflicts.*?;\n`, `(?s)CREATE OR REPLACE VIEW quorate\.heartbeats.*?;\n`,
	} {
		text := regexp.MustCompile(pattern).Find(schema)
		if text == nil {
			t.Fatalf("schema.sql has nothing like %s", pattern)
		}
		f.direct("SET session_replication_role = replica; " + string(text) + "; RESET session_replication_role")
	}
	f.direct(`GRANT SELECT ON quorate.nodes, quorate.conflicts, quorate.heartbeats TO PUBLIC`)
	f.direct(`DROP ROLE IF EXISTS viewer; DROP ROLE IF EXISTS monitor; CREATE ROLE viewer LOGIN; CREATE ROLE monitor LOGIN IN ROLE pg_monitor`)

	const all, redacted = `(1|o'\x"|secret)`, `(1|o'\x"|)`
	for user, row := range map[string]string{"postgres": all, "monitor": all, "viewer": redacted} {
		const columns = `concat_ws('|', node, "table", coalesce(key, ''))`
		c, err := pgx.Connect(timeout(t), f.url(user))
		if err != nil {
			t.Fatal(err)
		}
		pg := c.PgConn()
		expect(t, pg, "SELECT "+columns+" FROM quorate.conflicts", row+" SELECT 1 I")
		expect(t, pg, "SELECT count(*) FROM quorate.nodes", "(0) SELECT 1 I")
		expect(t, pg, "BEGIN READ ONLY", "BEGIN T")
		expect(t, pg, "SELECT "+columns+" FROM quorate.conflicts", row+" SELECT 1 T")
		expect(t, pg, "COMMIT", "COMMIT I")
		expect(t, pg, "SET standard_conforming_strings = off; SELECT "+columns+" FROM Quorate . Conflicts", "SET "+row+" SELECT 1 I")
		expect(t, pg, "SELECT current_setting('quorate.seen_conflicts') LIKE '%secret%' FROM quorate.conflicts", map[bool]string{true: "(t) SELECT 1 I", false: "(f) SELECT 1 I"}[row == all])
		expect(t, pg, `SELECT `+columns+` FROM "quorate"."conflicts"`, row+" SELECT 1 I")
		for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec} {
			for range 2 {
				var got string
				if err := c.QueryRow(timeout(t), "SELECT "+columns+" FROM quorate.conflicts WHERE node = $1", mode, 1).Scan(&got); err != nil || "("+got+")" != row {
					t.Errorf("%s, %v: %q, %v", user, mode, got, err)
				}
			}
		}
		_ = c.Close(context.Background())
	}

	// Where the gateway cannot know, that is said; what was read before is not taken for the present.
	c := f.connect(t)
	expect(t, c, "SET search_path = quorate", "SET I")
	expect(t, c, "SELECT * FROM nodes", "!0A000 I")
	expect(t, c, "BEGIN; SELECT count(*) FROM quorate.nodes", "BEGIN (0) SELECT 1 T")
	expect(t, c, "COMMIT", "COMMIT I")
	expect(t, c, "SELECT * FROM nodes", "!0A000 I")
	expect(t, c, "SELECT count(*) FROM quorate.nodes", "(0) SELECT 1 I")
	expect(t, c, "SELECT count(*) FROM nodes", "!0A000 I")
	expect(t, c, "SELECT count(*) FROM quorate.nodes", "(0) SELECT 1 I")
	expect(t, c, "BEGIN", "BEGIN T")
	expect(t, c, "SELECT count(*) FROM nodes", "!0A000 E")
	expect(t, c, "ROLLBACK", "ROLLBACK I")
	expect(t, c, "PREPARE p AS SELECT count(*) FROM quorate.nodes", "PREPARE I")
	expect(t, c, "EXECUTE p", "!0A000 I")
	expect(t, c, "SELECT count(*) FROM quorate.nodes", "(0) SELECT 1 I")
	if err := c.ExecParams(timeout(t), "SELECT count(*) FROM nodes", nil, nil, nil, nil).Read().Err; err == nil || !strings.Contains(err.Error(), "0A000") {
		t.Errorf("the extended protocol: %v", err)
	}
	if r := c.ExecParams(timeout(t), "SELECT count(*) FROM quorate.nodes", nil, nil, nil, nil).Read(); r.Err != nil || len(r.Rows) != 1 {
		t.Errorf("the extended protocol: %+v", r)
	}
	expect(t, c, "SELECT count(*) FROM nodes", "!0A000 I")

	// Reading is not writing: nothing waits for an order.
	expect(t, c, "SHOW quorate.node", "(7) SHOW I")
	expect(t, c, "SHOW quorate.cluster", "(a b) SHOW I")
	for _, forged := range []string{"SET quorate.node = 8", "SELECT set_config('quorate.node', '8', false)", "SET LOCAL quorate.node = 8"} {
		expect(t, c, forged, "!55P02 I")
	}
	expect(t, c, "DISCARD ALL", "DISCARD ALL I")
	expect(t, c, "SELECT current_setting('quorate.node')", "(7) SELECT 1 I")
	var refused *pgconn.PgError
	if _, err := pgconn.Connect(timeout(t), f.url("postgres")+"&options=-c%20quorate.node%3D8"); !errors.As(err, &refused) || refused.Code != codeCannotChange {
		t.Errorf("a client with a setting of its own: %v", err)
	}

	// What is missing in a view is said.
	warnings := make(chan *pgconn.Notice, 1)
	listening, err := pgconn.ParseConfig(f.url("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	listening.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { warnings <- n }
	warned, err := pgconn.ConnectConfig(timeout(t), listening)
	if err != nil {
		t.Fatal(err)
	}
	defer warned.Close(context.Background())
	expect(t, warned, "SELECT count(*) FROM quorate.heartbeats", "(0) SELECT 1 I")
	if w := <-warnings; w.Severity != "WARNING" || w.Message != "quorate.heartbeats is not complete: node 3 does not answer" {
		t.Errorf("warned of %+v", w)
	}
}
