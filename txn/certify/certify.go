// Package certify decides from the log alone which transactions commit. Every node feeds its own Certifier the same
// log and gets the same verdicts; nobody votes. DESIGN.md in this directory explains the rules and the memory.
//
// The package is pure: no clock, no goroutine, no I/O besides snapshots, and no result that depends on the iteration
// order of a map or on which node asks.
package certify

import (
	"encoding/binary"
	"math"

	"github.com/quorate/quorate/internal/invariant"
	"github.com/quorate/quorate/txn"
)

// Config bounds the memory of a Certifier. The bounds take part in the decisions, and so must be equal on all nodes
// for the life of the log; a snapshot carries them, and Restore takes them from there.
type Config struct {
	// MaxKeys is how many keys are remembered, about 64 bytes each. Beyond it the certifier raises its own horizon
	// until the rest fits. 0 means DefaultMaxKeys; at most MaxMaxKeys.
	MaxKeys int
	// MaxOutcomes is how many decisions are remembered, about 120 bytes each. Beyond it the oldest is forgotten, and
	// the horizon raised where forgetting would otherwise let the same transaction in a second time. The number is
	// exceeded only by what cannot be forgotten safely: abort requests and invalid transactions since the last
	// commit. 0 means DefaultMaxOutcomes; at most MaxMaxKeys.
	MaxOutcomes int
}

// Defaults and limit of Config. At 2,000 transactions per second with two new keys each, both defaults reach back
// more than four minutes.
const (
	DefaultMaxKeys     = 1 << 20
	DefaultMaxOutcomes = 1 << 19
	MaxMaxKeys         = 1 << 31
)

// Certifier holds what is needed to judge the next transaction. Create it with New. It is not safe for concurrent
// use, except that a Snapshot lives on its own.
type Certifier struct {
	maxKeys     int
	maxOutcomes int

	// last is the CSN of the latest commit. What happened at or below horizon is forgotten: a transaction that would
	// have to be compared with it aborts. epoch <= horizon <= last <= horizon+window.
	last, horizon txn.CSN
	// lastUse is the latest CSN, by mode, at which any key was used. It outlives the keys, and so tells whether
	// anything is forgotten that a base below the horizon would have to be compared with.
	lastUse [txn.NumModes]txn.CSN
	digest  uint64

	// keys holds CSNs as 32-bit offsets from epoch, which is moved up to the horizon before they overflow. Neither
	// the epoch nor how far pruning has come can be observed from outside.
	keys   table
	epoch  txn.CSN
	window txn.CSN // how far last may be ahead of horizon; constant but in tests

	outcomes memory

	found []uint32 // scratch of judge, for record: where the keys of the transaction were found
}

// maxWindow keeps offsets from an epoch that lags the horizon by up to maxWindow within 32 bits.
const maxWindow = 1<<31 - 1

// Work done for pruning in each Decide: pruneBase records and pruneEach per key of the transaction, so that pruning
// is faster than growth and no Decide takes long. Decisions likewise.
const (
	pruneBase     = 16
	pruneEach     = 2
	pruneOutcomes = 8
)

// New returns a certifier that has seen nothing.
func New(cfg Config) *Certifier {
	c := &Certifier{maxKeys: cfg.MaxKeys, maxOutcomes: cfg.MaxOutcomes, window: maxWindow}
	if c.maxKeys == 0 {
		c.maxKeys = DefaultMaxKeys
	}
	if c.maxOutcomes == 0 {
		c.maxOutcomes = DefaultMaxOutcomes
	}
	invariant.Check(c.maxKeys > 0 && c.maxKeys <= MaxMaxKeys, "certifier with MaxKeys %d", cfg.MaxKeys)
	invariant.Check(c.maxOutcomes > 0 && c.maxOutcomes <= MaxMaxKeys, "certifier with MaxOutcomes %d", cfg.MaxOutcomes)
	c.keys = newTable()
	c.outcomes = newMemory()
	return c
}

// Decide judges the next transaction of the log; the transactions of one entry in their order. A commit gets the
// next CSN. The write set is not kept.
//
// A GID that was decided before aborts with AbortDuplicate, and the first decision stands: see Outcome. One that an
// Abort preceded aborts with AbortRequested, as often as it comes. A write set that no correct origin sends (no GID,
// Base above Seen, Seen above LastCSN, an unknown mode) aborts with AbortInvalid: it comes from the log, so all nodes
// must go on alike, but its origin should stop.
func (c *Certifier) Decide(w *txn.WriteSet) txn.Verdict {
	c.prune(pruneBase + pruneEach*len(w.Keys))
	v, known := c.Outcome(w.GID)
	switch {
	case known && v.Reason == txn.AbortRequested:
	case known:
		v = txn.Verdict{Reason: txn.AbortDuplicate}
	default:
		v = c.judge(w)
		before := c.last
		if v.Commits() {
			v.CSN = c.record(w)
		}
		if !w.GID.IsZero() {
			c.remember(w.GID, before, v)
		}
	}
	c.fold(w.GID, v)
	return v
}

// Abort makes an attempt to commit that is still undecided abort when it comes, and returns the decision that stands:
// the one made before, or AbortRequested.
//
// The request is forgotten when the horizon has risen beyond the CSN at which it came. That is safe because whoever
// asks for an abort does so after Seen was read, so that the transaction then aborts with AbortHorizon.
func (c *Certifier) Abort(gid txn.GID) txn.Verdict {
	v, known := c.Outcome(gid)
	if !known && !gid.IsZero() {
		v = txn.Verdict{Reason: txn.AbortRequested}
		c.remember(gid, c.last, v)
	}
	c.fold(gid, v)
	return v
}

// Advance allows what happened at or below horizon to be forgotten. The horizon never goes back, and never beyond
// LastCSN. Memory is given back bit by bit, in the Decide calls that follow.
func (c *Certifier) Advance(horizon txn.CSN) { c.raise(min(horizon, c.last)) }

// Horizon returns the lowest Seen and Base that can still be judged.
func (c *Certifier) Horizon() txn.CSN { return c.horizon }

// LastCSN returns the CSN of the latest commit, which is also the number of commits.
func (c *Certifier) LastCSN() txn.CSN { return c.last }

// Keys returns how many keys are in memory, those not pruned yet included. At most Config.MaxKeys.
func (c *Certifier) Keys() int { return c.keys.count }

// Digest returns a hash over all verdicts so far, and over the horizon at each. Nodes that have taken the same log
// have the same digest.
func (c *Certifier) Digest() uint64 { return c.digest }

// Outcome returns the first decision on gid, AbortRequested if only an Abort has come so far. Decisions are forgotten
// when the horizon has passed the CSN before which they were made, and earlier if there are more than
// Config.MaxOutcomes.
func (c *Certifier) Outcome(gid txn.GID) (txn.Verdict, bool) {
	o := c.outcomes.find(gid)
	if o == nil || o.before < c.horizon {
		return txn.Verdict{}, false
	}
	return o.verdict(), true
}

// judge compares w with what has committed. The only state it changes is the scratch c.found.
func (c *Certifier) judge(w *txn.WriteSet) txn.Verdict {
	if w.GID.IsZero() || w.Base > w.Seen || w.Seen > c.last {
		return txn.Verdict{Reason: txn.AbortInvalid}
	}
	for i := range w.Keys {
		if !w.Keys[i].Mode.Valid() {
			return txn.Verdict{Reason: txn.AbortInvalid}
		}
	}
	if w.Seen < c.horizon || w.Base < c.horizon && c.baseMatters(w) {
		return txn.Verdict{Reason: txn.AbortHorizon}
	}
	// A base below the epoch does not matter here, else we would not have come this far.
	seen, base := c.offset(w.Seen), c.offset(max(w.Base, c.epoch))
	c.found = c.found[:0]
	for i := range w.Keys {
		k := &w.Keys[i]
		ref := c.keys.find(&k.Key)
		c.found = append(c.found, ref)
		if ref == 0 {
			continue
		}
		rule := &rules[k.Mode]
		latest := uint32(0)
		for mode, at := range &c.keys.at(ref).last {
			if at > latest && (rule[mode] == sinceSeen && at > seen || rule[mode] == sinceBase && at > base) {
				latest = at
			}
		}
		if latest > 0 {
			return txn.Verdict{Reason: txn.AbortConflict, With: c.epoch + txn.CSN(latest), Key: k.Key, Mode: k.Mode}
		}
	}
	return txn.Verdict{}
}

// baseMatters reports whether w, whose base is below the horizon, may conflict with something forgotten that lies
// above its base: it has a key in a mode that is judged from the base against a mode that has been used since.
func (c *Certifier) baseMatters(w *txn.WriteSet) bool {
	for i := range w.Keys {
		for mode, window := range &rules[w.Keys[i].Mode] {
			if window == sinceBase && c.lastUse[mode] > w.Base {
				return true
			}
		}
	}
	return false
}

// record makes w, just judged, the next commit.
func (c *Certifier) record(w *txn.WriteSet) txn.CSN {
	csn := c.last + 1
	if csn-c.epoch > 2*c.window {
		c.keys.rebase(c.offset(c.horizon))
		c.epoch = c.horizon
	}
	at := c.offset(csn)
	for i := range w.Keys {
		k := &w.Keys[i]
		ref := c.found[i]
		if ref == 0 {
			ref = c.keys.findOrAdd(&k.Key) // it may be twice in w
		}
		c.keys.use(ref, k.Mode, at)
		c.lastUse[k.Mode] = csn
	}
	c.last = csn
	if csn-c.horizon > c.window {
		c.raise(csn - c.window)
	}
	for c.keys.count > c.maxKeys {
		// Records that only await pruning are the oldest, so the horizon that comes out does not depend on how many
		// of them there are.
		c.raise(c.epoch + txn.CSN(c.keys.dropOldest()))
	}
	return csn
}

// remember keeps the first decision on gid, made when the latest commit was before.
func (c *Certifier) remember(gid txn.GID, before txn.CSN, v txn.Verdict) {
	c.outcomes.add(outcome{gid: gid, before: before, with: v.With, key: v.Key, mode: v.Mode, reason: v.Reason})
	for c.outcomes.len() > c.maxOutcomes {
		o := c.outcomes.oldest()
		// A lost conflict, and having been below the horizon, are for ever: judged again the transaction aborts
		// again. Anything else must be below the horizon when it is forgotten.
		if o.before >= c.horizon && o.reason != txn.AbortConflict && o.reason != txn.AbortHorizon {
			if o.before == c.last {
				return
			}
			c.raise(o.before + 1)
		}
		c.outcomes.dropOldest()
	}
}

func (c *Certifier) raise(horizon txn.CSN) { c.horizon = max(c.horizon, horizon) }

// prune gives back up to steps keys that no transaction can be compared with any more, and a few decisions.
func (c *Certifier) prune(steps int) {
	for limit := c.offset(c.horizon); steps > 0 && c.keys.count > 0 && c.keys.oldestUse() <= limit; steps-- {
		c.keys.dropOldest()
	}
	for range pruneOutcomes {
		if c.outcomes.len() == 0 || c.outcomes.oldest().before >= c.horizon {
			return
		}
		c.outcomes.dropOldest()
	}
}

func (c *Certifier) offset(csn txn.CSN) uint32 {
	d := csn - c.epoch
	if csn < c.epoch || d > math.MaxUint32 {
		invariant.Check(false, "certifier: CSN %d has no offset from epoch %d", csn, c.epoch)
	}
	return uint32(d)
}

// fold adds a verdict to the digest. Each step is a bijection of the digest, so no difference is ever lost.
func (c *Certifier) fold(gid txn.GID, v txn.Verdict) {
	d := c.digest
	for _, x := range [...]uint64{
		uint64(gid.Node), gid.Incarnation, gid.Sequence, uint64(c.horizon),
		uint64(v.CSN), uint64(v.Reason) | uint64(v.Mode)<<8, uint64(v.With),
		binary.LittleEndian.Uint64(v.Key[:8]), binary.LittleEndian.Uint64(v.Key[8:]),
	} {
		d = (d ^ x) * 0x9e3779b97f4a7c15
		d ^= d >> 29
	}
	c.digest = d
}

// The window over which a pair of modes is compared.
const (
	never = iota
	sinceSeen
	sinceBase
)

// rules is the conflict matrix of package txn in the form in which judge uses it: by the younger transaction's mode,
// then the elder's.
var rules = func() (r [txn.NumModes][txn.NumModes]uint8) {
	for a := range txn.Mode(txn.NumModes) {
		for b := range txn.Mode(txn.NumModes) {
			switch {
			case !a.Valid() || !b.Valid() || !txn.Conflicts(a, b):
				r[a][b] = never
			case txn.SinceBase(a, b):
				r[a][b] = sinceBase
			default:
				r[a][b] = sinceSeen
			}
		}
	}
	return r
}()
