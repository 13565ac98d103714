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

	"github.com/quorate/quorate/internal/pgserver/pgtest"
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
