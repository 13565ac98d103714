package codec

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"iter"
	"strconv"
	"unicode/utf8"

	"github.com/quorate/quorate/txn"
)

// Prefixes of the logical messages by which gateway and server speak to capture.
const (
	// PrefixSeal: transactional, the last change of a transaction; the content is its GID.
	PrefixSeal = "quorate.seal"
	// PrefixMarker: non-transactional and flushed; the content is a Marker.
	PrefixMarker = "quorate.marker"
	// PrefixDDL: transactional, emitted by the event trigger; the content is a DDL.
	PrefixDDL = "quorate.ddl"
)

// AppendMessage appends one pgoutput message, behind its length, to the changes of a write set. The message must
// not be empty.
func AppendMessage(dst, msg []byte) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(msg)))
	return append(dst, msg...)
}

// Messages yields the pgoutput messages of changes (txn.WriteSet.Changes, Chunk.Data) in order, aliasing it. If it
// is malformed, the last pair is a nil message and an error that wraps txn.ErrCorrupt. It does not allocate.
func Messages(changes []byte) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for rest := changes; len(rest) > 0; {
			size, n := binary.Uvarint(rest)
			if n <= 0 || size == 0 || size > uint64(len(rest)-n) {
				yield(nil, corrupt("message at byte %d of %d has no valid length", len(changes)-len(rest), len(changes)))
				return
			}
			end := n + int(size)
			if !yield(rest[n:end:end], nil) {
				return
			}
			rest = rest[end:]
		}
	}
}

// Marker says that a transaction is ready to be decided.
type Marker struct {
	GID  txn.GID
	XID  txn.XID
	Base txn.CSN
	Seen txn.CSN
}

// FormatMarker returns the content of a marker: '<gid> <xid> <base> <seen>'.
func FormatMarker(m Marker) string {
	b := make([]byte, 0, 112)
	b = append(b, m.GID.String()...)
	for _, v := range [...]uint64{uint64(m.XID), uint64(m.Base), uint64(m.Seen)} {
		b = append(b, ' ')
		b = strconv.AppendUint(b, v, 10)
	}
	return string(b)
}

// ParseMarker reads what FormatMarker wrote, and nothing else. Clients can emit messages with any prefix, so an
// error, which wraps txn.ErrCorrupt, is no reason to stop: the message is to be ignored.
func ParseMarker(content []byte) (Marker, error) {
	gid, rest, _ := bytes.Cut(content, []byte{' '})
	xid, rest, _ := bytes.Cut(rest, []byte{' '})
	base, seen, _ := bytes.Cut(rest, []byte{' '})
	var m Marker
	if len(gid) > 64 { // do not copy something huge into an error
		return m, corrupt("marker whose global transaction id has %d bytes", len(gid))
	}
	var err error
	if m.GID, err = txn.ParseGID(string(gid)); err != nil {
		return Marker{}, corrupt("marker: %v", err)
	}
	x, ok1 := parseDecimal(xid)
	b, ok2 := parseDecimal(base)
	s, ok3 := parseDecimal(seen)
	if !ok1 || !ok2 || !ok3 {
		return Marker{}, corrupt("marker of %v: want <gid> <xid> <base> <seen>", m.GID)
	}
	m.XID, m.Base, m.Seen = txn.XID(x), txn.CSN(b), txn.CSN(s)
	return m, nil
}

// parseDecimal reads an unsigned number in canonical form, without allocating.
func parseDecimal(b []byte) (v uint64, ok bool) {
	if len(b) == 0 || len(b) > 20 || b[0] == '0' && len(b) > 1 {
		return 0, false
	}
	for _, c := range b {
		digit := uint64(c - '0')
		if digit > 9 || v > (1<<64-1-digit)/10 {
			return 0, false
		}
		v = v*10 + digit
	}
	return v, true
}

// DDL is a statement that peers repeat at its place in the transaction.
type DDL struct {
	SQL        string `json:"sql"` // exactly as the client sent it
	SearchPath string `json:"search_path"`
	Role       string `json:"role"`
	// Tag is PostgreSQL's command tag, for example CREATE TABLE.
	Tag string `json:"tag"`
	// Tables are the tables concerned, as schema and name; empty if they are not known.
	Tables [][2]string `json:"tables"`
	// Settings are further settings under which the statement ran, by name.
	Settings map[string]string `json:"settings"`
}

// ParseDDL reads the content of a PrefixDDL message. The error wraps txn.ErrCorrupt. Unknown members are refused:
// a statement must not run here with a part of its meaning left out.
func ParseDDL(content []byte) (DDL, error) {
	if !utf8.Valid(content) { // package json would quietly replace the offending bytes
		return DDL{}, corrupt("DDL is not UTF-8")
	}
	raw := struct {
		DDL
		Tables [][]string `json:"tables"` // a [2]string would take arrays of any length
	}{}
	dec := json.NewDecoder(bytes.NewReader(content))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&raw); err != nil {
		return DDL{}, corrupt("DDL: %v", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return DDL{}, corrupt("DDL: more than one value")
	}
	d := raw.DDL
	if d.SQL == "" {
		return DDL{}, corrupt("DDL without a statement")
	}
	for i, t := range raw.Tables {
		if len(t) != 2 || t[0] == "" || t[1] == "" {
			return DDL{}, corrupt("DDL: table %d is not a pair of schema and name", i)
		}
		d.Tables = append(d.Tables, [2]string(t))
	}
	return d, nil
}
