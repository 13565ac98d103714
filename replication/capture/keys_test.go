package capture

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/quorate/quorate/txn"
)

// namer turns keys back into words: it makes the keys that a test may expect and remembers their names.
type namer map[txn.Key]string

func (n namer) row(table, columns string, values ...string) {
	names := strings.Split(columns, ",")
	prefix := keyOf(append([]string{kindRow, "postgres", "public", table}, names...)...)
	n[prefix] = table + "(" + columns + ")"
	h := txn.NewHasher()
	h.Bytes(prefix[:])
	for _, v := range values {
		if v == "NULL" {
			h.Null()
		} else {
			h.String(v)
		}
	}
	n[h.Key()] = table + "(" + columns + ")=(" + strings.Join(values, ",") + ")"
}

func (n namer) table(names ...string) {
	for _, name := range names {
		n[TableKey("postgres", "public", name)] = name
		n[referencesKey("postgres", "public", name)] = "references " + name
	}
}

// words renders keys, sorted; IX on the database, which every transaction has, is left out.
func (n namer) words(keys []txn.KeyUse) []string {
	n[DatabaseKey("postgres")] = "database"
	n[DDLKey("postgres")] = "ddl"
	var words []string
	for _, u := range keys {
		if u == (txn.KeyUse{Key: DatabaseKey("postgres"), Mode: txn.ModeIntent}) {
			continue
		}
		name, ok := n[u.Key]
		if !ok {
			name = fmt.Sprintf("%x", u.Key)
		}
		words = append(words, u.Mode.String()+" "+name)
	}
	slices.Sort(words)
	return words
}

// TestKeys gives the keys of single statements, for each kind of type and constraint.
func TestKeys(t *testing.T) {
	t.Parallel()
	versions(t, testKeys)
}

func testKeys(t *testing.T, major int) {
	n := newNode(t, major, Limits{KeysPerTable: 50})
	c := n.client()
	c.run(`CREATE TABLE plain (id int PRIMARY KEY, v int)`)
	c.run(`CREATE TABLE two (b int, a text, v int UNIQUE, PRIMARY KEY (b, a))`)
	c.run(`CREATE TABLE keyless (v int UNIQUE, w int)`)
	c.run(`CREATE TABLE bare (v int)`)
	c.run(`CREATE TABLE full_pk (id int PRIMARY KEY, v int); ALTER TABLE full_pk REPLICA IDENTITY FULL`)
	c.run(`CREATE TABLE full_bare (v int); ALTER TABLE full_bare REPLICA IDENTITY FULL`)
	c.run(`CREATE TABLE by_index (id int PRIMARY KEY, k int NOT NULL); CREATE UNIQUE INDEX by_k ON by_index (k); ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_k`)
	c.run(`CREATE TABLE nulls (id int PRIMARY KEY, v int UNIQUE NULLS NOT DISTINCT, w int UNIQUE)`)
	c.run(`CREATE TABLE lazy (id int PRIMARY KEY, v int UNIQUE DEFERRABLE)`)
	c.run(`CREATE TABLE part_index (id int PRIMARY KEY, v int); CREATE UNIQUE INDEX part_v ON part_index (v) WHERE v > 0; CREATE UNIQUE INDEX part_e ON part_index ((v + 1))`)
	c.run(`CREATE TABLE excl (id int PRIMARY KEY, r int4range, EXCLUDE USING gist (r WITH &&))`)
	c.run(`CREATE TABLE parent (id int PRIMARY KEY, code text UNIQUE)`)
	c.run(`CREATE TABLE child (id int PRIMARY KEY, p int REFERENCES parent)`)
	c.run(`CREATE TABLE big_child (id int PRIMARY KEY, p bigint REFERENCES parent)`)
	c.run(`CREATE TABLE coded (id int PRIMARY KEY, code text UNIQUE)`)
	c.run(`CREATE TABLE by_code (id int PRIMARY KEY, code text REFERENCES coded (code))`)
	c.run(`CREATE TABLE stamped (at timestamp PRIMARY KEY)`)
	c.run(`CREATE TABLE dated (id int PRIMARY KEY, at date REFERENCES stamped)`)
	c.run(`CREATE TABLE pair_parent (b int, a int, PRIMARY KEY (b, a))`)
	c.run(`CREATE TABLE pair (id int PRIMARY KEY, x int, y int, FOREIGN KEY (x, y) REFERENCES pair_parent (b, a))`)
	c.run(`CREATE TABLE tree (id int PRIMARY KEY, up int REFERENCES tree)`)
	c.run(`CREATE TABLE parted (id int, k int, PRIMARY KEY (id)) PARTITION BY RANGE (id)`)
	c.run(`CREATE TABLE leaf PARTITION OF parted FOR VALUES FROM (0) TO (1000)`)
	c.run(`CREATE TABLE generated (id int PRIMARY KEY, v int, g int GENERATED ALWAYS AS (v * 2) STORED UNIQUE)`)
	c.run(`CREATE TABLE toasted (id int PRIMARY KEY, a text, b text, n int, UNIQUE (a), UNIQUE (b, n)); ALTER TABLE toasted ALTER a SET STORAGE EXTERNAL, ALTER b SET STORAGE EXTERNAL`)
	c.run(`CREATE TABLE toast_key (k text PRIMARY KEY, n int); ALTER TABLE toast_key ALTER k SET STORAGE EXTERNAL`)

	names := namer{}
	names.table("plain", "two", "keyless", "bare", "full_pk", "full_bare", "by_index", "nulls", "lazy", "part_index", "excl", "parent", "child",
		"big_child", "coded", "by_code", "stamped", "dated", "pair_parent", "pair", "tree", "parted", "leaf", "generated", "toasted", "toast_key", "fresh")
	for i := range 10 {
		v := fmt.Sprint(i)
		for _, table := range []string{"plain", "full_pk", "by_index", "nulls", "lazy", "part_index", "excl", "parent", "child", "big_child", "coded", "by_code", "dated", "pair", "tree", "parted", "generated", "toasted"} {
			names.row(table, "id", v)
		}
		for _, table := range []string{"two", "keyless", "nulls", "lazy"} {
			names.row(table, "v", v)
		}
		names.row("by_index", "k", v)
		names.row("nulls", "w", v)
		names.row("two", "a,b", "x", v)
		names.row("pair_parent", "a,b", v, "5")
	}
	names.row("nulls", "v", "NULL")
	names.row("parent", "code", "x")
	names.row("coded", "code", "x")
	names.row("generated", "g")
	names.row("stamped", "at", "2024-01-01 00:00:00")
	names.row("toast_key", "k", strings.Repeat("k", 2300))
	names.row("toasted", "a", strings.Repeat("a", 2300))
	names.row("toasted", "b,n", strings.Repeat("b", 2300), "1")
	for table, indexes := range map[string][]string{"part_index": {"part_v", "part_e"}, "excl": {"excl_r_excl"}} {
		for _, i := range indexes {
			names[keyOf(kindIndex, "postgres", "public", table, i)] = "index " + i
		}
	}

	for _, test := range []struct {
		sql  string
		want string // words joined by "; "
	}{
		{"INSERT INTO plain VALUES (1, 1)", "IX plain; W plain(id)=(1)"},
		{"UPDATE plain SET v = 2 WHERE id = 1", "IX plain; W plain(id)=(1)"},
		{"UPDATE plain SET v = 3; UPDATE plain SET v = 4", "IX plain; W plain(id)=(1)"},
		{"UPDATE plain SET id = 2 WHERE id = 1", "IX plain; W plain(id)=(2); X plain(id)=(1)"},
		{"DELETE FROM plain WHERE id = 2", "IX plain; X plain(id)=(2)"},
		{"INSERT INTO two VALUES (1, 'x', 7)", "IX two; U two(v)=(7); W two(a,b)=(x,1)"},
		{"UPDATE two SET b = 2", "IX two; U two(v)=(7); W two(a,b)=(x,2); X two(a,b)=(x,1)"},
		{"INSERT INTO two VALUES (3, 'x', NULL)", "IX two; W two(a,b)=(x,3)"},
		{"INSERT INTO keyless VALUES (1)", "IX keyless; U keyless(v)=(1)"},
		{"INSERT INTO bare VALUES (1)", "IX bare"},
		{"INSERT INTO full_pk VALUES (1, 1)", "IX full_pk; W full_pk(id)=(1)"},
		{"UPDATE full_pk SET v = 2", "IX full_pk; W full_pk(id)=(1)"},
		{"UPDATE full_pk SET id = 2", "IX full_pk; W full_pk(id)=(2); X full_pk(id)=(1)"},
		{"DELETE FROM full_pk", "IX full_pk; X full_pk(id)=(2)"},
		{"INSERT INTO full_bare VALUES (1)", "IX full_bare"},
		{"UPDATE full_bare SET v = 2", "X full_bare"},
		{"DELETE FROM full_bare", "X full_bare"},
		{"INSERT INTO by_index VALUES (1, 2)", "IX by_index; U by_index(id)=(1); W by_index(k)=(2)"},
		{"DELETE FROM by_index", "IX by_index; X by_index(k)=(2)"},
		{"INSERT INTO nulls VALUES (1, NULL, NULL)", "IX nulls; U nulls(v)=(NULL); W nulls(id)=(1)"},
		{"INSERT INTO nulls VALUES (2, 5, 6)", "IX nulls; U nulls(v)=(5); U nulls(w)=(6); W nulls(id)=(2)"},
		{"INSERT INTO lazy VALUES (1, 5)", "IX lazy; R lazy; UD lazy(v)=(5); W lazy(id)=(1)"},
		{"DELETE FROM lazy", "IX lazy; X lazy(id)=(1)"},
		{"INSERT INTO part_index VALUES (1, 5)", "IX part_index; U index part_e; U index part_v; W part_index(id)=(1)"},
		{"DELETE FROM part_index", "IX part_index; X part_index(id)=(1)"},
		{"INSERT INTO excl VALUES (1, '[1,2)')", "IX excl; R excl; UD index excl_r_excl; W excl(id)=(1)"},
		{"INSERT INTO parent VALUES (1), (2), (3)", "IX parent; W parent(id)=(1); W parent(id)=(2); W parent(id)=(3)"},
		{"UPDATE parent SET code = 'x' WHERE id = 3", "IX parent; U parent(code)=(x); W parent(id)=(3)"},
		{"INSERT INTO child VALUES (1, 1), (2, 1)", "IX child; R parent; R parent(id)=(1); W child(id)=(1); W child(id)=(2)"},
		{"INSERT INTO child VALUES (3, NULL)", "IX child; R parent; W child(id)=(3)"},
		{"UPDATE child SET p = 2 WHERE id = 3", "IX child; R parent; R parent(id)=(2); W child(id)=(3)"},
		{"DELETE FROM child WHERE id = 3", "IX child; X child(id)=(3)"},
		{"INSERT INTO big_child VALUES (1, 1)", "IX big_child; R parent; R parent(id)=(1); W big_child(id)=(1)"},
		{"DELETE FROM parent WHERE id = 2", "IX parent; R references parent; X parent(id)=(2)"},
		{"UPDATE parent SET id = 4 WHERE id = 3", "IX parent; R references parent; U parent(code)=(x); W parent(id)=(4); X parent(id)=(3)"},
		{"INSERT INTO coded VALUES (1, 'x')", "IX coded; U coded(code)=(x); W coded(id)=(1)"},
		{"INSERT INTO by_code VALUES (1, 'x')", "IX by_code; R coded; R coded(code)=(x); W by_code(id)=(1)"},
		{"UPDATE coded SET code = 'x'", "X coded"},
		{"DELETE FROM by_code", "IX by_code; X by_code(id)=(1)"},
		{"DELETE FROM coded", "R references coded; X coded"},
		{"INSERT INTO stamped VALUES ('2024-01-01')", "IX stamped; W stamped(at)=(2024-01-01 00:00:00)"},
		{"INSERT INTO dated VALUES (1, '2024-01-01')", "IX dated; R stamped; W dated(id)=(1); X references stamped"},
		{"INSERT INTO pair_parent VALUES (5, 6)", "IX pair_parent; W pair_parent(a,b)=(6,5)"},
		{"INSERT INTO pair VALUES (1, 5, 6)", "IX pair; R pair_parent; R pair_parent(a,b)=(6,5); W pair(id)=(1)"},
		{"INSERT INTO pair VALUES (2, 5, NULL)", "IX pair; R pair_parent; W pair(id)=(2)"},
		{"INSERT INTO tree VALUES (1, 1)", "IX tree; R tree; R tree(id)=(1); W tree(id)=(1)"},
		{"INSERT INTO parted VALUES (1)", "IX parted; W parted(id)=(1)"},
		{"UPDATE leaf SET k = 3", "IX parted; W parted(id)=(1)"},
		{"INSERT INTO generated VALUES (1, 1)", "IX generated; U generated(g); W generated(id)=(1)"},
		{"INSERT INTO toasted VALUES (1, repeat('a', 2300), repeat('b', 2300), 1)",
			"IX toasted; U toasted(a)=(" + strings.Repeat("a", 2300) + "); U toasted(b,n)=(" + strings.Repeat("b", 2300) + ",1); W toasted(id)=(1)"},
		{"UPDATE toasted SET a = NULL", "X toasted"}, // (b, n) is half unknown
		{"INSERT INTO toast_key VALUES (repeat('k', 2300), 1)", "IX toast_key; W toast_key(k)=(" + strings.Repeat("k", 2300) + ")"},
		{"UPDATE toast_key SET n = 2", "IX toast_key; W toast_key(k)=(" + strings.Repeat("k", 2300) + ")"},
		{"INSERT INTO plain SELECT generate_series(1000, 1100)", "X plain"},
		{"INSERT INTO child SELECT generate_series(1000, 1100), 1", "R parent; X child; X references parent"},
		{"INSERT INTO parent SELECT generate_series(1000, 1100)", "X parent"},
		{"DELETE FROM parent WHERE id >= 1000", "R references parent; X parent"},
		{"TRUNCATE plain, two", "X plain; X two"},
		{"TRUNCATE parent CASCADE", "X parent; X child; X big_child"},
		{"CREATE TABLE fresh (id int PRIMARY KEY); INSERT INTO fresh VALUES (1)", "X ddl; X fresh"},
		{"ALTER TABLE plain ADD w int; INSERT INTO plain VALUES (1, 2, 3)", "X ddl; X plain"},
		{"INSERT INTO plain VALUES (2, 2, 3); ALTER TABLE plain DROP w", "X ddl; X plain"},
		{"INSERT INTO plain VALUES (3, 3)", "IX plain; W plain(id)=(3)"},
		{"ALTER TABLE leaf ADD CHECK (k < 1000)", "X ddl; X parted"},
		{"SELECT pg_logical_emit_message(true, 'quorate.ddl', '{}'); INSERT INTO plain VALUES (4, 4)", "X database; X ddl; X plain"},
	} {
		want := strings.Split(test.want, "; ")
		slices.Sort(want)
		if got := names.words(c.run(test.sql).Keys); !slices.Equal(got, want) {
			t.Errorf("%s:\n%q, want\n%q", test.sql, got, want)
		}
	}
	if major >= 18 {
		c.run(`CREATE EXTENSION btree_gist`)
		c.run(`CREATE TABLE spans (id int, at int4range, v int, PRIMARY KEY (id, at WITHOUT OVERLAPS))`)
		c.run(`CREATE TABLE spanned (n int PRIMARY KEY, id int, at int4range, FOREIGN KEY (id, PERIOD at) REFERENCES spans (id, PERIOD at))`)
		names.table("spans", "spanned")
		names.row("spanned", "n", "1")
		names.row("spans", "at,id")
		for _, test := range []struct{ sql, want string }{
			{"INSERT INTO spans VALUES (1, '[1,5)')", "IX spans; W spans(at,id)"},
			{"INSERT INTO spanned VALUES (1, 1, '[2,3)')", "IX spanned; R spans; W spanned(n)=(1); X references spans"},
			{"UPDATE spans SET at = '[1,6)'", "IX spans; R references spans; W spans(at,id); X spans(at,id)"},
		} {
			want := strings.Split(test.want, "; ")
			if got := names.words(c.run(test.sql).Keys); !slices.Equal(got, want) {
				t.Errorf("%s:\n%q, want\n%q", test.sql, got, want)
			}
		}
	}
}

// TestKeyTypes: two values have equal keys if and only if the server takes them for equal, or the type is one that is
// not compared at all.
func TestKeyTypes(t *testing.T) {
	t.Parallel()
	n := newNode(t, 18, Limits{})
	c := n.client()
	c.run(`CREATE COLLATION insensitive (provider = icu, locale = 'und-u-ks-level2', deterministic = false)`)
	c.run(`CREATE EXTENSION citext`)
	c.run(`CREATE TYPE mood AS ENUM ('good', 'bad')`)
	c.run(`CREATE DOMAIN amount AS numeric CHECK (value > 0); CREATE DOMAIN fold AS text COLLATE insensitive`)
	for i, test := range []struct {
		typ    string
		values []string // pairwise different
		equal  string   // another form of the first
		opaque bool
	}{
		{typ: "smallint", values: []string{"1", "-1", "10"}, equal: "+1"},
		{typ: "int", values: []string{"1", "10", "100"}, equal: "01"},
		{typ: "bigint", values: []string{"1", "9223372036854775807"}, equal: " 1 "},
		{typ: "boolean", values: []string{"true", "false"}, equal: "yes"},
		{typ: "uuid", values: []string{"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "b0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"}, equal: "A0EEBC99-9C0B4EF8-BB6D6BB9-BD380A11"},
		{typ: "date", values: []string{"2024-02-29", "2024-03-01", "infinity", "0044-03-15 BC"}, equal: "29 feb 2024"},
		{typ: "time", values: []string{"00:00", "24:00", "12:00"}, equal: "0:0:0.000"},
		{typ: "timestamp", values: []string{"2024-02-29 12:00", "2024-02-29 12:00:00.000001"}, equal: "2024-02-29 12:00:00.0000"},
		{typ: "timestamptz", values: []string{"2024-02-29 12:00+00", "2024-02-29 12:00+01"}, equal: "2024-02-29 14:00+02"},
		{typ: "bytea", values: []string{`\x61`, `\x6162`, `\x`}, equal: "a"},
		{typ: "text", values: []string{"a", "A", "a ", "", "NULL"}, equal: "a"},
		{typ: "varchar(5)", values: []string{"a", "b"}, equal: "a"},
		{typ: "char(5)", values: []string{"a", "b", ""}, equal: "a  "},
		{typ: "numeric", values: []string{"1", "10", "0", "NaN", "1e30", "0.001", "-1", "Infinity"}, equal: "1.000"},
		{typ: "numeric(10,2)", values: []string{"100", "1", "0.5"}, equal: "100.00"},
		{typ: "amount", values: []string{"1", "2"}, equal: "1.0"},
		{typ: "mood", values: []string{"good", "bad"}, equal: "good"},
		{typ: `text COLLATE "C"`, values: []string{"a", "b"}, equal: "a"},
		{typ: "oid", values: []string{"1", "2"}, equal: "01"},
		{typ: "text COLLATE insensitive", values: []string{"a"}, equal: "A", opaque: true},
		{typ: "fold", values: []string{"a"}, equal: "A", opaque: true},
		{typ: "citext", values: []string{"a"}, equal: "A", opaque: true},
		{typ: "float8", values: []string{"0"}, equal: "-0", opaque: true},
		{typ: "interval", values: []string{"1 day"}, equal: "24:00", opaque: true},
		{typ: "jsonb", values: []string{`{"a": 1.0}`}, equal: `{"a": 1.00}`, opaque: true},
		{typ: "numeric[]", values: []string{"{1.0}"}, equal: "{1.00}", opaque: true},
		{typ: "int4range", values: []string{"[1,2]"}, equal: "[1,3)", opaque: true},
		{typ: "inet", values: []string{"10.0.0.1"}, equal: "10.0.0.1/32", opaque: true},
	} {
		table := fmt.Sprintf("k%d", i)
		c.run(fmt.Sprintf("CREATE TABLE %s (k %s PRIMARY KEY)", table, test.typ))
		key := func(value string) txn.Key {
			t.Helper()
			set := c.run(fmt.Sprintf("INSERT INTO %s VALUES ('%s')", table, value))
			var found txn.Key
			for _, u := range set.Keys {
				if u.Mode == txn.ModeWrite {
					found = u.Key
				}
			}
			if found == (txn.Key{}) {
				t.Fatalf("%s: no key for %q", test.typ, value)
			}
			c.run(fmt.Sprintf("DELETE FROM %s", table))
			return found
		}
		var keys []txn.Key
		for _, v := range test.values {
			k := key(v)
			if slices.Contains(keys, k) {
				t.Errorf("%s: %q has the key of another value", test.typ, v)
			}
			keys = append(keys, k)
		}
		if key(test.equal) != keys[0] {
			t.Errorf("%s: %q and %q have different keys", test.typ, test.equal, test.values[0])
		}
		if coarse := keyOf(kindRow, "postgres", "public", table, "k"); (keys[0] == coarse) != test.opaque {
			t.Errorf("%s: opaque is %v", test.typ, !test.opaque)
		}
	}
}
