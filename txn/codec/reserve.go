package codec

import (
	"math"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/quorate/quorate/internal/invariant"
	"github.com/quorate/quorate/txn"
)

// Reserve says up to where a node may have given out values of sequences: whoever gets its slot after it begins beyond.
type Reserve struct {
	Node txn.NodeID
	// All says that these are all of the node's sequences, so that what it said of others before is out of date.
	All       bool
	Sequences []Reservation
}

// Reservation is the last value of one sequence that is the node's to give out, in the sequence's direction.
type Reservation struct {
	Name  string // schema and name, quoted where needed
	Value int64
}

// MaxReservations in one Reserve entry.
const MaxReservations = 4096

// AppendReserve appends the entry of r to dst and returns the extended slice. Names must be UTF-8 without a zero byte, as
// PostgreSQL's are in a database of that encoding, and are otherwise treated as the texts of AppendMember.
func AppendReserve(dst []byte, r *Reserve) []byte {
	invariant.Check(r.Node != 0 && len(r.Sequences) <= MaxReservations, "encode %d reservations of node %d", len(r.Sequences), r.Node)
	names := make([]string, len(r.Sequences))
	inner := sizeUint(uint64(r.Node)) + sizeUint(flag(r.All))
	for i, s := range r.Sequences {
		names[i] = sanitize(s.Name)
		inner += sizeBytes(sizeReservation(names[i], s.Value))
	}
	start := len(dst)
	dst = begin(dst)
	dst = appendHead(dst, protowire.Number(KindReserve), inner)
	dst = appendUint(dst, 1, uint64(r.Node))
	dst = appendUint(dst, 2, flag(r.All))
	for i, s := range r.Sequences {
		dst = appendHead(dst, 3, sizeReservation(names[i], s.Value))
		dst = appendString(dst, 1, names[i])
		dst = appendUint(dst, 2, protowire.EncodeZigZag(s.Value))
	}
	return finish(dst, start)
}

func flag(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}

func sizeReservation(name string, value int64) int {
	return sizeOptional(len(name)) + sizeUint(protowire.EncodeZigZag(value))
}

func (r *reader) reserve() *Reserve {
	m := new(Reserve)
	for r.nextRepeated() {
		switch {
		case r.field == 1 && m.Node == 0:
			m.Node = txn.NodeID(r.uint(math.MaxUint32))
		case r.field == 2 && !m.All:
			m.All = r.uint(1) == 1
		case r.field == 3 && len(m.Sequences) < MaxReservations:
			m.Sequences = append(m.Sequences, r.reservation())
		default:
			r.unknown()
		}
	}
	if r.err == nil && m.Node == 0 {
		r.fail("reservations of no node")
	}
	return m
}

func (r *reader) reservation() (s Reservation) {
	in := reader{b: r.bytes()}
	for in.next() {
		switch in.field {
		case 1:
			s.Name = in.text()
		case 2:
			s.Value = protowire.DecodeZigZag(in.uint(math.MaxUint64))
		default:
			in.unknown()
		}
	}
	if in.err != nil {
		r.fail("reservation: %v", in.err)
	}
	return s
}
