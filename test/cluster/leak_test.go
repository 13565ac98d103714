package cluster_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/quorate/quorate/test/cluster"
)

// usage is what a node holds for its clients.
type usage struct{ files, goroutines, sessions int }

// use reads the usage of node i.
func use(t *testing.T, ctx context.Context, c *cluster.Cluster, i int) (u usage) {
	t.Helper()
	pid, err := c.SidecarPID(i)
	check(t, err)
	files, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid), "fd"))
	check(t, err)
	u.files = len(files)
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.HTTP(i)+"/metrics", nil)
	check(t, err)
	response, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(request)
	check(t, err)
	defer response.Body.Close()
	for lines := bufio.NewScanner(response.Body); lines.Scan(); {
		if n, err := fmt.Sscanf(lines.Text(), "go_goroutines %d", &u.goroutines); n == 1 && err == nil {
			break
		}
	}
	if u.goroutines == 0 {
		t.Fatal("the metrics do not tell the number of goroutines")
	}
	conn, err := c.Direct(ctx, i)
	check(t, err)
	u.sessions = one[int](t, ctx, conn, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
	check(t, conn.Close(ctx))
	return u
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
	// The runtime and the drivers keep a few idle things; ten clients of each kind would be more than these.
	const slack = 8
	deadline := time.Now().Add(15 * time.Second)
	for {
		after := use(t, ctx, c, node)
		if after.files <= before.files+slack && after.goroutines <= before.goroutines+slack && after.sessions <= before.sessions {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("60 clients have gone, and %+v has become %+v", before, after)
		}
		time.Sleep(50 * time.Millisecond)
	}
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
			out, err := invoke(ctx, command(t, withRace), test.args...)
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
