package pg

import (
	"context"
	"reflect"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
)

func startCatalog(t *testing.T, major int) (*Catalog, *pgx.Conn) {
	t.Helper()
	server := pgtest.Start(t, pgtest.Options{Major: major, Tmpfs: true})
	config, err := pgconn.ParseConfig(server.ConnString("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	c := NewCatalog(config)
	t.Cleanup(func() {
		if err := c.Close(context.Background()); err != nil {
			t.Errorf("close catalog: %v", err)
		}
	})
	return c, pgtest.Connect(t, server, "postgres")
}

func run(t *testing.T, conn *pgx.Conn, sql string) {
	t.Helper()
	if _, err := conn.PgConn().Exec(t.Context(), sql).ReadAll(); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func named(t *testing.T, c *Catalog, name string) *Relation {
	t.Helper()
	r, err := c.RelationByName(t.Context(), "public", name)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestCatalogRelation(t *testing.T) {
	t.Parallel()
	for _, major := range []int{17, 18} {
		c, conn := startCatalog(t, major)
		run(t, conn, `
			CREATE DOMAIN code AS varchar(10);
			CREATE TABLE parent (id bigint, c code, PRIMARY KEY (id, c)) PARTITION BY RANGE (id);
			CREATE TABLE middle PARTITION OF parent FOR VALUES FROM (0) TO (100) PARTITION BY RANGE (id);
			CREATE TABLE leaf PARTITION OF middle FOR VALUES FROM (0) TO (50);
			CREATE TABLE child (n int PRIMARY KEY, pc text, pid int, r float8 UNIQUE NULLS NOT DISTINCT, dropped int,
				FOREIGN KEY (pid, pc) REFERENCES parent (id, c));
			CREATE UNIQUE INDEX partly ON child (n) INCLUDE (pc) WHERE n > 0;
			ALTER TABLE child DROP dropped;
			CREATE UNLOGGED TABLE scratch (id int PRIMARY KEY DEFERRABLE)`)
		parentKey := []IndexColumn{{"id", ClassNumber}, {"c", ClassText}}
		leaf := named(t, c, "leaf")
		want := &Relation{OID: leaf.OID, Schema: "public", Name: "leaf", RootSchema: "public", RootName: "parent", Permanent: true,
			Identity: parentKey, Uniques: []Unique{}, References: []Reference{}, Referenced: true}
		if !reflect.DeepEqual(leaf, want) {
			t.Errorf("PostgreSQL %d:\n%+v, want\n%+v", major, leaf, want)
		}
		child := named(t, c, "child")
		want = &Relation{OID: child.OID, Schema: "public", Name: "child", RootSchema: "public", RootName: "child", Permanent: true,
			Identity: []IndexColumn{{"n", ClassNumber}},
			Uniques: []Unique{
				{Name: "child_r_key", Columns: []IndexColumn{{"r", ClassOpaque}}, Plain: true, NullsEqual: true},
				{Name: "partly", Columns: []IndexColumn{{"n", ClassNumber}}},
			}}
		got := *child
		got.References = nil
		if !reflect.DeepEqual(&got, want) {
			t.Errorf("PostgreSQL %d:\n%+v, want\n%+v", major, &got, want)
		}
		reference := Reference{ParentSchema: "public", ParentName: "parent", Plain: true,
			Columns: []IndexColumn{{"pid", ClassNumber}, {"pc", ClassText}}, Parent: parentKey}
		if len(child.References) == 0 {
			t.Fatal("no foreign key")
		}
		for _, r := range child.References { // one for the parent, one for each partition
			if !reflect.DeepEqual(r, reference) {
				t.Errorf("PostgreSQL %d:\n%+v, want\n%+v", major, r, reference)
			}
		}
		scratch := named(t, c, "scratch")
		if scratch.Permanent || len(scratch.Identity) != 0 || len(scratch.Uniques) != 1 || !scratch.Uniques[0].Deferred {
			t.Errorf("%+v", scratch)
		}
		if r := named(t, c, "none"); r != nil {
			t.Errorf("a table that is not there: %+v", r)
		}
	}
}

// TestCatalogCache: a definition is remembered until Invalidate, an unknown table never, and nothing during a change.
func TestCatalogCache(t *testing.T) {
	t.Parallel()
	c, conn := startCatalog(t, 18)
	run(t, conn, "CREATE TABLE t (id int PRIMARY KEY)")
	oid := named(t, c, "t").OID
	uniques := func() int {
		t.Helper()
		r, err := c.Relation(t.Context(), oid)
		if err != nil {
			t.Fatal(err)
		}
		return len(r.Uniques)
	}
	if uniques() != 0 {
		t.Error("unique indexes from nowhere")
	}
	run(t, conn, "ALTER TABLE t ADD u int UNIQUE")
	if uniques() != 0 {
		t.Error("asked again without need")
	}
	before := c.Generation()
	c.Invalidate()
	if uniques() != 1 || c.Generation() == before {
		t.Error("not asked again after Invalidate")
	}
	done := c.Changing()
	if c.Stable() || uniques() != 1 {
		t.Error("stable during a change")
	}
	run(t, conn, "ALTER TABLE t ADD w int UNIQUE")
	if uniques() != 2 {
		t.Error("remembered during a change")
	}
	done()
	done()
	if !c.Stable() || uniques() != 2 {
		t.Error("not stable after a change")
	}
	if r, err := c.Relation(t.Context(), 1); r != nil || err != nil {
		t.Errorf("an unknown table: %v, %v", r, err)
	}
}

// TestCatalogReconnects: a lost connection costs nothing but time.
func TestCatalogReconnects(t *testing.T) {
	t.Parallel()
	c, conn := startCatalog(t, 18)
	run(t, conn, "CREATE TABLE t (id int PRIMARY KEY)")
	named(t, c, "t")
	run(t, conn, "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'quorate catalog'")
	if named(t, c, "t") == nil {
		t.Error("not found after the connection was lost")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.RelationByName(ctx, "public", "t"); err == nil {
		t.Error("no error from a look-up that was cancelled")
	}
}
