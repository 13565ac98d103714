package pgserver_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/internal/pgserver/pgtest"
)

func connect(t *testing.T, s *pgserver.Server) *pgconn.PgConn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	conn, err := pgconn.Connect(ctx, s.ConnString("postgres"))
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func query(t *testing.T, c *pgconn.PgConn, sql string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	res, err := c.Exec(ctx, sql).ReadAll()
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	last := res[len(res)-1]
	if len(last.Rows) == 0 {
		return ""
	}
	return string(last.Rows[0][0])
}

func TestLifecycle(t *testing.T) {
	t.Parallel()
	for _, major := range []int{17, 18} {
		t.Run(fmt.Sprint(major), func(t *testing.T) {
			t.Parallel()
			s := pgtest.Start(t, pgtest.Options{Major: major})
			c := connect(t, s)
			for name, want := range map[string]string{
				"wal_level": "logical", "server_encoding": "UTF8", "TimeZone": "UTC",
				"default_transaction_read_only": "on", "default_transaction_isolation": "repeatable read",
			} {
				if got := query(t, c, "SHOW "+name); got != want {
					t.Errorf("%s = %q, want %q", name, got, want)
				}
			}
			if got := query(t, c, "SELECT datlocprovider::text || datlocale FROM pg_database WHERE datname = 'postgres'"); got != "bC.UTF-8" {
				t.Errorf("locale provider and locale are %q", got)
			}
			if v, err := pgserver.ParseVersion(query(t, c, "SHOW server_version")); err != nil || v != s.Config().Install.Version {
				t.Errorf("server says version %v (%v), Install %v", v, err, s.Config().Install.Version)
			}
			first := s.PID()
			ctx := t.Context()
			if err := s.Start(ctx); err != nil || s.PID() != first {
				t.Fatalf("Start of a running server: pid %d became %d, %v", first, s.PID(), err)
			}
			if err := s.Restart(ctx); err != nil || s.PID() == first {
				t.Fatalf("Restart: pid %d became %d, %v", first, s.PID(), err)
			}
			done := s.Done()
			if err := s.Stop(ctx); err != nil {
				t.Fatal(err)
			}
			<-done
			if err := s.Stop(ctx); err != nil {
				t.Fatalf("second Stop: %v", err)
			}
			if _, running, err := pgserver.Running(s.Config().DataDir); running || err != nil {
				t.Fatalf("running after Stop: %v, %v", running, err)
			}
		})
	}
}

// A sidecar that was killed leaves its server running; the next one takes it over without a restart, unless its
// settings have changed.
func TestAdopt(t *testing.T) {
	t.Parallel()
	s := pgtest.Start(t, pgtest.Options{})
	pid := s.PID()
	cfg := s.Config()

	next, err := pgserver.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := next.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if next.PID() != pid {
		t.Fatalf("server %d was not adopted: %d runs", pid, next.PID())
	}

	cfg.Settings = pgserver.Settings{"work_mem": "5MB"}
	changed, err := pgserver.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := changed.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if changed.PID() == pid {
		t.Error("the server still runs with the old settings")
	}
	if got := query(t, connect(t, changed), "SHOW work_mem"); got != "5MB" {
		t.Errorf("work_mem = %s", got)
	}
	<-next.Done() // who had adopted the old one is told
	if err := changed.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// kill -9 of the postmaster while a session is stopped, so that its process does not go away by itself.
func TestStartAfterKill(t *testing.T) {
	t.Parallel()
	s := pgtest.Start(t, pgtest.Options{})
	c := connect(t, s)
	var backend int
	if _, err := fmt.Sscan(query(t, c, "SELECT pg_backend_pid()"), &backend); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(backend, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	done := s.Done()
	if err := syscall.Kill(s.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-done
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := query(t, connect(t, s), "SELECT 1"); got != "1" {
		t.Errorf("SELECT 1 gives %q", got)
	}
}

func TestStalePostmasterPid(t *testing.T) {
	t.Parallel()
	s := pgtest.Start(t, pgtest.Options{})
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := s.Config().DataDir
	// The number belongs to a living process that is no server: this test.
	text := fmt.Sprintf("%d\n%s\n1\n%d\n\n127.0.0.1\n 1 2\nready   \n", os.Getpid(), dir, s.Config().Port)
	name := filepath.Join(dir, "postmaster.pid")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(name, s.Config().Account.UID, s.Config().Account.GID); err != nil {
		t.Fatal(err)
	}
	if pm, running, err := pgserver.Running(dir); running || err != nil {
		t.Fatalf("Running: %+v, %v, %v", pm, running, err)
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestStartSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	s := pgtest.Start(t, pgtest.Options{})
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cfg := s.Config()
	cfg.Port = l.Addr().(*net.TCPAddr).Port
	taken, err := pgserver.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := taken.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "Address already in use") {
		t.Errorf("port in use: %v", err)
	}
	cfg = s.Config()
	cfg.Settings = pgserver.Settings{"max_connections": "many"}
	bad, err := pgserver.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := bad.Start(t.Context()); err == nil || !strings.Contains(err.Error(), `"max_connections"`) {
		t.Errorf("bad setting: %v", err)
	}
}

func TestInit(t *testing.T) {
	t.Parallel()
	in := pgtest.Install(t, 18)
	base := pgtest.Dir(t, false)
	// So deep that no Unix socket could be beside the data.
	dataDir := filepath.Join(base, strings.Repeat("d", 60), strings.Repeat("e", 60), "pgdata")
	cfg := pgserver.Config{Install: in, DataDir: dataDir, Port: pgtest.FreePort(t), Password: "it's \\ secret", EndWithParent: true}
	if os.Geteuid() == 0 { // where there is no user postgres
		nobody, err := user.Lookup("nobody")
		if err != nil {
			t.Fatal(err)
		}
		cfg.Account.Name = "nobody"
		if _, err := fmt.Sscan(nobody.Uid+" "+nobody.Gid, &cfg.Account.UID, &cfg.Account.GID); err != nil {
			t.Fatal(err)
		}
	}
	s, err := pgserver.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(s.Config().SocketDir) })
	if created, err := s.Init(t.Context()); !created || err != nil {
		t.Fatalf("Init: %v, %v", created, err)
	}
	if created, err := s.Init(t.Context()); created || err != nil {
		t.Fatalf("second Init: %v, %v", created, err)
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	if got := query(t, connect(t, s), "SELECT current_user"); got != "postgres" {
		t.Errorf("user %q", got)
	}
	wrong := strings.Replace(s.ConnString("postgres"), "secret", "guess", 1)
	if conn, err := pgconn.Connect(t.Context(), wrong); err == nil {
		_ = conn.Close(t.Context())
		t.Error("a wrong password is accepted")
	}
	if left, err := filepath.Glob(dataDir + ".*"); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestInitRefuses(t *testing.T) {
	t.Parallel()
	in := pgtest.Install(t, 18)
	base := pgtest.Dir(t, false)
	try := func(file, content, want string) {
		t.Helper()
		dir := filepath.Join(base, file)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		s, err := pgserver.New(pgserver.Config{Install: in, DataDir: dir, Port: 5, Auth: "trust"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Init(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", file, err, want)
		}
		if got, err := os.ReadFile(filepath.Join(dir, file)); err != nil || string(got) != content {
			t.Errorf("%s was damaged: %q, %v", file, got, err)
		}
	}
	try("precious", "data", "neither empty nor PostgreSQL's")
	try("PG_VERSION", "17\n", "made by PostgreSQL 17")
}

func TestNewRefuses(t *testing.T) {
	ok := pgserver.Config{DataDir: "/data", Port: 5432, Auth: "trust", Account: pgserver.Account{Name: "u", UID: 1000, GID: 1000}}
	if _, err := pgserver.New(ok); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		change func(*pgserver.Config)
		want   string
	}{
		{func(c *pgserver.Config) { c.DataDir = "data" }, "absolute"},
		{func(c *pgserver.Config) { c.Port = 65536 }, "65536"},
		{func(c *pgserver.Config) { c.Auth = "" }, "password"},
		{func(c *pgserver.Config) { c.Account.UID = 0 }, "root"},
		{func(c *pgserver.Config) { c.SocketDir = "/" + strings.Repeat("s", 100) }, "101 bytes"},
	} {
		c := ok
		tc.change(&c)
		if _, err := pgserver.New(c); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("error %v, want %q", err, tc.want)
		}
	}
}

func TestCheckSettings(t *testing.T) {
	t.Parallel()
	for _, major := range []int{17, 18} {
		t.Run(fmt.Sprint(major), func(t *testing.T) {
			t.Parallel()
			size := pgserver.Sizing{Clients: 40, Workers: 16}
			s := pgtest.Start(t, pgtest.Options{Major: major, Sizing: size, Settings: pgserver.Settings{"fsync": "on"}})
			if err := pgserver.CheckSettings(t.Context(), connect(t, s), size); err != nil {
				t.Fatalf("a node's own settings: %v", err)
			}
			// A session that asked for something else is not what is judged.
			asked, err := pgconn.Connect(t.Context(), s.ConnString("postgres")+" default_transaction_read_only=off")
			if err != nil {
				t.Fatal(err)
			}
			if err := pgserver.CheckSettings(t.Context(), asked, size); err != nil {
				t.Errorf("asked by a session that may write: %v", err)
			}
			query(t, asked, "ALTER ROLE postgres SET default_transaction_read_only = no")
			again, err := pgconn.Connect(t.Context(), s.ConnString("postgres")+" default_transaction_read_only=off")
			if err != nil {
				t.Fatal(err)
			}
			if err := pgserver.CheckSettings(t.Context(), again, size); err == nil || !strings.Contains(err.Error(), "default_transaction_read_only") {
				t.Errorf("with a default of the role that will not do: %v", err)
			}
			query(t, again, "ALTER ROLE postgres RESET default_transaction_read_only")
			for _, c := range []*pgconn.PgConn{asked, again} {
				if err := c.Close(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			// What a server has that knows nothing of us.
			cfg := s.Config()
			cfg.Settings = pgserver.Settings{"track_counts": "off"}
			plain, err := pgserver.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			if err := plain.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			size.Workers = 32
			conn := connect(t, plain)
			err = pgserver.CheckSettings(t.Context(), conn, size)
			var wrong *pgserver.SettingsError
			if !errors.As(err, &wrong) {
				t.Fatalf("a stock server: %v", err)
			}
			t.Log(err)
			want := 6 // wal_level, isolation, read only, counts, slots, and origins since 18
			if major < 18 {
				want = 5
			}
			if len(wrong.Problems) != want {
				t.Errorf("%d problems, want %d", len(wrong.Problems), want)
			}
			// The commands mend it.
			for _, p := range wrong.Problems {
				query(t, conn, p.Fix)
			}
			if err := plain.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := pgserver.CheckSettings(t.Context(), connect(t, plain), size); err != nil {
				t.Errorf("after the commands: %v", err)
			}
			if err := plain.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// EndWithParent is what keeps killed tests from leaving servers behind.
func TestEndWithParent(t *testing.T) {
	if dir := os.Getenv("QUORATE_TEST_CHILD"); dir != "" {
		s := pgtest.Start(t, pgtest.Options{})
		if err := os.WriteFile(dir, fmt.Appendf(nil, "%s", s.Config().DataDir), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		select {}
	}
	t.Parallel()
	note := filepath.Join(t.TempDir(), "datadir")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	child := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestEndWithParent$")
	child.Env = append(os.Environ(), "QUORATE_TEST_CHILD="+note)
	out, err := child.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the child ended by itself: %v\n%s", err, out)
	}
	dataDir, err := os.ReadFile(note)
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(filepath.Dir(string(dataDir)))
	for {
		if _, running, err := pgserver.Running(string(dataDir)); err != nil {
			t.Fatal(err)
		} else if !running {
			return
		}
		if ctx.Err() != nil {
			t.Fatal("the server has outlived its test")
		}
		time.Sleep(10 * time.Millisecond) // the process is not our child: there is nothing to wait on
	}
}
