package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/internal/pgserver/pgtest"
	"github.com/quorate/quorate/txn"
)

// testCoordinator commits in the order of Begin, unless a test gives the next commit a script.
type testCoordinator struct {
	mu        sync.Mutex
	csn       txn.CSN
	sequence  uint64
	open      int // begun and not closed
	committed int
	lost      int
	begun     chan *testCommit // scripted commits, as they begin
	script    []txn.Event      // of the next commit
	hold      bool             // the next commit gets its events from the test
	refuse    error            // of Begin
}

func (c *testCoordinator) Applied() txn.CSN {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.csn
}

func (c *testCoordinator) Reserve() txn.GID {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sequence++
	return txn.GID{Node: 1, Incarnation: 0xabc, Sequence: c.sequence}
}

// TransactionStatus knows the statuses by the node.
func (c *testCoordinator) TransactionStatus(_ context.Context, gid txn.GID) string {
	return [...]string{StatusUnknown, StatusCommitted, StatusAborted, StatusInDoubt}[gid.Node%4]
}

func (c *testCoordinator) Begin(_ context.Context, gid txn.GID, base txn.CSN, pid uint32) (Commit, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refuse != nil {
		return nil, c.refuse
	}
	if gid.IsZero() {
		c.sequence++
		gid = txn.GID{Node: 1, Incarnation: 0xabc, Sequence: c.sequence}
	}
	c.open++
	t := &testCommit{c: c, gid: gid, base: base, seen: c.csn, pid: pid,
		events: make(chan txn.Event, 8), waiting: make(chan struct{}), lostCh: make(chan struct{})}
	for _, e := range c.script {
		t.events <- e
	}
	t.scripted = c.script != nil || c.hold
	c.script, c.hold = nil, false
	if t.scripted {
		c.begun <- t
	}
	return t, nil
}

func (c *testCoordinator) next(events ...txn.Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.script = append([]txn.Event{}, events...)
}

func (c *testCoordinator) holdNext() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hold = true
}

func (c *testCoordinator) counts() (committed, lost int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.committed, c.lost
}

type testCommit struct {
	c          *testCoordinator
	gid        txn.GID
	base, seen txn.CSN
	pid        uint32
	events     chan txn.Event
	scripted   bool
	waitOnce   sync.Once
	waiting    chan struct{} // closed when Next is first called: the marker has been written
	lostOnce   sync.Once
	lostCh     chan struct{}
	through    func(txn.GID)
	closed     bool
}

func (t *testCommit) GID() txn.GID   { return t.gid }
func (t *testCommit) Seal() txn.Seal { return txn.Seal{GID: t.gid, Nonce: 1} }
func (t *testCommit) Seen() txn.CSN  { return t.seen }
func (t *testCommit) String() string { return t.gid.String() }

func (t *testCommit) Next(ctx context.Context) (txn.Event, error) {
	t.waitOnce.Do(func() { close(t.waiting) })
	if !t.scripted {
		select {
		case <-t.lostCh:
			return txn.Event{Step: txn.StepAbort, Reason: txn.AbortEvicted}, nil
		default:
			if t.gid.Sequence%2 == 0 { // or the session lets COMMIT through by itself
				t.through(t.gid)
			}
			return txn.Event{Step: txn.StepRelease}, nil
		}
	}
	select {
	case e := <-t.events:
		return e, nil
	case <-ctx.Done():
		return txn.Event{}, context.Cause(ctx)
	}
}

func (t *testCommit) OnRelease(through func(txn.GID)) { t.through = through }

func (t *testCommit) Committed() {
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	t.c.committed++
	t.c.csn++
}

func (t *testCommit) Lost() {
	t.lostOnce.Do(func() {
		close(t.lostCh)
		t.c.mu.Lock()
		defer t.c.mu.Unlock()
		t.c.lost++
	})
}

func (t *testCommit) Close() {
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	if t.closed {
		panic("closed twice")
	}
	t.closed = true
	t.c.open--
}

// fixture is a server with a gateway in front of it.
type fixture struct {
	t      testing.TB
	server *pgserver.Server
	g      *Gateway
	coord  *testCoordinator
	access *atomic.Uint32 // an Access
	admin  *pgx.Conn
}

func newFixture(t testing.TB, major int) *fixture {
	t.Helper()
	before := runtime.NumGoroutine()
	server := pgtest.Start(t, pgtest.Options{Major: major, Tmpfs: true})
	f := &fixture{t: t, server: server, access: new(atomic.Uint32), coord: &testCoordinator{begun: make(chan *testCommit, 8)}}
	f.admin = pgtest.Connect(t, server, "postgres")
	f.direct(`CREATE SCHEMA quorate; GRANT USAGE ON SCHEMA quorate TO PUBLIC;
		CREATE TABLE quorate.nudge (id bigint); GRANT INSERT ON quorate.nudge TO PUBLIC;
		CREATE TABLE t (id int PRIMARY KEY, v text);
		CREATE TABLE d (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)`)
	f.direct(`SELECT pg_create_logical_replication_slot('audit', 'test_decoding')`)
	f.g = New(f.config())
	if err := f.g.Open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.audit()
		if err := f.g.Close(); err != nil {
			t.Error(err)
		}
		f.coord.mu.Lock()
		if f.coord.open != 0 {
			t.Errorf("%d commits were not closed", f.coord.open)
		}
		f.coord.mu.Unlock()
		// The server's own goroutines go away later, in another cleanup.
		for range 100 {
			if strings.Count(stacks(), "gateway.(*") == 0 {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Errorf("goroutines are left (%d before, %d now):\n%s", before, runtime.NumGoroutine(), stacks())
	})
	return f
}

func stacks() string {
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	var out []string
	for _, g := range strings.Split(string(buf), "\n\n") {
		if strings.Contains(g, "gateway.(*session)") || strings.Contains(g, "gateway.(*Gateway)") {
			if !strings.Contains(g, "newFixture") {
				out = append(out, g)
			}
		}
	}
	return strings.Join(out, "\n\n")
}

func (f *fixture) config() Config {
	cfg := f.server.Config()
	return Config{
		Listen: "127.0.0.1:0", ServerNetwork: "tcp", ServerAddress: fmt.Sprintf("127.0.0.1:%d", cfg.Port),
		Database: "postgres", Coordinator: f.coord, MaxConnections: 30, TrustLoopback: true, EvictTimeout: 2 * time.Second,
		Access:     func() Access { return Access(f.access.Load()) },
		View:       viewOf,
		Settings:   map[string]string{"quorate.node": "7", "quorate.cluster": "a b"},
		Registerer: prometheus.NewRegistry(), Logger: slog.New(slog.NewTextHandler(f.t.Output(), nil)),
		Terminate: func(ctx context.Context, pid uint32) error {
			conn, err := pgx.Connect(ctx, f.server.ConnString("postgres"))
			if err != nil {
				return err
			}
			_, err = conn.Exec(ctx, "SELECT pg_terminate_backend($1)", int32(pid))
			return errors.Join(err, conn.Close(ctx))
		},
	}
}

// direct runs SQL on the server itself.
func (f *fixture) direct(sql string) {
	f.t.Helper()
	if _, err := f.admin.PgConn().Exec(context.Background(), sql).ReadAll(); err != nil {
		f.t.Fatalf("%s: %v", sql, err)
	}
}

// ask returns one value from the server itself.
func (f *fixture) ask(sql string, args ...any) string {
	f.t.Helper()
	var s string
	if err := f.admin.QueryRow(context.Background(), sql, args...).Scan(&s); err != nil {
		f.t.Fatalf("%s: %v", sql, err)
	}
	return s
}

// wipe begins a test with empty tables, behind the gateway's back but in the audit's eyes.
func (f *fixture) wipe() {
	f.t.Helper()
	f.direct("BEGIN; TRUNCATE t, d; SELECT pg_logical_emit_message(true, 'quorate.seal', 'wipe'); COMMIT")
}

// audit checks, from the write-ahead log, that every transaction that changed a table was sealed, the seal last: that
// nothing got past the gateway.
func (f *fixture) audit() {
	f.t.Helper()
	rows, err := f.admin.Query(context.Background(),
		"SELECT xid::text, data FROM pg_logical_slot_get_changes('audit', NULL, NULL, 'skip-empty-xacts', '1')")
	if err != nil {
		f.t.Fatal(err)
	}
	defer rows.Close()
	last := map[string]string{}
	for rows.Next() {
		var xid, data string
		if err := rows.Scan(&xid, &data); err != nil {
			f.t.Fatal(err)
		}
		switch {
		case strings.HasPrefix(data, "BEGIN"):
		case strings.HasPrefix(data, "message: transactional: 0"):
		case strings.HasPrefix(data, "COMMIT"):
			if !strings.Contains(last[xid], "quorate.seal") {
				f.t.Errorf("transaction %s was committed without a seal at its end: %s", xid, last[xid])
			}
		default:
			last[xid] = data
		}
	}
	if rows.Err() != nil {
		f.t.Fatal(rows.Err())
	}
}

func (f *fixture) url(user string) string {
	return fmt.Sprintf("postgres://%s@%s/postgres?sslmode=disable&connect_timeout=20", user, f.g.Addr())
}

// connect opens a client connection through the gateway.
func (f *fixture) connect(t testing.TB, options ...func(*pgconn.Config)) *pgconn.PgConn {
	t.Helper()
	cfg, err := pgconn.ParseConfig(f.url("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range options {
		o(cfg)
	}
	c, err := pgconn.ConnectConfig(timeout(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	return c
}

func timeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// run runs a simple Query and renders its results: rows as (a,b), then the tag; errors as !SQLSTATE; and the status
// at the end.
func run(t testing.TB, c *pgconn.PgConn, sql string) string {
	t.Helper()
	var out []string
	mrr := c.Exec(timeout(t), sql)
	for mrr.NextResult() {
		r := mrr.ResultReader()
		for r.NextRow() {
			var row []string
			for _, v := range r.Values() {
				row = append(row, string(v))
			}
			out = append(out, "("+strings.Join(row, ",")+")")
		}
		tag, err := r.Close()
		if err == nil {
			out = append(out, tag.String())
		}
	}
	if err := mrr.Close(); err != nil {
		var e *pgconn.PgError
		if !errors.As(err, &e) {
			t.Fatalf("%s: %v", sql, err)
		}
		out = append(out, "!"+e.Code)
	}
	return strings.Join(append(out, string(c.TxStatus())), " ")
}

func expect(t testing.TB, c *pgconn.PgConn, sql, want string) {
	t.Helper()
	if got := run(t, c, sql); got != want {
		t.Errorf("%s\n got %s\nwant %s", sql, got, want)
	}
}

// wire is a client that speaks in messages.
type wire struct {
	t    testing.TB
	conn net.Conn
	f    *pgproto3.Frontend
	pid  uint32
	key  []byte
}

func (f *fixture) wire(t testing.TB, params map[string]string) *wire {
	t.Helper()
	w, first := f.dial(t, params)
	for m := first; ; {
		switch m := m.(type) {
		case *pgproto3.ErrorResponse:
			t.Fatalf("startup: %s %s", m.Code, m.Message)
		case *pgproto3.BackendKeyData:
			w.pid, w.key = m.ProcessID, append([]byte(nil), m.SecretKey...)
		case *pgproto3.ReadyForQuery:
			return w
		}
		m = w.receive()
	}
}

func (f *fixture) dial(t testing.TB, params map[string]string) (*wire, pgproto3.BackendMessage) {
	t.Helper()
	conn, err := net.Dial("tcp", f.g.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	w := &wire{t: t, conn: conn, f: pgproto3.NewFrontend(conn, conn)}
	p := map[string]string{"user": "postgres", "database": "postgres"}
	for k, v := range params {
		p[k] = v
	}
	w.f.Send(&pgproto3.StartupMessage{ProtocolVersion: pgproto3.ProtocolVersion30, Parameters: p})
	if err := w.f.Flush(); err != nil {
		t.Fatal(err)
	}
	return w, w.receive()
}

func (w *wire) receive() pgproto3.BackendMessage {
	w.t.Helper()
	m, err := w.f.Receive()
	if err != nil {
		w.t.Fatalf("receive: %v", err)
	}
	return m
}

func (w *wire) send(messages ...pgproto3.FrontendMessage) {
	w.t.Helper()
	for _, m := range messages {
		w.f.Send(m)
	}
	if err := w.f.Flush(); err != nil {
		w.t.Fatal(err)
	}
}

// until renders messages up to and including the n-th ReadyForQuery, or the end of the connection.
func (w *wire) until(n int) string {
	w.t.Helper()
	var out []string
	for n > 0 {
		m, err := w.f.Receive()
		if err != nil {
			return strings.Join(append(out, "closed"), " ")
		}
		s := render(m)
		if s == "" {
			continue
		}
		if _, ok := m.(*pgproto3.ReadyForQuery); ok {
			n--
		}
		out = append(out, s)
	}
	return strings.Join(out, " ")
}

func render(m pgproto3.BackendMessage) string {
	switch m := m.(type) {
	case *pgproto3.ParseComplete:
		return "1"
	case *pgproto3.BindComplete:
		return "2"
	case *pgproto3.CloseComplete:
		return "3"
	case *pgproto3.NoData:
		return "n"
	case *pgproto3.RowDescription:
		return "T"
	case *pgproto3.ParameterDescription:
		return "t"
	case *pgproto3.PortalSuspended:
		return "s"
	case *pgproto3.EmptyQueryResponse:
		return "empty"
	case *pgproto3.DataRow:
		var row []string
		for _, v := range m.Values {
			row = append(row, string(v))
		}
		return "(" + strings.Join(row, ",") + ")"
	case *pgproto3.CommandComplete:
		return strings.ReplaceAll(string(m.CommandTag), " ", "_")
	case *pgproto3.ErrorResponse:
		return "!" + m.Code
	case *pgproto3.NoticeResponse:
		return "?" + m.Code
	case *pgproto3.NotificationResponse:
		return "notify:" + m.Channel + ":" + m.Payload
	case *pgproto3.ReadyForQuery:
		return string(m.TxStatus)
	case *pgproto3.ParameterStatus:
		return ""
	case *pgproto3.CopyInResponse:
		return "G"
	case *pgproto3.CopyOutResponse:
		return "H"
	case *pgproto3.CopyData:
		return "d"
	case *pgproto3.CopyDone:
		return "c"
	}
	return fmt.Sprintf("%T", m)
}

func query(sql string) pgproto3.FrontendMessage { return &pgproto3.Query{String: sql} }

func parse(name, sql string) pgproto3.FrontendMessage { return &pgproto3.Parse{Name: name, Query: sql} }

func bind(portal, name string, params ...string) pgproto3.FrontendMessage {
	b := &pgproto3.Bind{DestinationPortal: portal, PreparedStatement: name}
	for _, p := range params {
		b.Parameters = append(b.Parameters, []byte(p))
	}
	return b
}

func describe(portal string) pgproto3.FrontendMessage {
	return &pgproto3.Describe{ObjectType: 'P', Name: portal}
}

func execute(portal string) pgproto3.FrontendMessage { return &pgproto3.Execute{Portal: portal} }

// all returns the messages that run sql once, by the unnamed statement and portal.
func all(sql string, params ...string) []pgproto3.FrontendMessage {
	return []pgproto3.FrontendMessage{parse("", sql), bind("", "", params...), describe(""), execute("")}
}

func join(parts ...any) (out []pgproto3.FrontendMessage) {
	for _, p := range parts {
		switch p := p.(type) {
		case []pgproto3.FrontendMessage:
			out = append(out, p...)
		case pgproto3.FrontendMessage:
			out = append(out, p)
		}
	}
	return out
}

var (
	syncMessage = &pgproto3.Sync{}
	flush       = &pgproto3.Flush{}
)

func program(t testing.TB, name string) string {
	path, err := exec.LookPath(name)
	if err != nil {
		t.Logf("%s is not installed", name)
		return ""
	}
	return path
}

type metricFamily = dto.MetricFamily
