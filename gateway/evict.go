package gateway

import (
	"context"
	"strconv"
	"time"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
)

// evictRetry is how often a statement that has not ended is cancelled again: the request may have come between two
// statements, or an exception handler may have caught it.
const evictRetry = 50 * time.Millisecond

// beginEvict reports whether an eviction is to be started. If one is at work already it is told to look again when
// it is done: by then another transaction may be in the way.
//
// An innocent transaction must be spared: not only would its client be asked to repeat it for nothing, but if its marker
// is out already it is committed, from the log, and its session has to end.
func (s *session) beginEvict(by txn.CSN, seen time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.txnEnded.After(seen) {
		return false
	}
	if s.evicting || s.ended {
		s.evictNext, s.evictTxns = by, s.txns
		return false
	}
	s.evicting, s.evictNext, s.evictTxns = true, by, s.txns
	return true
}

// evict makes the transaction in progress let go, so that a log entry can be applied, and goes on as long as it is
// asked to.
func (s *session) evict() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.evictNext != 0 && !s.ended {
		by, txns := s.evictNext, s.evictTxns
		s.evictNext = 0
		s.mu.Unlock()
		s.evictOne(by, txns)
		s.mu.Lock()
	}
	s.evicting = false
	s.changed.Broadcast()
}

// evictOne returns when transaction number txns of this session has let go, or has been made to by ending its backend.
func (s *session) evictOne(by txn.CSN, txns uint64) {
	s.g.metrics.evicted.Inc()
	deadline := time.Now().Add(s.g.cfg.EvictTimeout)
	for !s.tryEvict(by, txns) {
		if time.Now().After(deadline) {
			s.terminate(by)
			return
		}
		select {
		case <-time.After(evictRetry):
		case <-s.g.ctx.Done():
			return
		}
	}
}

// tryEvict does what can be done now. It returns true when the transaction has let go or is about to by itself.
func (s *session) tryEvict(by txn.CSN, txns uint64) bool {
	// A client that sends a long message holds this; then it is in the middle of a statement, and cancelling is all.
	free := s.wmu.TryLock()
	unlock := func() {
		if free {
			s.wmu.Unlock()
		}
	}
	visible := s.g.cfg.Coordinator.Applied() >= by // then the request is an old one: nothing stands in its way
	s.mu.Lock()
	if s.ended || s.txns != txns || s.phase == phaseEnding || visible {
		s.mu.Unlock()
		unlock()
		return true
	}
	if s.phase == phaseDeciding {
		if s.undone || !free {
			undone := s.undone
			s.mu.Unlock()
			unlock()
			return undone
		}
		s.undone, s.evicted, s.evictor = true, true, by
		commit := s.commit
		s.mu.Unlock()
		s.ensurePrepared()
		s.toServer.buf = append(s.toServer.buf, runRollback...)
		if err := s.flushServerLocked(); err != nil {
			s.log.Warn("roll back evicted transaction", logkey.Error, err) // the server loop will meet it too
		}
		unlock()
		commit.Lost()
		return true
	}
	if s.phase == phaseNone && s.head == len(s.queue) {
		if s.status == 'I' || s.cleared {
			s.mu.Unlock()
			unlock()
			return true
		}
		if !free || len(s.toServer.buf) > 0 || s.skipping || s.cancels > 0 {
			s.mu.Unlock()
			unlock()
			return false // the client has just begun or cancelled something, or the server ignores everything until its Sync
		}
		s.evictor, s.cleared = by, true
		if s.status == 'T' {
			s.poison = evictedError(by)
		}
		s.queue = append(s.queue, reply{until: opEvict})
		s.mu.Unlock()
		s.sendClear(by)
		unlock()
		return true
	}
	// A statement is running.
	s.evicted, s.evictor = true, by
	copying := s.copying
	s.cancels++
	s.hurried = true
	s.mu.Unlock()
	if copying && free {
		b, at := begin(s.toServer.buf, 'f')
		s.toServer.buf = end(appendCString(b, "aborted by a replicated transaction"), at)
		if err := s.flushServerLocked(); err != nil {
			s.log.Warn("end COPY of evicted transaction", logkey.Error, err)
		}
	}
	unlock()
	_ = s.client.SetWriteDeadline(time.Now()) // frees the server loop from a client that does not read
	s.sendCancel()
	s.mu.Lock()
	s.cancels--
	s.changed.Broadcast()
	s.mu.Unlock()
	return false
}

// sendClear rolls the block back and leaves a failed one in its place: it holds no locks, and whatever the client
// does next is answered by the server as in any failed block.
func (s *session) sendClear(by txn.CSN) {
	s.ensurePrepared()
	b := appendRun(s.toServer.buf, stRollback)
	b = appendHidden(b, "BEGIN")
	b = appendHidden(b, "SELECT 'aborted by replicated transaction "+strconv.FormatUint(uint64(by), 10)+"'::pg_catalog.int4")
	s.toServer.buf = appendSync(b)
	if err := s.flushServerLocked(); err != nil {
		s.log.Warn("roll back evicted transaction", logkey.Error, err) // the server loop will meet it too
	}
}

// conductEvict swallows the server's answer to sendClear.
func (s *session) conductEvict(m message) error {
	status, _, err := s.swallow(m)
	if err != nil {
		return err
	}
	s.g.metrics.aborts.WithLabelValues(txn.AbortEvicted.String()).Inc()
	s.cmu.Lock()
	s.doomed = false // the transaction is gone: what the client has not taken can wait for it
	s.cmu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status = status
	s.popLocked()
	return nil
}

// terminate ends the backend of a transaction that does not let go.
func (s *session) terminate(by txn.CSN) {
	s.log.Warn("terminating a backend that does not let go of its transaction", logkey.CSN, by)
	if s.g.cfg.Terminate != nil {
		ctx, cancel := context.WithTimeout(s.g.ctx, s.g.cfg.EvictTimeout)
		defer cancel()
		if err := s.g.cfg.Terminate(ctx, s.pid); err != nil {
			s.log.Error("terminate backend", logkey.Error, err)
		}
	}
	s.mu.Lock()
	s.stopping = true
	s.mu.Unlock()
	_ = s.client.SetDeadline(time.Now().Add(time.Second))
	_ = s.toServer.conn.Close() // the server loop ends the session
}

// cancelByClient passes a client's cancel request on. A commit that waits for its verdict cannot be cancelled, as in
// PostgreSQL, and above all the request must not meet the COMMIT that is released.
func (s *session) cancelByClient() {
	s.mu.Lock()
	if s.phase == phaseDeciding || s.phase == phaseEnding || s.head == len(s.queue) || s.ended {
		s.mu.Unlock()
		return
	}
	s.cancels++
	s.mu.Unlock()
	s.sendCancel()
	s.mu.Lock()
	s.cancels--
	s.changed.Broadcast()
	s.mu.Unlock()
}
