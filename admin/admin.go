// Package admin serves a node's administrative API over gRPC, with the standard health and reflection services.
package admin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

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
	// AppliedIndex and Applied: everything up to here is visible in this node's PostgreSQL.
	AppliedIndex txn.LogIndex
	Applied      txn.CSN
	CSN          txn.CSN // the newest transaction known to commit
	State        string  // "active", or what the node is doing instead
	Writes       bool    // whether clients can commit writes here
	Reason       string  // why they cannot
	Postgres     string  // version of the server, empty while unknown
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
}

// Config of an Admin. All fields are required.
type Config struct {
	Cluster string
	Node    txn.NodeID
	Version string   // of Quorate
	Members []Member // this node included
	Source  Source
}

// askTimeout bounds how long Status waits for other members.
const askTimeout = time.Second

// shortBackoff is for reconnecting to a member.
var shortBackoff = backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: askTimeout}

// NoContact is the state of a member that did not answer.
const NoContact = "no contact"

// Admin implements the API. It is safe for concurrent use.
type Admin struct {
	pb.UnimplementedClusterServer
	cfg    Config
	health *health.Server
	peers  map[txn.NodeID]*peer
}

// peer is a connection to another member. gRPC connects when it is first used, and again as needed.
type peer struct {
	conn   *grpc.ClientConn
	client pb.ClusterClient

	mu    sync.Mutex // guards heard
	heard time.Time  // when it last answered
}

// New returns an Admin that connects to nobody until it is asked.
func New(c Config) (*Admin, error) {
	a := &Admin{cfg: c, health: health.NewServer(), peers: map[txn.NodeID]*peer{}}
	a.SetServing(false)
	for _, m := range c.Members {
		if m.ID == c.Node {
			continue
		}
		conn, err := grpc.NewClient("passthrough:///"+m.GRPC,
			grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(),
			// gRPC's own pause after a failure grows to two minutes: a member that came back would look dead.
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: shortBackoff, MinConnectTimeout: askTimeout}))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("prepare connection to node %s: %w", m.ID, err), a.Close())
		}
		a.peers[m.ID] = &peer{conn: conn, client: pb.NewClusterClient(conn)}
	}
	return a, nil
}

// Register adds the API, health and reflection to a gRPC server. Reflection shows what was registered before the
// server starts to serve.
func (a *Admin) Register(on *grpc.Server) {
	pb.RegisterClusterServer(on, a)
	healthpb.RegisterHealthServer(on, a.health)
	reflection.Register(on)
}

// SetServing tells the health service whether this node accepts writes. Initially it does not.
func (a *Admin) SetServing(writes bool) {
	s := healthpb.HealthCheckResponse_NOT_SERVING
	if writes {
		s = healthpb.HealthCheckResponse_SERVING
	}
	a.health.SetServingStatus("", s)
	a.health.SetServingStatus(pb.Cluster_ServiceDesc.ServiceName, s)
}

// Close ends health watches, so that a graceful stop of the server does not wait for them, and the connections to the
// other members. Call it before that stop.
func (a *Admin) Close() error {
	a.health.Shutdown()
	var errs []error
	for _, p := range a.peers {
		errs = append(errs, p.conn.Close())
	}
	return errors.Join(errs...)
}

// Status implements the RPC.
func (a *Admin) Status(ctx context.Context, req *pb.StatusRequest) (*pb.StatusResponse, error) {
	own := a.cfg.Source.Status()
	resp := &pb.StatusResponse{
		Cluster: a.cfg.Cluster, Node: uint32(a.cfg.Node), Leader: uint32(own.Leader),
		Term: own.Term, CommitIndex: uint64(own.CommitIndex),
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
		if m.State != NoContact {
			m.Lag = resp.Csn - min(resp.Csn, m.AppliedCsn)
		}
	}
	return resp, nil
}

// askAll returns all members in the order of their ids.
func (a *Admin) askAll(ctx context.Context, own Status) []*pb.Member {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	members := make([]*pb.Member, len(a.cfg.Members))
	var wg sync.WaitGroup
	for i, m := range a.cfg.Members {
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
	p := a.peers[m.ID]
	resp, err := p.client.Status(ctx, &pb.StatusRequest{Local: true})
	got := &pb.Member{State: NoContact}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case err != nil:
		got.Reason = status.Convert(err).Message()
	case resp.Cluster != a.cfg.Cluster || resp.Node != uint32(m.ID) || len(resp.Members) != 1:
		got.Reason = fmt.Sprintf("%s is node %d of cluster %q", m.GRPC, resp.Node, resp.Cluster)
	default:
		got, p.heard = resp.Members[0], time.Now()
	}
	got.LastContactMs = nil
	if !p.heard.IsZero() {
		got.LastContactMs = proto.Uint64(uint64(time.Since(p.heard).Milliseconds()))
	}
	m.describe(got)
	return got
}

func (a *Admin) self(s Status) *pb.Member {
	got := &pb.Member{
		State: s.State, AcceptsWrites: s.Writes, Reason: s.Reason, Role: roles[s.Role],
		Term: s.Term, CommitIndex: uint64(s.CommitIndex), AppliedIndex: uint64(s.AppliedIndex),
		Csn: uint64(s.CSN), AppliedCsn: uint64(s.Applied), Version: a.cfg.Version, PostgresVersion: s.Postgres,
		LastContactMs: proto.Uint64(0),
	}
	for _, m := range a.cfg.Members {
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
