// Package codec writes and reads the entries of the Raft log.
//
// An entry is one byte of format version, the CRC-32C of the payload (little endian), and the payload: the protobuf
// message quorate.log.v1.Entry. The payload is written and read by hand, since every node does it for every
// transaction; it is byte for byte what the generated code would write.
//
// Reading is strict. Nodes that read an entry differently would decide differently, so a field that is unknown,
// out of order or repeated makes the whole entry corrupt instead of being skipped or merged as protobuf would.
//
// All functions are pure and safe for concurrent use.
package codec

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/quorate/quorate/txn"
)

// Version is the format that this build writes, and the newest and only one that it reads.
//
// Whoever makes another one: an entry may be written in it only when replication.Membership.Format says that every member can
// read it. Members tell what they read in every announcement, and applicants when they ask, so that what is written never
// gets ahead of anybody; and who is set back to a build that cannot read what the cluster may write by then fails and says so.
const Version = 1

// header is the version and the checksum.
const header = 1 + 4

// Limits of one entry. Decode refuses more, so that a small malformed entry cannot make it allocate a lot: no
// decoded entry takes more than about ten times its encoded size plus 10 MiB. The size of an entry as a whole is
// limited by the log.
const (
	// MaxTransactions in one Transactions entry.
	MaxTransactions = 1 << 16
	// MaxText is the length in bytes of each text of an entry (a database name, an address, a purpose).
	MaxText = 1 << 10
)

// Kind says what an entry holds. The values are the field numbers of quorate.log.v1.Entry.
type Kind uint8

// The kinds.
const (
	KindTransactions Kind = 1
	KindChunk        Kind = 2
	KindAbort        Kind = 3
	KindHorizon      Kind = 4
	KindMember       Kind = 5
	KindBarrier      Kind = 6
	KindFound        Kind = 7
	KindAdmit        Kind = 8
	KindRemove       Kind = 9
	KindToken        Kind = 10
	KindReserve      Kind = 11
)

var kindNames = [...]string{"", "transactions", "chunk", "abort", "horizon", "member", "barrier", "found", "admit", "remove", "token", "reserve"}

// String returns the metric label.
func (k Kind) String() string {
	if k != 0 && int(k) < len(kindNames) {
		return kindNames[k]
	}
	return "unknown"
}

// Entry is one decoded entry of the log. Only the field that Kind names is set.
type Entry struct {
	Kind         Kind
	Transactions []*txn.WriteSet // a batch, in the order in which it is to be certified
	Chunk        *Chunk
	Abort        *Abort
	Horizon      txn.CSN // the proposed horizon: certifiers may forget what is at or below it
	Member       *Member
	Barrier      *Barrier
	Found        *Found
	Admit        *Admit
	Remove       *Remove
	Token        *Token
	Reserve      *Reserve
}

// Chunk is an earlier part of a large write set. Data holds pgoutput messages as txn.WriteSet.Changes does, and
// never a part of one.
type Chunk struct {
	GID  txn.GID
	Part uint32 // from 0
	Data []byte
}

// Abort ends an attempt to commit: of this entry and the write set, the first in the log decides.
type Abort struct {
	GID    txn.GID
	Reason txn.AbortReason
}

// Member announces a node that has started. What earlier incarnations of the node left undecided is dead.
type Member struct {
	Node            txn.NodeID
	Incarnation     uint64
	RaftAddress     string
	GRPCAddress     string
	HTTPAddress     string
	GatewayAddress  string
	Version         string // of Quorate
	PostgresVersion string
	Format          uint32 // the newest format of entries that it can read; 0: 1
}

// Barrier marks an exact place in the order, at which every node does what Purpose asks for.
type Barrier struct {
	ID      txn.GID
	Purpose string
}

// VersionError says that an entry has a format which this build does not know. The node must stop before the
// entry: skipping it would lose transactions.
type VersionError struct{ Version byte }

func (e *VersionError) Error() string {
	return fmt.Sprintf("log entry has format version %d, this build reads version %d only: upgrade this node", e.Version, Version)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// begin appends the header, to be completed by finish.
func begin(dst []byte) []byte { return append(dst, Version, 0, 0, 0, 0) }

// finish sets the checksum of the entry that starts at start.
func finish(dst []byte, start int) []byte {
	e := dst[start:]
	binary.LittleEndian.PutUint32(e[1:], crc32.Checksum(e[header:], castagnoli))
	return dst
}

// payload checks the header and returns what is behind it.
func payload(b []byte) ([]byte, error) {
	if len(b) > 0 && b[0] != Version {
		return nil, &VersionError{b[0]}
	}
	if len(b) < header {
		return nil, corrupt("%d bytes are too short for a header", len(b))
	}
	body := b[header:]
	if sum, want := crc32.Checksum(body, castagnoli), binary.LittleEndian.Uint32(b[1:]); sum != want {
		return nil, corrupt("checksum is %08x, should be %08x", sum, want)
	}
	return body, nil
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", txn.ErrCorrupt, fmt.Sprintf(format, args...))
}
