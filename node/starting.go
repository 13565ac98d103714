package node

import (
	"context"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	consensuspb "github.com/quorate/quorate/proto/quorate/consensus/v1"
	pb "github.com/quorate/quorate/proto/quorate/v1"
)

// A node that starts, which may take as long as its PostgreSQL takes to replay its WAL, answers who asks over gRPC how it is and
// what it waits for. To the other members it is not there yet: it takes no heartbeats and sends none, for nobody may count on a vote
// that it cannot give, nor take for its log what it has not opened.

// looks reports whether a method only looks.
func looks(method string) bool {
	return method == pb.Cluster_Status_FullMethodName || strings.HasPrefix(method, "/"+pb.Observe_ServiceDesc.ServiceName+"/") ||
		strings.HasPrefix(method, "/grpc.health.") || strings.HasPrefix(method, "/grpc.reflection.")
}

// answering returns nil if a method can be answered now.
func (n *Node) answering(method string) error {
	if n.met.Load() || looks(method) {
		return nil
	}
	return status.Error(codes.Unavailable, n.states.current().reason)
}

// gate turns away calls to a node that starts. It stands behind the guard, which judges who calls.
func (n *Node) gate() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := n.answering(info.FullMethod); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := n.answering(info.FullMethod); err != nil {
				return err
			}
			return next(srv, s)
		}),
	}
}

// meet makes the node one among the members. From here on gRPC stops before what it serves is closed.
func (n *Node) meet(context.Context) error {
	n.met.Store(true)
	n.onClose(func(context.Context) error { n.grpc.Stop(); return nil })
	n.alongside(n.seen.beats.Run)
	return nil
}

// link is consensus' service, which must be there before the server serves, and so before consensus is.
type link struct {
	consensuspb.UnimplementedConsensusServer
	n *Node
}

// Link implements the service.
func (l link) Link(stream grpc.BidiStreamingServer[consensuspb.ToLeader, consensuspb.FromLeader]) error {
	c := l.n.consensus.Load()
	if c == nil {
		return status.Error(codes.Unavailable, "this node takes no part in the log: "+l.n.states.current().reason)
	}
	return c.Link(stream)
}
