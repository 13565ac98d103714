package admin

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// Observed is the node, as far as the service Observe needs it, safe for concurrent use. What it returns is not changed
// afterwards.
type Observed interface {
	// View answers at once.
	View() *pb.View
	// Changed returns a channel that is closed when View has changed in a way that is to be told at once.
	Changed() <-chan struct{}
	// InFlight returns at most so many transactions in flight at this node.
	InFlight(most int) []*pb.TransactionInFlight
	// Lookup tells what became of a transaction.
	Lookup(ctx context.Context, gid txn.GID) (*pb.LookupResponse, error)
	// Conflicts returns at most so many conflicts of a kind, "" for all, that this node knows of, the newest first.
	Conflicts(ctx context.Context, kind string, most int) []*pb.Conflict
	// Happened returns this node's events that a request selects, the newest first.
	Happened(req *pb.EventsRequest) []*pb.Event
	// Follow returns this node's events behind a place that a request selects, the oldest first; the place behind all
	// of them; and a channel that is closed when there are more.
	Follow(after *pb.EventCursor, req *pb.FollowRequest) ([]*pb.Event, *pb.EventCursor, <-chan struct{})
}

// The bounds of a page: how many items are returned when the request does not say, and at most.
const (
	DefaultPage = 100
	MaxPage     = 1000
)

// page returns how many items a request is for.
func page(limit uint32) (int, error) {
	if limit > MaxPage {
		return 0, status.Errorf(codes.InvalidArgument, "limit %d: must be at most %d", limit, MaxPage)
	}
	return cmp.Or(int(limit), DefaultPage), nil
}

// WatchInterval is the least time between two messages of Watch, and WatchRefresh the most: figures such as ages change
// without anything happening.
const (
	WatchInterval = 250 * time.Millisecond
	WatchRefresh  = time.Second
)

// Observe implements the service. It is safe for concurrent use.
type Observe struct {
	pb.UnimplementedObserveServer
	cfg  Config
	node Observed

	closing context.Context
	close   context.CancelFunc
}

// NewObserve returns the service. Of the Config it uses Node, Members and Peers.
func NewObserve(c Config, node Observed) *Observe {
	o := &Observe{cfg: c, node: node}
	o.closing, o.close = context.WithCancel(context.Background())
	return o
}

// Register adds the service to a gRPC server.
func (o *Observe) Register(on grpc.ServiceRegistrar) { pb.RegisterObserveServer(on, o) }

// Close ends watches, so that a graceful stop of the server does not wait for them.
func (o *Observe) Close() { o.close() }

// Watch implements the RPC. There is no queue: who reads slowly gets the newest view when it has read the last.
func (o *Observe) Watch(_ *pb.WatchRequest, stream grpc.ServerStreamingServer[pb.View]) error {
	interval, refresh := time.NewTicker(WatchInterval), time.NewTimer(WatchRefresh)
	defer interval.Stop()
	defer refresh.Stop()
	var last *pb.View // timeless
	for {
		changed := o.node.Changed() // before the view: what changes meanwhile is seen next time
		v := o.node.View()
		if now := timeless(v); last == nil || !proto.Equal(last, now) {
			if err := stream.Send(v); err != nil {
				return err
			}
			last = now
			refresh.Reset(WatchRefresh)
		}
		select {
		case <-changed:
		case <-interval.C:
		case <-refresh.C:
			last = nil
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		case <-o.closing.Done():
			return status.Error(codes.Unavailable, "the node is stopping")
		}
		// A burst of changes is one.
		select {
		case <-interval.C:
		case <-stream.Context().Done():
		case <-o.closing.Done():
		}
	}
}

// timeless returns a copy of a view without what changes by itself; ages only tell on which side of the limit they are. Two
// that differ do so in more than the time that has passed between them.
func timeless(v *pb.View) *pb.View {
	v = proto.CloneOf(v)
	v.TimeMs = 0
	for _, n := range v.Nodes {
		n.ReportAgeSeconds = side(n.ReportAgeSeconds, v.HeartbeatTimeoutSeconds)
		if h := n.Health; h != nil {
			h.UptimeSeconds, h.QueueSeconds, h.OldestTransactionSeconds, h.DiskFreeBytes, h.SlotLagBytes = 0, 0, 0, 0, 0
		}
		for _, cell := range n.Hears {
			cell.AgeSeconds = side(cell.AgeSeconds, v.HeartbeatTimeoutSeconds)
			cell.JitterSeconds, cell.RoundTripSeconds = 0, nil
		}
	}
	return v
}

func side(age *float64, limit float64) *float64 {
	if age == nil {
		return nil
	}
	late := 0.0
	if *age > limit {
		late = 1
	}
	return &late
}

// askOthers collects what the other members contribute, within askTimeout.
func askOthers[T any](ctx context.Context, o *Observe, ask func(context.Context, pb.ObserveClient) ([]T, error)) (all []T, silent []*pb.Unreachable, err error) {
	asking, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var mu sync.Mutex // guards all and silent
	var group sync.WaitGroup
	for _, m := range o.cfg.Members() {
		if m.ID == o.cfg.Node {
			continue
		}
		group.Go(func() {
			var got []T
			conn, err := o.cfg.Peers.Conn(m.ID)
			if err == nil {
				got, err = ask(asking, pb.NewObserveClient(conn))
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				silent = append(silent, &pb.Unreachable{Node: uint32(m.ID), Reason: status.Convert(err).Message()})
			}
			all = append(all, got...)
		})
	}
	group.Wait()
	if err := ctx.Err(); err != nil {
		return nil, nil, status.FromContextError(err).Err()
	}
	slices.SortFunc(silent, func(a, b *pb.Unreachable) int { return cmp.Compare(a.Node, b.Node) })
	return all, silent, nil
}

// Transactions implements the RPC.
func (o *Observe) Transactions(ctx context.Context, req *pb.TransactionsRequest) (*pb.TransactionsResponse, error) {
	most, err := page(req.GetLimit())
	if err != nil {
		return nil, err
	}
	resp := &pb.TransactionsResponse{Transactions: o.node.InFlight(most)}
	if req.GetLocal() {
		return resp, nil
	}
	others, silent, err := askOthers(ctx, o, func(ctx context.Context, c pb.ObserveClient) ([]*pb.TransactionInFlight, error) {
		r, err := c.Transactions(ctx, &pb.TransactionsRequest{Local: true, Limit: req.GetLimit()})
		return r.GetTransactions(), err
	})
	resp.Transactions, resp.Unreachable = append(resp.Transactions, others...), silent
	slices.SortFunc(resp.Transactions, func(a, b *pb.TransactionInFlight) int { return cmp.Compare(b.AgeSeconds, a.AgeSeconds) })
	return resp, err
}

// Lookup implements the RPC.
func (o *Observe) Lookup(ctx context.Context, req *pb.LookupRequest) (*pb.LookupResponse, error) {
	gid, err := txn.ParseGID(req.GetGid())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "%v: one looks like 2-9f86d081884c7d65-42", err)
	}
	return o.node.Lookup(ctx, gid)
}

// Conflicts implements the RPC. All nodes know of what the log has decided; the answering node's word comes first.
func (o *Observe) Conflicts(ctx context.Context, req *pb.ConflictsRequest) (*pb.ConflictsResponse, error) {
	most, err := page(req.GetLimit())
	if err != nil {
		return nil, err
	}
	// Where they were PostgreSQL may take its time to say, and whoever asks for all members' waits no longer than for one of these.
	locating, cancel := context.WithTimeout(ctx, askTimeout/2)
	resp := &pb.ConflictsResponse{Conflicts: o.node.Conflicts(locating, req.GetKind(), most)}
	cancel()
	if req.GetLocal() {
		return resp, nil
	}
	others, silent, err := askOthers(ctx, o, func(ctx context.Context, c pb.ObserveClient) ([]*pb.Conflict, error) {
		r, err := c.Conflicts(ctx, &pb.ConflictsRequest{Local: true, Limit: req.GetLimit(), Kind: req.GetKind()})
		return r.GetConflicts(), err
	})
	if err != nil {
		return nil, err
	}
	known := make(map[string]bool)
	for _, c := range resp.Conflicts {
		known[c.Gid] = true
	}
	for _, c := range others {
		if c.Gid == "" || !known[c.Gid] {
			known[c.Gid] = true
			resp.Conflicts = append(resp.Conflicts, c)
		}
	}
	slices.SortStableFunc(resp.Conflicts, func(a, b *pb.Conflict) int { return cmp.Compare(b.TimeMs, a.TimeMs) })
	resp.Conflicts, resp.Unreachable = resp.Conflicts[:min(len(resp.Conflicts), most)], silent
	return resp, nil
}

// Events implements the RPC.
func (o *Observe) Events(ctx context.Context, req *pb.EventsRequest) (*pb.EventsResponse, error) {
	most, err := page(req.GetLimit())
	if err != nil {
		return nil, err
	}
	own := proto.CloneOf(req)
	own.Limit, own.Local = uint32(most), true
	resp := &pb.EventsResponse{Cursors: []*pb.EventCursor{o.newest()}} // before the events: what comes in between is shown, and known by its number
	resp.Events = o.node.Happened(own)
	if req.GetLocal() || req.GetAfter() != 0 {
		return resp, nil
	}
	others, silent, err := askOthers(ctx, o, func(ctx context.Context, c pb.ObserveClient) ([]*pb.EventsResponse, error) {
		r, err := c.Events(ctx, own)
		return []*pb.EventsResponse{r}, err
	})
	if err != nil {
		return nil, err
	}
	resp.Unreachable = silent
	for _, r := range others {
		resp.Events, resp.Cursors = append(resp.Events, r.GetEvents()...), append(resp.Cursors, r.GetCursors()...)
	}
	slices.SortStableFunc(resp.Events, func(a, b *pb.Event) int {
		return cmp.Or(cmp.Compare(b.TimeMs, a.TimeMs), cmp.Compare(a.Node, b.Node), cmp.Compare(b.Number, a.Number))
	})
	resp.Events = resp.Events[:min(len(resp.Events), most)]
	return resp, nil
}

// String returns the name, as the command line shows it; empty for no role.
func (r Role) String() string {
	switch r {
	case Follower:
		return "follower"
	case Candidate:
		return "candidate"
	case Leader:
		return "leader"
	}
	return ""
}
