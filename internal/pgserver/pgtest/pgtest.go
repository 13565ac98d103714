// Package pgtest gives tests private PostgreSQL servers: real ones, started in a fraction of a second, stopped and
// removed when the test ends, and ended by the kernel should the test binary be killed.
package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sys/unix"

	"github.com/quorate/quorate/internal/pgserver"
)

// Options of a test server. The zero value is PostgreSQL 18 with the settings of a node.
type Options struct {
	// Major version, 17 or 18; default 18.
	Major int
	// Settings are added to, and win over, those of a node (pgserver.NodeSettings) and fsync = off.
	Settings pgserver.Settings
	// Tmpfs puts the data into memory (/dev/shm) if it has half a gigabyte to spare, else where temporary files go.
	Tmpfs bool
	// Sizing of the node settings; default 40 clients and 16 workers.
	Sizing pgserver.Sizing
}

// Install returns the server programs of a major version: what is installed, else what Fetch gets. It fails the test
// when there is neither; a test is never skipped.
func Install(t testing.TB, major int) pgserver.Install {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	in, err := pgserver.Find(ctx, pgserver.FindOptions{Major: major})
	if err != nil {
		in, err = pgserver.Fetch(ctx, major, t.Output())
	}
	if err != nil {
		t.Fatalf("find PostgreSQL %d for the test: %v", major, err)
	}
	return in
}

// Start starts a server with an empty database cluster: superuser postgres, trust, on 127.0.0.1 and a Unix socket.
// The database system identifier is that of a template, and so is the same for all servers of one version.
func Start(t testing.TB, o Options) *pgserver.Server {
	t.Helper()
	if o.Major == 0 {
		o.Major = 18
	}
	if o.Sizing == (pgserver.Sizing{}) {
		o.Sizing = pgserver.Sizing{Clients: 40, Workers: 16}
	}
	in := Install(t, o.Major)
	settings := pgserver.NodeSettings(in.Version, o.Sizing)
	settings["fsync"] = "off" // a killed server loses nothing by that, only a crashed machine does
	for name, value := range o.Settings {
		settings[name] = value
	}
	dir := Dir(t, o.Tmpfs)
	dataDir := filepath.Join(dir, "pgdata")
	copyTemplate(t, in, dataDir)

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var last error
	for range 5 { // a port that was free a moment ago may be taken
		s, err := pgserver.New(pgserver.Config{
			Install: in, DataDir: dataDir, Port: FreePort(t), Auth: "trust", Settings: settings,
			EndWithParent: true, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		})
		if err != nil {
			t.Fatalf("configure test server: %v", err)
		}
		if last = s.Start(ctx); last == nil {
			t.Cleanup(func() { stop(t, s) })
			return s
		}
		stop(t, s)
		if !strings.Contains(last.Error(), "could not bind") {
			break
		}
	}
	t.Fatalf("start test server: %v", last)
	return nil
}

// stop gives a test server two seconds, then makes it quit: its data are thrown away.
func stop(t testing.TB, s *pgserver.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if err := s.Stop(ctx); err != nil {
		t.Errorf("stop test server: %v", err)
	}
}

// Connect opens a connection as superuser, closed when the test ends. It may write, whatever the server's default.
func Connect(t testing.TB, s *pgserver.Server, database string) *pgx.Conn {
	t.Helper()
	cfg, err := pgx.ParseConfig(s.ConnString(database))
	if err != nil {
		t.Fatalf("connect to test server: %v", err)
	}
	cfg.RuntimeParams["default_transaction_read_only"] = "off"
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		t.Fatalf("connect to test server: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := conn.Close(ctx); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Logf("close connection to test server: %v", err)
		}
	})
	return conn
}

// Dir returns a new directory that the server's account can reach, unlike that of T.TempDir when root tests. It is
// removed when the test ends.
func Dir(t testing.TB, tmpfs bool) string {
	t.Helper()
	base := os.TempDir()
	var st unix.Statfs_t
	if tmpfs && unix.Statfs("/dev/shm", &st) == nil && st.Bavail*uint64(st.Bsize) > 512<<20 {
		base = "/dev/shm"
	}
	dir, err := os.MkdirTemp(base, "quorate-test-")
	if err != nil {
		t.Fatalf("make test directory: %v", err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove test directory: %v", err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatalf("open test directory: %v", err)
	}
	return dir
}

// FreePort returns a TCP port of 127.0.0.1 that nobody listened on a moment ago. It is none of those that the kernel gives to
// who does not ask for one: an outgoing connection, of a test beside this one, could have it the next moment. Nor is it one of
// those that clusters take, which are lower.
func FreePort(t testing.TB) int {
	t.Helper()
	const first, count, attempts = 30000, 2768, 100
	var err error
	for range attempts {
		port := first + int(lastPort.Add(1)%count)
		var l net.Listener
		if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			defer l.Close()
			return port
		}
	}
	t.Fatalf("find a free port: %v", err)
	return 0
}

// lastPort goes through all ports from any of them on, so that two calls of one process do not return the same.
var lastPort = func() *atomic.Uint32 {
	var n atomic.Uint32
	n.Store(rand.Uint32N(1 << 20))
	return &n
}()

// copyTemplate gives a test a data directory. initdb takes a second of CPU, a copy a tenth of it; the template is made
// once per machine, beside the fetched programs.
func copyTemplate(t testing.TB, in pgserver.Install, dataDir string) {
	t.Helper()
	cache, err := pgserver.CacheDir()
	if err != nil {
		t.Fatalf("find template: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	// With the binary's time in its name, a server that was installed anew under the same version gets a new one.
	program, err := os.Stat(filepath.Join(in.BinDir, "postgres"))
	if err != nil {
		t.Fatalf("find template: %v", err)
	}
	template := filepath.Join(cache, fmt.Sprintf("template-%s-%x", in.Version, program.ModTime().Unix()))
	unlock, err := pgserver.Lock(ctx, template+".lock")
	if err != nil {
		t.Fatalf("find template: %v", err)
	}
	defer unlock()
	s, err := pgserver.New(pgserver.Config{Install: in, DataDir: template, Port: 1, Auth: "trust", NoSync: true})
	if err != nil {
		t.Fatalf("make template: %v", err)
	}
	if _, err := os.Stat(template); errors.Is(err, fs.ErrNotExist) {
		if _, err := s.Init(ctx); err != nil {
			t.Fatalf("make template: %v", err)
		}
	}
	// cp clones where the file system can, keeps owner and mode, and needs no privilege we do not have.
	if out, err := exec.CommandContext(ctx, "cp", "-a", "--reflink=auto", template, dataDir).CombinedOutput(); err != nil {
		t.Fatalf("copy template: %v: %s", err, out)
	}
}
