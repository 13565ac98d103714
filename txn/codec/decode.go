package codec

import (
	"math"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/quorate/quorate/txn"
)

// Decode reads one entry. Changes and Chunk.Data alias b, which must not be changed as long as they are in use;
// everything else is copied. Errors wrap txn.ErrCorrupt, except for a format that this build does not know, which
// is a *VersionError.
func Decode(b []byte) (Entry, error) {
	body, err := payload(b)
	if err != nil {
		return Entry{}, err
	}
	outer := reader{b: body}
	if !outer.next() {
		return Entry{}, outer.fail("entry is empty")
	}
	e := Entry{Kind: Kind(outer.field)}
	in := reader{b: outer.bytes()}
	switch e.Kind {
	case KindTransactions:
		e.Transactions = in.transactions()
	case KindChunk:
		e.Chunk = in.chunk()
	case KindAbort:
		e.Abort = in.abort()
	case KindHorizon:
		e.Horizon = in.horizon()
	case KindMember:
		e.Member = in.member()
	case KindBarrier:
		e.Barrier = in.barrier()
	case KindFound:
		e.Found = in.found()
	case KindAdmit:
		e.Admit = in.admit()
	case KindRemove:
		e.Remove = in.remove()
	case KindToken:
		e.Token = in.token()
	case KindReserve:
		e.Reserve = in.reserve()
	default:
		return Entry{}, outer.fail("entry has unknown kind %d", outer.field)
	}
	if outer.next() {
		return Entry{}, outer.fail("entry has more than one kind")
	}
	if outer.err != nil {
		return Entry{}, outer.err
	}
	if in.err != nil {
		return Entry{}, in.err
	}
	return e, nil
}

// reader walks over the fields of one message. The first error sticks and ends the walk; values read after it are
// zero. It is a value on the stack: reading allocates only what ends up in the Entry.
type reader struct {
	b     []byte
	field protowire.Number
	wire  protowire.Type
	err   error
}

// next moves to the next field; false at the end and after an error. Fields must ascend.
func (r *reader) next() bool { return r.advance(r.field + 1) }

// nextRepeated is next where a field may repeat.
func (r *reader) nextRepeated() bool { return r.advance(r.field) }

func (r *reader) advance(lowest protowire.Number) bool {
	if r.err != nil || len(r.b) == 0 {
		return false
	}
	field, wire, n := protowire.ConsumeTag(r.b)
	if n < 0 {
		r.fail("tag: %v", protowire.ParseError(n))
		return false
	}
	if field < lowest {
		r.fail("field %d after field %d", field, r.field)
		return false
	}
	r.b, r.field, r.wire = r.b[n:], field, wire
	return true
}

func (r *reader) fail(format string, args ...any) error {
	if r.err == nil {
		r.err = corrupt(format, args...)
	}
	r.b = nil
	return r.err
}

// expect reports whether the current field has the wire type.
func (r *reader) expect(want protowire.Type) bool {
	if r.err == nil && r.wire != want {
		r.fail("field %d has wire type %d, should be %d", r.field, r.wire, want)
	}
	return r.err == nil
}

// unknown fails: see the package comment.
func (r *reader) unknown() { r.fail("unknown field %d", r.field) }

func (r *reader) bytes() []byte {
	if !r.expect(protowire.BytesType) {
		return nil
	}
	v, n := protowire.ConsumeBytes(r.b)
	if n < 0 {
		r.fail("field %d: %v", r.field, protowire.ParseError(n))
		return nil
	}
	r.b = r.b[n:]
	return v[:len(v):len(v)]
}

func (r *reader) uint(limit uint64) uint64 {
	if !r.expect(protowire.VarintType) {
		return 0
	}
	v, n := protowire.ConsumeVarint(r.b)
	if n < 0 {
		r.fail("field %d: %v", r.field, protowire.ParseError(n))
		return 0
	}
	if v > limit {
		r.fail("field %d: %d is above %d", r.field, v, limit)
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) fixed() uint64 {
	if !r.expect(protowire.Fixed64Type) {
		return 0
	}
	v, n := protowire.ConsumeFixed64(r.b)
	if n < 0 {
		r.fail("field %d: %v", r.field, protowire.ParseError(n))
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) text() string {
	v := r.bytes()
	if len(v) > MaxText {
		r.fail("field %d: text of %d bytes, more than %d", r.field, len(v), MaxText)
		return ""
	}
	if !utf8.Valid(v) {
		r.fail("field %d: text is not UTF-8", r.field)
		return ""
	}
	return string(v)
}

func (r *reader) gid() (g txn.GID) {
	in := reader{b: r.bytes()}
	for in.next() {
		switch in.field {
		case 1:
			g.Node = txn.NodeID(in.uint(math.MaxUint32))
		case 2:
			g.Incarnation = in.fixed()
		case 3:
			g.Sequence = in.uint(math.MaxUint64)
		default:
			in.unknown()
		}
	}
	if in.err != nil {
		r.fail("global transaction id: %v", in.err)
	}
	return g
}

// transactions reads a batch into three allocations, whatever its length, and one more for each change of
// database: the write sets, the pointers to them, and all their keys.
func (r *reader) transactions() []*txn.WriteSet {
	count, keys := measure(*r)
	if count == 0 || count > MaxTransactions {
		r.fail("batch of %d transactions", count)
		return nil
	}
	sets := make([]txn.WriteSet, count)
	list := make([]*txn.WriteSet, 0, count)
	room := make([]txn.KeyUse, 0, keys)
	database := ""
	for r.nextRepeated() {
		if r.field != fieldTransaction {
			r.unknown()
			break
		}
		in := reader{b: r.bytes()}
		w := &sets[len(list)]
		room = in.writeSet(w, room, database)
		database = w.Database
		if in.err != nil {
			r.fail("transaction %d of the batch: %v", len(list), in.err)
			break
		}
		list = append(list, w)
	}
	return list
}

// measure counts the transactions of a batch and their keys, as far as the batch is well formed. It takes the
// reader by value, and so leaves the caller's where it is.
func measure(r reader) (count, keys int) {
	for r.nextRepeated() && r.field == fieldTransaction {
		in := reader{b: r.bytes()}
		for in.next() {
			switch {
			case in.wire == protowire.BytesType && in.field == 6:
				keys += len(in.bytes()) / keyUseSize
			case in.wire == protowire.BytesType:
				in.bytes()
			case in.wire == protowire.VarintType:
				in.uint(math.MaxUint64)
			default:
				in.unknown()
			}
		}
		count++
	}
	return count, keys
}

// writeSet reads one transaction into w. Its keys are appended to room, which has the capacity for them, and the
// extended room is returned. database is the name the transaction before had, most often this one's too.
func (r *reader) writeSet(w *txn.WriteSet, room []txn.KeyUse, database string) []txn.KeyUse {
	for r.next() {
		switch r.field {
		case 1:
			w.GID = r.gid()
		case 2:
			w.XID = txn.XID(r.uint(math.MaxUint64))
		case 3:
			name := r.bytes()
			if len(name) > MaxText {
				r.fail("name of the database has %d bytes, more than %d", len(name), MaxText)
			} else if string(name) == database {
				w.Database = database
			} else {
				w.Database = string(name)
			}
		case 4:
			w.Base = txn.CSN(r.uint(math.MaxUint64))
		case 5:
			w.Seen = txn.CSN(r.uint(math.MaxUint64))
		case 6:
			first := len(room)
			room = r.keys(room)
			w.Keys = room[first:len(room):len(room)]
		case 7:
			w.Changes = r.bytes()
		case 8:
			w.Chunks = uint32(r.uint(math.MaxUint32))
		case 9:
			w.Rows = r.uint(math.MaxUint64)
		case 10:
			w.Barrier = r.uint(1) == 1
		default:
			r.unknown()
		}
	}
	if r.err == nil && w.GID.IsZero() {
		r.fail("no global transaction id")
	}
	return room
}

func (r *reader) keys(room []txn.KeyUse) []txn.KeyUse {
	b := r.bytes()
	if len(b)%keyUseSize != 0 {
		r.fail("%d bytes of keys are no multiple of %d", len(b), keyUseSize)
		return room
	}
	for ; len(b) > 0; b = b[keyUseSize:] {
		mode := txn.Mode(b[0])
		if !mode.Valid() {
			r.fail("key with mode %d", b[0])
			return room
		}
		room = append(room, txn.KeyUse{Key: txn.Key(b[1:keyUseSize]), Mode: mode})
	}
	return room
}

func (r *reader) chunk() *Chunk {
	c := new(Chunk)
	for r.next() {
		switch r.field {
		case 1:
			c.GID = r.gid()
		case 2:
			c.Part = uint32(r.uint(math.MaxUint32))
		case 3:
			c.Data = r.bytes()
		default:
			r.unknown()
		}
	}
	if r.err == nil && c.GID.IsZero() {
		r.fail("chunk without a global transaction id")
	}
	return c
}

func (r *reader) abort() *Abort {
	a := new(Abort)
	for r.next() {
		switch r.field {
		case 1:
			a.GID = r.gid()
		case 2:
			a.Reason = txn.AbortReason(r.uint(math.MaxUint8))
		default:
			r.unknown()
		}
	}
	if r.err == nil && a.GID.IsZero() {
		r.fail("abort without a global transaction id")
	}
	return a
}

func (r *reader) horizon() (h txn.CSN) {
	for r.next() {
		switch r.field {
		case 1:
			h = txn.CSN(r.uint(math.MaxUint64))
		default:
			r.unknown()
		}
	}
	return h
}

func (r *reader) member() *Member {
	m := new(Member)
	for r.next() {
		switch r.field {
		case 1:
			m.Node = txn.NodeID(r.uint(math.MaxUint32))
		case 2:
			m.Incarnation = r.fixed()
		case 3:
			m.RaftAddress = r.text()
		case 4:
			m.GRPCAddress = r.text()
		case 5:
			m.HTTPAddress = r.text()
		case 6:
			m.GatewayAddress = r.text()
		case 7:
			m.Version = r.text()
		case 8:
			m.PostgresVersion = r.text()
		case 9:
			m.Format = uint32(r.uint(math.MaxUint32))
		default:
			r.unknown()
		}
	}
	if r.err == nil && m.Node == 0 {
		r.fail("member without a node")
	}
	return m
}

func (r *reader) barrier() *Barrier {
	b := new(Barrier)
	for r.next() {
		switch r.field {
		case 1:
			b.ID = r.gid()
		case 2:
			b.Purpose = r.text()
		default:
			r.unknown()
		}
	}
	return b
}
