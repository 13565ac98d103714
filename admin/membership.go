package admin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// Membership changes who the members are, as far as one node can, safe for concurrent use. Every call can be repeated.
// Errors are Refusals, or wrap ErrNotLeader where the leader is needed and this node does not lead; everything else can be
// tried again.
type Membership interface {
	Members() Members
	// AwaitLeader waits until a leader is known, or another one than the one that has just refused.
	AwaitLeader(ctx context.Context) error

	// These are for the leader.

	// Add admits a node, by a request: asked again, the answer is the same.
	Add(ctx context.Context, a Applicant) (Admission, error)
	// Remove hands over first if it is the leader that is removed, and then wraps ErrNotLeader.
	Remove(ctx context.Context, id txn.NodeID, force bool, reason string) error
	Promote(ctx context.Context, id txn.NodeID) error
	Demote(ctx context.Context, id txn.NodeID, force bool) error
	// TransferLeadership lets another voter lead, 0: whoever has most of the log.
	TransferLeadership(ctx context.Context, to txn.NodeID) error

	// These are for the node that they are about.

	// Drain returns when no session is left; cutOff says that not all of them ended by themselves.
	Drain(ctx context.Context, patience time.Duration) (cutOff bool, err error)
	Resume(ctx context.Context) error
	Resync(ctx context.Context) error
}

// Members is who belongs to the cluster, as one node has it.
type Members struct {
	ClusterID txn.UUID // zero: the log has not founded the cluster yet
	Members   []ListedMember
	Highest   txn.NodeID // id that was ever given
}

// ListedMember is one of them.
type ListedMember struct {
	Member
	Role     string
	Voter    bool
	Slot     int // negative: none
	Started  bool
	Version  string
	Postgres string
}

// Applicant wants to be a member.
type Applicant struct {
	Request txn.UUID
	Cluster string // by the name that it is configured with
	// ClusterID is the cluster that it belongs to already; zero: none.
	ClusterID txn.UUID
	Role      string
	Replaces  txn.NodeID
	// Supersedes is a member that it will have leave once it is active.
	Supersedes txn.NodeID
	Member     // without an ID
	Version    string
	Postgres   string
	Token      string
	Format     uint32 // newest of the log's entries that it can read; 0: 1
}

// Admission is what a candidate gets.
type Admission struct {
	ClusterID txn.UUID
	Node      txn.NodeID
	Peers     []string // gRPC addresses
}

// ErrNotLeader: only the leader can do it.
var ErrNotLeader = errors.New("this node does not lead")

// Refusal is an answer that trying again does not change.
type Refusal struct {
	Code    codes.Code
	Message string // why, and what helps
}

func (r *Refusal) Error() string { return r.Message }

// GRPCStatus has status.Code find the code.
func (r *Refusal) GRPCStatus() *status.Status { return status.New(r.Code, r.Message) }

// Refuse returns a Refusal.
func Refuse(code codes.Code, format string, args ...any) error {
	return &Refusal{code, fmt.Sprintf(format, args...)}
}

// forwarded, in the metadata of a call, keeps it from going round in circles.
const forwarded = "quorate-forwarded"

// changeTimeout bounds calls without a deadline of their own.
const changeTimeout = 30 * time.Second

// defaultPatience is how long transactions have to end if nobody says otherwise.
const defaultPatience = 30 * time.Second

type membership struct {
	pb.UnimplementedMembershipServer
	a *Admin
}

// toStatus turns an error of a Membership into one that a client understands.
func toStatus(ctx context.Context, err error) error {
	var refusal *Refusal
	switch {
	case err == nil:
		return nil
	case errors.As(err, &refusal):
		return status.Error(refusal.Code, refusal.Message)
	case ctx.Err() != nil:
		return status.Errorf(status.FromContextError(ctx.Err()).Code(), "the time is over, and it is not done: %v", err)
	}
	if s, ok := status.FromError(err); ok {
		return s.Err()
	}
	return status.Errorf(codes.Unavailable, "%v; try again", err)
}

func isForwarded(ctx context.Context) bool {
	return len(metadata.ValueFromIncomingContext(ctx, forwarded)) > 0
}

// forward returns the context of a call that is handed on.
func forward(ctx context.Context, by txn.NodeID) context.Context {
	return metadata.AppendToOutgoingContext(ctx, forwarded, strconv.FormatUint(uint64(by), 10))
}

// client reaches another node's service.
func (m *membership) client(id txn.NodeID) (pb.MembershipClient, error) {
	conn, err := m.a.cfg.Peers.Conn(id)
	if err != nil {
		return nil, err
	}
	return pb.NewMembershipClient(conn), nil
}

// remote is a method of the generated client.
type remote[Req, Resp any] func(pb.MembershipClient, context.Context, Req, ...grpc.CallOption) (Resp, error)

// atLeader does it here if this node leads, else it asks whoever does, and again while leadership changes.
func atLeader[Req, Resp any](ctx context.Context, m *membership, req Req, there remote[Req, Resp], here func(context.Context) (Resp, error)) (resp Resp, err error) {
	// A little sooner than the caller gives up: he should hear why.
	limit := changeTimeout
	if deadline, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(deadline)*9/10)
	}
	asked := ctx
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var refused error // by the leader, at the last attempt
	for {
		leader := m.a.cfg.Source.Status().Leader
		switch {
		case leader == m.a.cfg.Node:
			resp, err = here(ctx)
			if !errors.Is(err, ErrNotLeader) {
				return resp, toStatus(ctx, err)
			}
		case isForwarded(ctx):
			return resp, status.Errorf(codes.Unavailable, "node %s does not lead any more", m.a.cfg.Node)
		case leader == 0:
			err = status.Error(codes.Unavailable, "no leader is known: is a majority of the voters alive?")
		default:
			var client pb.MembershipClient
			if client, err = m.client(leader); err == nil {
				resp, err = there(client, forward(ctx, m.a.cfg.Node), req)
				switch code := status.Code(err); {
				case code == codes.Unavailable:
					refused = err
				case code == codes.DeadlineExceeded && refused != nil:
					// Why it could not be done says more than that the time was over in the midst of an attempt. The leader's clock may
					// have said so before ours.
					return resp, toStatus(asked, refused)
				default:
					return resp, toStatus(asked, err)
				}
			}
		}
		if waiting := m.a.cfg.Membership.AwaitLeader(ctx); waiting != nil {
			return resp, toStatus(asked, err)
		}
	}
}

// atNode does it here if this node is meant, else it asks the one that is.
func atNode[Req, Resp any](ctx context.Context, m *membership, id uint32, req Req, there remote[Req, Resp], here func(context.Context) (Resp, error)) (resp Resp, err error) {
	node := txn.NodeID(id)
	if node == 0 || node == m.a.cfg.Node {
		resp, err = here(ctx)
		return resp, toStatus(ctx, err)
	}
	if err := m.known(node); err != nil {
		return resp, toStatus(ctx, err)
	}
	if isForwarded(ctx) {
		return resp, status.Errorf(codes.Unavailable, "at the address of node %s is node %s", node, m.a.cfg.Node)
	}
	client, err := m.client(node)
	if err != nil {
		return resp, toStatus(ctx, err)
	}
	resp, err = there(client, forward(ctx, m.a.cfg.Node), req)
	if status.Code(err) == codes.Unavailable {
		err = status.Errorf(codes.Unavailable, "node %s: %s", node, status.Convert(err).Message())
	}
	return resp, toStatus(ctx, err)
}

// known returns a Refusal unless id is a member.
func (m *membership) known(id txn.NodeID) error { return m.a.cfg.Membership.Members().Known(id) }

// Removed reports whether id was a member, and is none any more. No node has the id 0.
func (m Members) Removed(id txn.NodeID) bool {
	return id != 0 && id <= m.Highest && !slices.ContainsFunc(m.Members, func(x ListedMember) bool { return x.ID == id })
}

// Known returns nil if id is a member, else a Refusal.
func (m Members) Known(id txn.NodeID) error {
	if slices.ContainsFunc(m.Members, func(x ListedMember) bool { return x.ID == id }) {
		return nil
	}
	if m.Removed(id) {
		return Refuse(codes.NotFound, "node %s was removed", id)
	}
	return Refuse(codes.NotFound, "node %s has never been a member; \"quorate status\" shows the members", id)
}

func (m *membership) List(context.Context, *pb.ListMembersRequest) (*pb.ListMembersResponse, error) {
	have := m.a.cfg.Membership.Members()
	resp := &pb.ListMembersResponse{Cluster: m.a.cfg.Cluster, ClusterId: have.ClusterID[:], Node: uint32(m.a.cfg.Node), Highest: uint32(have.Highest)}
	for _, x := range have.Members {
		listed := &pb.ListedMember{
			Id: uint32(x.ID), Role: x.Role, Voter: x.Voter, Started: x.Started, RaftAddress: x.Raft, GrpcAddress: x.GRPC,
			HttpAddress: x.HTTP, GatewayAddress: x.Gateway, Version: x.Version, PostgresVersion: x.Postgres,
		}
		if x.Slot >= 0 {
			slot := uint32(x.Slot)
			listed.Slot = &slot
		}
		resp.Members = append(resp.Members, listed)
	}
	return resp, nil
}

func (m *membership) Add(ctx context.Context, req *pb.AddRequest) (*pb.AddResponse, error) {
	if len(req.Request) != len(txn.UUID{}) || txn.UUID(req.Request).IsZero() {
		return nil, status.Error(codes.InvalidArgument, "request: must be 16 random bytes")
	}
	var cluster txn.UUID
	switch len(req.ClusterId) {
	case 0:
	case len(cluster):
		cluster = txn.UUID(req.ClusterId)
	default:
		return nil, status.Error(codes.InvalidArgument, "cluster_id: must be 16 bytes, or empty")
	}
	for name, address := range map[string]string{"raft_address": req.RaftAddress, "grpc_address": req.GrpcAddress} {
		if address == "" {
			return nil, status.Errorf(codes.InvalidArgument, "%s: is required", name)
		}
	}
	return atLeader(ctx, m, req, pb.MembershipClient.Add, func(ctx context.Context) (*pb.AddResponse, error) {
		got, err := m.a.cfg.Membership.Add(ctx, Applicant{
			Request: txn.UUID(req.Request), Cluster: req.Cluster, ClusterID: cluster, Role: req.Role, Replaces: txn.NodeID(req.Replaces),
			Member:  Member{Raft: req.RaftAddress, GRPC: req.GrpcAddress, HTTP: req.HttpAddress, Gateway: req.GatewayAddress},
			Version: req.Version, Postgres: req.PostgresVersion, Token: req.Token, Format: req.LogFormat, Supersedes: txn.NodeID(req.Supersedes),
		})
		if err != nil {
			return nil, err
		}
		return &pb.AddResponse{Cluster: m.a.cfg.Cluster, ClusterId: got.ClusterID[:], Node: uint32(got.Node), Peers: got.Peers}, nil
	})
}

func (m *membership) Remove(ctx context.Context, req *pb.RemoveRequest) (*pb.RemoveResponse, error) {
	return atLeader(ctx, m, req, pb.MembershipClient.Remove, func(ctx context.Context) (*pb.RemoveResponse, error) {
		return &pb.RemoveResponse{}, m.a.cfg.Membership.Remove(ctx, txn.NodeID(req.Node), req.Force, req.Reason)
	})
}

func (m *membership) Leave(ctx context.Context, req *pb.LeaveRequest) (*pb.LeaveResponse, error) {
	if m.a.cfg.Membership.Members().Removed(txn.NodeID(req.Node)) {
		return &pb.LeaveResponse{}, nil
	}
	return atNode(ctx, m, req.Node, req, pb.MembershipClient.Leave, func(ctx context.Context) (*pb.LeaveResponse, error) {
		_, err := m.a.cfg.Membership.Drain(ctx, patience(req.TimeoutMs))
		if err == nil {
			removal := &pb.RemoveRequest{Node: uint32(m.a.cfg.Node), Force: req.Force, Reason: "it has left"}
			_, err = m.Remove(unforwarded(ctx), removal)
		}
		if err != nil {
			// Whoever asked does not know that clients were sent away, and would have to bring them back.
			return nil, errors.Join(err, m.a.cfg.Membership.Resume(ctx))
		}
		return &pb.LeaveResponse{}, nil
	})
}

// unforwarded is the context of a call of this node's own.
func unforwarded(ctx context.Context) context.Context {
	return metadata.NewIncomingContext(ctx, metadata.MD{})
}

func (m *membership) Promote(ctx context.Context, req *pb.PromoteRequest) (*pb.PromoteResponse, error) {
	return atLeader(ctx, m, req, pb.MembershipClient.Promote, func(ctx context.Context) (*pb.PromoteResponse, error) {
		return &pb.PromoteResponse{}, m.a.cfg.Membership.Promote(ctx, txn.NodeID(req.Node))
	})
}

func (m *membership) Demote(ctx context.Context, req *pb.DemoteRequest) (*pb.DemoteResponse, error) {
	return atLeader(ctx, m, req, pb.MembershipClient.Demote, func(ctx context.Context) (*pb.DemoteResponse, error) {
		return &pb.DemoteResponse{}, m.a.cfg.Membership.Demote(ctx, txn.NodeID(req.Node), req.Force)
	})
}

func (m *membership) TransferLeadership(ctx context.Context, req *pb.TransferLeadershipRequest) (*pb.TransferLeadershipResponse, error) {
	return atLeader(ctx, m, req, pb.MembershipClient.TransferLeadership, func(ctx context.Context) (*pb.TransferLeadershipResponse, error) {
		if err := m.a.cfg.Membership.TransferLeadership(ctx, txn.NodeID(req.To)); err != nil {
			return nil, err
		}
		return &pb.TransferLeadershipResponse{Leader: uint32(m.a.cfg.Source.Status().Leader)}, nil
	})
}

func (m *membership) Drain(ctx context.Context, req *pb.DrainRequest) (*pb.DrainResponse, error) {
	return atNode(ctx, m, req.Node, req, pb.MembershipClient.Drain, func(ctx context.Context) (*pb.DrainResponse, error) {
		cutOff, err := m.a.cfg.Membership.Drain(ctx, patience(req.TimeoutMs))
		return &pb.DrainResponse{CutOff: cutOff}, err
	})
}

func patience(ms uint64) time.Duration {
	if ms == 0 {
		return defaultPatience
	}
	return time.Duration(min(ms, uint64(24*time.Hour/time.Millisecond))) * time.Millisecond
}

func (m *membership) Resume(ctx context.Context, req *pb.ResumeRequest) (*pb.ResumeResponse, error) {
	return atNode(ctx, m, req.Node, req, pb.MembershipClient.Resume, func(ctx context.Context) (*pb.ResumeResponse, error) {
		return &pb.ResumeResponse{}, m.a.cfg.Membership.Resume(ctx)
	})
}

func (m *membership) Resync(ctx context.Context, req *pb.ResyncRequest) (*pb.ResyncResponse, error) {
	return atNode(ctx, m, req.Node, req, pb.MembershipClient.Resync, func(ctx context.Context) (*pb.ResyncResponse, error) {
		return &pb.ResyncResponse{}, m.a.cfg.Membership.Resync(ctx)
	})
}
