package gateway

import (
	"bytes"
	"errors"
	"slices"

	"github.com/quorate/quorate/gateway/sqllex"
	"github.com/quorate/quorate/txn"
)

// The extended protocol. A batch is what the client sends up to Sync. Outside a block it is one implicit transaction,
// and whether that writes is known only when all of it is: so it is gathered until Sync and then run as a unit. What
// cannot be gathered (Flush, a batch that is too large, transaction control in it) is streamed, inside a hidden block.
// Inside a block everything is streamed.

// onExtended deals with Parse, Bind, Describe, Execute, Close and Flush.
func (s *session) onExtended(m message) error {
	if s.discarding {
		return s.cli.discardRest(&m)
	}
	if !s.inBatch {
		if err := s.enter(); err != nil {
			return err
		}
		s.inBatch, s.sent = true, false
		if s.mode == modeIdle {
			s.gather()
		}
	} else if s.settleNext {
		if err := s.settleInBatch(); err != nil || s.discarding {
			if err == nil {
				err = s.cli.discardRest(&m)
			}
			return err
		}
	}
	switch m.typ {
	case 'P':
		return s.onParse(m)
	case 'B':
		return s.onBind(m)
	case 'E':
		return s.onExecute(m)
	case 'C':
		return s.onClose(m)
	case 'H':
		return s.onFlush(m)
	}
	if len(m.data) < 6 || m.rest > 0 {
		return &protocolError{"malformed Describe"}
	}
	if len(s.held.msg) > 0 {
		s.held.msg = append(s.held.msg, m.data...)
		s.held.replies = append(s.held.replies, reply{until: untilDescribe})
		return nil
	}
	return s.batch(m, reply{until: untilDescribe}, "")
}

// gather begins to gather a batch.
func (s *session) gather() {
	s.holding, s.executes, s.wrapBatch, s.readOnly = true, 0, false, s.beginsReadOnly()
	s.unit.reset()
}

// settleInBatch is settle behind a statement that changed the transaction's state in the middle of a batch.
func (s *session) settleInBatch() error {
	if err := s.settle(); err != nil {
		return err
	}
	s.mu.Lock()
	failed, status := s.broken, s.status
	s.mu.Unlock()
	switch {
	case failed:
		s.discarding = true      // the hidden Sync has ended the server's own ignoring
		delete(s.statements, "") // its Parse may have been held back
	case status == 'I':
		s.mode, s.baseSet, s.gid = modeIdle, false, txn.GID{}
		clear(s.portals)
		if !s.holding {
			s.gather()
		}
	case s.mode != modeWrap:
		s.mode = modeBlock
	}
	if after := s.after; after.kind != 0 {
		s.after = afterEffect{}
		if !failed {
			return s.apply(after)
		}
	}
	return nil
}

// batch passes one message of a batch on: to the gathered unit, to the held-back COMMIT, or to the server.
func (s *session) batch(m message, r reply, name string) error {
	if s.holding {
		u := &s.unit
		if m.rest > 0 || len(u.msg)+len(m.data) > maxRepeatable {
			if err := s.stream(); err != nil {
				return err
			}
			return s.batch(m, r, name)
		}
		u.msg = append(u.msg, m.data...)
		u.replies = append(u.replies, r)
		u.names = append(u.names, name)
		return nil
	}
	if s.mode == modeBlock {
		s.noteBase()
	}
	s.sent = true
	s.push(r)
	return s.forward(m)
}

// stream ends the gathering: what has been gathered goes to the server inside a hidden block.
func (s *session) stream() error {
	if err := s.serve(); err != nil {
		return err
	}
	if !s.readOnly {
		s.openWrap()
	}
	return s.streamAsIs()
}

// streamAsIs sends what has been gathered.
func (s *session) streamAsIs() error {
	s.holding, s.sent = false, true
	u := &s.unit
	for i := range u.replies {
		s.push(u.replies[i])
	}
	return s.send(u.msg)
}

func (s *session) onParse(m message) error {
	m, ok, err := s.statementText(m)
	if err != nil {
		return err
	}
	if !ok {
		return s.refuseParse("", tooLong(s.g.cfg.MaxStatement))
	}
	name, rest, ok1 := cstring(m.body())
	sql, types, ok2 := cstring(rest)
	if !ok1 || !ok2 || len(types) < 2 {
		return &protocolError{"malformed Parse"}
	}
	s.stmts = sqllex.Split(sql, s.options(), s.stmts[:0])
	s.noteOpaque()
	st := &statement{}
	if len(s.stmts) == 1 { // several are an error of the server's, none is the empty statement
		st.Statement = s.stmts[0]
	}
	key := string(name)
	taken, err := s.define(key, st)
	if err != nil {
		return err
	}
	if taken {
		return s.refuseParse(key, &sqlError{code: codeDuplicateStatement, message: "prepared statement \"" + key + "\" already exists"})
	}
	if st.Refusal != sqllex.NotRefused {
		return s.refuseParse(key, refusals[st.Refusal])
	}
	if st.AsksStatus {
		st.gids = appendGIDs(nil, sql)
	}
	if st.Kind == sqllex.Deallocate || st.Kind == sqllex.SetReadOnly {
		st.effect = effect(&st.Statement, sql)
	}
	if st.Kind == sqllex.Begin && !st.AccessMode && !s.wish.Load() {
		text := string(sql[:st.End]) + readWrite
		b, at := begin(nil, 'P')
		b = appendCString(appendCString(b, key), text)
		m = message{typ: 'P', data: end(append(b, types...), at)}
	}
	r := reply{until: untilParse, stmt: st}
	if st.Kind == sqllex.Commit && key == "" && s.mode != modeIdle {
		return s.holdCommit(m, r)
	}
	if err := s.unholdCommit(); err != nil {
		return err
	}
	return s.batch(m, r, key)
}

// define enters a statement into the session's table. The server refuses a second Parse of a name that exists, so
// what stands there counts until it is closed; only a Parse that failed left nothing. The server may know better: a
// function may have deallocated the name. That must not turn into a COMMIT what is not taken for one, or the other
// way round; then taken says that the Parse is to be refused here.
func (s *session) define(name string, st *statement) (taken bool, _ error) {
	old := s.statements[name]
	if old == nil || name == "" {
		s.statements[name] = st
		return false, nil
	}
	s.mu.Lock()
	pending := old.state == parsePending
	s.mu.Unlock()
	if pending && !s.holding {
		if err := s.settle(); err != nil {
			return false, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old.state == parseFailed || old.closed {
		s.statements[name] = st
		return false, nil
	}
	return old.Control() || st.Control(), nil
}

// refuseParse sends a Parse that fails, in place of one that is refused.
func (s *session) refuseParse(name string, e *sqlError) error {
	s.g.metrics.refused.WithLabelValues(e.code).Inc()
	if s.holding && s.unit.subst == nil {
		s.unit.subst = e // the batch's first error is this one, or one that comes before and is not told apart
	}
	m := message{typ: 'P', data: appendParse(nil, name, failing)}
	return s.batch(m, reply{until: untilParse, stmt: &statement{}, subst: e}, name)
}

func (s *session) onBind(m message) error {
	portal, rest, ok1 := cstring(m.body())
	name, values, ok2 := cstring(rest)
	if !ok1 || !ok2 {
		if m.rest == 0 {
			return &protocolError{"malformed Bind"}
		}
		return &protocolError{"names in Bind are too long"}
	}
	st := s.statements[string(name)]
	if st == nil {
		st = &statement{} // PREPAREd by SQL, or the server will say that there is none
		st.Kind = sqllex.Write
	}
	// A portal that exists cannot be bound again, but the unnamed one. COMMIT must never be taken for anything else.
	if old := s.portals[string(portal)]; old == nil || len(portal) == 0 || !old.Control() {
		s.portals[string(portal)] = st
	}
	if st.AsksStatus || st.Views != 0 {
		wants := asked{outcomes: slices.Clone(st.gids), views: st.Views}
		if st.AsksStatus {
			bindValues(values, func(v []byte) { wants.outcomes = appendGIDs(wants.outcomes, v) })
		}
		if done, err := s.informInBatch(wants); done || err != nil {
			return err
		}
	}
	r := reply{until: untilBind}
	if st.Kind == sqllex.Commit && s.mode != modeIdle {
		return s.holdCommit(m, r)
	}
	if err := s.unholdCommit(); err != nil {
		return err
	}
	return s.batch(m, r, "")
}

// holdCommit holds back the Parse or Bind of a COMMIT: with Describe and Execute it is sent when its turn has come.
// The server's saying yes to them would be of no use before, and so nothing is outstanding when the turn comes.
func (s *session) holdCommit(m message, r reply) error {
	m, err := s.cli.whole(m)
	if err != nil {
		return err
	}
	if s.held.bound || len(s.held.msg) > 0 && r.until == untilParse {
		if err := s.unholdCommit(); err != nil {
			return err
		}
	}
	s.held.bound = r.until == untilBind
	s.held.msg = append(s.held.msg, m.data...)
	s.held.replies = append(s.held.replies, r)
	return nil
}

// unholdCommit sends what was held back, if anything was: no Execute has followed.
func (s *session) unholdCommit() error {
	if len(s.held.msg) == 0 {
		return nil
	}
	for i := range s.held.replies {
		s.push(s.held.replies[i])
	}
	s.sent = true
	msg := s.held.msg
	s.held.reset()
	return s.send(msg)
}

func (h *heldCommit) reset() {
	*h = heldCommit{msg: h.msg[:0], replies: h.replies[:0]}
}

func (s *session) onClose(m message) error {
	if m.rest > 0 || len(m.data) < 7 || bytes.IndexByte(m.data[6:], 0) != len(m.data)-7 {
		return &protocolError{"malformed Close"}
	}
	name := string(m.data[6 : len(m.data)-1])
	what := ""
	switch m.data[5] {
	case 'S':
		what = name
		if st := s.statements[name]; st != nil {
			st.closed = true // what is said of it from here on counts for a new one only
		}
	case 'P':
		delete(s.portals, name)
	}
	if err := s.unholdCommit(); err != nil {
		return err
	}
	return s.batch(m, reply{until: untilClose}, what)
}

func (s *session) onFlush(m message) error {
	if err := s.unholdCommit(); err != nil {
		return err
	}
	if s.holding {
		// The client wants answers before it goes on, so what it will execute is not known. That it only sets up
		// session state can be seen; everything else gets a block.
		if err := s.stream(); err != nil {
			return err
		}
	}
	if err := s.forward(m); err != nil {
		return err
	}
	return s.flushServer()
}

func (s *session) onExecute(m message) error {
	portal, rest, ok := cstring(m.body())
	if !ok || len(rest) != 4 || m.rest > 0 {
		return &protocolError{"malformed Execute"}
	}
	st := s.portals[string(portal)]
	if st == nil {
		st = &statement{} // a cursor by DECLARE, or none
		st.Kind = sqllex.Maybe
	}
	if s.holding {
		return s.executeGathered(m, st)
	}
	r := reply{until: untilExecute}
	switch st.Kind {
	case sqllex.Commit:
		return s.commitExecute(m, st)
	case sqllex.Begin:
		if s.mode != modeBlock {
			r.quiet = s.mode == modeWrap
			s.mode, s.wishBefore = modeBlock, s.wish.Load()
		}
	case sqllex.Rollback:
		s.wish.Store(s.wishBefore)
		s.settleNext = true
		s.gid = txn.GID{}
	case sqllex.Subtransact:
		if s.mode == modeWrap {
			return &protocolError{errSavepointOutside.message}
		}
	}
	if st.Kind != sqllex.Rollback {
		if err := s.serve(); err != nil {
			return err
		}
	}
	if st.AsksGID {
		if done, err := s.informInBatch(asked{gid: true}); done || err != nil {
			return err
		}
	}
	if st.Snapshot {
		s.base = 0
	}
	if st.effect.kind != 0 {
		if err := s.await(st.effect); err != nil {
			return err
		}
	}
	return s.batch(m, r, "")
}

// informInBatch is inform between the messages of a batch. done says that the batch has failed meanwhile, and what is
// left of it is ignored.
func (s *session) informInBatch(a asked) (done bool, err error) {
	if !s.holding { // otherwise nothing of the batch has been sent
		if err := s.settleInBatch(); err != nil || s.discarding {
			return s.discarding, err
		}
	}
	return false, s.inform(a)
}

// executeGathered deals with Execute in a batch outside a block.
func (s *session) executeGathered(m message, st *statement) error {
	u := &s.unit
	s.executes++
	if st.Control() {
		if st.Kind == sqllex.Begin {
			return s.beginInBatch(m)
		}
		if s.executes > 1 { // ends what came before in the batch
			if err := s.stream(); err != nil {
				return err
			}
			return s.onExecute(m)
		}
		return s.batch(m, reply{until: untilExecute}, "")
	}
	switch {
	case st.Kind != sqllex.Maybe && st.Kind != sqllex.Write:
		if st.effect.kind != 0 {
			if err := s.await(st.effect); err != nil {
				return err
			}
			s.settleNext = false // the batch is still being gathered
		}
	case s.readOnly:
	case st.AsksReadOnly:
		s.wrapBatch, u.unlock = true, true
	case st.Kind == sqllex.Write, s.g.writing.has(st.Fingerprint):
		s.wrapBatch = true
	default:
		u.fingerprint = st.Fingerprint
	}
	return s.batch(m, reply{until: untilExecute}, "")
}

// beginInBatch deals with Execute of BEGIN in a gathered batch: from here on it is a block, and streamed. If nothing
// but BEGIN is in the batch so far it goes as it is. Otherwise a snapshot may have been taken, after which the access
// mode is fixed: then the block is begun in front of it all and the client's BEGIN makes it the client's.
func (s *session) beginInBatch(m message) error {
	u := &s.unit
	r := reply{until: untilExecute}
	plain := true
	for i := range u.replies {
		if st := u.replies[i].stmt; st != nil && st.Kind != sqllex.Begin {
			plain = false
		}
	}
	if s.executes > 1 || !plain {
		if err := s.stream(); err != nil {
			return err
		}
		r.quiet = s.mode == modeWrap
		s.mode, s.wishBefore = modeBlock, s.wish.Load()
	} else {
		if err := s.streamAsIs(); err != nil {
			return err
		}
		s.beginBlock()
		s.push(r)
		if err := s.forward(m); err != nil || !s.fenced.Load() { // not through batch: BEGIN takes no snapshot, so base may wait
			return err
		}
		// The statement may have been prepared as READ WRITE when there was a quorum.
		s.wmu.Lock()
		defer s.wmu.Unlock()
		s.push(reply{until: untilCount, hidden: true, count: s.ensurePrepared() + 2})
		s.toServer.buf = append(s.toServer.buf, runReadOnly...)
		return nil
	}
	return s.batch(m, r, "")
}

// commitExecute commits a block by Execute of a COMMIT.
func (s *session) commitExecute(m message, st *statement) error {
	if s.mode == modeIdle {
		return errors.New("COMMIT executed outside a block and outside a gathered batch")
	}
	op := commitOp{end: endExecute, chain: st.Chain}
	op.held = append(append(op.held, s.held.msg...), m.data...)
	replies := append([]reply(nil), s.held.replies...)
	s.held.reset()
	if err := s.settle(); err != nil {
		return err
	}
	s.mu.Lock()
	failed, status := s.broken, s.status
	s.mu.Unlock()
	if failed { // in this batch: the server would have ignored the COMMIT
		s.discarding = true
		return nil
	}
	if s.cli.peek() == 'S' {
		sync, err := s.cli.next(nil)
		if err != nil {
			return err
		}
		if len(sync.data) != 5 {
			return &protocolError{"malformed Sync"}
		}
		op.synced = true
		s.inBatch = false
	}
	if done, err := s.commitPoisoned(op); done || err != nil {
		return err
	}
	if status != 'T' {
		s.settleNext = true
		for i := range replies {
			s.push(replies[i])
		}
		s.push(reply{until: untilExecute})
		if op.synced {
			s.push(reply{until: untilSync})
			op.held = appendSync(op.held)
		} else {
			s.sent = true
		}
		return s.send(op.held)
	}
	return s.startCommit(op)
}

// onSync ends a batch.
func (s *session) onSync(m message) error {
	if len(m.data) != 5 {
		return &protocolError{"malformed Sync"}
	}
	if s.discarding {
		s.discarding = false
	} else if s.inBatch && s.settleNext && (s.mode == modeWrap || !s.sent) { // a COMMIT's conversation may go on
		if err := s.settleInBatch(); err != nil {
			return err
		}
		s.discarding = false
	}
	if err := s.unholdCommit(); err != nil {
		return err
	}
	inBatch := s.inBatch
	s.inBatch = false
	switch {
	case s.holding && inBatch:
		s.holding = false
		u := &s.unit
		u.msg = append(u.msg, m.data...)
		u.wrapped = s.wrapBatch || s.executes > 1 && u.fingerprint != 0
		u.repeatable = !u.wrapped && u.fingerprint != 0
		return s.runUnit(u.msg)
	case s.mode == modeWrap:
		s.inBatch = inBatch
		if err := s.settle(); err != nil {
			return err
		}
		s.inBatch = false
		s.mu.Lock()
		good := s.status == 'T' && !s.broken
		s.mu.Unlock()
		if good {
			return s.startCommit(commitOp{end: endSilent})
		}
		return s.startRollback(commitOp{end: endSilent}, nil)
	}
	s.push(reply{until: untilSync})
	return s.forward(m)
}
