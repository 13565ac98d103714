package sim

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/txn"
)

// database is a PostgreSQL as far as the protocol touches it: rows with locks, snapshots of what is committed, a WAL
// whose end a crash takes away unless it was flushed, transaction ids that outlive sessions, a progress table.
type database struct {
	run  *run
	node *node

	mu       sync.Mutex
	changed  *sync.Cond // a lock was released or a session ended
	life     int
	down     bool
	initial  map[string]string
	rows     map[string]version
	wal      []record
	flushed  int // records
	xid      uint64
	pid      uint32
	sessions map[uint32]*session
	locks    map[string]*session
}

type version struct {
	value string
	at    int // records of the WAL with it
}

// record is a committed transaction in the WAL.
type record struct {
	xid      uint64
	writes   []write
	progress txn.CSN
}

type write struct{ row, value string }

// session is one server process. A client's is used directly, one of apply's through the wire protocol.
type session struct {
	db   *database
	pid  uint32
	app  string
	life string // of the server

	// guarded by db.mu
	gone      bool
	done      chan struct{} // closed when gone
	cancelled bool
	orphaned  bool   // its sidecar is dead, so nobody waits for what it does
	waits     string // for the lock of this row
	conn      *conn  // nil: used directly
	sync      bool   // synchronous_commit

	open     bool // in a transaction
	xid      uint64
	snapshot int
	writes   []write
	progress txn.CSN
}

func newDatabase(r *run, n *node, rows map[string]string) *database {
	d := &database{run: r, node: n, initial: rows, sessions: map[uint32]*session{}, locks: map[string]*session{}}
	d.changed = sync.NewCond(&d.mu)
	d.rebuild()
	return d
}

// rebuild makes the rows what the WAL says.
func (d *database) rebuild() {
	d.rows = map[string]version{}
	for row, value := range d.initial {
		d.rows[row] = version{value: value}
	}
	for i, r := range d.wal {
		d.install(r, i+1)
	}
}

func (d *database) install(r record, at int) {
	for _, w := range r.writes {
		d.rows[w.row] = version{w.value, at}
	}
}

var errGone = errors.New("the server process is gone")

func failure(code, message string) error {
	return &pgconn.PgError{Severity: "ERROR", SeverityUnlocalized: "ERROR", Code: code, Message: message}
}

// dial connects, for the wire protocol.
func (d *database) dial(context.Context, string, string) (net.Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.down {
		return nil, &net.OpError{Op: "dial", Net: "sim", Err: errors.New("connection refused")}
	}
	client, server := newConn()
	s := d.add(server)
	d.run.group.Go(s.serve)
	return client, nil
}

// connect is a client's own session, nil while the server is down.
func (d *database) connect() *session {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.down {
		return nil
	}
	return d.add(nil)
}

func (d *database) add(c *conn) *session {
	d.pid++
	s := &session{db: d, pid: d.pid, life: d.identity(), conn: c, sync: true, done: make(chan struct{})}
	d.sessions[s.pid] = s
	return s
}

// crash takes the server down: sessions end, and the WAL is lost back to any point that was not flushed.
func (d *database) crash() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.down {
		return
	}
	d.down = true
	for _, pid := range slices.Sorted(maps.Keys(d.sessions)) {
		d.kill(d.sessions[pid])
	}
	kept := d.flushed + d.run.draw(len(d.wal)-d.flushed+1, "kept", d.node.id)
	d.run.trace(d.node.id, "postgres crashes, keeps %d of %d commits, %d flushed", kept, len(d.wal), d.flushed)
	d.run.add("lost commits", len(d.wal)-kept)
	d.wal = d.wal[:kept]
	d.flushed = kept
	d.rebuild()
	d.life++
	if left := d.count(); left < d.node.forgotten() {
		d.run.fail("node %d has transactions up to %d only, and the log no longer those up to %d", d.node.id, left, d.node.forgotten())
	}
}

func (d *database) restart() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.down = false
}

func (d *database) identity() string { return fmt.Sprintf("life %d", d.life) }

// kill ends a session. Requires mu.
func (d *database) kill(s *session) {
	if s.gone {
		return
	}
	s.gone = true
	close(s.done)
	d.rollback(s)
	delete(d.sessions, s.pid)
	if s.conn != nil {
		_ = s.conn.Close()
	}
	d.changed.Broadcast()
}

func (d *database) rollback(s *session) {
	for row, owner := range d.locks {
		if owner == s {
			delete(d.locks, row)
		}
	}
	s.open, s.xid, s.writes, s.progress, s.cancelled, s.waits = false, 0, nil, 0, false, ""
	d.changed.Broadcast()
}

func (d *database) lastProgress() (last txn.CSN) {
	for _, r := range d.wal {
		last = max(last, r.progress)
	}
	return last
}

// count is how many transactions there are; a group is one record.
func (d *database) count() (n txn.CSN) {
	for _, r := range d.wal {
		n += txn.CSN(len(r.marks()))
	}
	return n
}

// marks are the rows of which every transaction inserts one of its own.
func (r record) marks() (rows []string) {
	for _, w := range r.writes {
		if strings.HasPrefix(w.row, markPrefix) {
			rows = append(rows, w.row)
		}
	}
	return rows
}

const markPrefix = "m"

// status is pg_xact_status.
func (d *database) status(xid uint64) string {
	for _, s := range d.sessions {
		if s.xid == xid {
			return "in progress"
		}
	}
	for _, r := range d.wal {
		if r.xid == xid {
			return "committed"
		}
	}
	return "aborted"
}

func (s *session) begin() error {
	s.db.mu.Lock()
	defer s.db.mu.Unlock()
	if s.gone {
		return errGone
	}
	s.open, s.snapshot = true, len(s.db.wal)
	return nil
}

func (s *session) assignXID() {
	if s.xid == 0 {
		s.db.xid++
		s.xid = s.db.xid
	}
}

// lock waits for a row. Requires db.mu.
func (s *session) lock(row string) error {
	s.assignXID()
	for s.db.locks[row] != nil && s.db.locks[row] != s && !s.gone && !s.cancelled && !s.orphaned {
		s.waits = row
		s.db.changed.Wait()
	}
	s.waits = ""
	switch {
	case s.gone, s.orphaned:
		return errGone
	case s.cancelled:
		s.cancelled = false
		return failure("57014", "canceling statement due to user request")
	}
	s.db.locks[row] = s
	return nil
}

// current is the value of a row as s sees it.
func (s *session) current(row string) (string, bool) {
	for _, w := range slices.Backward(s.writes) {
		if w.row == row {
			return w.value, true
		}
	}
	v, ok := s.db.rows[row]
	return v.value, ok
}

// update sets a row and returns its value before. In REPEATABLE READ the row must not have changed since the snapshot.
func (s *session) update(row, value string, repeatable bool) (before string, n int, err error) {
	d := s.db
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := s.lock(row); err != nil {
		return "", 0, err
	}
	before, ok := s.current(row)
	if !ok {
		return "", 0, nil
	}
	if repeatable && d.rows[row].at > s.snapshot {
		return "", 0, failure("40001", "could not serialize access due to concurrent update")
	}
	s.writes = append(s.writes, write{row, value})
	return before, 1, nil
}

func (s *session) insert(row, value string) error {
	s.db.mu.Lock()
	defer s.db.mu.Unlock()
	if err := s.lock(row); err != nil {
		return err
	}
	if _, ok := s.current(row); ok {
		return failure("23505", "duplicate key value: "+row)
	}
	s.writes = append(s.writes, write{row, value})
	return nil
}

// mark writes the marker: everything up to here is on disk. It returns the transaction's id, 0 if the session is gone.
func (s *session) mark() uint64 {
	s.db.mu.Lock()
	defer s.db.mu.Unlock()
	if !s.gone {
		s.db.flush()
	}
	return s.xid
}

func (d *database) flush() { d.flushed = len(d.wal) }

// commit is asynchronous unless synchronous_commit is on.
func (s *session) commit(asynchronous bool) error {
	d := s.db
	d.mu.Lock()
	defer d.mu.Unlock()
	if s.gone {
		return errGone
	}
	if len(s.writes) > 0 || s.progress > 0 {
		r := record{s.xid, s.writes, s.progress}
		d.wal = append(d.wal, r)
		if d.run.options.separate && len(r.writes) > 0 && r.progress > 0 {
			d.wal[len(d.wal)-1].progress = 0
			d.wal = append(d.wal, record{progress: r.progress})
		}
		d.install(r, len(d.wal))
		d.node.check(int(d.count())-len(r.marks()), r)
		if !asynchronous && s.sync {
			d.flush()
		}
	}
	d.rollback(s)
	return nil
}

func (s *session) end() {
	s.db.mu.Lock()
	defer s.db.mu.Unlock()
	s.db.kill(s)
}

// abort rolls back and leaves the session open.
func (s *session) abort() {
	s.db.mu.Lock()
	defer s.db.mu.Unlock()
	s.db.rollback(s)
}

// orphan is what the death of the sidecar does to clients' sessions: they stay as they are.
func (d *database) orphan() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.sessions {
		s.orphaned = s.conn == nil
	}
	d.changed.Broadcast()
}

// endClients ends clients' sessions, as a gateway does when the server is lost.
func (d *database) endClients() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.terminate(func(s *session) bool { return s.conn == nil })
}

// evict ends the session of a transaction that is in the way.
func (d *database) evict(pid uint32) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.sessions[pid]
	if s == nil || s.conn != nil {
		return false
	}
	d.kill(s)
	return true
}

// blocking is pg_blocking_pids.
func (d *database) blocking(pid uint32) []uint32 {
	s := d.sessions[pid]
	if s == nil || s.waits == "" || d.locks[s.waits] == nil {
		return nil
	}
	return []uint32{d.locks[s.waits].pid}
}

// contents are the rows, for comparison.
func (d *database) contents() map[string]string {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := map[string]string{}
	for row, v := range d.rows {
		all[row] = v.value
	}
	return all
}

// pause is the time that the server takes. Sessions of the same name take turns in their luck.
func (s *session) pause(most time.Duration) { s.db.run.pause(most, s.db.node.id, s.name()) }

func (s *session) called(name string) {
	s.db.mu.Lock()
	defer s.db.mu.Unlock()
	s.app = name
}

func (s *session) name() string {
	s.db.mu.Lock()
	defer s.db.mu.Unlock()
	return s.app
}

func atoi[T ~uint32 | ~uint64](s string) T {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		panic(fmt.Sprintf("%q is not a number", s))
	}
	return T(n)
}
