package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/txn"
)

func demoCommand() *cobra.Command {
	d := demo{}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Run a whole cluster on this machine, to try things out",
		Long: "Run a whole cluster on this machine, to try things out: every node is a process of its own with its own PostgreSQL.\n" +
			"An existing directory is resumed with its data. A node that dies is not started again: do that with\n" +
			"\"quorate run --config DIR/node<i>/quorate.yaml\". SIGINT or SIGTERM stops everything; so does the death of the demo itself.\n" +
			"Everybody on this machine is superuser of these databases.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d.out = cmd.OutOrStdout()
			return d.run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&d.dir, "dir", "./demo", "`directory` of the cluster, made where missing")
	cmd.Flags().IntVar(&d.nodes, "nodes", 3, "how many nodes, 1 to 9")
	cmd.Flags().IntVar(&d.basePort, "base-port", 6000,
		"`port` P: node i has its gateway at P+i, PostgreSQL at P+100+i, gRPC at P+200+i, HTTP at P+300+i, Raft at P+400+i")
	cmd.Flags().StringVar(&d.pgBin, "pg-bin", "",
		"`directory` of postgres and initdb, 17 or newer (default: what this machine has, else it is fetched with npm)")
	return cmd
}

// demo is one run of a cluster whose nodes are children of this process.
type demo struct {
	dir      string
	nodes    int
	basePort int
	pgBin    string
	out      io.Writer

	account  pgserver.Account
	members  []config.Config // by node, from 0
	children []*child
}

func (d *demo) run(ctx context.Context) (err error) {
	if err := d.checkFlags(); err != nil {
		return err
	}
	if err := d.placeDir(); err != nil {
		return err
	}
	pid, err := lockPIDFile(filepath.Join(d.dir, "demo.pid"))
	if err != nil {
		return fmt.Errorf("run demo in --dir %s: %w", d.dir, err)
	}
	defer func() { err = errors.Join(err, pid.release()) }()
	if err := d.prepare(ctx); err != nil {
		return err
	}
	if err := d.checkPorts(); err != nil {
		return err
	}
	died := make(chan *child, d.nodes)
	defer func() { err = errors.Join(err, d.stop(context.WithoutCancel(ctx))) }()
	for i := range d.members {
		c, err := startChild(i+1, d.nodeDir(i), died)
		if err != nil {
			return fmt.Errorf("start node %d: %w", i+1, err)
		}
		d.children = append(d.children, c)
	}
	if err := d.awaitReady(ctx, died); err != nil {
		return err
	}
	if err := d.printAddresses(); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case c := <-died:
			fmt.Fprintf(d.out, "node %d has died (%v); its log is %s. Start it again with: quorate run --config %s\n",
				c.node, c.err, c.log, filepath.Join(d.nodeDir(c.node-1), "quorate.yaml"))
		}
	}
}

func (d *demo) checkFlags() error {
	if d.nodes < 1 || d.nodes > 9 {
		return usage("nodes", strconv.Itoa(d.nodes), "must be from 1 to 9")
	}
	if high := 65535 - raftPorts - d.nodes; d.basePort < 1 || d.basePort > high {
		return usage("base-port", strconv.Itoa(d.basePort), "must be from 1 to %d, so that all ports of %d nodes are below 65536", high, d.nodes)
	}
	if d.dir == "" {
		return usage("dir", `""`, "must name a directory")
	}
	return nil
}

// placeDir makes the directory. When root asks for one that the server's account cannot reach (a closed home), it takes
// one under the system's temporary directory, always the same for the same wish, so that the demo can be resumed.
func (d *demo) placeDir() error {
	var err error
	if d.account, err = pgserver.ServerAccount(); err != nil {
		return err
	}
	if d.dir, err = filepath.Abs(d.dir); err != nil {
		return fmt.Errorf("find --dir: %w", err)
	}
	if closed := d.account.CanReach(d.dir); closed != nil {
		if os.Geteuid() != 0 {
			return fmt.Errorf("use --dir %s: %w", d.dir, closed)
		}
		h := fnv.New32a()
		_, _ = h.Write([]byte(d.dir)) // a hash never fails
		elsewhere := filepath.Join(os.TempDir(), fmt.Sprintf("quorate-demo-%08x", h.Sum32()))
		fmt.Fprintf(d.out, "PostgreSQL runs as user %s, who cannot reach %s: %v; using %s instead\n", d.account.Name, d.dir, closed, elsewhere)
		d.dir = elsewhere
	}
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return fmt.Errorf("make --dir: %w", err)
	}
	// In a world-writable parent somebody else may have made it, and could change what is in it.
	info, err := os.Stat(d.dir)
	if err != nil {
		return fmt.Errorf("make --dir: %w", err)
	}
	if owner := info.Sys().(*syscall.Stat_t).Uid; int(owner) != os.Geteuid() {
		return fmt.Errorf("use --dir %s: it belongs to user id %d", d.dir, owner)
	}
	if err := d.account.CanReach(d.dir); err != nil {
		return fmt.Errorf("use --dir %s: %w", d.dir, err)
	}
	return nil
}

func (d *demo) nodeDir(i int) string { return filepath.Join(d.dir, fmt.Sprintf("node%d", i+1)) }

// Distances from the base port.
const (
	gatewayPorts  = 0
	postgresPorts = 100
	grpcPorts     = 200
	httpPorts     = 300
	raftPorts     = 400
)

func (d *demo) port(i, block int) int { return d.basePort + block + i + 1 }

func (d *demo) address(i, block int) string {
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(d.port(i, block)))
}

// prepare reads the nodes' configurations, checks that they are what the flags say, and writes those that are missing.
func (d *demo) prepare(ctx context.Context) error {
	d.members = make([]config.Config, d.nodes)
	missing := make([]bool, d.nodes)
	cluster := ""
	for i := range d.members {
		name := filepath.Join(d.nodeDir(i), "quorate.yaml")
		c, err := config.Load(name)
		if errors.Is(err, fs.ErrNotExist) {
			missing[i] = true
			if entries, err := os.ReadDir(d.nodeDir(i)); err == nil && len(entries) > 0 {
				return fmt.Errorf("use --dir %s: %s holds %q and no quorate.yaml: it is not a demo's",
					d.dir, d.nodeDir(i), entries[0].Name())
			}
			continue
		}
		if err != nil {
			return err
		}
		if cluster == "" {
			cluster = c.Cluster
		}
		if c.Cluster != cluster {
			return fmt.Errorf("resume --dir %s: %s belongs to cluster %q, another node to %q", d.dir, name, c.Cluster, cluster)
		}
		d.members[i] = c
	}
	for i := range d.members {
		if !missing[i] {
			if err := d.checkResumed(i); err != nil {
				return err
			}
		}
	}
	if extra := filepath.Join(d.nodeDir(d.nodes), "quorate.yaml"); cluster != "" {
		if _, err := os.Stat(extra); err == nil {
			return usage("nodes", strconv.Itoa(d.nodes), "%s was made with more", d.dir)
		}
	} else {
		var id [4]byte
		if _, err := rand.Read(id[:]); err != nil {
			return fmt.Errorf("draw a cluster name: %w", err)
		}
		cluster = "demo-" + hex.EncodeToString(id[:])
	}
	for i := range d.members {
		if err := d.prepareNode(ctx, i, cluster, missing[i]); err != nil {
			return err
		}
	}
	return nil
}

// checkResumed compares an existing configuration with the flags.
func (d *demo) checkResumed(i int) error {
	have, want := d.members[i], d.config(i, "")
	name := filepath.Join(d.nodeDir(i), "quorate.yaml")
	if have.Node != want.Node {
		return fmt.Errorf("resume --dir %s: %s is node %s's", d.dir, name, have.Node)
	}
	if len(have.Members) != d.nodes {
		return usage("nodes", strconv.Itoa(d.nodes), "%s was made with %d", d.dir, len(have.Members))
	}
	if have.Listen != want.Listen || have.Postgres.Port != want.Postgres.Port || !reflect.DeepEqual(have.Members, want.Members) {
		return usage("base-port", strconv.Itoa(d.basePort), "%s has other ports: its gateway is %s", name, have.Listen.Gateway)
	}
	if have.DataDir != d.nodeDir(i) {
		return fmt.Errorf("resume --dir %s: %s has data_dir %q", d.dir, name, have.DataDir)
	}
	return nil
}

// prepareNode writes a configuration that is missing, or that names programs which are not those to use.
func (d *demo) prepareNode(ctx context.Context, i int, cluster string, missing bool) error {
	c := &d.members[i]
	switch {
	case missing:
		*c = d.config(i, cluster)
	case d.pgBin != "" && c.Postgres.BinDir != d.pgBin:
	default:
		if _, err := pgserver.Find(ctx, pgserver.FindOptions{BinDir: c.Postgres.BinDir}); err == nil {
			return nil
		}
	}
	if d.pgBin == "" {
		in, err := d.findPostgres(ctx)
		if err != nil {
			return err
		}
		d.pgBin = in.BinDir
	} else {
		in, err := pgserver.Find(ctx, pgserver.FindOptions{BinDir: d.pgBin})
		if err != nil {
			return fmt.Errorf("use --pg-bin: %w", err)
		}
		d.pgBin = in.BinDir
	}
	c.Postgres.BinDir = d.pgBin
	if err := os.MkdirAll(d.nodeDir(i), 0o755); err != nil {
		return fmt.Errorf("make directory of node %d: %w", i+1, err)
	}
	name := filepath.Join(d.nodeDir(i), "quorate.yaml")
	if err := c.Save(name); err != nil {
		return err
	}
	var err error
	*c, err = config.Load(name)
	return err
}

// findPostgres takes what the machine has, else fetches it. It reports what was looked at when that fails too.
func (d *demo) findPostgres(ctx context.Context) (pgserver.Install, error) {
	in, notFound := pgserver.Find(ctx, pgserver.FindOptions{})
	if notFound == nil {
		if err := d.account.CanReach(in.BinDir); err == nil {
			return in, nil
		} else {
			notFound = err
		}
	}
	in, err := pgserver.Fetch(ctx, demoMajor, d.out)
	if err != nil {
		return pgserver.Install{}, fmt.Errorf("%w\n%w", notFound, err)
	}
	return in, nil
}

// demoMajor is the PostgreSQL that the demo fetches.
const demoMajor = 18

// config is a node's configuration as it is written: what can be left to defaults is.
func (d *demo) config(i int, cluster string) config.Config {
	c := config.Config{
		Cluster: cluster,
		Node:    txn.NodeID(i + 1),
		DataDir: ".", // the directory can be moved
		Postgres: config.Postgres{
			Managed: true, Port: d.port(i, postgresPorts), Auth: "trust",
		},
		Listen: config.Listen{
			Gateway: d.address(i, gatewayPorts), GRPC: d.address(i, grpcPorts),
			HTTP: d.address(i, httpPorts), Raft: d.address(i, raftPorts),
		},
	}
	for j := range d.nodes {
		c.Members = append(c.Members, config.Member{
			ID: txn.NodeID(j + 1), Gateway: d.address(j, gatewayPorts), GRPC: d.address(j, grpcPorts),
			HTTP: d.address(j, httpPorts), Raft: d.address(j, raftPorts),
		})
	}
	return c
}

// checkPorts refuses to start when something listens where a node wants to: found out now, nothing is half started.
func (d *demo) checkPorts() error {
	var errs []error
	for i, c := range d.members {
		if pid, running, err := sidecarOf(d.nodeDir(i)); err != nil {
			return err
		} else if running {
			errs = append(errs, fmt.Errorf("node %d of %s runs already: process %d", i+1, d.dir, pid))
			continue
		}
		listeners := []struct{ field, address string }{
			{"listen.gateway", c.Listen.Gateway}, {"listen.grpc", c.Listen.GRPC}, {"listen.http", c.Listen.HTTP}, {"listen.raft", c.Listen.Raft},
		}
		// A PostgreSQL that an earlier demo left behind is taken over by its node.
		if _, running, err := pgserver.Running(c.Postgres.DataDir); err != nil {
			return err
		} else if !running {
			listeners = append(listeners, struct{ field, address string }{"postgres.port", d.address(i, postgresPorts)})
		}
		for _, l := range listeners {
			if err := tryListen(l.address); err != nil {
				errs = append(errs, fmt.Errorf("node %d: %s: %q: %w", i+1, l.field, l.address, err))
			}
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("start with --base-port %d: nothing was started:\n%w", d.basePort, errors.Join(errs...))
	}
	return nil
}

func tryListen(address string) error {
	l, err := net.Listen("tcp", address)
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err // the rest repeats the address
	}
	if err != nil {
		return err
	}
	return l.Close()
}

// awaitReady asks every node until it accepts writes. A node that dies meanwhile ends the demo.
func (d *demo) awaitReady(ctx context.Context, died <-chan *child) error {
	ready := make(chan error, d.nodes)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for i := range d.members {
		go func() { ready <- awaitWrites(ctx, d.members[i]) }()
	}
	for range d.members {
		select {
		case err := <-ready:
			if err != nil {
				return err
			}
		case c := <-died:
			return fmt.Errorf("node %d has died (%w) before it was ready; the end of its log %s:\n%s", c.node, c.err, c.log, c.logTail())
		}
	}
	return nil
}

// awaitWrites polls: the node cannot be subscribed to before it runs, and a start takes seconds.
func awaitWrites(ctx context.Context, c config.Config) error {
	for {
		attempt, cancel := context.WithTimeout(ctx, time.Second)
		resp, err := askStatus(attempt, target{address: c.Self().GRPC}, true)
		cancel()
		if err == nil && resp.Cluster == c.Cluster && len(resp.Members) == 1 && resp.Members[0].AcceptsWrites {
			return nil
		}
		select {
		case <-ctx.Done():
			reason := cmp.Or(err, errors.New("it does not accept writes yet"))
			return fmt.Errorf("wait for node %s: %w: %w", c.Node, context.Cause(ctx), reason)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (d *demo) printAddresses() error {
	t := tabwriter.NewWriter(d.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "node\tgateway\tPostgreSQL\tgRPC\tHTTP\tRaft")
	for i := range d.members {
		fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\t%s\n", i+1, d.address(i, gatewayPorts), d.address(i, postgresPorts),
			d.address(i, grpcPorts), d.address(i, httpPorts), d.address(i, raftPorts))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(d.out, "dashboard: http://%s/\n", d.address(0, httpPorts))
	_, err := fmt.Fprintf(d.out, "ready: psql -h 127.0.0.1 -p %d -U postgres postgres\n", d.port(0, gatewayPorts))
	return err
}

// stop ends everything in the directory: our children, nodes that were started again by hand, and servers whose
// sidecar is dead.
func (d *demo) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, closeTimeout+10*time.Second) // nodes keep to closeTimeout themselves
	defer cancel()
	var errs []error
	for _, c := range d.children {
		errs = append(errs, c.terminate())
	}
	for _, c := range d.children {
		errs = append(errs, c.await(ctx))
	}
	for i := range d.children {
		if err := stopSidecar(ctx, d.nodeDir(i)); err != nil {
			errs = append(errs, fmt.Errorf("stop node %d: %w", i+1, err))
		}
		if err := stopPostgres(ctx, d.members[i]); err != nil {
			errs = append(errs, fmt.Errorf("stop PostgreSQL of node %d: %w", i+1, err))
		}
	}
	return errors.Join(errs...)
}

// sidecarOf returns the process that runs the node of a directory.
func sidecarOf(dir string) (pid int, running bool, err error) {
	f, err := os.Open(filepath.Join(dir, pidFileName))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("open pid file: %w", err)
	}
	defer f.Close()
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
	if err == nil {
		return 0, false, nil // nobody holds it: left by a crash
	}
	if !errors.Is(err, syscall.EWOULDBLOCK) {
		return 0, false, fmt.Errorf("examine pid file: %w", err)
	}
	pid, err = readPID(f.Name())
	return pid, err == nil && pid != 0, err
}

func stopSidecar(ctx context.Context, dir string) error {
	signalled := 0
	for {
		pid, running, err := sidecarOf(dir)
		if err != nil || !running {
			return err
		}
		if pid != signalled {
			if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("end process %d: %w", pid, err)
			}
			signalled = pid
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("end process %d: %w", pid, ctx.Err())
		case <-time.After(20 * time.Millisecond): // it is not our child: there is nothing to wait on
		}
	}
}

func stopPostgres(ctx context.Context, c config.Config) error {
	if _, running, err := pgserver.Running(c.Postgres.DataDir); err != nil || !running {
		return err
	}
	s, err := pgserver.New(pgserver.Config{DataDir: c.Postgres.DataDir, Port: c.Postgres.Port, Auth: "trust"})
	if err != nil {
		return err
	}
	return s.Stop(ctx)
}
