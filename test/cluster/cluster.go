package cluster

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/quorate/quorate/test/network"
)

// Options say which cluster to start. The zero value with a Binary is a cluster of three.
type Options struct {
	Binary string // the quorate command, as Build returns it
	// Asking is the command by which nodes are asked; "" is Binary. One without the race detector starts several times faster.
	Asking string
	Nodes  int    // 0 means 3
	PGBin  string // where postgres and initdb are; "" lets quorate find them
	// PGBins are the same of each node by itself, for nodes that Prepare or one of its users makes.
	PGBins []string
	Under  string // the directory in which the cluster's own is made; "" is the system's for temporary files
	// Network, when set, is where the nodes are, each in its own namespace and by itself, with "quorate run"; else they
	// are a "quorate demo". It must stay open until the cluster has been stopped.
	Network *network.Network
	// Certificates has the nodes run as in a Network, each by itself and all with certificates, although on loopback.
	Certificates bool
	// Supervised has the nodes attach to PostgreSQL servers that somebody else starts, and starts again when they have ended.
	// The nodes run as with Certificates.
	Supervised bool
	// Certify makes the certificates in a directory, in place of the cluster: ca, node<i>, and operator, who may do
	// everything.
	Certify func(dir string) error
	// Configuration is added to that of each node which is by itself.
	Configuration string
	// Populate, when set, makes the PostgreSQL that Found's first node adopts, in the data directory that it is given.
	Populate func(ctx context.Context, dataDir string) error
}

// separate reports whether the nodes are by themselves; then they have certificates, and ask clients for a password.
func (o Options) separate() bool { return o.Network != nil || o.Certificates || o.Supervised }

// Cluster is a running "quorate demo", or as many "quorate run". Its methods may be called from several goroutines, except those that start
// and stop processes.
type Cluster struct {
	Dir   string // of the demo: Dir/node<i>
	Nodes int

	options Options
	root    string // removed at the end; holds Dir and the output of the processes
	base    int
	demo    *process
	ports   io.Closer        // keeps others from them
	singles map[int]*process // nodes started by RunNode

	supervisor *supervisor // of the servers that the nodes are attached to; nil: the nodes have their own

	attached []Endpoint // where the nodes are when they are not ours; see Attach

	fenceMu   sync.Mutex
	fenceMade bool // Settle's table is on all nodes
}

// Endpoint is where one node listens.
type Endpoint struct{ Gateway, Postgres string }

// readyTimeout bounds the start of a cluster: initdb of three servers on two busy cores takes most of it.
const readyTimeout = 120 * time.Second

// stopTimeout bounds a clean stop, checkpoints of all servers included.
const stopTimeout = 60 * time.Second

// Start starts a cluster from an empty directory and returns when it says that it is ready.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	if o.Nodes == 0 {
		o.Nodes = 3
	}
	root, err := TempDir(o.Under)
	if err != nil {
		return nil, err
	}
	base, ports, err := claimPorts(o.Nodes)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(root))
	}
	if o.Network != nil {
		base = networkBase
	}
	c := &Cluster{
		Dir: filepath.Join(root, "demo"), Nodes: o.Nodes,
		options: o, root: root, base: base, ports: ports, singles: map[int]*process{},
	}
	if err := c.Resume(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("start cluster: %w\n%s", err, c.Logs(60)), c.Destroy())
	}
	return c, nil
}

// Attach returns a cluster that runs already and belongs to somebody else: it cannot be stopped. Several nodes may
// have one address, which is how a workload is tried against a single stock server.
func Attach(nodes []Endpoint) *Cluster {
	return &Cluster{Nodes: len(nodes), attached: nodes}
}

// Attached reports whether the processes are not ours.
func (c *Cluster) Attached() bool { return c.attached != nil }

// Resume starts the nodes on their directories, which may hold the data of an earlier run, and waits until all are ready.
func (c *Cluster) Resume(ctx context.Context) error {
	if c.options.separate() {
		return c.runAll(ctx)
	}
	args := []string{"demo", "--dir", c.Dir, "--nodes", strconv.Itoa(c.Nodes), "--base-port", strconv.Itoa(c.base)}
	if c.options.PGBin != "" {
		args = append(args, "--pg-bin", c.options.PGBin)
	}
	demo, err := startProcess(startHere, filepath.Join(c.root, "demo.log"), c.options.Binary, args...)
	if err != nil {
		return fmt.Errorf("start demo: %w", err)
	}
	c.demo = demo
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	select {
	case <-demo.ready:
		return nil
	case <-demo.done:
		return fmt.Errorf("start demo: it ended before it was ready: %w", demo.exit())
	case <-ctx.Done():
		return fmt.Errorf("start demo: not ready: %w", ctx.Err())
	}
}

// Stop ends everything as a user would, with SIGTERM, and checks that it ends cleanly and leaves no process.
func (c *Cluster) Stop() error {
	var errs []error
	for i, p := range c.singles {
		errs = append(errs, p.stop(fmt.Sprintf("node %d", i)))
	}
	clear(c.singles)
	if c.demo != nil {
		errs = append(errs, c.demo.stop("demo"))
		c.demo = nil
	}
	errs = append(errs, c.stopServers())
	left, err := ProcessesUnder(c.Dir)
	errs = append(errs, err)
	for _, p := range left {
		errs = append(errs, fmt.Errorf("stop cluster: process %d is left: %s", p.PID, p.Command))
	}
	return errors.Join(errs...)
}

// Destroy kills whatever of the cluster still runs and removes its directory. It is safe after Stop, and safe to
// call twice.
func (c *Cluster) Destroy() error {
	if c.Attached() || c.root == "" {
		return nil
	}
	stopped := c.stopServers()
	shared := map[string]bool{} // memory, by file: a server that is killed leaves it
	// More than once: a postmaster that is killed leaves children that notice it a moment later.
	for range 100 {
		left, err := ProcessesUnder(c.root)
		if err != nil {
			return err
		}
		if len(left) == 0 {
			break
		}
		for _, p := range left {
			for _, file := range p.sharedMemory() {
				shared[file] = true
			}
			// Gone meanwhile is as good as killed.
			if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("kill process %d: %w", p.PID, err)
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	if c.demo != nil {
		<-c.demo.done
	}
	for _, p := range c.singles {
		<-p.done
	}
	errs := []error{stopped, os.RemoveAll(c.root), c.ports.Close()}
	for file := range shared {
		if err := os.Remove(file); !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	c.root = ""
	return errors.Join(errs...)
}

// KillNode kills the sidecar of node i with SIGKILL and waits until it is gone. What it started goes its own way.
func (c *Cluster) KillNode(ctx context.Context, i int) error {
	pid, err := c.SidecarPID(i)
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill node %d: %w", i, err)
	}
	return c.AwaitEnd(ctx, pid)
}

// AwaitEnd waits until a process is gone, with its files and locks.
func (*Cluster) AwaitEnd(ctx context.Context, pid int) error {
	return poll(ctx, func() error {
		p, err := ReadProcess(pid)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		// The first thread may be a zombie while others, and with them the files and locks, are still there.
		threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid)) // gone meanwhile: none
		if err == nil && p.Zombie && len(threads) <= 1 {
			return nil
		}
		return errors.Join(err, fmt.Errorf("await the end of process %d: it still runs", pid))
	})
}

// RunNode starts node i by itself, with "quorate run", and returns when its gateway lets a write through.
func (c *Cluster) RunNode(ctx context.Context, i int) error {
	if err := c.StartNode(i); err != nil {
		return err
	}
	return c.AwaitNode(ctx, i)
}

// StartNode starts node i by itself and returns at once.
func (c *Cluster) StartNode(i int) error {
	log := filepath.Join(c.root, fmt.Sprintf("run-node%d.log", i))
	where := startHere
	if c.options.Network != nil {
		where = func(start func() error) error { return c.options.Network.Do(i, start) }
	}
	p, err := startProcess(where, log, c.options.Binary, "run", "--config", filepath.Join(c.NodeDir(i), "quorate.yaml"))
	if err != nil {
		return fmt.Errorf("run node %d: %w", i, err)
	}
	c.singles[i] = p
	return nil
}

// AwaitNode returns when the gateway of a node that StartNode has started lets a write through.
func (c *Cluster) AwaitNode(ctx context.Context, i int) error {
	if err := c.ensureFenceTable(ctx); err != nil {
		return fmt.Errorf("run node %d: %w", i, err)
	}
	p := c.singles[i]
	return poll(ctx, func() error {
		select {
		case <-p.done:
			return stopPolling{fmt.Errorf("run node %d: it ended: %w", i, p.exit())}
		default:
		}
		if err := c.fence(ctx, i, rand.Text()); err != nil {
			return fmt.Errorf("run node %d: %w", i, err)
		}
		return nil
	})
}

// NodeRuns reports whether the sidecar of node i runs.
func (c *Cluster) NodeRuns(i int) bool {
	if p := c.singles[i]; p != nil {
		select {
		case <-p.done:
			return false
		default:
			return true
		}
	}
	pid, err := c.SidecarPID(i)
	if err != nil {
		return false
	}
	p, err := ReadProcess(pid)
	return err == nil && !p.Zombie
}

// NodeDir is the directory of node i.
func (c *Cluster) NodeDir(i int) string { return filepath.Join(c.Dir, fmt.Sprintf("node%d", i)) }

// SidecarPID returns the process id of the sidecar of node i.
func (c *Cluster) SidecarPID(i int) (int, error) {
	if p := c.singles[i]; p != nil {
		return p.cmd.Process.Pid, nil // it may not have written its file yet: that has the one before it
	}
	return ReadPIDFile(filepath.Join(c.NodeDir(i), "quorate.pid"))
}

// PostmasterPID returns the process id of the PostgreSQL of node i.
func (c *Cluster) PostmasterPID(i int) (int, error) {
	return ReadPIDFile(filepath.Join(c.NodeDir(i), "pgdata", "postmaster.pid"))
}

// Gateway is the address of the gateway of node i, counted from 1.
func (c *Cluster) Gateway(i int) string {
	if c.Attached() {
		return c.attached[i-1].Gateway
	}
	return c.address(gatewayPorts, i)
}

// Postgres is the address of the PostgreSQL of node i: around the gateway, for looking and for nothing else.
func (c *Cluster) Postgres(i int) string {
	if c.Attached() {
		return c.attached[i-1].Postgres
	}
	if c.options.separate() { // it may be another machine's loopback
		return filepath.Join(c.NodeDir(i), "run", ":"+strconv.Itoa(c.base+postgresPorts+i))
	}
	return c.address(postgresPorts, i)
}

// GRPC is the address of the admin service of node i.
func (c *Cluster) GRPC(i int) string { return c.address(grpcPorts, i) }

// HTTP is the address of the metrics of node i.
func (c *Cluster) HTTP(i int) string { return c.address(httpPorts, i) }

// Raft is the address at which node i talks Raft.
func (c *Cluster) Raft(i int) string { return c.address(raftPorts, i) }

func (c *Cluster) address(block, i int) string {
	return net.JoinHostPort(c.host(i), strconv.Itoa(c.base+block+i))
}

func (c *Cluster) host(i int) string {
	if c.options.Network != nil {
		return c.options.Network.Host(i)
	}
	return "127.0.0.1"
}

// Password is that of postgres, where one is asked for.
const Password = "tested"

// URL is the connection string for an address, or for the directory and port of a Unix socket.
func URL(address string) string {
	const role, options = "postgres://postgres:" + Password + "@", "/postgres?sslmode=disable"
	if dir, file := filepath.Split(address); dir != "" {
		_, port, _ := strings.Cut(file, ":")
		return role + options + "&host=" + dir + "&port=" + port
	}
	return role + address + options
}

// Connect opens a session through the gateway of node i.
func (c *Cluster) Connect(ctx context.Context, i int) (*pgx.Conn, error) {
	return connect(ctx, c.Gateway(i))
}

// Direct opens a session with the PostgreSQL of node i, around the gateway, to look at what is there.
func (c *Cluster) Direct(ctx context.Context, i int) (*pgx.Conn, error) {
	return connect(ctx, c.Postgres(i))
}

func connect(ctx context.Context, address string) (*pgx.Conn, error) {
	config, err := pgx.ParseConfig(URL(address))
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	config.ConnectTimeout = 10 * time.Second
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", address, err)
	}
	return conn, nil
}

// closeConn ends a session whose work is done or has failed already: an error of closing says nothing more.
func closeConn(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_ = conn.Close(ctx)
}

// Status runs "quorate status" against node i.
func (c *Cluster) Status(ctx context.Context, i int, args ...string) ([]byte, error) {
	return c.ask(ctx, "status", i, args...)
}

// ask runs a command against node i. What it prints is returned even when it fails.
func (c *Cluster) ask(ctx context.Context, command string, i int, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, cmp.Or(c.options.Asking, c.options.Binary), append(append([]string{command, "--address", c.GRPC(i)}, c.credentials()...), args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("%s of node %d: %w: %s", command, i, err, stderr.String())
	}
	return out, nil
}

// Command runs a quorate command that asks no node, and returns what it prints on standard output.
func (c *Cluster) Command(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, c.options.Binary, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("quorate %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out), nil
}

// Verification is what "quorate verify" found.
type Verification struct {
	CSN       uint64
	Differing []string // tables
	Members   []struct {
		ID     int
		Error  string // why it did not take part
		Tables []struct {
			Name string
			Rows int
			Hash string
		}
	}
}

// VerifyOnline runs "quorate verify" against node i. An error that is not about the result leaves an empty Verification.
func (c *Cluster) VerifyOnline(ctx context.Context, i int) (Verification, error) {
	var v Verification
	out, err := c.ask(ctx, "verify", i, "-o", "json")
	if len(out) > 0 {
		err = errors.Join(err, json.Unmarshal(out, &v))
	}
	return v, err
}

// Log returns what "quorate log" prints of node i, which must be stopped.
func (c *Cluster) Log(ctx context.Context, i int) ([]byte, error) {
	cmd := exec.CommandContext(ctx, c.options.Binary, "log", "--data-dir", c.NodeDir(i))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("log of node %d: %w: %s", i, err, stderr.String())
	}
	return out, nil
}

// Logs returns the last lines of everything the processes have written: their output and the log files under the
// cluster's directory.
func (c *Cluster) Logs(lines int) string {
	if c.root == "" {
		return ""
	}
	var files []string
	// A tree that changes while it is walked: what can be read is shown.
	_ = filepath.WalkDir(c.root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && (strings.HasSuffix(path, ".log") || filepath.Base(path) == "logfile") {
			files = append(files, path)
		}
		return nil
	})
	slices.Sort(files)
	var b strings.Builder
	for _, path := range files {
		content, err := os.ReadFile(path)
		if err != nil || len(content) == 0 {
			continue
		}
		fmt.Fprintf(&b, "---- %s\n%s\n", strings.TrimPrefix(path, c.root+"/"), tail(string(content), lines))
	}
	return b.String()
}

// process is a command of ours with its output in a file.
type process struct {
	cmd   *exec.Cmd
	ready chan struct{} // closed when it printed a line that begins "ready"
	done  chan struct{} // closed when it has ended; err is set then
	err   error
}

// startHere is where most processes are started.
func startHere(start func() error) error { return start() }

// startProcess starts a command, by way of where; its output is appended to the file log. Should this test die, even by
// SIGKILL, the command gets a SIGTERM. Linux ties that to the thread that started it, hence the locked goroutine.
func startProcess(where func(start func() error) error, log, name string, args ...string) (*process, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	reader, writer, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open pipe: %w", err), out.Close())
	}
	p := &process{cmd: exec.Command(name, args...), ready: make(chan struct{}), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = writer, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, not before the command
		err := where(p.cmd.Start)
		started <- err
		if err == nil {
			p.err = p.cmd.Wait()
			close(p.done)
		}
	}()
	err = <-started
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", name, err), writer.Close(), reader.Close(), out.Close())
	}
	if err := writer.Close(); err != nil {
		return nil, fmt.Errorf("close pipe: %w", err)
	}
	go func() {
		defer reader.Close()
		defer out.Close()
		var once sync.Once
		lines := bufio.NewReader(reader)
		for {
			line, err := lines.ReadString('\n')
			if strings.HasPrefix(line, "ready") {
				once.Do(func() { close(p.ready) })
			}
			if _, werr := io.WriteString(out, line); werr != nil || err != nil {
				return
			}
		}
	}()
	return p, nil
}

// exit returns why an ended process ended; never nil, for callers that did not expect the end.
func (p *process) exit() error {
	if p.err != nil {
		return p.err
	}
	return errors.New("exit status 0")
}

// stop sends SIGTERM and waits for a clean end.
func (p *process) stop(what string) error {
	select {
	case <-p.done:
		return fmt.Errorf("stop %s: it had ended before: %w", what, p.exit())
	default:
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop %s: %w", what, err)
	}
	select {
	case <-p.done:
		if p.err != nil {
			return fmt.Errorf("stop %s: %w", what, p.err)
		}
		return nil
	case <-time.After(stopTimeout):
		return fmt.Errorf("stop %s: it still runs %v after SIGTERM", what, stopTimeout)
	}
}

// stopPolling wraps an error that no further try can mend.
type stopPolling struct{ error }

func (s stopPolling) Unwrap() error { return s.error }

// pollInterval is how often a condition is looked at that only a query can tell.
const pollInterval = 10 * time.Millisecond

// poll calls check until it returns nil or the context ends; then it returns check's last error.
func poll(ctx context.Context, check func() error) error { return pollEvery(ctx, pollInterval, check) }

func pollEvery(ctx context.Context, interval time.Duration, check func() error) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	var last error
	for {
		err := check()
		if err == nil {
			return nil
		}
		var final stopPolling
		if errors.As(err, &final) {
			return err
		}
		if last == nil || ctx.Err() == nil { // an error made by the deadline itself tells less than the one before
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (waited until %w)", last, ctx.Err())
		case <-ticker.C:
		}
	}
}
