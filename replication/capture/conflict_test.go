package capture

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"pgregory.net/rapid"

	"github.com/quorate/quorate/txn"
)

// TestConflictsAreBlocks holds the keys against the server's own locks: two transactions conflict by their keys if and
// only if, run side by side on one PostgreSQL, the second must wait for the first. (The parent has no unique column
// beside its key: changing one makes the server lock children out, which no constraint needs.)
func TestConflictsAreBlocks(t *testing.T) {
	t.Parallel()
	n := newNode(t, 18, Limits{})
	a, b := n.client(), n.client()
	a.run(`CREATE TABLE parent (id int PRIMARY KEY, v int);
		CREATE TABLE child (id int PRIMARY KEY, p int REFERENCES parent, u int UNIQUE);
		CREATE TABLE dependent (id int PRIMARY KEY, p bigint REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE, a text, b text, UNIQUE (b, a));
		INSERT INTO parent SELECT i, 0 FROM generate_series(1, 6) i;
		INSERT INTO child VALUES (1, 1, 1), (2, 1, 2), (3, NULL, NULL);
		INSERT INTO dependent VALUES (1, 2, 'x', 'y'), (2, 3, 'x', NULL), (3, NULL, NULL, NULL)`)
	for _, c := range []*client{a, b} {
		c.exec("SET default_transaction_isolation = 'read committed'; SET lock_timeout = '30ms'; SET deadlock_timeout = '10s'")
	}
	const pairs = 6 // in each of rapid's checks
	id := rapid.IntRange(1, 8)
	old := rapid.IntRange(1, 4)
	maybe := rapid.SampledFrom([]string{"NULL", "1", "2", "3", "4", "7", "8"})
	text := rapid.SampledFrom([]string{"NULL", "'x'", "'y'"})
	statement := rapid.Custom(func(t *rapid.T) string {
		kind := rapid.IntRange(0, 10).Draw(t, "statement")
		i, j := old.Draw(t, "i"), id.Draw(t, "j")
		if kind == 0 || kind == 4 || kind == 8 {
			i = rapid.IntRange(4, 8).Draw(t, "new")
		}
		switch kind {
		case 0:
			return fmt.Sprintf("INSERT INTO parent VALUES (%d, 0)", i)
		case 1:
			return fmt.Sprintf("UPDATE parent SET v = v + 1 WHERE id = %d", i)
		case 2:
			return fmt.Sprintf("UPDATE parent SET id = %d WHERE id = %d", j, i)
		case 3:
			return fmt.Sprintf("DELETE FROM parent WHERE id = %d", i)
		case 4:
			return fmt.Sprintf("INSERT INTO child VALUES (%d, %s, %s)", i, maybe.Draw(t, "p"), maybe.Draw(t, "u"))
		case 5:
			return fmt.Sprintf("UPDATE child SET u = %s WHERE id = %d", maybe.Draw(t, "u"), i)
		case 6:
			return fmt.Sprintf("UPDATE child SET p = %s WHERE id = %d", maybe.Draw(t, "p"), i)
		case 7:
			return fmt.Sprintf("DELETE FROM child WHERE id = %d", i)
		case 8:
			return fmt.Sprintf("INSERT INTO dependent VALUES (%d, %s, %s, %s)", i, maybe.Draw(t, "p"), text.Draw(t, "a"), text.Draw(t, "b"))
		case 9:
			return fmt.Sprintf("UPDATE dependent SET a = %s WHERE id = %d", text.Draw(t, "a"), i)
		default:
			return fmt.Sprintf("DELETE FROM dependent WHERE id = %d", i)
		}
	})
	transaction := rapid.SliceOfN(statement, 1, 3)
	tried, blocks := 0, 0
	pair := func(rt *rapid.T) {
		first, second := transaction.Draw(rt, "first"), transaction.Draw(rt, "second")
		one, ok1 := a.keysOf(first)
		two, ok2 := b.keysOf(second)
		if !ok1 || !ok2 {
			return
		}
		a.exec("BEGIN; " + strings.Join(first, "; "))
		b.exec("BEGIN")
		err := b.try(strings.Join(second, "; "))
		b.exec("ROLLBACK")
		a.exec("ROLLBACK")
		var pgErr *pgconn.PgError
		blocked := errors.As(err, &pgErr) && pgErr.Code == "55P03"
		if err != nil && !blocked {
			return // the second met what the first left visible to constraint checks: not a wait
		}
		tried++
		if blocked {
			blocks++
		}
		if conflict := conflict(one, two); conflict != blocked {
			rt.Fatalf("%q beside %q: conflict %v, blocked %v", first, second, conflict, blocked)
		}
	}
	rapid.Check(t, func(rt *rapid.T) {
		for range pairs {
			pair(rt)
		}
	})
	t.Logf("%d pairs, %d of them blocked", tried, blocks)
	if blocks < 10 || tried-blocks < 50 {
		t.Error("too few to say anything")
	}
}

// keysOf runs a transaction alone, without committing it; ok is false if it fails.
func (c *client) keysOf(statements []string) (keys []txn.KeyUse, ok bool) {
	c.t.Helper()
	c.exec("BEGIN; SELECT pg_current_xact_id()")
	defer c.exec("ROLLBACK")
	if err := c.try(strings.Join(statements, "; ")); err != nil {
		return nil, false
	}
	r, _ := c.ready()
	if r.set == nil {
		return nil, false
	}
	return r.set.Keys, true
}

func conflict(a, b []txn.KeyUse) bool {
	for _, x := range a {
		for _, y := range b {
			if x.Key == y.Key && txn.Conflicts(x.Mode, y.Mode) {
				return true
			}
		}
	}
	return false
}
