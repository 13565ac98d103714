package cluster_test

import (
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
)

// TestAwayForTooLong: when a node comes back, the others' logs do not reach back to where its own ends. It joins anew by
// itself, with a copy of another's data. All the while large transactions are being ordered, most often two at once: neither do
// they keep the logs, nor are they torn where a log, or the copy, begins.
func TestAwayForTooLong(t *testing.T) {
	forStress(t)
	parallel(t)
	c, ctx := configured(t, "limits: {log: 1MiB}")
	create(t, ctx, c, "CREATE TABLE kept (id int PRIMARY KEY, filler text NOT NULL)")
	_, away := leaderOf(t, ctx, c)
	check(t, c.KillNode(ctx, away))
	stays := others(c, away)

	// More than 64 MiB: the log is truncated by whole files.
	var writers sync.WaitGroup
	var written atomic.Int32
	var enough atomic.Bool
	for _, i := range stays {
		conn := gateway(t, ctx, c, i)
		writers.Go(func() {
			for n := range 16 {
				if enough.Load() {
					return
				}
				if _, err := conn.Exec(ctx, "INSERT INTO kept SELECT $1 + n, repeat(md5(n::text), 32768) FROM generate_series(1, 4) n", i*100_000+n*10); err != nil {
					t.Errorf("write at node %d: %v", i, err)
					return
				}
				written.Add(1)
			}
		})
	}
	defer writers.Wait() // what they use is closed behind it
	defer enough.Store(true)
	eventuallyEvery(t, ctx, asking, func() error {
		if n := written.Load(); n < 20 {
			return fmt.Errorf("%d large transactions are written", n)
		}
		for _, i := range stays {
			bytes, err := strconv.ParseFloat(metric(t, ctx, c, i, "quorate_consensus_log_bytes"), 64)
			if err != nil || bytes > 24<<20 { // two that are under way, and what has come since the last snapshot
				return fmt.Errorf("node %d keeps %.0f bytes of its log: %w", i, bytes, err)
			}
		}
		return nil
	})

	check(t, c.StartNode(away))
	eventuallyEvery(t, ctx, asking, func() error {
		all, err := members(ctx, c, stays[0])
		if err != nil {
			return err
		}
		active := 0
		for _, m := range all {
			if m.State == "active" {
				active++
			}
		}
		if active != 3 || slices.ContainsFunc(all, func(m member) bool { return m.ID == away }) {
			return fmt.Errorf("the members are %+v", all)
		}
		return nil
	})
	enough.Store(true)
	writers.Wait()
	must(t, ctx, gateway(t, ctx, c, away), "INSERT INTO kept VALUES (-1, 'here again')")
	if v, err := c.VerifyOnline(ctx, stays[0]); err != nil || len(v.Members) != 3 || len(v.Differing) > 0 {
		t.Errorf("verify: %+v, %v", v, err)
	}
	check(t, c.Stop())
}
