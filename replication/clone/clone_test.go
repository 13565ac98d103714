package clone

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/internal/pgserver/pgtest"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// source is a node without a cluster: transactions are held by nobody, and none commits unless a test makes one.
type source struct {
	server *pgserver.Server
	reason atomic.Pointer[string]
}

func (s *source) Connect(ctx context.Context, replication bool) (*pgconn.PgConn, error) {
	c, err := pgconn.ParseConfig(s.server.ConnString("postgres"))
	if err != nil {
		return nil, err
	}
	c.RuntimeParams["default_transaction_read_only"] = "off"
	if replication {
		c.RuntimeParams["replication"] = "database"
	}
	return pgconn.ConnectConfig(ctx, c)
}

func (s *source) Hold(ctx context.Context, at func(context.Context) error) (txn.CSN, error) {
	return 7, at(ctx)
}

func (s *source) Standing() (string, bool) {
	if r := s.reason.Load(); r != nil {
		return *r, false
	}
	return "", false
}

// tamper stands between donor and receiver. change sees every chunk, and returns what is sent in its place.
type tamper struct {
	pb.UnimplementedRecoveryServer
	to     pb.RecoveryClient
	change func(number int, c *pb.CloneChunk) ([]*pb.CloneChunk, error)
}

func (p *tamper) Clone(req *pb.CloneRequest, stream grpc.ServerStreamingServer[pb.CloneChunk]) error {
	from, err := p.to.Clone(stream.Context(), req)
	if err != nil {
		return err
	}
	for n := 0; ; n++ {
		c, err := from.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		chunks, err := p.change(n, c)
		if err != nil {
			return err
		}
		for _, c := range chunks {
			if err := stream.Send(c); err != nil {
				return err
			}
		}
	}
}

func serve(t testing.TB, register func(*grpc.Server)) *grpc.ClientConn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(ServerOptions()...)
	register(s)
	var served sync.WaitGroup
	served.Go(func() {
		if err := s.Serve(l); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), append(DialOptions(), grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(); s.Stop(); served.Wait() })
	return conn
}

// maxWAL is more than other tests than TestSlowReceiver write during a clone.
const maxWAL = 2 << 30

type rig struct {
	t      testing.TB
	server *pgserver.Server
	source *source
	donor  *Donor
	conn   *grpc.ClientConn
	dir    string
	number int
}

func newRig(t *testing.T, major int) *rig {
	t.Helper()
	return newRigIn(t, pgtest.Options{Major: major, Tmpfs: true}, pgtest.Dir(t, true))
}

func newRigIn(t testing.TB, o pgtest.Options, dir string) *rig {
	t.Helper()
	r := &rig{t: t, server: pgtest.Start(t, o), dir: dir}
	r.source = &source{server: r.server}
	r.donor = NewDonor(Config{Cluster: "c", ClusterID: txn.UUID{1}, Node: 1, Source: r.source, MaxWAL: maxWAL, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
	r.conn = serve(t, r.donor.Register)
	r.run("CREATE TABLE t (id int PRIMARY KEY, filler text)", "INSERT INTO t SELECT i, repeat(md5(i::text), 20) FROM generate_series(1, 10000) i")
	return r
}

func (r *rig) run(statements ...string) {
	r.t.Helper()
	conn, err := r.source.Connect(r.t.Context(), false)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, s := range statements {
		if err := execute(r.t.Context(), conn, s); err != nil {
			r.t.Fatalf("%s: %v", s, err)
		}
	}
	if err := conn.Close(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}

// target is a new one for each call.
func (r *rig) target() Target {
	r.t.Helper()
	c := r.server.Config()
	block, err := c.Install.Preset(r.t.Context(), "block_size")
	if err != nil {
		r.t.Fatal(err)
	}
	wal, err := c.Install.Preset(r.t.Context(), "wal_block_size")
	if err != nil {
		r.t.Fatal(err)
	}
	r.number++
	t := Target{
		Dir: filepath.Join(r.dir, fmt.Sprint("clone", r.number)), UID: -1, GID: -1, Cluster: "c", ClusterID: txn.UUID{1}, Node: txn.NodeID(r.number + 1),
		Server: Facts{Version: c.Install.Version.Num(), Architecture: runtime.GOARCH, BlockSize: block, WALBlockSize: wal},
	}
	if c.Account.UID != os.Geteuid() {
		t.UID, t.GID = c.Account.UID, c.Account.GID
	}
	return t
}

// open starts a received copy and returns the rows of a query.
func (r *rig) open(t Target, got Result, sql string) [][]string {
	r.t.Helper()
	c := r.server.Config()
	if err := Configure(t.Dir, "", got.Donor, "trust", c.Account.Own); err != nil {
		r.t.Fatal(err)
	}
	settings := pgserver.NodeSettings(c.Install.Version, pgserver.Sizing{Clients: 20, Workers: 4})
	for name, value := range RecoverySettings(got.RestorePoint) {
		settings[name] = value
	}
	s, err := pgserver.New(pgserver.Config{
		Install: c.Install, DataDir: t.Dir, Port: pgtest.FreePort(r.t), SocketDir: filepath.Join(r.dir, "run"), Auth: "trust",
		Settings: settings, EndWithParent: true, LogFile: t.Dir + ".log",
	})
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() {
		if err := s.Stop(context.WithoutCancel(r.t.Context())); err != nil {
			r.t.Error(err)
		}
	}()
	if err := s.Start(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	conn := pgtest.Connect(r.t, s, "postgres")
	defer conn.Close(r.t.Context())
	rows, err := query(r.t.Context(), conn.PgConn(), sql)
	if err != nil {
		r.t.Fatal(err)
	}
	return rows
}

// idle waits until the donor has let go of everything that a clone took: nothing is left that costs it anything.
func (r *rig) idle() {
	r.t.Helper()
	conn := pgtest.Connect(r.t, r.server, "postgres")
	defer conn.Close(r.t.Context())
	deadline := time.Now().Add(20 * time.Second)
	for {
		rows, err := query(r.t.Context(), conn.PgConn(), `SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_stat_replication)
			+ (SELECT count(*) FROM pg_stat_progress_basebackup)`)
		if err != nil {
			r.t.Fatal(err)
		}
		if rows[0][0] == "0" && r.donor.under.Load() == 0 {
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("the donor still has %s slots and senders, %d clones", rows[0][0], r.donor.under.Load())
		}
		time.Sleep(10 * time.Millisecond) // no event tells that a walsender has ended
	}
}

const contents = "SELECT count(*), md5(string_agg(t::text, ',' ORDER BY id)) FROM t"

func (r *rig) contents() [][]string {
	r.t.Helper()
	conn := pgtest.Connect(r.t, r.server, "postgres")
	defer conn.Close(r.t.Context())
	rows, err := query(r.t.Context(), conn.PgConn(), contents)
	if err != nil {
		r.t.Fatal(err)
	}
	return rows
}

// TestClone: what arrives is what there was, from an idle donor (the place where it ends must come by itself), and from one
// that is changing tables and writing temporary files; nothing of what is the donor's own comes along; progress is told.
func TestClone(t *testing.T) {
	for _, major := range []int{17, 18} {
		t.Run(fmt.Sprint(major), func(t *testing.T) {
			r := newRig(t, major)
			r.run("ALTER SYSTEM SET work_mem = '5MB'", "SELECT pg_create_physical_replication_slot('theirs', true)")
			want := r.contents()
			target := r.target()
			var seen []Progress
			target.Progress = func(p Progress) { seen = append(seen, p) }
			got, err := Receive(t.Context(), r.conn, target)
			if err != nil {
				t.Fatal(err)
			}
			if got.Donor != 1 || got.CSN != 7 {
				t.Errorf("got %+v", got)
			}
			var phases []Phase
			for _, p := range seen {
				if len(phases) == 0 || phases[len(phases)-1] != p.Phase {
					phases = append(phases, p.Phase)
				}
			}
			last := seen[len(seen)-1]
			if !slices.Equal(phases, []Phase{PhaseCopy, PhaseLog, PhaseFlush}) || last.Total == 0 || last.Bytes < last.Total*8/10 || last.WAL == 0 || last.Rate(time.Now()) == 0 {
				t.Errorf("progress %v, at last %+v", phases, last)
			}
			r.run("INSERT INTO t SELECT i, 'later' FROM generate_series(20001, 20010) i")
			for sql, want := range map[string][][]string{
				contents: want,
				"SELECT count(*), current_setting('work_mem') FROM pg_replication_slots": {{"0", "4MB"}},
			} {
				again := target
				again.Dir += "-"
				if err := os.CopyFS(again.Dir, os.DirFS(target.Dir)); err != nil {
					t.Fatal(err)
				}
				chown(t, r, again.Dir)
				if rows := r.open(again, got, sql); !reflect.DeepEqual(rows, want) {
					t.Errorf("%s: %v, want %v", sql, rows, want)
				}
				if err := os.RemoveAll(again.Dir); err != nil {
					t.Fatal(err)
				}
			}
			r.run("SELECT pg_drop_replication_slot('theirs')")
			r.idle()

			working, stop := context.WithCancel(t.Context())
			var busy sync.WaitGroup
			for i, script := range []string{
				"CREATE TABLE x AS SELECT * FROM t; ALTER TABLE x ADD COLUMN more int DEFAULT 1; CREATE INDEX ON x (filler); TRUNCATE x; DROP TABLE x",
				"SET work_mem = '64kB'; SELECT count(*) FROM (SELECT * FROM t a, generate_series(1, 3) ORDER BY filler) s",
				"UPDATE t SET filler = filler || 'x' WHERE id % 100 = 3; VACUUM FULL t",
			} {
				busy.Go(func() {
					conn, err := r.source.Connect(t.Context(), false)
					if err != nil {
						t.Error(err)
						return
					}
					defer closeConn(t.Context(), conn)
					for working.Err() == nil {
						for _, s := range strings.Split(script, "; ") {
							if err := execute(t.Context(), conn, s); err != nil {
								t.Errorf("script %d: %s: %v", i, s, err)
								return
							}
						}
					}
				})
			}
			defer busy.Wait()
			defer stop()
			target = r.target()
			if got, err = Receive(t.Context(), r.conn, target); err != nil {
				t.Fatal(err)
			}
			if rows := r.open(target, got, "SELECT count(*) FROM t WHERE filler IS NOT NULL"); rows[0][0] != "10010" {
				t.Errorf("%s rows, want 10010", rows[0][0])
			}
		})
	}
}

func chown(t *testing.T, r *rig, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
		mode := os.FileMode(0o600)
		if err == nil && d.IsDir() {
			mode = 0o700
		}
		return errors.Join(err, os.Chmod(name, mode), r.server.Config().Account.Own(name))
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestUnfit: what can never work is refused before anything is copied, with what both sides have.
func TestUnfit(t *testing.T) {
	r := newRig(t, 18)
	try := func(what string, change func(*Target), want error, text ...string) {
		t.Helper()
		target := r.target()
		change(&target)
		_, err := Receive(t.Context(), r.conn, target)
		mustFail(t, what, err, want, text...)
		if _, err := os.Lstat(target.Dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the directory was made: %v", what, err)
		}
	}
	try("another major version", func(t *Target) { t.Server.Version = 170010 }, ErrUnfit, "17 (17.10)", "18 (18.")
	try("another architecture", func(t *Target) { t.Server.Architecture = "s390x" }, ErrUnfit, "s390x", runtime.GOARCH)
	try("another block size", func(t *Target) { t.Server.BlockSize = 4096 }, ErrUnfit, "4096", "8192")
	try("another cluster", func(t *Target) { t.ClusterID = txn.UUID{2} }, ErrUnfit, "02000000", "01000000")
	reason := "catching-up: it has just come"
	r.source.reason.Store(&reason)
	try("a donor that is not active", func(*Target) {}, nil, reason)
	r.source.reason.Store(nil)
	try("no minor version", func(t *Target) { t.Server.Version = 180000; t.ClusterID = txn.UUID{} }, ErrUnfit)

	place := filepath.Join(r.dir, "elsewhere")
	if err := r.server.Config().Account.MakeDir(place); err != nil {
		t.Fatal(err)
	}
	r.run("CREATE TABLESPACE elsewhere LOCATION '" + place + "'")
	try("a tablespace", func(*Target) {}, ErrUnfit, "elsewhere", place)
	r.idle()
}

// TestDamage: whatever a donor, or what is between, makes of the stream, the receiver says what is wrong and writes nothing
// outside of its directory; and the next attempt works.
func TestDamage(t *testing.T) {
	r := newRig(t, 18)
	for _, template := range []string{"template0", "template1"} { // nobody needs them, and there is less to copy, two dozen times
		r.run("ALTER DATABASE "+template+" IS_TEMPLATE false", "DROP DATABASE "+template)
	}
	archive := func(entries ...*tar.Header) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range entries {
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(make([]byte, h.Size)); err != nil {
				t.Fatal(err)
			}
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		return b.Bytes()
	}
	first := func(data []byte) func(int, *pb.CloneChunk) ([]*pb.CloneChunk, error) {
		done := false
		return func(_ int, c *pb.CloneChunk) ([]*pb.CloneChunk, error) {
			if c.GetArchive() != nil && !done {
				done = true
				return []*pb.CloneChunk{{Kind: &pb.CloneChunk_Archive{Archive: data}}, c}, nil
			}
			return []*pb.CloneChunk{c}, nil
		}
	}
	same := func(c *pb.CloneChunk) ([]*pb.CloneChunk, error) { return []*pb.CloneChunk{c}, nil }
	archives, wals := 0, 0
	for name, c := range map[string]struct {
		want   string // a regular expression
		change func(int, *pb.CloneChunk) ([]*pb.CloneChunk, error)
	}{
		"one bit of the data": {`has checksum`, func(_ int, c *pb.CloneChunk) ([]*pb.CloneChunk, error) {
			if a := c.GetArchive(); a != nil {
				if archives++; archives == 20 {
					// In the middle of a table's page: neither a header of the archive nor what PostgreSQL would look at.
					a[len(a)/2] ^= 4
				}
			}
			return same(c)
		}},
		"a part of the archive missing": {`has checksum|unexpected EOF|invalid tar header|bytes instead of`, func(n int, c *pb.CloneChunk) ([]*pb.CloneChunk, error) {
			if n == 30 && c.GetArchive() != nil {
				return nil, nil
			}
			return same(c)
		}},
		"a part of the WAL missing": {`WAL goes on at`, func(_ int, c *pb.CloneChunk) ([]*pb.CloneChunk, error) {
			if c.GetWal() != nil {
				if wals++; wals == 2 {
					return nil, nil
				}
			}
			return same(c)
		}},
		"all WAL missing": {`WAL up to`, func(_ int, c *pb.CloneChunk) ([]*pb.CloneChunk, error) {
			if c.GetWal() != nil {
				return nil, nil
			}
			return same(c)
		}},
		"no manifest": {`without a manifest`, func(_ int, c *pb.CloneChunk) ([]*pb.CloneChunk, error) {
			if c.GetManifest() != nil {
				return nil, nil
			}
			return same(c)
		}},
		"a manifest that was changed": {`manifest's checksum`, func(_ int, c *pb.CloneChunk) ([]*pb.CloneChunk, error) {
			if m := c.GetManifest(); m != nil {
				m.Data = bytes.Replace(m.Data, []byte("PG_VERSION"), []byte("PG_VERSIOM"), 1)
			}
			return same(c)
		}},
		"another system's manifest": {`the manifest is of system`, func(_ int, c *pb.CloneChunk) ([]*pb.CloneChunk, error) {
			if b := c.GetBegin(); b != nil {
				b.SystemIdentifier++
			}
			return same(c)
		}},
		"no end": {`ended before the copy was complete`, func(_ int, c *pb.CloneChunk) ([]*pb.CloneChunk, error) {
			if c.GetEnd() != nil {
				return nil, nil
			}
			return same(c)
		}},
		"a restore point that is more than a name": {`is called`, func(_ int, c *pb.CloneChunk) ([]*pb.CloneChunk, error) {
			if e := c.GetEnd(); e != nil {
				e.RestorePoint += "'\nrestore_command = 'touch x"
			}
			return same(c)
		}},
		"no beginning": {`does not begin`, func(n int, c *pb.CloneChunk) ([]*pb.CloneChunk, error) {
			if n == 0 {
				return nil, nil
			}
			return same(c)
		}},
		"segments of no size": {`segments of 0 bytes`, func(_ int, c *pb.CloneChunk) ([]*pb.CloneChunk, error) {
			if b := c.GetBegin(); b != nil {
				b.Server.WalSegmentSize = 0
			}
			return same(c)
		}},
		"a timeline's file elsewhere": {`timeline file`, func(n int, c *pb.CloneChunk) ([]*pb.CloneChunk, error) {
			if n == 1 {
				return []*pb.CloneChunk{{Kind: &pb.CloneChunk_Timeline{Timeline: &pb.CloneTimeline{Name: "../../evil"}}}}, nil
			}
			return same(c)
		}},
		"a way out":            {`has "../evil"`, first(archive(&tar.Header{Name: "../evil", Typeflag: tar.TypeReg, Size: 4, Mode: 0o644}))},
		"a way out by root":    {`has "//`, first(archive(&tar.Header{Name: "/" + r.dir + "/evil", Typeflag: tar.TypeReg, Size: 4, Mode: 0o644}))},
		"a link":               {`of type`, first(archive(&tar.Header{Name: "way", Typeflag: tar.TypeSymlink, Linkname: ".."}))},
		"a hard link":          {`of type`, first(archive(&tar.Header{Name: "way", Typeflag: tar.TypeLink, Linkname: "../evil"}))},
		"a device":             {`of type`, first(archive(&tar.Header{Name: "way", Typeflag: tar.TypeChar}))},
		"a file more":          {`"more" is not in the manifest`, first(archive(&tar.Header{Name: "more", Typeflag: tar.TypeReg, Size: 4, Mode: 0o644}))},
		"a file twice":         {`"more" came twice`, first(archive(&tar.Header{Name: "more", Typeflag: tar.TypeReg}, &tar.Header{Name: "more", Typeflag: tar.TypeReg}))},
		"no archive":           {`invalid tar header`, first([]byte("this is no archive, as everybody can see who reads it. " + strings.Repeat("x", 1024)))},
		"the donor's own file": {`came twice|has checksum|bytes instead of`, first(archive(&tar.Header{Name: "postgresql.auto.conf", Typeflag: tar.TypeReg, Size: 4, Mode: 0o644}))},
	} {
		t.Run(name, func(t *testing.T) {
			conn := serve(t, func(s *grpc.Server) {
				pb.RegisterRecoveryServer(s, &tamper{to: pb.NewRecoveryClient(r.conn), change: c.change})
			})
			target := r.target()
			if _, err := Receive(t.Context(), conn, target); err == nil || !regexp.MustCompile(c.want).MatchString(err.Error()) {
				t.Errorf("it ended with %v, want %q", err, c.want)
			}
			if err := os.RemoveAll(target.Dir); err != nil {
				t.Fatal(err)
			}
			entries, err := os.ReadDir(r.dir)
			if err != nil || len(entries) > 0 {
				t.Errorf("beside the clone there is %v, %v", entries, err)
			}
		})
	}
	want := r.contents()
	target := r.target()
	got, err := Receive(t.Context(), r.conn, target)
	if err != nil {
		t.Fatal(err)
	}
	if rows := r.open(target, got, contents); !reflect.DeepEqual(rows, want) {
		t.Errorf("after all that: %v, want %v", rows, want)
	}
	r.idle()
}

// TestInterrupted: a receiver or a donor that goes away in the middle, at any point, costs the other one nothing that lasts.
func TestInterrupted(t *testing.T) {
	r := newRig(t, 18)
	for _, after := range []uint64{0, 1, 15 << 20, 38 << 20} {
		target := r.target()
		ctx, cancel := context.WithCancelCause(t.Context())
		target.Progress = func(p Progress) {
			if p.Bytes+p.WAL >= after {
				cancel(errGone)
			}
		}
		if after == 0 {
			cancel(errGone)
		}
		_, err := Receive(ctx, r.conn, target)
		if cancel(nil); err != nil {
			mustFail(t, fmt.Sprint("gone after ", after), err, errGone)
		}
		r.idle()
	}
	for _, n := range []int{1, 60} {
		conn := serve(t, func(s *grpc.Server) {
			pb.RegisterRecoveryServer(s, &tamper{to: pb.NewRecoveryClient(r.conn), change: func(number int, c *pb.CloneChunk) ([]*pb.CloneChunk, error) {
				if number == n {
					return nil, errGone
				}
				return []*pb.CloneChunk{c}, nil
			}})
		})
		_, err := Receive(t.Context(), conn, r.target())
		mustFail(t, fmt.Sprint("donor gone at message ", n), err, nil, errGone.Error())
		r.idle()
	}
	// The donor's PostgreSQL dies in the middle.
	target := r.target()
	var once sync.Once
	target.Progress = func(p Progress) {
		if p.Bytes > 1<<20 {
			once.Do(func() {
				if err := syscall.Kill(r.server.PID(), syscall.SIGKILL); err != nil {
					t.Error(err)
				}
			})
		}
	}
	_, err := Receive(t.Context(), r.conn, target)
	mustFail(t, "donor without PostgreSQL", err, nil)
	<-r.server.Done()
	if err := r.server.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.idle()
	want := r.contents()
	target = r.target()
	got, err := Receive(t.Context(), r.conn, target)
	if err != nil {
		t.Fatal(err)
	}
	if rows := r.open(target, got, contents); !reflect.DeepEqual(rows, want) {
		t.Errorf("after all that: %v, want %v", rows, want)
	}
}

var errGone = errors.New("gone for a test")

// TestTogether: two nodes are given copies at once, a third one is turned away meanwhile, and is served afterwards.
func TestTogether(t *testing.T) {
	r := newRig(t, 18)
	started, others := make(chan struct{}), make(chan struct{})
	var clones sync.WaitGroup
	var waiting atomic.Int32
	want := r.contents()
	targets := []Target{r.target(), r.target()}
	results := make([]Result, 2)
	for i := range targets {
		var once sync.Once
		targets[i].Progress = func(p Progress) {
			once.Do(func() {
				if waiting.Add(1) == 2 {
					close(started)
				}
				<-others
			})
		}
		clones.Go(func() {
			var err error
			if results[i], err = Receive(t.Context(), r.conn, targets[i]); err != nil {
				t.Error(err)
			}
		})
	}
	<-started
	_, err := Receive(t.Context(), r.conn, r.target())
	mustFail(t, "a third", err, ErrBusy)
	fit, refused := Order(t.Context(), txn.UUID{1}, []Candidate{{1, r.conn}, {2, r.conn}})
	if len(fit) != 1 || fit[0].Node != 1 || len(refused) != 1 || refused[2] == nil {
		t.Errorf("order %v, refused %v", fit, refused)
	}
	if fit, refused := Order(t.Context(), txn.UUID{2}, []Candidate{{1, r.conn}}); len(fit) != 0 || len(refused) != 1 {
		t.Errorf("a node that has gone on as another cluster: order %v, refused %v", fit, refused)
	}
	close(others)
	clones.Wait()
	for i := range targets {
		if rows := r.open(targets[i], results[i], contents); !reflect.DeepEqual(rows, want) {
			t.Errorf("clone %d: %v, want %v", i, rows, want)
		}
	}
	if _, err := Receive(t.Context(), r.conn, r.target()); err != nil {
		t.Error(err)
	}
	r.idle()
}

// TestSlowReceiver: a receiver that takes the copy more slowly than WAL is written is told so before the donor's disk is full, and
// nothing stays of it.
func TestSlowReceiver(t *testing.T) {
	r := newRig(t, 18)
	r.donor.cfg.MaxWAL = 64 << 20
	target := r.target()
	begun, read, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	var once sync.Once
	target.Progress = func(p Progress) {
		if p.Bytes > 0 {
			once.Do(func() { close(begun) })
			<-read
		}
	}
	var err error
	go func() {
		defer close(ended)
		_, err = Receive(t.Context(), r.conn, target)
	}()
	<-begun
	for range 5 {
		r.run("SELECT pg_logical_emit_message(false, 'filler', repeat('x', 16 << 20), true)")
	}
	for deadline := time.Now().Add(time.Minute); r.donor.under.Load() > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the donor goes on keeping WAL")
		}
	}
	close(read)
	<-ended
	mustFail(t, "a slow receiver", err, ErrTooSlow, "limits.clone_wal")
	r.idle()
}

// TestFullDisk: a disk that is too small is found out before, with both sizes; one that is filled meanwhile fails the clone.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can mount a small file system")
	}
	r := newRig(t, 18)
	mount := func(size string) Target {
		target := r.target()
		dir := filepath.Join(r.dir, "disk"+size)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("quorate-test", dir, "tmpfs", 0, "size="+size); err != nil {
			t.Skip("no file system can be mounted here: ", err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		})
		target.Dir = filepath.Join(dir, "clone")
		return target
	}
	target := mount("64m")
	mustFail(t, "a data directory that is mounted", Replaceable(filepath.Dir(target.Dir)), ErrUnfit, "mounted")
	if err := Replaceable(target.Dir); err != nil {
		t.Error(err)
	}
	_, err := Receive(t.Context(), r.conn, target)
	mustFail(t, "a small disk", err, ErrNoSpace, "64 MiB free", "node 1 has", "make room")
	r.idle()

	target = mount("400m")
	var once sync.Once
	target.Progress = func(p Progress) {
		if p.Bytes > 4<<20 {
			once.Do(func() {
				f, err := os.Create(filepath.Join(filepath.Dir(target.Dir), "filler"))
				for zeros := make([]byte, 1<<20); err == nil; {
					_, err = f.Write(zeros)
				}
				if err := errors.Join(f.Close(), err); !errors.Is(err, syscall.ENOSPC) {
					t.Error(err)
				}
			})
		}
	}
	_, err = Receive(t.Context(), r.conn, target)
	mustFail(t, "a disk that fills", err, syscall.ENOSPC)
	r.idle()
}

func mustFail(t *testing.T, what string, err error, want error, text ...string) {
	t.Helper()
	if err == nil || want != nil && !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
		return
	}
	for _, s := range text {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%s: %v, want %q in it", what, err, s)
		}
	}
}
