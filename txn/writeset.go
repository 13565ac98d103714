package txn

// WriteSet is what one transaction did: its decoded changes and the keys by which it is certified.
//
// Changes holds pgoutput messages (PostgreSQL manual, "Logical Replication Message Formats", protocol version 1:
// Relation, Type, Insert, Update, Delete, Truncate and Message), each behind its length as an unsigned varint, in
// the order of the transaction. Every relation is described before its first change, so a write set is readable
// by itself. Of a large transaction Changes is the last part; the earlier ones travel ahead as Chunk entries of
// the log.
type WriteSet struct {
	GID      GID
	XID      XID    // at the origin
	Database string // name of the database it ran in
	Base     CSN    // applied at the origin before the first snapshot was taken
	Seen     CSN    // applied at the origin before the marker
	Keys     []KeyUse
	Changes  []byte
	Chunks   uint32 // how many Chunk entries precede, with Part 0 … Chunks-1
	Rows     uint64 // row changes, chunks included
	// Barrier is set when the changes hold DDL or TRUNCATE: apply runs such a transaction alone.
	Barrier bool
}

// Empty reports whether the transaction changed nothing that is replicated.
func (w *WriteSet) Empty() bool { return len(w.Changes) == 0 && w.Chunks == 0 }

// Parts yields the earlier parts of a large write set at its origin, in order, each to become one Chunk entry.
// Next returns io.EOF after the last. Not safe for concurrent use.
type Parts interface {
	Next() ([]byte, error)
	Close() error
}

// Verdict is the certifier's decision.
type Verdict struct {
	// CSN is the transaction's place in the total order; 0 if it aborts.
	CSN CSN
	// Reason says why it aborts; AbortNone if it commits.
	Reason AbortReason
	// With, for a conflict, is the CSN of the transaction that it lost to.
	With CSN
	// Key and Mode, for a conflict, are the loser's key.
	Key  Key
	Mode Mode
}

// Commits reports whether the verdict is commit.
func (v Verdict) Commits() bool { return v.Reason == AbortNone }

// AbortReason classifies aborts; String is the metric label.
type AbortReason uint8

// The reasons.
const (
	AbortNone      AbortReason = iota
	AbortConflict              // an earlier entry used one of its keys
	AbortHorizon               // older than what the certifier remembers
	AbortDuplicate             // this GID was decided before; the first decision stands
	AbortRequested             // an Abort entry came first
	AbortEvicted               // it blocked an entry that is already decided
	AbortNoQuorum              // it could not be ordered
	AbortCapture               // its changes could not be read from the server
	AbortInvalid               // its origin broke a rule of the protocol: an error in Quorate
	AbortBehind                // it could not be ordered in time because a PostgreSQL lags behind the log
)

var abortNames = [...]string{"none", "conflict", "horizon", "duplicate", "requested", "evicted", "no_quorum", "capture", "invalid", "behind"}

// String returns the metric label.
func (r AbortReason) String() string {
	if int(r) < len(abortNames) {
		return abortNames[r]
	}
	return "unknown"
}
