package capture

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/internal/pgserver/pgtest"
	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
)

// patience bounds every wait of the tests.
const patience = 2 * time.Minute

// node is a server with Quorate's objects and a running Capture.
type node struct {
	t        testing.TB
	server   *pgserver.Server
	capture  *Capture
	catalog  *pg.Catalog
	registry *prometheus.Registry
	sink     *recorder
	spill    string
	sequence atomic.Uint64
}

// newServer starts a server on which pg.Install was run.
func newServer(t testing.TB, major int) *pgserver.Server {
	t.Helper()
	server := pgtest.Start(t, pgtest.Options{Major: major, Tmpfs: true})
	conn := pgtest.Connect(t, server, "postgres")
	if _, err := pg.Install(t.Context(), conn.PgConn(), pg.Identity{Cluster: "test", Node: 1, MaxNodes: 4}); err != nil {
		t.Fatalf("install: %v", err)
	}
	return server
}

func newNode(t testing.TB, major int, limits Limits) *node {
	t.Helper()
	n := &node{t: t, server: newServer(t, major), sink: newRecorder(), spill: t.TempDir(), registry: prometheus.NewRegistry()}
	config := parseConfig(t, n.server)
	n.catalog = pg.NewCatalog(config)
	n.capture = New(Config{
		Conn: config, Database: "postgres", Catalog: n.catalog, Sink: n.sink, SpillDir: n.spill, Limits: limits,
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)), Registerer: n.registry,
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.capture.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(patience):
			t.Error("Run did not end")
		}
		if err := n.catalog.Close(context.Background()); err != nil {
			t.Errorf("close catalog: %v", err)
		}
		if left, err := os.ReadDir(n.spill); err != nil || len(left) > 0 {
			t.Errorf("spill directory holds %v, %v", left, err)
		}
	})
	n.awaitReady()
	return n
}

func parseConfig(t testing.TB, s *pgserver.Server) *pgconn.Config {
	t.Helper()
	config, err := pgconn.ParseConfig(s.ConnString("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	return config
}

func (n *node) awaitReady() {
	n.t.Helper()
	select {
	case <-n.capture.Ready():
	case <-time.After(patience):
		n.t.Fatal("capture does not become ready")
	}
}

// result is what the sink got for a marker.
type result struct {
	marker Marker
	set    *txn.WriteSet
	parts  txn.Parts
	err    error
}

type stray struct {
	xid     uint32
	changes uint64
}

// recorder is a Sink.
type recorder struct {
	mu      sync.Mutex
	waiting map[txn.GID]chan result
	strays  chan stray
}

func newRecorder() *recorder {
	return &recorder{waiting: make(map[txn.GID]chan result), strays: make(chan stray, 1000)}
}

func (r *recorder) expect(gid txn.GID) <-chan result {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := make(chan result, 1)
	r.waiting[gid] = c
	return c
}

// nonce is that of all seals.
const nonce = 0xfeed

func (r *recorder) Expecting(seal txn.Seal) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.waiting[seal.GID] != nil && seal.Nonce == nonce
}

func (r *recorder) Marked(m Marker, set *txn.WriteSet, parts txn.Parts, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waiting[m.GID] <- result{m, set, parts, err}
	delete(r.waiting, m.GID)
}

func (r *recorder) Stray(xid uint32, _ txn.LSN, changes uint64) { r.strays <- stray{xid, changes} }

// client is a session that ends its transactions as the gateway does.
type client struct {
	*node
	t    testing.TB
	conn *pgx.Conn
}

func (n *node) client() *client {
	n.t.Helper()
	return &client{n, n.t, pgtest.Connect(n.t, n.server, "postgres")}
}

func (c *client) exec(sql string) {
	c.t.Helper()
	if err := c.try(sql); err != nil {
		c.t.Fatalf("%s: %v", sql, err)
	}
}

func (c *client) try(sql string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_, err := c.conn.PgConn().Exec(ctx, sql).ReadAll()
	return err
}

func (n *node) newGID() txn.GID {
	return txn.GID{Node: 1, Incarnation: 0xabc, Sequence: n.sequence.Add(1)}
}

func sealSQL(gid txn.GID) string {
	return fmt.Sprintf("SELECT pg_logical_emit_message(true, 'quorate.seal', '%s')", txn.Seal{GID: gid, Nonce: nonce})
}

func markerSQL(gid txn.GID) string {
	return fmt.Sprintf("SELECT pg_logical_emit_message(false, 'quorate.marker', '%s ' || pg_current_xact_id() || ' 7 9', true)", txn.Seal{GID: gid, Nonce: nonce})
}

// mark emits seal and marker and returns what the sink gets.
func (c *client) mark(gid txn.GID, seal bool) result {
	c.t.Helper()
	answer := c.sink.expect(gid)
	if seal {
		c.exec(sealSQL(gid))
	}
	c.exec(markerSQL(gid))
	return c.await(answer)
}

func (c *client) await(answer <-chan result) result {
	c.t.Helper()
	select {
	case r := <-answer:
		return r
	case <-time.After(patience):
		c.t.Error("no answer to a marker")
		return result{err: errors.New("no answer")}
	}
}

func (c *client) nudge() {
	c.t.Helper()
	c.exec("SAVEPOINT nudge; INSERT INTO quorate.nudge VALUES (1); ROLLBACK TO SAVEPOINT nudge; RELEASE SAVEPOINT nudge")
}

// ready does what the gateway does before COMMIT, and reports how many nudges it took.
func (c *client) ready() (r result, nudges int) {
	c.t.Helper()
	gid := c.newGID()
	for r = c.mark(gid, true); r.set == nil && r.err == nil && nudges < 5; nudges++ {
		c.nudge()
		r = c.mark(gid, true)
	}
	if r.err != nil {
		c.t.Errorf("capture: %v", r.err)
	} else if r.set == nil {
		c.t.Error("write set is not complete after nudges")
	}
	return r, nudges
}

// commit makes the transaction ready and commits it.
func (c *client) commit() *txn.WriteSet {
	c.t.Helper()
	r, _ := c.ready()
	c.exec("COMMIT")
	return r.set
}

// run runs sql in a transaction and returns its write set.
func (c *client) run(sql string) *txn.WriteSet {
	c.t.Helper()
	c.exec("BEGIN")
	c.exec(sql)
	set := c.commit()
	if set == nil {
		c.t.FailNow()
	}
	return set
}

// split cuts framed messages apart.
func split(t testing.TB, framed []byte) (messages [][]byte) {
	t.Helper()
	for len(framed) > 0 {
		size, n := binary.Uvarint(framed)
		if n <= 0 || size > uint64(len(framed)-n) {
			t.Fatalf("bad frame")
		}
		messages = append(messages, framed[n:n+int(size)])
		framed = framed[n+int(size):]
	}
	return messages
}

// reader renders messages in words, with nothing in them that differs between two decodings of one transaction. It
// parses with pglogrepl, as peers do.
type reader struct {
	t         testing.TB
	relations map[uint32]*pglogrepl.RelationMessage
}

func newReader(t testing.TB) *reader {
	return &reader{t, make(map[uint32]*pglogrepl.RelationMessage)}
}

// read renders one message; nothing for one that is not a change to be replicated.
func (r *reader) read(message []byte) string {
	r.t.Helper()
	if message[0] == 'O' || message[0] == 'B' || message[0] == 'C' {
		return ""
	}
	parsed, err := pglogrepl.Parse(message)
	if err != nil {
		r.t.Fatalf("parse %q: %v", message, err)
	}
	switch m := parsed.(type) {
	case *pglogrepl.RelationMessage:
		r.relations[m.RelationID] = m
	case *pglogrepl.InsertMessage:
		return r.change("INSERT", m.RelationID, nil, m.Tuple)
	case *pglogrepl.UpdateMessage:
		return r.change("UPDATE", m.RelationID, m.OldTuple, m.NewTuple)
	case *pglogrepl.DeleteMessage:
		return r.change("DELETE", m.RelationID, m.OldTuple, nil)
	case *pglogrepl.TruncateMessage:
		var names []string
		for _, oid := range m.RelationIDs {
			if r.relation(oid).Namespace != localSchema {
				names = append(names, r.relation(oid).RelationName)
			}
		}
		return fmt.Sprintf("TRUNCATE %v options %d", names, m.Option)
	case *pglogrepl.LogicalDecodingMessage:
		if m.Prefix == pg.PrefixDDL {
			return fmt.Sprintf("DDL %s", m.Content)
		}
	}
	return ""
}

func (r *reader) relation(oid uint32) *pglogrepl.RelationMessage {
	r.t.Helper()
	rel := r.relations[oid]
	if rel == nil {
		r.t.Fatalf("relation %d is used before it is described", oid)
	}
	return rel
}

func (r *reader) change(verb string, oid uint32, old, tuple *pglogrepl.TupleData) string {
	r.t.Helper()
	rel := r.relation(oid)
	if rel.Namespace == localSchema {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s.%s", verb, rel.Namespace, rel.RelationName)
	for i, t := range []*pglogrepl.TupleData{old, tuple} {
		if t == nil {
			continue
		}
		if i == 0 {
			b.WriteString(" FROM")
		}
		if len(t.Columns) != len(rel.Columns) {
			r.t.Fatalf("%d values for %d columns of %s", len(t.Columns), len(rel.Columns), rel.RelationName)
		}
		for j, c := range t.Columns {
			data := c.Data
			if len(data) > 40 {
				data = fmt.Appendf(nil, "%s…%d", data[:40], len(data))
			}
			fmt.Fprintf(&b, " %s=%c%s", rel.Columns[j].Name, c.DataType, data)
		}
	}
	return b.String()
}

// render renders a write set's changes, parts included.
func render(t testing.TB, r result) (lines []string) {
	t.Helper()
	rd := newReader(t)
	for _, m := range split(t, whole(t, r)) {
		if line := rd.read(m); line != "" {
			lines = append(lines, line)
		}
	}
	return lines
}

// whole returns parts and last part together.
func whole(t testing.TB, r result) []byte {
	t.Helper()
	var b bytes.Buffer
	n := uint32(0)
	if r.parts != nil {
		for {
			part, err := r.parts.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			split(t, part) // cut at a border
			b.Write(part)
			n++
		}
		if err := r.parts.Close(); err != nil {
			t.Error(err)
		}
	}
	if n != r.set.Chunks {
		t.Errorf("%d parts, Chunks says %d", n, r.set.Chunks)
	}
	b.Write(r.set.Changes)
	return b.Bytes()
}
