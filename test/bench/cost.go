package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/quorate/quorate/test/cluster"
)

// counters are what one server, and its sidecar if it has one, have used since they started.
type counters struct {
	flushes        float64 // of WAL, by PostgreSQL
	sidecarFlushes float64 // of the Raft log
	entries        float64 // of the Raft log
	wal            float64 // bytes
	postgres       time.Duration
	sidecar        time.Duration
}

func (c counters) minus(o counters) counters {
	return counters{
		c.flushes - o.flushes, c.sidecarFlushes - o.sidecarFlushes, c.entries - o.entries,
		c.wal - o.wal, c.postgres - o.postgres, c.sidecar - o.sidecar,
	}
}

// cpuTime is what all servers have used, and their sidecars.
func cpuTime(all []counters) (sum time.Duration) {
	for _, c := range all {
		sum += c.postgres + c.sidecar
	}
	return sum
}

// statisticsDelay is how long PostgreSQL may keep a backend's counters to itself.
const statisticsDelay = 1100 * time.Millisecond

// readServer reads the counters of a PostgreSQL with this postmaster.
func readServer(ctx context.Context, address string, postmaster int) (c counters, err error) {
	conn, err := pgx.Connect(ctx, cluster.URL(address))
	if err != nil {
		return c, fmt.Errorf("read counters: %w", err)
	}
	defer conn.Close(ctx)
	var version int
	if err := conn.QueryRow(ctx, "SELECT current_setting('server_version_num')::int").Scan(&version); err != nil {
		return c, fmt.Errorf("read counters: %w", err)
	}
	// PostgreSQL 18 moved the number of WAL flushes from one view to another.
	flushes := "SELECT sum(fsyncs)::float8 FROM pg_stat_io WHERE object = 'wal'"
	if version < 180000 {
		flushes = "SELECT wal_sync::float8 FROM pg_stat_wal"
	}
	if err := conn.QueryRow(ctx, flushes).Scan(&c.flushes); err != nil {
		return c, fmt.Errorf("read counters: %w", err)
	}
	if err := conn.QueryRow(ctx, "SELECT (pg_current_wal_insert_lsn() - '0/0')::float8").Scan(&c.wal); err != nil {
		return c, fmt.Errorf("read counters: %w", err)
	}
	c.sidecarFlushes, c.entries = math.NaN(), math.NaN() // a stock server has no sidecar
	tree, err := cluster.Tree(postmaster)
	if err != nil {
		return c, err
	}
	if len(tree) == 0 {
		return c, fmt.Errorf("read counters: postmaster %d does not run", postmaster)
	}
	for _, p := range tree {
		c.postgres += p.CPU + p.Reaped
	}
	return c, nil
}

// read returns the counters of the stock server, or of all nodes of the cluster.
func (r *rig) read(ctx context.Context, stock bool) ([]counters, error) {
	select {
	case <-time.After(statisticsDelay):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if stock {
		c, err := readServer(ctx, r.stockAddress(), r.stock.PID())
		return []counters{c}, err
	}
	var all []counters
	for i := 1; i <= r.cluster.Nodes; i++ {
		postmaster, err1 := r.cluster.PostmasterPID(i)
		sidecar, err2 := r.cluster.SidecarPID(i)
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		c, err := readServer(ctx, r.cluster.Postgres(i), postmaster)
		if err != nil {
			return nil, err
		}
		process, err := cluster.ReadProcess(sidecar)
		if err != nil {
			return nil, err
		}
		c.sidecar = process.CPU
		if err := c.readSidecar(ctx, r.cluster.HTTP(i)); err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return all, nil
}

// The sidecar's own counters, at its metrics address. One that a version does not export is NaN, shown as a dash.
const (
	flushMetric   = "quorate_consensus_log_flushes_total"
	entriesMetric = "quorate_consensus_last_index"
)

// get asks a node's HTTP server for something that is there.
func get(ctx context.Context, url string) (io.ReadCloser, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		return nil, errors.Join(fmt.Errorf("%s: %s", url, response.Status), response.Body.Close())
	}
	return response.Body, nil
}

// readSidecar reads the sidecar's own counters into c.
func (c *counters) readSidecar(ctx context.Context, address string) error {
	body, err := get(ctx, "http://"+address+"/metrics")
	if err != nil {
		return fmt.Errorf("read metrics: %w", err)
	}
	defer body.Close()
	values := map[string]float64{flushMetric: math.NaN(), entriesMetric: math.NaN()}
	lines := bufio.NewScanner(body)
	for lines.Scan() {
		name, text, ok := strings.Cut(lines.Text(), " ")
		if !ok || name != flushMetric && name != entriesMetric {
			continue
		}
		if values[name], err = strconv.ParseFloat(text, 64); err != nil {
			return fmt.Errorf("read metrics: %q: %w", lines.Text(), err)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read metrics: %w", err)
	}
	c.sidecarFlushes, c.entries = values[flushMetric], values[entriesMetric]
	return nil
}
