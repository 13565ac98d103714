package workload

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/jackc/pgx/v5"

	"github.com/quorate/quorate/test/check"
)

// kinds are the workloads: each plans one transaction.
var kinds = map[string]func(*rand.Rand) plan{
	"append":   appendLists,
	"register": useRegisters,
	"skew":     skew,
	"bank":     bank,
	"counter":  count,
	"unique":   takeSeats,
	"foreign":  family,
	"bulk":     bulks,
}

var (
	accounts = []string{"alice", "bob", "carol", "dave", "erin"}
	counters = []string{"a", "b"}
)

// opening is what each account begins with.
const opening = 100

// errGiveUp ends a transaction that a client does not want any more.
var errGiveUp = errors.New("the client gave up")

// either chooses an isolation level: repeatable read, once in n times read committed.
func either(random *rand.Rand, n int) check.Isolation {
	if random.IntN(n) == 0 {
		return check.ReadCommitted
	}
	return check.RepeatableRead
}

// name chooses one of n things.
func name(random *rand.Rand, what string, n int) string { return fmt.Sprint(what, random.IntN(n)) }

// shelf is how many values are given out until lists and registers are left for new ones, so that lists stay short.
const shelf = 1000

// recent names one of n things of the moment.
func (t *transaction) recent(what string, n int) string {
	return fmt.Sprintf("%s%d.%d", what, t.value()/shelf, t.random.IntN(n))
}

// sometimesGiveUp makes a transaction fail, now and then, that has written already: nobody may see what it wrote.
func (t *transaction) sometimesGiveUp() error {
	if t.random.IntN(30) == 0 {
		return errGiveUp
	}
	return nil
}

// appendLists appends to lists and reads lists.
func appendLists(random *rand.Rand) plan {
	return plan{isolation: either(random, 3), run: func(ctx context.Context, t *transaction) error {
		for range 1 + t.random.IntN(4) {
			key := t.recent("list", 4)
			if t.random.IntN(2) == 0 {
				if err := t.list(ctx, key); err != nil {
					return err
				}
				continue
			}
			if err := t.append(ctx, key); err != nil {
				return err
			}
		}
		return t.sometimesGiveUp()
	}}
}

// useRegisters reads registers, writes them blindly, and writes them after having read them.
func useRegisters(random *rand.Rand) plan {
	return plan{isolation: either(random, 4), run: func(ctx context.Context, t *transaction) error {
		for range 1 + t.random.IntN(3) {
			key := t.recent("register", 4)
			act := t.random.IntN(3)
			if act != 0 {
				if _, err := t.read(ctx, key); err != nil {
					return err
				}
			}
			if act != 1 {
				if err := t.write(ctx, key); err != nil {
					return err
				}
			}
		}
		return t.sometimesGiveUp()
	}}
}

// skew reads two registers and writes one of them: at repeatable read, two such transactions may write both.
func skew(random *rand.Rand) plan {
	return plan{isolation: check.RepeatableRead, run: func(ctx context.Context, t *transaction) error {
		pair := t.recent("pair", 2)
		sides := []string{pair + ".left", pair + ".right"}
		for _, side := range sides {
			if _, err := t.read(ctx, side); err != nil {
				return err
			}
		}
		return t.write(ctx, sides[t.random.IntN(2)])
	}}
}

// bank moves money, or reads all accounts.
func bank(random *rand.Rand) plan {
	if random.IntN(3) == 0 {
		return plan{isolation: either(random, 2), single: true, run: func(ctx context.Context, t *transaction) error {
			return t.balances(ctx)
		}}
	}
	from := random.IntN(len(accounts))
	to := (from + 1 + random.IntN(len(accounts)-1)) % len(accounts)
	amount := 1 + random.Int64N(20)
	isolation := either(random, 2)
	return plan{isolation: isolation, run: func(ctx context.Context, t *transaction) error {
		change := t.changeInServer
		if isolation == check.RepeatableRead {
			change = t.changeInClient
		}
		if err := change(ctx, accounts[from], -amount); err != nil {
			return err
		}
		if err := change(ctx, accounts[to], amount); err != nil {
			return err
		}
		return t.sometimesGiveUp()
	}}
}

// changeInClient computes a balance from what it has read, which only first committer wins makes right.
func (t *transaction) changeInClient(ctx context.Context, account string, amount int64) error {
	var balance int64
	if err := t.q.QueryRow(ctx, "SELECT balance FROM w_account WHERE key = $1", account).Scan(&balance); err != nil {
		return err
	}
	if balance+amount < 0 {
		return errGiveUp
	}
	t.did(check.Action{Do: check.Add, Key: account, Value: amount})
	_, err := t.q.Exec(ctx, "UPDATE w_account SET balance = $2 WHERE key = $1", account, balance+amount)
	return err
}

// changeInServer lets the server compute, and take nothing that is not there.
func (t *transaction) changeInServer(ctx context.Context, account string, amount int64) error {
	t.did(check.Action{Do: check.Add, Key: account, Value: amount})
	tag, err := t.q.Exec(ctx, "UPDATE w_account SET balance = balance + $2 WHERE key = $1 AND balance + $2 >= 0", account, amount)
	if err == nil && tag.RowsAffected() == 0 {
		err = errGiveUp
	}
	return err
}

// count adds to counters in three ways, and reads them.
func count(random *rand.Rand) plan {
	key := counters[random.IntN(len(counters))]
	switch n := random.IntN(4); n {
	case 0, 1:
		return plan{isolation: either(random, 2), single: n == 0, run: func(ctx context.Context, t *transaction) error {
			// Recorded first: a single statement of which nobody knows has been done, maybe.
			t.did(check.Action{Do: check.Add, Key: key, Value: 1})
			_, err := t.q.Exec(ctx, "UPDATE w_counter SET n = n + 1 WHERE key = $1", key)
			return err
		}}
	case 2:
		return plan{isolation: check.RepeatableRead, run: func(ctx context.Context, t *transaction) error {
			n, err := t.count(ctx, key)
			if err != nil {
				return err
			}
			t.did(check.Action{Do: check.Add, Key: key, Value: 1})
			_, err = t.q.Exec(ctx, "UPDATE w_counter SET n = $2 WHERE key = $1", key, n+1)
			return err
		}}
	default:
		return plan{isolation: either(random, 2), single: true, run: func(ctx context.Context, t *transaction) error {
			_, err := t.count(ctx, key)
			return err
		}}
	}
}

// takeSeats takes seats that only one can have, and gives them back.
func takeSeats(random *rand.Rand) plan {
	key := name(random, "seat", 5)
	p := plan{isolation: either(random, 2), single: random.IntN(2) == 0}
	switch random.IntN(5) {
	case 0, 1:
		p.run = func(ctx context.Context, t *transaction) error {
			id := t.value()
			t.did(check.Action{Do: check.Insert, Table: "seat", Row: id, Key: key})
			_, err := t.q.Exec(ctx, "INSERT INTO w_seat VALUES ($1, $2)", id, key)
			return err
		}
	case 2, 3:
		// In a block, since a statement that is cut off does not say which row it has deleted.
		p.single = false
		p.run = func(ctx context.Context, t *transaction) error {
			return t.delete(ctx, check.Action{Table: "seat", Key: key}, "DELETE FROM w_seat WHERE key = $1 RETURNING id")
		}
	default:
		p.run = func(ctx context.Context, t *transaction) error { return t.scanSeats(ctx) }
	}
	return p
}

// family makes and removes parents and their children.
func family(random *rand.Rand) plan {
	key := name(random, "parent", 4)
	p := plan{isolation: either(random, 2)}
	switch random.IntN(6) {
	case 0:
		p.single = random.IntN(2) == 0
		p.run = func(ctx context.Context, t *transaction) error {
			id := t.value()
			t.did(check.Action{Do: check.Insert, Table: "parent", Row: id, Key: key})
			_, err := t.q.Exec(ctx, "INSERT INTO w_parent VALUES ($2, $1)", id, key)
			return err
		}
	case 1, 2:
		p.single = random.IntN(2) == 0
		p.run = func(ctx context.Context, t *transaction) error {
			id := t.value()
			t.did(check.Action{Do: check.Insert, Table: "child", Refs: "parent", Row: id, Key: key})
			_, err := t.q.Exec(ctx, "INSERT INTO w_child VALUES ($1, $2)", id, key)
			return err
		}
	case 3:
		p.run = func(ctx context.Context, t *transaction) error {
			return t.delete(ctx, check.Action{Table: "parent", Key: key}, "DELETE FROM w_parent WHERE key = $1 RETURNING id")
		}
	case 4:
		p.run = func(ctx context.Context, t *transaction) error {
			return t.delete(ctx, check.Action{Table: "child", Refs: "parent", Key: key}, "DELETE FROM w_child WHERE parent = $1 RETURNING id")
		}
	default:
		p.isolation = check.RepeatableRead
		p.run = func(ctx context.Context, t *transaction) error { return t.scanFamily(ctx) }
	}
	return p
}

// A bulk is so many rows of so many bytes that it is sent on in parts wherever transactions above a quarter of a megabyte are.
const (
	bulkRows  = 1200
	bulkBytes = 500
)

// bulks inserts and deletes many rows at a time, of which all or none must be seen. It looks more often than it writes.
func bulks(random *rand.Rand) plan {
	p := plan{isolation: either(random, 2)}
	switch random.IntN(150) {
	case 0:
		p.run = func(ctx context.Context, t *transaction) error {
			id := t.value()
			t.did(check.Action{Do: check.Insert, Table: "bulk", Row: id, Key: whole(id)})
			if _, err := t.q.Exec(ctx, "INSERT INTO w_bulk SELECT $1::bigint, part, repeat('x', $2) FROM generate_series(1, $3::int) part", id, bulkBytes, bulkRows); err != nil {
				return err
			}
			if t.random.IntN(4) == 0 {
				return errGiveUp
			}
			return nil
		}
	case 1, 2:
		p.run = func(ctx context.Context, t *transaction) error {
			var id int64
			if err := t.q.QueryRow(ctx, "SELECT id FROM w_bulk ORDER BY id LIMIT 1").Scan(&id); errors.Is(err, pgx.ErrNoRows) {
				return nil
			} else if err != nil {
				return err
			}
			t.did(check.Action{Do: check.Delete, Table: "bulk", Row: id, Key: whole(id)})
			tag, err := t.q.Exec(ctx, "DELETE FROM w_bulk WHERE id = $1", id)
			if err == nil && tag.RowsAffected() == 0 {
				err = errGiveUp // somebody else was quicker
			}
			return err
		}
	default:
		p.run = func(ctx context.Context, t *transaction) error { return t.scanBulks(ctx) }
	}
	return p
}

// whole is the key of a bulk that is there with all of its rows.
func whole(id int64) string { return fmt.Sprint("bulk ", id) }

// The statements. A write is recorded before it is sent, since it may have happened whatever is heard of it; a read
// with what it has returned.

func (t *transaction) append(ctx context.Context, key string) error {
	value := t.value()
	t.did(check.Action{Do: check.Append, Key: key, Value: value})
	_, err := t.q.Exec(ctx, "INSERT INTO w_list VALUES ($1, ARRAY[$2::bigint]) ON CONFLICT (key) DO UPDATE SET v = w_list.v || excluded.v", key, value)
	return err
}

func (t *transaction) list(ctx context.Context, key string) error {
	var list []int64
	err := t.q.QueryRow(ctx, "SELECT v FROM w_list WHERE key = $1", key).Scan(&list)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return err
	}
	t.did(check.Action{Do: check.List, Key: key, List: list})
	return nil
}

func (t *transaction) write(ctx context.Context, key string) error {
	value := t.value()
	t.did(check.Action{Do: check.Write, Key: key, Value: value})
	_, err := t.q.Exec(ctx, "INSERT INTO w_register VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET v = excluded.v", key, value)
	return err
}

func (t *transaction) read(ctx context.Context, key string) (int64, error) {
	var value int64
	err := t.q.QueryRow(ctx, "SELECT v FROM w_register WHERE key = $1", key).Scan(&value)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return 0, err
	}
	t.did(check.Action{Do: check.Read, Key: key, Value: value})
	return value, nil
}

func (t *transaction) count(ctx context.Context, key string) (int64, error) {
	var value int64
	if err := t.q.QueryRow(ctx, "SELECT n FROM w_counter WHERE key = $1", key).Scan(&value); err != nil {
		return 0, err
	}
	t.did(check.Action{Do: check.Count, Key: key, Value: value})
	return value, nil
}

func (t *transaction) balances(ctx context.Context) error {
	rows, err := t.q.Query(ctx, "SELECT key, balance FROM w_account")
	if err != nil {
		return err
	}
	counts := map[string]int64{}
	var key string
	var balance int64
	if _, err := pgx.ForEachRow(rows, []any{&key, &balance}, func() error { counts[key] = balance; return nil }); err != nil {
		return err
	}
	t.did(check.Action{Do: check.Balances, Counts: counts})
	return nil
}

// delete deletes the rows of a key and records which they were.
func (t *transaction) delete(ctx context.Context, a check.Action, sql string) error {
	rows, err := t.q.Query(ctx, sql, a.Key)
	if err != nil {
		return err
	}
	var id int64
	_, err = pgx.ForEachRow(rows, []any{&id}, func() error {
		a.Do, a.Row = check.Delete, id
		t.did(a)
		return nil
	})
	return err
}

func (t *transaction) scanSeats(ctx context.Context) error {
	return t.scan(ctx, check.Action{Table: "seat"}, "SELECT id, key FROM w_seat ORDER BY id")
}

func (t *transaction) scanFamily(ctx context.Context) error {
	if err := t.scan(ctx, check.Action{Table: "parent"}, "SELECT id, key FROM w_parent ORDER BY id"); err != nil {
		return err
	}
	return t.scan(ctx, check.Action{Table: "child", Refs: "parent"}, "SELECT id, parent FROM w_child ORDER BY id")
}

// scanBulks finds out which bulks there are. One of which there is a part has a key that nobody has inserted.
func (t *transaction) scanBulks(ctx context.Context) error {
	return t.scan(ctx, check.Action{Table: "bulk"},
		"SELECT id, CASE count(*) WHEN $1::bigint THEN 'bulk ' ELSE 'a part of bulk ' END || id FROM w_bulk GROUP BY id ORDER BY id", bulkRows)
}

func (t *transaction) scan(ctx context.Context, a check.Action, sql string, args ...any) error {
	rows, err := t.q.Query(ctx, sql, args...)
	if err != nil {
		return err
	}
	a.Do = check.Scan
	var row check.Row
	if _, err := pgx.ForEachRow(rows, []any{&row.Row, &row.Key}, func() error { a.Rows = append(a.Rows, row); return nil }); err != nil {
		return err
	}
	t.did(a)
	return nil
}
