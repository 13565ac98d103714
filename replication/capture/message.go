package capture

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/quorate/quorate/txn"
)

// The pgoutput messages that capture meets (protocol version 2).
const (
	msgBegin        = 'B'
	msgCommit       = 'C'
	msgOrigin       = 'O'
	msgRelation     = 'R'
	msgType         = 'Y'
	msgInsert       = 'I'
	msgUpdate       = 'U'
	msgDelete       = 'D'
	msgTruncate     = 'T'
	msgMessage      = 'M'
	msgStreamStart  = 'S'
	msgStreamStop   = 'E'
	msgStreamCommit = 'c'
	msgStreamAbort  = 'A'
)

// localSchema holds each node's own tables, which are never replicated.
const localSchema = "quorate"

// cursor reads a message in place. A read past the end yields zero and sets short, so that a parser checks once, at
// its end, instead of after every field.
type cursor struct {
	rest  []byte
	short bool
}

func (c *cursor) take(n int) []byte {
	if n < 0 || n > len(c.rest) {
		c.short, c.rest = true, nil
		return nil
	}
	b := c.rest[:n:n]
	c.rest = c.rest[n:]
	return b
}

func (c *cursor) byte() byte {
	if b := c.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (c *cursor) uint16() uint16 {
	if b := c.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (c *cursor) uint32() uint32 {
	if b := c.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (c *cursor) uint64() uint64 {
	if b := c.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// text reads up to a zero byte, which it drops.
func (c *cursor) text() []byte {
	n := bytes.IndexByte(c.rest, 0)
	if n < 0 {
		c.short, c.rest = true, nil
		return nil
	}
	return c.take(n + 1)[:n]
}

// malformed is the error for a message that does not parse.
func malformed(body []byte) error {
	if len(body) == 0 {
		return fmt.Errorf("%w: empty replication message", txn.ErrCorrupt)
	}
	return fmt.Errorf("%w: replication message %q of %d bytes", txn.ErrCorrupt, body[0], len(body))
}

// relation is one description of a table as the stream gave it. It does not change, except for plan, which the
// capture goroutine keeps there to find it quickly.
type relation struct {
	oid          uint32
	schema, name string
	columns      []string
	message      []byte // the Relation message, protocol version 1
	framed       []byte // the Type messages it needs and itself, each with its length in front
	local        bool

	plan       *plan
	generation uint64 // of the catalog, to which plan belongs
}

// parseRelation reads a Relation message without stream xid. types are the framed Type messages that came just before.
func parseRelation(body, types []byte) (*relation, error) {
	c := cursor{rest: body[1:]}
	r := &relation{oid: c.uint32(), schema: string(c.text()), name: string(c.text())}
	c.byte() // replica identity setting; the flags of the columns and the catalog say the same
	n := int(c.uint16())
	if c.short || n > len(c.rest) {
		return nil, malformed(body)
	}
	r.columns = make([]string, 0, n)
	for range n {
		c.byte()
		r.columns = append(r.columns, string(c.text()))
		c.take(8) // type, modifier
	}
	if c.short || len(c.rest) != 0 {
		return nil, malformed(body)
	}
	if r.schema == "" {
		r.schema = "pg_catalog" // how pgoutput writes it
	}
	r.message = bytes.Clone(body)
	r.framed = appendFramed(bytes.Clone(types), body)
	r.local = r.schema == localSchema
	return r, nil
}

// appendFramed appends message behind its length.
func appendFramed(to, message []byte) []byte {
	to = binary.AppendUvarint(to, uint64(len(message)))
	return append(to, message...)
}

// The kinds of a column in a tuple.
const (
	columnNull      = 'n'
	columnUnchanged = 'u' // a TOASTed value that the update did not touch
	columnText      = 't'
	columnBinary    = 'b'
)

// column is one value of a tuple, in place.
type column struct {
	kind  byte
	value []byte
}

// tuple appends the columns of a TupleData to cols.
func (c *cursor) tuple(cols []column) []column {
	n := int(c.uint16())
	for range n {
		col := column{kind: c.byte()}
		switch col.kind {
		case columnNull, columnUnchanged:
		case columnText, columnBinary:
			col.value = c.take(int(c.uint32()))
		default:
			c.short, c.rest = true, nil
		}
		if c.short {
			return cols
		}
		cols = append(cols, col)
	}
	return cols
}

// rowChange is a parsed Insert, Update or Delete. Its columns point into the message.
type rowChange struct {
	kind byte
	oid  uint32
	old  []column // nil unless sent
	new  []column // nil for a Delete

	oldBuffer, newBuffer []column // what old and new are cut from
}

// parse reads a row change without stream xid, reusing the slices of rc.
func (rc *rowChange) parse(body []byte) error {
	c := cursor{rest: body}
	rc.kind, rc.oid, rc.old, rc.new = c.byte(), c.uint32(), nil, nil
	part := c.byte()
	if (part == 'K' || part == 'O') && rc.kind != msgInsert {
		rc.oldBuffer = c.tuple(rc.oldBuffer[:0])
		rc.old = rc.oldBuffer
		part = 'N'
		if rc.kind == msgUpdate {
			part = c.byte()
		}
	} else if rc.kind == msgDelete {
		return malformed(body)
	}
	if rc.kind != msgDelete {
		if part != 'N' {
			return malformed(body)
		}
		rc.newBuffer = c.tuple(rc.newBuffer[:0])
		rc.new = rc.newBuffer
	}
	if c.short || len(c.rest) != 0 {
		return malformed(body)
	}
	return nil
}

// logical is a parsed logical decoding message. Its fields point into the message.
type logical struct {
	transactional   bool
	prefix, content []byte
}

// parseLogical reads a logical decoding message without stream xid.
func parseLogical(body []byte) (logical, error) {
	c := cursor{rest: body[1:]}
	m := logical{transactional: c.byte()&1 != 0}
	c.uint64() // LSN
	m.prefix = c.text()
	m.content = c.take(int(c.uint32()))
	if c.short || len(c.rest) != 0 {
		return logical{}, malformed(body)
	}
	return m, nil
}
