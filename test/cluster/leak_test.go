package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/quorate/quorate/test/cluster"
)

// usage is what a node holds for its clients, and files and goroutines also for the other nodes.
type usage struct{ files, goroutines, sessions int }

// use reads the usage of node i.
func use(t *testing.T, ctx context.Context, c *cluster.Cluster, i int) (u usage) {
	t.Helper()
	pid, err := c.SidecarPID(i)
	check(t, err)
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	check(t, err)
	for _, name := range files {
		// One that is closed by now has no name. The log takes more files as it grows.
		if file, err := os.Readlink(name); err == nil && !strings.HasPrefix(file, filepath.Join(c.NodeDir(i), "raft")) {
			u.files++
		}
	}
	u.goroutines = number(t, metric(t, ctx, c, i, "go_goroutines"))
	conn, err := c.Direct(ctx, i)
	check(t, err)
	u.sessions = one[int](t, ctx, conn, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name NOT LIKE 'quorate%'")
	// The node's own sessions are opened when they are needed, and stay.
	own := one[int](t, ctx, conn, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name LIKE 'quorate%'")
	u.files -= own
	check(t, conn.Close(ctx))
	return u
}

// awaitUsage waits until node i holds no more than before. The slack is for the few idle things that runtime and drivers keep.
func awaitUsage(t *testing.T, ctx context.Context, c *cluster.Cluster, i int, before usage, slack int) {
	t.Helper()
	waiting, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	eventuallyEvery(t, waiting, asking, func() error {
		after := use(t, ctx, c, i)
		if after.files > before.files+slack || after.goroutines > before.goroutines+slack || after.sessions > before.sessions {
			return fmt.Errorf("node %d: %+v has become %+v", i, before, after)
		}
		return nil
	})
}

// useLed is use of all nodes, while node 1 leads: who leads holds more.
func useLed(t *testing.T, ctx context.Context, c *cluster.Cluster) []usage {
	t.Helper()
	check(t, c.Verify(ctx))
	lead(t, ctx, c, 1)
	used := make([]usage, c.Nodes+1)
	for i := 1; i <= c.Nodes; i++ {
		used[i] = use(t, ctx, c, i)
	}
	return used
}

// awaitUsageLed waits until no node holds more than useLed has found before. The slack is less than what two connections take
// that are left of a peer which was frozen or killed.
func awaitUsageLed(t *testing.T, ctx context.Context, c *cluster.Cluster, before []usage) {
	t.Helper()
	check(t, c.Verify(ctx))
	lead(t, ctx, c, 1)
	for i := 1; i <= c.Nodes; i++ {
		awaitUsage(t, ctx, c, i, before[i], 3)
	}
}

// TestNoLeaks: however clients leave, a node ends up with no more files, goroutines and server sessions than before.
func TestNoLeaks(t *testing.T) {
	c, ctx := shared(t)
	if c.Attached() {
		t.Skip("an attached cluster is no process of ours")
	}
	create(t, ctx, c, "DROP TABLE IF EXISTS guests", "CREATE TABLE guests (id int PRIMARY KEY)")
	const node = 2
	before := use(t, ctx, c, node)
	hello := startup(t)
	for n := range 60 {
		switch n % 6 {
		case 0: // as one should
			conn, err := c.Connect(ctx, node)
			check(t, err)
			must(t, ctx, conn, "INSERT INTO guests VALUES ($1)", n)
			check(t, conn.Close(ctx))
		case 1: // in the middle of a transaction
			conn, err := c.Connect(ctx, node)
			check(t, err)
			must(t, ctx, conn, "BEGIN")
			must(t, ctx, conn, "INSERT INTO guests VALUES ($1)", n)
			check(t, conn.PgConn().Conn().Close())
		case 2: // without having read what was asked for, with more on its way than buffers hold
			conn, err := c.Connect(ctx, node)
			check(t, err)
			frontend := conn.PgConn().Frontend()
			frontend.Send(query("SELECT repeat('x', 1000) FROM generate_series(1, 50000)"))
			check(t, frontend.Flush())
			check(t, conn.PgConn().Conn().Close())
		case 3: // while it commits
			conn, err := c.Connect(ctx, node)
			check(t, err)
			frontend := conn.PgConn().Frontend()
			frontend.Send(query(fmt.Sprintf("INSERT INTO guests VALUES (%d)", n)))
			check(t, frontend.Flush())
			check(t, conn.PgConn().Conn().Close())
		case 4: // in the middle of the startup message
			conn, err := net.Dial("tcp", c.Gateway(node))
			check(t, err)
			_, err = conn.Write(hello[:len(hello)/2])
			check(t, err)
			check(t, conn.Close())
		case 5: // in the middle of COPY
			conn, err := c.Connect(ctx, node)
			check(t, err)
			frontend := conn.PgConn().Frontend()
			frontend.Send(query("COPY guests FROM STDIN"))
			check(t, frontend.Flush())
			check(t, conn.PgConn().Conn().Close())
		}
	}
	awaitUsage(t, ctx, c, node, before, 8) // ten clients of each kind would be more
}

// TestStuckReader: a client that does not read its results cannot hold up what others have committed.
func TestStuckReader(t *testing.T) {
	c, ctx := shared(t)
	create(t, ctx, c, "DROP TABLE IF EXISTS stuck", "CREATE TABLE stuck (id int PRIMARY KEY, v text)", "INSERT INTO stuck VALUES (1, '')")
	reader, winner, watcher := gateway(t, ctx, c, 2), gateway(t, ctx, c, 1), direct(t, ctx, c, 2)
	must(t, ctx, reader, "BEGIN")
	must(t, ctx, reader, "UPDATE stuck SET v = 'loser'")
	backend := one[int32](t, ctx, reader, "SELECT pg_backend_pid()")
	frontend := reader.PgConn().Frontend()
	frontend.Send(query("SELECT repeat('x', 1000) FROM generate_series(1, 200000)"))
	check(t, frontend.Flush())
	awaitQuery(t, ctx, watcher, "SELECT coalesce(wait_event, '') = 'ClientWrite' FROM pg_stat_activity WHERE pid = $1", backend)
	must(t, ctx, winner, "UPDATE stuck SET v = 'winner'")
	awaitQuery(t, ctx, watcher, "SELECT v = 'winner' FROM stuck")
	// It is told, or its connection has been closed.
	for {
		message, err := frontend.Receive()
		if err != nil {
			break
		}
		if state := errorState(message); state != "" {
			if state != "40001" && state != "57P01" {
				t.Errorf("the stuck client got SQLSTATE %s, want 40001 or 57P01", state)
			}
			break
		}
	}
	check(t, reader.PgConn().Conn().Close())
}

// TestRefusesToStart: what cannot work ends at once, with an exit status and a message that names what is wrong.
func TestRefusesToStart(t *testing.T) {
	dir, err := cluster.TempDir("")
	check(t, err)
	defer os.RemoveAll(dir)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer taken.Close()
	port := taken.Addr().(*net.TCPAddr).Port
	unknown := filepath.Join(dir, "unknown.yaml")
	check(t, os.WriteFile(unknown, []byte("node: 1\nspeed: high\n"), 0o644))
	broken := filepath.Join(dir, "broken.yaml")
	check(t, os.WriteFile(broken, []byte("{ node: [\n"), 0o644))
	foreign := filepath.Join(dir, "foreign")
	check(t, os.MkdirAll(filepath.Join(foreign, "node1", "pgdata"), 0o755))
	check(t, os.WriteFile(filepath.Join(foreign, "node1", "pgdata", "letters.txt"), []byte("dear"), 0o644))
	for _, test := range []struct {
		name string
		args []string
		want string // in the message
	}{
		{"unknown key", []string{"run", "--config", unknown}, "speed"},
		{"no YAML", []string{"run", "--config", broken}, "broken.yaml"},
		{"no file", []string{"run", "--config", filepath.Join(dir, "none.yaml")}, "none.yaml"},
		{"no nodes", []string{"demo", "--dir", filepath.Join(dir, "demo"), "--nodes", "0"}, "nodes"},
		{"port too high", []string{"demo", "--dir", filepath.Join(dir, "demo"), "--base-port", "65500"}, "port"},
		{"port taken", []string{"demo", "--dir", filepath.Join(dir, "demo"), "--base-port", strconv.Itoa(port - 1)}, strconv.Itoa(port)},
		{"no PostgreSQL", []string{"demo", "--dir", filepath.Join(dir, "demo2"), "--base-port", "20900", "--pg-bin", filepath.Join(dir, "nowhere")}, "nowhere"},
		{"somebody else's directory", []string{"demo", "--dir", foreign, "--base-port", "20900"}, "pgdata"},
		{"nobody there", []string{"status", "--address", "127.0.0.1:1"}, "127.0.0.1:1"},
		{"unknown command", []string{"jump"}, "jump"},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
			defer cancel()
			out, err := invoke(ctx, command(t, false), test.args...)
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() <= 0 {
				t.Errorf("got %v, want an exit status that is not 0\n%s", err, out)
			}
			if !strings.Contains(out, test.want) {
				t.Errorf("the message does not name %q:\n%s", test.want, out)
			}
			if strings.Contains(out, "panic") || strings.Contains(out, "goroutine ") {
				t.Errorf("the program has crashed:\n%s", out)
			}
		})
	}
	if letters, err := os.ReadFile(filepath.Join(foreign, "node1", "pgdata", "letters.txt")); err != nil || string(letters) != "dear" {
		t.Errorf("somebody else's file was touched: %q, %v", letters, err)
	}
	left, err := cluster.ProcessesUnder(dir)
	check(t, err)
	for _, p := range left {
		t.Errorf("process %d is left: %s", p.PID, p.Command)
	}
}

// invoke runs a command and returns everything it wrote. On the end of ctx it is asked to stop, and killed if it does
// not.
func invoke(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}
