package certify

import (
	"slices"

	"github.com/quorate/quorate/txn"
)

// outcome is a remembered decision. before is the latest commit when it was made: nothing that the transaction saw
// is above it, and a commit's own CSN is the next.
type outcome struct {
	gid    txn.GID
	before txn.CSN
	with   txn.CSN
	key    txn.Key
	mode   txn.Mode
	reason txn.AbortReason
}

func (o *outcome) verdict() txn.Verdict {
	v := txn.Verdict{Reason: o.reason, With: o.with, Key: o.key, Mode: o.mode}
	if v.Commits() {
		v.CSN = o.before + 1
	}
	return v
}

// memory is a queue of decisions, oldest first, that can be searched by GID.
type memory struct {
	ring        []outcome // its length is a power of two
	first, next uint64    // sequence numbers of the oldest and of the one to come
	byGID       map[txn.GID]uint64
}

func newMemory() memory {
	return memory{ring: make([]outcome, 64), byGID: make(map[txn.GID]uint64)}
}

func (m *memory) len() int { return int(m.next - m.first) }

func (m *memory) at(sequence uint64) *outcome { return &m.ring[sequence&uint64(len(m.ring)-1)] }

// find returns the decision on gid, valid until the next add; nil if there is none.
func (m *memory) find(gid txn.GID) *outcome {
	sequence, ok := m.byGID[gid]
	if !ok {
		return nil
	}
	return m.at(sequence)
}

// add appends a decision on a GID that has none, or has one that is below the horizon and so counts as forgotten:
// that one loses its name and waits, nameless, for its turn to be dropped.
func (m *memory) add(o outcome) {
	if m.len() == len(m.ring) {
		old := *m
		m.ring = make([]outcome, 2*len(old.ring))
		for s := old.first; s < old.next; s++ {
			*m.at(s) = *old.at(s)
		}
	}
	*m.at(m.next) = o
	m.byGID[o.gid] = m.next
	m.next++
}

// oldest must not be called on an empty memory.
func (m *memory) oldest() *outcome { return m.at(m.first) }

func (m *memory) dropOldest() {
	if gid := m.oldest().gid; m.byGID[gid] == m.first {
		delete(m.byGID, gid)
	}
	m.first++
}

// clone returns a copy for reading the queue; it cannot be searched.
func (m *memory) clone() memory {
	return memory{ring: slices.Clone(m.ring), first: m.first, next: m.next}
}
