package apply

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/quorate/quorate/txn"
)

// sessionPrefix begins the names (application_name) of all sessions of this package, and of the workers' origins.
const sessionPrefix = "quorate_apply_"

// sessionSettings make every node compute the same from the same change, whatever a database or role has set.
// Capture writes values under the same output settings. Sequential scans are discouraged because a plan made while a
// table was tiny is kept while it grows; where there is no index one is used all the same.
const sessionSettings = `SET session_replication_role = replica; SET search_path = pg_catalog;
SET client_encoding = 'UTF8'; SET TimeZone = 'UTC'; SET DateStyle = 'ISO, MDY'; SET IntervalStyle = 'postgres';
SET extra_float_digits = 1; SET bytea_output = 'hex'; SET xmloption = content; SET lc_monetary = 'C'; SET standard_conforming_strings = on;
SET default_transaction_isolation = 'read committed'; SET default_transaction_read_only = off; SET default_transaction_deferrable = off;
SET synchronous_commit = off; SET row_security = off; SET check_function_bodies = off; SET client_min_messages = error;
SET statement_timeout = 0; SET lock_timeout = 0; SET transaction_timeout = 0; SET idle_session_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET enable_bitmapscan = off; SET jit = off`

// The bounds of one round trip. Two are under way at a time: their replies, some twenty bytes for each statement,
// fit into the socket's buffers, so the server never blocks writing while we do.
const (
	batchStatements = 128
	batchBytes      = 64 << 10
)

// errConnection marks errors after which the session is of no use.
var errConnection = errors.New("connection to PostgreSQL lost")

// session is a worker's connection. Only its worker uses it, except for writeCommit and writeRollback.
//
// It speaks the protocol itself: statements go out in batches whose replies are counted off against what is
// expected, without a result object or an allocation per row.
type session struct {
	conn  net.Conn
	front *pgproto3.Frontend // for reading
	pid   uint32
	stop  func() bool

	out      []byte
	expected deque[expectation]
	batches  int // sent, replies not read
	inBatch  int // statements in out
	failed   error
	since    *atomic.Int64 // when the oldest outstanding batch was sent; read by the monitor

	generation uint64
	statements statementCache
	relations  map[string]*relation // by Relation message
	current    []*relation          // of the write set at hand
	gathering  []*gathered          // by table
	spare      []*gathered          // empty ones
	ordered    bool                 // gather nothing: whichever change fails is to be known
	few        bool                 // the transaction has few changes: see fewRows
	doubtful   bool                 // of some change only its reply tells whether it touched what it should, and that is not read yet
	committed  bool                 // the transaction is
	change     rowChange
	shape      []byte
	params     []column
	number     []byte
}

// expectation is a reply that is due.
type expectation struct {
	csn      txn.CSN
	relation *relation // nil: not a row change
	message  []byte    // the row change, or the first of the statement's
	rows     int64     // how many the statement changes
	commit   bool      // of COMMIT, or the ROLLBACK that was written instead
	sync     bool      // the end of a batch
}

// openSession connects and makes the connection an apply session with the origin of number n.
func openSession(ctx context.Context, connect func(context.Context) (*pgconn.PgConn, error), n, statements int, since *atomic.Int64) (*session, error) {
	c, err := connect(ctx)
	if err != nil {
		return nil, err
	}
	origin := sessionPrefix + strconv.Itoa(n)
	if err := takeOrigin(ctx, c, origin); err != nil {
		_ = c.Close(ctx)
		return nil, fmt.Errorf("prepare apply session: %w", err)
	}
	s, err := hijack(ctx, c)
	if err != nil {
		return nil, err
	}
	s.since, s.statements.limit = since, statements
	return s, nil
}

// hijack takes the connection over from pgconn. The end of ctx closes it.
func hijack(ctx context.Context, c *pgconn.PgConn) (*session, error) {
	if err := c.SyncConn(ctx); err != nil {
		return nil, fmt.Errorf("prepare session: %w", err)
	}
	h, err := c.Hijack()
	if err != nil {
		return nil, fmt.Errorf("prepare session: %w", err)
	}
	s := &session{conn: h.Conn, front: h.Frontend, pid: h.PID, since: new(atomic.Int64), relations: map[string]*relation{}}
	s.stop = context.AfterFunc(ctx, func() { _ = h.Conn.Close() }) // ends any read
	return s, nil
}

// takeOrigin configures the session and takes its origin, which a session of an earlier life may still hold. All that
// the origin does is to mark what is written as replayed, so that capture does not see it.
func takeOrigin(ctx context.Context, c *pgconn.PgConn, origin string) error {
	if err := exec(ctx, c, sessionSettings+"; SET application_name = '"+origin+"'"); err != nil {
		return err
	}
	if err := endSessions(ctx, c, origin); err != nil {
		return err
	}
	if err := prepareProgress(ctx, c); err != nil {
		return err
	}
	return exec(ctx, c, fmt.Sprintf(`SELECT pg_catalog.pg_replication_origin_create('%[1]s') WHERE pg_catalog.pg_replication_origin_oid('%[1]s') IS NULL;
SELECT pg_catalog.pg_replication_origin_session_setup('%[1]s')`, origin))
}

// endSessions terminates other apply sessions whose name is like pattern, and returns when they are gone.
func endSessions(ctx context.Context, c *pgconn.PgConn, pattern string) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		rows, err := query(ctx, c, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE application_name LIKE $1 AND usename = current_user AND backend_type = 'client backend' AND pid <> pg_backend_pid()`, strings.ReplaceAll(pattern, "_", `\_`))
		if err != nil || len(rows) == 0 {
			return err
		}
		if err := pause(ctx, wait); err != nil {
			return err
		}
	}
}

// exec runs statements without parameters.
func exec(ctx context.Context, c *pgconn.PgConn, sql string) error {
	_, err := c.Exec(ctx, sql).ReadAll()
	return err
}

// query runs a statement with text parameters; a NULL in the result is "".
func query(ctx context.Context, c *pgconn.PgConn, sql string, args ...string) ([][]string, error) {
	params := make([][]byte, len(args))
	for i, a := range args {
		params[i] = []byte(a)
	}
	r := c.ExecParams(ctx, sql, params, nil, nil, nil).Read()
	rows := make([][]string, len(r.Rows))
	for i, row := range r.Rows {
		for _, value := range row {
			rows[i] = append(rows[i], string(value))
		}
	}
	return rows, r.Err
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *session) close() {
	if s.stop() {
		_ = s.conn.Close() // what matters was reported by the read or write that failed
	}
}

var (
	commitMessage   = simpleQuery("COMMIT")
	rollbackMessage = simpleQuery("ROLLBACK")
)

func simpleQuery(sql string) []byte {
	message := append([]byte{'Q'}, 0, 0, 0, byte(4+len(sql)+1))
	return append(append(message, sql...), 0)
}

// writeCommit sends COMMIT, to be called once, by whoever moved the entry to stateCommitting. The worker reads the
// reply. An error is not reported: the worker's read fails too.
func (s *session) writeCommit() { _, _ = s.conn.Write(commitMessage) }

// writeRollback is writeCommit's opposite, for stateEvicted.
func (s *session) writeRollback() { _, _ = s.conn.Write(rollbackMessage) }

// awaitEnd reads the reply to a COMMIT or ROLLBACK that somebody wrote; committed tells which it was.
func (s *session) awaitEnd() error {
	s.expected.push(expectation{commit: true})
	s.expected.push(expectation{sync: true})
	s.batches++
	if err := s.readBatch(); err != nil {
		return err
	}
	return s.takeFailure()
}

// rollback ends the transaction, whatever state it is in, and forgets what was prepared: a statement whose Parse was
// skipped after an error does not exist.
func (s *session) rollback() error {
	for len(s.gathering) > 0 {
		s.drop(s.gathering[0])
	}
	s.out, s.inBatch = s.out[:0], 0
	for s.expected.len() > 0 {
		if last, _ := s.expected.last(); last.sync {
			break
		}
		s.expected.elements = s.expected.elements[:len(s.expected.elements)-1]
	}
	if err := s.drain(); err != nil {
		return err
	}
	s.failed = nil
	s.forgetPlans()
	return s.simple("ROLLBACK; DEALLOCATE ALL")
}

// forgetPlans drops what is cached about relations and statements; the server's side needs DEALLOCATE ALL.
func (s *session) forgetPlans() {
	s.statements.clear()
	clear(s.relations)
	s.current = s.current[:0]
}

// simple runs statements by the simple protocol, after everything sent before.
func (s *session) simple(sql string) error {
	if err := s.finish(); err != nil {
		return err
	}
	s.out, _ = (&pgproto3.Query{String: sql}).Encode(s.out[:0]) // fails only for gigabytes
	if err := s.write(); err != nil {
		return err
	}
	// One batch with an unknown number of replies.
	s.expected.push(expectation{sync: true})
	s.batches++
	if err := s.readBatch(); err != nil {
		return err
	}
	return s.takeFailure()
}

// query runs one statement with text parameters, after everything sent before; a NULL is "".
func (s *session) query(sql string, args ...string) ([][]string, error) {
	if err := s.finish(); err != nil {
		return nil, err
	}
	params := make([][]byte, len(args))
	for i, a := range args {
		params[i] = []byte(a)
	}
	for _, m := range []pgproto3.FrontendMessage{
		&pgproto3.Parse{Query: sql}, &pgproto3.Bind{Parameters: params}, &pgproto3.Execute{}, &pgproto3.Sync{},
	} {
		var err error
		if s.out, err = m.Encode(s.out); err != nil {
			return nil, fmt.Errorf("encode query: %w", err)
		}
	}
	if err := s.write(); err != nil {
		return nil, err
	}
	var rows [][]string
	for {
		message, err := s.receive()
		if err != nil {
			return nil, err
		}
		switch m := message.(type) {
		case *pgproto3.DataRow:
			row := make([]string, len(m.Values))
			for i, v := range m.Values {
				row[i] = string(v)
			}
			rows = append(rows, row)
		case *pgproto3.ErrorResponse:
			if err := s.fail(m); err != nil {
				return nil, err
			}
		case *pgproto3.ReadyForQuery:
			s.since.Store(0)
			return rows, s.takeFailure()
		}
	}
}

// begin starts a transaction whose commit moves the progress to csn.
func (s *session) begin(csn txn.CSN) {
	s.execute("BEGIN", nil)
	s.number = strconv.AppendUint(s.number[:0], uint64(csn), 10)
	s.params = append(s.params[:0], column{kind: kindText, data: s.number})
	s.execute(insertProgress[era(csn)%2], s.params)
	s.expected.push(expectation{})
	s.expected.push(expectation{})
}

// commit adds COMMIT to the batch. If anything before it fails the server does not come to it, or rolls back.
func (s *session) commit() {
	s.execute("COMMIT", nil)
	s.expected.push(expectation{commit: true})
}

// execute adds one execution of a prepared statement to the batch. The caller pushes the expectation.
func (s *session) execute(sql string, params []column) {
	s.run(s.statements.find(sql), params)
}

// run appends Close of an evicted statement, Parse if st is new, Bind and Execute.
func (s *session) run(st *statement, params []column) {
	if s.statements.evicted != "" {
		s.out = appendMessage(s.out, 'C', "S"+s.statements.evicted+"\x00")
		s.statements.evicted = ""
	}
	if !st.prepared {
		st.prepared = true
		s.out = append(s.out, 'P', 0, 0, 0, 0)
		start := len(s.out) - 4
		s.out = append(append(s.out, st.name...), 0)
		s.out = append(append(s.out, st.sql...), 0)
		s.out = append(s.out, 0, 0) // the server infers all parameter types
		binary.BigEndian.PutUint32(s.out[start:], uint32(len(s.out)-start))
	}
	s.out = append(s.out, 'B', 0, 0, 0, 0)
	start := len(s.out) - 4
	s.out = append(s.out, 0) // unnamed portal
	s.out = append(append(s.out, st.name...), 0)
	s.out = append(s.out, 0, 0) // all parameters are text
	s.out = binary.BigEndian.AppendUint16(s.out, uint16(len(params)))
	for _, p := range params {
		if p.kind != kindText {
			s.out = append(s.out, 0xff, 0xff, 0xff, 0xff)
			continue
		}
		s.out = binary.BigEndian.AppendUint32(s.out, uint32(len(p.data)))
		s.out = append(s.out, p.data...)
	}
	s.out = append(s.out, 0, 0) // all results are text
	binary.BigEndian.PutUint32(s.out[start:], uint32(len(s.out)-start))
	s.out = append(s.out, 'E', 0, 0, 0, 9, 0, 0, 0, 0, 0)
	s.inBatch++
}

func appendMessage(to []byte, kind byte, body string) []byte {
	to = append(to, kind)
	to = binary.BigEndian.AppendUint32(to, uint32(4+len(body)))
	return append(to, body...)
}

// flushIfFull ends the batch when it is large enough, and reads replies so that at most two are outstanding.
func (s *session) flushIfFull() error {
	if s.inBatch < batchStatements && len(s.out) < batchBytes {
		return nil
	}
	if err := s.flush(); err != nil {
		return err
	}
	for s.batches > 1 {
		if err := s.readBatch(); err != nil {
			return err
		}
	}
	return s.failed // the caller rolls back
}

// flush ends the batch with Sync and sends it.
func (s *session) flush() error {
	if s.inBatch == 0 {
		return nil
	}
	s.out = append(s.out, 'S', 0, 0, 0, 4)
	s.inBatch = 0
	s.expected.push(expectation{sync: true})
	s.batches++
	return s.write()
}

func (s *session) write() error {
	if s.since.Load() == 0 {
		s.since.Store(time.Now().UnixNano())
	}
	_, err := s.conn.Write(s.out)
	if cap(s.out) > 4*batchBytes {
		s.out = nil // after a large value
	}
	s.out = s.out[:0]
	if err != nil {
		return fmt.Errorf("%w: %w", errConnection, err)
	}
	return nil
}

// finish sends the batch, reads all replies and returns the transaction's first failure.
func (s *session) finish() error {
	s.insertAll()
	if err := s.flush(); err != nil {
		return err
	}
	if err := s.drain(); err != nil {
		return err
	}
	return s.failed
}

func (s *session) drain() error {
	for s.batches > 0 {
		if err := s.readBatch(); err != nil {
			return err
		}
	}
	s.doubtful = false
	return nil
}

func (s *session) takeFailure() error {
	err := s.failed
	s.failed = nil
	return err
}

// readBatch reads up to the end of the oldest batch. The error is the connection's; the first failure of a statement is
// left in s.failed.
func (s *session) readBatch() error {
	s.batches--
	for {
		message, err := s.receive()
		if err != nil {
			return err
		}
		switch m := message.(type) {
		case *pgproto3.CommandComplete:
			e, ok := s.expected.first()
			if !ok || e.sync { // of the simple protocol
				continue
			}
			s.expected.pop()
			if e.commit {
				s.committed = string(m.CommandTag) == "COMMIT"
			}
			if e.relation == nil {
				continue
			}
			if rows := rowsOf(m.CommandTag); rows != e.rows && s.failed == nil {
				s.failed = e.divergence(rows, nil)
			}
		case *pgproto3.ErrorResponse:
			if err := s.fail(m); err != nil {
				return err
			}
		case *pgproto3.ReadyForQuery:
			// After an error the rest of the batch was skipped.
			for {
				e, ok := s.expected.first()
				if !ok {
					break
				}
				s.expected.pop()
				if e.sync {
					break
				}
			}
			if s.batches == 0 {
				s.since.Store(0)
			} else {
				s.since.Store(time.Now().UnixNano())
			}
			return nil
		}
	}
}

// fail keeps the first failure of the transaction; the error is that of a connection the server is about to close.
func (s *session) fail(m *pgproto3.ErrorResponse) error {
	cause := pgconn.ErrorResponseToPgError(m)
	if m.SeverityUnlocalized == "FATAL" || m.SeverityUnlocalized == "PANIC" {
		return fmt.Errorf("%w: %w", errConnection, cause)
	}
	if s.failed != nil {
		return nil
	}
	s.failed = cause
	if e, ok := s.expected.first(); ok && !e.sync {
		var reason error = cause
		if cause.Code == codeNoSuchRow { // that no row was touched says it all
			reason = nil
		}
		s.failed = e.divergence(0, reason)
	}
	return nil
}

func (s *session) receive() (pgproto3.BackendMessage, error) {
	m, err := s.front.Receive()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errConnection, err)
	}
	return m, nil
}

// codeNoSuchRow is the SQLSTATE of quorate.no_such_row(): see relation.merge.
const codeNoSuchRow = "QR001"

// divergence describes a failed statement; it is only final if nothing else can be the reason, which the worker knows.
func (e expectation) divergence(rows int64, cause error) *Divergence {
	d := &Divergence{CSN: e.csn, Expected: e.rows, Actual: rows, Cause: cause}
	if e.relation != nil {
		var c rowChange
		if c.parse(e.message) == nil {
			d.Operation = operationName(c.operation)
			d.Key = e.relation.describeKey(&c)
		}
		d.Table = e.relation.schema + "." + e.relation.name
	}
	return d
}

func rowsOf(tag []byte) int64 {
	n, err := strconv.ParseInt(string(tag[bytes.LastIndexByte(tag, ' ')+1:]), 10, 64)
	if err != nil {
		return 0 // a tag without a count: no row
	}
	return n
}
