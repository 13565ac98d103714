package gateway

import (
	"time"

	"github.com/quorate/quorate/txn"
)

// unit is what runs outside a block and ends with one ReadyForQuery: a simple Query, or all messages of a batch up to
// its Sync. Either it runs as the client sent it, in the read-only default, or wrapped in a block of the gateway's.
// A repeatable one is first tried read only.
type unit struct {
	msg         []byte   // the client's messages; only if repeatable, or while a batch is being gathered
	replies     []reply  // of a batch: what each message is answered by
	names       []string // of a batch: the statement that each Parse or Close is about, else ""
	wrapped     bool
	unlock      bool // in the block default_transaction_read_only is off, because the statement asks for it
	repeatable  bool
	fingerprint uint64
	subst       *sqlError
	base        txn.CSN
	hidden      int // replies of the hidden BEGIN still to come

	// Of the server loop.
	repeat    bool   // it failed for being read only
	rows      bool   // the client has seen rows
	relayed   int    // messages that the client has seen
	answered  int    // of a batch: messages of the client that have been answered
	skip      int    // messages of the repetition that it has seen already
	completed []byte // the last CommandComplete, held back until the commit
}

func (u *unit) reset() {
	if cap(u.msg) > maxRepeatable {
		u.msg = nil
	}
	clear(u.replies)
	*u = unit{msg: u.msg[:0], replies: u.replies[:0], names: u.names[:0], completed: u.completed[:0]}
}

// conductUnit relays the unit's replies from the first, m, to the end.
func (s *session) conductUnit(m message) error {
	u := &s.unit
	for {
		var err error
		switch {
		case m.typ == 'N' || m.typ == 'S' || m.typ == 'A':
			err = s.async(m, false)
		case m.typ == 'Z':
			var done bool
			if done, err = s.unitReady(m); done || err != nil {
				return err
			}
		case m.typ == 'E':
			err = s.unitError(m)
		case u.hidden > 0:
			u.hidden--
		case u.repeat:
			err = s.srv.discardRest(&m)
		case u.skip > 0:
			u.skip--
			err = s.srv.discardRest(&m)
		default:
			err = s.unitReply(m)
		}
		if err != nil {
			return err
		}
		// The beginning of a wrapped unit's reply is not worth a system call: the rest follows.
		idle := s.flushFn
		if u.wrapped && !u.rows {
			idle = nil
		}
		if m, err = s.srv.next(idle); err != nil {
			return err
		}
	}
}

func (s *session) unitReply(m message) error {
	u := &s.unit
	u.relayed++
	switch m.typ {
	case '2', '3', 'T', 'n', 'C', 'I', 's':
		u.answered++
	case 'D', 'd', 'H':
		u.rows = true
	case 'G', 'W':
		u.rows = true
		s.setCopying(true)
	case '1':
		u.answered++
		s.parsed()
	}
	if u.wrapped {
		if len(u.completed) > 0 {
			s.emit(u.completed)
			u.completed = u.completed[:0]
		}
		if m.typ == 'C' { // PostgreSQL does not say so either before the transaction is committed
			u.completed = append(u.completed[:0], m.data...)
			return nil
		}
	}
	return s.relay(m)
}

// parsed notes that the first Parse of the batch that was pending went well.
func (s *session) parsed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.unit.replies {
		if st := s.unit.replies[i].stmt; st != nil && st.state == parsePending {
			st.state = parseDone
			return
		}
	}
}

func (s *session) unitError(m message) error {
	u := &s.unit
	if u.hidden > 0 { // BEGIN itself: a function has taken the hidden statements away, or the server is read only
		u.hidden = 0
		s.forgetPrepared()
		if string(errorField(m.body(), 'C')) == codeNoStatement {
			u.subst = errForgotten
		}
		if len(u.replies) == 0 { // the server ignores the Query as well
			if err := s.write(appendSync(nil)); err != nil {
				return err
			}
		}
	}
	if u.repeatable && !u.rows && string(errorField(m.body(), 'C')) == codeReadOnly && !s.givenUp() {
		u.repeat = true
		return s.srv.discardRest(&m)
	}
	if len(u.completed) > 0 {
		s.emit(u.completed)
		u.completed = u.completed[:0]
	}
	return s.relayError(m, reply{subst: u.subst})
}

// givenUp reports whether the transaction in progress has been evicted.
func (s *session) givenUp() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.evicted
}

// unitReady deals with the unit's ReadyForQuery. done says that the unit has left the queue.
func (s *session) unitReady(m message) (done bool, err error) {
	u := &s.unit
	switch status := m.body()[0]; {
	case u.repeat:
		return false, s.repeatUnit()
	case !u.wrapped || status == 'I':
		s.failParses()
		return true, s.ready(m.data, true)
	case status == 'E':
		s.failParses()
		return true, s.rollBackUnit()
	}
	// It went well. From here on it is a commit like any other, conducted by this goroutine from its start.
	op := &s.commitOp
	*op = commitOp{end: endUnit, start: time.Now()}
	s.mu.Lock()
	stopping := s.stopping
	if !stopping {
		s.phase = phaseReady
	}
	s.mu.Unlock()
	if stopping { // the client is gone: nobody waits for this
		return true, errSessionOver
	}
	if err := s.sendReady(op, u.base); err != nil {
		return true, err
	}
	if m, err = s.receive(); err != nil {
		return true, s.connectionLost(op, err)
	}
	return true, s.conductCommit(m)
}

// failParses notes that what has not been parsed by now never will be.
func (s *session) failParses() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.unit.replies {
		if st := s.unit.replies[i].stmt; st != nil && st.state == parsePending {
			st.state = parseFailed
		}
	}
}

// rollBackUnit ends a wrapped unit that failed.
func (s *session) rollBackUnit() error {
	if err := s.rollBack(); err != nil {
		return err
	}
	s.mu.Lock()
	s.phase = phaseNone
	s.mu.Unlock()
	return s.ready(appendReady(nil, 'I'), true)
}

// repeatUnit runs the unit again, wrapped. Statements that were prepared by it exist by now.
func (s *session) repeatUnit() error {
	u := &s.unit
	s.g.metrics.repeats.Inc()
	s.g.writing.add(u.fingerprint)
	msg := u.msg
	u.skip = u.relayed
	if len(u.replies) > 0 {
		msg = s.repetition()
	}
	u.repeat, u.repeatable, u.wrapped = false, false, true
	u.base = s.g.cfg.Coordinator.Applied()
	s.g.metrics.wraps.Inc()
	s.wmu.Lock()
	defer s.wmu.Unlock()
	u.hidden = s.appendBegin(u.unlock)
	s.toServer.buf = append(s.toServer.buf, msg...)
	return s.flushServerLocked()
}

// repetition returns the batch without what must not be done twice: preparing and closing named statements, as far
// as that was answered.
func (s *session) repetition() []byte {
	u := &s.unit
	var out []byte
	rest := u.msg
	for i := 0; len(rest) >= 5; i++ {
		n := int(uint32(rest[1])<<24|uint32(rest[2])<<16|uint32(rest[3])<<8|uint32(rest[4])) + 1
		msg := rest[:n]
		rest = rest[n:]
		if i < u.answered && i < len(u.names) && u.names[i] != "" && (msg[0] == 'P' || msg[0] == 'C') {
			u.skip--
			continue
		}
		out = append(out, msg...)
	}
	return out
}
