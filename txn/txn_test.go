package txn_test

import (
	"encoding/hex"
	"errors"
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/quorate/quorate/txn"
)

func TestGIDRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := txn.GID{
			Node:        txn.NodeID(rapid.Uint32().Draw(t, "node")),
			Incarnation: rapid.Uint64().Draw(t, "incarnation"),
			Sequence:    rapid.Uint64().Draw(t, "sequence"),
		}
		got, err := txn.ParseGID(want.String())
		if err != nil || got != want {
			t.Fatalf("%v became %v, error %v", want, got, err)
		}
	})
}

func TestGIDText(t *testing.T) {
	for g, want := range map[txn.GID]string{
		{}: "0-0-0",
		{Node: 2, Incarnation: 0x9f86d081884c7d65, Sequence: 42}:                      "2-9f86d081884c7d65-42",
		{Node: math.MaxUint32, Incarnation: math.MaxUint64, Sequence: math.MaxUint64}: "4294967295-ffffffffffffffff-18446744073709551615",
	} {
		if got := g.String(); got != want {
			t.Errorf("%#v is written as %q, want %q", g, got, want)
		}
		if g.IsZero() != (want == "0-0-0") {
			t.Errorf("%q: IsZero is %v", want, g.IsZero())
		}
	}
}

func TestParseGIDRefuses(t *testing.T) {
	for _, s := range []string{
		"", "-", "--", "1", "1-2", "1-2-", "-2-3", "1--3", "1-2-3-4", " 1-2-3", "1-2-3 ", "01-2-3", "1-02-3", "1-2-03", "1-A-3",
		"+1-2-3", "1-0x2-3", "1-2-3a", "1-g-3", "4294967296-2-3", "1-10000000000000000-3", "1-2-18446744073709551616", "1_0-2-3",
	} {
		if g, err := txn.ParseGID(s); !errors.Is(err, txn.ErrBadGID) || !g.IsZero() {
			t.Errorf("%q gave %v, error %v", s, g, err)
		}
	}
}

func FuzzParseGID(f *testing.F) {
	f.Add("2-9f86d081884c7d65-42")
	f.Add("0-0-0")
	f.Add("1-02-3")
	f.Fuzz(func(t *testing.T, s string) {
		g, err := txn.ParseGID(s)
		if err != nil {
			if !errors.Is(err, txn.ErrBadGID) {
				t.Fatal(err)
			}
			return
		}
		if g.String() != s {
			t.Fatalf("%q accepted, is written as %q", s, g)
		}
	})
}

func TestLSNText(t *testing.T) {
	for lsn, want := range map[txn.LSN]string{0: "0/0", 0x16B3748: "0/16B3748", 0xA_0000_00FF: "A/FF"} {
		if got := lsn.String(); got != want {
			t.Errorf("LSN %d is written as %q, want %q", uint64(lsn), got, want)
		}
	}
}

func modes() []txn.Mode {
	var all []txn.Mode
	for m := txn.ModeWrite; m.Valid(); m++ {
		all = append(all, m)
	}
	return all
}

// The table of DESIGN section 3. The unique keys of constraints that are checked at once and of those that are not
// (U, UD) are one mode there.
func TestConflicts(t *testing.T) {
	design := map[string]string{
		"W":  "W X",
		"X":  "W X U UD R IX",
		"U":  "U UD X",
		"UD": "U UD X",
		"R":  "X",
		"IX": "X",
	}
	for _, a := range modes() {
		for _, b := range modes() {
			want := strings.Contains(" "+design[a.String()]+" ", " "+b.String()+" ")
			if got := txn.Conflicts(a, b); got != want {
				t.Errorf("conflict of %v with %v: %v, want %v", a, b, got, want)
			}
			if txn.Conflicts(a, b) != txn.Conflicts(b, a) || txn.SinceBase(a, b) != txn.SinceBase(b, a) {
				t.Errorf("%v and %v: not symmetric", a, b)
			}
			sinceBase := a == txn.ModeUniqueDeferred || b == txn.ModeUniqueDeferred ||
				a == txn.ModeReference && b == txn.ModeExclusive || a == txn.ModeExclusive && b == txn.ModeReference
			if got := txn.SinceBase(a, b); got != sinceBase {
				t.Errorf("%v and %v since base: %v, want %v", a, b, got, sinceBase)
			}
		}
	}
	if len(modes()) != len(design) {
		t.Errorf("%d modes, the design has %d", len(modes()), len(design))
	}
}

// The numbers are in the log.
func TestModeNumbers(t *testing.T) {
	for m, want := range map[txn.Mode]uint8{
		txn.ModeWrite: 1, txn.ModeExclusive: 2, txn.ModeUnique: 3, txn.ModeUniqueDeferred: 4, txn.ModeReference: 5, txn.ModeIntent: 6,
	} {
		if uint8(m) != want {
			t.Errorf("mode %v has number %d, had %d", m, m, want)
		}
	}
	for _, m := range []txn.Mode{0, txn.NumModes, 255} {
		if m.Valid() || m.String() != "invalid" {
			t.Errorf("mode %d is valid or has the name %v", uint8(m), m)
		}
	}
}

// The numbers are in the log and in snapshots, the names on dashboards.
func TestAbortReasons(t *testing.T) {
	want := map[txn.AbortReason]string{
		0: "none", 1: "conflict", 2: "horizon", 3: "duplicate", 4: "requested", 5: "evicted", 6: "no_quorum", 7: "capture", 8: "invalid",
		9:   "behind",
		255: "unknown",
	}
	for r, name := range want {
		if r.String() != name {
			t.Errorf("reason %d has the name %q, want %q", uint8(r), r, name)
		}
	}
	for r, number := range map[txn.AbortReason]uint8{
		txn.AbortNone: 0, txn.AbortConflict: 1, txn.AbortHorizon: 2, txn.AbortDuplicate: 3, txn.AbortRequested: 4,
		txn.AbortEvicted: 5, txn.AbortNoQuorum: 6, txn.AbortCapture: 7, txn.AbortInvalid: 8, txn.AbortBehind: 9,
	} {
		if uint8(r) != number {
			t.Errorf("reason %v has number %d, had %d", r, uint8(r), number)
		}
	}
	if !(txn.Verdict{CSN: 1}).Commits() || (txn.Verdict{Reason: txn.AbortConflict}).Commits() {
		t.Error("verdicts")
	}
}

func TestEmpty(t *testing.T) {
	for name, tt := range map[string]struct {
		w    txn.WriteSet
		want bool
	}{
		"nothing":      {txn.WriteSet{}, true},
		"keys only":    {txn.WriteSet{Keys: make([]txn.KeyUse, 1)}, true},
		"changes":      {txn.WriteSet{Changes: []byte{1}}, false},
		"chunks ahead": {txn.WriteSet{Chunks: 1}, false},
	} {
		if got := tt.w.Empty(); got != tt.want {
			t.Errorf("%s: empty is %v", name, got)
		}
	}
}

// part is one part of what is hashed; nil is Null.
type part []byte

func hash(h *txn.Hasher, parts []part) txn.Key {
	for i, p := range parts {
		switch {
		case p == nil:
			h.Null()
		case i%2 == 0:
			h.Bytes(p)
		default:
			h.String(string(p))
		}
	}
	return h.Key()
}

// Different lists of parts have different keys, however the bytes are divided among the parts.
func TestHasherFraming(t *testing.T) {
	lists := [][]part{
		{}, {nil}, {{}}, {{}, {}}, {nil, {}}, {{}, nil}, {nil, nil},
		{part("a")}, {part("ab")}, {part("a"), part("b")}, {part("ab"), {}}, {{}, part("ab")}, {part("b"), part("a")},
		{part("ab"), part("c")}, {part("a"), part("bc")}, {part("abc")},
		{part("\x00\x00\x00\x01a")}, {part("\xff\xff\xff\xff")}, {part("a"), nil}, {nil, part("a")}, {part("a\x00\x00\x00\x00")},
	}
	seen := map[txn.Key]int{}
	for i, list := range lists {
		k := hash(txn.NewHasher(), list)
		if j, ok := seen[k]; ok {
			t.Errorf("%q and %q have one key", lists[j], list)
		}
		seen[k] = i
	}
	rapid.Check(t, func(t *rapid.T) {
		// Few values and short parts, so that lists with the same bytes in a row are likely.
		list := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) part {
			if rapid.IntRange(0, 5).Draw(t, "null") == 0 {
				return nil
			}
			return part(rapid.SliceOfN(rapid.SampledFrom([]byte{0, 1, 255}), 0, 5).Draw(t, "bytes"))
		}), 0, 4)
		a, b := list.Draw(t, "a"), list.Draw(t, "b")
		equal := len(a) == len(b)
		for i := 0; equal && i < len(a); i++ {
			equal = (a[i] == nil) == (b[i] == nil) && string(a[i]) == string(b[i])
		}
		if same := hash(txn.NewHasher(), a) == hash(txn.NewHasher(), b); same != equal {
			t.Fatalf("%q and %q: same key %v", a, b, same)
		}
	})
}

// Keys are in the log and in snapshots, so what they are computed from must not change; and a hasher can be used again.
func TestHasherIsStable(t *testing.T) {
	h := txn.NewHasher()
	h.String("left over")
	h.Reset()
	h.String("postgres")
	h.Bytes([]byte("public.accounts"))
	h.Null()
	first := h.Key()
	if again := h.Key(); again != first {
		t.Errorf("second look at the key: %x, then %x", first, again)
	}
	h.Reset()
	if empty := h.Key(); empty != txn.NewHasher().Key() {
		t.Errorf("key after Reset is %x", empty)
	}
	const want = "d3512b9be86b4bda0dd494dbedd1f8fc"
	if got := hex.EncodeToString(first[:]); got != want {
		t.Errorf("key is %s, was %s", got, want)
	}
}
