package node

import (
	"strconv"
	"time"

	"github.com/quorate/quorate/internal/config"
)

// sqlSettings are what every session begins with, to SHOW. They do not change while the node runs; what does is in quorate.status.
func (n *Node) sqlSettings() map[string]string {
	c := &n.cfg
	number := func(i int) string { return strconv.Itoa(i) }
	return map[string]string{
		"quorate.cluster": c.Cluster, "quorate.node": c.Node.String(), "quorate.role": c.Role, "quorate.version": n.version,

		"quorate.commit_timeout": duration(c.CommitTimeout), "quorate.max_staleness": duration(c.MaxStaleness), "quorate.reads_without_quorum": c.ReadsWithoutQuorum,
		"quorate.heartbeat.interval": duration(c.Heartbeat.Interval), "quorate.heartbeat.timeout": duration(c.Heartbeat.Timeout),

		"quorate.apply.workers": number(c.Apply.Workers), "quorate.limits.clients": number(c.Limits.Clients), "quorate.limits.message": size(c.Limits.Message),
		"quorate.limits.capture_memory": size(c.Limits.CaptureMemory), "quorate.limits.apply_transactions": number(c.Limits.ApplyTransactions),
		"quorate.limits.apply_memory": size(c.Limits.ApplyMemory), "quorate.limits.log": size(c.Limits.Log), "quorate.limits.clone_wal": size(c.Limits.CloneWAL),
		"quorate.limits.lag": number(c.Limits.Lag), "quorate.limits.lag_patience": duration(c.Limits.LagPatience),
	}
}

// duration writes one as PostgreSQL shows its own, in the largest unit that gives a whole number; it can be cast to interval.
func duration(d time.Duration) string {
	for _, unit := range []struct {
		of   time.Duration
		name string
	}{{24 * time.Hour, "d"}, {time.Hour, "h"}, {time.Minute, "min"}, {time.Second, "s"}, {time.Millisecond, "ms"}} {
		if d != 0 && d%unit.of == 0 {
			return strconv.FormatInt(int64(d/unit.of), 10) + unit.name
		}
	}
	return strconv.FormatInt(d.Microseconds(), 10) + "us"
}

// size writes one as PostgreSQL does, for whom MB are MiB; pg_size_bytes reads it.
func size(s config.Size) string {
	for _, unit := range []struct {
		of   config.Size
		name string
	}{{1 << 30, "GB"}, {1 << 20, "MB"}, {1 << 10, "kB"}} {
		if s != 0 && s%unit.of == 0 {
			return strconv.FormatInt(int64(s/unit.of), 10) + unit.name
		}
	}
	return strconv.FormatInt(int64(s), 10) + "B"
}
