package certify_test

import (
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/certify"
)

// reference is the certifier as one would write it down: it forgets nothing, and compares with everything.
type reference struct {
	cfg       certify.Config
	window    txn.CSN
	horizon   txn.CSN
	committed []*txn.WriteSet // the first has CSN 1
	outcomes  []decided       // those not forgotten because of MaxOutcomes
}

type decided struct {
	gid     txn.GID
	before  txn.CSN
	verdict txn.Verdict
}

func (r *reference) last() txn.CSN { return txn.CSN(len(r.committed)) }

func (r *reference) outcome(gid txn.GID) (txn.Verdict, bool) {
	for _, o := range r.outcomes {
		if o.gid == gid && o.before >= r.horizon {
			return o.verdict, true
		}
	}
	return txn.Verdict{}, false
}

func (r *reference) decide(w *txn.WriteSet) txn.Verdict {
	if v, known := r.outcome(w.GID); known && v.Reason == txn.AbortRequested {
		return v
	} else if known {
		return txn.Verdict{Reason: txn.AbortDuplicate}
	}
	v := r.judge(w)
	before := r.last()
	if v.Commits() {
		r.committed = append(r.committed, w)
		v.CSN = r.last()
		if r.last()-r.horizon > r.window {
			r.horizon = r.last() - r.window
		}
		r.limitKeys()
	}
	if !w.GID.IsZero() {
		r.remember(w.GID, before, v)
	}
	return v
}

func (r *reference) judge(w *txn.WriteSet) txn.Verdict {
	if w.GID.IsZero() || w.Base > w.Seen || w.Seen > r.last() {
		return txn.Verdict{Reason: txn.AbortInvalid}
	}
	for _, k := range w.Keys {
		if !k.Mode.Valid() {
			return txn.Verdict{Reason: txn.AbortInvalid}
		}
	}
	if w.Seen < r.horizon {
		return txn.Verdict{Reason: txn.AbortHorizon}
	}
	if w.Base < r.horizon {
		for _, k := range w.Keys {
			for _, elder := range r.committed[w.Base:] {
				for _, e := range elder.Keys {
					if txn.Conflicts(k.Mode, e.Mode) && txn.SinceBase(k.Mode, e.Mode) {
						return txn.Verdict{Reason: txn.AbortHorizon}
					}
				}
			}
		}
	}
	for _, k := range w.Keys {
		for csn := r.last(); csn > w.Base; csn-- {
			for _, e := range r.committed[csn-1].Keys {
				if e.Key == k.Key && txn.Conflicts(k.Mode, e.Mode) && (csn > w.Seen || txn.SinceBase(k.Mode, e.Mode)) {
					return txn.Verdict{Reason: txn.AbortConflict, With: csn, Key: k.Key, Mode: k.Mode}
				}
			}
		}
	}
	return txn.Verdict{}
}

// limitKeys raises the horizon to where no more than MaxKeys different keys are above it.
func (r *reference) limitKeys() {
	keys := make(map[txn.Key]bool)
	for csn := r.last(); csn > r.horizon; csn-- {
		for _, k := range r.committed[csn-1].Keys {
			keys[k.Key] = true
		}
		if len(keys) > r.cfg.MaxKeys {
			r.horizon = csn
			return
		}
	}
}

func (r *reference) abort(gid txn.GID) txn.Verdict {
	if v, known := r.outcome(gid); known {
		return v
	}
	v := txn.Verdict{Reason: txn.AbortRequested}
	r.remember(gid, r.last(), v)
	return v
}

func (r *reference) remember(gid txn.GID, before txn.CSN, v txn.Verdict) {
	r.outcomes = append(r.outcomes, decided{gid, before, v})
	for {
		for len(r.outcomes) > 0 && r.outcomes[0].before < r.horizon {
			r.outcomes = r.outcomes[1:]
		}
		if len(r.outcomes) <= r.cfg.MaxOutcomes {
			return
		}
		o := r.outcomes[0]
		if o.verdict.Reason != txn.AbortConflict && o.verdict.Reason != txn.AbortHorizon {
			if o.before == r.last() {
				return
			}
			r.horizon = o.before + 1
		}
		r.outcomes = r.outcomes[1:]
	}
}

func (r *reference) advance(horizon txn.CSN) {
	r.horizon = max(r.horizon, min(horizon, r.last()))
}
