package coord

import (
	"slices"
	"time"

	"github.com/quorate/quorate/txn"
)

// InFlight is a transaction between its COMMIT and its end, for those who look.
type InFlight struct {
	GID   txn.GID
	Stage string // "marker", "sending", "queued", "proposed", "in doubt", "decided" or "released"
	Begun time.Time
	CSN   txn.CSN // 0: not decided
	PID   uint32
}

var stages = [...]string{registered: "marker", sending: "sending", queued: "queued", proposed: "proposed", decided: "decided", released: "released", finished: ""}

// InFlight returns this node's own transactions in flight, the oldest first. "in doubt" is one whose client has been told
// that the outcome is unknown, until the log decides it.
func (c *Coordinator) InFlight() []InFlight {
	c.mu.Lock()
	all := make([]InFlight, 0, len(c.open))
	for _, t := range c.open {
		f := InFlight{GID: t.gid, Stage: stages[t.state], Begun: t.begun, CSN: t.csn, PID: t.pid}
		if t.doubtful {
			f.Stage = "in doubt"
		}
		all = append(all, f)
	}
	c.mu.Unlock()
	slices.SortFunc(all, func(a, b InFlight) int { return a.Begun.Compare(b.Begun) })
	return all
}

// Span is a part of a transaction's life.
type Span struct {
	GID      txn.GID
	Name     string
	From, To time.Time
	CSN      txn.CSN // 0: not decided
	Outcome  string  // of the whole: "committed", or the reason why not
}

// trace ends the part of the transaction's life that began where the last one ended. Called with mu held.
func (t *Transaction) trace(name string) {
	if t.c.cfg.Trace == nil {
		return
	}
	from, now := t.traced, time.Now()
	if from.IsZero() {
		from = t.begun
	}
	t.traced = now
	t.c.cfg.Trace(Span{GID: t.gid, Name: name, From: from, To: now, CSN: t.csn})
}

// traceEnd ends the whole. Called with mu held.
func (t *Transaction) traceEnd(outcome string) {
	if t.c.cfg.Trace != nil {
		t.c.cfg.Trace(Span{GID: t.gid, Name: "commit", From: t.begun, To: time.Now(), CSN: t.csn, Outcome: outcome})
	}
}
