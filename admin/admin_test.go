package admin_test

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"

	"github.com/quorate/quorate/admin"
	"github.com/quorate/quorate/internal/peers"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

type source admin.Status

func (s source) Status() admin.Status { return admin.Status(s) }

func (source) Barrier(context.Context, txn.GID) error { return errors.New("no log") }

func (source) Hash(context.Context, txn.GID, func()) (admin.Hashes, error) {
	return admin.Hashes{}, errors.New("no tables")
}

// serve starts one node's API on a listener.
func serve(t *testing.T, l net.Listener, c admin.Config) (*admin.Admin, *grpc.Server) {
	t.Helper()
	c.Peers = peers.New(func(id txn.NodeID) (string, bool) {
		for _, m := range c.Members() {
			if m.ID == id {
				return m.GRPC, true
			}
		}
		return "", false
	})
	a := admin.New(c)
	s := grpc.NewServer()
	a.Register(s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(l); err != nil {
			t.Errorf("serve: %v", err)
		}
	}()
	t.Cleanup(func() {
		a.Close()
		if err := c.Peers.Close(); err != nil {
			t.Error(err)
		}
		s.Stop()
		<-done
	})
	return a, s
}

func list(members ...admin.Member) func() []admin.Member {
	return func() []admin.Member { return members }
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func dial(t *testing.T, address string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func applied(csn txn.CSN) *txn.CSN { return &csn }

func TestStatus(t *testing.T) {
	l1, l2, stranger := listen(t), listen(t), listen(t)
	dead := listen(t)
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	members := []admin.Member{
		{ID: 1, Raft: "r1", GRPC: l1.Addr().String(), HTTP: "h1", Gateway: "g1"},
		{ID: 2, Raft: "r2", GRPC: l2.Addr().String(), HTTP: "h2", Gateway: "g2"},
		{ID: 3, Raft: "r3", GRPC: dead.Addr().String()},
		{ID: 4, Raft: "r4", GRPC: stranger.Addr().String()},
	}
	config := func(cluster byte, id txn.NodeID, s admin.Status) admin.Config { // after a forced recovery two have one name
		return admin.Config{Cluster: "c", ClusterID: txn.UUID{cluster}, Node: id, Version: "test", Members: list(members...), Source: source(s)}
	}
	serve(t, l1, config(1, 1, admin.Status{Leader: 2, Role: admin.Follower, Term: 7, CommitIndex: 100, AppliedIndex: 90,
		CSN: 50, Applied: applied(40), State: "catching-up", Reason: "behind"}))
	_, second := serve(t, l2, config(1, 2, admin.Status{Leader: 2, Role: admin.Leader, Term: 7, CommitIndex: 104, AppliedIndex: 104,
		CSN: 52, Applied: applied(52), State: "active", Writes: true, Postgres: "18.4"}))
	serve(t, stranger, config(2, 4, admin.Status{State: "active", Writes: true, CSN: 1000}))

	client := pb.NewClusterClient(dial(t, l1.Addr().String()))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	resp, err := client.Status(ctx, &pb.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if resp.Cluster != "c" || txn.UUID(resp.ClusterId) != (txn.UUID{1}) || resp.Node != 1 || resp.Leader != 2 || resp.Term != 7 || resp.CommitIndex != 100 || resp.Csn != 52 || len(resp.Members) != 4 {
		t.Fatalf("status: %v", resp)
	}
	one, two, three, four := resp.Members[0], resp.Members[1], resp.Members[2], resp.Members[3]
	if one.Id != 1 || one.Role != pb.Role_ROLE_FOLLOWER || one.State != "catching-up" || one.AcceptsWrites || one.Reason != "behind" ||
		one.AppliedIndex != 90 || one.GetLag() != 12 || one.GatewayAddress != "g1" {
		t.Errorf("node 1: %v", one)
	}
	if two.Id != 2 || two.Role != pb.Role_ROLE_LEADER || !two.AcceptsWrites || two.AppliedIndex != 104 || two.Lag == nil || two.GetLag() != 0 ||
		two.RaftAddress != "r2" || two.PostgresVersion != "18.4" || two.LastContactMs == nil {
		t.Errorf("node 2: %v", two)
	}
	if three.Id != 3 || three.State != admin.NoContact || three.Reason == "" || three.LastContactMs != nil || three.Lag != nil || three.AcceptsWrites {
		t.Errorf("node 3, which does not run: %v", three)
	}
	if four.State != admin.NoContact || four.Reason == "" || four.Csn != 0 {
		t.Errorf("node 4, which is a stranger: %v", four)
	}

	local, err := client.Status(ctx, &pb.StatusRequest{Local: true})
	if err != nil || len(local.Members) != 1 || local.Members[0].Id != 1 {
		t.Errorf("local status: %v, %v", local, err)
	}

	second.Stop()
	resp, err = client.Status(ctx, &pb.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if gone := resp.Members[1]; gone.State != admin.NoContact || gone.LastContactMs == nil {
		t.Errorf("node 2, which has stopped: %v", gone)
	}
}

// A member that accepts connections and says nothing costs the time limit and no more.
func TestStatusOfSilentMember(t *testing.T) {
	l, silent := listen(t), listen(t)
	defer silent.Close()
	serve(t, l, admin.Config{Cluster: "c", Node: 1, Version: "test", Source: source{State: "active"},
		Members: list(admin.Member{ID: 1, GRPC: l.Addr().String()}, admin.Member{ID: 2, GRPC: silent.Addr().String()})})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	resp, err := pb.NewClusterClient(dial(t, l.Addr().String())).Status(ctx, &pb.StatusRequest{})
	if err != nil || resp.Members[1].State != admin.NoContact {
		t.Errorf("status: %v, %v", resp, err)
	}
}

func TestHealthAndReflection(t *testing.T) {
	l := listen(t)
	a, _ := serve(t, l, admin.Config{Cluster: "c", Node: 1, Version: "test", Members: list(admin.Member{ID: 1}), Source: source{}})
	conn := dial(t, l.Addr().String())
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, serving := range []bool{false, true, false} {
		a.SetServing(serving)
		resp, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
		if err != nil || (resp.Status == healthpb.HealthCheckResponse_SERVING) != serving {
			t.Errorf("health: %v, %v, want %v", resp, err, serving)
		}
	}
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range resp.GetListServicesResponse().GetService() {
		names = append(names, s.Name)
		if s.Name == "quorate.v1.Cluster" {
			return
		}
	}
	t.Errorf("reflection lists %v", names)
}
