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

const (
	outcomesBits = 10
	outcomesPage = 1 << outcomesBits
)

// memory is a queue of decisions, oldest first, that can be searched by GID.
//
// The queue is made of pages. A place in a page is written once, by add, and a page is let go when all its decisions
// are dropped, so a copy of the list of pages is a consistent copy of the queue.
type memory struct {
	pages       []*[outcomesPage]outcome // the first holds the number first
	first, next uint64                   // numbers of the oldest decision and of the one to come
	names       map[txn.GID]*names
}

// names are the numbers (lower 32 bits) of the decisions on 16 GIDs that differ in the lower 4 bits of Sequence
// only; memory.names has them under the GID with these bits shifted out. A node's transactions come about in sequence, so
// what is looked up, added and dropped next is where the last was, in cache, where a map by GID would be hit at
// random three times per transaction.
type names struct {
	used   uint16 // bit i: number[i] is set
	number [16]uint32
}

func newMemory() memory { return memory{names: make(map[txn.GID]*names)} }

func (m *memory) len() int { return int(m.next - m.first) }

func (m *memory) at(number uint64) *outcome {
	return &m.pages[number>>outcomesBits-m.first>>outcomesBits][number%outcomesPage]
}

// block splits a GID into its name in memory.names and its place there.
func block(gid txn.GID) (name txn.GID, place int) {
	place = int(gid.Sequence & 15)
	gid.Sequence >>= 4
	return gid, place
}

// find returns the decision on gid, valid until it is dropped; nil if there is none.
func (m *memory) find(gid txn.GID) *outcome {
	name, place := block(gid)
	n := m.names[name]
	if n == nil || n.used&(1<<place) == 0 {
		return nil
	}
	return m.at(m.first + uint64(n.number[place]-uint32(m.first)))
}

// add appends a decision on a GID that has none, or has one that is below the horizon and so counts as forgotten:
// that one loses its name and waits, nameless, for its turn to be dropped.
func (m *memory) add(o outcome) {
	if len(m.pages) == 0 || m.next>>outcomesBits-m.first>>outcomesBits == uint64(len(m.pages)) {
		m.pages = append(m.pages, new([outcomesPage]outcome))
	}
	*m.at(m.next) = o
	name, place := block(o.gid)
	n := m.names[name]
	if n == nil {
		n = new(names)
		m.names[name] = n
	}
	n.used |= 1 << place
	n.number[place] = uint32(m.next)
	m.next++
}

// oldest must not be called on an empty memory.
func (m *memory) oldest() *outcome { return m.at(m.first) }

func (m *memory) dropOldest() {
	name, place := block(m.oldest().gid)
	if n := m.names[name]; n != nil && n.used&(1<<place) != 0 && n.number[place] == uint32(m.first) {
		if n.used &^= 1 << place; n.used == 0 {
			delete(m.names, name)
		}
	}
	m.first++
	if m.first%outcomesPage == 0 {
		m.pages[0] = nil
		m.pages = m.pages[1:]
	}
}

// clone returns a copy for reading the queue; it cannot be searched.
func (m *memory) clone() memory {
	return memory{pages: slices.Clone(m.pages), first: m.first, next: m.next}
}
