package gateway

import (
	"bytes"
	"fmt"

	"github.com/quorate/quorate/gateway/sqllex"
	"github.com/quorate/quorate/txn"
)

// clientLoop reads what the client says.
func (s *session) clientLoop() error {
	for {
		m, err := s.cli.next(s.flushSrvFn)
		if err != nil {
			return err
		}
		switch m.typ {
		case 'Q':
			err = s.onQuery(m)
		case 'P', 'B', 'D', 'E', 'C', 'H':
			err = s.onExtended(m)
		case 'S':
			err = s.onSync(m)
		case 'd', 'c', 'f':
			err = s.onCopy(m)
		case 'X':
			return errTerminate
		case 'F':
			err = s.onFunctionCall(m)
		default:
			err = &protocolError{fmt.Sprintf("unexpected message type %q from client", m.typ)}
		}
		if err != nil {
			return err
		}
	}
}

// enter is called before a message that begins something: a query, or the first of a batch. Outside a block it waits
// until everything before is answered, because what to do depends on how that went; inside one the client may
// pipeline freely. When nothing is outstanding the server's word on the status is taken.
func (s *session) enter() error {
	s.mu.Lock()
	for {
		if s.ended {
			s.mu.Unlock()
			return errEnded
		}
		if s.head == len(s.queue) && s.cancels == 0 {
			break
		}
		if s.mode == modeBlock && !s.settleNext && !s.deferred && !s.beginning {
			s.mu.Unlock()
			return nil
		}
		s.mu.Unlock()
		if err := s.flushServer(); err != nil {
			return err
		}
		s.mu.Lock()
		if (s.head < len(s.queue) || s.cancels > 0) && !s.ended {
			s.changed.Wait()
		}
	}
	s.settleNext, s.beginning = false, false
	failed := s.failed
	s.failed = false
	s.mode = modeBlock
	if s.status == 'I' && !s.deferred {
		s.mode = modeIdle
	}
	s.mu.Unlock()
	if s.deferred {
		s.sendBegin()
	}
	if s.mode == modeIdle {
		s.baseSet, s.gid = false, txn.GID{}
		if len(s.portals) > 0 {
			clear(s.portals)
		}
	}
	if s.after.kind != 0 {
		after := s.after
		s.after = afterEffect{}
		if !failed {
			if err := s.apply(after); err != nil {
				return err
			}
		}
	}
	if s.mode == modeIdle {
		return s.forget()
	}
	return nil
}

// apply lets a statement that the server has accepted take its effect in the gateway.
func (s *session) apply(e afterEffect) error {
	if e.setWish {
		s.wish.Store(e.wish)
		s.cmu.Lock()
		s.reportLocked()
		s.cmu.Unlock()
	}
	if e.kind == sqllex.Deallocate {
		if e.all {
			clear(s.statements)
			s.wmu.Lock()
			s.prepared = false
			s.wmu.Unlock()
		} else {
			delete(s.statements, e.name)
		}
	}
	return nil
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

// effect returns what a statement will change in the gateway.
func effect(st *sqllex.Statement, sql []byte) afterEffect {
	switch st.Kind {
	case sqllex.SetReadOnly:
		return afterEffect{kind: st.Kind, setWish: true, wish: st.Wish == sqllex.WishOn}
	case sqllex.Deallocate:
		e := afterEffect{kind: st.Kind, all: st.All}
		if st.All && bytes.EqualFold(sql[st.Start:min(st.Start+7, len(sql))], []byte("discard")) {
			e.setWish = true // DISCARD ALL resets all settings
		}
		if !st.All {
			e.name = identifier(sql[st.NameStart:st.NameEnd])
		}
		return e
	}
	return afterEffect{}
}

// identifier returns a name as the server folds it.
func identifier(b []byte) string {
	if len(b) >= 2 && b[0] == '"' {
		return string(bytes.ReplaceAll(b[1:len(b)-1], []byte(`""`), []byte(`"`)))
	}
	return string(bytes.ToLower(b))
}

func (s *session) options() sqllex.Options {
	return sqllex.Options{BackslashQuotes: s.backslash.Load()}
}

// noteBase records what is visible before the transaction's first snapshot.
func (s *session) noteBase() {
	if !s.baseSet {
		s.base, s.baseSet = s.g.cfg.Coordinator.Applied(), true
	}
}

// statementText returns the text of a Query's or Parse's message, complete in memory. If it is too long the client is
// told so, and ok is false.
func (s *session) statementText(m message) (_ message, ok bool, err error) {
	if m.size() <= s.g.cfg.MaxStatement {
		m, err = s.cli.whole(m)
		return m, err == nil, err
	}
	if err := s.cli.discardRest(&m); err != nil {
		return m, false, err
	}
	return m, false, nil
}

// onQuery deals with a simple Query.
func (s *session) onQuery(m message) error {
	if s.discarding {
		return s.cli.discardRest(&m)
	}
	if s.inBatch {
		if s.holding || s.mode == modeWrap {
			return &protocolError{"a simple query inside an extended-protocol batch is not supported outside a transaction block"}
		}
		if err := s.unholdCommit(); err != nil {
			return err
		}
		if err := s.settle(); err != nil {
			return err
		}
		s.inBatch = false
	}
	deferred := s.deferred
	if err := s.enter(); err != nil {
		return err
	}
	s.beginning = deferred
	m, ok, err := s.statementText(m)
	if err != nil {
		return err
	}
	if !ok {
		return s.refuseQuery(tooLong(s.g.cfg.MaxStatement))
	}
	sql := m.body()
	if len(sql) == 0 || bytes.IndexByte(sql, 0) != len(sql)-1 {
		return &protocolError{"query string is not terminated"}
	}
	sql = sql[:len(sql)-1]
	s.stmts = sqllex.Split(sql, s.options(), s.stmts[:0])
	s.noteOpaque()
	for i := range s.stmts {
		if r := s.stmts[i].Refusal; r != sqllex.NotRefused {
			return s.refuseQuery(refusals[r])
		}
	}
	if len(s.stmts) > 1 {
		for i := range s.stmts {
			if s.stmts[i].Alone() {
				return s.pieces(sql)
			}
		}
	}
	if s.mode == modeBlock {
		return s.queryInBlock(m.data, sql)
	}
	return s.queryOutside(m.data, sql)
}

func tooLong(limit int) *sqlError {
	return &sqlError{code: codeTooLarge, message: fmt.Sprintf("statement is longer than %d bytes", limit),
		hint: "Use COPY or several statements."}
}

// failing is a statement that the server refuses with a syntax error, which the client sees as the refusal it stands
// for: so the server's state is what it would be after any error, and nothing has to be imitated.
const failing = "/* refused by the gateway */ refused"

func (s *session) refuseQuery(e *sqlError) error {
	s.g.metrics.refused.WithLabelValues(e.code).Inc()
	s.push(reply{until: untilReady, subst: e})
	return s.send(appendQuery(nil, failing))
}

// queryInBlock relays a Query inside a block of the client's, unless it is COMMIT.
func (s *session) queryInBlock(msg, sql []byte) error {
	if len(s.stmts) == 1 {
		st := &s.stmts[0]
		switch st.Kind {
		case sqllex.Commit:
			return s.commitQuery(st, msg)
		case sqllex.Rollback:
			s.wish.Store(s.wishBefore)
			s.settleNext = true
			s.baseSet, s.gid = false, txn.GID{} // of what AND CHAIN begins
			s.push(reply{until: untilReady})
			return s.send(msg)
		}
	}
	if err := s.serve(); err != nil {
		return err
	}
	s.noteBase()
	if err := s.inform(asks(s.stmts, sql)); err != nil {
		return err
	}
	for i := range s.stmts {
		if err := s.noteStatement(&s.stmts[i], sql); err != nil {
			return err
		}
	}
	s.push(reply{until: untilReady})
	return s.send(msg)
}

// noteStatement keeps track of what a statement about to run changes for the gateway.
func (s *session) noteStatement(st *sqllex.Statement, sql []byte) error {
	if st.Snapshot {
		s.base = 0 // the imported snapshot may be of any age
	}
	if e := effect(st, sql); e.kind != 0 {
		return s.await(e)
	}
	return nil
}

// await lets a statement about to run take effect in the gateway when it has gone well: the client loop waits for
// that before it goes on.
func (s *session) await(e afterEffect) error {
	if s.mode != modeIdle {
		if err := s.settle(); err != nil {
			return err
		}
	}
	s.mu.Lock()
	s.failed = false
	s.mu.Unlock()
	s.after, s.settleNext = e, true
	return nil
}

// queryOutside runs a Query outside a block.
func (s *session) queryOutside(msg, sql []byte) error {
	u := &s.unit
	u.reset()
	s.readOnly = s.beginsReadOnly()
	switch len(s.stmts) {
	case 0:
	case 1:
		st := &s.stmts[0]
		switch st.Kind {
		case sqllex.Begin:
			s.beginBlock()
			if tag := plainBegin(sql[st.Start:st.End]); tag != "" && !s.wish.Load() {
				s.deferred = true
				return s.tellReady(appendComplete(nil, tag), 'T')
			}
			s.push(reply{until: untilReady})
			return s.send(s.beginQuery(st, msg))
		case sqllex.Maybe, sqllex.Write:
			s.judge(u, st, len(msg))
		default:
			if err := s.noteStatement(st, sql); err != nil {
				return err
			}
		}
	default:
		// An implicit transaction of several statements. What the first ones sent cannot be taken back when a later one
		// turns out to write, so nothing is tried out.
		for i := range s.stmts {
			if err := s.noteStatement(&s.stmts[i], sql); err != nil {
				return err
			}
			if k := s.stmts[i].Kind; (k == sqllex.Maybe || k == sqllex.Write) && !s.readOnly {
				u.wrapped = true
			}
		}
	}
	if err := s.inform(asks(s.stmts, sql)); err != nil {
		return err
	}
	return s.runUnit(msg)
}

// judge decides whether a single statement outside a block is wrapped, or tried out read only.
func (s *session) judge(u *unit, st *sqllex.Statement, size int) {
	if s.readOnly {
		return // that is what the server's default is
	}
	switch {
	case st.AsksReadOnly:
		u.wrapped, u.unlock = true, true
	case st.Kind == sqllex.Write, size > maxRepeatable, s.g.writing.has(st.Fingerprint):
		u.wrapped = true
	default:
		u.repeatable, u.fingerprint = true, st.Fingerprint
	}
}

// maxRepeatable is the size in bytes up to which a unit is kept in memory so that it can be repeated.
const maxRepeatable = 64 << 10

func (s *session) beginBlock() {
	s.mode, s.baseSet, s.gid, s.wishBefore = modeBlock, false, txn.GID{}, s.wish.Load()
}

// beginQuery returns BEGIN as the server gets it. The addition stands at the end, so that positions in errors stay
// right.
func (s *session) beginQuery(st *sqllex.Statement, msg []byte) []byte {
	if mode := s.accessMode(st); mode != "" {
		return appendQuery(nil, string(msg[5:5+st.End])+mode)
	}
	return msg
}

// accessMode returns what is added to a BEGIN: it is read write unless the client says or wishes otherwise, or there
// is no quorum. The last mode counts.
func (s *session) accessMode(st *sqllex.Statement) string {
	switch {
	case s.fenced.Load():
		return " READ ONLY"
	case st.AccessMode || s.wish.Load():
		return ""
	}
	return readWrite
}

const readWrite = " READ WRITE"

// plainBegin returns the tag by which the server answers a BEGIN that asks for nothing, or "". There is nothing in
// such a statement that could fail or that the server would have to know before the next one, so it is answered at once
// and goes to the server together with that: one round trip less in every transaction.
func plainBegin(sql []byte) string {
	for _, form := range [...]struct{ sql, tag string }{
		{"BEGIN", "BEGIN"}, {"BEGIN TRANSACTION", "BEGIN"}, {"BEGIN WORK", "BEGIN"}, {"START TRANSACTION", "START TRANSACTION"},
	} {
		if len(sql) == len(form.sql) && bytes.EqualFold(sql, []byte(form.sql)) {
			return form.tag
		}
	}
	return ""
}

// sendBegin appends the deferred BEGIN to what goes to the server. It is not followed by Sync: should it fail, the
// server ignores what the client meant to do inside the block.
func (s *session) sendBegin() {
	s.deferred = false
	readOnly := s.beginsReadOnly()
	s.wmu.Lock()
	defer s.wmu.Unlock()
	count := s.appendBegin(false)
	if readOnly {
		s.toServer.buf = append(s.toServer.buf, runReadOnly...)
		count += 2
	}
	s.push(reply{until: opBegin, hidden: true, count: count})
}

// runUnit hands the unit, whose messages are msg, to server and server loop.
func (s *session) runUnit(msg []byte) error {
	u := &s.unit
	if u.repeatable {
		u.msg = append(u.msg[:0], msg...)
	}
	if err := s.serve(); err != nil {
		return err
	}
	u.base = s.g.cfg.Coordinator.Applied()
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if u.wrapped {
		s.g.metrics.wraps.Inc()
		u.hidden = s.appendBegin(u.unlock)
	}
	s.push(reply{until: opUnit})
	s.toServer.buf = append(s.toServer.buf, msg...)
	if len(s.toServer.buf) > writeBuffer {
		return s.flushServerLocked()
	}
	return nil
}

// onCopy relays the client's side of COPY FROM STDIN. Outside of COPY the server ignores these messages.
func (s *session) onCopy(m message) error {
	if s.discarding {
		return s.cli.discardRest(&m)
	}
	if s.settleNext { // nothing of COPY can be outstanding behind a COMMIT: keep out of its conversation
		if err := s.settle(); err != nil {
			return err
		}
	}
	return s.forward(m)
}

func (s *session) onFunctionCall(m message) error {
	if s.discarding {
		return s.cli.discardRest(&m)
	}
	if s.inBatch {
		return &protocolError{"function call inside an extended-protocol batch"}
	}
	if err := s.enter(); err != nil {
		return err
	}
	if err := s.cli.discardRest(&m); err != nil {
		return err
	}
	return s.refuseQuery(errFunctionCall)
}

// commitQuery commits a block by a simple COMMIT.
func (s *session) commitQuery(st *sqllex.Statement, msg []byte) error {
	if err := s.settle(); err != nil {
		return err
	}
	done, err := s.commitPoisoned(commitOp{end: endQuery})
	if done || err != nil {
		return err
	}
	if s.statusNow() != 'T' {
		s.settleNext = true
		s.push(reply{until: untilReady})
		return s.send(msg)
	}
	return s.startCommit(commitOp{end: endQuery, chain: st.Chain})
}

// commitPoisoned answers COMMIT of a transaction that was evicted since its client last heard of it: a mere ROLLBACK,
// PostgreSQL's answer in a failed block, could be taken for success.
func (s *session) commitPoisoned(op commitOp) (bool, error) {
	s.mu.Lock()
	poison := s.poison
	s.mu.Unlock()
	if poison == nil {
		return false, nil
	}
	return true, s.startRollback(op, poison)
}

func (s *session) statusNow() byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

// pieces runs a Query of several statements with transaction control or DDL among them, as PostgreSQL does: what
// stands before BEGIN is part of its transaction, COMMIT ends also an implicit one, and an error skips the rest. Runs
// of other statements stay together in one Query.
func (s *session) pieces(sql []byte) error {
	if err := s.settle(); err != nil {
		return err
	}
	s.mu.Lock()
	s.failed = false
	s.mu.Unlock()
	sql = bytes.Clone(sql) // the read buffer goes on living
	stmts := append([]sqllex.Statement(nil), s.stmts...)
	for i := 0; i < len(stmts); {
		first := i
		i++
		if !stmts[first].Alone() {
			for i < len(stmts) && !stmts[i].Alone() {
				i++
			}
		}
		text := sql[stmts[first].Start:stmts[i-1].End]
		shift := runes(sql[:stmts[first].Start])
		if err := s.piece(&stmts[first], stmts[first:i], sql, text, shift); err != nil {
			return err
		}
		if err := s.settle(); err != nil {
			return err
		}
		s.mu.Lock()
		failed := s.failed
		if s.mode != modeWrap {
			s.mode = modeBlock
			if s.status == 'I' {
				s.mode = modeIdle
			}
		}
		s.mu.Unlock()
		if failed {
			if s.mode == modeWrap {
				return s.startRollback(commitOp{end: endSilent}, nil)
			}
			break
		}
		if after := s.after; after.kind != 0 {
			s.after = afterEffect{}
			if err := s.apply(after); err != nil {
				return err
			}
		}
	}
	if s.mode == modeWrap {
		return s.startCommit(commitOp{end: endSilent})
	}
	return s.tellReady(nil, s.statusNow())
}

// piece runs one control statement, or a run of others, without ReadyForQuery for the client.
func (s *session) piece(st *sqllex.Statement, run []sqllex.Statement, sql, text []byte, shift int) error {
	r := reply{until: untilReady, noReady: true, shift: shift}
	relay := func(text string) error {
		s.push(r)
		return s.send(appendQuery(nil, text))
	}
	switch st.Kind {
	case sqllex.Begin:
		query := string(text)
		if s.mode == modeIdle {
			s.beginsReadOnly()
		}
		if s.mode != modeBlock {
			query += s.accessMode(st)
		}
		if s.mode == modeWrap {
			r.quiet = true
			s.mode = modeBlock
			return relay(query)
		}
		if s.mode == modeIdle {
			s.beginBlock()
		}
		return relay(query)
	case sqllex.Commit:
		if s.mode == modeWrap {
			s.emit(warnNoTransaction.appendAs(nil, 'N'))
			return s.startCommit(commitOp{end: endPiece, chain: st.Chain})
		}
		if done, err := s.commitPoisoned(commitOp{end: endPiece}); done || err != nil {
			return err
		}
		if s.statusNow() == 'T' {
			return s.startCommit(commitOp{end: endPiece, chain: st.Chain})
		}
		return relay(string(text))
	case sqllex.Rollback:
		s.gid = txn.GID{}
		if s.mode == modeWrap {
			s.emit(warnNoTransaction.appendAs(nil, 'N'))
			s.mode = modeIdle
		}
		return relay(string(text))
	case sqllex.Subtransact:
		if s.mode != modeBlock {
			r.subst = errSavepointOutside
			return relay(failing)
		}
		return relay(string(text))
	}
	for i := range run {
		if err := s.noteStatement(&run[i], sql); err != nil {
			return err
		}
	}
	if err := s.serve(); err != nil {
		return err
	}
	if s.mode == modeIdle && !s.beginsReadOnly() {
		s.openWrap()
	}
	s.noteBase()
	if err := s.inform(asks(run, sql)); err != nil {
		return err
	}
	return relay(string(text))
}

// openWrap begins a block that the client does not know of.
func (s *session) openWrap() {
	s.mode = modeWrap
	s.base, s.baseSet = s.g.cfg.Coordinator.Applied(), true
	s.g.metrics.wraps.Inc()
	s.wmu.Lock()
	defer s.wmu.Unlock()
	s.push(reply{until: untilCount, hidden: true, count: s.appendBegin(false)})
}
