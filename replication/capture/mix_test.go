package capture

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
)

// TestMix holds capture against the server's ordinary decoding after commit: for a random mix of statements from
// concurrent clients, every transaction had at its marker exactly the changes that it turned out to have, in their
// order. Limits are small, so that spilling and cutting take part.
func TestMix(t *testing.T) {
	t.Parallel()
	versions(t, func(t *testing.T, major int) {
		const clients, rounds, seed = 6, 100, 42
		n := newNode(t, major, Limits{TransactionMemory: 2000, Memory: 8000, PartSize: 3000})
		setup := n.client()
		setup.run(`CREATE TABLE shared (id int PRIMARY KEY, u int UNIQUE, v text);
			CREATE TABLE fat (id int PRIMARY KEY, n int, v text); ALTER TABLE fat ALTER v SET STORAGE EXTERNAL;
			CREATE TABLE keyless (v text); CREATE TABLE wide (id int PRIMARY KEY, v text); ALTER TABLE wide REPLICA IDENTITY FULL;
			CREATE TYPE mood AS ENUM ('good', 'bad'); CREATE TABLE typed (m mood, d date, f float8, b bytea, i interval, j jsonb, a int[]);
			CREATE TABLE parted (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
			CREATE TABLE parted1 PARTITION OF parted FOR VALUES FROM (0) TO (50); CREATE TABLE parted2 PARTITION OF parted FOR VALUES FROM (50) TO (1000)`)
		setup.exec("SELECT pg_create_logical_replication_slot('plain', 'pgoutput')")
		var mu sync.Mutex
		captured := make(map[uint32][]string)
		nudged, committed := 0, 0
		var wg sync.WaitGroup
		for w := range clients {
			c := n.client()
			rng := rand.New(rand.NewPCG(seed, uint64(w)))
			c.exec("SET lock_timeout = '100ms'; SET default_transaction_isolation = 'read committed'; CREATE TEMP TABLE tmp (id int)")
			wg.Go(func() {
				for round := range rounds {
					xid, lines, nudges, ok := c.mixed(rng, w, round)
					if !ok {
						continue
					}
					mu.Lock()
					captured[xid] = lines
					nudged += nudges
					committed++
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if t.Failed() {
			return
		}
		want := n.decodePlain()
		changes := 0
		for xid, lines := range want {
			changes += len(lines)
			if got, ok := captured[xid]; !ok && len(lines) > 0 {
				t.Errorf("xid %d was not captured: %q", xid, lines)
			} else if !slices.Equal(got, lines) {
				t.Errorf("xid %d at its marker\n%s\nafter commit\n%s", xid, strings.Join(got, "\n"), strings.Join(lines, "\n"))
			}
			delete(captured, xid)
		}
		for xid, lines := range captured {
			if len(lines) > 0 {
				t.Errorf("xid %d: captured but never committed: %q", xid, lines)
			}
		}
		t.Logf("seed %d: %d transactions, %d changes, %d nudges", seed, committed, changes, nudged)
		if committed < clients*rounds/4 || changes < committed {
			t.Error("too little was tried")
		}
		if len(n.sink.strays) > 0 {
			t.Errorf("stray %+v", <-n.sink.strays)
		}
		if got := counter(t, n, "quorate_capture_memory_bytes", ""); got != 0 {
			t.Errorf("%v bytes left in the books", got)
		}
	})
}

// mixed runs one random transaction; ok says that it committed.
func (c *client) mixed(rng *rand.Rand, w, round int) (xid uint32, lines []string, nudges int, ok bool) {
	c.t.Helper()
	own := fmt.Sprintf("own%d_%d", w, round/4) // so that later transactions find it
	id := func() int { return rng.IntN(60) }
	statements := []func() string{
		func() string {
			return fmt.Sprintf("INSERT INTO shared VALUES (%d, %d, 'x') ON CONFLICT (id) DO UPDATE SET v = shared.v || 'y'", id(), id())
		},
		func() string {
			return fmt.Sprintf("INSERT INTO shared VALUES (%d, %d, 'x') ON CONFLICT (id) DO NOTHING", id(), id())
		},
		func() string { return fmt.Sprintf("UPDATE shared SET id = %d WHERE id = %d", id(), id()) },
		func() string { return fmt.Sprintf("DELETE FROM shared WHERE id = %d", id()) },
		func() string {
			return fmt.Sprintf("INSERT INTO fat VALUES (%d, 0, repeat('f', %d)) ON CONFLICT (id) DO UPDATE SET v = excluded.v", id(), 1500+rng.IntN(6000))
		},
		func() string { return fmt.Sprintf("UPDATE fat SET n = n + 1 WHERE id = %d", id()) }, // leaves TOAST unchanged
		func() string {
			return fmt.Sprintf("INSERT INTO keyless SELECT i::text FROM generate_series(1, %d) i", rng.IntN(30))
		},
		func() string {
			return fmt.Sprintf("INSERT INTO wide VALUES (%d, 'w') ON CONFLICT (id) DO UPDATE SET v = wide.v || 'z'", id())
		},
		func() string { return fmt.Sprintf("DELETE FROM wide WHERE id = %d", id()) },
		func() string {
			return `INSERT INTO typed VALUES ('bad', '2024-02-29', 0.1, '\x00ff', '1 day 2 hours', '{"a": [1.0]}', '{1,NULL}')`
		},
		func() string {
			return fmt.Sprintf("INSERT INTO parted VALUES (%d, 'p') ON CONFLICT (id) DO NOTHING", id())
		},
		func() string { return fmt.Sprintf("UPDATE parted SET id = %d WHERE id = %d", id(), id()) },
		func() string { return fmt.Sprintf("INSERT INTO tmp SELECT generate_series(1, %d)", rng.IntN(50)) },
		func() string { return "SELECT * FROM shared LIMIT 3 FOR UPDATE" },
		func() string { return "TRUNCATE keyless" },
		func() string { return fmt.Sprintf("CREATE TABLE %s (id serial PRIMARY KEY)", own) },
		func() string { return fmt.Sprintf("ALTER TABLE %s ADD v%d text DEFAULT 'd'", own, id()) },
		func() string { return fmt.Sprintf("INSERT INTO %s DEFAULT VALUES", own) },
	}
	savepoints := 0
	c.exec("BEGIN; SELECT pg_current_xact_id()")
	if err := c.conn.QueryRow(context.Background(), "SELECT pg_current_xact_id()::xid::text::bigint").Scan(&xid); err != nil {
		c.t.Errorf("xid: %v", err)
		return 0, nil, 0, false
	}
	for range 1 + rng.IntN(8) {
		switch rng.IntN(6) {
		case 0:
			savepoints++
			c.exec(fmt.Sprintf("SAVEPOINT p%d", savepoints))
		case 1:
			if savepoints > 0 {
				c.exec(fmt.Sprintf("ROLLBACK TO p%d", savepoints))
			}
		case 2:
			if savepoints > 0 {
				c.exec(fmt.Sprintf("RELEASE p%d", savepoints))
				savepoints--
			}
		default:
			c.exec("SAVEPOINT one")
			if c.try(statements[rng.IntN(len(statements))]()) != nil {
				c.exec("ROLLBACK TO one")
			}
			if rng.IntN(2) == 0 {
				c.exec("RELEASE one")
			}
		}
	}
	if rng.IntN(6) == 0 {
		c.exec("ROLLBACK")
		return 0, nil, 0, false
	}
	r, nudges := c.ready()
	if r.set == nil {
		c.exec("ROLLBACK")
		return 0, nil, 0, false
	}
	lines = render(c.t, r)
	c.exec("COMMIT")
	return xid, lines, nudges, true
}

// decodePlain decodes everything that was committed since slot plain was made, the ordinary way.
func (n *node) decodePlain() map[uint32][]string {
	n.t.Helper()
	conn := pgtest.Connect(n.t, n.server, "postgres")
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := conn.PgConn().Exec(ctx, "SET timezone = 'UTC'; SET datestyle = 'ISO, YMD'; SET extra_float_digits = 3; SET search_path = pg_catalog").ReadAll(); err != nil {
		n.t.Fatal(err)
	}
	rows, err := conn.Query(ctx, `SELECT data FROM pg_logical_slot_get_binary_changes('plain', NULL, NULL,
		'proto_version', '1', 'publication_names', 'quorate', 'messages', 'true')`)
	if err != nil {
		n.t.Fatal(err)
	}
	defer rows.Close()
	result := make(map[uint32][]string)
	rd := newReader(n.t)
	var xid uint32
	for rows.Next() {
		var message []byte
		if err := rows.Scan(&message); err != nil {
			n.t.Fatal(err)
		}
		if message[0] == 'B' {
			xid = binary.BigEndian.Uint32(message[17:])
			result[xid] = nil
		} else if line := rd.read(message); line != "" {
			result[xid] = append(result[xid], line)
		}
	}
	if err := rows.Err(); err != nil {
		n.t.Fatal(err)
	}
	return result
}
