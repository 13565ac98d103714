package cluster_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestVerify: under load all nodes have equal rows at any one place in the log; and what is not equal is found.
func TestVerify(t *testing.T) {
	c, ctx := shared(t)
	create(t, ctx, c, "CREATE TABLE verified (id int PRIMARY KEY, n bigint NOT NULL)", "CREATE TABLE untouched (id int PRIMARY KEY)",
		"INSERT INTO verified SELECT i, 0 FROM generate_series(1, 300) i", "INSERT INTO untouched VALUES (1)")
	check(t, c.Settle(ctx))

	working, stop := context.WithCancel(ctx)
	var writers sync.WaitGroup
	for i := 1; i <= c.Nodes; i++ {
		for w := range 4 {
			conn := gateway(t, ctx, c, i)
			writers.Go(func() {
				for n := i*4 + w; working.Err() == nil; n += 17 {
					sql := fmt.Sprintf("UPDATE verified SET n = n + 1 WHERE id = %d", 1+n%300)
					if err := retry(ctx, func() error { _, err := conn.Exec(ctx, sql); return err }); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
	}
	first, last := uint64(0), uint64(0)
	for n := range 6 {
		v, err := c.VerifyOnline(ctx, 1+n%c.Nodes)
		if err != nil {
			t.Errorf("verify: %v", err)
			continue
		}
		if v.CSN <= last || len(v.Members) != c.Nodes || len(v.Differing) > 0 {
			t.Errorf("after CSN %d: %+v", last, v)
		}
		if last = v.CSN; first == 0 {
			first = last
		}
	}
	stop()
	writers.Wait()
	if last-first < 50 {
		t.Errorf("from CSN %d to %d there was no load: nothing is tested", first, last)
	}

	check(t, c.Settle(ctx))
	conn := direct(t, ctx, c, 2)
	must(t, ctx, conn, "SET default_transaction_read_only = off")
	before := one[int64](t, ctx, conn, "SELECT n FROM verified WHERE id = 7")
	must(t, ctx, conn, "UPDATE verified SET n = -1 WHERE id = 7") // behind everybody's back
	v, err := c.VerifyOnline(ctx, 1)
	if err == nil || !strings.Contains(err.Error(), "exit status 1") || !strings.Contains(err.Error(), "members differ in public.verified") ||
		!slices.Equal(v.Differing, []string{"public.verified"}) {
		t.Errorf("with a row of node 2 changed: %+v, %v", v, err)
	}
	must(t, ctx, conn, "UPDATE verified SET n = $1 WHERE id = 7", before)
	_, err = c.VerifyOnline(ctx, 3)
	check(t, err)

	// What tests look for after they have worked is found as well.
	must(t, ctx, conn, "SELECT pg_create_physical_replication_slot('theirs')")
	stuck, cancel := context.WithCancel(ctx)
	var sleeping sync.WaitGroup
	defer sleeping.Wait()
	defer cancel()
	sleeper := direct(t, ctx, c, 2)
	sleeping.Go(func() { _ = execute(stuck, sleeper.PgConn(), "SELECT pg_sleep(600)") }) // until it is cancelled
	// It is left when it has gone on for a second.
	awaitQuery(t, ctx, conn, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND query ~ 'pg_sleep' AND state_change < clock_timestamp() - interval '1.1 seconds')", sleeper.PgConn().PID())
	looking, stop := context.WithTimeout(ctx, 2*time.Second)
	defer stop()
	if err := c.CheckLeftovers(looking); err == nil || !strings.Contains(err.Error(), "replication slot theirs") || !strings.Contains(err.Error(), "pg_sleep(600)") {
		t.Fatalf("a slot and a statement are left: %v", err)
	}
	must(t, ctx, conn, "SELECT pg_drop_replication_slot('theirs')")
}
