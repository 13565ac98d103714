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
	// incarnations has all that were ever heard of.
	incarnations map[incarnation]*span
}

// span is what is known of an incarnation's sequence numbers, beside the pages.
type span struct {
	forgotten uint64 // the highest that may have been decided and forgotten, never above highest
	highest   uint64 // the highest in a page, now or earlier
	// asked are those above highest that somebody has been told are aborted, ascending. Clients may ask about any number, so
	// that it says nothing of how far the incarnation is. When that comes to them they get into pages, which are forgotten.
	asked []uint64
}

// maxAsked bounds span.asked: more than a node has clients who ask what became of their last COMMIT.
const maxAsked = 1 << 13

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
	return outcomes{keep: keep, pages: make(map[pageName]*list.Element), incarnations: make(map[incarnation]*span)}
}

func place(gid txn.GID) (pageName, uint64) {
	return pageName{incarnation{gid.Node, gid.Incarnation}, gid.Sequence >> pageBits}, 1 << (gid.Sequence % (1 << pageBits))
}

// begin notes that an incarnation exists.
func (o *outcomes) begin(node txn.NodeID, id uint64) *span {
	s := o.incarnations[incarnation{node, id}]
	if s == nil {
		s = &span{}
		o.incarnations[incarnation{node, id}] = s
	}
	return s
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
	s := o.incarnations[name.incarnation]
	if s == nil || gid.Sequence <= s.forgotten {
		return Forgotten
	}
	if _, asked := slices.BinarySearch(s.asked, gid.Sequence); asked {
		return Aborted
	}
	return Undecided
}

// tooOld reports whether gid may have been decided and forgotten.
func (o *outcomes) tooOld(gid txn.GID) bool {
	s := o.incarnations[incarnation{gid.Node, gid.Incarnation}]
	return s != nil && gid.Sequence <= s.forgotten && o.find(gid) == Forgotten
}

// ask notes that gid, which no entry of its living origin has named so far, is aborted because somebody has asked about it.
// It reports whether gid is decided now; it is not if too many were asked about.
func (o *outcomes) ask(gid txn.GID) bool {
	s := o.begin(gid.Node, gid.Incarnation)
	if gid.Sequence <= s.highest {
		o.add(gid, false)
		return true
	}
	at, known := slices.BinarySearch(s.asked, gid.Sequence)
	if !known && len(s.asked) < maxAsked {
		s.asked, known = slices.Insert(s.asked, at, gid.Sequence), true
	}
	return known
}

// bury notes that a node's incarnations but the living one, 0 for none, will propose nothing any more.
func (o *outcomes) bury(node txn.NodeID, living uint64) {
	for _, k := range o.known() {
		if asked := o.incarnations[k].asked; k.node == node && k.id != living && len(asked) > 0 {
			o.add(txn.GID{Node: node, Incarnation: k.id, Sequence: asked[len(asked)-1]}, false) // and with it all below
		}
	}
}

// add notes a decision on what an origin has proposed, or on what an origin that is gone will not propose. The first one
// stands, and what is too old is not noted: it may not be the first.
func (o *outcomes) add(gid txn.GID, committed bool) {
	s := o.begin(gid.Node, gid.Incarnation)
	s.highest = max(s.highest, gid.Sequence)
	for len(s.asked) > 0 && s.asked[0] <= s.highest {
		reached := txn.GID{Node: gid.Node, Incarnation: gid.Incarnation, Sequence: s.asked[0]}
		s.asked = s.asked[1:]
		o.note(reached, false)
	}
	o.note(gid, committed)
}

// note puts a decision into its page, and forgets the oldest pages.
func (o *outcomes) note(gid txn.GID, committed bool) {
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
		// Numbers of the page that are still to come have not been decided.
		s := o.incarnations[oldest.incarnation]
		s.forgotten = max(s.forgotten, min(oldest.number<<pageBits|(1<<pageBits-1), s.highest))
	}
}

func (o *outcomes) oldest() *outcomePage { return o.used.Front().Value.(*outcomePage) }

// known are the incarnations, in an order that is alike everywhere.
func (o *outcomes) known() []incarnation {
	return slices.SortedFunc(maps.Keys(o.incarnations), func(a, b incarnation) int {
		return cmp.Or(cmp.Compare(a.node, b.node), cmp.Compare(a.id, b.id))
	})
}

// asked is what encode does not write.
func (o *outcomes) asked() (all []txn.GID) {
	for _, k := range o.known() {
		for _, sequence := range o.incarnations[k].asked {
			all = append(all, txn.GID{Node: k.node, Incarnation: k.id, Sequence: sequence})
		}
	}
	return all
}

// encode writes the state, but for asked; equal histories give equal bytes.
func (o *outcomes) encode() []byte {
	known := o.known()
	places := make(map[incarnation]uint64, len(known))
	b := binary.AppendUvarint(nil, uint64(len(known)))
	for i, k := range known {
		places[k] = uint64(i)
		b = binary.AppendUvarint(b, uint64(k.node))
		b = binary.BigEndian.AppendUint64(b, k.id)
		b = binary.AppendUvarint(b, o.incarnations[k].forgotten)
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

// decode reads what encode wrote, and takes what was asked. Nothing at all is an empty memory.
func (o *outcomes) decode(b []byte, asked []txn.GID) error {
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
		forgotten := uvarint()
		o.incarnations[k] = &span{forgotten: forgotten, highest: forgotten}
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
		s := o.incarnations[p.incarnation]
		s.highest = max(s.highest, p.number<<pageBits+uint64(bits.Len64(p.committed|p.aborted)-1))
	}
	for _, gid := range asked {
		s := o.incarnations[incarnation{gid.Node, gid.Incarnation}]
		if bad = bad || s == nil || gid.Sequence <= s.highest || !o.ask(gid); bad {
			break
		}
	}
	if bad {
		return fmt.Errorf("read outcomes: %w", txn.ErrCorrupt)
	}
	return nil
}
