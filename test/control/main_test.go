package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/quorate/quorate/test/cluster"
)

// patience bounds a wait in the broken case; it is no measure of speed.
const patience = time.Minute

var fixture struct {
	dir     string
	binary  string
	cluster *cluster.Cluster
	alerts  string // a copy of the configuration under test
}

func TestMain(m *testing.M) {
	code := m.Run()
	if c := fixture.cluster; c != nil {
		if err := errors.Join(c.Stop(), c.Destroy()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	if fixture.dir != "" {
		if err := os.RemoveAll(fixture.dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// start returns the cluster of three that the tests share. One that takes a node away brings it back.
func start(t *testing.T) (*cluster.Cluster, context.Context) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	t.Cleanup(cancel)
	if fixture.cluster == nil {
		var err error
		if fixture.dir, err = cluster.TempDir(""); err != nil {
			t.Fatal(err)
		}
		if fixture.binary, err = cluster.Build(ctx, fixture.dir, false); err != nil {
			t.Fatal(err)
		}
		nodes := fixture.binary
		if withRace { // the command line is run often, and starts slowly with it
			if nodes, err = cluster.Build(ctx, fixture.dir, true); err != nil {
				t.Fatal(err)
			}
		}
		if fixture.cluster, err = cluster.Start(ctx, cluster.Options{Binary: nodes}); err != nil {
			t.Fatal(err)
		}
		sql(t, ctx, fixture.cluster, 1, "CREATE TABLE account (id int PRIMARY KEY, v int NOT NULL)", "INSERT INTO account SELECT i, 0 FROM generate_series(1, 100) i")
	}
	c := fixture.cluster
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Logs(15))
		}
	})
	return c, ctx
}

// sql runs statements by way of a node's gateway, again if they lose a conflict.
func sql(t *testing.T, ctx context.Context, c *cluster.Cluster, node int, statements ...string) {
	t.Helper()
	conn, err := c.Connect(ctx, node)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	for _, s := range statements {
		for {
			_, err := conn.Exec(ctx, s)
			if err == nil {
				break
			}
			if !cluster.IsConflict(err) || ctx.Err() != nil {
				t.Fatalf("%s: %v", s, err)
			}
		}
	}
}

// psql runs psql against a node and returns what it prints, unaligned and without headings.
func psql(t *testing.T, ctx context.Context, address, statement string) string {
	t.Helper()
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(execute(t, ctx, nil, "psql", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", host, "-p", port, "-U", "postgres", "-c", statement, "postgres"))
}

// execute runs a program that must end well and returns what it prints.
func execute(t *testing.T, ctx context.Context, env []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, &stderr)
	}
	return string(out)
}

// quorate runs the command against a node; the exit code is part of the answer.
func quorate(t *testing.T, ctx context.Context, c *cluster.Cluster, node int, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd := exec.CommandContext(ctx, fixture.binary, args...)
	cmd.Env = append(os.Environ(), "QUORATE_ADDRESS="+c.GRPC(node))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// ask runs the command with -o json and reads what it prints.
func ask(t *testing.T, ctx context.Context, c *cluster.Cluster, node int, into any, args ...string) {
	t.Helper()
	code, out, errs := quorate(t, ctx, c, node, append(args, "-o", "json")...)
	if code != 0 {
		t.Fatalf("quorate %v: exit code %d: %s", args, code, errs)
	}
	if err := json.Unmarshal([]byte(out), into); err != nil {
		t.Fatalf("quorate %v: %v\n%s", args, err, out)
	}
}

// await waits until f returns nil.
func await(t *testing.T, ctx context.Context, what string, f func() error) time.Duration {
	t.Helper()
	began := time.Now()
	for {
		err := f()
		if err == nil {
			return time.Since(began)
		}
		if ctx.Err() != nil || time.Since(began) > patience {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// get fetches a page.
func get(ctx context.Context, method, url string) (status int, body string, err error) {
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return 0, "", err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}

// background runs a program until the test ends. What it says is shown if the test fails.
func background(t *testing.T, name string, args ...string) {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), filepath.Base(name)+".log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait() // that it was stopped is no surprise
		if text, err := os.ReadFile(log.Name()); t.Failed() && err == nil {
			t.Logf("%s:\n%s", name, text)
		}
		_ = log.Close()
	})
}

// restart starts nodes and returns when all nodes take writes.
func restart(t *testing.T, ctx context.Context, c *cluster.Cluster, nodes ...int) {
	t.Helper()
	for _, node := range nodes {
		if err := c.StartNode(node); err != nil {
			t.Fatal(err)
		}
	}
	for node := 1; node <= c.Nodes; node++ {
		await(t, ctx, "all nodes to take writes", func() error {
			status, body, err := get(ctx, "GET", "http://"+c.HTTP(node)+"/read-write")
			if status != 200 {
				return fmt.Errorf("node %d: %d, %s, %w", node, status, body, err)
			}
			return nil
		})
	}
}

// program finds one that Debian keeps where root's PATH has it, and nobody else's.
func program(name string) string {
	if _, err := exec.LookPath(name); err != nil {
		return "/usr/sbin/" + name
	}
	return name
}

// root is where the repository is.
func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}
