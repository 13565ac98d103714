package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quorate/quorate/gateway/sqllex"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
)

// session is one client and its server connection. Two goroutines work on it: the client loop reads what the client
// says, the server loop what the server says. They meet in a queue of expected replies. While a commit or another
// hidden conversation with the server goes on, the server loop conducts it and the client loop sends nothing.
//
// Lock order: wmu before mu, cmu alone. mu and cmu are never held while the server connection is written to, mu never
// during any I/O.
type session struct {
	g         *Gateway
	log       *slog.Logger
	ctx       context.Context
	client    net.Conn
	pid       uint32 // of the server backend, and what the client is told
	serverKey []byte // what cancels the backend
	secret    []byte // what the client was given instead

	cli *reader // of the client loop
	srv *reader // of the server loop

	wmu           sync.Mutex // held while bytes to the server are appended or written, and through a streamed message
	toServer      writer
	prepared      bool    // the hidden statements exist, but the ready statement
	preparedReady *[]byte // which of the two ready statements exists, if one does: &prepareReady or &prepareGuarded

	cmu      sync.Mutex
	toClient writer
	reported bool // what the client was last told of default_transaction_read_only
	gone     bool // the client does not take anything any more
	doomed   bool // the client does not read and the transaction must go: rows are dropped until it has gone

	backslash atomic.Bool // standard_conforming_strings is off
	wish      atomic.Bool // the client wants its transactions read only
	fenced    atomic.Bool // the transaction in progress is read only for lack of quorum

	mu        sync.Mutex
	changed   sync.Cond // of the fields below
	queue     []reply
	head      int
	status    byte      // of the last ReadyForQuery
	skipping  bool      // after an error the server ignores everything until Sync, and none has been sent
	failed    bool      // an error was relayed since the client loop last cleared this
	broken    bool      // … since the client last saw ReadyForQuery
	ended     bool      // one of the loops has ended
	stopping  bool      // the session ends when its transaction does
	phase     phase     // of the commit or rollback in progress
	commit    Commit    // in phase deciding
	through   bool      // letThrough has written its COMMIT
	txns      uint64    // transactions that have ended
	txnEnded  time.Time // when the last of them did, or the session began
	cancels   int       // cancel requests on their way to the server
	copying   bool      // the server waits for CopyData
	evicting  bool      // an evict goroutine is at work
	evictNext txn.CSN   // for which entry it is to look at the session (again); 0: for none
	evictTxns uint64    // txns when that was asked: a later transaction is innocent
	evictor   txn.CSN
	evicted   bool      // the transaction in progress must go, and its client has not been told
	undone    bool      // evict has rolled back what was waiting for its verdict
	hurried   bool      // evict has set a deadline on writes to the client
	cleared   bool      // evict has rolled the block back and left a failed one in its place
	poison    *sqlError // what the next error in this failed block is to say

	// Of the server loop.
	streaming  bool // the reply at the head of the queue is relayed whatever comes
	unlocked   bool // the server says that default_transaction_read_only is off
	fatal      bool // the client has been told that the session ends
	flushFn    func() error
	flushSrvFn func() error
	throughFn  func(txn.GID)

	// Of the client loop.
	mode     mode
	base     txn.CSN
	baseSet  bool
	gid      txn.GID // of the block, if the client has asked for it
	deferred bool    // the client's BEGIN has been answered and goes to the server with what follows it
	// beginning: a Query went with the deferred BEGIN, so the next has to wait: of several that the server ignores
	// because BEGIN has failed, only the first would be answered.
	beginning  bool
	stmts      []sqllex.Statement
	statements map[string]*statement
	portals    map[string]*statement
	unit       unit // of the server loop while it is in the queue
	commitOp   commitOp
	opaque     atomic.Bool // the client has sent an opaque statement
	holding    bool        // the messages of an extended-protocol batch outside a block are being gathered in unit
	inBatch    bool        // extended-protocol messages came since the last Sync
	sent       bool        // some of them went to the server
	readOnly   bool        // the unit is to be read only
	executes   int         // Execute messages in the gathered batch
	wrapBatch  bool        // the gathered batch writes
	discarding bool        // ignore everything until Sync, as the server does after an error
	settleNext bool
	held       heldCommit
	after      afterEffect
	wishBefore bool     // at the beginning of the block
	informed   []string // settings that tell the last statement outside a block what it asks for
}

// mode is what the client loop knows of the transaction.
type mode uint8

const (
	modeIdle  mode = iota // outside a block
	modeBlock             // in a block of the client's
	modeWrap              // in a block the client does not know of
)

// phase of a commit; Evict acts by it.
type phase uint8

const (
	phaseNone     phase = iota
	phaseReady          // the ready statement, or a nudge, is running
	phaseDeciding       // the server waits for COMMIT or ROLLBACK
	phaseEnding         // COMMIT or ROLLBACK is on its way: it must not be cancelled
)

// what ends a reply.
const (
	untilReady    = 'Q' // a simple query: ReadyForQuery
	untilSync     = 'S' // ReadyForQuery too, but an error ends everything in front of it
	untilParse    = '1'
	untilBind     = '2'
	untilClose    = '3'
	untilDescribe = 'D'
	untilExecute  = 'E'
	untilCount    = 'n' // that many messages
	opBegin       = 'N' // the server loop awaits the end of a deferred BEGIN
	opUnit        = 'U' // … conducts a unit
	opCommit      = 'X' // … or a commit
	opEvict       = 'V' // … or the end of an evicted transaction
)

// reply is an expected reply.
type reply struct {
	until   byte
	hidden  bool // not for the client
	noReady bool // of a simple query: ReadyForQuery is not for the client
	// quiet: the warning that a transaction is already in progress is not for the client, who is to think that it
	// begins here.
	quiet bool
	count int
	subst *sqlError  // what to say instead of the server's error
	stmt  *statement // of Parse: learns whether it went well
	shift int        // characters by which the statement was moved
}

// statement is what is known of a prepared statement.
type statement struct {
	sqllex.Statement
	gids   []txn.GID // in a text that asks for outcomes
	effect afterEffect
	closed bool       // the client has closed the name: it may stand for something new
	state  parseState // under session.mu
}

type parseState uint8

const (
	parsePending parseState = iota
	parseDone
	parseFailed
)

// afterEffect is what a statement changes in the gateway if the server accepts it.
type afterEffect struct {
	kind    sqllex.Kind // 0: nothing
	wish    bool
	setWish bool
	all     bool
	name    string
}

// heldCommit is a COMMIT in the extended protocol before its Execute has come.
type heldCommit struct {
	msg     []byte // Parse of the unnamed statement, Bind, Describe
	replies []reply
	bound   bool
}

func newSession(g *Gateway, client, server net.Conn) *session {
	s := &session{
		g: g, log: g.log, ctx: g.ctx, client: client,
		cli: newReader(client, g.cfg.MaxMessage), srv: newReader(server, 1<<31-1),
		toServer: writer{conn: server}, toClient: writer{conn: client},
		status:     'I',
		txnEnded:   time.Now(),
		statements: make(map[string]*statement),
		portals:    make(map[string]*statement),
	}
	s.changed.L = &s.mu
	s.flushFn, s.flushSrvFn, s.throughFn = s.flushClient, s.flushServer, s.letThrough
	return s
}

// errTerminate: the client said goodbye.
var errTerminate = errors.New("client terminated")

// errSessionOver: the client has been told that its session ends.
var errSessionOver = errors.New("session is over")

// run relays until either side is gone.
func (s *session) run() {
	serverDone := make(chan struct{})
	go func() {
		defer close(serverDone)
		err := s.serverLoop()
		s.endByServer(err)
	}()
	err := s.clientLoop()
	s.endByClient(err)
	<-serverDone
	_ = s.client.Close()                  // not before both have said their last words
	if c := s.commitOp.commit; c != nil { // begun when the server loop had ended already: nobody has conducted it
		c.Lost()
		c.Close()
	}
	s.mu.Lock()
	for s.evicting || s.cancels > 0 {
		s.changed.Wait()
	}
	s.mu.Unlock()
	s.log.Debug("session ended", logkey.Error, err)
}

// endByClient ends the session when the client is gone. A commit that is being decided is not disturbed: its outcome
// does not depend on the client any more, and the order behind it waits for it.
func (s *session) endByClient(err error) {
	s.mu.Lock()
	s.stopping = true
	for s.phase != phaseNone && !s.ended {
		s.changed.Wait()
	}
	busy := s.head < len(s.queue) && !s.ended
	stopped := s.ctx.Err() != nil && !s.fatal && !s.ended
	s.fatal = s.fatal || stopped
	s.ended = true
	s.changed.Broadcast()
	s.mu.Unlock()
	if p := (*protocolError)(nil); errors.As(err, &p) {
		s.emit((&sqlError{severity: "FATAL", code: codeProtocol, message: p.what}).append(nil))
		s.g.metrics.refused.WithLabelValues(codeProtocol).Inc()
	} else if stopped {
		s.emit(errShutdown.append(nil))
	}
	s.cmu.Lock()
	_ = s.toClient.conn.SetWriteDeadline(time.Now().Add(time.Second)) // it is going away
	_ = s.toClient.flush()
	s.cmu.Unlock()
	if busy {
		s.sendCancel() // a server notices a closed connection only when it next reads or writes
	} else if errors.Is(err, errTerminate) || errors.Is(err, io.EOF) {
		s.wmu.Lock()
		_ = s.toServer.conn.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = s.toServer.conn.Write([]byte{'X', 0, 0, 0, 4}) // only to spare the server's log a line
		s.wmu.Unlock()
	}
	_ = s.toServer.conn.Close() // ends the server loop
}

// endByServer ends the session when the server is gone or the server loop has had the last word.
func (s *session) endByServer(err error) {
	s.mu.Lock()
	told := s.ended || s.fatal
	stopping := s.stopping
	s.ended = true
	s.changed.Broadcast()
	s.mu.Unlock()
	if !told {
		e := errServerLost
		if stopping {
			e = errShutdown
		} else {
			s.log.Info("server connection lost", logkey.Error, err)
		}
		s.emit(e.append(nil))
	}
	s.cmu.Lock()
	_ = s.client.SetWriteDeadline(time.Now().Add(time.Second))
	_ = s.toClient.flush() // the last thing it hears; it may be gone
	s.cmu.Unlock()
	_ = s.toServer.conn.Close()
	_ = s.client.SetReadDeadline(time.Unix(1, 0)) // ends the client loop
}

// drain ends the session at the end of its transaction, or now if it has none.
func (s *session) drain() {
	s.mu.Lock()
	s.stopping = true
	idle := s.status == 'I' && s.head == len(s.queue) && s.phase == phaseNone
	s.mu.Unlock()
	if idle {
		_ = s.toServer.conn.SetReadDeadline(time.Unix(1, 0)) // wakes the server loop, which ends the session
	}
}

// loseServer ends the session as a lost server connection would.
func (s *session) loseServer() { _ = s.toServer.conn.SetDeadline(time.Unix(1, 0)) }

// stop ends the session now.
func (s *session) stop() {
	s.mu.Lock()
	s.stopping = true
	s.mu.Unlock()
	_ = s.client.SetReadDeadline(time.Unix(1, 0))
	_ = s.client.SetWriteDeadline(time.Now().Add(time.Second))
	_ = s.toServer.conn.SetDeadline(time.Unix(1, 0))
}

// flushClient writes out what is for the client. A client that does not read while its transaction must make way is
// doomed: what it does not take stays in the buffer, and rows are dropped until the transaction is gone.
func (s *session) flushClient() error {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	return s.flushClientLocked()
}

func (s *session) flushClientLocked() error {
	if s.doomed {
		return nil
	}
	err := s.toClient.flush()
	if err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		s.mu.Lock()
		hurried, evicted := s.hurried && !s.stopping, s.evicted
		s.hurried = false
		s.mu.Unlock()
		if hurried {
			// The deadline says that somebody is in a hurry, not that the client does not read: it may have passed
			// before there was anything to write.
			_ = s.client.SetWriteDeadline(time.Now().Add(evictRetry))
			err = s.toClient.flush()
			_ = s.client.SetWriteDeadline(time.Time{})
			if errors.Is(err, os.ErrDeadlineExceeded) {
				if evicted {
					s.doomed = true
					return nil
				}
				err = s.toClient.flush()
			}
		}
	}
	if err != nil && !s.gone {
		// The client is gone. Ending the session is the client loop's, which waits for a commit in progress; until then
		// the server loop goes on, for nobody.
		s.gone = true
		s.log.Debug("write to client", logkey.Error, err)
		_ = s.client.SetReadDeadline(time.Unix(1, 0))
	}
	if s.gone {
		s.toClient.buf = s.toClient.buf[:0]
	}
	return nil
}

func (s *session) flushServer() error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	return s.flushServerLocked()
}

func (s *session) flushServerLocked() error {
	if err := s.toServer.flush(); err != nil {
		return fmt.Errorf("write to server: %w", err)
	}
	return nil
}

// emit appends bytes for the client; they are written with the next flush.
func (s *session) emit(b []byte) {
	s.cmu.Lock()
	s.toClient.buf = append(s.toClient.buf, b...)
	s.cmu.Unlock()
}

// tellReady appends bytes for the client, and ReadyForQuery, and writes them. Only the client loop uses it, and only when
// nothing is expected from the server.
func (s *session) tellReady(b []byte, status byte) error {
	s.cmu.Lock()
	s.toClient.buf = append(s.toClient.buf, b...)
	s.appendReadyLocked(status)
	s.cmu.Unlock()
	return s.flushClient()
}

// push adds an expected reply, unless the server ignores its request. Call before the request is sent.
func (s *session) push(r reply) {
	s.mu.Lock()
	s.pushLocked(r)
	s.mu.Unlock()
}

func (s *session) pushLocked(r reply) {
	if s.skipping {
		if r.until != untilSync {
			if r.stmt != nil {
				r.stmt.state = parseFailed
			}
			return
		}
		s.skipping = false
	}
	s.awaitCancelsLocked()
	s.queue = append(s.queue, r)
}

// awaitCancelsLocked waits, before anything is sent to a server that has answered everything, for cancel requests on their
// way: they were meant for what has ended.
func (s *session) awaitCancelsLocked() {
	for s.cancels > 0 && s.head == len(s.queue) && !s.ended {
		s.changed.Wait()
	}
}

// front returns the reply at the head of the queue.
func (s *session) front() (reply, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.head == len(s.queue) {
		return reply{}, false
	}
	return s.queue[s.head], true
}

func (s *session) popLocked() {
	s.streaming = false
	s.queue[s.head] = reply{}
	s.head++
	if s.head == len(s.queue) {
		s.queue, s.head = s.queue[:0], 0
		s.changed.Broadcast()
	} else if s.head >= 1024 && s.head*2 >= len(s.queue) {
		s.queue = s.queue[:copy(s.queue, s.queue[s.head:])]
		s.head = 0
	}
}

// send appends bytes to what goes to the server. They are written when the client loop has nothing more to read.
func (s *session) send(b ...[]byte) error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	for _, p := range b {
		s.toServer.buf = append(s.toServer.buf, p...)
	}
	if len(s.toServer.buf) > writeBuffer {
		return s.flushServerLocked()
	}
	return nil
}

// forward sends a message of the client's, streaming it if it is large.
func (s *session) forward(m message) error {
	if m.rest == 0 {
		return s.send(m.data)
	}
	s.wmu.Lock() // through the whole message: nothing may come between its parts
	defer s.wmu.Unlock()
	s.toServer.buf = append(s.toServer.buf, m.data...)
	if err := s.flushServerLocked(); err != nil {
		return err
	}
	return s.cli.relayRest(&m, func(b []byte) error {
		if _, err := s.toServer.conn.Write(b); err != nil {
			return fmt.Errorf("write to server: %w", err)
		}
		return nil
	})
}

var errEnded = errors.New("the other side of the session has ended")

// settle waits until every reply has arrived. Inside a batch it sends a hidden Sync first, which changes nothing in
// a transaction block but tells the true status; outside a block it must not be used inside a batch.
func (s *session) settle() error {
	if s.inBatch && s.sent {
		s.push(reply{until: untilSync, hidden: true})
		if err := s.send([]byte{'S', 0, 0, 0, 4}); err != nil {
			return err
		}
		s.sent = false
	}
	if r, ok := s.front(); ok && r.until == opBegin { // the server would answer it with what follows
		if err := s.send([]byte{'H', 0, 0, 0, 4}); err != nil {
			return err
		}
	}
	if err := s.flushServer(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.head < len(s.queue) && !s.ended {
		s.changed.Wait()
	}
	if s.ended {
		return errEnded
	}
	s.settleNext = false
	return nil
}
