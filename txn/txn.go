// Package txn is the vocabulary of Quorate: the identifiers, write sets, certification keys, verdicts and
// sentinel errors that every other package speaks. It imports nothing of the project and starts nothing.
package txn

import (
	"fmt"
	"strconv"
	"strings"
)

// NodeID names a node for the life of the cluster. 0 is no node; the first node is 1.
type NodeID uint32

// String returns the decimal form, as used in configuration and logs.
func (n NodeID) String() string { return strconv.FormatUint(uint64(n), 10) }

// LogIndex is a position in the Raft log. The first entry is 1; 0 is "before the log".
type LogIndex uint64

// CSN, the commit sequence number, is the place of one committed transaction in the total order: the first is 1,
// the next 2, without gaps. A log entry carries a batch of transactions, so an index is too coarse to say which of
// them a snapshot saw; the certifier therefore numbers the transactions that it lets commit, in log order, and so
// alike on every node. "Everything up to CSN n is visible" is what base, seen and applied are measured in.
type CSN uint64

// LSN is a byte position in one PostgreSQL server's write-ahead log; it means nothing on another server.
type LSN uint64

// String returns the form PostgreSQL prints (pg_lsn).
func (l LSN) String() string { return fmt.Sprintf("%X/%X", uint32(l>>32), uint32(l)) }

// XID is PostgreSQL's xid8: a 64-bit transaction id of one server, epoch included. 0 is none.
type XID uint64

// GID identifies one attempt to commit, cluster-wide and for ever. Incarnation is drawn at random each time a
// sidecar starts, so that nothing from before a restart, and nothing a client makes up, can be taken for a
// transaction that is being committed now.
type GID struct {
	Node        NodeID
	Incarnation uint64
	Sequence    uint64
}

// IsZero reports whether g names no transaction.
func (g GID) IsZero() bool { return g == GID{} }

// String returns node, incarnation in hexadecimal, and sequence, for example "2-9f86d081884c7d65-42".
func (g GID) String() string {
	b := make([]byte, 0, 48)
	b = strconv.AppendUint(b, uint64(g.Node), 10)
	b = append(b, '-')
	b = strconv.AppendUint(b, g.Incarnation, 16)
	b = append(b, '-')
	b = strconv.AppendUint(b, g.Sequence, 10)
	return string(b)
}

// ParseGID reads what GID.String wrote. The error wraps ErrBadGID.
func ParseGID(s string) (GID, error) {
	node, rest, ok1 := strings.Cut(s, "-")
	incarnation, sequence, ok2 := strings.Cut(rest, "-")
	if !ok1 || !ok2 {
		return GID{}, fmt.Errorf("%w: %q", ErrBadGID, s)
	}
	n, err1 := strconv.ParseUint(node, 10, 32)
	i, err2 := strconv.ParseUint(incarnation, 16, 64)
	q, err3 := strconv.ParseUint(sequence, 10, 64)
	if err1 != nil || err2 != nil || err3 != nil {
		return GID{}, fmt.Errorf("%w: %q", ErrBadGID, s)
	}
	g := GID{Node: NodeID(n), Incarnation: i, Sequence: q}
	if g.String() != s {
		return GID{}, fmt.Errorf("%w: %q is not in canonical form", ErrBadGID, s)
	}
	return g, nil
}

// Seal names one attempt to commit, and proves that the gateway makes it: GIDs are no secret, and every user of SQL can write
// logical messages. The nonce is known to the gateway, the coordinator and capture only; it is drawn for each attempt.
type Seal struct {
	GID   GID
	Nonce uint64
}

// String returns the GID, a dot and the nonce in hexadecimal.
func (s Seal) String() string { return s.GID.String() + "." + strconv.FormatUint(s.Nonce, 16) }

// ParseSeal reads what Seal.String wrote. The error wraps ErrBadGID.
func ParseSeal(text string) (Seal, error) {
	gidText, nonceText, _ := strings.Cut(text, ".")
	gid, err := ParseGID(gidText)
	if err != nil {
		return Seal{}, err
	}
	nonce, err := strconv.ParseUint(nonceText, 16, 64)
	if err != nil {
		return Seal{}, fmt.Errorf("%w: seal %q", ErrBadGID, text)
	}
	return Seal{GID: gid, Nonce: nonce}, nil
}
