package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/test/cluster"
)

// side is one of those that are compared.
type side struct {
	name  string
	nodes []string // addresses; the clients are split among them
	stock bool     // its costs are the stock server's
	// audience: somebody looks at every node meanwhile
	audience bool
}

// sample is one run of a side.
type sample struct {
	tps, retries float64
	transactions float64
	costs        []counters    // used by each server
	behind       time.Duration // from the end of pgbench until all nodes showed everything
}

// maxTries bounds how often pgbench repeats a transaction that ended in a serialization failure: all sides run at
// repeatable read, where those are part of the game, and one that stays undone is an error.
const maxTries = 10_000

func measure(ctx context.Context, p plan, where place, install pgserver.Install, stdout, progress io.Writer) (err error) {
	r, err := newRig(ctx, p, where, install, progress)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	writes := slices.DeleteFunc(slices.Clone(p.scripts), func(s string) bool { return s == "select-only" || s == "control-room" })
	if len(writes) > 0 {
		if err := r.measureWrites(ctx, p, where, writes, stdout, progress); err != nil {
			return err
		}
	}
	if slices.Contains(p.scripts, "select-only") {
		if err := r.measureReads(ctx, p, where, stdout, progress); err != nil {
			return err
		}
	}
	if slices.Contains(p.scripts, "control-room") {
		if err := r.measureControl(ctx, p, where, stdout, progress); err != nil {
			return err
		}
	}
	// A cluster that lost something on the way would be no basis for a comparison.
	return r.cluster.Verify(ctx)
}

func (r *rig) measureWrites(ctx context.Context, p plan, where place, scripts []string, stdout, progress io.Writer) error {
	one := side{name: "one node", nodes: []string{r.cluster.Gateway(1)}}
	three := side{name: "three nodes", nodes: []string{r.cluster.Gateway(1), r.cluster.Gateway(2), r.cluster.Gateway(3)}}
	stock := side{name: "stock", nodes: []string{r.stockAddress()}, stock: true}
	var speed, costs strings.Builder
	for _, script := range scripts {
		for _, clients := range p.clients {
			sides := []side{stock, one, three}
			if clients < len(three.nodes) {
				sides = sides[:2]
			}
			samples, err := r.rounds(ctx, p, where, script, clients, sides, true, progress)
			if err != nil {
				return err
			}
			fmt.Fprintf(&speed, "| %s | %d | %.0f |", script, clients, median(samples[0], tps))
			for s := 1; s < 3; s++ {
				if s >= len(samples) {
					speed.WriteString(" – | – | – |")
					continue
				}
				fmt.Fprintf(&speed, " %.0f | **%.2f** | %.0f |", median(samples[s], tps), ratio(samples[s], samples[0]),
					1000*median(samples[s], func(m sample) float64 { return m.behind.Seconds() }))
			}
			speed.WriteString("\n")
			for s, side := range sides {
				for server := range samples[s][0].costs {
					name := "stock"
					if !side.stock {
						name = fmt.Sprintf("%s, node %d", side.name, server+1)
					}
					each := func(decimals int, value func(counters) float64) string {
						v := median(samples[s], func(m sample) float64 { return value(m.costs[server]) / m.transactions })
						if math.IsNaN(v) {
							return "–"
						}
						return strconv.FormatFloat(v, 'f', decimals, 64)
					}
					fmt.Fprintf(&costs, "| %s | %d | %s | %s | %s | %s | %s | %s | %s |\n", script, clients, name,
						each(2, func(c counters) float64 { return c.flushes }),
						each(2, func(c counters) float64 { return c.sidecarFlushes }),
						each(2, func(c counters) float64 { return c.entries }),
						each(0, func(c counters) float64 { return c.wal }),
						each(0, func(c counters) float64 { return float64(c.postgres.Microseconds()) }),
						each(0, func(c counters) float64 { return float64(c.sidecar.Microseconds()) }))
				}
			}
		}
	}
	fmt.Fprintf(stdout, `### Writes, on %s

Transactions per second and their ratio to stock; "behind" is how long after the last COMMIT all nodes had it all.

| script | clients | stock | one node | ratio | behind, ms | three nodes | ratio | behind, ms |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
%s
For each committed transaction, on each server:

| script | clients | server | flushes, PostgreSQL | flushes, sidecar | log entries | WAL bytes | CPU µs, PostgreSQL | CPU µs, sidecar |
|---|---:|---|---:|---:|---:|---:|---:|---:|
%s
`, where.name, speed.String(), costs.String())
	return nil
}

func (r *rig) measureReads(ctx context.Context, p plan, where place, stdout, progress io.Writer) error {
	for _, mode := range []string{"session", "transaction"} {
		if mode == "transaction" && p.protocol == "prepared" {
			continue // Debian 12's pgbouncer knows prepared statements in session mode only
		}
		if err := r.startBouncer(ctx, mode); err != nil {
			return err
		}
	}
	sides := []side{
		{name: "direct", nodes: []string{r.cluster.Postgres(1)}},
		{name: "gateway", nodes: []string{r.cluster.Gateway(1)}},
	}
	for _, mode := range []string{"session", "transaction"} {
		if b := r.bouncers[mode]; b != nil {
			sides = append(sides, side{name: "pgbouncer, " + mode, nodes: []string{b.address}})
		}
	}
	var table strings.Builder
	for _, clients := range p.clients {
		samples, err := r.rounds(ctx, p, where, "select-only", clients, sides, false, progress)
		if err != nil {
			return err
		}
		fmt.Fprintf(&table, "| %d | %.0f |", clients, median(samples[0], tps))
		for s := 1; s < 4; s++ {
			if s >= len(samples) {
				table.WriteString(" – | – |")
				continue
			}
			fmt.Fprintf(&table, " %.0f | **%.2f** |", median(samples[s], tps), ratio(samples[s], samples[0]))
		}
		table.WriteString("\n")
	}
	fmt.Fprintf(stdout, `### Reads (select-only), on %s

All against the PostgreSQL of node 1; transactions per second and their ratio to direct connections.

| clients | direct | gateway | ratio | pgbouncer, session pooling | ratio | pgbouncer, transaction pooling | ratio |
|---:|---:|---:|---:|---:|---:|---:|---:|
%s
`, where.name, table.String())
	return nil
}

// rounds runs every side once in each round. The result is by side, then by round.
func (r *rig) rounds(ctx context.Context, p plan, where place, script string, clients int, sides []side, costs bool, progress io.Writer) ([][]sample, error) {
	samples := make([][]sample, len(sides))
	for round := range p.rounds {
		for s, side := range sides {
			m, err := r.run(ctx, p, script, clients, side, costs)
			if err != nil {
				return nil, fmt.Errorf("%s with %d clients, %s: %w", script, clients, side.name, err)
			}
			samples[s] = append(samples[s], m)
			fmt.Fprintf(progress, "%s: %s, %d clients, round %d, %s: %.0f/s, %.0f retries, behind %v\n",
				where.name, script, clients, round+1, side.name, m.tps, m.retries, m.behind.Round(time.Millisecond))
		}
	}
	return samples, nil
}

// run runs one side once, with one pgbench for each of its nodes.
func (r *rig) run(ctx context.Context, p plan, script string, clients int, s side, costs bool) (m sample, err error) {
	var before []counters
	if costs {
		if before, err = r.read(ctx, s.stock); err != nil {
			return m, err
		}
	}
	if s.audience {
		leave := r.watch(ctx, p.binary)
		defer func() { err = errors.Join(err, leave()) }()
	}
	limit, cancel := context.WithTimeout(ctx, p.duration+time.Minute)
	defer cancel()
	results := make([]cluster.PgbenchResult, len(s.nodes))
	errs := make([]error, len(s.nodes))
	var group sync.WaitGroup
	for i, address := range s.nodes {
		share := clients / len(s.nodes)
		if i < clients%len(s.nodes) {
			share++
		}
		group.Go(func() {
			results[i], errs[i] = cluster.Pgbench{
				Address: address, Args: []string{"-b", script, "-M", p.protocol},
				Clients: share, Duration: p.duration, MaxTries: maxTries,
			}.Run(limit)
		})
	}
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		return m, err
	}
	for _, result := range results {
		m.tps += result.TPS
		m.transactions += float64(result.Transactions)
		m.retries += float64(result.Retries)
		if result.Failed > 0 {
			return m, fmt.Errorf("%d transactions failed %d times each", result.Failed, maxTries)
		}
	}
	if m.transactions == 0 {
		return m, errors.New("not one transaction was committed")
	}
	if !costs {
		return m, nil
	}
	if !s.stock {
		begin := time.Now()
		if err := r.cluster.Settle(limit); err != nil {
			return m, err
		}
		m.behind = time.Since(begin)
	}
	after, err := r.read(ctx, s.stock)
	if err != nil {
		return m, err
	}
	for i := range after {
		m.costs = append(m.costs, after[i].minus(before[i]))
	}
	return m, nil
}

func tps(m sample) float64 { return m.tps }

// median returns the median over rounds.
func median(samples []sample, value func(sample) float64) float64 {
	var all []float64
	for _, m := range samples {
		all = append(all, value(m))
	}
	return middle(all)
}

// ratio returns the median of the ratios within each round.
func ratio(a, b []sample) float64 {
	var all []float64
	for i := range a {
		all = append(all, a[i].tps/b[i].tps)
	}
	return middle(all)
}

func middle(all []float64) float64 {
	slices.Sort(all)
	n := len(all)
	return (all[(n-1)/2] + all[n/2]) / 2
}

// describe prints what must be known to read the tables.
func describe(out io.Writer, p plan, version string) {
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		kernel = []byte("unknown")
	}
	fmt.Fprintf(out, `## Benchmark

One machine with %d CPUs (Linux %s) runs everything: pgbench, stock PostgreSQL %s, and a cluster of three.
Scale %d, protocol %s, %v per run, medians of %d interleaved rounds, all at repeatable read.

`, runtime.NumCPU(), strings.TrimSpace(string(kernel)), version, p.scale, p.protocol, p.duration, p.rounds)
}
