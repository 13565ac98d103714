package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/internal/pgserver/pgtest"
)

// freeBasePort finds a base port whose ports for so many nodes are free, below those of outgoing connections.
func freeBasePort(t *testing.T, nodes int) int {
	t.Helper()
next:
	for base := 10000 + os.Getpid()%40*500; base < 32000; base += 10 {
		for _, block := range []int{gatewayPorts, postgresPorts, grpcPorts, httpPorts, raftPorts} {
			for i := 1; i <= nodes; i++ {
				if tryListen(fmt.Sprintf("127.0.0.1:%d", base+block+i)) != nil {
					continue next
				}
			}
		}
		return base
	}
	t.Fatal("no free ports")
	return 0
}

// processNumber reads the first line of a pid file.
func processNumber(t *testing.T, elem ...string) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(elem...))
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(text), "\n")
	pid, err := strconv.Atoi(line)
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// nothingRuns fails the test if a node or a server of a demo's directory is there.
func nothingRuns(t *testing.T, dir string, nodes int) {
	t.Helper()
	for i := 1; i <= nodes; i++ {
		node := filepath.Join(dir, fmt.Sprintf("node%d", i))
		if pid, running, err := sidecarOf(node); running || err != nil {
			t.Errorf("node %d: process %d runs: %v, %v", i, pid, running, err)
		}
		if pm, running, err := pgserver.Running(filepath.Join(node, "pgdata")); running || err != nil {
			t.Errorf("PostgreSQL of node %d: process %d runs: %v, %v", i, pm.PID, running, err)
		}
	}
}

func TestDemo(t *testing.T) {
	dir := filepath.Join(pgtest.Dir(t, true), "demo")
	base := freeBasePort(t, 3)
	args := []string{"demo", "--dir", dir, "--nodes", "3", "--base-port", strconv.Itoa(base), "--pg-bin", pgtest.Install(t, 18).BinDir}
	p := start(t, args...)
	p.awaitOutput(t, "\nready")
	for i := 1; i <= 3; i++ {
		row := fmt.Sprintf("%d 127.0.0.1:%d 127.0.0.1:%d 127.0.0.1:%d 127.0.0.1:%d 127.0.0.1:%d",
			i, base+i, base+100+i, base+200+i, base+300+i, base+400+i)
		if !strings.Contains(strings.Join(strings.Fields(p.output.String()), " "), row) {
			t.Errorf("the table lacks %q:\n%s", row, p.output)
		}
	}

	code, stdout, stderr := do(t, "status", "--address", fmt.Sprintf("127.0.0.1:%d", base+202), "-o", "json")
	var s clusterStatus
	if err := json.Unmarshal([]byte(stdout), &s); code != exitOK || err != nil || len(s.Members) != 3 {
		t.Fatalf("status: exit code %d, %v\n%s%s", code, err, stdout, stderr)
	}
	for i, m := range s.Members {
		if m.ID != uint32(i+1) || !m.AcceptsWrites || m.Addresses.Gateway != fmt.Sprintf("127.0.0.1:%d", base+i+1) {
			t.Errorf("status of node %d: %+v", i+1, m)
		}
	}

	// The node's timers are slack, PostgreSQL's are not.
	for i := 1; i <= 3; i++ {
		node := filepath.Join(dir, fmt.Sprintf("node%d", i))
		for _, p := range []struct {
			pid  int
			want time.Duration
		}{
			{processNumber(t, node, pidFileName), timerSlack},
			{processNumber(t, node, "pgdata", "postmaster.pid"), 50 * time.Microsecond},
		} {
			if got := processNumber(t, "/proc", strconv.Itoa(p.pid), "timerslack_ns"); got != int(p.want) {
				t.Errorf("node %d: process %d has a timer slack of %d ns, want %v", i, p.pid, got, p.want)
			}
		}
	}

	// The log is for reading when nobody writes it.
	if code, _, stderr := do(t, "log", "--data-dir", filepath.Join(dir, "node1")); code != exitFailure || !strings.Contains(stderr, "stop the node first") {
		t.Errorf("log of a node that runs: exit code %d, says %s", code, stderr)
	}

	// A second demo there is refused and does no harm.
	if code, _, stderr := do(t, args...); code != exitFailure || !strings.Contains(stderr, "another process is running there") {
		t.Errorf("second demo: exit code %d, says %s", code, stderr)
	}

	// A node that dies stays dead, the demo goes on, and in the end stops the server that the node has left behind.
	node2 := filepath.Join(dir, "node2")
	if err := syscall.Kill(processNumber(t, node2, pidFileName), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	p.awaitOutput(t, "node 2 has died")
	if _, running, err := pgserver.Running(filepath.Join(node2, "pgdata")); !running || err != nil {
		t.Errorf("PostgreSQL died with its sidecar: %v, %v", running, err)
	}
	// One that is started again by hand belongs to the demo as before.
	again := start(t, "run", "--config", filepath.Join(node2, "quorate.yaml"))
	again.awaitOutput(t, "the node accepts writes") // before that it answers, too
	if err := syscall.Kill(processNumber(t, dir, "node3", pidFileName), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	p.awaitOutput(t, "node 3 has died")

	p.signal(t, syscall.SIGINT)
	if code := p.await(t); code != exitOK {
		t.Errorf("exit code %d after SIGINT:\n%s", code, p.output)
	}
	if code := again.await(t); code != exitOK {
		t.Errorf("node 2, started by hand, ended with %d:\n%s", code, again.output)
	}
	nothingRuns(t, dir, 3)

	if code, _, stderr := do(t, "log", "--data-dir", filepath.Join(dir, "node1")); code != exitOK {
		t.Errorf("log of a node that is stopped: exit code %d, says %s", code, stderr)
	}

	// Resumed under other conditions it is refused, by field and value.
	for _, tc := range []struct{ args, want string }{
		{fmt.Sprintf("demo --dir %s --nodes 2 --base-port %d", dir, base), "--nodes 2: "},
		{fmt.Sprintf("demo --dir %s --nodes 4 --base-port %d", dir, base), "--nodes 4: "},
		{fmt.Sprintf("demo --dir %s --nodes 3 --base-port %d", dir, base+10), fmt.Sprintf("--base-port %d: ", base+10)},
	} {
		if code, _, stderr := do(t, strings.Fields(tc.args)...); code != exitUsage || !strings.Contains(stderr, tc.want) {
			t.Errorf("%s: exit code %d, says %s", tc.args, code, stderr)
		}
	}

	// Something listens where two nodes want to: nothing is started.
	for _, port := range []int{base + 1, base + 402} {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
	code, _, stderr = do(t, args...)
	for _, want := range []string{
		fmt.Sprintf(`node 1: listen.gateway: "127.0.0.1:%d": bind: address already in use`, base+1),
		fmt.Sprintf(`node 2: listen.raft: "127.0.0.1:%d": bind: address already in use`, base+402),
	} {
		if code != exitFailure || !strings.Contains(stderr, want) {
			t.Errorf("ports in use: exit code %d, says %s, want %s", code, stderr, want)
		}
	}
	nothingRuns(t, dir, 3)
}

// The data survive; so does a demo that was killed, whose nodes and servers end with it.
func TestDemoResumes(t *testing.T) {
	dir := filepath.Join(pgtest.Dir(t, true), "demo")
	base := strconv.Itoa(freeBasePort(t, 1))
	args := []string{"demo", "--dir", dir, "--nodes", "1", "--base-port", base, "--pg-bin", pgtest.Install(t, 18).BinDir}
	p := start(t, args...)
	p.awaitOutput(t, "\nready")
	config, err := os.ReadFile(filepath.Join(dir, "node1/quorate.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	sidecar := processNumber(t, dir, "node1", pidFileName)
	p.signal(t, syscall.SIGKILL)
	p.await(t)
	await(t, "the node to end", func() bool {
		_, running, err := sidecarOf(filepath.Join(dir, "node1"))
		return err == nil && !running
	})
	nothingRuns(t, dir, 1)

	p = start(t, args...)
	p.awaitOutput(t, "\nready")
	if again := processNumber(t, dir, "node1", pidFileName); again == sidecar {
		t.Errorf("the node is still process %d", again)
	}
	if now, err := os.ReadFile(filepath.Join(dir, "node1/quorate.yaml")); err != nil || string(now) != string(config) {
		t.Errorf("the configuration was changed: %v\n%s", err, now)
	}
	p.signal(t, syscall.SIGTERM)
	if code := p.await(t); code != exitOK {
		t.Errorf("exit code %d:\n%s", code, p.output)
	}
	nothingRuns(t, dir, 1)
}

func TestDemoRefusesOthersDirectories(t *testing.T) {
	dir := pgtest.Dir(t, false)
	bin := pgtest.Install(t, 18).BinDir
	base := freeBasePort(t, 2)
	node := func(demo string, i int) string { return filepath.Join(dir, demo, fmt.Sprintf("node%d", i)) }
	try := func(demo, want string) {
		t.Helper()
		code, _, stderr := do(t, "demo", "--dir", filepath.Join(dir, demo), "--nodes", "2", "--base-port", strconv.Itoa(base), "--pg-bin", bin)
		if code == exitOK || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit code %d, says %s, want %s", demo, code, stderr, want)
		}
	}
	if err := os.MkdirAll(node("precious", 2), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(node("precious", 2), "diary"), []byte("dear"), 0o644); err != nil {
		t.Fatal(err)
	}
	try("precious", "it is not a demo's")

	// Two nodes of different clusters.
	for i, cluster := range []string{"one", "other"} {
		d := demo{dir: filepath.Join(dir, "mixed"), nodes: 2, basePort: base}
		if err := os.MkdirAll(d.nodeDir(i), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := d.config(i, cluster).Save(filepath.Join(d.nodeDir(i), "quorate.yaml")); err != nil {
			t.Fatal(err)
		}
	}
	try("mixed", `belongs to cluster "other", another node to "one"`)

	// A node's own data are another cluster's: the node refuses, the demo shows why.
	d := demo{dir: filepath.Join(dir, "swapped"), nodes: 2, basePort: base}
	for i := range 2 {
		if err := os.MkdirAll(d.nodeDir(i), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := d.config(i, "mine").Save(filepath.Join(d.nodeDir(i), "quorate.yaml")); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(d.nodeDir(1), "identity"), []byte("cluster: theirs\nnode: 2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := start(t, "demo", "--dir", d.dir, "--nodes", "2", "--base-port", strconv.Itoa(base), "--pg-bin", bin)
	if code := p.await(t); code != exitFailure {
		t.Errorf("exit code %d", code)
	}
	if found, _ := p.output.contains(`belongs to cluster "theirs": cluster is "mine"`); !found {
		t.Errorf("it says\n%s", p.output)
	}
	nothingRuns(t, d.dir, 2)
}

// A home that is closed to PostgreSQL's user.
func TestDemoElsewhere(t *testing.T) {
	if os.Geteuid() != 0 {
		// Who is not root runs PostgreSQL himself: the directory is his own.
		d := demo{dir: t.TempDir(), out: os.Stdout}
		if err := d.placeDir(); err != nil {
			t.Error(err)
		}
		return
	}
	closed := pgtest.Dir(t, false)
	if err := os.Chmod(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	place := func() string {
		d := demo{dir: filepath.Join(closed, "demo"), out: &out}
		if err := d.placeDir(); err != nil {
			t.Fatal(err)
		}
		return d.dir
	}
	dir := place()
	defer os.RemoveAll(dir)
	if filepath.Dir(dir) != filepath.Clean(os.TempDir()) || !strings.Contains(out.String(), "using "+dir+" instead") {
		t.Errorf("uses %s, says %s", dir, out.String())
	}
	if again := place(); again != dir {
		t.Errorf("uses %s the second time, %s the first", again, dir)
	}
}
