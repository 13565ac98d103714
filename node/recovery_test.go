package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/pgserver/pgtest"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// TestLogForgetsOnlyWhatIsDurable: what a snapshot covers, the node's own transactions included, is still there after
// PostgreSQL was killed, although their commits were asynchronous; and the node comes back from that snapshot, as the
// same process and as another one. A PostgreSQL that was set back behind it is found out.
func TestLogForgetsOnlyWhatIsDurable(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cfg := loneNode(t)
	n := openNode(t, ctx, cfg)
	write := func(count int) {
		t.Helper()
		conn, err := pgconn.Connect(ctx, "postgres://postgres@"+cfg.Listen.Gateway+"/postgres?sslmode=disable")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close(ctx) }() // its work is done
		for range count {
			if _, err := conn.Exec(ctx, "INSERT INTO t DEFAULT VALUES").ReadAll(); err != nil {
				t.Fatal(err)
			}
		}
	}
	create, err := pgconn.Connect(ctx, "postgres://postgres@"+cfg.Listen.Gateway+"/postgres?sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	// Nothing but a snapshot, and markers, which come before the commits, flushes the WAL.
	if _, err := create.Exec(ctx, "CREATE TABLE t (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY)").ReadAll(); err != nil {
		t.Fatal(err)
	}
	if err := create.Close(ctx); err != nil {
		t.Fatal(err)
	}
	write(30)
	covered := n.current.Load().machine.LastCSN()
	if covered != 31 {
		t.Fatalf("%d transactions, want 31", covered)
	}
	if err := n.consensus.Load().TakeSnapshot(); err != nil {
		t.Fatal(err)
	}
	first := n.current.Load()
	if durable := first.pipeline.Durable(); durable < covered {
		t.Errorf("a snapshot covers %d, and %d is durable", covered, durable)
	}
	if err := syscall.Kill(n.server.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitActive(t, ctx, n, first)
	again := n.current.Load()
	if again.start < covered || again.id == first.id {
		t.Errorf("after the crash PostgreSQL is at %d, the snapshot at %d; incarnation %x after %x", again.start, covered, again.id, first.id)
	}
	write(10)
	if err := n.Close(ctx); err != nil {
		t.Fatal(err)
	}

	n = openNode(t, ctx, cfg)
	write(10)
	conn, err := n.connect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	rows, err := conn.Exec(ctx, "SELECT count(*) FROM t; TRUNCATE quorate.applied_even, quorate.applied_odd").ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	if got := string(rows[0].Rows[0][0]); got != "50" {
		t.Errorf("%s rows, want 50", got)
	}
	if err := errors.Join(conn.Close(ctx), n.Close(ctx)); err != nil {
		t.Fatal(err)
	}
	if set, err := Open(ctx, cfg, claim(t, cfg), "test", slog.New(slog.DiscardHandler)); !errors.Is(err, txn.ErrDiverged) || !strings.Contains(err.Error(), "set back") {
		t.Errorf("opened on a PostgreSQL that was set back: %v", err)
		if err == nil {
			_ = set.Close(ctx) // the test has failed
		}
	}
}

// loneNode is the configuration of a cluster of one.
func loneNode(t *testing.T) config.Config {
	t.Helper()
	dir := pgtest.Dir(t, true)
	address := func() string { return fmt.Sprintf("127.0.0.1:%d", pgtest.FreePort(t)) }
	c := config.Config{
		Cluster: "lone", Node: 1, DataDir: filepath.Join(dir, "node"),
		Postgres: config.Postgres{
			Managed: true, BinDir: pgtest.Install(t, 18).BinDir, DataDir: filepath.Join(dir, "pgdata"), Host: "127.0.0.1",
			Port: pgtest.FreePort(t), Superuser: "postgres", Auth: "trust", Database: "postgres",
			Settings: map[string]string{"wal_writer_delay": "10s", "wal_writer_flush_after": "100MB"},
		},
		Listen: config.Listen{Gateway: address(), GRPC: address(), HTTP: address(), Raft: address()},
		Apply:  config.Apply{Workers: 2},
	}
	c.Members = []config.Member{{ID: 1, Raft: c.Listen.Raft, GRPC: c.Listen.GRPC}}
	file := filepath.Join(dir, "quorate.yaml")
	if err := c.Save(file); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(file) // with all defaults
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// claim is what a command does first.
func claim(t *testing.T, cfg config.Config) config.Identity {
	t.Helper()
	id, err := cfg.ClaimDataDir()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func openNode(t *testing.T, ctx context.Context, cfg config.Config) *Node {
	t.Helper()
	n, err := Open(ctx, cfg, claim(t, cfg), "test", slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.Close(context.Background()) }) // closed before, unless the test has failed
	awaitActive(t, ctx, n, nil)
	return n
}

// awaitActive waits until the node is active in an incarnation that follows last.
func awaitActive(t *testing.T, ctx context.Context, n *Node, last *incarnation) {
	t.Helper()
	for n.states.current().name != stateActive || n.current.Load() == last {
		select {
		case <-ctx.Done():
			t.Fatalf("the node is not active: %+v", n.states.current())
		case <-time.After(time.Millisecond):
		}
	}
}

// TestWholeNodeSetBack: a node whose data directory and PostgreSQL were set back together, so that they agree, does not take
// its own transactions, which the log has, for those that PostgreSQL has committed under the same ids since. It stops.
func TestWholeNodeSetBack(t *testing.T) {
	for _, when := range []string{"before its last start", "in its last life"} {
		t.Run(when, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cfg := loneNode(t)
			n := openNode(t, ctx, cfg)
			run(t, ctx, cfg.Listen.Gateway, "CREATE TABLE t (id bigint PRIMARY KEY)", "INSERT INTO t VALUES (1)")
			if err := n.Close(ctx); err != nil {
				t.Fatal(err)
			}
			data := cfg.Postgres.DataDir
			if out, err := exec.CommandContext(ctx, "cp", "-a", data, data+".backup").CombinedOutput(); err != nil { // with its owner
				t.Fatalf("%v: %s", err, out)
			}
			backup := claim(t, cfg)
			flushed, err := os.ReadFile(filepath.Join(cfg.DataDir, flushedFile))
			if err != nil {
				t.Fatal(err)
			}
			n = openNode(t, ctx, cfg)
			if when == "in its last life" { // a copy made the moment that it began
				known := n.identity.get().Server.Incarnations // before it has caught up, or since
				backup.Server = backup.Server.Begin(known[len(known)-1])
			}
			run(t, ctx, cfg.Listen.Gateway, "INSERT INTO t VALUES (2)", "INSERT INTO t VALUES (3)", "INSERT INTO t VALUES (4)")
			if err := n.Close(ctx); err != nil {
				t.Fatal(err)
			}
			// The log is what a leader would have sent again.
			if err := errors.Join(os.RemoveAll(data), os.Rename(data+".backup", data), backup.Save(cfg.DataDir),
				os.WriteFile(filepath.Join(cfg.DataDir, flushedFile), flushed, 0o600)); err != nil {
				t.Fatal(err)
			}
			for range 2 { // what it has found it finds again
				n, err := Open(ctx, cfg, claim(t, cfg), "test", slog.New(slog.NewTextHandler(t.Output(), nil)))
				if err != nil {
					t.Fatal(err)
				}
				awaitFailed(t, ctx, n)
				if s := n.states.current(); !strings.Contains(s.reason, "set back") || !strings.Contains(s.reason, "quorate resync") {
					t.Errorf("it says %q", s.reason)
				}
				if err := n.Close(ctx); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// awaitFailed waits until the node is fenced, which it must be before it is active.
func awaitFailed(t *testing.T, ctx context.Context, n *Node) {
	t.Helper()
	for s := n.states.current(); s.name != stateFailed; s = n.states.current() {
		if s.name == stateActive || ctx.Err() != nil {
			t.Fatalf("the node is %+v", s)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Millisecond):
		}
	}
}

// TestForceNewClusterTwice: whoever is not sure that it has worked does it again, and the cluster can be joined all the same.
func TestForceNewClusterTwice(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cfg := loneNode(t)
	n := openNode(t, ctx, cfg)
	was := n.membership().Cluster
	if err := n.Close(ctx); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := ForceNewCluster(cfg, slog.New(slog.DiscardHandler)); err != nil {
			t.Fatal(err)
		}
	}
	n = openNode(t, ctx, cfg)
	id := n.identity.get().ClusterID
	if in := n.membership(); in.Cluster != id || id == was {
		t.Errorf("the log is of cluster %s, the node of %s, which was %s", in.Cluster, id, was)
	}
	if _, _, err := n.lead(ctx); err != nil {
		t.Error(err)
	}
	stopsAtNewerEntry(t, ctx, cfg, n)
}

// stopsAtNewerEntry gives a node an entry of the next format, as a member with a newer release may write: it stops before it, says
// why, and does not get beyond it in its next start either. The node is closed.
func stopsAtNewerEntry(t *testing.T, ctx context.Context, cfg config.Config, n *Node) {
	t.Helper()
	entry := codec.AppendHorizon(nil, 1)
	entry[0]++
	if _, err := n.consensus.Load().Propose(ctx, entry); err != nil {
		t.Fatal(err)
	}
	for start := range 2 {
		if start > 0 {
			var err error
			if n, err = Open(ctx, cfg, claim(t, cfg), "test", slog.New(slog.NewTextHandler(t.Output(), nil))); err != nil {
				t.Fatal(err)
			}
		}
		for n.states.current().name == stateActive && ctx.Err() == nil { // before it has read it
			time.Sleep(time.Millisecond)
		}
		awaitFailed(t, ctx, n)
		if s := n.states.current(); !strings.Contains(s.reason, fmt.Sprintf("format version %d", codec.Version+1)) || !strings.Contains(s.reason, "upgrade this node") {
			t.Errorf("it says %q", s.reason)
		}
		if err := n.Close(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFencedWhileItOpens: a node that is fenced when its first incarnation has begun, and nobody looks after that yet, ends it all the
// same.
func TestFencedWhileItOpens(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cfg := loneNode(t)
	n := newNode(cfg, claim(t, cfg), "test", slog.New(slog.NewTextHandler(t.Output(), nil)))
	for _, step := range n.steps() {
		if err := step.run(ctx); err != nil {
			t.Fatalf("%s: %v", step.name, errors.Join(err, n.Close(ctx)))
		}
		if step.name == "consensus" {
			n.fence(errRole)
		}
	}
	awaitFailed(t, ctx, n)
	if n.current.Load().ctx.Err() == nil {
		t.Error("its incarnation goes on")
	}
	if err := n.Close(ctx); err != nil {
		t.Error(err)
	}
}

// TestLogLost: a node whose log is missing, or as it was long ago, says so and does not vote, not in later starts either.
func TestLogLost(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cfg := loneNode(t)
	n := openNode(t, ctx, cfg)
	if err := n.Close(ctx); err != nil {
		t.Fatal(err)
	}
	backup := claim(t, cfg)
	if len(backup.Members) != 1 {
		t.Errorf("it has not noted who the members are: %+v", backup.Members)
	}
	n = openNode(t, ctx, cfg)
	if err := n.Close(ctx); err != nil {
		t.Fatal(err)
	}
	latest := claim(t, cfg)
	log := latest.RaftDir(cfg.DataDir)
	for _, step := range []struct {
		name  string
		spoil func() error
		says  string
	}{
		{"set back", func() error { return backup.Save(cfg.DataDir) }, "data directory was set back"},
		{"missing", func() error { return errors.Join(latest.Save(cfg.DataDir), os.Rename(log, log+".away")) }, "is missing"},
		{"there again", func() error { return os.Rename(log+".away", log) }, "is missing"},
	} {
		if err := step.spoil(); err != nil {
			t.Fatal(err)
		}
		n, err := Open(ctx, cfg, claim(t, cfg), "test", slog.New(slog.NewTextHandler(t.Output(), nil)))
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if n.consensus.Load() != nil {
			t.Errorf("%s: it votes", step.name)
		}
		if n.Status().LogFailure == "" {
			t.Errorf("%s: others count it as a voter", step.name)
		}
		awaitFailed(t, ctx, n)
		if s := n.states.current(); !strings.Contains(s.reason, step.says) || !strings.Contains(s.reason, "quorate resync") {
			t.Errorf("%s: it says %q", step.name, s.reason)
		}
		if m := n.members(); len(m) != 1 || m[0].GRPC != cfg.Listen.GRPC {
			t.Errorf("%s: members %+v", step.name, m)
		}
		if err := n.Close(ctx); err != nil {
			t.Fatal(err)
		}
	}
}
