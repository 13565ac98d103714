package codec

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/quorate/quorate/internal/invariant"
	"github.com/quorate/quorate/txn"
)

// Field numbers of log.proto that more than one place needs. The others stand beside the field they name.
const (
	fieldTransaction = 1 // Transactions.transactions
	keyUseSize       = 1 + 16
)

// AppendTransactions appends the entry of a batch to dst and returns the extended slice. There must be at least
// one write set and at most MaxTransactions.
func AppendTransactions(dst []byte, sets []*txn.WriteSet) []byte {
	invariant.Check(len(sets) > 0 && len(sets) <= MaxTransactions, "encode a batch of %d transactions", len(sets))
	inner := 0
	for _, w := range sets {
		inner += sizeBytes(sizeWriteSet(w))
	}
	dst = slices.Grow(dst, header+sizeBytes(inner))
	start := len(dst)
	dst = begin(dst)
	dst = appendHead(dst, protowire.Number(KindTransactions), inner)
	for _, w := range sets {
		dst = appendHead(dst, fieldTransaction, sizeWriteSet(w))
		dst = appendWriteSet(dst, w)
	}
	return finish(dst, start)
}

// AppendChunk appends the entry of c to dst and returns the extended slice.
func AppendChunk(dst []byte, c *Chunk) []byte {
	invariant.Check(!c.GID.IsZero(), "encode a chunk of no transaction")
	inner := sizeGID(c.GID) + sizeUint(uint64(c.Part)) + sizeOptional(len(c.Data))
	dst = slices.Grow(dst, header+sizeBytes(inner))
	start := len(dst)
	dst = begin(dst)
	dst = appendHead(dst, protowire.Number(KindChunk), inner)
	dst = appendGID(dst, c.GID)
	dst = appendUint(dst, 2, uint64(c.Part))
	dst = appendBytes(dst, 3, c.Data)
	return finish(dst, start)
}

// AppendAbort appends the entry of a to dst and returns the extended slice.
func AppendAbort(dst []byte, a Abort) []byte {
	invariant.Check(!a.GID.IsZero(), "encode an abort of no transaction")
	start := len(dst)
	dst = begin(dst)
	dst = appendHead(dst, protowire.Number(KindAbort), sizeGID(a.GID)+sizeUint(uint64(a.Reason)))
	dst = appendGID(dst, a.GID)
	dst = appendUint(dst, 2, uint64(a.Reason))
	return finish(dst, start)
}

// AppendHorizon appends the entry that proposes h to dst and returns the extended slice.
func AppendHorizon(dst []byte, h txn.CSN) []byte {
	start := len(dst)
	dst = begin(dst)
	dst = appendHead(dst, protowire.Number(KindHorizon), sizeUint(uint64(h)))
	dst = appendUint(dst, 1, uint64(h))
	return finish(dst, start)
}

// AppendMember appends the entry of m to dst and returns the extended slice. Texts are made valid UTF-8 and cut to
// MaxText: an announcement must never become an entry that no node can read.
func AppendMember(dst []byte, m *Member) []byte {
	invariant.Check(m.Node != 0, "encode a member that is no node")
	texts := [...]string{m.RaftAddress, m.GRPCAddress, m.HTTPAddress, m.GatewayAddress, m.Version, m.PostgresVersion}
	inner := sizeUint(uint64(m.Node)) + sizeFixed(m.Incarnation) + sizeUint(uint64(m.Format))
	for i, s := range texts {
		texts[i] = sanitize(s)
		inner += sizeOptional(len(texts[i]))
	}
	start := len(dst)
	dst = begin(dst)
	dst = appendHead(dst, protowire.Number(KindMember), inner)
	dst = appendUint(dst, 1, uint64(m.Node))
	dst = appendFixed(dst, 2, m.Incarnation)
	for i, s := range texts {
		dst = appendString(dst, protowire.Number(3+i), s)
	}
	dst = appendUint(dst, 9, uint64(m.Format))
	return finish(dst, start)
}

// AppendBarrier appends the entry of b to dst and returns the extended slice. Purpose is treated as the texts of
// AppendMember.
func AppendBarrier(dst []byte, b Barrier) []byte {
	purpose := sanitize(b.Purpose)
	start := len(dst)
	dst = begin(dst)
	dst = appendHead(dst, protowire.Number(KindBarrier), sizeGID(b.ID)+sizeOptional(len(purpose)))
	dst = appendGID(dst, b.ID)
	dst = appendString(dst, 2, purpose)
	return finish(dst, start)
}

func sizeWriteSet(w *txn.WriteSet) int {
	n := sizeGID(w.GID) + sizeUint(uint64(w.XID)) + sizeOptional(len(w.Database)) +
		sizeUint(uint64(w.Base)) + sizeUint(uint64(w.Seen)) +
		sizeOptional(keyUseSize*len(w.Keys)) + sizeOptional(len(w.Changes)) +
		sizeUint(uint64(w.Chunks)) + sizeUint(w.Rows)
	if w.Barrier {
		n += 2
	}
	return n
}

func appendWriteSet(dst []byte, w *txn.WriteSet) []byte {
	// What Decode refuses must not get into the log: every node would stop there. (Arguments of Check escape, hence
	// the conditions around it.)
	if w.GID.IsZero() || len(w.Database) > MaxText {
		invariant.Check(false, "encode transaction %v of database %q", w.GID, w.Database)
	}
	dst = appendGID(dst, w.GID)
	dst = appendUint(dst, 2, uint64(w.XID))
	dst = appendString(dst, 3, w.Database)
	dst = appendUint(dst, 4, uint64(w.Base))
	dst = appendUint(dst, 5, uint64(w.Seen))
	if len(w.Keys) > 0 {
		dst = appendHead(dst, 6, keyUseSize*len(w.Keys))
		for i := range w.Keys {
			if !w.Keys[i].Mode.Valid() {
				invariant.Check(false, "encode transaction %v: key %d has mode %d", w.GID, i, w.Keys[i].Mode)
			}
			dst = append(dst, byte(w.Keys[i].Mode))
			dst = append(dst, w.Keys[i].Key[:]...)
		}
	}
	dst = appendBytes(dst, 7, w.Changes)
	dst = appendUint(dst, 8, uint64(w.Chunks))
	dst = appendUint(dst, 9, w.Rows)
	if w.Barrier {
		dst = appendUint(dst, 10, 1)
	}
	return dst
}

// appendGID appends g as field 1, which it is in every message that has one.
func appendGID(dst []byte, g txn.GID) []byte {
	dst = appendHead(dst, 1, innerGID(g))
	dst = appendUint(dst, 1, uint64(g.Node))
	dst = appendFixed(dst, 2, g.Incarnation)
	return appendUint(dst, 3, g.Sequence)
}

func innerGID(g txn.GID) int {
	return sizeUint(uint64(g.Node)) + sizeFixed(g.Incarnation) + sizeUint(g.Sequence)
}

func sizeGID(g txn.GID) int { return sizeBytes(innerGID(g)) }

// The sizes below hold for field numbers up to 15, whose tag takes one byte. Zero values are left out, as proto3
// asks for.

// sizeBytes is the size of a length-delimited field of n bytes that is always written.
func sizeBytes(n int) int { return 1 + protowire.SizeBytes(n) }

// sizeOptional is the size of a length-delimited field of n bytes.
func sizeOptional(n int) int {
	if n == 0 {
		return 0
	}
	return sizeBytes(n)
}

func sizeUint(v uint64) int {
	if v == 0 {
		return 0
	}
	return 1 + protowire.SizeVarint(v)
}

func sizeFixed(v uint64) int {
	if v == 0 {
		return 0
	}
	return 1 + 8
}

// appendHead appends tag and length of a length-delimited field.
func appendHead(dst []byte, field protowire.Number, n int) []byte {
	dst = append(dst, byte(field)<<3|byte(protowire.BytesType))
	return protowire.AppendVarint(dst, uint64(n))
}

func appendBytes(dst []byte, field protowire.Number, b []byte) []byte {
	if len(b) == 0 {
		return dst
	}
	return append(appendHead(dst, field, len(b)), b...)
}

func appendString(dst []byte, field protowire.Number, s string) []byte {
	if s == "" {
		return dst
	}
	return append(appendHead(dst, field, len(s)), s...)
}

func appendUint(dst []byte, field protowire.Number, v uint64) []byte {
	if v == 0 {
		return dst
	}
	dst = append(dst, byte(field)<<3|byte(protowire.VarintType))
	return protowire.AppendVarint(dst, v)
}

func appendFixed(dst []byte, field protowire.Number, v uint64) []byte {
	if v == 0 {
		return dst
	}
	dst = append(dst, byte(field)<<3|byte(protowire.Fixed64Type))
	return protowire.AppendFixed64(dst, v)
}

func sanitize(s string) string {
	if len(s) > MaxText {
		s = s[:MaxText]
	}
	return strings.ToValidUTF8(s, "")
}
