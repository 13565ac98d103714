package admin_test

import (
	"context"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/quorate/quorate/admin"
	"github.com/quorate/quorate/internal/peers"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// observed is a node whose view the test changes.
type observed struct {
	id txn.NodeID

	mu      sync.Mutex
	view    *pb.View
	changed chan struct{}
	made    int

	noted []*pb.Event
	more  chan struct{}

	address string      // where it is served
	alone   atomic.Bool // it takes itself for the only member
}

func newObserved(id txn.NodeID) *observed {
	return &observed{id: id, view: &pb.View{Node: uint32(id), HeartbeatTimeoutSeconds: 1}, changed: make(chan struct{}), more: make(chan struct{})}
}

func (o *observed) View() *pb.View {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.made++
	v := proto.CloneOf(o.view)
	v.TimeMs = int64(o.made) // differs each time
	return v
}

func (o *observed) Changed() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.changed
}

func (o *observed) set(change func(*pb.View)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	change(o.view)
	close(o.changed)
	o.changed = make(chan struct{})
}

func (o *observed) InFlight(most int) (all []*pb.TransactionInFlight) {
	for i := range most {
		all = append(all, &pb.TransactionInFlight{Node: uint32(o.id), AgeSeconds: float64(i) + float64(o.id)/10})
	}
	return all
}

func (o *observed) Lookup(_ context.Context, gid txn.GID) (*pb.LookupResponse, error) {
	return &pb.LookupResponse{Status: gid.String()}, nil
}

// Conflicts are one that all nodes know of, and one of this node alone.
func (o *observed) Conflicts(_ context.Context, kind string, _ int) []*pb.Conflict {
	all := []*pb.Conflict{{Kind: "certification", Gid: "1-a-1", TimeMs: int64(10 + o.id)}, {Kind: "eviction", Node: uint32(o.id), TimeMs: int64(o.id)}}
	return slices.DeleteFunc(all, func(c *pb.Conflict) bool { return kind != "" && c.Kind != kind })
}

func (o *observed) Happened(req *pb.EventsRequest) (all []*pb.Event) {
	for i := range req.Limit {
		all = append(all, &pb.Event{Node: uint32(o.id), Number: uint64(1000 - i), TimeMs: 10_000 - 10*int64(i) - int64(o.id), Kind: req.Kind})
	}
	return all
}

// note adds events.
func (o *observed) note(n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for range n {
		o.noted = append(o.noted, &pb.Event{Node: uint32(o.id), Number: uint64(len(o.noted) + 1)})
	}
	close(o.more)
	o.more = make(chan struct{})
}

func (o *observed) Follow(after *pb.EventCursor, _ *pb.FollowRequest) ([]*pb.Event, *pb.EventCursor, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.noted[after.Number:], &pb.EventCursor{Node: uint32(o.id), Number: uint64(len(o.noted))}, o.more
}

// observe serves some nodes, the third of which does not answer, and returns a client of the first.
func observe(t *testing.T) (client pb.ObserveClient, first, second *observed) {
	t.Helper()
	l1, l2, dead := listen(t), listen(t), listen(t)
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	members := []admin.Member{{ID: 1, GRPC: l1.Addr().String()}, {ID: 2, GRPC: l2.Addr().String()}, {ID: 3, GRPC: dead.Addr().String()}}
	first, second = newObserved(1), newObserved(2)
	for id, node := range map[txn.NodeID]*observed{1: first, 2: second} {
		pool := peers.New(func(other txn.NodeID) (string, bool) { return members[other-1].GRPC, true })
		o := admin.NewObserve(admin.Config{Node: id, Members: func() []admin.Member {
			if node.alone.Load() {
				return members[id-1 : id]
			}
			return members
		}, Peers: pool}, node)
		s := grpc.NewServer()
		o.Register(s)
		var served sync.WaitGroup
		l := map[txn.NodeID]net.Listener{1: l1, 2: l2}[id]
		node.address = l.Addr().String()
		served.Go(func() {
			if err := s.Serve(l); err != nil {
				t.Errorf("serve: %v", err)
			}
		})
		t.Cleanup(func() {
			o.Close() // a graceful stop waits for nobody then
			s.GracefulStop()
			served.Wait()
			if err := pool.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	return pb.NewObserveClient(dial(t, l1.Addr().String())), first, second
}

func TestWatch(t *testing.T) {
	client, node, _ := observe(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	stream, err := client.Watch(ctx, &pb.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next := func() *pb.View {
		t.Helper()
		v, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	next()
	node.set(func(v *pb.View) { v.Leader = 2 })
	if v := next(); v.Leader != 2 {
		t.Errorf("after a change: %v", v)
	}
	// A burst of changes is one message, the last of them.
	for i := range uint64(100) {
		node.set(func(v *pb.View) { v.Term = i + 1 })
	}
	began, messages := time.Now(), 0
	for v := next(); v.Term != 100; v = next() {
		messages++
	}
	if most := int(time.Since(began)/admin.WatchInterval) + 1; messages > most {
		t.Errorf("%d messages in %v", messages, time.Since(began))
	}
	// Nothing new: the time of day alone is no reason to speak, but now and then it is said that all is as it was.
	began = time.Now()
	next()
	if passed := time.Since(began); passed < admin.WatchInterval {
		t.Errorf("a message after %v without news", passed)
	}

	// Who goes away ends nothing but its own watch.
	cancel()
	if _, err := stream.Recv(); status.Code(err) != codes.Canceled {
		t.Errorf("after the end: %v", err)
	}
}

func TestPages(t *testing.T) {
	client, _, _ := observe(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for limit, want := range map[uint32]int{0: admin.DefaultPage, 7: 7, admin.MaxPage: admin.MaxPage} {
		e, err := client.Events(ctx, &pb.EventsRequest{Limit: limit, Kind: "k"})
		if err != nil || len(e.Events) != want || len(e.Unreachable) != 1 || e.Unreachable[0].Node != 3 || e.Unreachable[0].Reason == "" {
			t.Fatalf("limit %d: %d events, unreachable %v, %v", limit, len(e.GetEvents()), e.GetUnreachable(), err)
		}
		nodes := make(map[uint32]bool)
		for i, one := range e.Events {
			if nodes[one.Node] = true; i > 0 && one.TimeMs > e.Events[i-1].TimeMs || one.Kind != "k" {
				t.Fatalf("limit %d: event %d is out of order, or of another kind: %v", limit, i, one)
			}
		}
		if len(nodes) != 2 {
			t.Errorf("events are of nodes %v", nodes)
		}
		f, err := client.Transactions(ctx, &pb.TransactionsRequest{Limit: limit})
		if err != nil || len(f.Transactions) != 2*want || f.Transactions[0].Node != 2 || len(f.Unreachable) != 1 {
			t.Fatalf("limit %d: %d transactions, %v, %v", limit, len(f.GetTransactions()), f.GetUnreachable(), err)
		}
	}
	if e, err := client.Events(ctx, &pb.EventsRequest{Local: true}); err != nil || len(e.Unreachable) != 0 || e.Events[1].Node != 1 {
		t.Errorf("local events: %v, %v", e, err)
	}
	if e, err := client.Events(ctx, &pb.EventsRequest{After: 5}); err != nil || len(e.Unreachable) != 0 {
		t.Errorf("events after a number, which is this node's: %v, %v", e, err)
	}
	c, err := client.Conflicts(ctx, &pb.ConflictsRequest{})
	if err != nil || len(c.Conflicts) != 3 || c.Conflicts[0].Gid != "1-a-1" || c.Conflicts[0].TimeMs != 11 || c.Conflicts[1].Node != 2 || c.Conflicts[2].Node != 1 {
		t.Errorf("conflicts: %v, %v", c, err)
	}
	if c, err := client.Conflicts(ctx, &pb.ConflictsRequest{Kind: "eviction"}); err != nil || len(c.Conflicts) != 2 || c.Conflicts[0].Kind != "eviction" || len(c.Unreachable) != 1 {
		t.Errorf("evictions: %v, %v", c, err)
	}
	if c, err := client.Conflicts(ctx, &pb.ConflictsRequest{Limit: 1}); err != nil || len(c.Conflicts) != 1 {
		t.Errorf("one conflict: %v, %v", c, err)
	}
	for name, call := range map[string]func() error{
		"events":       func() error { _, err := client.Events(ctx, &pb.EventsRequest{Limit: admin.MaxPage + 1}); return err },
		"transactions": func() error { _, err := client.Transactions(ctx, &pb.TransactionsRequest{Limit: 1 << 31}); return err },
		"conflicts":    func() error { _, err := client.Conflicts(ctx, &pb.ConflictsRequest{Limit: 1001}); return err },
		"lookup":       func() error { _, err := client.Lookup(ctx, &pb.LookupRequest{Gid: "1-2"}); return err },
	} {
		if err := call(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	if l, err := client.Lookup(ctx, &pb.LookupRequest{Gid: "1-a-2"}); err != nil || l.Status != "1-a-2" {
		t.Errorf("lookup: %v, %v", l, err)
	}
	gone, end := context.WithTimeout(ctx, time.Nanosecond)
	defer end()
	if _, err := client.Events(gone, &pb.EventsRequest{}); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("past its deadline: %v", err)
	}
}

// Each event of all members comes once, in the order of its member, whatever streams break, and is asked for by place.
func TestFollow(t *testing.T) {
	client, first, second := observe(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	first.note(3)
	second.note(2)
	latest, err := client.Events(ctx, &pb.EventsRequest{Limit: 1})
	if err != nil || len(latest.Cursors) != 2 {
		t.Fatalf("where to follow from: %v, %v", latest, err)
	}
	after := make(map[uint32]uint64)
	for _, c := range latest.Cursors {
		after[c.Node] = c.Number
	}
	if after[1] != 3 || after[2] != 2 {
		t.Fatalf("follow from %v", after)
	}
	// read takes what comes until that many events of each node have come, and breaks the stream.
	read := func(local bool, want map[uint32]uint64, during ...func()) {
		t.Helper()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		req := &pb.FollowRequest{Local: local}
		for node, number := range after {
			req.After = append(req.After, &pb.EventCursor{Node: node, Number: number})
		}
		stream, err := client.Follow(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		for after[1] < want[1] || after[2] < want[2] {
			r, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range r.Events {
				if after[e.Node]++; e.Number != after[e.Node] {
					t.Fatalf("event %d of node %d comes where %d should", e.Number, e.Node, after[e.Node])
				}
			}
			if len(r.Events) > 0 && len(during) > 0 {
				during[0]()
				during = during[1:]
			}
		}
		if want[2] == 0 { // nothing comes but the word that there is nothing
			if r, err := stream.Recv(); err != nil || len(r.Events) != 0 {
				t.Errorf("%v, %v", r, err)
			}
		}
	}
	second.note(950)
	first.note(5)
	read(false, map[uint32]uint64{1: 8, 2: 300})
	first.note(1)
	read(false, map[uint32]uint64{1: 9, 2: 952})
	second.note(1)
	first.note(1)
	read(true, map[uint32]uint64{1: 10})
	read(false, map[uint32]uint64{1: 10, 2: 953})
	first.note(1) // and while it is read
	read(false, map[uint32]uint64{1: 15, 2: 955}, func() { first.note(2) }, func() { second.note(2); first.note(2) })
	// A member that is missing from the list for a while, because the node reads the log again, is not followed anew.
	second.note(1)
	stream, err := client.Follow(ctx, &pb.FollowRequest{After: []*pb.EventCursor{{Node: 1, Number: after[1]}, {Node: 2, Number: after[2]}}})
	for silent := 0; err == nil && silent < 3; {
		var r *pb.FollowResponse
		if r, err = stream.Recv(); len(r.GetEvents()) == 0 {
			silent++
			first.alone.Store(silent == 1)
		}
		for _, e := range r.GetEvents() {
			if after[e.Node]++; e.Number != after[e.Node] {
				t.Fatalf("event %d of node %d comes where %d should", e.Number, e.Node, after[e.Node])
			}
		}
	}
	if err != nil || after[2] != 956 {
		t.Errorf("node 2 is at %d, %v", after[2], err)
	}
}

// Somebody who opens streams and does not read them costs the node neither memory nor work, and nobody else anything.
func TestStalledReader(t *testing.T) {
	client, node, _ := observe(t)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	const size = 1 << 20 // of a view: more than the connection takes from a server whose client does not read
	views := func() int {
		node.mu.Lock()
		defer node.mu.Unlock()
		return node.made
	}
	change := func(term uint64) {
		node.set(func(v *pb.View) { v.Term, v.Cluster = term, strings.Repeat("x", size) })
	}
	change(1)
	node.note(100_000)
	lazy := pb.NewObserveClient(dial(t, node.address)) // on a connection of its own: one that is read takes more and more ahead
	stalled, err := lazy.Watch(ctx, &pb.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	stalledEvents, err := lazy.Follow(ctx, &pb.FollowRequest{Local: true})
	if err != nil {
		t.Fatal(err)
	}
	for views() == 0 { // until it has begun
		if ctx.Err() != nil {
			t.Fatal(ctx.Err())
		}
		runtime.Gosched()
	}
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before, goroutines := heap(), runtime.NumGoroutine()

	// Beside it, another one sees every change.
	reader, err := client.Watch(ctx, &pb.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	const changes = 20
	for term := uint64(2); term < 2+changes; term++ {
		change(term)
		for {
			v, err := reader.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if v.Term == term {
				break
			}
		}
	}
	if grown := heap() - before; grown > 8*size {
		t.Errorf("%d bytes more are in use after %d views of %d bytes", grown, changes, size)
	}
	if more := runtime.NumGoroutine() - goroutines; more > 10 {
		t.Errorf("%d goroutines more", more)
	}

	// When it reads again, it gets what was under way, and then how things are now: nothing between.
	for got := 1; ; got++ {
		v, err := stalled.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if v.Term == 1+changes {
			break
		}
		if got > 3 {
			t.Fatalf("the view of term %d came as message %d", v.Term, got)
		}
	}
	for last := uint64(0); last < 100_000; {
		r, err := stalledEvents.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range r.Events {
			if last++; e.Number != last {
				t.Fatalf("event %d comes after %d", e.Number, last-1)
			}
		}
	}
}
