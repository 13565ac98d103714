package consensus

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// BenchmarkPropose measures three members in this process, with their files in the test's directory: time of a
// proposal, its 50th percentile, and CPU time of all members together.
func BenchmarkPropose(b *testing.B) {
	for _, proposers := range []int{1, 16, 64} {
		for _, where := range []string{"leader", "follower", "everywhere"} {
			b.Run(fmt.Sprintf("%d/%s", proposers, where), func(b *testing.B) {
				tc := newCluster(b, 3, nil)
				leader := tc.leader()
				data := make([]byte, 1024)
				tc.propose(leader, "warm")
				took := make([]time.Duration, b.N)
				var next atomic.Int64
				var group sync.WaitGroup
				cpu := cpuTime(b)
				b.ResetTimer()
				for p := range proposers {
					at := leader
					switch where {
					case "follower":
						at = (leader + 1) % 3
					case "everywhere":
						at = p % 3
					}
					group.Go(func() {
						for i := next.Add(1) - 1; i < int64(b.N); i = next.Add(1) - 1 {
							began := time.Now()
							if _, err := tc.nodes[at].c.Propose(context.Background(), data); err != nil {
								b.Errorf("propose: %v", err)
								return
							}
							took[i] = time.Since(began)
						}
					})
				}
				group.Wait()
				b.StopTimer()
				slices.Sort(took)
				b.ReportMetric(float64((cpuTime(b)-cpu).Microseconds())/float64(b.N), "cpu-µs/op")
				b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
				b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
			})
		}
	}
}

// BenchmarkApplyEverywhere measures how long a lone entry takes until all three machines have it.
func BenchmarkApplyEverywhere(b *testing.B) {
	tc := newCluster(b, 3, func(c *Config) { c.CommitTimeout = time.Minute })
	follower := (tc.leader() + 1) % 3
	took := make([]time.Duration, b.N)
	b.ResetTimer()
	for i := range b.N {
		began := time.Now()
		index := tc.propose(follower, "alone")
		for _, n := range tc.nodes {
			n.machine.awaitIndex(b, index)
		}
		took[i] = time.Since(began)
	}
	b.StopTimer()
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}

func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
