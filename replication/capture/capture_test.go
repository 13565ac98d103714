package capture

import (
	"slices"
	"testing"
)

func versions(t *testing.T, test func(t *testing.T, major int)) {
	for _, major := range []int{17, 18} {
		t.Run(map[int]string{17: "PostgreSQL 17", 18: "PostgreSQL 18"}[major], func(t *testing.T) {
			t.Parallel()
			test(t, major)
		})
	}
}

// TestOpenTransaction: at its marker an open transaction's changes are there, with the kept and without the rolled
// back savepoints.
func TestOpenTransaction(t *testing.T) {
	t.Parallel()
	versions(t, func(t *testing.T, major int) {
		n := newNode(t, major, Limits{})
		c := n.client()
		c.run("CREATE TABLE t (id int PRIMARY KEY, v text)")
		c.exec("BEGIN; INSERT INTO t VALUES (1, 'a'), (2, 'b')")
		c.exec("SAVEPOINT s; UPDATE t SET v = 'c' WHERE id = 1; SAVEPOINT u; DELETE FROM t; ROLLBACK TO u; RELEASE s")
		c.exec("SAVEPOINT s; INSERT INTO t VALUES (3, 'x'); ROLLBACK TO s; UPDATE t SET id = 4 WHERE id = 2")
		r, nudges := c.ready()
		if t.Failed() {
			return
		}
		want := []string{
			"INSERT public.t id=t1 v=ta", "INSERT public.t id=t2 v=tb", "UPDATE public.t id=t1 v=tc",
			"UPDATE public.t FROM id=t2 v=n id=t4 v=tb",
		}
		if got := render(t, r); !slices.Equal(got, want) {
			t.Errorf("changes\n%q, want\n%q", got, want)
		}
		if nudges != 0 || r.set.Rows != 4 || r.set.Barrier || r.set.Base != 7 || r.set.Seen != 9 || r.set.Database != "postgres" {
			t.Errorf("nudges %d, set %+v", nudges, r.set)
		}
		c.exec("COMMIT")
		if len(n.sink.strays) > 0 {
			t.Error("a marked transaction is called a stray")
		}
	})
}
