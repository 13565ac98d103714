package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
	"github.com/quorate/quorate/test/cluster"
)

// initPgbench makes the tables of pgbench through node 1.
func initPgbench(t *testing.T, ctx context.Context, c *cluster.Cluster, scale int) {
	t.Helper()
	_, err := cluster.Pgbench{Address: c.Gateway(1), Args: []string{"-i", "-q", "-s", fmt.Sprint(scale)}}.Run(ctx)
	check(t, err)
	everywhere(t, ctx, c, int64(scale*100_000), "SELECT count(*) FROM pgbench_accounts")
}

// checkPgbench checks what holds after any number of pgbench's transactions: one row of history for each that was
// acknowledged, and all sums equal.
func checkPgbench(t *testing.T, ctx context.Context, c *cluster.Cluster, acknowledged int64) {
	t.Helper()
	everywhere(t, ctx, c, acknowledged, "SELECT count(*) FROM pgbench_history")
	everywhere(t, ctx, c, true, `SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)`)
}

// everyScript runs pgbench's three scripts in its three protocols, on all nodes at once. It returns how many transactions have
// left a row of history.
func everyScript(t *testing.T, ctx context.Context, c *cluster.Cluster) int64 {
	t.Helper()
	var acknowledged atomic.Int64
	for _, script := range []string{"tpcb-like", "simple-update", "select-only"} {
		var group sync.WaitGroup
		for n, protocol := range []string{"simple", "extended", "prepared"} {
			node := n%c.Nodes + 1
			group.Go(func() {
				r, err := cluster.Pgbench{
					Address: c.Gateway(node), Args: []string{"-b", script, "-M", protocol, "-t", "20"},
					Clients: 2, MaxTries: 10_000,
				}.Run(ctx)
				if err != nil {
					t.Errorf("%s, %s, node %d: %v", script, protocol, node, err)
					return
				}
				if r.Transactions != 40 || r.Failed > 0 {
					t.Errorf("%s, %s, node %d: %d transactions, %d failed", script, protocol, node, r.Transactions, r.Failed)
				}
				t.Logf("%-13s %-8s node %d: %5.0f tps, %d retries", script, protocol, node, r.TPS, r.Retries)
				if script != "select-only" {
					acknowledged.Add(r.Transactions)
				}
			})
		}
		group.Wait()
	}
	return acknowledged.Load()
}

// forStress skips a test that takes too long for every run, unless "make stress" runs it.
func forStress(t *testing.T) {
	t.Helper()
	if os.Getenv(stressVariable) == "" {
		t.Skipf("%s is not set: this is for make stress", stressVariable)
	}
}

// stressVariable is how long TestStress works, as a Go duration.
const stressVariable = "QUORATE_STRESS"

// stress is a mixed workload. Each part runs on every node at once, until the time is over, and knows afterwards
// what must be true.
type stress struct {
	c    *cluster.Cluster
	end  time.Time
	done struct{ hot, upserts, claims, local, family, definitions, pgbench atomic.Int64 }

	mu     sync.Mutex
	owners map[int64]int // who was told that a seat is his
	twice  error         // a seat that was acknowledged a second time
}

// TestStress runs pgbench's own transactions, and then many kinds at once.
func TestStress(t *testing.T) {
	duration, scale := 5*time.Second, 1 // loading the tables takes most of the time
	if text := os.Getenv(stressVariable); text != "" {
		var err error
		if duration, err = time.ParseDuration(text); err != nil {
			t.Fatalf("%s: %v", stressVariable, err)
		}
		scale = 5
	}
	c, _ := shared(t)
	ctx, cancel := context.WithTimeout(t.Context(), duration+5*testTimeout)
	defer cancel()
	initPgbench(t, ctx, c, scale)
	before := everyScript(t, ctx, c)
	create(t, ctx, c,
		"DROP TABLE IF EXISTS s_hot, s_upsert, s_claim, s_local, s_child, s_parent",
		"CREATE TABLE s_hot (id int PRIMARY KEY, n bigint NOT NULL)", "INSERT INTO s_hot VALUES (1, 0)",
		"CREATE TABLE s_upsert (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), k int UNIQUE, n bigint NOT NULL)",
		`CREATE OR REPLACE FUNCTION s_count(key int) RETURNS void LANGUAGE plpgsql AS $$
		BEGIN
			LOOP
				BEGIN
					INSERT INTO s_upsert (k, n) VALUES (key, 1);
					RETURN;
				EXCEPTION WHEN unique_violation THEN
					NULL;
				END;
				UPDATE s_upsert SET n = n + 1 WHERE k = key;
				IF found THEN
					RETURN;
				END IF;
			END LOOP;
		END $$`,
		"CREATE TABLE s_claim (id bigserial PRIMARY KEY, seat bigint UNIQUE, node int NOT NULL)",
		"CREATE TABLE s_local (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, node int, v text)",
		"CREATE TABLE s_parent (id int PRIMARY KEY)",
		"CREATE TABLE s_child (id bigserial PRIMARY KEY, parent int NOT NULL REFERENCES s_parent)",
	)
	s := &stress{c: c, end: time.Now().Add(duration), owners: map[int64]int{}}
	parts := map[string]func(context.Context, *pgx.Conn, int) error{
		"hot row": s.hotRow, "upsert": s.upsert, "unique key": s.claim, "local objects": s.local,
		"foreign key": s.family,
	}
	var group sync.WaitGroup
	for i := 1; i <= c.Nodes; i++ {
		for name, part := range parts {
			conn := gateway(t, ctx, c, i)
			group.Go(func() {
				for time.Now().Before(s.end) {
					if err := part(ctx, conn, i); err != nil {
						t.Errorf("%s on node %d: %v", name, i, err)
						return
					}
				}
			})
		}
		group.Go(func() {
			r, err := cluster.Pgbench{
				Address: c.Gateway(i), Args: []string{"-b", "tpcb-like"}, Clients: 2, Duration: duration, MaxTries: 10_000,
			}.Run(ctx)
			if err != nil {
				t.Errorf("pgbench on node %d: %v", i, err)
			}
			s.done.pgbench.Add(r.Transactions)
		})
	}
	definer := gateway(t, ctx, c, 1)
	group.Go(func() {
		for n := 0; time.Now().Before(s.end); n++ {
			if err := s.define(ctx, definer, n); err != nil {
				t.Errorf("definitions: %v", err)
				return
			}
		}
	})
	group.Wait()
	d := &s.done
	t.Logf("in %v: pgbench %d, hot row %d, upserts %d, seats %d, local objects %d, family %d, definitions %d", duration,
		d.pgbench.Load(), d.hot.Load(), d.upserts.Load(), d.claims.Load(), d.local.Load(), d.family.Load(), d.definitions.Load())
	checkPgbench(t, ctx, c, before+d.pgbench.Load())
	everywhere(t, ctx, c, d.hot.Load(), "SELECT n FROM s_hot")
	everywhere(t, ctx, c, d.upserts.Load(), "SELECT coalesce(sum(n), 0)::bigint FROM s_upsert")
	everywhere(t, ctx, c, d.local.Load(), "SELECT count(*) FROM s_local")
	everywhere(t, ctx, c, int64(0), "SELECT count(*) FROM s_child WHERE parent NOT IN (SELECT id FROM s_parent)")
	everywhere(t, ctx, c, d.claims.Load(), "SELECT count(*) FROM s_claim")
	if s.twice != nil {
		t.Error(s.twice)
	}
	rows, err := direct(t, ctx, c, 2).Query(ctx, "SELECT seat, node FROM s_claim")
	check(t, err)
	var seat int64
	var node int
	_, err = pgx.ForEachRow(rows, []any{&seat, &node}, func() error {
		if s.owners[seat] != node {
			return fmt.Errorf("seat %d is node %d's, acknowledged to %d", seat, node, s.owners[seat])
		}
		return nil
	})
	check(t, err)
	if d.hot.Load() == 0 || d.upserts.Load() == 0 || d.claims.Load() == 0 || d.local.Load() == 0 || d.family.Load() == 0 || d.pgbench.Load() == 0 {
		t.Error("some part did not get to do anything")
	}
}

func (s *stress) hotRow(ctx context.Context, conn *pgx.Conn, _ int) error {
	increment := increments[rand.IntN(len(increments))]
	err := retry(ctx, func() error { return increment.run(ctx, conn, "s_hot", 1) })
	if err != nil {
		return fmt.Errorf("%s: %w", increment.name, err)
	}
	s.done.hot.Add(1)
	return nil
}

func (s *stress) upsert(ctx context.Context, conn *pgx.Conn, _ int) error {
	err := retry(ctx, func() error {
		return pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "SELECT s_count($1)", rand.IntN(50))
			return err
		})
	})
	if err == nil {
		s.done.upserts.Add(1)
	}
	return err
}

// claim takes the lowest seat that this node sees free, as the other nodes do at the same time.
func (s *stress) claim(ctx context.Context, conn *pgx.Conn, node int) error {
	var seat int64
	if err := conn.QueryRow(ctx, "SELECT coalesce(max(seat), 0) + 1 FROM s_claim").Scan(&seat); err != nil {
		return err
	}
	_, err := conn.Exec(ctx, "INSERT INTO s_claim (seat, node) VALUES ($1, $2)", seat, node)
	if cluster.IsConflict(err) || cluster.SQLState(err) == "23505" {
		return nil
	}
	if err != nil {
		return err
	}
	s.done.claims.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if other, taken := s.owners[seat]; taken {
		s.twice = errors.Join(s.twice, fmt.Errorf("seat %d was acknowledged to node %d and to node %d", seat, other, node))
	}
	s.owners[seat] = node
	return nil
}

func (s *stress) local(ctx context.Context, conn *pgx.Conn, node int) error {
	err := retry(ctx, func() error {
		return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			for _, sql := range []string{
				"CREATE TEMP TABLE scratch (v text) ON COMMIT DROP",
				"INSERT INTO scratch VALUES ('temporary')",
				fmt.Sprintf("INSERT INTO s_local (node, v) SELECT %d, v FROM scratch", node),
				"NOTIFY stress, 'x'",
				"DECLARE held CURSOR WITH HOLD FOR SELECT v FROM scratch",
			} {
				if _, err := tx.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol); err != nil {
					return err
				}
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	var v string
	if err := conn.QueryRow(ctx, "FETCH FROM held", pgx.QueryExecModeSimpleProtocol).Scan(&v); err != nil {
		return fmt.Errorf("fetch from the holdable cursor: %w", err)
	}
	if _, err := conn.Exec(ctx, "CLOSE held"); err != nil {
		return err
	}
	s.done.local.Add(1)
	return nil
}

// family makes parents with children, or removes them, among few that all nodes share.
func (s *stress) family(ctx context.Context, conn *pgx.Conn, _ int) error {
	parent := rand.IntN(10)
	err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		statements := []string{"INSERT INTO s_parent VALUES ($1) ON CONFLICT DO NOTHING", "INSERT INTO s_child (parent) VALUES ($1)"}
		if rand.IntN(2) == 0 {
			statements = []string{"DELETE FROM s_child WHERE parent = $1", "DELETE FROM s_parent WHERE id = $1"}
		}
		for _, sql := range statements {
			if _, err := tx.Exec(ctx, sql, parent); err != nil {
				return err
			}
		}
		return nil
	})
	if cluster.IsConflict(err) || cluster.SQLState(err) == "23503" || cluster.SQLState(err) == "23505" {
		return nil
	}
	if err == nil {
		s.done.family.Add(1)
	}
	return err
}

func (s *stress) define(ctx context.Context, conn *pgx.Conn, n int) error {
	table := fmt.Sprintf("s_table%d", n)
	for _, sql := range []string{
		"CREATE TABLE " + table + " (id int PRIMARY KEY)",
		"INSERT INTO " + table + " SELECT generate_series(1, 10)",
		"ALTER TABLE " + table + " ADD COLUMN v text DEFAULT 'x'",
		"UPDATE " + table + " SET v = 'y' WHERE id > 5",
		"CREATE INDEX ON " + table + " (v)",
		"DROP TABLE " + table,
	} {
		if err := retry(ctx, func() error { _, err := conn.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol); return err }); err != nil {
			return fmt.Errorf("%s: %w", sql, err)
		}
	}
	s.done.definitions.Add(1)
	return nil
}

// TestCoreOnTwoMajors runs the core scenarios on a cluster that has the oldest major version that is supported, where most of
// them begin, beside the newest.
func TestCoreOnTwoMajors(t *testing.T) {
	parallel(t)
	older, newer := pgtest.Install(t, 17).BinDir, pgtest.Install(t, 18).BinDir
	o := options(t)
	o.Nodes, o.PGBins = 3, []string{older, newer, newer}
	c, ctx := privateBy(t, o, cluster.FoundTogether)
	for i, want := range []int{17, 18, 18} {
		equals(t, ctx, gateway(t, ctx, c, i+1), want, "SELECT current_setting('server_version_num')::int / 10000")
	}
	for _, s := range core {
		t.Run(s.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
			defer cancel()
			s.run(t, ctx, c)
			check(t, c.Verify(ctx))
		})
	}
	check(t, c.Stop())
}
