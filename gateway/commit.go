package gateway

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
)

// The hidden statements. They are prepared once per session, under names that no client uses, and run in the extended
// protocol, which leaves the client's unnamed statement alone.
const (
	stBegin       = "quorate_begin"
	stUnlock      = "quorate_unlock"
	stConstraints = "quorate_constraints"
	stReady       = "quorate_ready"
	stReadOnly    = "quorate_readonly"
	stCommit      = "quorate_commit"
	stChain       = "quorate_chain"
	stReadWrite   = "quorate_readwrite"
	stRollback    = "quorate_rollback"
)

// readySQL makes a transaction ready to be decided. CASE fixes the order of evaluation: what comes first are the
// guards that no lexer can replace, because a function may have set anything; the seal; the settings by which the
// server would end or delay the transaction on its own while it waits for its verdict; and last the marker, because
// capture acts as soon as it sees that. Settings that are right are left alone: setting one costs several microseconds,
// here and again at COMMIT, when it is set back. Everything is named with its schema: the client's search_path applies.
//
// Without a transaction id nothing was written; the transaction is then made read only, because COMMIT still runs the
// query of a WITH HOLD cursor. Without a seal nothing that was written can be committed.
//
// The guard against shared writes has a statement of its own: even where it is not evaluated, the server prepares its dozens of
// function calls for every execution, which costs 45 µs, a tenth of a small transaction.
func readySQL(guardShared bool) string {
	var shared string
	if guardShared {
		shared = "\nWHEN " + sharedWrites() + " THEN pg_catalog.concat('shared', pg_catalog.pg_stat_force_next_flush())"
	}
	return `SELECT CASE
WHEN pg_catalog.pg_current_xact_id_if_assigned() IS NULL THEN
 pg_catalog.concat('none ', pg_catalog.current_setting('transaction_read_only'), pg_catalog."left"(pg_catalog.set_config('transaction_read_only', 'on', true), 0))
WHEN $1::pg_catalog.text OPERATOR(pg_catalog.=) '' THEN 'quorum'
WHEN pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.=) 'serializable' THEN 'serializable'
WHEN pg_catalog.current_setting('session_replication_role') OPERATOR(pg_catalog.<>) 'origin' THEN 'replica'` + shared + `
WHEN pg_catalog.pg_logical_emit_message(true, 'quorate.seal', $1) IS NULL THEN NULL
WHEN CASE WHEN pg_catalog.current_setting('statement_timeout') OPERATOR(pg_catalog.<>) '0' THEN pg_catalog.set_config('statement_timeout', '0', true) IS NULL END THEN NULL
WHEN CASE WHEN pg_catalog.current_setting('idle_in_transaction_session_timeout') OPERATOR(pg_catalog.<>) '0' THEN pg_catalog.set_config('idle_in_transaction_session_timeout', '0', true) IS NULL END THEN NULL
WHEN CASE WHEN pg_catalog.current_setting('transaction_timeout') OPERATOR(pg_catalog.<>) '0' THEN pg_catalog.set_config('transaction_timeout', '0', true) IS NULL END THEN NULL
WHEN pg_catalog.set_config('synchronous_commit', 'off', true) IS NULL THEN NULL
WHEN pg_catalog.pg_logical_emit_message(false, 'quorate.marker', pg_catalog.concat($1, ' ', pg_catalog.pg_current_xact_id_if_assigned(), ' ', $2::pg_catalog.text), true) IS NULL THEN NULL
ELSE pg_catalog.concat(pg_catalog.pg_current_xact_id_if_assigned(), ' ', pg_catalog.current_setting('transaction_read_only'))
END`
}

// unreplicated are the oids of the catalogs whose changes neither event triggers nor logical decoding see: roles, their members and
// settings, databases, tablespaces, parameters' rights, comments and labels on all those; subscriptions; event triggers; large
// objects. The lexer refuses what it recognizes; a function, or DO, may change them all the same.
var unreplicated = [...]int{1260, 1261, 2964, 1262, 1213, 6243, 2396, 3592, 6100, 3466, 2613, 2995}

// sharedWrites is an expression: the transaction has changed one of those. The server counts rows for its statistics, and may
// still count those of a transaction that was rolled back just before; so the counts are given away when one is refused. It costs
// 0.15 ms, as much as a third of a small transaction, so only sessions pay that have sent an opaque statement.
func sharedWrites() string {
	var counts []string
	for _, oid := range unreplicated {
		for _, what := range [...]string{"inserted", "updated", "deleted"} {
			counts = append(counts, fmt.Sprintf("pg_catalog.pg_stat_get_xact_tuples_%s(%d)", what, oid))
		}
	}
	return strings.Join(counts, " OPERATOR(pg_catalog.+) ") + " OPERATOR(pg_catalog.>) 0"
}

var hiddenStatements = [...]struct{ name, sql string }{
	{stBegin, "BEGIN READ WRITE"},
	{stUnlock, "SET LOCAL default_transaction_read_only = off"},
	{stConstraints, "SET CONSTRAINTS ALL IMMEDIATE"},
	{stReadOnly, "SET LOCAL transaction_read_only = on"},
	{stCommit, "COMMIT"},
	{stChain, "COMMIT AND CHAIN"},
	{stReadWrite, "SET TRANSACTION READ WRITE"},
	{stRollback, "ROLLBACK"},
}

// prepareHidden prepares them, but for the ready statement: that takes a snapshot, which must not come before BEGIN
// has fixed the access mode. Each is closed first, because after a DEALLOCATE ALL that failed they still exist.
var prepareHidden = func() (b []byte) {
	for _, h := range hiddenStatements {
		b = appendParse(appendClose(b, 'S', h.name), h.name, h.sql)
	}
	return b
}()

// The two forms of the ready statement have one name: preparing one replaces the other.
var (
	prepareReady   = appendParse(appendClose(nil, 'S', stReady), stReady, readySQL(false))
	prepareGuarded = appendParse(appendClose(nil, 'S', stReady), stReady, readySQL(true))
)

// appendRun appends the execution of a hidden statement, which is answered by BindComplete and CommandComplete. The
// portal goes away with the transaction; a statement that may run twice in one needs appendHidden.
func appendRun(b []byte, name string, params ...string) []byte {
	return appendExecute(appendBind(b, name, name, params...), name)
}

var (
	runBegin  = appendRun(nil, stBegin)
	runUnlock = appendRun(nil, stUnlock)
	// with a portal of its own, because COMMIT may use the other
	runReadOnly = appendExecute(appendBind(nil, "quorate_fenced", stReadOnly), "quorate_fenced")
	runRollback = appendSync(appendRun(nil, stRollback))
)

// appendHidden appends a statement that is needed too seldom to be kept prepared.
func appendHidden(b []byte, sql string, params ...string) []byte {
	const name = "quorate_once"
	b = appendParse(appendClose(b, 'S', name), name, sql)
	b = appendRun(b, name, params...)
	return appendClose(b, 'P', name)
}

// ensurePrepared appends the hidden statements if need be and returns how many replies they bring. Call with wmu held.
func (s *session) ensurePrepared() int {
	if s.prepared {
		return 0
	}
	s.prepared, s.preparedReady = true, nil
	s.toServer.buf = append(s.toServer.buf, prepareHidden...)
	return 2 * len(hiddenStatements)
}

// appendBegin appends the beginning of a hidden block and returns the number of replies to it. Call with wmu held.
func (s *session) appendBegin(unlock bool) int {
	n := s.ensurePrepared() + 2
	s.toServer.buf = append(s.toServer.buf, runBegin...)
	if unlock {
		s.toServer.buf = append(s.toServer.buf, runUnlock...)
		n += 2
	}
	return n
}

// commitEnd is how the client is told of a commit's end.
type commitEnd uint8

const (
	endQuery   commitEnd = iota // CommandComplete and ReadyForQuery
	endPiece                    // CommandComplete
	endSilent                   // ReadyForQuery
	endUnit                     // the unit's CommandComplete, held back, and ReadyForQuery
	endExecute                  // by the replies to the client's own messages
)

// commitOp is a COMMIT that is held back. The server loop conducts it while it stands in the queue.
type commitOp struct {
	end      commitEnd
	chain    bool
	start    time.Time
	held     []byte // endExecute: the client's messages from Parse or Bind up to Execute
	synced   bool   // endExecute: the client's Sync came with them
	commit   Commit
	rollback bool      // only roll back, and tell the client err
	err      *sqlError // may be nil
	base     txn.CSN
	gid      txn.GID // reserved, or zero
	xid      bool    // the transaction has a transaction id
	ordered  bool    // it has its place in the order
	restore  bool    // AND CHAIN: what is chained must be read write again
	marked   bool    // the marker may have been written
}

// startCommit begins the commit of the block. Only the client loop calls it, when nothing is outstanding and the
// server's status is 'T'.
func (s *session) startCommit(op commitOp) error {
	op.start = time.Now()
	s.noteBase()
	base := s.base
	op.gid = s.gid
	s.leaveBlock(op.chain)
	s.commitOp = op
	s.mu.Lock()
	s.awaitCancelsLocked()
	if s.ended {
		s.mu.Unlock()
		return errEnded
	}
	s.phase, s.skipping = phaseReady, false // what is sent ends with Sync
	s.queue = append(s.queue, reply{until: opCommit})
	s.mu.Unlock()
	return s.sendReady(&s.commitOp, base)
}

// startRollback ends a block or a hidden one that cannot be committed and tells the client e, if it is not nil.
func (s *session) startRollback(op commitOp, e *sqlError) error {
	op.rollback, op.err, op.start = true, e, time.Now()
	s.leaveBlock(false)
	s.commitOp = op
	s.mu.Lock()
	s.skipping = false // what is sent ends with Sync
	s.queue = append(s.queue, reply{until: opCommit})
	s.endingLocked()
	s.mu.Unlock()
	return s.sendRollback()
}

func (s *session) leaveBlock(chain bool) {
	s.mode, s.baseSet, s.gid, s.settleNext = modeIdle, false, txn.GID{}, true
	if chain {
		s.mode = modeBlock
	}
}

func (s *session) sendRollback() error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	s.ensurePrepared() // the replies are swallowed up to ReadyForQuery
	s.toServer.buf = append(s.toServer.buf, runRollback...)
	return s.flushServerLocked()
}

// sendReady registers the commit and sends the ready statement; or, if it cannot be registered, ROLLBACK. Without
// quorum there is nothing to register: the ready statement says whether that matters.
func (s *session) sendReady(op *commitOp, base txn.CSN) error {
	if s.g.access() != ReadWrite {
		return s.sendReadyStatement(op)
	}
	c, err := s.g.cfg.Coordinator.Begin(s.ctx, op.gid, base, s.pid)
	if err != nil {
		op.rollback = true
		switch {
		case errors.Is(err, txn.ErrNoQuorum):
			op.err = errNoQuorum
		case errors.Is(err, txn.ErrClosed):
			op.err = errShutdown
		default:
			op.err = &sqlError{code: codeSerialization, message: "cannot commit: " + err.Error(), hint: retryHint}
		}
		s.g.metrics.aborts.WithLabelValues(txn.AbortNoQuorum.String()).Inc()
		return s.sendRollback()
	}
	op.commit, op.base = c, base
	c.OnRelease(s.throughFn)
	return s.sendReadyStatement(op)
}

func (s *session) sendReadyStatement(op *commitOp) error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	s.ensurePrepared()
	ready := &prepareReady
	if s.opaque.Load() {
		ready = &prepareGuarded
	}
	if s.preparedReady != ready {
		s.preparedReady = ready
		s.toServer.buf = append(s.toServer.buf, *ready...)
	}
	b := appendRun(s.toServer.buf, stConstraints)
	s.toServer.buf = appendSync(appendReadyStatement(b, op))
	return s.flushServerLocked()
}

// noteOpaque looks at the statements that the client has just sent. What is prepared may be executed in any later transaction.
func (s *session) noteOpaque() {
	for i := range s.stmts {
		if s.stmts[i].Opaque {
			s.opaque.Store(true)
		}
	}
}

// appendReadyStatement appends the ready statement's execution; without seal and marker if nothing was registered.
func appendReadyStatement(b []byte, op *commitOp) []byte {
	var seal, snapshot string
	if op.commit != nil {
		var number [42]byte
		at := strconv.AppendUint(number[:0], uint64(op.base), 10)
		at = strconv.AppendUint(append(at, ' '), uint64(op.commit.Seen()), 10)
		seal, snapshot = op.commit.Seal().String(), string(at)
	}
	return appendRun(b, stReady, seal, snapshot)
}

// conductCommit leads a commit to its end. m is the first message of the server's answer to what startCommit,
// startRollback or unitReady sent.
func (s *session) conductCommit(m message) error {
	op := &s.commitOp
	defer func() {
		if op.commit != nil {
			op.commit.Close()
		}
		op.commit, op.held = nil, op.held[:0]
	}()
	if op.rollback {
		if err := s.rolledBack(m); err != nil {
			return err
		}
		return s.commitFailed(op, op.err, nil)
	}
	value, failure, err := s.readReady(op, m)
	if err != nil {
		return s.connectionLost(op, err)
	}
	s.g.metrics.marker.Observe(time.Since(op.start).Seconds())
	if failure != nil {
		return s.readyFailed(op, failure)
	}
	switch string(value) {
	case "quorum":
		s.g.metrics.aborts.WithLabelValues(txn.AbortNoQuorum.String()).Inc()
		return s.abort(op, errNoQuorum)
	case "serializable":
		return s.abort(op, errIsolation)
	case "replica":
		return s.abort(op, errReplicaRole)
	case "shared":
		return s.abort(op, errShared)
	}
	prior, readOnly, _ := bytes.Cut(value, []byte{' '})
	op.xid = string(prior) != "none"
	op.restore = op.chain && string(readOnly) == "off"
	if !op.xid {
		s.ending()
		return s.release(op)
	}
	return s.decide(op)
}

// decide follows the coordinator's steps.
func (s *session) decide(op *commitOp) error {
	for {
		if s.deciding(op) { // evicted while the ready statement ran
			if err := s.rollBack(); err != nil {
				return s.connectionLost(op, err)
			}
			op.commit.Lost()
		}
		ev, err := op.commit.Next(s.ctx)
		undone, through := s.decided()
		if undone { // Evict has sent ROLLBACK; its answer comes first
			if err := s.rolledBack(message{}); err != nil {
				return s.connectionLost(op, err)
			}
		}
		if err != nil {
			s.log.Warn("commit undecided", logkey.GID, op.commit.GID().String(), logkey.Error, err)
			return s.finish(unknownError(op.commit.GID()))
		}
		switch ev.Step {
		case txn.StepNudge:
			if s.rolledBackAlready() {
				continue // it was said before, and there is nothing left to decode
			}
			failure, err := s.nudge(op)
			if err != nil {
				return s.connectionLost(op, err)
			}
			if failure != nil {
				return s.readyFailed(op, failure)
			}
		case txn.StepLocal, txn.StepRelease:
			op.ordered = ev.Step == txn.StepRelease
			if through {
				return s.readCommitted(op)
			}
			if !s.mayRelease() {
				continue // Evict came between: what follows is the word on a lost transaction
			}
			return s.release(op)
		case txn.StepAbort:
			return s.aborted(op, ev)
		case txn.StepVisible:
			return s.visible(op)
		case txn.StepUnknown:
			return s.finish(unknownError(op.commit.GID()))
		default:
			return s.finish(unknownError(op.commit.GID()))
		}
	}
}

// deciding marks the commit as waiting. From here on Evict rolls the transaction back by itself. It reports whether
// an eviction came before.
func (s *session) deciding(op *commitOp) (evicted bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.evicted && !s.undone {
		s.undone = true
		return true
	}
	if !s.undone {
		s.phase, s.commit = phaseDeciding, op.commit
	}
	return false
}

// decided ends the wait and reports what has happened during it: Evict has rolled the transaction back, or letThrough has
// written COMMIT.
func (s *session) decided() (undone, through bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	undone, through = s.undone && s.phase == phaseDeciding, s.through
	if !through {
		s.phase = phaseReady
	}
	s.commit, s.through = nil, false
	return undone, through
}

// rolledBackAlready reports whether the transaction was evicted, in whatever phase of its commit.
func (s *session) rolledBackAlready() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.undone
}

// mayRelease marks COMMIT as on its way, unless the transaction has been rolled back. A cancel request that is on
// its way must not meet COMMIT, so it is waited for.
func (s *session) mayRelease() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.undone {
		return false
	}
	s.endingLocked()
	return true
}

// ending says that COMMIT or ROLLBACK follows, which must not be cancelled: it waits for requests on their way.
func (s *session) ending() {
	s.mu.Lock()
	s.endingLocked()
	s.mu.Unlock()
}

func (s *session) endingLocked() {
	s.phase = phaseEnding
	for s.cancels > 0 {
		s.changed.Wait()
	}
}

// readReady reads the answers to the ready statement and returns its value, or the server's ErrorResponse.
func (s *session) readReady(op *commitOp, m message) (value, failure []byte, err error) {
	binds := 0
	for {
		if m.typ == 0 {
			if m, err = s.receive(); err != nil {
				return nil, nil, err
			}
		}
		if m, err = s.srv.whole(m); err != nil {
			return nil, nil, err
		}
		switch m.typ {
		case '2':
			binds++
			op.marked = op.marked || binds > 1 && op.commit != nil
		case 'D':
			// Two bytes number of columns, four bytes length.
			if body := m.body(); len(body) >= 6 {
				value = append([]byte(nil), body[6:]...)
			}
		case 'E':
			if failure == nil {
				failure = append([]byte(nil), m.data...)
			}
		case 'Z':
			if failure == nil && len(value) == 0 {
				return nil, nil, errors.New("the ready statement has returned nothing")
			}
			return value, failure, nil
		}
		m = message{}
	}
}

// readyFailed ends a commit whose ready statement failed: a deferred constraint, most often.
func (s *session) readyFailed(op *commitOp, failure []byte) error {
	s.wmu.Lock()
	s.preparedReady = nil // it may have failed before the other form was replaced
	s.wmu.Unlock()
	if err := s.rollBack(); err != nil {
		return s.connectionLost(op, err)
	}
	if op.marked {
		// The error may have come after the marker. Then the log may have it already, and has the last word.
		switch s.lost(op).Step {
		case txn.StepUnknown:
			return s.finish(unknownError(op.commit.GID()))
		case txn.StepVisible:
			return s.visible(op)
		}
	}
	var subst *sqlError
	if string(errorField(failure[5:], 'C')) == codeNoStatement {
		s.forgetPrepared()
		subst = errForgotten
	}
	if e := s.errorFor(message{data: failure}, subst); e != nil {
		return s.commitFailed(op, e, nil)
	}
	return s.commitFailed(op, nil, failure)
}

// aborted ends a commit that was decided against. The rollback is not queued behind anything.
func (s *session) aborted(op *commitOp, ev txn.Event) error {
	e := abortError(ev)
	reason := ev.Reason
	s.mu.Lock()
	if s.evicted {
		e, reason = evictedError(s.evictor), txn.AbortEvicted
	}
	undone := s.undone
	s.mu.Unlock()
	s.g.metrics.aborts.WithLabelValues(reason.String()).Inc()
	if !undone {
		return s.abort(op, e)
	}
	return s.commitFailed(op, e, nil)
}

// abort rolls back and tells the client why.
func (s *session) abort(op *commitOp, e *sqlError) error {
	if err := s.rollBack(); err != nil {
		s.emit(e.append(nil)) // the server is gone, and the transaction with it
		return err
	}
	return s.commitFailed(op, e, nil)
}

// rollBack rolls the transaction back, unseen by the client.
func (s *session) rollBack() error {
	s.ending()
	if err := s.sendRollback(); err != nil {
		return err
	}
	return s.rolledBack(message{})
}

// rolledBack reads the answer to a ROLLBACK, of which m may be the first message. If it failed (a cancel request that
// was meant for an earlier statement may hit it), it is done another way.
func (s *session) rolledBack(m message) error {
	_, failure, err := s.swallow(m)
	if err == nil && failure != nil {
		err = s.rollBackPlainly()
	}
	return err
}

// rollBackPlainly is for when a function has taken the hidden statements away (DEALLOCATE ALL).
func (s *session) rollBackPlainly() error {
	s.forgetPrepared()
	if err := s.write(appendQuery(nil, "ROLLBACK")); err != nil {
		return err
	}
	status, _, err := s.swallow(message{})
	if err == nil && status != 'I' {
		err = errors.New("the server does not roll back")
	}
	return err
}

func (s *session) forgetPrepared() {
	s.wmu.Lock()
	s.prepared = false
	s.wmu.Unlock()
}

// visible ends a commit whose transaction was rolled back here and applied from the log.
func (s *session) visible(op *commitOp) error {
	s.g.metrics.commits.Inc()
	// A driver takes an error before ReadyForQuery for the failure of the COMMIT, and would run the transaction again.
	// So the COMMIT is answered in full, and the session ends after it.
	var b []byte
	ready := true
	switch op.end {
	case endUnit:
		b = append(b, s.unit.completed...)
	case endQuery:
		b = appendComplete(b, "COMMIT")
	case endPiece:
		b, ready = appendComplete(b, "COMMIT"), false
	case endExecute:
		b, ready = appendAnswers(b, op.held, "COMMIT"), op.synced
	}
	if ready {
		b = appendReady(b, 'I')
	}
	s.emit(b)
	return s.finish(visibleError(op.commit.GID()))
}

// connectionLost ends a commit whose server connection failed. What was marked may be, or become, committed.
func (s *session) connectionLost(op *commitOp, cause error) error {
	if op.commit == nil || op.rollback {
		return cause
	}
	s.log.Warn("server connection lost during commit", logkey.GID, op.commit.GID().String(), logkey.Error, cause)
	s.decided()
	var err error
	switch ev := s.lost(op); ev.Step {
	case txn.StepUnknown:
		err = s.finish(unknownError(op.commit.GID()))
	case txn.StepVisible:
		err = s.visible(op)
	default:
		s.g.metrics.aborts.WithLabelValues(ev.Reason.String()).Inc()
		s.emit(abortError(ev).append(nil))
		err = s.finish(errServerLost)
	}
	op.commit.Close()
	op.commit = nil
	return err
}

// lost reports the local transaction as lost and waits for the last word: StepAbort, StepVisible or StepUnknown.
// Steps that were said before the loss are passed over.
func (s *session) lost(op *commitOp) txn.Event {
	op.commit.Lost()
	for {
		ev, err := op.commit.Next(s.ctx)
		switch {
		case err != nil:
			return txn.Event{Step: txn.StepUnknown}
		case ev.Step == txn.StepAbort || ev.Step == txn.StepVisible || ev.Step == txn.StepUnknown:
			return ev
		}
	}
}

// nudge makes the server decode what it holds back, and runs the ready statement again. The change of the nudge table
// does it; it is undone, and never replicated.
func (s *session) nudge(op *commitOp) (failure []byte, err error) {
	var b []byte
	for _, sql := range [...]string{
		"SAVEPOINT quorate_nudge",
		"INSERT INTO quorate.nudge DEFAULT VALUES",
		"ROLLBACK TO SAVEPOINT quorate_nudge",
		"RELEASE SAVEPOINT quorate_nudge",
	} {
		b = appendHidden(b, sql)
	}
	b = appendClose(b, 'P', stReady)
	if err := s.write(appendSync(appendReadyStatement(b, op))); err != nil {
		return nil, err
	}
	op.marked = true
	_, failure, err = s.readReady(op, message{})
	return failure, err
}

// maxThrough is how much letThrough writes, in bytes of the client's: with more, and a server that answers each of many
// messages, the write could block while nobody reads, and with it all that others wait for.
const maxThrough = 4096

// letThrough writes COMMIT on the goroutine of whoever was before this transaction in the order, if the session waits for just
// that. Otherwise the session does it itself when it hears of the release.
func (s *session) letThrough(gid txn.GID) {
	if !s.wmu.TryLock() {
		return
	}
	defer s.wmu.Unlock()
	s.mu.Lock()
	waits := s.phase == phaseDeciding && s.commit.GID() == gid && !s.undone && s.cancels == 0 && len(s.commitOp.held) <= maxThrough
	if waits {
		s.phase, s.through = phaseEnding, true
		s.appendCommitLocked(&s.commitOp) // under mu: the session may be about to hear something else, and to end the commit
	}
	s.mu.Unlock()
	if waits {
		_ = s.flushServerLocked() // the session meets the error too, when it reads
	}
}

// release lets COMMIT through and tells the client what the server says.
func (s *session) release(op *commitOp) error {
	s.wmu.Lock()
	s.appendCommitLocked(op)
	err := s.flushServerLocked()
	s.wmu.Unlock()
	if err != nil {
		return s.commitLost(op, err)
	}
	return s.readCommitted(op)
}

// appendCommitLocked is called with wmu held.
func (s *session) appendCommitLocked(op *commitOp) {
	b := s.toServer.buf
	if op.xid {
		b = appendRun(b, stReadOnly)
	}
	switch {
	case op.end == endExecute:
		b = append(b, op.held...)
	case op.chain:
		b = appendRun(b, stChain)
	default:
		b = appendRun(b, stCommit)
	}
	if op.restore {
		b = appendRun(b, stReadWrite)
	}
	s.toServer.buf = appendSync(b)
}

// readCommitted reads the answer to COMMIT. The gateway's own Sync ends it: behind a COMMIT there is nothing that a
// Sync could end too early, except AND CHAIN's next transaction, which is a block.
func (s *session) readCommitted(op *commitOp) error {
	committed, skip := false, 0
	if op.xid {
		skip = 2 // what comes before the replies to COMMIT
	}
	var failure []byte
	for {
		m, err := s.receive()
		if err != nil {
			return s.commitLost(op, err)
		}
		switch {
		case m.typ == 'Z':
			if !committed {
				return s.commitRefused(op, failure)
			}
			return s.commitDone(op, m.body()[0])
		case m.typ == 'E':
			if m, err = s.srv.whole(m); err != nil {
				return s.commitLost(op, err)
			}
			if failure == nil {
				failure = append([]byte(nil), m.data...)
			}
		case committed || skip > 0:
			skip--
		case m.typ == 'C':
			tag, _, _ := cstring(m.body())
			if committed = string(tag) == "COMMIT"; !committed {
				failure = (&sqlError{code: codeInternal, message: "COMMIT was answered by " + string(tag)}).append(nil)
				continue
			}
			if op.ordered {
				op.commit.Committed() // before the client hears of it: others wait for their turn
			}
			if op.end == endExecute {
				s.emit(m.data)
			}
		case op.end == endExecute:
			s.emit(m.data)
		}
	}
}

// commitRefused deals with a COMMIT that the server has answered with an error, which means that it rolled back: a
// WITH HOLD cursor's query failed, or the backend was told to end.
func (s *session) commitRefused(op *commitOp, failure []byte) error {
	if op.ordered {
		switch s.lost(op).Step {
		case txn.StepUnknown:
			return s.finish(unknownError(op.commit.GID()))
		case txn.StepVisible:
			return s.visible(op)
		}
	}
	if failure == nil {
		return errors.New("the server has not answered COMMIT")
	}
	return s.commitFailed(op, nil, failure)
}

// commitLost deals with a connection that failed while COMMIT was on its way.
func (s *session) commitLost(op *commitOp, err error) error {
	if !op.ordered {
		return err // nothing was written that others see
	}
	return s.connectionLost(op, err)
}

// commitFailed tells the client that its transaction was rolled back: by e, or by the server's own ErrorResponse.
func (s *session) commitFailed(op *commitOp, e *sqlError, failure []byte) error {
	if e != nil {
		failure = e.append(nil)
	}
	s.emit(failure)
	return s.leaveCommit(op, true, 'I')
}

// commitDone tells the client that its transaction is committed.
func (s *session) commitDone(op *commitOp, status byte) error {
	switch op.end {
	case endQuery, endPiece:
		s.emit(appendComplete(nil, "COMMIT"))
	case endUnit:
		s.emit(s.unit.completed)
	}
	if op.ordered {
		s.g.metrics.commits.Inc()
		s.g.metrics.commit.Observe(time.Since(op.start).Seconds())
	}
	return s.leaveCommit(op, false, status)
}

// leaveCommit takes the commit out of the queue. After an error in a batch whose Sync is still to come, the client
// loop ignores the rest of it, as the server would.
func (s *session) leaveCommit(op *commitOp, failed bool, status byte) error {
	s.mu.Lock()
	s.phase, s.commit, s.undone = phaseNone, nil, false
	s.failed, s.broken = s.failed || failed, s.broken || failed
	if status != 'I' { // AND CHAIN
		s.txnEndedLocked()
	}
	s.changed.Broadcast()
	s.mu.Unlock()
	return s.ready(appendReady(nil, status), op.end != endPiece && (op.end != endExecute || op.synced))
}

// appendAnswers appends what the server would have answered to messages that execute a statement without result.
func appendAnswers(b, messages []byte, tag string) []byte {
	for len(messages) >= 5 {
		switch messages[0] {
		case 'P':
			b = append(b, '1', 0, 0, 0, 4)
		case 'B':
			b = append(b, '2', 0, 0, 0, 4)
		case 'C':
			b = append(b, '3', 0, 0, 0, 4)
		case 'D':
			b = append(b, 'n', 0, 0, 0, 4)
		case 'E':
			b = appendComplete(b, tag)
		}
		messages = messages[1+binary.BigEndian.Uint32(messages[1:]):]
	}
	return b
}
