package codec

import (
	"crypto/sha256"
	"math"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/quorate/quorate/internal/invariant"
	"github.com/quorate/quorate/txn"
)

// Hash is the SHA-256 of a secret.
type Hash = [sha256.Size]byte

// Token lets Uses joiners be admitted until it expires. With Uses 0 it takes back the one of this ID. Times are in
// seconds since 1970, of the proposer's clock: no other clock has a say, or nodes would decide differently.
type Token struct {
	ID      txn.UUID
	Hash    Hash
	Uses    uint32
	Expires uint64
	Time    uint64 // of this entry
}

// TokenUse is what an admission rests on: the token, the hash of the secret that was shown, and when. With an ID of
// zero the proposer answers for the admission.
type TokenUse struct {
	ID   txn.UUID
	Hash Hash
	Time uint64
}

// AppendToken appends the entry of t to dst and returns the extended slice.
func AppendToken(dst []byte, t *Token) []byte {
	invariant.Check(!t.ID.IsZero(), "encode a token without an id")
	inner := sizeUUID(t.ID) + sizeBytes(len(t.Hash)) + sizeUint(uint64(t.Uses)) + sizeUint(t.Expires) + sizeUint(t.Time)
	start := len(dst)
	dst = begin(dst)
	dst = appendHead(dst, protowire.Number(KindToken), inner)
	dst = appendUUID(dst, 1, t.ID)
	dst = appendBytes(dst, 2, t.Hash[:])
	dst = appendUint(dst, 3, uint64(t.Uses))
	dst = appendUint(dst, 4, t.Expires)
	dst = appendUint(dst, 5, t.Time)
	return finish(dst, start)
}

func (r *reader) token() *Token {
	t := new(Token)
	hashed := false
	for r.next() {
		switch r.field {
		case 1:
			t.ID = r.uuid()
		case 2:
			t.Hash, hashed = r.hash(), true
		case 3:
			t.Uses = uint32(r.uint(math.MaxUint32))
		case 4:
			t.Expires = r.uint(math.MaxUint64)
		case 5:
			t.Time = r.uint(math.MaxUint64)
		default:
			r.unknown()
		}
	}
	if r.err == nil && (t.ID.IsZero() || !hashed) {
		r.fail("token without id or hash")
	}
	return t
}

func (r *reader) hash() (h Hash) {
	b := r.bytes()
	if r.err == nil && len(b) != len(h) {
		r.fail("field %d: %d bytes are no hash", r.field, len(b))
		return h
	}
	copy(h[:], b)
	return h
}

// The fields of an Admit entry that its TokenUse becomes.

func sizeTokenUse(u TokenUse) int {
	if u.ID.IsZero() {
		return 0
	}
	return sizeUUID(u.ID) + sizeBytes(len(u.Hash)) + sizeUint(u.Time)
}

func appendTokenUse(dst []byte, u TokenUse) []byte {
	if u.ID.IsZero() {
		return dst
	}
	dst = appendUUID(dst, 9, u.ID)
	dst = appendBytes(dst, 10, u.Hash[:])
	return appendUint(dst, 11, u.Time)
}
