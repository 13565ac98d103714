package certify_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"pgregory.net/rapid"

	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/certify"
)

func snapshot(t interface{ Fatalf(string, ...any) }, c *certify.Certifier) []byte {
	var b bytes.Buffer
	n, err := c.Snapshot().WriteTo(&b)
	if err != nil || n != int64(b.Len()) {
		t.Fatalf("write snapshot: %d of %d bytes, error %v", n, b.Len(), err)
	}
	return b.Bytes()
}

func restore(t interface{ Fatalf(string, ...any) }, b []byte, window txn.CSN) *certify.Certifier {
	c := certify.New(certify.Config{})
	c.SetWindow(window)
	if err := c.Restore(bytes.NewReader(b)); err != nil {
		t.Fatalf("restore: %v", err)
	}
	return c
}

// history draws transactions over few keys, with windows that end anywhere, and now and then something wrong.
type history struct {
	sequence uint64
	gids     []txn.GID
}

func (h *history) draw(t *rapid.T, last, horizon txn.CSN) *txn.WriteSet {
	h.sequence++
	w := &txn.WriteSet{GID: txn.GID{Node: txn.NodeID(rapid.IntRange(1, 3).Draw(t, "node")), Incarnation: 7, Sequence: h.sequence}}
	lag := func(name string, from txn.CSN) txn.CSN {
		return from - txn.CSN(rapid.OneOf(rapid.Uint64Range(0, min(3, uint64(from))), rapid.Uint64Range(0, uint64(from))).Draw(t, name))
	}
	w.Seen = lag("seen", last)
	w.Base = lag("base", w.Seen)
	switch rapid.IntRange(0, 30).Draw(t, "oddity") {
	case 0:
		w.Seen = last + 1
	case 1:
		w.Base = w.Seen + 1
	case 2:
		w.GID = txn.GID{}
	case 3, 4:
		if len(h.gids) > 0 {
			w.GID = rapid.SampledFrom(h.gids).Draw(t, "again")
		}
	case 5, 6, 7:
		w.Seen = max(w.Seen, min(horizon, last)) // about the horizon
		w.Base = min(w.Base, w.Seen)
	}
	for range rapid.IntRange(0, 4).Draw(t, "keys") {
		k := txn.KeyUse{Mode: txn.Mode(rapid.IntRange(1, txn.NumModes-1).Draw(t, "mode"))}
		k.Key[0] = byte(rapid.IntRange(0, 12).Draw(t, "key"))
		w.Keys = append(w.Keys, k)
	}
	if rapid.IntRange(0, 100).Draw(t, "bad mode") == 0 {
		w.Keys = append(w.Keys, txn.KeyUse{Mode: rapid.SampledFrom([]txn.Mode{0, txn.NumModes, 255}).Draw(t, "mode")})
	}
	if !w.GID.IsZero() {
		h.gids = append(h.gids, w.GID)
	}
	return w
}

// The certifier agrees with the reference in every verdict, and a certifier that is restored from a snapshot every
// now and then agrees with one that never is, byte for byte.
func TestAgreesWithReference(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := certify.Config{
			MaxKeys:     rapid.SampledFrom([]int{1, 3, 8, 1000}).Draw(t, "max keys"),
			MaxOutcomes: rapid.SampledFrom([]int{1, 5, 20, 1000}).Draw(t, "max outcomes"),
		}
		window := txn.CSN(rapid.SampledFrom([]uint64{2, 10, 1 << 30}).Draw(t, "window"))
		ref := &reference{cfg: cfg, window: window}
		c := certify.New(cfg)
		c.SetWindow(window)
		twin := certify.New(cfg)
		twin.SetWindow(window)
		var kept *certify.Snapshot // of c, and what it must still hold at the end
		var keptBytes []byte
		var h history
		steps := rapid.IntRange(1, 300).Draw(t, "steps")
		for range steps {
			switch rapid.IntRange(0, 19).Draw(t, "step") {
			case 0:
				horizon := txn.CSN(rapid.Uint64Range(0, uint64(ref.last())+2).Draw(t, "horizon"))
				ref.advance(horizon)
				c.Advance(horizon)
				twin.Advance(horizon)
			case 1:
				gid := txn.GID{Node: 1, Incarnation: 7, Sequence: h.sequence + uint64(rapid.IntRange(0, 3).Draw(t, "ahead"))}
				if len(h.gids) > 0 && rapid.Bool().Draw(t, "abort of something old") {
					gid = rapid.SampledFrom(h.gids).Draw(t, "gid")
				}
				want, got := ref.abort(gid), c.Abort(gid)
				twin.Abort(gid)
				if got != want {
					t.Fatalf("abort %v: %+v, want %+v", gid, got, want)
				}
			case 2:
				before := snapshot(t, twin)
				twin = restore(t, before, window)
				kept, keptBytes = c.Snapshot(), before
				if after := snapshot(t, twin); !bytes.Equal(before, after) {
					t.Fatalf("snapshot of a restored certifier differs:\n%x\n%x", before, after)
				}
			default:
				w := h.draw(t, ref.last(), ref.horizon)
				want, got, other := ref.decide(w), c.Decide(w), twin.Decide(w)
				if got != want || other != want {
					t.Fatalf("decide %+v: %+v, restored %+v, want %+v", w, got, other, want)
				}
			}
			if c.LastCSN() != ref.last() || c.Horizon() != ref.horizon {
				t.Fatalf("last %d, horizon %d, want %d and %d", c.LastCSN(), c.Horizon(), ref.last(), ref.horizon)
			}
			if c.Digest() != twin.Digest() {
				t.Fatalf("digest %x, restored %x", c.Digest(), twin.Digest())
			}
			if c.Keys() > cfg.MaxKeys {
				t.Fatalf("%d keys, more than %d", c.Keys(), cfg.MaxKeys)
			}
		}
		for _, gid := range h.gids {
			want, wantKnown := ref.outcome(gid)
			got, known := c.Outcome(gid)
			if got != want || known != wantKnown {
				t.Fatalf("outcome of %v: %+v %v, want %+v %v", gid, got, known, want, wantKnown)
			}
		}
		if kept != nil {
			var b bytes.Buffer
			if _, err := kept.WriteTo(&b); err != nil || !bytes.Equal(b.Bytes(), keptBytes) {
				t.Fatalf("a snapshot has changed, error %v", err)
			}
		}
		if a, b := snapshot(t, c), snapshot(t, twin); !bytes.Equal(a, b) {
			t.Fatalf("snapshots differ:\n%x\n%x", a, b)
		}
	})
}

// For windows that begin at or above the horizon it makes no difference whether anything was pruned.
func TestPruningDecidesNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pruned, whole := certify.New(certify.Config{}), certify.New(certify.Config{})
		var h history
		for range rapid.IntRange(1, 150).Draw(t, "steps") {
			if rapid.IntRange(0, 9).Draw(t, "step") == 0 {
				pruned.Advance(txn.CSN(rapid.Uint64Range(0, uint64(pruned.LastCSN())).Draw(t, "horizon")))
				continue
			}
			w := h.draw(t, pruned.LastCSN(), pruned.Horizon())
			w.Base = max(w.Base, pruned.Horizon())
			w.Seen = max(w.Seen, w.Base)
			w.GID = txn.GID{Node: 1, Sequence: h.sequence}
			if a, b := pruned.Decide(w), whole.Decide(w); a != b {
				t.Fatalf("decide %+v with horizon %d: %+v, with horizon 0: %+v", w, pruned.Horizon(), a, b)
			}
		}
	})
}

func use(mode txn.Mode, name string) txn.KeyUse {
	h := txn.NewHasher()
	h.String(name)
	return txn.KeyUse{Key: h.Key(), Mode: mode}
}

func gid(n int) txn.GID { return txn.GID{Node: 1, Incarnation: 1, Sequence: uint64(n)} }

// Pruning keeps up although each Decide does little of it.
func TestPruningKeepsUp(t *testing.T) {
	c := certify.New(certify.Config{})
	var key txn.Key
	for n := range 20_000 {
		w := &txn.WriteSet{GID: gid(n + 1), Base: c.LastCSN(), Seen: c.LastCSN()}
		for range 3 {
			binary.BigEndian.PutUint64(key[:], binary.BigEndian.Uint64(key[:])+1)
			w.Keys = append(w.Keys, txn.KeyUse{Key: key, Mode: txn.ModeWrite})
		}
		if v := c.Decide(w); !v.Commits() {
			t.Fatalf("transaction %d: %+v", n, v)
		}
		if n%1000 == 999 {
			c.Advance(c.LastCSN() - 100)
		}
	}
	if c.Keys() > 3*1200 {
		t.Fatalf("%d keys are left", c.Keys())
	}
	// All of this time the table has reused its memory, and the index its slots: keys above the horizon are found.
	w := &txn.WriteSet{GID: gid(1 << 20), Base: c.LastCSN() - 1, Seen: c.LastCSN() - 1, Keys: []txn.KeyUse{{Key: key, Mode: txn.ModeWrite}}}
	if v := c.Decide(w); v.Reason != txn.AbortConflict || v.With != c.LastCSN() {
		t.Fatalf("verdict %+v", v)
	}
}

// A transaction with more keys than fit moves the horizon to itself; who has seen it goes on.
func TestTransactionLargerThanMemory(t *testing.T) {
	c := certify.New(certify.Config{MaxKeys: 10})
	w := &txn.WriteSet{GID: gid(1)}
	for n := range 50 {
		w.Keys = append(w.Keys, txn.KeyUse{Key: txn.Key{byte(n)}, Mode: txn.ModeWrite})
	}
	if v := c.Decide(w); v.CSN != 1 || c.Horizon() != 1 || c.Keys() > 10 {
		t.Fatalf("verdict %+v, horizon %d, %d keys", v, c.Horizon(), c.Keys())
	}
	if v := c.Decide(&txn.WriteSet{GID: gid(2)}); v.Reason != txn.AbortHorizon {
		t.Fatalf("below the horizon: %+v", v)
	}
	if v := c.Decide(&txn.WriteSet{GID: gid(3), Base: 1, Seen: 1, Keys: w.Keys}); v.CSN != 2 {
		t.Fatalf("at the horizon: %+v", v)
	}
}

// Abort requests since the last commit are the only thing that may exceed MaxOutcomes: a transaction whose client was
// told that it is aborted must not commit.
func TestAbortRequestsAreNotForgotten(t *testing.T) {
	c := certify.New(certify.Config{MaxOutcomes: 4})
	for n := range 100 {
		c.Abort(gid(n + 1))
	}
	for n := range 100 {
		if v := c.Decide(&txn.WriteSet{GID: gid(n + 1)}); v.Reason != txn.AbortRequested {
			t.Fatalf("transaction %d: %+v", n, v)
		}
	}
	for n := range 5 {
		if v := c.Decide(&txn.WriteSet{GID: gid(1000 + n), Base: c.LastCSN(), Seen: c.LastCSN()}); !v.Commits() {
			t.Fatalf("commit: %+v", v)
		}
	}
	if v := c.Decide(&txn.WriteSet{GID: gid(1)}); v.Reason != txn.AbortHorizon {
		t.Fatalf("after the request was forgotten: %+v", v)
	}
}

func TestDigestTellsHistoriesApart(t *testing.T) {
	run := func(change func(*certify.Certifier, *txn.WriteSet)) uint64 {
		c := certify.New(certify.Config{})
		w := &txn.WriteSet{GID: gid(1), Keys: []txn.KeyUse{use(txn.ModeWrite, "a")}}
		change(c, w)
		c.Decide(w)
		c.Decide(&txn.WriteSet{GID: gid(2), Keys: []txn.KeyUse{use(txn.ModeWrite, "a")}})
		return c.Digest()
	}
	seen := map[uint64]string{}
	for name, change := range map[string]func(*certify.Certifier, *txn.WriteSet){
		"plain":     func(*certify.Certifier, *txn.WriteSet) {},
		"other GID": func(_ *certify.Certifier, w *txn.WriteSet) { w.GID.Sequence = 3 },
		"no key":    func(_ *certify.Certifier, w *txn.WriteSet) { w.Keys = nil },
		"other key": func(_ *certify.Certifier, w *txn.WriteSet) { w.Keys[0] = use(txn.ModeWrite, "b") },
		"abort":     func(c *certify.Certifier, w *txn.WriteSet) { c.Abort(w.GID) },
	} {
		d := run(change)
		if d != run(change) {
			t.Errorf("%s: two digests of one history", name)
		}
		if other := seen[d]; other != "" && name != "no key" && name != "other key" {
			t.Errorf("%s and %s have one digest", name, other)
		}
		seen[d] = name
	}
}

// A snapshot is a copy: what the certifier decides while it is being written does not get into it.
func TestSnapshotIsIndependent(t *testing.T) {
	c := certify.New(certify.Config{MaxKeys: 5000, MaxOutcomes: 3000})
	rng := rand.New(rand.NewPCG(1, 2))
	decide := func(n int) {
		w := &txn.WriteSet{GID: gid(n + 1), Base: c.LastCSN(), Seen: c.LastCSN()}
		for range 3 {
			w.Keys = append(w.Keys, txn.KeyUse{Key: txn.Key{byte(rng.Uint32()), byte(rng.Uint32N(64))}, Mode: txn.Mode(1 + rng.Uint32N(6))})
		}
		c.Decide(w)
	}
	for n := range 4000 {
		decide(n)
	}
	want := snapshot(t, c)
	s := c.Snapshot()
	var got bytes.Buffer
	done := make(chan error)
	go func() {
		_, err := s.WriteTo(&got)
		done <- err
	}()
	for n := range 2000 {
		decide(4000 + n)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), want) {
		t.Fatal("the snapshot has changed")
	}
}

func TestRestoreRefusesDamage(t *testing.T) {
	c := certify.New(certify.Config{})
	for n := range 20 {
		c.Decide(&txn.WriteSet{GID: gid(n + 1), Base: c.LastCSN(), Seen: c.LastCSN(), Keys: []txn.KeyUse{use(txn.ModeWrite, "a")}})
	}
	c.Decide(&txn.WriteSet{GID: gid(100), Keys: []txn.KeyUse{use(txn.ModeExclusive, "a")}})
	good := snapshot(t, c)
	into := certify.New(certify.Config{})
	into.Decide(&txn.WriteSet{GID: gid(1)})
	before := snapshot(t, into)
	for n := range good {
		if err := into.Restore(bytes.NewReader(good[:n])); !errors.Is(err, txn.ErrCorrupt) {
			t.Fatalf("restore of %d of %d bytes: %v", n, len(good), err)
		}
		bad := bytes.Clone(good)
		bad[n] ^= 0x10
		if err := into.Restore(bytes.NewReader(bad)); !errors.Is(err, txn.ErrCorrupt) {
			t.Fatalf("restore with byte %d changed: %v", n, err)
		}
	}
	broken := errors.New("broken disk")
	if err := into.Restore(iotest.ErrReader(broken)); !errors.Is(err, broken) || errors.Is(err, txn.ErrCorrupt) {
		t.Fatalf("restore from a broken reader: %v", err)
	}
	if !bytes.Equal(before, snapshot(t, into)) {
		t.Fatal("a failed restore left traces")
	}
	if err := into.Restore(bytes.NewReader(good)); err != nil || !bytes.Equal(good, snapshot(t, into)) {
		t.Fatalf("restore: %v", err)
	}
}

func TestWriteErrorIsReported(t *testing.T) {
	broken := errors.New("broken disk")
	if _, err := certify.New(certify.Config{}).Snapshot().WriteTo(brokenWriter{broken}); !errors.Is(err, broken) {
		t.Fatalf("error %v", err)
	}
}

type brokenWriter struct{ err error }

func (w brokenWriter) Write([]byte) (int, error) { return 0, w.err }

// Whatever Restore accepts is what WriteTo would have written, and can be worked with.
func FuzzRestore(f *testing.F) {
	const sum = 4
	c := certify.New(certify.Config{MaxKeys: 50, MaxOutcomes: 30})
	f.Add(snapshot(f, c))
	for n := range 40 {
		seen := c.LastCSN() - min(c.LastCSN(), txn.CSN(n%3))
		c.Decide(&txn.WriteSet{GID: gid(n + 1), Base: seen, Seen: seen, Keys: []txn.KeyUse{
			use(txn.Mode(1+n%6), strings.Repeat("k", n%7)), use(txn.ModeIntent, "table"),
		}})
	}
	c.Abort(gid(500))
	f.Add(snapshot(f, c))
	c.Advance(c.LastCSN() - 3)
	f.Add(snapshot(f, c))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < sum {
			return
		}
		body := b[:len(b)-sum]
		whole := binary.LittleEndian.AppendUint32(bytes.Clone(body), crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
		c := certify.New(certify.Config{})
		if err := c.Restore(bytes.NewReader(whole)); err != nil {
			if !errors.Is(err, txn.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if again := snapshot(t, c); !bytes.HasPrefix(whole, again) {
			t.Fatalf("restored from %x, written as %x", whole, again)
		}
		c.Decide(&txn.WriteSet{GID: txn.GID{Node: 9, Sequence: 9}, Base: c.LastCSN(), Seen: c.LastCSN(), Keys: []txn.KeyUse{
			use(txn.ModeWrite, "a"), use(txn.ModeExclusive, "b"),
		}})
	})
}

func BenchmarkDecide(b *testing.B) {
	for _, bench := range []struct {
		name string
		rows uint64
	}{{"rows=1000", 1000}, {"rows=100000", 100_000}, {"rows=10000000", 10_000_000}} {
		b.Run(bench.name, func(b *testing.B) {
			c := certify.New(certify.Config{})
			rng := rand.New(rand.NewPCG(1, 2))
			w := &txn.WriteSet{Keys: make([]txn.KeyUse, 5)}
			next := func() {
				w.GID = gid(int(w.GID.Sequence + 1))
				w.Seen = c.LastCSN() - min(c.LastCSN(), 10)
				w.Base = w.Seen
				for i := range w.Keys {
					row := rng.Uint64N(bench.rows)
					w.Keys[i].Mode = txn.ModeWrite
					binary.LittleEndian.PutUint64(w.Keys[i].Key[:8], row*0x9e3779b97f4a7c15)
				}
				w.Keys[4] = txn.KeyUse{Key: txn.Key{1, 2, 3}, Mode: txn.ModeIntent}
			}
			for range 300_000 {
				next()
				c.Decide(w)
			}
			b.ReportAllocs()
			for b.Loop() {
				next()
				c.Decide(w)
			}
			b.ReportMetric(float64(c.Keys()), "keys")
		})
	}
}

func BenchmarkSnapshot(b *testing.B) {
	c := certify.New(certify.Config{})
	var key txn.Key
	for n := range certify.DefaultMaxKeys / 4 {
		w := &txn.WriteSet{GID: gid(n + 1), Base: c.LastCSN(), Seen: c.LastCSN()}
		for range 4 {
			binary.BigEndian.PutUint64(key[:], binary.BigEndian.Uint64(key[:])+1)
			w.Keys = append(w.Keys, txn.KeyUse{Key: key, Mode: txn.ModeWrite})
		}
		c.Decide(w)
	}
	b.Run("copy", func(b *testing.B) {
		for b.Loop() {
			c.Snapshot()
		}
	})
	var out bytes.Buffer
	b.Run("write", func(b *testing.B) {
		for b.Loop() {
			out.Reset()
			if _, err := c.Snapshot().WriteTo(&out); err != nil {
				b.Fatal(err)
			}
		}
		b.SetBytes(int64(out.Len()))
	})
	b.Run("restore", func(b *testing.B) {
		for b.Loop() {
			if err := c.Restore(bytes.NewReader(out.Bytes())); err != nil {
				b.Fatal(err)
			}
		}
	})
}
