package admin

import (
	"context"
	"errors"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/quorate/quorate/internal/peers"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

const (
	// followRetry is how long to wait before a member is asked again.
	followRetry = time.Second
	// maxFollowed is how many events are sent in one message. An event has some KiB at most, a message 4 MiB.
	maxFollowed = 100
)

var errStranger = errors.New("another node answers")

// newest is the place behind all that this node has noted.
func (o *Observe) newest() *pb.EventCursor {
	_, at, _ := o.node.Follow(&pb.EventCursor{TimeMs: time.Now().UnixMilli()}, &pb.FollowRequest{})
	return at
}

// Follow implements the RPC.
func (o *Observe) Follow(req *pb.FollowRequest, stream grpc.ServerStreamingServer[pb.FollowResponse]) error {
	return o.FollowEach(stream.Context(), req, func(events []*pb.Event) error {
		return stream.Send(&pb.FollowResponse{Events: events})
	})
}

// FollowEach is Follow for this process: took gets the events of each message of the stream, until it returns an error, ctx
// ends, or Close is called. FollowEach returns the reason, never nil. took is not called concurrently, must not change the
// events, and may take its time.
//
// A goroutine for each member hands over what it gets; who reads slowly holds them up, and what they have not read waits in
// the members' logs of events, which are bounded. It ends with the stream only: while this node reads the log again, members
// are missing from the list that are back a moment later, and would be followed from the start.
func (o *Observe) FollowEach(ctx context.Context, req *pb.FollowRequest, took func([]*pb.Event) error) error {
	var group sync.WaitGroup
	defer group.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(o.closing, cancel)()
	places := make(map[txn.NodeID]*pb.EventCursor)
	for _, c := range req.GetAfter() {
		places[txn.NodeID(c.Node)] = c
	}
	came := make(chan []*pb.Event)
	following := make(map[txn.NodeID]bool)
	begin := func(id txn.NodeID) {
		following[id] = true
		at := places[id]
		if at == nil {
			at = &pb.EventCursor{Node: uint32(id), TimeMs: req.GetSinceMs()}
		}
		if id == o.cfg.Node {
			group.Go(func() { o.followOwn(ctx, at, req, came) })
		} else {
			group.Go(func() { o.followMember(ctx, id, at, req, came) })
		}
	}
	begin(o.cfg.Node)
	refresh := time.NewTicker(WatchRefresh)
	defer refresh.Stop()
	for {
		if !req.GetLocal() {
			for _, m := range o.cfg.Members() {
				if !following[m.ID] {
					begin(m.ID)
				}
			}
		}
		var found []*pb.Event
		select {
		case found = <-came:
		case <-refresh.C:
		case <-ctx.Done():
			if o.closing.Err() != nil {
				return status.Error(codes.Unavailable, "the node is stopping")
			}
			return status.FromContextError(ctx.Err()).Err()
		}
		if err := took(found); err != nil {
			return err
		}
	}
}

// followOwn hands over this node's events behind a place until ctx ends.
func (o *Observe) followOwn(ctx context.Context, at *pb.EventCursor, req *pb.FollowRequest, to chan<- []*pb.Event) {
	for {
		found, next, more := o.node.Follow(at, req)
		for len(found) > 0 {
			n := min(len(found), maxFollowed)
			select {
			case to <- found[:n]:
			case <-ctx.Done():
				return
			}
			found = found[n:]
		}
		at = next
		select {
		case <-more:
		case <-ctx.Done():
			return
		}
	}
}

// followMember hands over another member's events behind a place until ctx ends. While it is not reached, it is asked
// again and again.
func (o *Observe) followMember(ctx context.Context, id txn.NodeID, at *pb.EventCursor, req *pb.FollowRequest, to chan<- []*pb.Event) {
	own := proto.CloneOf(req)
	own.Local = true
	for {
		own.After = []*pb.EventCursor{at}
		if conn, err := o.cfg.Peers.Conn(id); err == nil {
			// That it has ended is all there is to know: who is not reached stands in the other answers.
			_ = peers.Receive(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[pb.FollowResponse], error) {
				return pb.NewObserveClient(conn).Follow(ctx, own)
			}, func(r *pb.FollowResponse) error {
				if len(r.Events) == 0 {
					return nil
				}
				if r.Events[0].Node != uint32(id) { // another node has its address now, and is followed by itself
					return errStranger
				}
				select {
				case to <- r.Events:
				case <-ctx.Done():
					return ctx.Err()
				}
				last := r.Events[len(r.Events)-1]
				at = &pb.EventCursor{Node: last.Node, Number: last.Number, TimeMs: last.TimeMs}
				return nil
			})
		}
		select {
		case <-time.After(followRetry):
		case <-ctx.Done():
			return
		}
	}
}
