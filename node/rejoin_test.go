package node

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/admin"
	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/peers"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// other is what node 2 answers.
type other struct {
	pb.UnimplementedMembershipServer
	pb.UnimplementedClusterServer
	pb.UnimplementedRecoveryServer
	pb.UnimplementedHeartbeatServer
	said   *pb.Health // what it remembers of node 1
	status *pb.StatusResponse
	offer  *pb.OfferResponse

	mu      sync.Mutex
	answers []error // of Add, one after another; then it admits
	asked   []*pb.AddRequest
}

func (o *other) Add(_ context.Context, req *pb.AddRequest) (*pb.AddResponse, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.asked = append(o.asked, req)
	if len(o.answers) > 0 {
		err := o.answers[0]
		o.answers = o.answers[1:]
		return nil, err
	}
	cluster := txn.UUID{9}
	return &pb.AddResponse{Cluster: "c", ClusterId: cluster[:], Node: 7, Peers: []string{"p"}}, nil
}

func (o *other) Status(context.Context, *pb.StatusRequest) (*pb.StatusResponse, error) {
	return o.status, nil
}

func (o *other) Offer(context.Context, *pb.OfferRequest) (*pb.OfferResponse, error) {
	return o.offer, nil
}

func (o *other) Recall(context.Context, *pb.RecallRequest) (*pb.RecallResponse, error) {
	return &pb.RecallResponse{Health: o.said}, nil
}

// withOther is as much of node 1 as asks the other member: a witness, in the state that a test begins with.
func withOther(t *testing.T, o *other, state string) *Node {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	pb.RegisterMembershipServer(s, o)
	pb.RegisterClusterServer(s, o)
	pb.RegisterRecoveryServer(s, o)
	pb.RegisterHeartbeatServer(s, o)
	n := &Node{log: slog.New(slog.NewTextHandler(t.Output(), nil)), group: new(errgroup.Group)}
	n.cfg = config.Config{Cluster: "c", Node: 1, Role: config.RoleWitness, DataDir: t.TempDir(), Members: []config.Member{{ID: 1}, {ID: 2, GRPC: l.Addr().String()}}}
	n.identity = identity{dir: n.cfg.DataDir, now: config.Identity{Cluster: "c", ClusterID: txn.UUID{9}, Node: 1, State: state, Started: true}}
	n.peers = peers.New(n.grpcAddress)
	n.ctx, n.cancel = context.WithCancelCause(t.Context())
	n.fenced, n.fence = context.WithCancelCause(n.ctx)
	var served sync.WaitGroup
	served.Go(func() {
		if err := s.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) { // before it has begun
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		n.cancel(errClosed)
		if err := errors.Join(n.group.Wait(), n.peers.Close()); err != nil {
			t.Error(err)
		}
		s.Stop()
		served.Wait()
	})
	return n
}

// onDisk is what the data directory says.
func onDisk(t *testing.T, n *Node) config.Identity {
	t.Helper()
	id, err := config.ReadIdentity(n.cfg.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestRejoinAsksByOneRequest: as long as nobody has said that the node is another one, it is what it was, also for whoever starts it
// again; and it asks by the same request, for it may have been admitted by that long ago.
func TestRejoinAsksByOneRequest(t *testing.T) {
	for _, state := range []string{config.StateMember, config.StateJoining} {
		o := &other{answers: []error{status.Error(codes.DeadlineExceeded, "the time is over"), status.Error(codes.FailedPrecondition, "not now")}}
		n := withOther(t, o, state)
		for i, code := range []codes.Code{codes.DeadlineExceeded, codes.FailedPrecondition} {
			if err := n.rejoin(t.Context(), "test"); status.Code(err) != code {
				t.Fatalf("attempt %d: %v", i, err)
			}
			if id := onDisk(t, n); id.State != state || id.Node != 1 || id.RaftDir("") != "raft" || id.Rejoin.IsZero() {
				t.Errorf("after attempt %d it is %+v", i, id)
			}
		}
		for range 2 { // who has asked as well finds it done
			if err := n.rejoin(t.Context(), "test"); err != nil {
				t.Fatal(err)
			}
		}
		id := onDisk(t, n)
		if id.State != config.StateJoining || id.Node != 7 || id.Replaces != 1 || !id.Rejoin.IsZero() || id.Started {
			t.Errorf("admitted, it is %+v", id)
		}
		if len(o.asked) != 3 {
			t.Errorf("it asked %d times", len(o.asked))
		}
		// What is left of the old life does not write what it was, or became, into what the node is now.
		for name, late := range map[string]func() error{
			"generationBegun": func() error { return n.generationBegun(5) },
			"becomeMember":    func() error { return n.becomeMember(t.Context()) },
			"loseLog":         func() error { return n.loseLog("it is away") },
			"wasRemoved":      func() error { n.wasRemoved("it was replaced"); return errHandedOver },
		} {
			if err := late(); !errors.Is(err, errHandedOver) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if now := onDisk(t, n); !reflect.DeepEqual(now, id) || n.states.current().name == stateRemoved {
			t.Errorf("it was %+v, and is %+v and %s", id, now, n.states.current().name)
		}
		for _, req := range o.asked {
			if txn.UUID(req.Request) != id.Request || req.Replaces != 1 || txn.UUID(req.ClusterId) != id.ClusterID || req.Role != config.RoleWitness {
				t.Errorf("it asked %v, and was admitted by %v", req, id.Request)
			}
		}
	}
}

// TestReplacedByItself: the node was admitted anew, the answer was lost, and then it learns that it is no member any more.
func TestReplacedByItself(t *testing.T) {
	o := &other{answers: []error{status.Error(codes.Unavailable, "lost"), status.Error(codes.Unavailable, "lost again")}}
	n := withOther(t, o, config.StateMember)
	if err := n.rejoin(t.Context(), "test"); err == nil {
		t.Fatal("there was no answer")
	}
	n.wasRemoved("it was replaced")
	n.wasRemoved("it was replaced") // it may hear of it in more than one way
	select {
	case <-n.ctx.Done():
	case <-time.After(20 * time.Second):
		t.Fatalf("it does not come back: %+v", onDisk(t, n))
	}
	if err := context.Cause(n.ctx); !errors.Is(err, ErrReopen) {
		t.Errorf("it ended with %v", err)
	}
	if err := context.Cause(n.fenced); err == nil || !strings.Contains(err.Error(), "lost again") {
		t.Errorf("without an answer it was not fenced: %v", err)
	}
	if id := onDisk(t, n); id.State != config.StateJoining || id.Node != 7 {
		t.Errorf("it is %+v", id)
	}
}

// TestRemovedWhileAsking: the node was removed, and has not been admitted anew.
func TestRemovedWhileAsking(t *testing.T) {
	o := &other{answers: []error{status.Error(codes.Unavailable, "lost"), status.Error(codes.NotFound, "node 1 was removed")}}
	n := withOther(t, o, config.StateMember)
	n.behind(errors.New("left behind"))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for n.states.current().name != stateRemoved {
		select {
		case <-ctx.Done():
			t.Fatalf("it is %+v", n.states.current())
		case <-time.After(time.Millisecond):
		}
	}
	if id := onDisk(t, n); id.State != config.StateRemoved || id.Node != 1 || n.ctx.Err() != nil {
		t.Errorf("it is %+v, and ended with %v", id, n.ctx.Err())
	}
	if err := n.rejoin(ctx, "test"); status.Code(err) != codes.NotFound {
		t.Errorf("a removed node may ask: %v", err)
	}
}

// TestOtherCluster: of several clusters with one name, only its own says what becomes of a member; any takes a new node.
func TestOtherCluster(t *testing.T) {
	n := &Node{cfg: config.Config{Cluster: "c"}}
	in := replication.Membership{Cluster: txn.UUID{9}}
	for _, c := range []struct {
		applicant admin.Applicant
		code      codes.Code
	}{
		{admin.Applicant{Cluster: "c", ClusterID: in.Cluster}, codes.OK},
		{admin.Applicant{Cluster: "c"}, codes.OK},
		{admin.Applicant{Cluster: "c", ClusterID: txn.UUID{8}}, codes.Aborted},
		{admin.Applicant{Cluster: "d", ClusterID: in.Cluster}, codes.FailedPrecondition},
	} {
		if err := n.checkCluster(in, c.applicant); status.Code(err) != c.code {
			t.Errorf("%+v: %v", c.applicant, err)
		} else if c.code == codes.Aborted && refused(err) {
			t.Errorf("no other member is asked after %v", err)
		}
	}
}

// TestJudgedByWhatWasRead: while a new incarnation reads the log, who is a member is for the machine to say that has read it. A member
// that hears of itself that it is none takes that for the last word.
func TestJudgedByWhatWasRead(t *testing.T) {
	n := withOther(t, &other{}, config.StateMember)
	log := [][]byte{
		codec.AppendFound(nil, &codec.Found{Cluster: n.identity.get().ClusterID, Founders: []codec.Founder{{Node: 1, Role: codec.RoleWitness}}}),
		codec.AppendAdmit(nil, &codec.Admit{Request: txn.UUID{1}, Role: codec.RoleWitness, RaftAddress: "h:1", GRPCAddress: "h:2"}),
	}
	readUpTo := func(last int) *replication.Machine {
		m := replication.New(replication.Config{Changed: func(replication.Change) {}, Processed: func(txn.LogIndex) {}})
		for i, entry := range log[:last] {
			m.Apply(txn.LogIndex(i+1), entry)
		}
		return m
	}
	n.observer.Store(&observer{machine: readUpTo(1)})
	if err := n.Members().Known(2); status.Code(err) != codes.NotFound {
		t.Fatalf("the machine that is being fed knows what is to come: %v", err)
	}
	_, err := n.admit(t.Context(), nil, readUpTo(2), admin.Applicant{Replaces: 2, Role: "none", Member: admin.Member{Raft: "h:3", GRPC: "h:4"}})
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "role") {
		t.Errorf("a member asks to be admitted anew: %v", err)
	}
}

// TestDispensable: who cannot store the log counts for no majority, and whose data may be of no use not as a copy.
func TestDispensable(t *testing.T) {
	o := &other{status: &pb.StatusResponse{Members: []*pb.Member{{State: stateFailed}}}, offer: &pb.OfferResponse{Cluster: "c", Node: 2, Active: true}}
	n := withOther(t, o, config.StateMember)
	cluster := n.identity.get().ClusterID
	o.status.ClusterId, o.offer.ClusterId = cluster[:], cluster[:]
	in := replication.Membership{Members: []replication.Member{{Member: codec.Member{Node: 1, Incarnation: 1}}, {Member: codec.Member{Node: 2, Incarnation: 1}}}}
	if dead := n.dead(t.Context(), []txn.NodeID{2}); len(dead) != 0 {
		t.Errorf("a node that votes is dead: %v", dead)
	}
	if err := n.dataWithout(t.Context(), in, 1); err != nil {
		t.Errorf("another member can give a copy: %v", err)
	}
	o.status.ClusterId, o.offer.ClusterId = make([]byte, 16), make([]byte, 16) // it was forced: the name is the same
	if err := n.dead(t.Context(), []txn.NodeID{2})[2]; err == nil || !strings.Contains(err.Error(), "another cluster") {
		t.Errorf("a node of another cluster is alive in this one: %v", err)
	}
	if err := n.dataWithout(t.Context(), in, 1); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a node of another cluster can give a copy: %v", err)
	}
	o.status.ClusterId, o.offer.ClusterId = cluster[:], cluster[:]
	o.status.Members[0].LogFailure = "no space left"
	if err := n.dead(t.Context(), []txn.NodeID{2})[2]; err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("a node that stores nothing is alive: %v", err)
	}
	o.offer.Active, o.offer.Reason = false, "it has diverged"
	if err := n.dataWithout(t.Context(), in, 1); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "node 2: it is not active: it has diverged") {
		t.Errorf("nobody can give a copy: %v", err)
	}
	in.Members[0].Role = codec.RoleWitness
	if err := n.dataWithout(t.Context(), in, 1); err != nil {
		t.Errorf("a witness has no data: %v", err)
	}
}

// TestApplicants: who cannot be a member hears why, in numbers, before the log does.
func TestApplicants(t *testing.T) {
	n := withOther(t, &other{}, config.StateMember)
	in := replication.Membership{Format: 2, MaxNodes: 2, Members: []replication.Member{
		{Member: codec.Member{Node: 1, Incarnation: 1}}, {Member: codec.Member{Node: 2, Incarnation: 1}, Slot: 1}, {Member: codec.Member{Node: 3}, Role: codec.RoleWitness, Slot: replication.NoSlot},
	}}
	for _, c := range []struct {
		role     string
		format   uint32
		replaces txn.NodeID
		says     string
	}{
		{config.RoleWitness, 1, 0, "reads the log up to format 1, and the cluster writes format 2"},
		{config.RoleWitness, 0, 0, "up to format 1,"},
		{config.RoleWitness, 2, 0, ""},
		{config.RoleData, 3, 0, "2 nodes with data, and was founded for at most 2 (max_nodes)"},
		{config.RoleData, 2, 3, "at most 2"}, // a witness leaves no place for data
		{config.RoleData, 2, 2, ""},
	} {
		err := n.checkApplicant(in, admin.Applicant{Role: c.role, Format: c.format, Replaces: c.replaces, Member: admin.Member{Raft: "h:3", GRPC: "h:4"}})
		if c.says == "" && err != nil || c.says != "" && (status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
