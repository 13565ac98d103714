package node

import (
	"slices"
	"testing"

	"github.com/quorate/quorate/dashboard"
	pb "github.com/quorate/quorate/proto/quorate/v1"
)

// A cluster of three of which node 1 does not hear node 3, which node 2 does.
func partial() *pb.View {
	heard := func(node uint32, age float64) *pb.Heard { return &pb.Heard{Node: node, AgeSeconds: &age} }
	row := func(id uint32, hears ...*pb.Heard) *pb.NodeView {
		return &pb.NodeView{Id: id, Heard: id != 3, Voter: true, ReportAgeSeconds: ptr(0.1), Health: &pb.Health{State: stateActive}, Hears: hears}
	}
	return &pb.View{Node: 1, HeartbeatTimeoutSeconds: 1, Nodes: []*pb.NodeView{
		row(1, heard(2, 0.1), heard(3, 4)), row(2, heard(1, 0.1), heard(3, 0.2)), row(3, heard(1, 0.3)),
	}}
}

func TestDashboardLinks(t *testing.T) {
	v := partial()
	lost := func(to int) (from []uint32) {
		for _, l := range links(v, v.Nodes[to-1]) {
			if !l.Known {
				t.Errorf("what node %d hears is not known", to)
			}
			if l.Lost {
				from = append(from, uint32(l.From))
			}
		}
		return from
	}
	// Of node 2 nothing has ever come to node 3.
	if got := lost(1); !slices.Equal(got, []uint32{3}) {
		t.Errorf("node 1 does not hear %v", got)
	}
	if got := lost(2); len(got) != 0 {
		t.Errorf("node 2 does not hear %v", got)
	}
	if got := lost(3); !slices.Equal(got, []uint32{2}) {
		t.Errorf("node 3 does not hear %v", got)
	}
	// A report that is old tells nothing of now.
	v.Nodes[2].ReportAgeSeconds = ptr(1.5)
	for _, l := range links(v, v.Nodes[2]) {
		if l.Known {
			t.Errorf("known by an old report: %+v", l)
		}
	}
}

func TestDashboardSaysWhoHears(t *testing.T) {
	v := partial()
	if got, want := shownNode(v, v.Nodes[2]).Reason, "node 1 does not hear it, node 2 does"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	*v.Nodes[1].Hears[1].AgeSeconds = 4
	if got, want := shownNode(v, v.Nodes[2]).Reason, "node 1 and node 2 do not hear it"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	v.Nodes[1].ReportAgeSeconds = nil
	if got, want := shownNode(v, v.Nodes[2]).Reason, "node 1 does not hear it"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestDashboardActions(t *testing.T) {
	for _, c := range []struct {
		name    string
		is      dashboard.Node
		members int
		want    []string
	}{
		{"a follower", dashboard.Node{State: stateActive, Reachable: true, Voter: true, Role: "follower"}, 3,
			[]string{dashboard.Drain, dashboard.Transfer, dashboard.Resync, dashboard.Remove}},
		{"the leader", dashboard.Node{State: stateActive, Reachable: true, Voter: true, Role: "leader"}, 3,
			[]string{dashboard.Drain, dashboard.Resync, dashboard.Remove}},
		{"drained", dashboard.Node{State: stateDraining, Reachable: true, Voter: true, Role: "follower"}, 3,
			[]string{dashboard.Resume, dashboard.Transfer, dashboard.Resync, dashboard.Remove}},
		{"failed", dashboard.Node{State: stateFailed, Reachable: true, Role: "follower"}, 3, []string{dashboard.Resync, dashboard.Remove}},
		{"gone", dashboard.Node{State: stateActive, Voter: true, Role: "leader"}, 3, []string{dashboard.Remove}},
		{"a witness", dashboard.Node{State: stateActive, Reachable: true, Voter: true, Witness: true, Role: "follower"}, 3,
			[]string{dashboard.Transfer, dashboard.Remove}},
		{"alone", dashboard.Node{State: stateActive, Reachable: true, Voter: true, Role: "leader"}, 1, []string{dashboard.Drain}},
	} {
		if got := actions(c.is, c.members); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// A conflict has one ID whoever tells of it and whatever is found out later, and no two have the same.
func TestDashboardKnowsConflictsAgain(t *testing.T) {
	id := func(c *pb.Conflict) string { return shownConflict(c).ID }
	known := &pb.Conflict{Kind: conflictCertified, Gid: "1-9f86d081884c7d65-4", Node: 1, TimeMs: 1000, WinnerCsn: 7}
	if told := (&pb.Conflict{Kind: conflictCertified, Gid: known.Gid, Node: 1, TimeMs: 1010, WinnerCsn: 7, Table: "t", Key: "k"}); id(known) != id(told) {
		t.Errorf("%q and %q are one", id(known), id(told))
	}
	seen := make(map[string]bool)
	for _, c := range []*pb.Conflict{
		known, {Kind: conflictEvicted, Gid: known.Gid}, {Kind: conflictCertified, Gid: "1-9f86d081884c7d65-5"},
		{Kind: conflictEvicted, Node: 1, TimeMs: 1, WinnerCsn: 7}, {Kind: conflictEvicted, Node: 2, TimeMs: 1, WinnerCsn: 7}, {Kind: conflictEvicted, Node: 1, TimeMs: 2, WinnerCsn: 7},
	} {
		if seen[id(c)] {
			t.Errorf("%q is another one's too", id(c))
		}
		seen[id(c)] = true
	}
}
