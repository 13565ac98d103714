package coord

import (
	"context"
	"time"

	"github.com/quorate/quorate/internal/invariant"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
)

// state only grows.
type state uint8

const (
	registered state = iota // the marker has not been seen, or not with its seal
	sending                 // parts of a large write set are going into the log
	queued                  // complete, waits for a proposal
	proposed                // may be in the log: only the log decides now
	decided                 // commits as csn; waits for its turn
	released                // the session lets COMMIT through
	finished                // nothing more will happen
)

// maxEvents bounds what can be sent without being read: each step of a transaction is sent at most once, but for
// nudges, which are answered one at a time.
const maxEvents = 8

// Transaction is one held-back COMMIT, between a gateway session, which reads Next, and apply, which releases it.
type Transaction struct {
	c          *Coordinator
	gid        txn.GID
	nonce      uint64
	base, seen txn.CSN
	pid        uint32
	begun      time.Time
	marked     time.Time
	traced     time.Time // where the latest span ended
	events     chan txn.Event
	deadline   time.Time   // for the verdict; set when queued
	timer      *time.Timer // calls expire then

	// Guarded by c.mu.
	state     state
	set       *txn.WriteSet
	csn       txn.CSN
	awaitedBy uint64               // the batch that is being gathered and waits for this one
	lost      bool                 // the local transaction is gone: if the log commits it, the log is applied
	told      bool                 // the session has said Committed or Lost
	ordered   bool                 // certainly in the log
	expired   bool                 // deadline has passed
	doubtful  bool                 // the session was told that the outcome is unknown
	orphan    bool                 // the session is gone: nobody reads events
	through   func(txn.GID)        // see OnRelease; nil: the session lets COMMIT through
	ended     func(committed bool) // see Release; set when released, called once
}

// GID identifies this attempt.
func (t *Transaction) GID() txn.GID { return t.gid }

// Seal is what the transaction is sealed and marked with.
func (t *Transaction) Seal() txn.Seal { return txn.Seal{GID: t.gid, Nonce: t.nonce} }

// Base is the applied CSN before the first snapshot, never past Seen.
func (t *Transaction) Base() txn.CSN { return t.base }

// Seen is the applied CSN before the marker.
func (t *Transaction) Seen() txn.CSN { return t.seen }

// PID is the server backend that holds the transaction.
func (t *Transaction) PID() uint32 { return t.pid }

// Next waits for the next step.
func (t *Transaction) Next(ctx context.Context) (txn.Event, error) {
	select {
	case e := <-t.events:
		return e, nil
	case <-ctx.Done():
		return txn.Event{}, context.Cause(ctx)
	}
}

// send is called with mu held and never blocks.
func (t *Transaction) send(e txn.Event) {
	if t.orphan {
		return
	}
	select {
	case t.events <- e:
	default:
		invariant.Check(false, "transaction %s: event %d does not fit", t.gid, e.Step)
	}
}

// abort ends a transaction that the log certainly does not let commit. Called with mu held.
func (t *Transaction) abort(reason txn.AbortReason) {
	t.state = finished
	t.traceEnd(reason.String())
	t.set = nil
	delete(t.c.open, t.gid)
	t.c.metrics.decided.WithLabelValues(reason.String()).Inc()
	t.send(txn.Event{Step: txn.StepAbort, Reason: reason})
}

// expire ends the wait for the verdict. While a proposal is under way its outcome tells which end that is.
func (t *Transaction) expire() {
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	t.expired = true
	switch {
	case t.state == queued:
		t.c.unqueue(t).abort(t.c.blame)
	case t.state == proposed && t.ordered:
		t.giveUp(errNoVerdict)
	}
}

// giveUp tells the session that the outcome is unknown. The log's verdict may still come. Called with mu held.
func (t *Transaction) giveUp(why error) {
	t.c.cfg.Logger.Warn("commit outcome unknown", logkey.GID, t.gid, logkey.Error, why)
	t.doubtful = true
	t.send(txn.Event{Step: txn.StepUnknown})
}

// OnRelease has through called by whoever releases the transaction, before StepRelease is sent: to write COMMIT to the server
// then and there, because waking the session for it would delay every commit that comes after it. It is called once at most, and
// must not block.
func (t *Transaction) OnRelease(through func(txn.GID)) {
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	t.through = through
}

// Release lets the held-back COMMIT through. It does not block; ended is told the session's report: false perhaps with locks
// held.
func (t *Transaction) Release(ended func(committed bool)) {
	t.c.mu.Lock()
	if t.lost || t.state == finished { // by Detach
		t.c.mu.Unlock()
		ended(false)
		return
	}
	t.state, t.ended = released, ended
	if t.through != nil && len(t.events) == 0 && !t.orphan {
		t.c.mu.Unlock()
		t.through(t.gid)
		t.c.mu.Lock()
	}
	t.send(txn.Event{Step: txn.StepRelease, CSN: t.csn})
	t.c.mu.Unlock()
}

// Committed is the session's report that the server said COMMIT.
func (t *Transaction) Committed() {
	t.c.mu.Lock()
	ended := t.ended
	if t.told {
		ended = nil
	}
	t.reportLocked(true)
	t.c.mu.Unlock()
	if ended != nil {
		ended(true)
	}
}

// Lost is the session's report that the local transaction is gone, or that nothing is known of it: the connection
// broke, COMMIT failed, or it had to make way. Next then yields StepAbort, StepVisible or StepUnknown.
func (t *Transaction) Lost() {
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	t.reportLocked(false)
}

func (t *Transaction) reportLocked(committed bool) {
	if t.told {
		return
	}
	t.told = true
	t.lost = !committed
	if t.lost && t.ended != nil {
		t.ended(false)
	}
	switch {
	case t.state == finished:
	case committed:
		invariant.Check(t.state == released, "transaction %s committed in state %d, before its turn", t.gid, t.state)
		t.c.finish(t)
		t.c.metrics.total.Observe(time.Since(t.begun).Seconds())
	case t.state == queued:
		t.c.unqueue(t).abort(txn.AbortEvicted)
	case t.state == registered:
		t.c.arrived(t)
		t.abort(txn.AbortEvicted)
	}
	// sending: the sender sees lost. proposed and later: the log decides.
}

// Visible says that the transaction can be seen although the session did not report that it committed. The report may
// still come; it is late then, but true.
func (t *Transaction) Visible(csn txn.CSN) {
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	if t.state == finished {
		return
	}
	t.c.finish(t)
	t.send(txn.Event{Step: txn.StepVisible, CSN: csn})
}

// Close ends the session's interest. A transaction that may be in the log stays known until the log has decided it.
func (t *Transaction) Close() {
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	t.orphan = true
	if t.timer != nil {
		t.timer.Stop()
	}
	switch t.state {
	case registered:
		t.c.arrived(t)
		t.state = finished
		delete(t.c.open, t.gid)
	case finished:
	default:
		t.reportLocked(false)
	}
}
