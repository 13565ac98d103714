package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/pgserver/pgtest"
)

// The test binary is the program itself when this is set, for itself and for the nodes that a demo starts.
const actAsProgram = "QUORATE_TEST_ACT_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(actAsProgram) != "" {
		main()
	}
	os.Exit(m.Run())
}

// program is a running quorate.
type program struct {
	cmd    *exec.Cmd
	output *watchedBuffer
	done   chan struct{}
	code   int // once done
}

// start starts quorate. It is stopped when the test ends.
func start(t *testing.T, args ...string) *program {
	t.Helper()
	p := &program{cmd: exec.Command(os.Args[0], args...), output: newWatchedBuffer(), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), actAsProgram+"=1")
	p.cmd.Stdout, p.cmd.Stderr = p.output, p.output
	p.cmd.WaitDelay = 10 * time.Second
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait() // an exit code that is not 0 is no surprise
		p.code = p.cmd.ProcessState.ExitCode()
		close(p.done)
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(time.Minute):
			t.Errorf("quorate %s does not end:\n%s", args[0], p.output)
			_ = p.cmd.Process.Kill()
			<-p.done
		}
	})
	return p
}

// await returns the exit code.
func (p *program) await(t *testing.T) int {
	t.Helper()
	select {
	case <-p.done:
		return p.code
	case <-time.After(2 * time.Minute):
		t.Fatalf("it does not end:\n%s", p.output)
		return 0
	}
}

// awaitOutput returns when a text has been printed.
func (p *program) awaitOutput(t *testing.T, text string) {
	t.Helper()
	limit := time.After(2 * time.Minute)
	for {
		found, changed := p.output.contains(text)
		if found {
			return
		}
		select {
		case <-changed:
		case <-p.done:
			if found, _ := p.output.contains(text); !found {
				t.Fatalf("it ended with %d and did not print %q:\n%s", p.code, text, p.output)
			}
			return
		case <-limit:
			t.Fatalf("it does not print %q:\n%s", text, p.output)
		}
	}
}

func (p *program) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// watchedBuffer tells when it grows.
type watchedBuffer struct {
	mu      sync.Mutex
	text    bytes.Buffer
	changed chan struct{}
}

func newWatchedBuffer() *watchedBuffer { return &watchedBuffer{changed: make(chan struct{})} }

func (b *watchedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.changed)
	b.changed = make(chan struct{})
	return b.text.Write(p)
}

func (b *watchedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func (b *watchedBuffer) contains(s string) (bool, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Contains(b.text.String(), s), b.changed
}

// do runs quorate in this process.
func do(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out, errs strings.Builder
	code = run(ctx, args, &out, &errs)
	return code, out.String(), errs.String()
}

func TestUsage(t *testing.T) {
	for _, tc := range []struct {
		args string
		code int
		want string // on stderr
	}{
		{"", exitOK, ""},
		{"version", exitOK, ""},
		{"nonsense", exitUsage, `unknown command "nonsense"`},
		{"version extra", exitUsage, `"extra"`},
		{"run", exitUsage, `--config "": is required`},
		{"run --colour red", exitUsage, "unknown flag: --colour"},
		{"run --config /nowhere/quorate.yaml", exitFailure, "/nowhere/quorate.yaml"},
		{"status", exitUsage, "--address"},
		{"verify", exitUsage, "--address"},
		{"status --address 127.0.0.1:1 -o xml", exitUsage, `--output "xml": must be one of table, json, yaml`},
		{"status --address 127.0.0.1:1", exitFailure, "get status from 127.0.0.1:1: "},
		{"demo --nodes 0", exitUsage, "--nodes 0: must be from 1 to 9"},
		{"demo --nodes many", exitUsage, "--nodes"},
		{"demo --base-port 65200", exitUsage, "--base-port 65200: must be from 1 to 65132"},
	} {
		var args []string
		if tc.args != "" {
			args = strings.Split(tc.args, " ")
		}
		code, _, stderr := do(t, args...)
		if code != tc.code || !strings.Contains(stderr, tc.want) {
			t.Errorf("quorate %s: exit code %d, want %d; says %q, want %q", tc.args, code, tc.code, stderr, tc.want)
		}
	}
	for flag, want := range map[string]string{"dir": "./demo", "nodes": "3", "base-port": "6000", "pg-bin": ""} {
		if f := demoCommand().Flags().Lookup(flag); f == nil || f.DefValue != want {
			t.Errorf("demo --%s is %+v by default, not %q", flag, f, want)
		}
	}
	if _, stdout, _ := do(t, "version"); !strings.HasPrefix(stdout, "quorate ") {
		t.Errorf("version prints %q", stdout)
	}
}

// nodeConfig writes the configuration of the only node of a cluster; each change is "from=>to".
func nodeConfig(t *testing.T, dir string, changes ...string) string {
	t.Helper()
	base := freeBasePort(t, 1)
	text := fmt.Sprintf(`cluster: c
node: 1
data_dir: .
postgres: {managed: true, auth: trust, port: %d, bin_dir: %s}
listen: {gateway: "127.0.0.1:%d", grpc: "127.0.0.1:%d", http: "127.0.0.1:%d", raft: "127.0.0.1:%d"}
members: [{id: 1, grpc: "127.0.0.1:%[4]d", raft: "127.0.0.1:%[6]d"}]
`, base+101, pgtest.Install(t, 18).BinDir, base+1, base+201, base+301, base+401)
	for _, change := range changes {
		from, to, _ := strings.Cut(change, "=>")
		if !strings.Contains(text, from) {
			t.Fatalf("no %q in the configuration", from)
		}
		text = strings.Replace(text, from, to, 1)
	}
	name := filepath.Join(dir, "quorate.yaml")
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestRunRefuses(t *testing.T) {
	dir := pgtest.Dir(t, false)
	for name, tc := range map[string]struct {
		change string
		code   int
		want   string
	}{
		"unknown key":      {"node: 1=>nodes: 1", exitUsage, "nodes: there is no such field"},
		"no port":          {"port: =>port: 9", exitUsage, "postgres.port: \"9"},
		"missing programs": {"bin_dir: =>bin_dir: /nowhere", exitFailure, `postgres.bin_dir "/nowhere`},
	} {
		code, _, stderr := do(t, "run", "--config", nodeConfig(t, dir, tc.change))
		if code != tc.code || !strings.Contains(stderr, tc.want) {
			t.Errorf("%s: exit code %d, want %d; says\n%s\nwant %s", name, code, tc.code, stderr, tc.want)
		}
	}
	// The last of these has claimed the directory for node 1 of cluster c.
	code, _, stderr := do(t, "run", "--config", nodeConfig(t, dir, "cluster: c=>cluster: d"))
	if code != exitFailure || !strings.Contains(stderr, `belongs to cluster "c": cluster is "d"`) {
		t.Errorf("directory of another cluster: exit code %d, says\n%s", code, stderr)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 3 {
		t.Errorf("more was touched than quorate.yaml, identity and events: %v, %v", entries, err)
	}
	// A port that somebody else has.
	name := nodeConfig(t, pgtest.Dir(t, false))
	c, err := config.Load(name)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", c.Listen.HTTP)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	code, _, stderr = do(t, "run", "--config", name)
	if want := fmt.Sprintf("listen.http: listen tcp %s: bind: address already in use", c.Listen.HTTP); code != exitFailure || !strings.Contains(stderr, want) {
		t.Errorf("port in use: exit code %d, says\n%s\nwant %s", code, stderr, want)
	}
}

// A node that is told to stop while it starts has not failed: neither to who started it, nor in its events.
func TestRunStopsWhileStarting(t *testing.T) {
	dir, bin := pgtest.Dir(t, false), pgtest.Dir(t, false)
	installed := pgtest.Install(t, 18).BinDir
	if err := os.Symlink(filepath.Join(installed, "postgres"), filepath.Join(bin, "postgres")); err != nil {
		t.Fatal(err)
	}
	// Its initdb does not end by itself.
	gate := filepath.Join(bin, "gate")
	if err := syscall.Mkfifo(gate, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(gate, 0o666); err != nil { // whatever the umask is: the server has an account of its own
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bin, "initdb"), []byte("#!/bin/sh\nexec cat "+gate+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	name := nodeConfig(t, dir, "bin_dir: "+installed+"=>bin_dir: "+bin)
	p := start(t, "run", "--config", name)
	begun := make(chan error, 1)
	go func() {
		open, err := os.OpenFile(gate, os.O_WRONLY, 0) // returns when somebody reads
		if err == nil {
			defer open.Close()
			p.signal(t, syscall.SIGTERM)
			<-p.done
		}
		begun <- err
	}()
	if code := p.await(t); code != exitOK {
		t.Errorf("exit code %d:\n%s", code, p.output)
	}
	if err := <-begun; err != nil {
		t.Fatal(err)
	}
	events, err := os.ReadFile(filepath.Join(dir, "events"))
	if err != nil || bytes.Contains(events, []byte("start_failed")) || !bytes.Contains(events, []byte(`"stopped"`)) {
		t.Errorf("events: %v\n%s", err, events)
	}
}

// A second process on the same data directory is refused and does the first no harm.
func TestRunOnce(t *testing.T) {
	dir := pgtest.Dir(t, false)
	lock, err := lockPIDFile(filepath.Join(dir, pidFileName))
	if err != nil {
		t.Fatal(err)
	}
	code, _, stderr := do(t, "run", "--config", nodeConfig(t, dir))
	if code != exitFailure || !strings.Contains(stderr, fmt.Sprintf("another process is running there: process %d", os.Getpid())) {
		t.Errorf("exit code %d, says %s", code, stderr)
	}
	if pid, running, err := sidecarOf(dir); pid != os.Getpid() || !running || err != nil {
		t.Errorf("sidecar: %d, %v, %v", pid, running, err)
	}
	if err := lock.release(); err != nil {
		t.Fatal(err)
	}
	// Left by a crash: nobody holds it.
	if err := os.WriteFile(filepath.Join(dir, pidFileName), []byte("1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, running, err := sidecarOf(dir); running || err != nil {
		t.Errorf("sidecar of a stale pid file: %v, %v", running, err)
	}
	lock, err = lockPIDFile(filepath.Join(dir, pidFileName))
	if err != nil {
		t.Fatal(err)
	}
	if err := lock.release(); err != nil {
		t.Fatal(err)
	}
}

// await polls for what nothing announces.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for limit := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
