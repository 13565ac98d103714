package codec

import (
	"fmt"
	"math"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/quorate/quorate/internal/invariant"
	"github.com/quorate/quorate/txn"
)

// Role is what a member is there for.
type Role uint8

// The roles. They are in the log and must not change.
const (
	RoleData    Role = 0 // has a PostgreSQL
	RoleWitness Role = 1 // votes and stores the log only
)

// String returns the name that configuration and status use.
func (r Role) String() string {
	switch r {
	case RoleData:
		return "data"
	case RoleWitness:
		return "witness"
	}
	return "unknown"
}

// MarshalText implements encoding.TextMarshaler.
func (r Role) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (r *Role) UnmarshalText(text []byte) error {
	for _, known := range []Role{RoleData, RoleWitness} {
		if known.String() == string(text) {
			*r = known
			return nil
		}
	}
	return fmt.Errorf("%q is not a role", text)
}

// Found says who the members are at first. The earliest such entry of a log counts; a later one only if Previous is the
// cluster that the log was of by then: the founders go on as Cluster, and all others are removed.
type Found struct {
	Cluster  txn.UUID
	Previous txn.UUID // zero: none
	Founders []Founder
	// MaxNodes is how many members can have data at a time, for good: each sequence is divided among as many. 0: 16.
	// A later founding does not change it.
	MaxNodes uint32
}

// MostNodes bounds Found.MaxNodes.
const MostNodes = 64

// Founder is one of the first members.
type Founder struct {
	Node txn.NodeID
	Slot uint32 // which residue of sequences is its; a witness has none, and Slot means nothing
	Role Role
}

// MaxFounders in one Found entry.
const MaxFounders = 64

// Admit makes a new member. It gets the id that follows the highest ever given.
type Admit struct {
	Request        txn.UUID // the same request admits once
	Role           Role
	Replaces       txn.NodeID // removed by the same entry; 0: nobody
	RaftAddress    string
	GRPCAddress    string
	HTTPAddress    string
	GatewayAddress string
	Version        string // of Quorate
	Token          TokenUse
	Format         uint32 // as a Member's
}

// Remove ends a membership for good. What the node has not got into the log by then aborts.
type Remove struct {
	Node   txn.NodeID
	Reason string
}

// AppendFound appends the entry of f to dst and returns the extended slice.
func AppendFound(dst []byte, f *Found) []byte {
	invariant.Check(!f.Cluster.IsZero() && len(f.Founders) > 0 && len(f.Founders) <= MaxFounders && f.MaxNodes <= MostNodes,
		"encode a founding of %s by %d, for %d", f.Cluster, len(f.Founders), f.MaxNodes)
	size := func(m Founder) int {
		return sizeUint(uint64(m.Node)) + sizeUint(uint64(m.Slot)) + sizeUint(uint64(m.Role))
	}
	inner := sizeUUID(f.Cluster) + sizeUUID(f.Previous) + sizeUint(uint64(f.MaxNodes))
	for _, m := range f.Founders {
		invariant.Check(m.Node != 0, "encode a founder that is no node")
		inner += sizeBytes(size(m))
	}
	start := len(dst)
	dst = begin(dst)
	dst = appendHead(dst, protowire.Number(KindFound), inner)
	dst = appendUUID(dst, 1, f.Cluster)
	dst = appendUUID(dst, 2, f.Previous)
	for _, m := range f.Founders {
		dst = appendHead(dst, 3, size(m))
		dst = appendUint(dst, 1, uint64(m.Node))
		dst = appendUint(dst, 2, uint64(m.Slot))
		dst = appendUint(dst, 3, uint64(m.Role))
	}
	dst = appendUint(dst, 4, uint64(f.MaxNodes))
	return finish(dst, start)
}

// AppendAdmit appends the entry of a to dst and returns the extended slice. Texts are treated as those of AppendMember.
func AppendAdmit(dst []byte, a *Admit) []byte {
	invariant.Check(!a.Request.IsZero(), "encode an admission without a request")
	texts := [...]string{a.RaftAddress, a.GRPCAddress, a.HTTPAddress, a.GatewayAddress, a.Version}
	inner := sizeUUID(a.Request) + sizeUint(uint64(a.Role)) + sizeUint(uint64(a.Replaces))
	for i, s := range texts {
		texts[i] = sanitize(s)
		inner += sizeOptional(len(texts[i]))
	}
	inner += sizeTokenUse(a.Token) + sizeUint(uint64(a.Format))
	start := len(dst)
	dst = begin(dst)
	dst = appendHead(dst, protowire.Number(KindAdmit), inner)
	dst = appendUUID(dst, 1, a.Request)
	dst = appendUint(dst, 2, uint64(a.Role))
	dst = appendUint(dst, 3, uint64(a.Replaces))
	for i, s := range texts {
		dst = appendString(dst, protowire.Number(4+i), s)
	}
	dst = appendTokenUse(dst, a.Token)
	dst = appendUint(dst, 12, uint64(a.Format))
	return finish(dst, start)
}

// AppendRemove appends the entry of r to dst and returns the extended slice. The reason is treated as the texts of
// AppendMember.
func AppendRemove(dst []byte, r Remove) []byte {
	invariant.Check(r.Node != 0, "encode the removal of no node")
	reason := sanitize(r.Reason)
	start := len(dst)
	dst = begin(dst)
	dst = appendHead(dst, protowire.Number(KindRemove), sizeUint(uint64(r.Node))+sizeOptional(len(reason)))
	dst = appendUint(dst, 1, uint64(r.Node))
	dst = appendString(dst, 2, reason)
	return finish(dst, start)
}

func sizeUUID(u txn.UUID) int {
	if u.IsZero() {
		return 0
	}
	return sizeBytes(len(u))
}

func appendUUID(dst []byte, field protowire.Number, u txn.UUID) []byte {
	if u.IsZero() {
		return dst
	}
	return appendBytes(dst, field, u[:])
}

func (r *reader) uuid() (u txn.UUID) {
	b := r.bytes()
	if r.err == nil && len(b) != len(u) {
		r.fail("field %d: %d bytes are no UUID", r.field, len(b))
		return u
	}
	copy(u[:], b)
	if r.err == nil && u.IsZero() {
		r.fail("field %d: a UUID of zeros", r.field)
	}
	return u
}

func (r *reader) role() Role { return Role(r.uint(uint64(RoleWitness))) }

func (r *reader) found() *Found {
	f := new(Found)
	for r.nextRepeated() {
		switch {
		case r.field == 1 && f.Cluster.IsZero():
			f.Cluster = r.uuid()
		case r.field == 2 && f.Previous.IsZero():
			f.Previous = r.uuid()
		case r.field == 3 && len(f.Founders) < MaxFounders:
			f.Founders = append(f.Founders, r.founder())
		case r.field == 4 && f.MaxNodes == 0:
			f.MaxNodes = uint32(r.uint(MostNodes))
		default:
			r.unknown()
		}
	}
	if r.err == nil && (f.Cluster.IsZero() || len(f.Founders) == 0) {
		r.fail("founding without a cluster or founders")
	}
	return f
}

func (r *reader) founder() (m Founder) {
	in := reader{b: r.bytes()}
	for in.next() {
		switch in.field {
		case 1:
			m.Node = txn.NodeID(in.uint(math.MaxUint32))
		case 2:
			m.Slot = uint32(in.uint(math.MaxUint32))
		case 3:
			m.Role = in.role()
		default:
			in.unknown()
		}
	}
	if in.err != nil {
		r.fail("founder: %v", in.err)
	} else if m.Node == 0 {
		r.fail("founder without a node")
	}
	return m
}

func (r *reader) admit() *Admit {
	a := new(Admit)
	hashed := false
	for r.next() {
		switch r.field {
		case 1:
			a.Request = r.uuid()
		case 2:
			a.Role = r.role()
		case 3:
			a.Replaces = txn.NodeID(r.uint(math.MaxUint32))
		case 4:
			a.RaftAddress = r.text()
		case 5:
			a.GRPCAddress = r.text()
		case 6:
			a.HTTPAddress = r.text()
		case 7:
			a.GatewayAddress = r.text()
		case 8:
			a.Version = r.text()
		case 9:
			a.Token.ID = r.uuid()
		case 10:
			a.Token.Hash, hashed = r.hash(), true
		case 11:
			a.Token.Time = r.uint(math.MaxUint64)
		case 12:
			a.Format = uint32(r.uint(math.MaxUint32))
		default:
			r.unknown()
		}
	}
	if r.err == nil && a.Request.IsZero() {
		r.fail("admission without a request")
	}
	if r.err == nil && (hashed == a.Token.ID.IsZero() || a.Token.ID.IsZero() && a.Token.Time != 0) {
		r.fail("admission with part of a token")
	}
	return a
}

func (r *reader) remove() *Remove {
	m := new(Remove)
	for r.next() {
		switch r.field {
		case 1:
			m.Node = txn.NodeID(r.uint(math.MaxUint32))
		case 2:
			m.Reason = r.text()
		default:
			r.unknown()
		}
	}
	if r.err == nil && m.Node == 0 {
		r.fail("removal of no node")
	}
	return m
}
