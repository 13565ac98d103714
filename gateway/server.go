package gateway

import (
	"fmt"
	"time"

	"github.com/quorate/quorate/txn"
)

// serverLoop reads what the server says and matches it with the queue of expected replies.
func (s *session) serverLoop() error {
	for {
		m, err := s.srv.next(s.flushFn)
		if err != nil {
			return fmt.Errorf("read from server: %w", err)
		}
		if s.streaming && (m.typ == 'D' || m.typ == 'd') { // rows: nothing to decide
			if err := s.relay(m); err != nil {
				return err
			}
			continue
		}
		r, ok := s.front()
		switch {
		case m.typ == 'N' || m.typ == 'S' || m.typ == 'A':
			err = s.async(m, r.quiet)
		case !ok:
			err = s.unexpected(m)
		case r.until == opBegin:
			err = s.answerBegin(r, m)
		case r.until == opUnit:
			err = s.conductUnit(m)
		case r.until == opCommit:
			err = s.conductCommit(m)
		case r.until == opEvict:
			err = s.conductEvict(m)
		default:
			err = s.answer(r, m)
		}
		if err != nil {
			return err
		}
	}
}

// unexpected deals with what comes without having been asked for: the server's reason for ending the session.
func (s *session) unexpected(m message) error {
	if m.typ != 'E' {
		return fmt.Errorf("message %q from server without a request", m.typ)
	}
	s.mu.Lock()
	s.fatal = true
	s.mu.Unlock()
	return s.relay(m)
}

// answer relays, or swallows, one message of the reply at the head of the queue.
func (s *session) answer(r reply, m message) error {
	switch m.typ {
	case 'E':
		if err := s.relayError(m, r); err != nil {
			return err
		}
		if r.until != untilReady {
			s.skipToSync()
		}
		return nil
	case 'Z':
		if r.until != untilReady && r.until != untilSync {
			return fmt.Errorf("ReadyForQuery from server while %q was expected", r.until)
		}
		return s.ready(m.data, !r.hidden && !r.noReady)
	case 'G', 'W':
		s.setCopying(true)
	}
	if !r.hidden {
		if err := s.relay(m); err != nil {
			return err
		}
	} else if err := s.srv.discardRest(&m); err != nil {
		return err
	}
	s.streaming = !r.hidden && (r.until == untilReady || r.until == untilExecute)
	if r.until == untilCount {
		s.mu.Lock()
		if s.queue[s.head].count--; s.queue[s.head].count == 0 {
			s.popLocked()
		}
		s.mu.Unlock()
	} else if ends(r.until, m.typ) {
		s.mu.Lock()
		s.copying = false
		if r.stmt != nil {
			r.stmt.state = parseDone
		}
		s.popLocked()
		s.mu.Unlock()
	}
	return nil
}

// answerBegin swallows one message of the answer to a deferred BEGIN. A failure (a function has taken the hidden
// statements away, or the client's cancel request came right then) is told as that of the statement behind it, which the
// server ignores.
func (s *session) answerBegin(r reply, m message) error {
	if m.typ != 'E' {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.queue[s.head].count--; s.queue[s.head].count == 0 {
			s.status = 'T'
			s.popLocked()
		}
		return nil
	}
	if string(errorField(m.body(), 'C')) == codeNoStatement {
		s.forgetPrepared()
		r.subst = errForgotten
	}
	s.mu.Lock()
	s.popLocked()
	var next byte
	if s.head < len(s.queue) {
		next = s.queue[s.head].until
	}
	s.mu.Unlock()
	if next == 0 { // the gateway had to know the state before the client's statement could go: nothing to fail in its place
		return s.finish(errNoBegin)
	}
	if err := s.relayError(m, r); err != nil {
		return err
	}
	if next == untilReady { // a Query is ignored too, and brings no ReadyForQuery of its own
		return s.write(appendSync(nil))
	}
	s.skipToSync()
	return nil
}

// ends reports whether a message is the last of a reply, of those that an error or ReadyForQuery does not end.
func ends(until, typ byte) bool {
	switch until {
	case untilParse, untilBind, untilClose:
		return typ == until
	case untilDescribe:
		return typ == 'T' || typ == 'n'
	case untilExecute:
		return typ == 'C' || typ == 'I' || typ == 's'
	}
	return false
}

// skipToSync drops the expected replies that an error has made void.
func (s *session) skipToSync() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.copying = false
	for s.head < len(s.queue) {
		r := &s.queue[s.head]
		if r.until == untilSync {
			return
		}
		if r.stmt != nil {
			r.stmt.state = parseFailed
		}
		s.popLocked()
	}
	s.skipping = true
}

// ready deals with ReadyForQuery, which ends the reply at the head of the queue.
func (s *session) ready(m []byte, relay bool) error {
	if len(m) != 6 {
		return fmt.Errorf("ReadyForQuery from server has %d bytes", len(m))
	}
	status := m[5]
	if s.unlocked && status == 'I' {
		// Someone has opened the side door. It is closed before anything else can be said.
		if err := s.lockAgain(); err != nil {
			return err
		}
	}
	if relay {
		s.cmu.Lock()
		s.doomed = false
		s.appendReadyLocked(status)
		s.cmu.Unlock()
	}
	s.mu.Lock()
	s.setStatusLocked(status)
	s.broken = s.broken && !relay
	s.popLocked()
	last := s.stopping && status == 'I' && s.head == len(s.queue) && relay
	s.mu.Unlock()
	if last {
		return s.finish(errShutdown)
	}
	return nil
}

func (s *session) setStatusLocked(status byte) {
	s.status = status
	s.copying = false
	if status == 'I' {
		s.txnEndedLocked()
		s.evicted, s.cleared, s.poison = false, false, nil
		s.changed.Broadcast()
	}
}

// txnEndedLocked notes that what comes is another transaction.
func (s *session) txnEndedLocked() {
	s.txns++
	s.txnEnded = time.Now()
}

// finish tells the client why its session ends.
func (s *session) finish(e *sqlError) error {
	s.mu.Lock()
	s.fatal = true
	s.mu.Unlock()
	fatal := *e
	fatal.severity = "FATAL"
	s.emit(fatal.append(nil))
	return errSessionOver
}

func (s *session) setCopying(on bool) {
	s.mu.Lock()
	s.copying = on
	s.mu.Unlock()
}

// relay passes a message to the client.
func (s *session) relay(m message) error {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	if s.doomed && (m.typ == 'D' || m.typ == 'd') {
		return s.srv.discardRest(&m)
	}
	s.toClient.buf = append(s.toClient.buf, m.data...)
	if len(s.toClient.buf) > writeBuffer || m.rest > 0 {
		if err := s.flushClientLocked(); err != nil {
			return err
		}
	}
	if m.rest == 0 {
		return nil
	}
	return s.srv.relayRest(&m, func(b []byte) error {
		s.toClient.buf = append(s.toClient.buf, b...)
		if s.doomed { // in the middle of a message there is no way to say more
			return errSessionOver
		}
		return s.flushClientLocked()
	})
}

// relayError passes an ErrorResponse on, or what the client should see instead.
func (s *session) relayError(m message, r reply) error {
	e := s.errorFor(m, r.subst)
	if e != nil {
		if err := s.srv.discardRest(&m); err != nil {
			return err
		}
		s.emit(e.append(nil))
		return nil
	}
	if r.shift != 0 {
		m, err := s.srv.whole(m)
		if err != nil {
			return err
		}
		s.emit(shiftPosition(m.data, r.shift))
		return nil
	}
	return s.relay(m)
}

// errorFor notes that an error goes to the client and returns what replaces it, or nil.
func (s *session) errorFor(m message, subst *sqlError) *sqlError {
	code := string(errorField(m.body(), 'C'))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed, s.broken = true, true
	switch {
	case subst != nil:
		return subst
	case code == codeReadOnly && s.fenced.Load():
		return noQuorumError(string(errorField(m.body(), 'M')))
	case s.poison != nil:
		e := s.poison
		s.poison = nil
		return e
	case s.evicted && code == codeCanceled:
		s.evicted = false
		s.g.metrics.aborts.WithLabelValues(txn.AbortEvicted.String()).Inc()
		return evictedError(s.evictor)
	}
	return nil
}

// async relays what may come at any time.
func (s *session) async(m message, quiet bool) error {
	switch {
	case m.typ == 'S':
		m, err := s.srv.whole(m)
		if err != nil {
			return err
		}
		return s.parameter(m)
	case m.typ == 'N' && quiet && string(errorField(m.body(), 'C')) == codeActive:
		return s.srv.discardRest(&m)
	}
	return s.relay(m)
}

// parameter relays a ParameterStatus. default_transaction_read_only is on at the server, whatever the client sees.
func (s *session) parameter(m message) error {
	name, rest, _ := cstring(m.body())
	value, _, _ := cstring(rest)
	switch string(name) {
	case "default_transaction_read_only":
		off := string(value) == "off"
		s.cmu.Lock()
		if s.pid == 0 { // still starting up, and it has been told nothing
			s.reported = true
			s.toClient.buf = appendParameter(s.toClient.buf, string(name), onOff(true))
		} else if off {
			s.wish.Store(false)
		}
		s.reportLocked()
		s.cmu.Unlock()
		s.unlocked = off
		return nil
	case "standard_conforming_strings":
		s.backslash.Store(string(value) == "off")
	case "client_encoding":
		if unsafeEncoding(string(value)) {
			return s.finish(errEncoding)
		}
	}
	return s.relay(m)
}

// write sends bytes to the server at once. Only the server loop uses it, while it conducts.
func (s *session) write(b []byte) error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	s.toServer.buf = append(s.toServer.buf, b...)
	return s.flushServerLocked()
}

// receive returns the next message that belongs to the conversation with the server; what may come at any time is
// relayed on the way. The client's output is not written out: most often there is more to come.
func (s *session) receive() (message, error) {
	for {
		m, err := s.srv.next(nil)
		if err != nil {
			return m, fmt.Errorf("read from server: %w", err)
		}
		if m.typ != 'N' && m.typ != 'S' && m.typ != 'A' {
			return m, nil
		}
		if err := s.async(m, false); err != nil {
			return m, err
		}
	}
}

// swallow reads to the next ReadyForQuery and returns its status, and the first error on the way, if any. m is the
// first message, if it has been read.
func (s *session) swallow(m message) (status byte, failure []byte, err error) {
	for {
		if m.typ == 0 {
			if m, err = s.receive(); err != nil {
				return 0, nil, err
			}
		}
		switch m.typ {
		case 'Z':
			return m.body()[0], failure, nil
		case 'E':
			if m, err = s.srv.whole(m); err != nil {
				return 0, nil, err
			}
			if failure == nil {
				failure = append([]byte(nil), m.data...)
			}
		default:
			if err = s.srv.discardRest(&m); err != nil {
				return 0, nil, err
			}
		}
		m = message{}
	}
}

// lockAgain sets default_transaction_read_only back to on.
func (s *session) lockAgain() error {
	if err := s.write(appendSync(appendHidden(nil, "SET default_transaction_read_only = on"))); err != nil {
		return err
	}
	_, failure, err := s.swallow(message{})
	if err != nil {
		return err
	}
	if failure != nil || s.unlocked {
		return fmt.Errorf("the server refuses to set default_transaction_read_only: %s", errorField(failure[5:], 'M'))
	}
	return nil
}
