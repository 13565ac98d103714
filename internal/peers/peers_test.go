package peers_test

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/internal/peers"
	"github.com/quorate/quorate/txn"
)

// member serves the health of one service, by which it is told from others.
func member(t *testing.T, name string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := health.NewServer()
	h.SetServingStatus(name, healthpb.HealthCheckResponse_SERVING)
	s := grpc.NewServer()
	healthpb.RegisterHealthServer(s, h)
	var served sync.WaitGroup
	served.Go(func() {
		if err := s.Serve(l); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(func() { s.Stop(); served.Wait() })
	return l.Addr().String()
}

type directory struct {
	mu sync.Mutex
	at map[txn.NodeID]string
}

func (d *directory) lookup(id txn.NodeID) (string, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	address, ok := d.at[id]
	return address, ok
}

func (d *directory) set(id txn.NodeID, address string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.at[id] = address
}

func (d *directory) remove(id txn.NodeID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.at, id)
}

func TestPool(t *testing.T) {
	d := &directory{at: map[txn.NodeID]string{1: member(t, "one")}}
	pool := peers.New(d.lookup)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	ask := func(service string) *grpc.ClientConn {
		t.Helper()
		conn, err := pool.Conn(1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: service}); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	first := ask("one")
	if ask("one") != first {
		t.Error("a second connection to the same address")
	}
	watch, err := healthpb.NewHealthClient(first).Watch(ctx, &healthpb.HealthCheckRequest{Service: "one"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}

	d.set(1, member(t, "moved"))
	if ask("moved") == first {
		t.Error("the connection leads to the earlier address")
	}
	if _, err := watch.Recv(); status.Code(err) != codes.Canceled {
		t.Errorf("a call over the connection to the earlier address goes on: %v", err)
	}

	if _, err := pool.Conn(2); !errors.Is(err, peers.ErrUnknown) {
		t.Errorf("a connection to nobody: %v", err)
	}
	d.remove(1)
	if _, err := pool.Conn(1); !errors.Is(err, peers.ErrUnknown) {
		t.Errorf("a connection to a member that was removed: %v", err)
	}
	d.set(1, member(t, "back"))
	last := ask("back")
	if err := errors.Join(pool.Close(), pool.Close()); err != nil {
		t.Error(err)
	}
	if _, err := healthpb.NewHealthClient(last).Check(ctx, &healthpb.HealthCheckRequest{}); status.Code(err) != codes.Canceled {
		t.Errorf("a call after Close: %v", err)
	}
	if _, err := pool.Conn(1); !errors.Is(err, peers.ErrClosed) {
		t.Errorf("a connection after Close: %v", err)
	}
}
