package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/test/cluster"
)

// rig is everything that is measured: one stock server, one cluster of three, and pgbouncers in front of the
// PostgreSQL of node 1. All lie in one place.
type rig struct {
	dir      string
	stock    *pgserver.Server
	cluster  *cluster.Cluster
	bouncers map[string]*bouncer // by pool mode
}

// findPostgres locates PostgreSQL 18: the yardstick and the nodes run the same programs.
func findPostgres(ctx context.Context, dir string, progress io.Writer) (pgserver.Install, error) {
	const major = 18
	if dir != "" {
		return pgserver.Find(ctx, pgserver.FindOptions{BinDir: dir})
	}
	in, err := pgserver.Find(ctx, pgserver.FindOptions{Major: major})
	if errors.Is(err, pgserver.ErrNotFound) {
		return pgserver.Fetch(ctx, major, progress)
	}
	return in, err
}

// sharedSettings are those of a node's server that the stock server gets too. Left out is what only replication
// needs, above all wal_level: a server that is alone would not have it.
var sharedSettings = []string{
	"autovacuum", "checkpoint_timeout", "default_transaction_isolation", "fsync", "full_page_writes", "jit",
	"max_connections", "max_wal_size", "min_wal_size", "shared_buffers", "synchronous_commit", "wal_buffers",
	"wal_compression", "wal_sync_method", "work_mem",
}

func newRig(ctx context.Context, p plan, where place, install pgserver.Install, progress io.Writer) (r *rig, err error) {
	dir, err := cluster.TempDir(where.dir)
	if err != nil {
		return nil, err
	}
	r = &rig{dir: dir, bouncers: map[string]*bouncer{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	fmt.Fprintf(progress, "%s: starting a cluster of three in %s\n", where.name, dir)
	r.cluster, err = cluster.Start(ctx, cluster.Options{Binary: p.binary, PGBin: install.BinDir, Under: dir})
	if err != nil {
		return nil, err
	}
	if err := r.startStock(ctx, install); err != nil {
		return nil, err
	}
	fmt.Fprintf(progress, "%s: filling both with %d rows\n", where.name, p.scale*100_000)
	for _, address := range []string{r.cluster.Gateway(1), r.stockAddress()} {
		_, err := cluster.Pgbench{Address: address, Args: []string{"-i", "-q", "-s", strconv.Itoa(p.scale)}}.Run(ctx)
		if err != nil {
			return nil, err
		}
	}
	if err := r.cluster.Settle(ctx); err != nil {
		return nil, err
	}
	for i := 1; i <= r.cluster.Nodes; i++ { // what VACUUM did on node 1 is not replicated
		if err := vacuum(ctx, r.cluster.Postgres(i)); err != nil {
			return nil, err
		}
	}
	return r, vacuum(ctx, r.stockAddress())
}

func vacuum(ctx context.Context, address string) error {
	conn, err := pgx.Connect(ctx, cluster.URL(address))
	if err != nil {
		return fmt.Errorf("vacuum: %w", err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, "VACUUM ANALYZE"); err != nil {
		return fmt.Errorf("vacuum: %w", err)
	}
	if _, err := conn.Exec(ctx, "CHECKPOINT"); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	return nil
}

func (r *rig) startStock(ctx context.Context, install pgserver.Install) error {
	node, err := r.cluster.Direct(ctx, 1)
	if err != nil {
		return err
	}
	defer node.Close(ctx)
	settings := pgserver.Settings{}
	rows, err := node.Query(ctx, "SELECT name, current_setting(name) FROM pg_settings WHERE name = ANY ($1)", sharedSettings)
	if err != nil {
		return fmt.Errorf("read settings of node 1: %w", err)
	}
	var name, value string
	if _, err := pgx.ForEachRow(rows, []any{&name, &value}, func() error { settings[name] = value; return nil }); err != nil {
		return fmt.Errorf("read settings of node 1: %w", err)
	}
	// A session's own value is shown, and this session's may differ from the server's.
	settings["default_transaction_isolation"] = "repeatable read"
	port, err := freePort()
	if err != nil {
		return err
	}
	r.stock, err = pgserver.New(pgserver.Config{
		Install: install, DataDir: filepath.Join(r.dir, "stock", "pgdata"), Port: port, Auth: "trust",
		Settings: settings, EndWithParent: true,
	})
	if err != nil {
		return err
	}
	if _, err := r.stock.Init(ctx); err != nil {
		return err
	}
	return r.stock.Start(ctx)
}

func (r *rig) stockAddress() string {
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(r.stock.Config().Port))
}

// close stops everything and removes all data.
func (r *rig) close() error {
	var errs []error
	for _, b := range r.bouncers {
		errs = append(errs, b.stop())
	}
	if r.stock != nil {
		// Not the caller's context: that may have ended, which is why we are here.
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		errs = append(errs, r.stock.Stop(ctx))
	}
	if r.cluster != nil {
		errs = append(errs, r.cluster.Stop(), r.cluster.Destroy())
	}
	errs = append(errs, os.RemoveAll(r.dir))
	return errors.Join(errs...)
}

// freePort returns a port that is free now.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// bouncer is a running pgbouncer.
type bouncer struct {
	address string
	cmd     *exec.Cmd
	done    chan error
}

func findPgbouncer() (string, error) {
	if path, err := exec.LookPath("pgbouncer"); err == nil {
		return path, nil
	}
	const debian = "/usr/sbin/pgbouncer" // where root's PATH has it, and nobody else's
	if _, err := os.Stat(debian); err == nil {
		return debian, nil
	}
	return "", errors.New("find pgbouncer, which reads are compared with: not in PATH nor in /usr/sbin; on Debian: apt-get install pgbouncer, or leave reads out with -only simple-update,tpcb-like")
}

// startBouncer starts a pgbouncer in front of the PostgreSQL of node 1.
func (r *rig) startBouncer(ctx context.Context, mode string) (err error) {
	path, err := findPgbouncer()
	if err != nil {
		return err
	}
	account, err := pgserver.ServerAccount() // pgbouncer, too, refuses to run as root
	if err != nil {
		return err
	}
	dir := filepath.Join(r.dir, "pgbouncer-"+mode)
	if err := account.MakeDir(dir); err != nil {
		return err
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	host, backend, err := net.SplitHostPort(r.cluster.Postgres(1))
	if err != nil {
		return fmt.Errorf("configure pgbouncer: %w", err)
	}
	config := filepath.Join(dir, "pgbouncer.ini")
	text := fmt.Sprintf(`[databases]
postgres = host=%s port=%s dbname=postgres user=postgres

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = any
pool_mode = %s
default_pool_size = 64
max_client_conn = 200
`, host, backend, port, mode)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return fmt.Errorf("configure pgbouncer: %w", err)
	}
	b := &bouncer{address: net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), done: make(chan error, 1)}
	b.cmd = exec.Command(path, config)
	if os.Geteuid() == 0 {
		b.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(account.UID), Gid: uint32(account.GID)}}
	}
	var output strings.Builder
	b.cmd.Stdout, b.cmd.Stderr = &output, &output
	if err := b.cmd.Start(); err != nil {
		return fmt.Errorf("start pgbouncer: %w", err)
	}
	r.bouncers[mode] = b
	go func() { b.done <- b.cmd.Wait() }()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		conn, err := pgx.Connect(ctx, cluster.URL(b.address))
		if err == nil {
			return conn.Close(ctx)
		}
		select {
		case exit := <-b.done:
			b.done <- exit
			return fmt.Errorf("start pgbouncer: it ended: %w\n%s", errors.Join(exit, err), output.String())
		case <-ctx.Done():
			return fmt.Errorf("start pgbouncer: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (b *bouncer) stop() error {
	// SIGTERM makes pgbouncer end at once; that it has ended before is all the same now.
	if err := b.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop pgbouncer: %w", err)
	}
	select {
	case <-b.done:
		return nil
	case <-time.After(10 * time.Second):
		return errors.Join(errors.New("stop pgbouncer: it still runs after SIGTERM"), b.cmd.Process.Kill())
	}
}
