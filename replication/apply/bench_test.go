package apply

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/internal/pgserver/pgtest"
	"github.com/quorate/quorate/txn"
)

// BenchmarkPipeline applies a backlog of transactions of two row changes each.
func BenchmarkPipeline(b *testing.B) {
	for _, group := range []int{1, 4, 32} {
		b.Run(fmt.Sprintf("group=%d", group), func(b *testing.B) {
			c := newCluster(b, 18, "CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t SELECT g, 0 FROM generate_series(0, 99999) g; CREATE TABLE h (id int, n int);")
			const distinct = 1000
			var transactions []string
			for n := range distinct {
				transactions = append(transactions, fmt.Sprintf("UPDATE t SET n = n + 1 WHERE id = %d; INSERT INTO h VALUES (%d, 1)", n*97%100000, n))
			}
			items := c.run(transactions...)
			cfg := c.config()
			cfg.GroupItems, cfg.Logger = group, nil
			p := start(b, cfg)
			p.idleWorkers(4)
			b.ReportAllocs()
			b.ResetTimer()
			for n := range b.N {
				item := items[n%distinct]
				item.CSN = txn.CSN(n + 1)
				p.enqueue(item)
			}
			p.await(txn.CSN(b.N))
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "txn/s")
		})
	}
}

// BenchmarkLatency applies one transaction after another: the time from Enqueue to visible when nothing else goes on.
func BenchmarkLatency(b *testing.B) {
	c := newCluster(b, 18, "CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t SELECT g, 0 FROM generate_series(0, 9999) g; CREATE TABLE h (id int, n int);")
	items := c.run("UPDATE t SET n = n + 1 WHERE id = 7; INSERT INTO h VALUES (7, 1)")
	cfg := c.config()
	cfg.Logger = nil
	p := start(b, cfg)
	p.idleWorkers(4)
	b.ReportAllocs()
	b.ResetTimer()
	for n := range b.N {
		items[0].CSN = txn.CSN(n + 1)
		p.apply(items)
	}
}

// BenchmarkCommit compares, with the bare protocol, a COMMIT that is held back with PREPARE TRANSACTION and COMMIT
// PREPARED: four workers execute groups of transactions of two row changes in parallel, and become visible in order.
func BenchmarkCommit(b *testing.B) {
	for _, place := range []struct {
		name  string
		tmpfs bool
		fsync string
	}{{"disk", false, "on"}, {"tmpfs", true, "off"}} {
		for _, group := range []int{1, 4, 16} {
			for _, prepare := range []bool{true, false} {
				way := map[bool]string{true: "prepare", false: "held"}[prepare]
				b.Run(fmt.Sprintf("%s/group=%d/%s", place.name, group, way), func(b *testing.B) {
					s := pgtest.Start(b, pgtest.Options{Tmpfs: place.tmpfs, Settings: pgserver.Settings{"fsync": place.fsync, "max_prepared_transactions": "20"}})
					benchmarkCommit(b, s, group, prepare)
				})
			}
		}
	}
}

func benchmarkCommit(b *testing.B, s *pgserver.Server, group int, prepare bool) {
	const workers = 4
	ctx := context.Background()
	admin := pgtest.Connect(b, s, "postgres")
	if err := admin.PgConn().Exec(ctx, "CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t SELECT g, 0 FROM generate_series(0, 99999) g; CREATE TABLE h (id int, n int)").Close(); err != nil {
		b.Fatal(err)
	}
	run := func(conn *pgconn.PgConn, batch *pgconn.Batch) {
		if err := conn.ExecBatch(ctx, batch).Close(); err != nil {
			b.Error(err)
		}
	}
	groups := (b.N + group - 1) / group
	turn := make([]chan struct{}, groups+1) // closed when it is that group's turn
	for i := range turn {
		turn[i] = make(chan struct{})
	}
	close(turn[0])
	var next atomic.Int64
	var wg sync.WaitGroup
	var conns []*pgconn.PgConn
	for range workers {
		conn := pgtest.Connect(b, s, "postgres").PgConn()
		for _, sql := range []string{"SET synchronous_commit = off", "SET session_replication_role = replica", "SET plan_cache_mode = force_generic_plan"} {
			if err := conn.Exec(ctx, sql).Close(); err != nil {
				b.Fatal(err)
			}
		}
		for name, sql := range map[string]string{"u": "UPDATE t SET n = $1 WHERE id = $2", "i": "INSERT INTO h VALUES ($1, $2)", "b": "BEGIN"} {
			if _, err := conn.Prepare(ctx, name, sql, nil); err != nil {
				b.Fatal(err)
			}
		}
		conns = append(conns, conn)
	}
	b.ResetTimer()
	for _, conn := range conns {
		wg.Go(func() {
			for {
				g := int(next.Add(1)) - 1
				if g >= groups {
					return
				}
				var batch pgconn.Batch
				batch.ExecPrepared("b", nil, nil, nil)
				for n := range group {
					id := fmt.Appendf(nil, "%d", (g*group+n)%100000)
					batch.ExecPrepared("u", [][]byte{[]byte("1"), id}, nil, nil)
					batch.ExecPrepared("i", [][]byte{id, []byte("1")}, nil, nil)
				}
				gid := fmt.Sprintf("'g%d'", g)
				if prepare {
					batch.ExecParams("PREPARE TRANSACTION "+gid, nil, nil, nil, nil)
				}
				run(conn, &batch)
				<-turn[g]
				finish := "COMMIT"
				if prepare {
					finish = "COMMIT PREPARED " + gid
				}
				if err := conn.Exec(ctx, finish).Close(); err != nil {
					b.Error(err)
				}
				close(turn[g+1])
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(groups*group)/b.Elapsed().Seconds(), "txn/s")
}
