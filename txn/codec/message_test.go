package codec_test

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

func TestMessagesRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := rapid.SliceOfN(rapid.SliceOfN(rapid.Byte(), 1, 300), 0, 10).Draw(t, "messages")
		var changes []byte
		for _, msg := range want {
			changes = codec.AppendMessage(changes, msg)
		}
		var got [][]byte
		for msg, err := range codec.Messages(changes) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, msg)
		}
		if len(got) != len(want) || len(got) > 0 && !reflect.DeepEqual(got, want) {
			t.Fatalf("got %x, want %x", got, want)
		}
	})
}

func TestMessagesMalformed(t *testing.T) {
	for name, changes := range map[string]string{
		"empty message":    "\x01I\x00",
		"beyond the end":   "\x01I\x02D",
		"length cut off":   "\x01I\x80",
		"length too large": "\x01I\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			var last error
			for msg, err := range codec.Messages([]byte(changes)) {
				if last != nil {
					t.Fatal("goes on after an error")
				}
				if last = err; err == nil {
					got = append(got, string(msg))
				}
			}
			if !errors.Is(last, txn.ErrCorrupt) || !reflect.DeepEqual(got, []string{"I"}) {
				t.Fatalf("got %q, error %v", got, last)
			}
		})
	}
}

func TestMessagesStops(t *testing.T) {
	n := 0
	for range codec.Messages([]byte("\x01I\x01I\x01I")) {
		if n++; n == 2 {
			break
		}
	}
	if n != 2 {
		t.Fatalf("%d messages", n)
	}
}

func TestMarkerRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := codec.Marker{
			GID:  gids().Draw(t, "gid"),
			XID:  txn.XID(uints().Draw(t, "xid")),
			Base: txn.CSN(uints().Draw(t, "base")),
			Seen: txn.CSN(uints().Draw(t, "seen")),
		}
		got, err := codec.ParseMarker([]byte(codec.FormatMarker(want)))
		if err != nil || got != want {
			t.Fatalf("got %v, error %v, want %v", got, err, want)
		}
	})
}

func TestFormatMarker(t *testing.T) {
	m := codec.Marker{GID: txn.GID{Node: 2, Incarnation: 0xab, Sequence: 42}, XID: 774, Base: 10, Seen: 12}
	if got, want := codec.FormatMarker(m), "2-ab-42 774 10 12"; got != want {
		t.Fatalf("got %q, want %q", got, want)
	}
}

func TestParseMarkerMalformed(t *testing.T) {
	for _, s := range []string{
		"", " ", "1-a-1", "1-a-1 1 1", "1-a-1 1 1 1 1", "1-a-1 1 1 1 ", " 1-a-1 1 1 1", "1-a-1  1 1 1", "1-a-1 01 1 1",
		"1-a-1 1 +1 1", "1-a-1 1 -1 1", "1-a-1 1 1 18446744073709551616", "1-a-1 1 1 99999999999999999999", "1-A-1 1 1 1",
		"4294967296-a-1 1 1 1", "1-a 1 1 1", "1-a-1\t1 1 1", strings.Repeat("1", 1<<16) + " 1 1 1",
	} {
		if m, err := codec.ParseMarker([]byte(s)); !errors.Is(err, txn.ErrCorrupt) || len(err.Error()) > 300 {
			t.Errorf("%.80q parsed as %v, error %v", s, m, err)
		}
	}
	if m, err := codec.ParseMarker([]byte("1-a-1 18446744073709551615 0 1")); err != nil || m.XID != 1<<64-1 {
		t.Errorf("highest number parsed as %v, error %v", m, err)
	}
}

func TestParseDDL(t *testing.T) {
	got, err := codec.ParseDDL([]byte(`{"sql":"CREATE TABLE \"t\"()","search_path":"public","role":"postgres",` +
		`"tag":"CREATE TABLE","tables":[["public","t"]],"settings":{"check_function_bodies":"off"}}`))
	want := codec.DDL{
		SQL: `CREATE TABLE "t"()`, SearchPath: "public", Role: "postgres", Tag: "CREATE TABLE",
		Tables: [][2]string{{"public", "t"}}, Settings: map[string]string{"check_function_bodies": "off"},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("got %+v, error %v", got, err)
	}
	if got, err := codec.ParseDDL([]byte(`{"sql":"x","tables":null,"settings":null}` + "\n")); err != nil || got.SQL != "x" {
		t.Fatalf("got %+v, error %v", got, err)
	}
}

func TestParseDDLMalformed(t *testing.T) {
	for _, s := range []string{
		``, `null`, `[]`, `{}`, `{"sql":""}`, `{"sql":"x"`, `{"sql":"x"} {"sql":"y"}`, `{"sql":"x"}}`, `{"sql":1}`, "{\"sql\":\"\xff\"}",
		`{"sql":"x","new":1}`, `{"sql":"x","tables":[["a"]]}`, `{"sql":"x","tables":[["a","b","c"]]}`,
		`{"sql":"x","tables":[["a",""]]}`, `{"sql":"x","tables":[null]}`, `{"sql":"x","settings":{"a":1}}`,
	} {
		if d, err := codec.ParseDDL([]byte(s)); !errors.Is(err, txn.ErrCorrupt) {
			t.Errorf("%q parsed as %+v, error %v", s, d, err)
		}
	}
}

func FuzzMessages(f *testing.F) {
	f.Add(sample()[0].Changes)
	f.Add([]byte("\x01I\x80\x00"))
	f.Fuzz(func(t *testing.T, changes []byte) {
		var back []byte
		for msg, err := range codec.Messages(changes) {
			if err != nil {
				if !errors.Is(err, txn.ErrCorrupt) || msg != nil {
					t.Fatalf("message %x with error %v", msg, err)
				}
				return
			}
			if len(msg) == 0 {
				t.Fatal("empty message")
			}
			back = codec.AppendMessage(back, msg)
		}
		if len(back) > len(changes) { // shorter where a length was not in its shortest form
			t.Fatalf("%d bytes became %d", len(changes), len(back))
		}
	})
}

func FuzzParseMarker(f *testing.F) {
	f.Add([]byte("2-9f86d081884c7d65-42 774 10 12"))
	f.Add([]byte("2-9f86d081884c7d65-42 774 10 012"))
	f.Fuzz(func(t *testing.T, content []byte) {
		m, err := codec.ParseMarker(content)
		if err != nil {
			if !errors.Is(err, txn.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if got := codec.FormatMarker(m); got != string(content) {
			t.Fatalf("%q accepted, is written as %q", content, got)
		}
	})
}

func FuzzParseDDL(f *testing.F) {
	f.Add([]byte(`{"sql":"CREATE TABLE t()","search_path":"public","role":"r","tag":"CREATE TABLE","tables":[["a","b"]],"settings":{"a":"b"}}`))
	f.Add([]byte(`{"sql":"x","tables":[[]]}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		d, err := codec.ParseDDL(content)
		if err != nil {
			if !errors.Is(err, txn.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if d.SQL == "" {
			t.Fatal("no statement")
		}
	})
}
