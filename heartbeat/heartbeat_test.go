package heartbeat_test

import (
	"context"
	"errors"
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/quorate/quorate/heartbeat"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// cluster connects monitors within a bubble of simulated time. What is cut loses calls, and a delay holds them up.
type cluster struct {
	t       *testing.T
	mu      sync.Mutex
	members []txn.NodeID
	at      map[txn.NodeID]*heartbeat.Monitor
	stop    map[txn.NodeID]context.CancelFunc
	changes map[txn.NodeID][]heartbeat.Change
	cut     map[[2]txn.NodeID]bool
	delay   map[[2]txn.NodeID]func() time.Duration
	starved map[txn.NodeID]func() // stands for the time that a process does not get
	log     map[txn.NodeID]uint64 // what a node tells of its own: its term, and ten times that is committed
}

func newCluster(t *testing.T, members ...txn.NodeID) *cluster {
	c := &cluster{t: t, members: members, at: map[txn.NodeID]*heartbeat.Monitor{}, stop: map[txn.NodeID]context.CancelFunc{},
		changes: map[txn.NodeID][]heartbeat.Change{}, cut: map[[2]txn.NodeID]bool{}, delay: map[[2]txn.NodeID]func() time.Duration{}, starved: map[txn.NodeID]func(){}, log: map[txn.NodeID]uint64{}}
	for _, id := range members {
		c.start(id)
	}
	return c
}

func (c *cluster) start(id txn.NodeID) {
	m, err := heartbeat.New(heartbeat.Config{
		Cluster: "c", ClusterID: txn.UUID{1}, Node: id,
		Peers: func() (peers []txn.NodeID) {
			c.mu.Lock()
			defer c.mu.Unlock()
			for _, other := range c.members {
				if other != id {
					peers = append(peers, other)
				}
			}
			return peers
		},
		Conn: func(to txn.NodeID) (grpc.ClientConnInterface, error) { return &conn{c, id, to}, nil },
		Health: func() *pb.Health {
			c.mu.Lock()
			wait, term := c.starved[id], c.log[id]
			c.mu.Unlock()
			if wait != nil {
				wait()
			}
			return &pb.Health{State: "active", Csn: uint64(id), Term: term, CommitIndex: 10 * term}
		},
		Changed: func(change heartbeat.Change) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.changes[id] = append(c.changes[id], change)
		},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(c.t.Context())
	c.mu.Lock()
	c.at[id], c.stop[id] = m, cancel
	c.mu.Unlock()
	go func() {
		if err := m.Run(ctx); err != nil {
			c.t.Error(err)
		}
	}()
}

func (c *cluster) kill(id txn.NodeID) {
	c.stop[id]()
	c.mu.Lock()
	delete(c.at, id)
	c.mu.Unlock()
	synctest.Wait()
}

func (c *cluster) setCut(from, to txn.NodeID, cut bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut[[2]txn.NodeID{from, to}] = cut
}

func (c *cluster) end() {
	for _, stop := range c.stop {
		stop()
	}
	synctest.Wait()
}

// took returns what a node has noticed since the last call.
func (c *cluster) took(id txn.NodeID) (kinds []heartbeat.Kind) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, change := range c.changes[id] {
		kinds = append(kinds, change.Kind)
	}
	c.changes[id] = nil
	return kinds
}

// cell returns how one node hears another, as a third one knows it; nil if it knows nothing of it.
func (c *cluster) cell(asked, hearer, other txn.NodeID) *pb.Heard {
	for _, r := range c.at[asked].Reports(&pb.Health{}) {
		for _, h := range r.Heard {
			if r.Node == uint32(hearer) && h.Node == uint32(other) {
				return h
			}
		}
	}
	return nil
}

// ages checks a cell's age against a limit; beyond says on which side of it.
func (c *cluster) age(asked, hearer, other txn.NodeID, beyond bool, limit time.Duration) {
	c.t.Helper()
	h := c.cell(asked, hearer, other)
	switch {
	case h == nil || h.AgeSeconds == nil:
		c.t.Errorf("node %s does not know how node %s hears node %s", asked, hearer, other)
	case (*h.AgeSeconds > limit.Seconds()) != beyond:
		c.t.Errorf("node %s says that node %s has heard node %s %.3f s ago; beyond %v: want %v", asked, hearer, other, *h.AgeSeconds, limit, beyond)
	}
}

type conn struct {
	c        *cluster
	from, to txn.NodeID
}

func (l *conn) Invoke(ctx context.Context, _ string, args, _ any, _ ...grpc.CallOption) error {
	l.c.mu.Lock()
	m, lost, delay := l.c.at[l.to], l.c.cut[[2]txn.NodeID{l.from, l.to}], l.c.delay[[2]txn.NodeID{l.from, l.to}]
	l.c.mu.Unlock()
	if m == nil {
		return status.Error(codes.Unavailable, "connection refused")
	}
	if lost {
		<-ctx.Done()
		return status.FromContextError(ctx.Err()).Err()
	}
	if delay != nil {
		select {
		case <-time.After(delay()):
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
	_, err := m.Beat(ctx, proto.CloneOf(args.(*pb.BeatRequest)))
	return err
}

func (*conn) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, errors.New("no streams")
}

func TestEverybodyKnowsTheMatrix(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1, 2, 3)
		time.Sleep(2 * time.Second)
		for asked := txn.NodeID(1); asked <= 3; asked++ {
			for hearer := txn.NodeID(1); hearer <= 3; hearer++ {
				for other := txn.NodeID(1); other <= 3; other++ {
					if hearer != other {
						c.age(asked, hearer, other, false, 600*time.Millisecond)
					}
				}
			}
			for _, r := range c.at[asked].Reports(&pb.Health{Csn: uint64(asked)}) {
				if r.Health.GetCsn() != uint64(r.Node) {
					t.Errorf("node %s has the health of node %d as %v", asked, r.Node, r.Health)
				}
			}
		}
		if kinds := c.took(1); len(kinds) != 2 || kinds[0] != heartbeat.Heard || kinds[1] != heartbeat.Heard {
			t.Errorf("node 1 noticed %v, want that it hears two", kinds)
		}
		c.end()
	})
}

// Node 1 cannot reach node 2; everything else works. All three know exactly that, node 2 by way of node 3.
func TestOneWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1, 2, 3)
		time.Sleep(2 * time.Second)
		c.took(2)
		c.setCut(1, 2, true)
		time.Sleep(5 * time.Second)
		for asked := txn.NodeID(1); asked <= 3; asked++ {
			c.age(asked, 2, 1, true, 4*time.Second)
			c.age(asked, 1, 2, false, 900*time.Millisecond) // node 2 hears of it with a detour
			c.age(asked, 3, 1, false, 600*time.Millisecond)
			c.age(asked, 1, 3, false, 900*time.Millisecond)
		}
		if c.at[2].Hears(1) || !c.at[1].Hears(2) || !c.at[2].Hears(3) {
			t.Error("hears the wrong ones")
		}
		if h := c.cell(3, 2, 1); h.Loss < 0.5 {
			t.Errorf("loss is %v", h.Loss)
		}
		if kinds := c.took(2); len(kinds) != 1 || kinds[0] != heartbeat.Lost {
			t.Errorf("node 2 noticed %v, want that it lost node 1", kinds)
		}
		c.setCut(1, 2, false)
		time.Sleep(time.Second)
		c.age(3, 2, 1, false, 600*time.Millisecond)
		if kinds := c.took(2); len(kinds) != 1 || kinds[0] != heartbeat.Heard {
			t.Errorf("node 2 noticed %v, want that it hears node 1 again", kinds)
		}
		time.Sleep(30 * time.Second)
		if h := c.cell(3, 2, 1); h.Loss != 0 {
			t.Errorf("loss is %v half a minute later", h.Loss)
		}
		c.end()
	})
}

// A report of an earlier process that somebody still passes on does not replace the new one's.
func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1, 2, 3)
		time.Sleep(20 * time.Second) // the numbers of the first process are higher than those of the next will be
		old := c.at[1].Reports(&pb.Health{})[0]
		c.kill(1)
		time.Sleep(100 * time.Millisecond)
		c.took(2)
		c.start(1)
		time.Sleep(3 * time.Second)
		if kinds := c.took(2); len(kinds) != 1 || kinds[0] != heartbeat.Restarted {
			t.Errorf("node 2 noticed %v, want that node 1 was restarted", kinds)
		}
		if h := c.cell(2, 2, 1); h.Loss != 0 {
			t.Errorf("loss is %v after a restart", h.Loss)
		}
		// The last words of the old process, which have lain somewhere.
		if _, err := c.at[2].Beat(t.Context(), &pb.BeatRequest{ClusterId: clusterID, To: 2, Reports: []*pb.Report{old}}); err != nil {
			t.Fatal(err)
		}
		if kinds := c.took(2); len(kinds) != 0 {
			t.Errorf("node 2 noticed %v after the last words of a process that is gone", kinds)
		}
		time.Sleep(time.Second)
		for _, r := range c.at[3].Reports(&pb.Health{}) {
			if r.Node == 1 && (r.Incarnation == old.Incarnation || r.AgeSeconds > 1) {
				t.Errorf("node 3 still knows the report of the earlier process: %v", r)
			}
		}
		c.end()
	})
}

// A node that does not get the processor when it wants it, and so reads late what others sent in time, blames nobody; a
// member that is gone it misses all the same.
func TestStarvedReceiver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1, 2, 3)
		const slow = 900 * time.Millisecond // less than the timeout: it is not frozen
		defer func() {
			c.mu.Lock()
			delete(c.starved, 2)
			c.mu.Unlock()
			c.end()
			time.Sleep(2 * slow) // it may be asleep still
		}()
		time.Sleep(2 * time.Second)
		c.took(2)
		c.mu.Lock()
		c.starved[2] = func() { time.Sleep(slow) }
		for _, from := range []txn.NodeID{1, 3} { // read in bursts
			c.delay[[2]txn.NodeID{from, 2}] = func() time.Duration {
				period := slow + 350*time.Millisecond
				return period - time.Duration(time.Now().UnixNano())%period
			}
		}
		c.mu.Unlock()
		for range 600 {
			time.Sleep(100 * time.Millisecond)
			if !c.at[2].Hears(1) || !c.at[2].Hears(3) {
				t.Fatal("the starved node says that it does not hear others")
			}
		}
		if kinds := c.took(2); len(kinds) != 0 {
			t.Errorf("the starved node noticed %v", kinds)
		}
		c.kill(1)
		time.Sleep(4 * time.Second)
		if kinds := c.took(2); len(kinds) != 1 || kinds[0] != heartbeat.Lost || c.at[2].Hears(1) || !c.at[2].Hears(3) {
			t.Errorf("the starved node noticed %v after one has gone, want that it was lost", kinds)
		}
	})
}

func TestMembersComeAndGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1, 2)
		time.Sleep(time.Second)
		c.mu.Lock()
		c.members = []txn.NodeID{1, 2, 3}
		c.mu.Unlock()
		c.start(3)
		time.Sleep(time.Second)
		c.age(1, 2, 3, false, 600*time.Millisecond)
		c.mu.Lock()
		c.members = []txn.NodeID{1, 2}
		c.mu.Unlock()
		time.Sleep(2 * time.Second)
		if c.cell(1, 2, 3) != nil || c.cell(1, 3, 2) != nil || c.at[1].Hears(3) {
			t.Error("node 1 still knows node 3, which was removed")
		}
		_, err := c.at[1].Beat(t.Context(), &pb.BeatRequest{ClusterId: clusterID, To: 1, Reports: []*pb.Report{{Node: 3, Incarnation: 1, Sequence: 1}}})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("a heartbeat of a removed member: %v", err)
		}
		c.end()
	})
}

// TestRecall: a member that starts is told how far its log was, however long ago, and only by its own cluster. What it says after
// it has lost its log takes nothing back, nor does an hour in which it counts as no member.
func TestRecall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1, 2)
		for _, term := range []uint64{3, 0, 2} {
			c.mu.Lock()
			c.members, c.log[2] = []txn.NodeID{1, 2}, term
			c.mu.Unlock()
			if c.at[2] == nil {
				c.start(2)
			}
			time.Sleep(time.Second)
			c.kill(2)
			c.mu.Lock()
			c.members = []txn.NodeID{1}
			c.mu.Unlock()
			time.Sleep(time.Hour)
			resp, err := c.at[1].Recall(t.Context(), &pb.RecallRequest{ClusterId: clusterID, Node: 2})
			if err != nil || resp.Health.GetTerm() != 3 || resp.Health.GetCommitIndex() != 30 {
				t.Errorf("node 2 told of term %d last, and of 3 at first: %v, %v", term, resp, err)
			}
		}
		for node, known := range map[uint32]bool{2: true, 3: false} {
			if resp, err := c.at[1].Recall(t.Context(), &pb.RecallRequest{ClusterId: clusterID, Node: node}); err != nil || (resp.Health != nil) != known {
				t.Errorf("of node %d: %v, %v", node, resp, err)
			}
		}
		if _, err := c.at[1].Recall(t.Context(), &pb.RecallRequest{ClusterId: make([]byte, 16), Node: 2}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("of another cluster: %v", err)
		}
		c.end()
	})
}

var clusterID = append([]byte{1}, make([]byte, 15)...)

func TestJitterAndRoundTrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1, 2)
		late := false
		c.mu.Lock()
		c.delay[[2]txn.NodeID{1, 2}] = func() time.Duration {
			late = !late
			if late {
				return 60 * time.Millisecond
			}
			return 20 * time.Millisecond
		}
		c.delay[[2]txn.NodeID{2, 1}] = func() time.Duration { return 30 * time.Millisecond }
		c.mu.Unlock()
		time.Sleep(30 * time.Second)
		if h := c.cell(2, 2, 1); math.Abs(h.JitterSeconds-0.04) > 0.005 || h.Loss != 0 {
			t.Errorf("jitter %v, want 40 ms; loss %v", h.JitterSeconds, h.Loss)
		}
		if h := c.cell(1, 1, 2); h.JitterSeconds > 0.001 || math.Abs(h.GetRoundTripSeconds()-0.04) > 0.015 {
			t.Errorf("jitter %v, want none; round trip %v, want 40 ms", h.JitterSeconds, h.GetRoundTripSeconds())
		}
		c.end()
	})
}

func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1, 2)
		good := func() *pb.BeatRequest {
			return &pb.BeatRequest{ClusterId: clusterID, To: 1, Reports: []*pb.Report{{Node: 2, Incarnation: 5, Sequence: 1, Heard: []*pb.Heard{{Node: 1}}}}}
		}
		if _, err := c.at[1].Beat(t.Context(), good()); err != nil {
			t.Fatal(err)
		}
		for name, tc := range map[string]struct {
			change func(*pb.BeatRequest)
			want   codes.Code
		}{
			"another cluster":       {func(r *pb.BeatRequest) { r.ClusterId = make([]byte, 16) }, codes.FailedPrecondition},
			"for another":           {func(r *pb.BeatRequest) { r.To = 2 }, codes.FailedPrecondition},
			"from itself":           {func(r *pb.BeatRequest) { r.Reports[0].Node = 1 }, codes.PermissionDenied},
			"from a stranger":       {func(r *pb.BeatRequest) { r.Reports[0].Node = 9 }, codes.PermissionDenied},
			"no report":             {func(r *pb.BeatRequest) { r.Reports = nil }, codes.InvalidArgument},
			"nil":                   {func(r *pb.BeatRequest) { r.Reports = append(r.Reports, nil) }, codes.InvalidArgument},
			"many reports":          {func(r *pb.BeatRequest) { r.Reports = make([]*pb.Report, 65) }, codes.InvalidArgument},
			"many cells":            {func(r *pb.BeatRequest) { r.Reports[0].Heard = make([]*pb.Heard, 65) }, codes.InvalidArgument},
			"nil cell":              {func(r *pb.BeatRequest) { r.Reports[0].Heard[0] = nil }, codes.InvalidArgument},
			"from the future":       {func(r *pb.BeatRequest) { r.Reports[0].AgeSeconds = -1 }, codes.InvalidArgument},
			"age is no number":      {func(r *pb.BeatRequest) { r.Reports[0].AgeSeconds = math.NaN() }, codes.InvalidArgument},
			"endless age of a cell": {func(r *pb.BeatRequest) { r.Reports[0].Heard[0].AgeSeconds = proto.Float64(math.Inf(1)) }, codes.InvalidArgument},
			"no sequence":           {func(r *pb.BeatRequest) { r.Reports[0].Sequence = 0 }, codes.InvalidArgument},
		} {
			r := good()
			tc.change(r)
			if _, err := c.at[1].Beat(t.Context(), r); status.Code(err) != tc.want {
				t.Errorf("%s: %v, want %v", name, err, tc.want)
			}
		}
		c.end()
	})
}
