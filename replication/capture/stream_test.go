package capture

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/prometheus/client_golang/prometheus"
	"pgregory.net/rapid"

	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
)

// tables are definitions without a server. A table that is not in it is unknown.
type tables map[uint32]*pg.Relation

func (d tables) Relation(_ context.Context, oid uint32) (*pg.Relation, error) { return d[oid], nil }

func (d tables) RelationByName(_ context.Context, schema, name string) (*pg.Relation, error) {
	for _, r := range d {
		if r.Schema == schema && r.Name == name {
			return r, nil
		}
	}
	return nil, nil
}

func (d tables) Generation() uint64 { return 1 }
func (d tables) Stable() bool       { return true }
func (d tables) Invalidate()        {}

// committed returns tables of these names, with oids from 1 on and without keys.
func committed(names ...string) tables {
	all := tables{}
	for i, name := range names {
		oid := uint32(i + 1)
		all[oid] = &pg.Relation{OID: oid, Schema: "public", Name: name, RootSchema: "public", RootName: name}
	}
	return all
}

// accepter is a Sink that expects everything.
type accepter struct {
	results []result
	strays  []stray
}

func (a *accepter) Expecting(txn.Seal) bool { return true }
func (a *accepter) Marked(m Marker, set *txn.WriteSet, parts txn.Parts, err error) {
	a.results = append(a.results, result{m, set, parts, err})
}
func (a *accepter) Stray(xid uint32, _ txn.LSN, n uint64) { a.strays = append(a.strays, stray{xid, n}) }

func testStream(t testing.TB, catalog definitions, limits Limits) (*stream, *accepter) {
	sink := new(accepter)
	cfg := Config{Database: "postgres", Sink: sink, SpillDir: t.TempDir(), Limits: limits.withDefaults(), Logger: slog.New(slog.DiscardHandler)}
	s := newStream(cfg, newMetrics(prometheus.NewRegistry()), func() {})
	s.catalog, s.assembler.catalog = catalog, catalog
	return s, sink
}

// The messages of a stream, as the server writes them. xid is 0 outside a stream.

func head(kind byte, xid uint32) []byte {
	b := []byte{kind}
	if xid != 0 {
		b = binary.BigEndian.AppendUint32(b, xid)
	}
	return b
}

func start(xid uint32) []byte      { return append(head('S', xid), 1) }
func stop() []byte                 { return []byte{'E'} }
func abort(xid, sub uint32) []byte { return binary.BigEndian.AppendUint32(head('A', xid), sub) }
func streamCommit(xid uint32) []byte {
	return append(head('c', xid), make([]byte, 25)...)
}
func begin(xid uint32) []byte {
	return binary.BigEndian.AppendUint32(append([]byte{'B'}, make([]byte, 16)...), xid)
}
func plainCommit() []byte { return append([]byte{'C'}, make([]byte, 25)...) }

func relationMessage(xid, oid uint32, schema, name string, columns ...string) []byte {
	b := binary.BigEndian.AppendUint32(head('R', xid), oid)
	b = append(append(b, schema...), 0)
	b = append(append(b, name...), 0)
	b = append(b, 'd')
	b = binary.BigEndian.AppendUint16(b, uint16(len(columns)))
	for _, c := range columns {
		b = append(append(append(b, 1), c...), 0)
		b = append(b, 0, 0, 0, 23, 0xff, 0xff, 0xff, 0xff)
	}
	return b
}

func tupleData(b []byte, values ...string) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(values)))
	for _, v := range values {
		switch v {
		case "NULL":
			b = append(b, 'n')
		case "UNCHANGED":
			b = append(b, 'u')
		default:
			b = binary.BigEndian.AppendUint32(append(b, 't'), uint32(len(v)))
			b = append(b, v...)
		}
	}
	return b
}

func insert(xid, oid uint32, values ...string) []byte {
	b := binary.BigEndian.AppendUint32(head('I', xid), oid)
	return tupleData(append(b, 'N'), values...)
}

func update(xid, oid uint32, old string, values ...string) []byte {
	b := binary.BigEndian.AppendUint32(head('U', xid), oid)
	if old != "" {
		b = tupleData(append(b, 'K'), old)
	}
	return tupleData(append(b, 'N'), values...)
}

func truncate(xid uint32, oids ...uint32) []byte {
	b := binary.BigEndian.AppendUint32(head('T', xid), uint32(len(oids)))
	b = append(b, 0)
	for _, o := range oids {
		b = binary.BigEndian.AppendUint32(b, o)
	}
	return b
}

func messageOf(xid uint32, transactional byte, prefix, content string) []byte {
	b := append(head('M', xid), transactional)
	b = append(b, make([]byte, 8)...)
	b = append(append(b, prefix...), 0)
	b = binary.BigEndian.AppendUint32(b, uint32(len(content)))
	return append(b, content...)
}

func seal(xid uint32, gid string) []byte { return messageOf(xid, 1, pg.PrefixSeal, gid+".0") }
func marker(gid string, xid uint32) []byte {
	return messageOf(0, 0, pg.PrefixMarker, fmt.Sprintf("%s.0 %d 0 0", gid, xid))
}

func feed(t testing.TB, s *stream, messages ...[]byte) {
	t.Helper()
	for i, m := range messages {
		if err := s.receive(t.Context(), bytes.Clone(m), time.Now()); err != nil {
			t.Fatalf("message %d %q: %v", i, m, err)
		}
	}
}

// TestDescriptions: a description that came in a savepoint survives it, the one that holds at each change stands
// before it, and none is written without need.
func TestDescriptions(t *testing.T) {
	s, sink := testStream(t, committed("a", "unused"), Limits{})
	feed(t, s,
		start(10), relationMessage(11, 1, "public", "a", "id"), insert(11, 1, "gone"), stop(),
		abort(10, 11),
		start(10), insert(10, 1, "one"), stop(),
		start(10), relationMessage(12, 1, "public", "a", "id", "v"), insert(12, 1, "two", "x"), stop(),
		abort(10, 12),
		start(10), relationMessage(10, 1, "public", "a", "id"), insert(10, 1, "three"), stop(),
		start(10), relationMessage(10, 2, "public", "unused", "id"), relationMessage(10, 3, localSchema, "nudge", "id"), insert(10, 3, "local"), stop(),
		start(10), seal(10, "1-a-1"), stop(),
		marker("1-a-1", 10),
	)
	var got []string
	for _, m := range split(t, sink.results[0].set.Changes) {
		got = append(got, string(m[:1]))
	}
	if want := []string{"R", "I", "I"}; !slices.Equal(got, want) {
		t.Errorf("messages %v, want %v", got, want)
	}
	// Outside a stream the description may be one that an earlier transaction committed.
	feed(t, s, streamCommit(10), begin(20), insert(0, 1, "stray"), truncate(0, 1, 3), truncate(0, 3), plainCommit())
	if want := []stray{{20, 2}}; !slices.Equal(sink.strays, want) {
		t.Errorf("strays %v", sink.strays)
	}
	if err := s.receive(t.Context(), begin(30), time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := s.receive(t.Context(), insert(0, 99, "x"), time.Now()); !errors.Is(err, txn.ErrCorrupt) {
		t.Errorf("a relation that was never described: %v", err)
	}
}

// TestLocalTruncate: the node's own tables are taken out of a TRUNCATE.
func TestLocalTruncate(t *testing.T) {
	s, sink := testStream(t, committed("x", "t"), Limits{})
	feed(t, s, start(10), relationMessage(10, 1, localSchema, "x", "id"), relationMessage(10, 2, "public", "t", "id"),
		truncate(10, 1, 2, 1), stop(), start(10), seal(10, "1-a-1"), stop(), marker("1-a-1", 10))
	messages := split(t, sink.results[0].set.Changes)
	if want := truncate(0, 2); !bytes.Equal(messages[len(messages)-1], want) {
		t.Errorf("%q, want %q", messages[len(messages)-1], want)
	}
}

// TestTooLarge: a change that no log entry can hold fails its transaction, not the stream.
func TestTooLarge(t *testing.T) {
	s, sink := testStream(t, committed("t"), Limits{})
	feed(t, s, start(10), relationMessage(10, 1, "public", "t", "id"), insert(10, 1, string(make([]byte, maxMessage))), stop(),
		start(10), insert(10, 1, "small"), seal(10, "1-a-1"), stop(), marker("1-a-1", 10), streamCommit(10),
		start(11), relationMessage(11, 1, "public", "t", "id"), insert(11, 1, "1"), seal(11, "1-a-2"), stop(), marker("1-a-2", 11))
	if len(sink.results) != 2 || sink.results[0].err == nil || sink.results[1].set == nil {
		t.Errorf("%+v", sink.results)
	}
}

// TestSpillFails: a full disk fails the transaction, not the stream.
func TestSpillFails(t *testing.T) {
	s, sink := testStream(t, tables{}, Limits{TransactionMemory: 10})
	s.dir = "/nonexistent"
	feed(t, s, start(10), relationMessage(10, 1, "public", "t", "id"), insert(10, 1, "large enough"), seal(10, "1-a-1"), stop(), marker("1-a-1", 10), streamCommit(10))
	if len(sink.results) != 1 || sink.results[0].err == nil {
		t.Errorf("%+v", sink.results)
	}
	if s.memory != 0 {
		t.Errorf("%d bytes left in the books", s.memory)
	}
}

// TestJournal holds a journal against a plain list, for random appends, rollbacks and spills.
func TestJournal(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		type change struct {
			xid  uint32
			text string
		}
		var j journal
		var model []change
		descriptions := 0
		next := uint32(2)
		for i := range rapid.IntRange(0, 60).Draw(t, "steps") {
			xid := rapid.Uint32Range(1, next).Draw(t, "xid")
			switch rapid.IntRange(0, 7).Draw(t, "step") {
			case 0:
				if xid > 1 && !j.dropped(xid) {
					j.abort(xid)
					model = slices.DeleteFunc(model, func(c change) bool { return c.xid == xid })
				}
			case 1:
				if err := j.spill(dir); err != nil {
					t.Fatal(err)
				}
			case 2:
				j.describe(&relation{oid: uint32(i)})
				descriptions++
			case 3:
				next++
			default:
				if !j.dropped(xid) {
					text := fmt.Sprintf("%d of %d", i, xid)
					j.append(xid, []byte(text))
					model = append(model, change{xid, text})
				}
			}
			if int(j.changes()) != len(model) {
				t.Fatalf("%d changes, want %d", j.changes(), len(model))
			}
		}
		var got, want []string
		described := 0
		if err := j.records(func(r []byte) error {
			if r[0] == 0 {
				described++
			} else {
				got = append(got, string(r))
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for _, c := range model {
			want = append(want, c.text)
		}
		if !slices.Equal(got, want) || described != descriptions {
			t.Fatalf("%q and %d descriptions, want %q and %d", got, described, want, descriptions)
		}
		if err := j.reset(); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzStream feeds a stream with messages, each behind its length: nothing may panic, what it hands over is well
// formed, and the books come out even.
func FuzzStream(f *testing.F) {
	script := func(messages ...[]byte) (b []byte) {
		for _, m := range messages {
			b = appendFramed(b, m)
		}
		return b
	}
	table := relationMessage(10, 1, "public", "t", "id", "v")
	f.Add(script(start(10), table, insert(10, 1, "1", "NULL"), update(11, 1, "1", "2", "UNCHANGED"), stop(), abort(10, 11), start(10), seal(10, "1-a-1"), stop(), marker("1-a-1", 10), streamCommit(10)))
	f.Add(script(start(10), table, truncate(10, 1), messageOf(10, 1, pg.PrefixDDL, `{"tables": [["public", "t"]]}`), seal(10, "1-a-1"), stop(), marker("1-a-1", 10), abort(10, 10)))
	f.Add(script(begin(10), relationMessage(0, 1, "public", "t", "id"), insert(0, 1, "1"), plainCommit()))
	f.Add(script(start(10), head('Y', 10), table, messageOf(10, 1, pg.PrefixDDL, `{"xid": 11}`), stop(), abort(10, 11)))
	catalog := tables{1: {OID: 1, Schema: "public", Name: "t", RootSchema: "public", RootName: "t",
		Identity: []pg.IndexColumn{{Name: "id", Class: pg.ClassNumber}},
		Uniques:  []pg.Unique{{Name: "u", Columns: []pg.IndexColumn{{Name: "v", Class: pg.ClassText}}, Plain: true}},
		References: []pg.Reference{{ParentSchema: "public", ParentName: "p", Plain: true, Columns: []pg.IndexColumn{{Name: "v", Class: pg.ClassText}},
			Parent: []pg.IndexColumn{{Name: "id", Class: pg.ClassText}}}}}}
	f.Fuzz(func(t *testing.T, data []byte) {
		s, sink := testStream(t, catalog, Limits{TransactionMemory: 200, Memory: 500, PartSize: 100, KeysPerTable: 3})
		for len(data) > 0 {
			size, n := binary.Uvarint(data)
			if n <= 0 || size > uint64(len(data)-n) {
				break
			}
			if s.receive(t.Context(), bytes.Clone(data[n:n+int(size)]), time.Now()) != nil {
				break
			}
			data = data[n+int(size):]
		}
		s.close()
		if s.memory != 0 {
			t.Errorf("%d bytes left in the books", s.memory)
		}
		for _, r := range sink.results {
			if r.set != nil {
				split(t, whole(t, r))
			}
		}
	})
}

// FuzzParse holds the parsers in place against pglogrepl's: what one of ours takes, pglogrepl takes, with the same
// meaning.
func FuzzParse(f *testing.F) {
	f.Add(insert(0, 1, "1", "NULL", ""))
	f.Add(update(0, 1, "", "1", "UNCHANGED"))
	f.Add(update(0, 1, "0", "1"))
	f.Add(tupleData(append(binary.BigEndian.AppendUint32([]byte{'D'}, 1), 'O'), "1", "2"))
	f.Add(relationMessage(0, 1, "public", "t", "a", "b"))
	f.Add(messageOf(0, 1, "prefix", "content"))
	f.Fuzz(func(t *testing.T, body []byte) {
		if len(body) == 0 {
			return
		}
		var rc rowChange
		switch body[0] {
		case 'I', 'U', 'D':
			if rc.parse(body) != nil || len(rc.new)+len(rc.old) == 0 {
				return // pglogrepl refuses the rows of a table without columns
			}
			var old, fresh *pglogrepl.TupleData
			var oid uint32
			switch m := mustParse(t, body).(type) {
			case *pglogrepl.InsertMessage:
				oid, fresh = m.RelationID, m.Tuple
			case *pglogrepl.UpdateMessage:
				oid, old, fresh = m.RelationID, m.OldTuple, m.NewTuple
			case *pglogrepl.DeleteMessage:
				oid, old = m.RelationID, m.OldTuple
			}
			if oid != rc.oid || !sameTuple(old, rc.old) || !sameTuple(fresh, rc.new) {
				t.Errorf("%q: %+v", body, rc)
			}
		case 'R':
			r, err := parseRelation(body, nil)
			if err != nil {
				return
			}
			m := mustParse(t, body).(*pglogrepl.RelationMessage)
			var columns []string
			for _, c := range m.Columns {
				columns = append(columns, c.Name)
			}
			if m.RelationID != r.oid || m.RelationName != r.name || !slices.Equal(columns, r.columns) {
				t.Errorf("%q: %+v", body, r)
			}
		case 'M':
			l, err := parseLogical(body)
			if err != nil {
				return
			}
			m := mustParse(t, body).(*pglogrepl.LogicalDecodingMessage)
			if m.Prefix != string(l.prefix) || !bytes.Equal(m.Content, l.content) {
				t.Errorf("%q: %+v", body, l)
			}
		}
	})
}

func mustParse(t *testing.T, body []byte) pglogrepl.Message {
	m, err := pglogrepl.Parse(body)
	if err != nil {
		t.Fatalf("%q: pglogrepl says %v", body, err)
	}
	return m
}

func sameTuple(a *pglogrepl.TupleData, b []column) bool {
	if a == nil {
		return len(b) == 0
	}
	return slices.EqualFunc(a.Columns, b, func(x *pglogrepl.TupleDataColumn, y column) bool {
		return x.DataType == y.kind && bytes.Equal(x.Data, y.value)
	})
}

// BenchmarkSmall is the cost of one small transaction from its first message to its write set.
func BenchmarkSmall(b *testing.B) {
	identity := []pg.IndexColumn{{Name: "aid", Class: pg.ClassNumber}}
	catalog := tables{}
	for oid := range uint32(3) {
		name := fmt.Sprint("t", oid)
		catalog[oid] = &pg.Relation{OID: oid, Schema: "public", Name: name, RootSchema: "public", RootName: name, Identity: identity}
	}
	s, sink := testStream(b, catalog, Limits{})
	var script [][]byte
	for oid := range uint32(3) {
		script = append(script, start(10), relationMessage(10, oid, "public", fmt.Sprint("t", oid), "aid", "bid", "abalance", "filler"), stop(),
			start(10), update(10, oid, "", "12345", "1", "-4711", string(bytes.Repeat([]byte{' '}, 84))), stop())
	}
	script = append(script, start(10), seal(10, "1-a-1"), stop(), marker("1-a-1", 10), streamCommit(10))
	buffer := make([]byte, 0, 1024)
	b.ReportAllocs()
	for b.Loop() {
		for _, m := range script {
			buffer = append(buffer[:0], m...)
			if err := s.receive(b.Context(), buffer, time.Time{}); err != nil {
				b.Fatal(err)
			}
		}
		if len(sink.results) != 1 || sink.results[0].set == nil {
			b.Fatalf("%+v", sink.results)
		}
		sink.results = sink.results[:0]
	}
}

var _ io.Closer = (*parts)(nil)

// TestForgedDDL: any role may emit a message with the prefix of DDL; without the token it is not believed.
func TestForgedDDL(t *testing.T) {
	s, sink := testStream(t, tables{}, Limits{})
	s.token = "secret"
	feed(t, s, start(10),
		messageOf(10, 1, pg.PrefixDDL, `{"sql": "DROP TABLE t", "role": "postgres", "tables": []}`),
		messageOf(10, 1, pg.PrefixDDL, `{"sql": "CREATE TABLE u ()", "tables": [], "token": "secret"}`),
		stop(), start(10), seal(10, "1-a-1"), stop(), marker("1-a-1", 10))
	if n := len(split(t, sink.results[0].set.Changes)); n != 1 {
		t.Errorf("%d messages, want the one with the token", n)
	}
}
