package capture

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
)

// Every key of a write set is found again, and says where it is.
func TestLocate(t *testing.T) {
	t.Parallel()
	n := newNode(t, 18, Limits{KeysPerTable: 50})
	c := n.client()
	c.run(`CREATE TABLE account (id int PRIMARY KEY, email text, CONSTRAINT one_email UNIQUE (email))`)
	c.run(`CREATE TABLE entry (b int, a text, account int REFERENCES account, PRIMARY KEY (b, a))`)
	c.run(`CREATE TABLE partial (id int PRIMARY KEY, v int); CREATE UNIQUE INDEX partial_v ON partial (v) WHERE v > 0`)
	c.run(`CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id)`)
	c.run(`CREATE TABLE leaf PARTITION OF parted FOR VALUES FROM (0) TO (1000)`)
	for _, tc := range []struct {
		sql  string
		want []string
	}{
		{`INSERT INTO account VALUES (1, 'a@b'), (2, NULL)`, []string{
			"W public.account: (id)=(1)", "W public.account: (id)=(2)", "U public.account: unique one_email (email)=(a@b)"}},
		{`INSERT INTO entry VALUES (3, 'x, y', 1)`, []string{
			"W public.entry: (a, b)=(x, y, 3)", "R public.entry: parent of (account)=(1)", "R public.entry: any parent in public.account"}},
		{`UPDATE entry SET b = 4`, []string{"X public.entry: (a, b)=(x, y, 3)", "W public.entry: (a, b)=(x, y, 4)"}},
		{`DELETE FROM entry`, []string{"X public.entry: (a, b)=(x, y, 4)"}},
		{`INSERT INTO partial VALUES (1,1)`, []string{"U public.partial: unique partial_v (any value)"}},
		{`INSERT INTO parted VALUES (7)`, []string{"W public.parted: (id)=(7)"}},
		{`TRUNCATE partial`, []string{"X public.partial: whole table"}},
		{`ALTER TABLE partial ADD w int`, []string{"X public.partial: whole table", "X : DDL"}},
		{`CREATE TYPE odd AS ENUM ('a')`, []string{"X : DDL"}},
	} {
		set := c.run(tc.sql)
		var got []string
		for _, u := range set.Keys {
			place, ok, err := Locate(t.Context(), n.catalog, set, u.Key)
			if err != nil || !ok {
				t.Errorf("%s: key %v %x is not found: %v", tc.sql, u.Mode, u.Key, err)
			}
			if u.Mode != txn.ModeIntent {
				got = append(got, fmt.Sprintf("%v %s: %s", u.Mode, place.Table, place.Key))
			}
		}
		for _, w := range tc.want {
			if !slices.Contains(got, w) {
				t.Errorf("%s: keys are at %q, and not at %q", tc.sql, got, w)
			}
		}
	}

	// Which row the first one is, as whoever waits for it knows it.
	for _, tc := range []struct {
		sql    string
		unique bool
		want   string
	}{
		{`UPDATE account SET id = 11 WHERE id = 1`, false, "public.account: (id)=(1)"},
		{`UPDATE account SET email = 'd@e' WHERE id = 11`, false, "public.account: (id)=(11)"},
		{`INSERT INTO account VALUES (12, 'e@f')`, true, "public.account: a unique value of (id)=(12)"},
		{`INSERT INTO entry VALUES (5, 'z', 11)`, true, "public.entry: (a, b)=(z, 5)"},
		{`DELETE FROM parted`, false, "public.parted: (id)=(7)"},
	} {
		place, ok, err := LocateRow(t.Context(), n.catalog, c.run(tc.sql), tc.unique)
		if got := place.Table + ": " + place.Key; got != tc.want || !ok || err != nil {
			t.Errorf("%s: the row is %q, %v, %v; want %q", tc.sql, got, ok, err, tc.want)
		}
	}
	if place, ok, err := LocateRow(t.Context(), n.catalog, c.run(`TRUNCATE partial`), false); ok || err != nil {
		t.Errorf("a write set without rows has %v, %v", place, err)
	}

	// A key that is not the set's, or of a table that is gone, is not found; what is damaged does no harm.
	set := c.run(`INSERT INTO account VALUES (3, 'c@d')`)
	if place, ok, err := Locate(t.Context(), n.catalog, set, txn.Key{1}); ok || err != nil {
		t.Errorf("a key of nobody is at %v, %v", place, err)
	}
	row := set.Keys[len(set.Keys)-1].Key
	random := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		damaged := *set
		damaged.Changes = slices.Clone(set.Changes)
		for range 1 + random.IntN(3) {
			damaged.Changes[random.IntN(len(damaged.Changes))] = byte(random.Uint32())
		}
		damaged.Changes = damaged.Changes[:random.IntN(len(damaged.Changes)+1)]
		if _, _, err := Locate(t.Context(), unknown{}, &damaged, row); err != nil {
			t.Fatal(err)
		}
		if _, _, err := LocateRow(t.Context(), unknown{}, &damaged, true); err != nil {
			t.Fatal(err)
		}
	}
	if place, ok, err := Locate(t.Context(), unknown{}, set, TableKey("postgres", "public", "account")); !ok || err != nil || place.Table != "public.account" {
		t.Errorf("the key of a table that is gone is at %v, %v, %v", place, ok, err)
	}
}

// unknown is a catalog without tables.
type unknown struct{ *pg.Catalog }

func (unknown) RelationByName(ctx context.Context, _, _ string) (*pg.Relation, error) {
	return nil, ctx.Err()
}
