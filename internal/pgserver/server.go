package pgserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sys/unix"

	"github.com/quorate/quorate/internal/logkey"
)

// Config describes a managed server.
type Config struct {
	Install Install
	Account Account // who runs it; default ServerAccount()
	DataDir string  // absolute
	// Host is the address of TCP connections, default 127.0.0.1; SocketDir the directory of the Unix socket, default
	// DefaultSocketDir(DataDir).
	Host      string
	Port      int
	SocketDir string
	Superuser string // default "postgres"
	// Auth is the method for local and loopback connections that initdb writes to pg_hba.conf: "scram-sha-256"
	// (default) or "trust". Password is the superuser's; required unless trust.
	Auth     string
	Password string
	// Settings are written to quorate.conf, which postgresql.conf includes; see NodeSettings.
	Settings Settings
	// LogFile takes the server's messages, appended; default postgresql.log beside the data directory. The server
	// holds it open, so that it survives the sidecar: rotate by copy and truncate.
	LogFile string
	// EndWithParent makes the kernel end the server at once when this process dies. Without it the server outlives a
	// killed sidecar, as it should, and the next Start adopts it.
	EndWithParent bool
	// NoSync skips flushing the new data directory to disk in Init: for data that are thrown away.
	NoSync bool
	Log    *slog.Logger // default: discard
}

// Server is a PostgreSQL server that this process manages. Its methods may be called concurrently; they take turns.
type Server struct {
	cfg Config

	mu      sync.Mutex // one operation at a time
	current *postmaster
}

// postmaster is a server process being watched.
type postmaster struct {
	pid  int
	proc process
	done chan struct{} // closed when it has ended
}

// New checks the configuration and fills in its defaults. It touches nothing.
func New(c Config) (*Server, error) {
	if c.Account == (Account{}) {
		var err error
		if c.Account, err = ServerAccount(); err != nil {
			return nil, err
		}
	}
	if c.Account.UID == 0 {
		return nil, errors.New("configure PostgreSQL: it refuses to run as root")
	}
	if !filepath.IsAbs(c.DataDir) {
		return nil, fmt.Errorf("configure PostgreSQL: data directory %q is not an absolute path", c.DataDir)
	}
	if c.Port < 1 || c.Port > 65535 {
		return nil, fmt.Errorf("configure PostgreSQL: port %d is out of range", c.Port)
	}
	if c.Host == "" {
		c.Host = "127.0.0.1"
	}
	if c.SocketDir == "" {
		c.SocketDir = DefaultSocketDir(c.DataDir)
	}
	if n := len(c.SocketDir); n > maxSocketDir {
		return nil, fmt.Errorf("configure PostgreSQL: socket directory %q has %d bytes, more than %d", c.SocketDir, n, maxSocketDir)
	}
	if c.Superuser == "" {
		c.Superuser = "postgres"
	}
	if c.Auth == "" {
		c.Auth = "scram-sha-256"
	}
	if c.Auth != "trust" && c.Password == "" {
		return nil, fmt.Errorf("configure PostgreSQL: authentication %q needs a password", c.Auth)
	}
	if c.LogFile == "" {
		c.LogFile = filepath.Join(filepath.Dir(c.DataDir), "postgresql.log")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{cfg: c}, nil
}

// maxSocketDir leaves room for "/.s.PGSQL.65535" in the 107 bytes of a Unix socket's address.
const maxSocketDir = 107 - len("/.s.PGSQL.65535")

// DefaultSocketDir returns the directory "run" beside the data directory or, where that path is too long for a
// socket, one under the system's temporary directory that is named after it.
func DefaultSocketDir(dataDir string) string {
	if dir := filepath.Join(filepath.Dir(dataDir), "run"); len(dir) <= maxSocketDir {
		return dir
	}
	return filepath.Join("/tmp", fmt.Sprintf("quorate-%016x", hash(dataDir)))
}

// hash is FNV-1a: short, and the same in every process.
func hash(s string) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	return h
}

// Config returns the configuration with its defaults filled in.
func (s *Server) Config() Config { return s.cfg }

// ConnString returns how to reach a database as the superuser through the Unix socket.
func (s *Server) ConnString(database string) string {
	parts := []string{
		"host=" + QuoteKeyword(s.cfg.SocketDir),
		"port=" + strconv.Itoa(s.cfg.Port),
		"user=" + QuoteKeyword(s.cfg.Superuser),
		"database=" + QuoteKeyword(database),
	}
	if s.cfg.Password != "" {
		parts = append(parts, "password="+QuoteKeyword(s.cfg.Password))
	}
	return strings.Join(parts, " ")
}

// QuoteKeyword quotes a value of a connection string.
func QuoteKeyword(s string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'"
}

// Init makes the data directory with initdb unless it is there already, and reports whether it made one. The same
// arguments give the same database on every machine: UTF-8, PostgreSQL's own C.UTF-8 locale, UTC. The directory appears
// under its name when it is complete; a directory that holds something else, or another major version's data, is
// refused and left as it is.
func (s *Server) Init(ctx context.Context) (created bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	text, err := os.ReadFile(filepath.Join(s.cfg.DataDir, "PG_VERSION"))
	if err == nil {
		v, err := ParseVersion(strings.TrimSpace(string(text)))
		if err != nil {
			return false, fmt.Errorf("read PG_VERSION of %s: %w", s.cfg.DataDir, err)
		}
		if v.Major != s.cfg.Install.Version.Major {
			return false, fmt.Errorf("data directory %s was made by PostgreSQL %d, the server in %s is %s: give the programs of PostgreSQL %d",
				s.cfg.DataDir, v.Major, s.cfg.Install.BinDir, s.cfg.Install.Version, v.Major)
		}
		return false, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("read PG_VERSION: %w", err)
	}
	entries, err := os.ReadDir(s.cfg.DataDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("read data directory: %w", err)
	}
	if len(entries) > 0 {
		return false, fmt.Errorf("data directory %s is neither empty nor PostgreSQL's (it holds %q): nothing was changed",
			s.cfg.DataDir, entries[0].Name())
	}
	if err := s.initdb(ctx); err != nil {
		return false, fmt.Errorf("initialise data directory %s: %w", s.cfg.DataDir, err)
	}
	return true, nil
}

func (s *Server) initdb(ctx context.Context) error {
	work := s.cfg.DataDir + ".init"
	if err := os.RemoveAll(work); err != nil { // of an attempt that was interrupted
		return err
	}
	if err := s.cfg.Account.MakeDir(work); err != nil {
		return err
	}
	if err := s.cfg.Account.CanReach(work); err != nil {
		return err
	}
	args := []string{"-D", work, "-U", s.cfg.Superuser, "--encoding=UTF8", "--no-instructions",
		"--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--auth=" + s.cfg.Auth}
	if s.cfg.NoSync {
		args = append(args, "--no-sync")
	}
	if s.cfg.Password != "" {
		name := work + ".password" // not inside: initdb wants an empty directory
		if err := s.writeOwned(name, s.cfg.Password+"\n"); err != nil {
			return err
		}
		defer os.Remove(name)
		args = append(args, "--pwfile="+name)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(s.cfg.Install.BinDir, "initdb"), args...)
	cmd.Dir = work
	cmd.Env = append(serverEnvironment(), "TZ=UTC") // initdb writes it down as the default time zone
	cmd.SysProcAttr = s.cfg.Account.attributes()
	cmd.WaitDelay = 5 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return errors.Join(fmt.Errorf("initdb: %w: %s", err, strings.TrimSpace(string(out))), os.RemoveAll(work))
	}
	return os.Rename(work, s.cfg.DataDir)
}

// systemTimerSlack is what Linux gives a process of its own accord, in nanoseconds; see prctl(2), PR_SET_TIMERSLACK.
const systemTimerSlack = 50_000

// withSystemTimers lets a server that start starts have the timers of one that was started by hand, whatever ours are: a
// child inherits the slack of the thread that starts it, which is the caller's, locked.
func withSystemTimers(start func() error) error {
	ours, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil {
		return fmt.Errorf("read timer slack: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, systemTimerSlack, 0, 0, 0); err != nil {
		return fmt.Errorf("set timer slack: %w", err)
	}
	err = start()
	if back := unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(ours), 0, 0, 0); back != nil {
		err = errors.Join(err, fmt.Errorf("set timer slack: %w", back))
	}
	return err
}

// serverEnvironment is ours without the variables by which libpq and the server's programs would be misled, and with
// messages in English, because some are shown to the operator.
func serverEnvironment() []string {
	var env []string
	for _, v := range os.Environ() {
		name, _, _ := strings.Cut(v, "=")
		if strings.HasPrefix(name, "PG") || strings.HasPrefix(name, "LC_") || name == "LANG" || name == "LANGUAGE" || name == "TZ" {
			continue
		}
		env = append(env, v)
	}
	return append(env, "LC_ALL=C")
}

// Start writes the settings and brings the server up, or takes over the one that runs on this data directory already,
// restarting it if the settings are newer than it is. It returns when the server accepts connections.
func (s *Server) Start(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.start(ctx)
}

func (s *Server) start(ctx context.Context) error {
	if err := s.cfg.Account.MakeDir(s.cfg.SocketDir); err != nil {
		return fmt.Errorf("make socket directory: %w", err)
	}
	if err := s.cfg.Account.CanReach(s.cfg.SocketDir); err != nil {
		return fmt.Errorf("reach socket directory: %w", err)
	}
	fingerprint, err := s.writeSettings()
	if err != nil {
		return err
	}
	pm, running, err := s.adopt()
	if err != nil {
		return err
	}
	if running {
		current, err := s.startedWith(fingerprint)
		if err != nil {
			return err
		}
		if pm.Status == "stopping" || !current {
			s.cfg.Log.Info("restarting the running PostgreSQL", logkey.PID, pm.PID, "stopping", pm.Status == "stopping", "settings_changed", !current)
			if err := s.stop(ctx); err != nil {
				return err
			}
			running = false
		}
	}
	logEnd := int64(0)
	if !running {
		if err := endOrphans(ctx, s.cfg.DataDir, 5*time.Second); err != nil {
			return err
		}
		if err := awaitReaped(ctx, s.cfg.DataDir, 5*time.Second); err != nil {
			return err
		}
		if logEnd, err = s.spawn(fingerprint); err != nil {
			return fmt.Errorf("start PostgreSQL: %w", err)
		}
	}
	if err := s.awaitReady(ctx); err != nil {
		if tail := s.logTail(logEnd); !running && tail != "" {
			err = fmt.Errorf("%w; it said:\n%s", err, tail)
		}
		return fmt.Errorf("start PostgreSQL on %s, port %d: %w", s.cfg.DataDir, s.cfg.Port, err)
	}
	s.cfg.Log.Info("PostgreSQL accepts connections", logkey.PID, s.current.pid, "version", s.cfg.Install.Version.String(),
		"adopted", running, logkey.Path, s.cfg.DataDir)
	return nil
}

// startedWith reports whether the server on the data directory was started with a fingerprint of its settings.
func (s *Server) startedWith(fingerprint string) (bool, error) {
	text, err := os.ReadFile(filepath.Join(s.cfg.DataDir, "postmaster.opts"))
	if err != nil {
		return false, fmt.Errorf("read the options of the running PostgreSQL: %w", err)
	}
	return strings.Contains(string(text), `"`+fingerprint+`"`), nil
}

// adopt begins to watch the server that runs on the data directory, if one does.
func (s *Server) adopt() (Postmaster, bool, error) {
	pm, ok, err := Running(s.cfg.DataDir)
	if err != nil {
		return Postmaster{}, false, err
	}
	if s.current != nil && !s.current.ended() {
		return pm, true, nil // ours; it may not have written its file yet
	}
	if !ok {
		return Postmaster{}, false, nil
	}
	proc, err := openProcess(pm.PID)
	if err != nil {
		return Postmaster{}, false, err
	}
	// Between reading the file and opening the process its number may have got another owner.
	if again, ok, err := Running(s.cfg.DataDir); err != nil || !ok || again.PID != pm.PID {
		proc.close()
		return Postmaster{}, false, err
	}
	p := &postmaster{pid: pm.PID, proc: proc, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		if err := p.proc.await(context.Background()); err != nil {
			s.cfg.Log.Error("cannot watch PostgreSQL", logkey.PID, p.pid, logkey.Error, err)
		}
	}()
	s.current = p
	return pm, true, nil
}

func (p *postmaster) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// spawn starts the server as our child and returns where in the log its messages begin.
func (s *Server) spawn(fingerprint string) (logEnd int64, err error) {
	out, err := os.OpenFile(s.cfg.LogFile, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return 0, err
	}
	defer out.Close() // the server has its own descriptor: a file and no pipe, so that it can outlive us
	if logEnd, err = out.Seek(0, io.SeekEnd); err != nil {
		return 0, err
	}
	cmd := exec.Command(filepath.Join(s.cfg.Install.BinDir, "postgres"), "-D", s.cfg.DataDir, "-c", fingerprint)
	cmd.Dir = s.cfg.DataDir
	cmd.Env = serverEnvironment()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = s.cfg.Account.attributes()
	if s.cfg.EndWithParent {
		cmd.SysProcAttr.Pdeathsig = unix.SIGQUIT
	}
	p := &postmaster{done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// The kernel takes the death of the thread that forked for the parent's: keep it for as long as the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := withSystemTimers(cmd.Start)
		if err == nil {
			p.pid = cmd.Process.Pid
			p.proc, err = openProcess(p.pid)
		}
		started <- err
		if cmd.Process == nil {
			return
		}
		err = cmd.Wait()
		s.cfg.Log.Info("PostgreSQL ended", logkey.PID, p.pid, logkey.Reason, fmt.Sprint(err))
		close(p.done)
	}()
	if err := <-started; err != nil {
		if cmd.Process != nil {
			err = errors.Join(err, cmd.Process.Kill())
		}
		return 0, err
	}
	s.current = p
	return logEnd, nil
}

// awaitReady tries to connect until the server answers anything but "the database system is starting up".
func (s *Server) awaitReady(ctx context.Context) error {
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		err := s.ping(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-s.current.done:
			return errors.New("the server ended")
		case <-ctx.Done():
			return fmt.Errorf("%w: last attempt: %w", ctx.Err(), err)
		case <-time.After(pause):
		}
	}
}

func (s *Server) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	cfg, err := pgconn.ParseConfig(s.ConnString("postgres"))
	if err != nil {
		return err
	}
	conn, err := pgconn.ConnectConfig(ctx, cfg)
	if err == nil {
		return conn.Close(ctx)
	}
	var refused *pgconn.PgError
	if errors.As(err, &refused) && refused.Code != "57P03" {
		return nil // who can refuse a login accepts connections
	}
	return err
}

// logTail returns the last lines of what the server has said since offset.
func (s *Server) logTail(offset int64) string {
	const limit = 2000
	f, err := os.Open(s.cfg.LogFile)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err.Error()
	}
	text := make([]byte, min(end-offset, limit))
	n, err := f.ReadAt(text, end-int64(len(text)))
	if err != nil && err != io.EOF {
		return err.Error()
	}
	return strings.TrimSpace(string(text[:n]))
}

// Stop shuts the server down ("fast": sessions are ended, everything is written) and returns when it has ended. It
// waits for logical walsenders to have been drained, so end capture first. When ctx ends before, the server is made to
// quit without writing a checkpoint; nothing committed is lost, the next start recovers. Stopping a stopped server
// does nothing.
func (s *Server) Stop(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stop(ctx)
}

func (s *Server) stop(ctx context.Context) error {
	_, running, err := s.adopt()
	if err != nil {
		return fmt.Errorf("stop PostgreSQL: %w", err)
	}
	if !running {
		return nil
	}
	p := s.current
	if err := p.proc.signal(unix.SIGINT); err != nil {
		return fmt.Errorf("stop PostgreSQL: %w", err)
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
	}
	s.cfg.Log.Warn("PostgreSQL does not stop in time: it is made to quit", logkey.PID, p.pid)
	if err := p.proc.signal(unix.SIGQUIT); err != nil {
		return fmt.Errorf("quit PostgreSQL: %w", err)
	}
	select {
	case <-p.done: // itself kills what does not react within five seconds
		return nil
	case <-time.After(15 * time.Second):
		return fmt.Errorf("quit PostgreSQL: process %d is still there: %w", p.pid, ctx.Err())
	}
}

// Restart stops the server, if it runs, and starts it.
func (s *Server) Restart(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.stop(ctx); err != nil {
		return err
	}
	return s.start(ctx)
}

// Done returns a channel that is closed when the server that the last Start brought up or adopted has ended, for
// whatever reason. It is closed already if there is none.
func (s *Server) Done() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current == nil {
		never := make(chan struct{})
		close(never)
		return never
	}
	return s.current.done
}

// PID returns the process id of the server's postmaster, 0 if it is not known to run.
func (s *Server) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current == nil || s.current.ended() {
		return 0
	}
	return s.current.pid
}
