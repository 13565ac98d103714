// Package admin serves a node's administrative API over gRPC, with the standard health and reflection services.
package admin

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/quorate/quorate/internal/peers"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// Source is the node, as far as the API needs it, safe for concurrent use.
type Source interface {
	// Status answers at once, whatever state the node is in.
	Status() Status
	// Barrier puts a barrier into the log.
	Barrier(ctx context.Context, id txn.GID) error
	// Hash hashes all replicated tables as of a barrier, which is put into the log only after Hash has called ready.
	Hash(ctx context.Context, barrier txn.GID, ready func()) (Hashes, error)
}

// Status is what a node knows.
type Status struct {
	Leader      txn.NodeID // 0: nobody it knows of
	Role        Role
	Term        uint64
	CommitIndex txn.LogIndex
	// AppliedIndex and Applied: everything up to here is visible in this node's PostgreSQL. Applied is nil if it holds no
	// data, or that is not known yet.
	AppliedIndex txn.LogIndex
	Applied      *txn.CSN
	CSN          txn.CSN // the newest transaction known to commit
	State        string  // "active", or what the node is doing instead
	Writes       bool    // whether clients can commit writes here
	Reason       string  // why they cannot
	Postgres     string  // version of the server, empty while unknown
	LogFailure   string  // why the node stores nothing more of the log, empty: it does
	MaxNodes     int     // how many can have data at a time; 0: not known yet
	// Health and Hears are what the node says in its heartbeats; nil if it sends none.
	Health *pb.Health
	Hears  []*pb.Heard
}

// Role is the part a node plays in consensus.
type Role uint8

// The roles.
const (
	Follower Role = iota + 1
	Candidate
	Leader
)

// Member says where a node is found. HTTP and Gateway are shown only.
type Member struct {
	ID                        txn.NodeID
	Raft, GRPC, HTTP, Gateway string
	Witness                   bool // it has no data
}

// Config of an Admin. All fields are required.
type Config struct {
	Cluster   string
	ClusterID txn.UUID
	Node      txn.NodeID
	Version   string // of Quorate
	// Members returns the members as of now, this node included if it is one. It must be safe for concurrent use and
	// not block.
	Members func() []Member
	// Peers connects to the other members. It stays the caller's, who closes it after the Admin.
	Peers      *peers.Pool
	Source     Source
	Membership Membership
}

// askTimeout bounds how long Status waits for other members.
const askTimeout = time.Second

// NoContact is the state of a member that did not answer.
const NoContact = "no contact"

// Admin implements the API. It is safe for concurrent use.
type Admin struct {
	pb.UnimplementedClusterServer
	cfg    Config
	health *health.Server

	mu    sync.Mutex               // guards heard
	heard map[txn.NodeID]time.Time // when a member last answered
}

// New returns an Admin that connects to nobody until it is asked.
func New(c Config) *Admin {
	a := &Admin{cfg: c, health: health.NewServer(), heard: make(map[txn.NodeID]time.Time)}
	a.SetServing(false)
	return a
}

// Register adds the API, health and reflection to a gRPC server. Reflection shows what was registered before the
// server starts to serve.
func (a *Admin) Register(on *grpc.Server) {
	pb.RegisterClusterServer(on, a)
	pb.RegisterMembershipServer(on, a.Membership())
	healthpb.RegisterHealthServer(on, a.health)
	reflection.Register(on)
}

// Membership is the service as this node itself uses it: it hands calls on like those of others.
func (a *Admin) Membership() pb.MembershipServer { return &membership{a: a} }

// SetServing tells the health service whether this node accepts writes. Initially it does not.
func (a *Admin) SetServing(writes bool) {
	s := healthpb.HealthCheckResponse_NOT_SERVING
	if writes {
		s = healthpb.HealthCheckResponse_SERVING
	}
	a.health.SetServingStatus("", s)
	a.health.SetServingStatus(pb.Cluster_ServiceDesc.ServiceName, s)
}

// Close ends health watches, so that a graceful stop of the server does not wait for them. Call it before that stop.
func (a *Admin) Close() { a.health.Shutdown() }

// Status implements the RPC.
func (a *Admin) Status(ctx context.Context, req *pb.StatusRequest) (*pb.StatusResponse, error) {
	own := a.cfg.Source.Status()
	resp := &pb.StatusResponse{
		Cluster: a.cfg.Cluster, ClusterId: a.cfg.ClusterID[:], Node: uint32(a.cfg.Node), Leader: uint32(own.Leader),
		Term: own.Term, CommitIndex: uint64(own.CommitIndex), MaxNodes: uint32(own.MaxNodes),
	}
	if req.GetLocal() {
		resp.Members = []*pb.Member{a.self(own)}
	} else {
		resp.Members = a.askAll(ctx, own)
		if err := ctx.Err(); err != nil {
			return nil, status.FromContextError(err).Err()
		}
	}
	for _, m := range resp.Members {
		resp.Csn = max(resp.Csn, m.Csn)
	}
	for _, m := range resp.Members {
		m.Lag = Lag(resp.Csn, m.AppliedCsn)
	}
	return resp, nil
}

// Lag returns how many transactions who has applied so much is behind the newest; nil for who holds no data.
func Lag(newest uint64, applied *uint64) *uint64 {
	if applied == nil {
		return nil
	}
	return proto.Uint64(newest - min(newest, *applied))
}

// askAll returns all members in the order of their ids.
func (a *Admin) askAll(ctx context.Context, own Status) []*pb.Member {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	all := a.cfg.Members()
	if !slices.ContainsFunc(all, func(m Member) bool { return m.ID == a.cfg.Node }) {
		all = append(slices.Clone(all), Member{ID: a.cfg.Node}) // it was removed, or is not a member yet: it says so itself
	}
	members := make([]*pb.Member, len(all))
	var wg sync.WaitGroup
	for i, m := range all {
		if m.ID == a.cfg.Node {
			members[i] = a.self(own)
			continue
		}
		wg.Go(func() { members[i] = a.ask(ctx, m) })
	}
	wg.Wait()
	slices.SortFunc(members, func(x, y *pb.Member) int { return int(x.Id) - int(y.Id) })
	return members
}

// ask returns what a member says of itself. Who it is and where it is found is not its to say.
func (a *Admin) ask(ctx context.Context, m Member) *pb.Member {
	got := &pb.Member{State: NoContact}
	resp, err := a.askStatus(ctx, m.ID)
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case err != nil:
		got.Reason = status.Convert(err).Message()
	case !bytes.Equal(resp.ClusterId, a.cfg.ClusterID[:]) || resp.Node != uint32(m.ID) || len(resp.Members) != 1:
		got.Reason = fmt.Sprintf("%s is node %d of cluster %q (%x)", m.GRPC, resp.Node, resp.Cluster, resp.ClusterId)
	default:
		got, a.heard[m.ID] = resp.Members[0], time.Now()
	}
	got.LastContactMs = nil
	if heard, ever := a.heard[m.ID]; ever {
		got.LastContactMs = proto.Uint64(uint64(time.Since(heard).Milliseconds()))
	}
	m.describe(got)
	return got
}

func (a *Admin) askStatus(ctx context.Context, id txn.NodeID) (*pb.StatusResponse, error) {
	conn, err := a.cfg.Peers.Conn(id)
	if err != nil {
		return nil, err
	}
	return pb.NewClusterClient(conn).Status(ctx, &pb.StatusRequest{Local: true})
}

func (a *Admin) self(s Status) *pb.Member {
	got := &pb.Member{
		State: s.State, AcceptsWrites: s.Writes, Reason: s.Reason, Role: roles[s.Role],
		Term: s.Term, CommitIndex: uint64(s.CommitIndex), AppliedIndex: uint64(s.AppliedIndex),
		Csn: uint64(s.CSN), AppliedCsn: (*uint64)(s.Applied), Version: a.cfg.Version, PostgresVersion: s.Postgres,
		LastContactMs: proto.Uint64(0), Health: s.Health, Hears: s.Hears, LogFailure: s.LogFailure,
	}
	got.Id = uint32(a.cfg.Node)
	for _, m := range a.cfg.Members() {
		if m.ID == a.cfg.Node {
			m.describe(got)
		}
	}
	return got
}

var roles = map[Role]pb.Role{Follower: pb.Role_ROLE_FOLLOWER, Candidate: pb.Role_ROLE_CANDIDATE, Leader: pb.Role_ROLE_LEADER}

func (m Member) describe(got *pb.Member) {
	got.Id = uint32(m.ID)
	got.RaftAddress, got.GrpcAddress, got.HttpAddress, got.GatewayAddress = m.Raft, m.GRPC, m.HTTP, m.Gateway
}
