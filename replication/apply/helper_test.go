package apply

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/internal/pgserver/pgtest"
	"github.com/quorate/quorate/txn"
)

// cluster is a server with two databases of the same schema: src, where transactions run and are decoded, and dst,
// where they are applied.
type cluster struct {
	t      testing.TB
	server *pgserver.Server
	src    *pgx.Conn
	dst    *pgx.Conn
	next   txn.CSN
}

const helpers = `CREATE SCHEMA quorate; CREATE FUNCTION quorate.own_sequences() RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION quorate.no_such_row() RETURNS boolean LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION USING ERRCODE = '` + codeNoSuchRow + `'; END$$;`

func newCluster(t testing.TB, major int, schema string) *cluster {
	t.Helper()
	s := pgtest.Start(t, pgtest.Options{Major: major, Tmpfs: true, Settings: pgserver.Settings{"autovacuum": "off"}})
	c := &cluster{t: t, server: s}
	admin := pgtest.Connect(t, s, "postgres")
	c.exec(admin, "CREATE DATABASE src")
	c.exec(admin, "CREATE DATABASE dst")
	c.src, c.dst = c.connect("src"), c.connect("dst")
	for _, conn := range []*pgx.Conn{c.src, c.dst} {
		c.exec(conn, helpers+schema)
	}
	c.exec(c.src, "CREATE PUBLICATION quorate FOR ALL TABLES")
	c.exec(c.src, "SELECT pg_create_logical_replication_slot('quorate', 'pgoutput')")
	return c
}

func (c *cluster) connect(database string) *pgx.Conn {
	c.t.Helper()
	return pgtest.Connect(c.t, c.server, database)
}

func (c *cluster) exec(conn *pgx.Conn, sql string) {
	c.t.Helper()
	if err := conn.PgConn().Exec(c.t.Context(), sql).Close(); err != nil {
		c.t.Fatalf("%s: %v", sql, err)
	}
}

// text returns a query's result, columns separated by | and rows by newlines.
func (c *cluster) text(conn *pgx.Conn, sql string) string {
	c.t.Helper()
	results, err := conn.PgConn().Exec(c.t.Context(), sql).ReadAll()
	if err != nil {
		c.t.Fatalf("%s: %v", sql, err)
	}
	var lines []string
	for _, row := range results[len(results)-1].Rows {
		lines = append(lines, string(join(row)))
	}
	return strings.Join(lines, "\n")
}

func join(row [][]byte) []byte {
	var out []byte
	for i, v := range row {
		if i > 0 {
			out = append(out, '|')
		}
		if v == nil {
			out = append(out, "NULL"...)
		}
		out = append(out, v...)
	}
	return out
}

// decode returns the transactions that were committed in src since the last call.
func (c *cluster) decode() []Item {
	c.t.Helper()
	r := c.src.PgConn().ExecParams(c.t.Context(), `SELECT data FROM pg_logical_slot_get_binary_changes('quorate', NULL, NULL,
		'proto_version', '1', 'publication_names', 'quorate', 'messages', 'true')`, nil, nil, nil, []int16{1})
	var items []Item
	var set *txn.WriteSet
	relations := map[uint32]relationMessage{}
	described := map[uint32]bool{}
	raw := map[uint32][]byte{}
	add := func(message []byte) {
		set.Changes = binary.AppendUvarint(set.Changes, uint64(len(message)))
		set.Changes = append(set.Changes, message...)
	}
	for r.NextRow() {
		message := append([]byte(nil), r.Values()[0]...)
		describe := func(oid uint32) relationMessage {
			if !described[oid] {
				described[oid] = true
				add(raw[oid])
			}
			return relations[oid]
		}
		switch message[0] {
		case 'B':
			set = &txn.WriteSet{Database: "dst", XID: txn.XID(binary.BigEndian.Uint32(message[17:]))}
			clear(described)
		case 'C':
			c.next++
			items = append(items, Item{CSN: c.next, Index: txn.LogIndex(c.next), Set: set})
		case 'R':
			m, err := parseRelation(message)
			if err != nil {
				c.t.Fatal(err)
			}
			relations[m.oid], raw[m.oid] = m, message
			described[m.oid] = true
			add(message)
		case 'I', 'U', 'D':
			var change rowChange
			if err := change.parse(message); err != nil {
				c.t.Fatal(err)
			}
			keysOf(set, describe(change.relation), &change)
			set.Rows++
			add(message)
		case 'T':
			m, err := parseTruncate(message)
			if err != nil {
				c.t.Fatal(err)
			}
			for _, oid := range m.relations {
				describe(oid)
			}
			set.Barrier = true
			add(message)
		case 'M':
			set.Barrier = true
			add(message)
		}
	}
	if _, err := r.Close(); err != nil {
		c.t.Fatalf("decode: %v", err)
	}
	return items
}

// keysOf adds keys by simple rules: the replica identity of old and new row, and the table.
func keysOf(set *txn.WriteSet, m relationMessage, change *rowChange) {
	h := txn.NewHasher()
	identity := func(tuple []column, mode txn.Mode) {
		h.Reset()
		h.String(m.schema)
		h.String(m.name)
		for i, c := range m.columns {
			if c.key && tuple[i].kind == kindText {
				h.Bytes(tuple[i].data)
			} else if c.key {
				h.Null()
			}
		}
		set.Keys = append(set.Keys, txn.KeyUse{Key: h.Key(), Mode: mode})
	}
	if change.identity != 0 {
		identity(change.old, txn.ModeExclusive)
	}
	if change.operation != 'D' {
		identity(change.new, txn.ModeWrite)
	}
	h.Reset()
	h.String(m.schema)
	h.String(m.name)
	set.Keys = append(set.Keys, txn.KeyUse{Key: h.Key(), Mode: txn.ModeIntent})
}

// run executes transactions in src, one after another, and returns them decoded.
func (c *cluster) run(transactions ...string) []Item {
	c.t.Helper()
	for _, sql := range transactions {
		c.exec(c.src, "BEGIN; "+sql+"; COMMIT")
	}
	return c.decode()
}

func (c *cluster) config() Config {
	connString := c.server.ConnString("dst")
	return Config{
		Connect:  func(ctx context.Context) (*pgconn.PgConn, error) { return pgconn.Connect(ctx, connString) },
		Database: "dst", Workers: 4,
		Logger: slog.New(slog.NewTextHandler(c.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
}

// started is a Pipeline that runs.
type started struct {
	*Pipeline
	t    testing.TB
	stop context.CancelFunc
	end  chan error
	once sync.Once
	err  error
}

func start(t testing.TB, cfg Config) *started {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s := &started{Pipeline: New(cfg), t: t, stop: cancel, end: make(chan error, 1)}
	go func() { s.end <- s.Run(ctx) }()
	t.Cleanup(func() {
		if err := s.stopped(); err != nil && !t.Failed() && !errors.Is(err, errExpected) {
			t.Errorf("pipeline: %v", err)
		}
	})
	return s
}

var errExpected = errors.New("expected")

// stopped ends the pipeline and returns how it ended.
func (s *started) stopped() error {
	s.once.Do(func() {
		s.stop()
		s.err = <-s.end
	})
	return s.err
}

// failure waits until the pipeline has stopped by itself.
func (s *started) failure() (err error) {
	s.once.Do(func() {
		select {
		case err = <-s.end:
		case <-time.After(20 * time.Second):
			err = errors.New("the pipeline does not stop")
		}
		s.stop()
		s.err = errExpected
	})
	return err
}

func (s *started) enqueue(items ...Item) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for _, item := range items {
		if err := s.Enqueue(ctx, item); err != nil {
			s.t.Fatalf("enqueue %d: %v", item.CSN, err)
		}
	}
}

func (s *started) await(csn txn.CSN) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := s.WaitFor(ctx, csn); err != nil {
		s.t.Fatalf("wait for %d, applied %d: %v", csn, s.Applied(), err)
	}
}

// idleWorkers waits until that many workers are connected and idle.
func (s *started) idleWorkers(n int) {
	s.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		idle := len(s.idle)
		s.mu.Unlock()
		if idle == n {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("%d workers are idle, not %d", idle, n)
		}
	}
}

func (s *started) apply(items []Item) {
	s.t.Helper()
	s.enqueue(items...)
	if len(items) > 0 {
		s.await(items[len(items)-1].CSN)
	}
}

// equal compares tables of the two databases.
func (c *cluster) equal(tables ...string) {
	c.t.Helper()
	for _, table := range tables {
		sql := fmt.Sprintf("SELECT count(*), md5(coalesce(string_agg(r::text, E'\\n' ORDER BY r::text), '')) FROM %s r", table)
		if want, got := c.text(c.src, sql), c.text(c.dst, sql); got != want {
			c.t.Errorf("%s differs: source %s, target %s", table, want, got)
		}
	}
}

// killOneBackend kills one server process as a crash would, and waits until the server is back.
func killOneBackend(t *testing.T, c *cluster) {
	t.Helper()
	victim := c.connect("dst")
	if err := syscall.Kill(int(victim.PgConn().PID()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// reconnect connects once the server accepts connections again.
func (c *cluster) reconnect(database string) *pgx.Conn {
	c.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		conn, err := pgconn.Connect(c.t.Context(), c.server.ConnString(database))
		if err == nil {
			_ = conn.Close(c.t.Context())
			return c.connect(database)
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("the server does not come back: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// watchHeap keeps the largest growth of the heap in highest until done is called.
func watchHeap(highest *atomic.Uint64) (done func()) {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	base := m.HeapAlloc
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				if m.HeapAlloc > base {
					highest.Store(max(highest.Load(), m.HeapAlloc-base))
				}
			}
		}
	}()
	return func() { close(stop); <-ended }
}

// eventually waits until a query in dst gives that result.
func (c *cluster) eventually(sql, want string) {
	c.t.Helper()
	got := ""
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if got = c.text(c.dst, sql); got == want {
			return
		}
	}
	c.t.Fatalf("%s: %s, not %s", sql, got, want)
}
