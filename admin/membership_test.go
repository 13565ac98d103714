package admin_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/admin"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// leadership is who leads, for all nodes of a test; changed is closed and made anew when that changes.
type leadership struct {
	mu      sync.Mutex
	leader  txn.NodeID
	changed chan struct{}
}

func (l *leadership) get() (txn.NodeID, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.leader, l.changed
}

func (l *leadership) set(id txn.NodeID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.leader = id
	close(l.changed)
	l.changed = make(chan struct{})
}

// memberNode is a node that notes what it is asked to do.
type memberNode struct {
	source
	id      txn.NodeID
	lead    *leadership
	members []admin.Member
	refuse  error
	deposed func() // called once when it is asked as the leader, and then it leads no more

	mu   sync.Mutex
	done []string
}

func (n *memberNode) Status() admin.Status {
	leader, _ := n.lead.get()
	return admin.Status{Leader: leader}
}

func (n *memberNode) Members() admin.Members {
	all := admin.Members{ClusterID: txn.UUID{7}, Highest: 5}
	for i, m := range n.members {
		all.Members = append(all.Members, admin.ListedMember{Member: m, Role: "data", Voter: true, Slot: i - 1, Started: true})
	}
	return all
}

func (n *memberNode) AwaitLeader(ctx context.Context) error {
	_, changed := n.lead.get()
	select {
	case <-changed:
	case <-time.After(10 * time.Millisecond):
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

func (n *memberNode) note(format string, args ...any) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.done = append(n.done, fmt.Sprintf(format, args...))
	return n.refuse
}

// asLeader is note for what only the leader does.
func (n *memberNode) asLeader(format string, args ...any) error {
	if n.deposed != nil {
		n.deposed()
		n.deposed = nil
	}
	if leader, _ := n.lead.get(); leader != n.id {
		return fmt.Errorf("it was just deposed: %w", admin.ErrNotLeader)
	}
	return n.note(format, args...)
}

func (n *memberNode) Add(_ context.Context, a admin.Applicant) (admin.Admission, error) {
	return admin.Admission{ClusterID: txn.UUID{7}, Node: 6, Peers: []string{"p"}}, n.asLeader("add %s %s", a.Raft, a.Role)
}

func (n *memberNode) Remove(_ context.Context, id txn.NodeID, force bool, reason string) error {
	return n.asLeader("remove %s %v %s", id, force, reason)
}

func (n *memberNode) Promote(_ context.Context, id txn.NodeID) error {
	return n.asLeader("promote %s", id)
}

func (n *memberNode) Demote(_ context.Context, id txn.NodeID, force bool) error {
	return n.asLeader("demote %s %v", id, force)
}

func (n *memberNode) TransferLeadership(_ context.Context, to txn.NodeID) error {
	return n.asLeader("transfer %s", to)
}

func (n *memberNode) Drain(_ context.Context, patience time.Duration) (bool, error) {
	return true, n.note("drain %v", patience)
}

func (n *memberNode) Resume(context.Context) error { return n.note("resume") }

func (n *memberNode) Resync(context.Context) error { return n.note("resync") }

// trio serves three nodes and returns them, with a client of each.
func trio(t *testing.T) ([]*memberNode, []pb.MembershipClient, *leadership) {
	t.Helper()
	lead := &leadership{leader: 1, changed: make(chan struct{})}
	var listeners []net.Listener
	var members []admin.Member
	for i := range 3 {
		l := listen(t)
		listeners = append(listeners, l)
		members = append(members, admin.Member{ID: txn.NodeID(i + 1), GRPC: l.Addr().String()})
	}
	var nodes []*memberNode
	var clients []pb.MembershipClient
	for i, l := range listeners {
		n := &memberNode{id: txn.NodeID(i + 1), lead: lead, members: members}
		nodes = append(nodes, n)
		serve(t, l, admin.Config{Cluster: "c", Node: n.id, Version: "test", Members: list(members...), Source: n, Membership: n})
		clients = append(clients, pb.NewMembershipClient(dial(t, l.Addr().String())))
	}
	return nodes, clients, lead
}

func (n *memberNode) did() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return strings.Join(n.done, "; ")
}

func TestMembershipIsForwarded(t *testing.T) {
	nodes, clients, lead := trio(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	follower := clients[1]

	added, err := follower.Add(ctx, &pb.AddRequest{Request: make([]byte, 15), RaftAddress: "r", GrpcAddress: "g"})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("a short request: %v, %v", added, err)
	}
	uuid := txn.NewUUID()
	if _, err := follower.Add(ctx, &pb.AddRequest{Request: uuid[:], ClusterId: make([]byte, 17), RaftAddress: "r", GrpcAddress: "g"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a long id of a cluster: %v", err)
	}
	added, err = follower.Add(ctx, &pb.AddRequest{Request: uuid[:], RaftAddress: "r", GrpcAddress: "g", Role: "data"})
	if err != nil || added.Node != 6 || txn.UUID(added.ClusterId) != (txn.UUID{7}) || nodes[0].did() != "add r data" {
		t.Errorf("added %v, %v; the leader did %q", added, err, nodes[0].did())
	}
	// What is for a node reaches it by way of any; 0 is the one that is asked.
	if got, err := clients[0].Drain(ctx, &pb.DrainRequest{Node: 3, TimeoutMs: 1500}); err != nil || !got.CutOff || nodes[2].did() != "drain 1.5s" {
		t.Errorf("drain: %v, %v; node 3 did %q", got, err, nodes[2].did())
	}
	if _, err := clients[1].Resume(ctx, &pb.ResumeRequest{}); err != nil || nodes[1].did() != "resume" {
		t.Errorf("resume: %v; node 2 did %q", err, nodes[1].did())
	}
	// A leader that is deposed meanwhile is no reason to fail.
	nodes[0].deposed = func() { lead.set(3) }
	if _, err := follower.Promote(ctx, &pb.PromoteRequest{Node: 2}); err != nil || !strings.HasSuffix(nodes[2].did(), "promote 2") {
		t.Errorf("promote: %v; node 3 did %q", err, nodes[2].did())
	}
	// Leaving is draining at the node, and then removal by the leader.
	if _, err := clients[2].Leave(ctx, &pb.LeaveRequest{Node: 2}); err != nil || !strings.HasSuffix(nodes[1].did(), "drain 30s") || !strings.HasSuffix(nodes[2].did(), "remove 2 false it has left") {
		t.Errorf("leave: %v; node 2 did %q, node 3 %q", err, nodes[1].did(), nodes[2].did())
	}
	if _, err := clients[2].Leave(ctx, &pb.LeaveRequest{Node: 4}); err != nil {
		t.Errorf("leave of a node that has left: %v", err)
	}
}

func TestMembershipRefusals(t *testing.T) {
	nodes, clients, lead := trio(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, c := range []struct {
		refuse error
		code   codes.Code
		text   string
	}{
		{admin.Refuse(codes.FailedPrecondition, "only %d", 1), codes.FailedPrecondition, "only 1"},
		{fmt.Errorf("wrapped: %w", admin.Refuse(codes.PermissionDenied, "token")), codes.PermissionDenied, "token"},
		{errors.New("no quorum"), codes.Unavailable, "try again"},
	} {
		nodes[0].refuse = c.refuse
		patience := ctx
		if c.code == codes.Unavailable { // it is tried again until the caller has had enough
			brief, stop := context.WithTimeout(ctx, 5*time.Second) // a tenth of it is for the way back
			defer stop()
			patience = brief
		}
		_, err := clients[1].Demote(patience, &pb.DemoteRequest{Node: 2})
		if status.Code(err) != c.code || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%v came as %v", c.refuse, err)
		}
	}
	for id, text := range map[uint32]string{4: "node 4 was removed", 9: "node 9 has never been a member"} {
		if _, err := clients[0].Drain(ctx, &pb.DrainRequest{Node: id}); status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), text) {
			t.Errorf("drain node %d: %v", id, err)
		}
	}
	// A node that leaves and is not let go takes clients again.
	nodes[0].refuse = admin.Refuse(codes.FailedPrecondition, "too few")
	if _, err := clients[1].Leave(ctx, &pb.LeaveRequest{}); status.Code(err) != codes.FailedPrecondition || !strings.HasSuffix(nodes[1].did(), "resume") {
		t.Errorf("leave: %v; it did %q", err, nodes[1].did())
	}
	nodes[1].refuse = errors.New("some sessions do not end")
	if _, err := clients[1].Leave(ctx, &pb.LeaveRequest{}); err == nil || !strings.HasSuffix(nodes[1].did(), "drain 30s; resume") {
		t.Errorf("leave without being drained: %v; it did %q", err, nodes[1].did())
	}
	lead.set(0)
	brief, stop := context.WithTimeout(ctx, 5*time.Second) // a tenth of it is for the way back
	defer stop()
	if _, err := clients[0].Promote(brief, &pb.PromoteRequest{Node: 2}); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "majority") {
		t.Errorf("without a leader: %v", err)
	}
}

func TestListMembers(t *testing.T) {
	_, clients, _ := trio(t)
	got, err := clients[1].List(t.Context(), &pb.ListMembersRequest{})
	if err != nil || got.Cluster != "c" || got.Node != 2 || got.Highest != 5 || len(got.Members) != 3 {
		t.Fatalf("%v: %v", got, err)
	}
	if one, two := got.Members[0], got.Members[1]; one.Slot != nil || two.GetSlot() != 0 || two.Slot == nil || !two.Voter || !two.Started {
		t.Errorf("members %v", got.Members)
	}
}
