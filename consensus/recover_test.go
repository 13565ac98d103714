package consensus

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/quorate/quorate/txn"
)

// Two of three members are gone for good. The third goes on alone with everything that it has, takes new members, and has
// nothing to do with the two when they turn up again.
func TestRecoverCluster(t *testing.T) {
	parallel(t)
	for _, snapshot := range []bool{false, true} {
		t.Run(fmt.Sprintf("snapshot %v", snapshot), func(t *testing.T) {
			tc := newCluster(t, 3, func(c *Config) { c.TrailingLogs, c.walSegment = 1, 4096 })
			survivor := tc.follower()
			var last txn.LogIndex
			for k := range 20 {
				last = tc.propose(survivor, fmt.Sprint(k)+string(make([]byte, 1000)))
			}
			tc.nodes[survivor].machine.awaitIndex(t, last)
			if snapshot {
				if err := tc.nodes[survivor].c.TakeSnapshot(); err != nil {
					t.Fatal(err)
				}
			}
			last = tc.propose(survivor, "the last acknowledged")
			want := tc.nodes[survivor].machine.awaitIndex(t, last)
			n := tc.nodes[survivor]
			if _, err := RecoverCluster(n.config, n.member); err == nil {
				t.Error("a running node was made the only one")
			}
			for i := range tc.nodes {
				tc.stop(i)
			}
			moved := n.member
			if snapshot { // otherwise the two try to reach it
				moved.RaftAddress = freeAddress(t)
			}
			n.member, n.config.RaftAddress = moved, moved.RaftAddress
			first, err := RecoverCluster(n.config, moved)
			if err != nil || first <= last {
				t.Fatalf("recovered at %d: %v", first, err)
			}
			if again, err := RecoverCluster(n.config, moved); err != nil || again != first {
				t.Fatalf("recovered again at %d, not %d: %v", again, first, err)
			}
			old := [2]int{(survivor + 1) % 3, (survivor + 2) % 3}
			for _, i := range old {
				tc.nodes[i].out = true
				tc.start(i) // before it could know that it is on its own
			}
			n.config.ClusterID = [16]byte{1}
			tc.start(survivor)
			after := tc.propose(survivor, "alone")
			got := n.machine.awaitIndex(t, after)
			if !slices.EqualFunc(got[:len(got)-1], want, sameEntry) {
				t.Errorf("%d entries are left of %d", len(got)-1, len(want))
			}
			for range 2 {
				i := tc.launch(func(c *Config) { c.ClusterID = n.config.ClusterID })
				tc.add(i)
				tc.promote(i)
			}
			after = tc.propose(4, "with new members")
			for _, i := range []int{survivor, 3, 4} {
				got := tc.nodes[i].machine.awaitIndex(t, after)
				if !slices.EqualFunc(got[:len(want)], want, sameEntry) || len(got) != len(want)+2 {
					t.Errorf("node %d has %d entries", i+1, len(got))
				}
				tc.requireMembers(i, []int{survivor, 3, 4}, nil)
			}
			// The two have a majority of the old group, and nothing of what has happened here.
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if leader, err := tc.nodes[old[0]].c.WaitLeader(ctx); err != nil || leader == txn.NodeID(survivor+1) {
				t.Errorf("the old group is led by %d: %v", leader, err)
			}
			for _, i := range old {
				for _, e := range tc.nodes[i].machine.awaitIndex(t, last) {
					if e.Index > last {
						t.Errorf("node %d has got %q", i+1, e.Data)
					}
				}
			}
			if err := n.c.Err(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestRecoverClusterRefuses(t *testing.T) {
	cfg := Config{Node: 1, Dir: t.TempDir()}
	for name, self := range map[string]Member{
		"nothing there": {Node: 1, RaftAddress: "127.0.0.1:1", GRPCAddress: "127.0.0.1:2"},
		"another node":  {Node: 2, RaftAddress: "127.0.0.1:1", GRPCAddress: "127.0.0.1:2"},
		"no address":    {Node: 1, RaftAddress: "127.0.0.1:1"},
	} {
		if _, err := RecoverCluster(cfg, self); err == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	requireNoGoroutines(t)
}
