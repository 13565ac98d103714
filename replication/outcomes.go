package replication

import (
	"cmp"
	"container/list"
	"encoding/binary"
	"fmt"
	"maps"
	"math/bits"
	"slices"

	"github.com/quorate/quorate/txn"
)

// Outcome is what the log says of an attempt to commit.
type Outcome uint8

// The outcomes.
const (
	// Forgotten: nothing is known of it, and nothing will be: it was decided long ago, or is nobody's.
	Forgotten Outcome = iota
	// Undecided: it is not in the log so far.
	Undecided
	Committed
	Aborted
)

// keptOutcomes is how many decisions are remembered, for clients that ask later: a million, give or take the pages that
// are being filled. A page of 64 takes about 150 bytes of memory: 2.5 MB where all of a node's GIDs reach the log, and
// more where most are of transactions that only read, up to 150 MB if 63 of 64 are.
const keptOutcomes = 1 << 20

// outcomes remembers decisions by GID, far longer than the certifier, which has to know more of each. It is part of the
// state that the log determines: what is forgotten, and when, is alike on all nodes.
type outcomes struct {
	keep  int
	count int
	pages map[pageName]*list.Element
	used  list.List // of *outcomePage, the one with the newest decision last
	// incarnations has all that were ever heard of, with the highest sequence number that may have been forgotten.
	incarnations map[incarnation]uint64
}

type incarnation struct {
	node txn.NodeID
	id   uint64
}

type pageName struct {
	incarnation
	number uint64 // sequence number without its lowest pageBits
}

const pageBits = 6

// outcomePage has a bit for each of 64 consecutive GIDs.
type outcomePage struct {
	pageName
	committed, aborted uint64
}

func (p *outcomePage) count() int { return bits.OnesCount64(p.committed | p.aborted) }

func newOutcomes(keep int) outcomes {
	return outcomes{keep: keep, pages: make(map[pageName]*list.Element), incarnations: make(map[incarnation]uint64)}
}

func place(gid txn.GID) (pageName, uint64) {
	return pageName{incarnation{gid.Node, gid.Incarnation}, gid.Sequence >> pageBits}, 1 << (gid.Sequence % (1 << pageBits))
}

// begin notes that an incarnation exists.
func (o *outcomes) begin(node txn.NodeID, id uint64) {
	if _, known := o.incarnations[incarnation{node, id}]; !known {
		o.incarnations[incarnation{node, id}] = 0
	}
}

func (o *outcomes) find(gid txn.GID) Outcome {
	name, bit := place(gid)
	if e := o.pages[name]; e != nil {
		switch p := e.Value.(*outcomePage); {
		case p.committed&bit != 0:
			return Committed
		case p.aborted&bit != 0:
			return Aborted
		}
	}
	if forgotten, known := o.incarnations[name.incarnation]; !known || gid.Sequence <= forgotten {
		return Forgotten
	}
	return Undecided
}

// tooOld reports whether gid may have been decided and forgotten.
func (o *outcomes) tooOld(gid txn.GID) bool {
	return gid.Sequence <= o.incarnations[incarnation{gid.Node, gid.Incarnation}] && o.find(gid) == Forgotten
}

// add notes a decision. The first one stands, and what is too old is not noted: it may not be the first.
func (o *outcomes) add(gid txn.GID, committed bool) {
	o.begin(gid.Node, gid.Incarnation)
	if o.find(gid) != Undecided {
		return
	}
	name, bit := place(gid)
	e := o.pages[name]
	if e == nil {
		e = o.used.PushBack(&outcomePage{pageName: name})
		o.pages[name] = e
	}
	o.used.MoveToBack(e)
	p := e.Value.(*outcomePage)
	if committed {
		p.committed |= bit
	} else {
		p.aborted |= bit
	}
	o.count++
	for oldest := o.oldest(); o.count-oldest.count() >= o.keep; oldest = o.oldest() {
		o.used.Remove(o.used.Front())
		delete(o.pages, oldest.pageName)
		o.count -= oldest.count()
		last := (oldest.number+1)<<pageBits - 1
		o.incarnations[oldest.incarnation] = max(o.incarnations[oldest.incarnation], last)
	}
}

func (o *outcomes) oldest() *outcomePage { return o.used.Front().Value.(*outcomePage) }

// encode writes the state; equal histories give equal bytes.
func (o *outcomes) encode() []byte {
	known := slices.SortedFunc(maps.Keys(o.incarnations), func(a, b incarnation) int {
		return cmp.Or(cmp.Compare(a.node, b.node), cmp.Compare(a.id, b.id))
	})
	places := make(map[incarnation]uint64, len(known))
	b := binary.AppendUvarint(nil, uint64(len(known)))
	for i, k := range known {
		places[k] = uint64(i)
		b = binary.AppendUvarint(b, uint64(k.node))
		b = binary.BigEndian.AppendUint64(b, k.id)
		b = binary.AppendUvarint(b, o.incarnations[k])
	}
	for e := o.used.Front(); e != nil; e = e.Next() {
		p := e.Value.(*outcomePage)
		b = binary.AppendUvarint(b, places[p.incarnation])
		b = binary.AppendUvarint(b, p.number)
		b = binary.BigEndian.AppendUint64(b, p.committed)
		b = binary.BigEndian.AppendUint64(b, p.aborted)
	}
	return b
}

// decode reads what encode wrote. Nothing at all is an empty memory.
func (o *outcomes) decode(b []byte) error {
	*o = newOutcomes(o.keep)
	if len(b) == 0 {
		return nil
	}
	bad := false
	uvarint := func() uint64 {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			bad, b = true, nil
			return 0
		}
		b = b[n:]
		return v
	}
	fixed := func() uint64 {
		if len(b) < 8 {
			bad, b = true, nil
			return 0
		}
		v := binary.BigEndian.Uint64(b)
		b = b[8:]
		return v
	}
	var known []incarnation
	for n := uvarint(); n > 0 && !bad; n-- {
		k := incarnation{node: txn.NodeID(uvarint()), id: fixed()}
		known = append(known, k)
		o.incarnations[k] = uvarint()
	}
	for len(b) > 0 && !bad {
		at := uvarint()
		if bad = bad || at >= uint64(len(known)); bad {
			break
		}
		p := &outcomePage{pageName: pageName{known[at], uvarint()}, committed: fixed(), aborted: fixed()}
		if bad = bad || o.pages[p.pageName] != nil || p.count() == 0 || p.committed&p.aborted != 0; bad {
			break
		}
		o.pages[p.pageName] = o.used.PushBack(p)
		o.count += p.count()
	}
	if bad {
		return fmt.Errorf("read outcomes: %w", txn.ErrCorrupt)
	}
	return nil
}
