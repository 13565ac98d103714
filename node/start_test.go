package node

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
	pb "github.com/quorate/quorate/proto/quorate/v1"
)

// TestAliveWhilePostgreSQLStarts: after a crash PostgreSQL may have minutes of WAL to replay. A supervisor that asks for
// liveness meanwhile must not take the process for dead: it would kill it, and the replay would begin again.
func TestAliveWhilePostgreSQLStarts(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cfg := loneNode(t)
	bin, dir := cfg.Postgres.BinDir, pgtest.Dir(t, true)
	programs, err := os.ReadDir(bin)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range programs {
		if p.Name() != "postgres" {
			if err := os.Symlink(filepath.Join(bin, p.Name()), filepath.Join(dir, p.Name())); err != nil {
				t.Fatal(err)
			}
		}
	}
	// A server that does not come until the test lets it.
	gate := filepath.Join(dir, "gate")
	if err := syscall.Mkfifo(gate, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(gate, 0o666); err != nil { // whatever the umask is: the server has an account of its own
		t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\ncase \"$*\" in *-D*) cat %s ;; esac\nexec %s/postgres \"$@\"\n", gate, bin)
	if err := os.WriteFile(filepath.Join(dir, "postgres"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	cfg.Postgres.BinDir = dir
	id := claim(t, cfg)
	var n *Node
	opened := make(chan error, 1)
	go func() {
		var err error
		n, err = Open(ctx, cfg, id, "test", slog.New(slog.NewTextHandler(t.Output(), nil)))
		if err != nil { // and no server comes, for which the test waits
			if gone, err := os.OpenFile(gate, os.O_RDONLY|syscall.O_NONBLOCK, 0); err == nil {
				_ = gone.Close()
			}
		}
		opened <- err
	}()
	open, err := os.OpenFile(gate, os.O_WRONLY, 0) // returns when the server is about to start
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{"/liveness": 200, "/readiness": 503, "/read-write": 503, "/metrics": 200, "/": 200} {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+cfg.Listen.HTTP+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp, err := http.DefaultClient.Do(req); err != nil {
			t.Errorf("%s: %v", path, err)
		} else {
			if resp.StatusCode != want {
				t.Errorf("%s: %s, want %d", path, resp.Status, want)
			}
			resp.Body.Close()
		}
	}
	conn, err := grpc.NewClient("passthrough:///"+cfg.Listen.GRPC, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const waits = "the node is starting: it waits for its PostgreSQL"
	if resp, err := pb.NewClusterClient(conn).Status(ctx, &pb.StatusRequest{}); err != nil || len(resp.Members) != 1 || resp.Members[0].State != stateStarting || resp.Members[0].Reason != waits ||
		resp.Members[0].LogFailure == "" { // others must not count on its vote
		t.Errorf("status: %+v, %v", resp, err)
	}
	if watch, err := pb.NewObserveClient(conn).Watch(ctx, &pb.WatchRequest{}); err != nil {
		t.Error(err)
	} else if v, err := watch.Recv(); err != nil || len(v.Nodes) != 1 || v.Nodes[0].Health.GetReason() != waits {
		t.Errorf("watch: %+v, %v", v, err)
	}
	if resp, err := pb.NewObserveClient(conn).Events(ctx, &pb.EventsRequest{}); err != nil || len(resp.Events) != 1 || resp.Events[0].Kind != eventStarted {
		t.Errorf("events: %+v, %v", resp, err)
	}
	for method, err := range map[string]error{
		"Drain":  conn.Invoke(ctx, pb.Membership_Drain_FullMethodName, &pb.DrainRequest{Node: 1}, &pb.DrainResponse{}),
		"Verify": conn.Invoke(ctx, pb.Cluster_Verify_FullMethodName, &pb.VerifyRequest{}, &pb.VerifyResponse{}),
		"Recall": conn.Invoke(ctx, pb.Heartbeat_Recall_FullMethodName, &pb.RecallRequest{ClusterId: id.ClusterID[:], Node: 1}, &pb.RecallResponse{}),
	} {
		if s := status.Convert(err); s.Code() != codes.Unavailable || s.Message() != waits {
			t.Errorf("%s: %v", method, err)
		}
	}
	if err := open.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
	awaitActive(t, ctx, n, nil)
	if err := n.Close(ctx); err != nil {
		t.Error(err)
	}
}
