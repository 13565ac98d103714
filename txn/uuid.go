package txn

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// UUID names a cluster, or a request to change its members. The zero value names nothing.
type UUID [16]byte

// NewUUID draws one at random.
func NewUUID() UUID {
	var u UUID
	_, _ = rand.Read(u[:]) // crypto/rand never fails: it ends the process
	return u.marked(4)
}

// DeriveUUID returns the one that follows from text: who knows the text needs nobody to tell him.
func DeriveUUID(text string) UUID {
	sum := sha256.Sum256([]byte("quorate " + text))
	return UUID(sum[:16]).marked(8)
}

// marked sets version and variant of RFC 9562.
func (u UUID) marked(version byte) UUID {
	u[6] = u[6]&0x0f | version<<4
	u[8] = u[8]&0x3f | 0x80
	return u
}

// ParseUUID reads what String writes.
func ParseUUID(s string) (UUID, error) {
	var u UUID
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return UUID{}, fmt.Errorf("%q is not a UUID", s)
	}
	if _, err := hex.Decode(u[:], []byte(s[:8]+s[9:13]+s[14:18]+s[19:23]+s[24:])); err != nil {
		return UUID{}, fmt.Errorf("%q is not a UUID: %w", s, err)
	}
	return u, nil
}

// IsZero reports whether u names nothing.
func (u UUID) IsZero() bool { return u == UUID{} }

// String returns the usual form, such as 0f6d2a4e-8d3b-4d6b-9a0e-6f5c3b2a1d00.
func (u UUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// MarshalText implements encoding.TextMarshaler.
func (u UUID) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (u *UUID) UnmarshalText(text []byte) (err error) {
	*u, err = ParseUUID(string(text))
	return err
}
