package pg

import (
	"reflect"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
)

func TestHashTables(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t, pgtest.Options{Major: 17, Tmpfs: true})
	conn := pgtest.Connect(t, server, "postgres")
	run(t, conn, `CREATE SCHEMA "Odd name"; CREATE TABLE "Odd name"."T" (id int PRIMARY KEY, at timestamptz, b bytea);
		CREATE TABLE plain (v text);
		CREATE UNLOGGED TABLE scratch (v text);
		INSERT INTO "Odd name"."T" SELECT i, '2026-01-01 00:00:00Z', '\x00' FROM generate_series(1, 3) i;
		INSERT INTO plain VALUES ('a'), ('b'), (NULL)`)
	// begin opens a connection with a setting that must not matter, and a transaction on it.
	begin := func(setting string) *pgconn.PgConn {
		t.Helper()
		session := pgtest.Connect(t, server, "postgres").PgConn()
		if _, err := session.Exec(t.Context(), setting).ReadAll(); err != nil {
			t.Fatal(err)
		}
		if err := BeginHash(t.Context(), session); err != nil {
			t.Fatal(err)
		}
		return session
	}
	hash := func(session *pgconn.PgConn) []TableHash {
		t.Helper()
		tables, err := HashTables(t.Context(), session)
		if err != nil {
			t.Fatal(err)
		}
		return tables
	}
	first, early := hash(begin("SET timezone = 'Asia/Tokyo'")), begin("SET bytea_output = escape")
	if len(first) != 2 || first[0].Name != `"Odd name"."T"` || first[0].Rows != 3 || first[1].Name != "public.plain" || first[1].Rows != 3 {
		t.Fatalf("hashed %+v", first)
	}
	if err := TakeSnapshot(t.Context(), early); err != nil {
		t.Fatal(err)
	}
	run(t, conn, `UPDATE plain SET v = 'c' WHERE v = 'b'`)
	if got := hash(early); !reflect.DeepEqual(got, first) {
		t.Errorf("after the snapshot: %+v, want %+v", got, first)
	}
	if got := hash(begin("SELECT")); got[0] != first[0] || got[1].Rows != 3 || got[1].Hash == first[1].Hash {
		t.Errorf("after a change: %+v, before it %+v", got, first)
	}
	run(t, conn, `DELETE FROM plain; INSERT INTO plain VALUES (NULL), ('b'), ('a')`)
	if got := hash(begin("SELECT")); !reflect.DeepEqual(got, first) {
		t.Errorf("with the same rows in another order: %+v, want %+v", got, first)
	}
	run(t, conn, `DELETE FROM plain`)
	empty := hash(begin("SELECT"))
	run(t, conn, `INSERT INTO plain VALUES ('a'), ('a')`)
	twice := hash(begin("SELECT"))
	if empty[1].Rows != 0 || empty[1].Hash == twice[1].Hash || twice[1].Rows != 2 {
		t.Errorf("no rows: %+v; the same row twice: %+v", empty[1], twice[1])
	}
	// A name that the query itself uses means the row, not the column.
	run(t, conn, `CREATE TABLE shadow (t text, h text, hashes text); INSERT INTO shadow VALUES (NULL, 'a', 'b'); CREATE TABLE bare (); INSERT INTO bare DEFAULT VALUES`)
	shadowed := hash(begin("SELECT"))
	if len(shadowed) != 4 || shadowed[1].Name != "public.bare" || shadowed[1].Rows != 1 || shadowed[3].Name != "public.shadow" {
		t.Fatalf("hashed %+v", shadowed)
	}
	for _, change := range []string{`UPDATE shadow SET h = 'c'`, `UPDATE shadow SET h = NULL`, `DELETE FROM shadow`} {
		run(t, conn, change)
		got := hash(begin("SELECT"))
		if got[3].Hash == shadowed[3].Hash {
			t.Errorf("after %s: %+v, before it %+v", change, got[3], shadowed[3])
		}
		shadowed = got
	}
	run(t, conn, `DELETE FROM bare`)
	if got := hash(begin("SELECT")); got[1].Hash == shadowed[1].Hash {
		t.Errorf("a table without columns: %+v, before its row was deleted %+v", got[1], shadowed[1])
	}
}
