package pg

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
	"github.com/quorate/quorate/txn"
)

// TestTakeOver: copies of one node's database that became those of others never give out the same value of a sequence, be
// it of a serial or an identity column, descending, or altered by its user; and not one that an earlier holder of the slot has
// stored. Who has none left says so when asked for one.
func TestTakeOver(t *testing.T) {
	for _, major := range []int{17, 18} {
		t.Run(fmt.Sprint(major), func(t *testing.T) {
			server := pgtest.Start(t, pgtest.Options{Major: major, Tmpfs: true})
			first := pgtest.Connect(t, server, "postgres")
			const nodes = 5
			id := func(node, slot int) Identity {
				return Identity{Cluster: "c", Node: txn.NodeID(node), Slot: slot, MaxNodes: 16}
			}
			if _, err := Install(t.Context(), first.PgConn(), id(1, 0)); err != nil {
				t.Fatal(err)
			}
			for _, sql := range []string{
				`CREATE TABLE s (id serial PRIMARY KEY, small smallint GENERATED ALWAYS AS IDENTITY, n int)`,
				`CREATE TABLE i (id bigint GENERATED ALWAYS AS IDENTITY (START WITH 100 INCREMENT BY 10) PRIMARY KEY)`,
				`CREATE SEQUENCE "De'sc" INCREMENT BY -3 MAXVALUE 1000 START WITH 900`,
				`CREATE SEQUENCE altered START WITH 50`,
				`ALTER SEQUENCE altered INCREMENT BY 7 START WITH 70 RESTART`,
				`CREATE SEQUENCE ending MAXVALUE 40`,
				`CREATE TABLE d (id int DEFAULT nextval('altered'))`,
				`CREATE TABLE part (id bigserial) PARTITION BY RANGE (id)`,
				`CREATE TABLE part1 PARTITION OF part FOR VALUES FROM (1) TO (1000000)`,
				`INSERT INTO s (n) SELECT 1 FROM generate_series(1, 10)`,
				`CREATE SEQUENCE dropped`, `DROP SEQUENCE dropped`,
			} {
				run(t, first, sql)
			}
			sequences := []string{"s_id_seq", "s_small_seq", "i_id_seq", `"De'sc"`, "altered", "ending", "part_id_seq"}
			var conns []*pgx.Conn
			conns = append(conns, first)
			if err := first.Close(t.Context()); err != nil { // a template must not be in use
				t.Fatal(err)
			}
			admin := pgtest.Connect(t, server, "template1")
			for n := 2; n <= nodes; n++ {
				run(t, admin, fmt.Sprintf("CREATE DATABASE n%d TEMPLATE postgres", n))
				conn := pgtest.Connect(t, server, fmt.Sprintf("n%d", n))
				if err := TakeOver(t.Context(), conn.PgConn(), Identity{Cluster: "other", Node: 9, MaxNodes: 16}, nil); !errors.Is(err, ErrForeignData) {
					t.Errorf("took over a copy of another cluster: %v", err)
				}
				for range 2 { // the second time changes nothing
					if err := TakeOver(t.Context(), conn.PgConn(), id(n, n-1), nil); err != nil {
						t.Fatal(err)
					}
				}
				conns = append(conns, conn)
			}
			conns[0] = pgtest.Connect(t, server, "postgres")
			// A copy of a copy, for a node that takes the slot of one that was removed, whose rows it has.
			if err := conns[3].Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			run(t, admin, "CREATE DATABASE n9 TEMPLATE n4")
			reused := pgtest.Connect(t, server, "n9")
			for _, sql := range []string{
				"INSERT INTO s (id, n) VALUES (8002, 1)", "INSERT INTO i OVERRIDING SYSTEM VALUE VALUES (70110)", "INSERT INTO d VALUES (9000)",
				"INSERT INTO part VALUES (555555)", "UPDATE s SET n = 2",
			} {
				run(t, reused, "SET session_replication_role = replica; "+sql)
			}
			if err := TakeOver(t.Context(), reused.PgConn(), id(9, 1), map[string]int64{"public.\"De'sc\"": -77777, "public.t_is_gone": 5}); err != nil {
				t.Fatal(err)
			}
			conns = append(conns[:3], conns[4], reused) // without nodes 4; node 2, whose slot was taken, has gone as well
			conns = append(conns[:1], conns[2:]...)
			for name, above := range map[string]int64{"s_id_seq": 8002, "i_id_seq": 70110, "altered": 9000, "part_id_seq": 555555} {
				if next := number(t, reused, "SELECT nextval('"+name+"')"); next <= above {
					t.Errorf("%s gives out %d, and the slot's earlier holder had %d", name, next, above)
				}
			}
			if next := number(t, reused, `SELECT nextval('"De''sc"')`); next >= -77777 {
				t.Errorf("a descending sequence gives out %d, and the slot's earlier holder had -77777 reserved", next)
			}
			positions, err := SequencePositions(t.Context(), reused.PgConn())
			if err != nil {
				t.Fatal(err)
			}
			at := slices.IndexFunc(positions, func(p SequencePosition) bool { return p.Name == `public."De'sc"` })
			if at < 0 || positions[at].Last >= -77777 || positions[at].Step != -48 || positions[at].Room < 1e15 {
				t.Errorf("positions %+v", positions)
			}
			for _, name := range sequences {
				if name == "ending" {
					continue
				}
				seen := map[int64]int{}
				for n, conn := range conns {
					for range 40 {
						v := number(t, conn, "SELECT nextval($$"+name+"$$)")
						if other, twice := seen[v]; twice {
							t.Fatalf("%s: %d is given out by database %d and %d", name, v, n, other)
						}
						seen[v] = n
					}
				}
			}
			for n, want := range map[int]int64{0: 0, 1: 2, 2: 4, 3: 1} {
				if got := number(t, conns[n], "SELECT slot FROM quorate.sequences WHERE name = 's_id_seq' AND schema = 'public'"); got != want {
					t.Errorf("database %d: slot %d, want %d", n, got, want)
				}
				for _, check := range []string{
					"SELECT (last_value - node_start) % node_increment FROM quorate.sequences WHERE name = 's_id_seq'",
					"SELECT count(*) FROM quorate.sequences WHERE name = 'altered' AND (start, increment) <> (70, 7)",
					"SELECT count(*) FROM quorate.sequences WHERE name = 'i_id_seq' AND (start, increment) <> (100, 10)",
					"SELECT count(*) FROM quorate.sequences WHERE name = 'De''sc' AND (start, increment) <> (900, -3)",
				} {
					if got := number(t, conns[n], check); got != 0 {
						t.Errorf("database %d: %s: %d", n, check, got)
					}
				}
			}
			// 40 values for 16 nodes: a copy that begins behind its last has none.
			run(t, conns[0], "SELECT setval('ending', 33)")
			if err := conns[0].Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			run(t, admin, "CREATE DATABASE n10 TEMPLATE postgres")
			last := pgtest.Connect(t, server, "n10")
			if err := TakeOver(t.Context(), last.PgConn(), id(10, 15), nil); err != nil {
				t.Fatal(err)
			}
			if _, err := last.Exec(t.Context(), "SELECT nextval('ending')"); err == nil {
				t.Error("a sequence without values gives one out")
			}
			// It is a node like any other: what a start does works.
			if _, err := last.Exec(t.Context(), "SELECT quorate.own_sequences()"); err != nil {
				t.Error(err)
			}
		})
	}
}

func number(t *testing.T, conn *pgx.Conn, sql string) int64 {
	t.Helper()
	results, err := conn.PgConn().Exec(t.Context(), sql).ReadAll()
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	n, err := strconv.ParseInt(string(results[0].Rows[0][0]), 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return n
}
