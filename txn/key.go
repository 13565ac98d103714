package txn

import "hash/fnv"

// Key is a 128-bit hash of what a transaction touched: a row, a value of a unique index, a whole table. Two
// transactions that touched the same thing have the same key. A collision of two different things costs a
// needless abort, never a missed conflict.
type Key [16]byte

// Mode says how a transaction used a key; see Conflicts.
type Mode uint8

// The modes. Their numbers are written to the log: never renumber.
const (
	// ModeWrite (W): a row was written under this replica identity.
	ModeWrite Mode = 1
	// ModeExclusive (X): a row was deleted or its identity changed; or, on a whole-table key, TRUNCATE or DDL.
	ModeExclusive Mode = 2
	// ModeUnique (U): a unique index got a new entry with this value, checked by the server at once.
	ModeUnique Mode = 3
	// ModeUniqueDeferred: as ModeUnique, of a deferrable unique or an exclusion constraint, which apply does not
	// check again; it is judged over (base, index) instead of (seen, index).
	ModeUniqueDeferred Mode = 4
	// ModeReference (R): a new child row refers to this parent key.
	ModeReference Mode = 5
	// ModeIntent (IX): on a whole-table key, some row of the table was written.
	ModeIntent Mode = 6
)

// NumModes is one more than the highest mode.
const NumModes = 7

var modeNames = [NumModes]string{"", "W", "X", "U", "UD", "R", "IX"}

// String returns the short name of DESIGN section 3.
func (m Mode) String() string {
	if int(m) < len(modeNames) && m != 0 {
		return modeNames[m]
	}
	return "invalid"
}

// Valid reports whether m is one of the modes above.
func (m Mode) Valid() bool { return m >= ModeWrite && m < NumModes }

// conflicts[a] is the set (bit per mode) of modes that a conflicts with. Symmetric.
var conflicts = [NumModes]uint8{
	ModeWrite:          1<<ModeWrite | 1<<ModeExclusive,
	ModeExclusive:      1<<ModeWrite | 1<<ModeExclusive | 1<<ModeUnique | 1<<ModeUniqueDeferred | 1<<ModeReference | 1<<ModeIntent,
	ModeUnique:         1<<ModeExclusive | 1<<ModeUnique | 1<<ModeUniqueDeferred,
	ModeUniqueDeferred: 1<<ModeExclusive | 1<<ModeUnique | 1<<ModeUniqueDeferred,
	ModeReference:      1 << ModeExclusive,
	ModeIntent:         1 << ModeExclusive,
}

// Conflicts reports whether two concurrent transactions that used one key in modes a and b exclude each other.
func Conflicts(a, b Mode) bool { return conflicts[a]&(1<<b) != 0 }

// SinceBase reports whether a conflict between a and b is judged from the younger transaction's base rather than
// from its seen. From seen is enough wherever PostgreSQL itself has compared the two (a row lock, an index entry,
// a table lock). It has not where apply checks nothing: deferrable unique constraints, and foreign keys, whose
// triggers do not fire there, so that a parent may be deleted beside a child that has just arrived.
func SinceBase(a, b Mode) bool {
	return a == ModeUniqueDeferred || b == ModeUniqueDeferred ||
		a == ModeReference && b == ModeExclusive || a == ModeExclusive && b == ModeReference
}

// KeyUse is one key of a write set.
type KeyUse struct {
	Key  Key
	Mode Mode
}

// Hasher builds keys. Parts are length-prefixed, so that ("ab","c") and ("a","bc") differ. The zero value is not
// usable: start with NewHasher. Not safe for concurrent use.
type Hasher struct {
	hash interface {
		Write([]byte) (int, error)
		Sum([]byte) []byte
		Reset()
	}
}

// NewHasher returns an empty hasher.
func NewHasher() *Hasher { return &Hasher{fnv.New128a()} }

// Reset empties the hasher.
func (h *Hasher) Reset() { h.hash.Reset() }

// String adds one part.
func (h *Hasher) String(s string) { h.Bytes([]byte(s)) }

// Bytes adds one part.
func (h *Hasher) Bytes(b []byte) {
	n := len(b)
	_, _ = h.hash.Write([]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}) // a hash never fails
	_, _ = h.hash.Write(b)
}

// Null adds one part that equals no byte string.
func (h *Hasher) Null() { _, _ = h.hash.Write([]byte{0xff, 0xff, 0xff, 0xff}) }

// Key returns the hash of the parts so far.
func (h *Hasher) Key() (k Key) {
	h.hash.Sum(k[:0])
	return k
}
