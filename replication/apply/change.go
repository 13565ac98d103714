package apply

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/quorate/quorate/txn"
)

// The messages of a write set are pgoutput's, protocol version 1. They are read here without allocating per row or
// per column: a tuple's values are slices of the write set and go into a Bind message as they are.

// The kinds of a column's value in a tuple.
const (
	kindNull      = 'n'
	kindUnchanged = 'u' // a TOASTed value that the change did not touch: it is not sent
	kindText      = 't'
)

// column is one value of a tuple.
type column struct {
	kind byte
	data []byte // of kindText
}

// reader takes a message apart. After the first short read bad is set and all results are zero.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if r.bad || n < 0 || n > len(r.b) {
		r.bad = true
		return nil
	}
	taken := r.b[:n:n]
	r.b = r.b[n:]
	return taken
}

func (r *reader) uint8() byte {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) uint16() uint16 {
	if b := r.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (r *reader) uint32() uint32 {
	if b := r.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *reader) string() string {
	end := bytes.IndexByte(r.b, 0)
	if r.bad || end < 0 {
		r.bad = true
		return ""
	}
	s := string(r.b[:end])
	r.b = r.b[end+1:]
	return s
}

// tuple reads one tuple into the memory of into.
func (r *reader) tuple(into []column) []column {
	into = into[:0]
	for n := int(r.uint16()); n > 0 && !r.bad; n-- {
		c := column{kind: r.uint8()}
		switch c.kind {
		case kindNull, kindUnchanged:
		case kindText:
			c.data = r.take(int(int32(r.uint32())))
		default: // 'b', binary, is never asked for
			r.bad = true
		}
		into = append(into, c)
	}
	return into
}

// nextMessage cuts the first message off a write set's changes.
func nextMessage(changes []byte) (message, rest []byte, err error) {
	size, n := binary.Uvarint(changes)
	if n <= 0 || size == 0 || size > uint64(len(changes)-n) {
		return nil, nil, fmt.Errorf("read change: %w: bad length", txn.ErrCorrupt)
	}
	return changes[n : n+int(size)], changes[n+int(size):], nil
}

// rowChange is an Insert, Update or Delete. Its columns are valid until the next parse into it.
type rowChange struct {
	operation byte   // 'I', 'U' or 'D'
	relation  uint32 // the origin's OID, as the Relation message before it says
	identity  byte   // 'K': old holds the old replica identity key; 'O': the whole old row; 0: neither was sent
	old, new  []column
}

func (c *rowChange) parse(message []byte) error {
	r := reader{b: message}
	c.operation, c.identity = r.uint8(), 0
	c.old, c.new = c.old[:0], c.new[:0]
	c.relation = r.uint32()
	part := r.uint8()
	if c.operation != 'I' && (part == 'K' || part == 'O') {
		c.identity = part
		c.old = r.tuple(c.old)
		if c.operation == 'U' {
			part = r.uint8()
		}
	}
	switch {
	case c.operation == 'D':
		r.bad = r.bad || c.identity == 0
	case part == 'N':
		c.new = r.tuple(c.new)
	default:
		r.bad = true
	}
	if r.bad || len(r.b) != 0 {
		return fmt.Errorf("read %s: %w", operationName(c.operation), txn.ErrCorrupt)
	}
	return nil
}

func operationName(operation byte) string {
	switch operation {
	case 'I':
		return "INSERT"
	case 'U':
		return "UPDATE"
	case 'D':
		return "DELETE"
	}
	return "message"
}

// relationMessage describes a table as it is at the origin.
type relationMessage struct {
	oid          uint32
	schema, name string
	full         bool // REPLICA IDENTITY FULL
	columns      []relationColumn
}

type relationColumn struct {
	name string
	key  bool // part of the replica identity
}

func parseRelation(message []byte) (relationMessage, error) {
	r := reader{b: message}
	r.uint8() // 'R'
	m := relationMessage{oid: r.uint32(), schema: r.string(), name: r.string()}
	if m.schema == "" {
		m.schema = "pg_catalog"
	}
	m.full = r.uint8() == 'f'
	for n := int(r.uint16()); n > 0 && !r.bad; n-- {
		flags := r.uint8()
		m.columns = append(m.columns, relationColumn{name: r.string(), key: flags&1 != 0})
		r.take(8) // type and its modifier: OIDs of the origin, which mean nothing here
	}
	if r.bad || len(r.b) != 0 {
		return m, fmt.Errorf("read relation: %w", txn.ErrCorrupt)
	}
	return m, nil
}

type truncateMessage struct {
	relations       []uint32
	restartIdentity bool
}

func parseTruncate(message []byte) (truncateMessage, error) {
	r := reader{b: message}
	r.uint8() // 'T'
	n := int(r.uint32())
	// CASCADE (1) is of no interest: the tables that it reached are listed.
	m := truncateMessage{restartIdentity: r.uint8()&2 != 0}
	for ; n > 0 && !r.bad; n-- {
		m.relations = append(m.relations, r.uint32())
	}
	if r.bad || len(r.b) != 0 || len(m.relations) == 0 {
		return m, fmt.Errorf("read truncate: %w", txn.ErrCorrupt)
	}
	return m, nil
}

// parseLogical reads what pg_logical_emit_message wrote.
func parseLogical(message []byte) (prefix string, content []byte, err error) {
	r := reader{b: message}
	r.take(1 + 1 + 8) // 'M', flags, position
	prefix = r.string()
	content = r.take(int(int32(r.uint32())))
	if r.bad || len(r.b) != 0 {
		return "", nil, fmt.Errorf("read logical message: %w", txn.ErrCorrupt)
	}
	return prefix, content, nil
}
