package certify

import (
	"hash/maphash"
	"slices"

	"github.com/quorate/quorate/txn"
)

// record is one key and when it was last used in each mode, as offsets from the certifier's epoch; 0 is never. The
// records form a list by last use.
type record struct {
	key          txn.Key
	last         [txn.NumModes]uint32 // by mode; at 0, which is no mode, the latest of all
	newer, older uint32
}

// lastUse is the latest use in any mode.
func (r *record) lastUse() uint32 { return r.last[0] }

const (
	pageBits = 10
	pageSize = 1 << pageBits
)

// table is a map from keys to records that can drop the record used least recently, and be copied without delay: a
// copy shares the pages, and the table copies a page when it next writes to it. A built-in map beside the same
// records would need a third more memory.
//
// Records live in pages and are named by reference; reference 0 is none, and its place is the head of the list:
// its newer is the oldest record, its older the newest. Pages are never given back: the table is as large as it once
// had to be.
type table struct {
	pages  []*[pageSize]record
	shared []bool // by page: a copy holds it too
	next   uint32 // lowest reference never given out
	free   uint32 // list of references given back, linked by newer
	count  int

	// slots is an open-addressing hash index with linear probing: fragment of the hash in the upper half (its low
	// bits are the home position), reference in the lower half, 0 if empty. The seed is random: keys are chosen by
	// clients, who must not be able to make long chains. Nothing that depends on it can be observed.
	slots []uint64
	seed  maphash.Seed
}

const minSlots = 64

func newTable() table {
	t := table{next: 1, slots: make([]uint64, minSlots), seed: maphash.MakeSeed()}
	t.addPage()
	return t
}

func (t *table) addPage() {
	t.pages = append(t.pages, new([pageSize]record))
	t.shared = append(t.shared, false)
}

// at returns a record for reading.
func (t *table) at(ref uint32) *record { return &t.pages[ref>>pageBits][ref%pageSize] }

// own returns a record for writing. What at and own returned earlier may then be the record as it was.
func (t *table) own(ref uint32) *record {
	page := ref >> pageBits
	if t.shared[page] {
		t.shared[page] = false
		copied := *t.pages[page]
		t.pages[page] = &copied
	}
	return &t.pages[page][ref%pageSize]
}

func (t *table) hash(k *txn.Key) uint32 { return uint32(maphash.Bytes(t.seed, k[:])) }

// find returns the reference of k's record, or 0.
func (t *table) find(k *txn.Key) uint32 {
	ref, _ := t.search(k, t.hash(k))
	return ref
}

// search returns the reference of k's record and its slot, or 0 and the empty slot where it would be.
func (t *table) search(k *txn.Key, hash uint32) (ref, slot uint32) {
	mask := uint32(len(t.slots) - 1)
	for slot = hash & mask; ; slot = (slot + 1) & mask {
		s := t.slots[slot]
		if s == 0 {
			return 0, slot
		}
		if uint32(s>>32) == hash && t.at(uint32(s)).key == *k {
			return uint32(s), slot
		}
	}
}

// findOrAdd returns the reference of k's record, new and unused if there is none.
func (t *table) findOrAdd(k *txn.Key) uint32 {
	hash := t.hash(k)
	ref, slot := t.search(k, hash)
	if ref != 0 {
		return ref
	}
	if 4*(t.count+1) > 3*len(t.slots) {
		t.enlarge()
		_, slot = t.search(k, hash)
	}
	if ref = t.free; ref != 0 {
		t.free = t.at(ref).newer
	} else {
		ref = t.next
		t.next++
		if int(ref>>pageBits) == len(t.pages) {
			t.addPage()
		}
	}
	*t.own(ref) = record{key: *k}
	t.slots[slot] = uint64(hash)<<32 | uint64(ref)
	t.count++
	t.link(ref)
	return ref
}

// enlarge doubles the index. The fragments suffice for it; the records are not touched.
func (t *table) enlarge() {
	old := t.slots
	t.slots = make([]uint64, 2*len(old))
	mask := uint32(len(t.slots) - 1)
	for _, s := range old {
		if s == 0 {
			continue
		}
		slot := uint32(s>>32) & mask
		for t.slots[slot] != 0 {
			slot = (slot + 1) & mask
		}
		t.slots[slot] = s
	}
}

// use notes that a key was used, later than all others.
func (t *table) use(ref uint32, mode txn.Mode, at uint32) {
	r := t.own(ref)
	r.last[mode], r.last[0] = at, at
	if t.at(0).older != ref {
		t.unlink(ref)
		t.link(ref)
	}
}

// oldestUse is the last use of the record used least recently. There must be one.
func (t *table) oldestUse() uint32 { return t.at(t.at(0).newer).lastUse() }

// dropOldest removes the record used least recently and returns its last use.
func (t *table) dropOldest() uint32 {
	ref := t.at(0).newer
	key, last := t.at(ref).key, t.at(ref).lastUse()
	_, hole := t.search(&key, t.hash(&key))
	// Close the hole: move up what would not be found behind it.
	mask := uint32(len(t.slots) - 1)
	for slot := (hole + 1) & mask; t.slots[slot] != 0; slot = (slot + 1) & mask {
		home := uint32(t.slots[slot]>>32) & mask
		if (slot-home)&mask >= (slot-hole)&mask {
			t.slots[hole] = t.slots[slot]
			hole = slot
		}
	}
	t.slots[hole] = 0
	t.unlink(ref)
	t.own(ref).newer = t.free
	t.free = ref
	t.count--
	return last
}

// link makes ref the newest of the list.
func (t *table) link(ref uint32) {
	newest := t.at(0).older
	t.own(newest).newer = ref
	t.own(0).older = ref
	r := t.own(ref)
	r.older, r.newer = newest, 0
}

func (t *table) unlink(ref uint32) {
	older, newer := t.at(ref).older, t.at(ref).newer
	t.own(older).newer = newer
	t.own(newer).older = older
}

// clone returns a copy for reading the list; it has no index.
func (t *table) clone() table {
	for page := range t.shared {
		t.shared[page] = true
	}
	return table{pages: slices.Clone(t.pages), next: t.next, count: t.count}
}

// rebase subtracts by from every offset; what was at or below it becomes never.
func (t *table) rebase(by uint32) {
	for ref := t.at(0).newer; ref != 0; ref = t.at(ref).newer {
		r := t.own(ref)
		for mode, at := range r.last {
			r.last[mode] = at - min(at, by)
		}
	}
}
