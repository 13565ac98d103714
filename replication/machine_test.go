package replication

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// recorder keeps what a machine says.
type recorder struct {
	*Machine
	decisions []Decision
	processed txn.LogIndex
	failure   error
	index     txn.LogIndex
	changes   []Change
	announced []txn.NodeID
	barriers  []string // with what had been delivered and processed by then
}

func newRecorder() *recorder {
	r := &recorder{}
	r.Machine = New(Config{
		Deliver:   func(d []Decision) { r.decisions = append(r.decisions, d...) },
		Processed: func(i txn.LogIndex) { r.processed = i },
		Durable:   func(txn.CSN) error { return nil },
		Member:    func(m codec.Member) { r.announced = append(r.announced, m.Node) },
		Changed:   func(c Change) { r.changes = append(r.changes, c) },
		Barrier: func(b codec.Barrier, i txn.LogIndex) {
			r.barriers = append(r.barriers, fmt.Sprint(b.ID, i, len(r.decisions), r.processed))
		},
		Fail: func(err error) { r.failure = err },
	})
	r.outcomes.keep = 20
	return r
}

// image is a snapshot as bytes.
func image(t interface{ Fatal(...any) }, m *Machine) *bytes.Buffer {
	s, err := m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := s.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return &b
}

func (r *recorder) entry(data []byte) {
	r.index++
	r.Apply(r.index, data)
}

func (r *recorder) last() Decision { return r.decisions[len(r.decisions)-1] }

func gid(node, sequence int) txn.GID {
	return txn.GID{Node: txn.NodeID(node), Incarnation: 1, Sequence: uint64(sequence)}
}

func key(n int) (k txn.Key) { k[0] = byte(n); return k }

func set(g txn.GID, seen txn.CSN, keys ...int) *txn.WriteSet {
	w := &txn.WriteSet{GID: g, Database: "postgres", Base: seen, Seen: seen, Changes: []byte{1, 'I'}, Rows: 1}
	for _, k := range keys {
		w.Keys = append(w.Keys, txn.KeyUse{Key: key(k), Mode: txn.ModeWrite})
	}
	return w
}

func transactions(sets ...*txn.WriteSet) []byte { return codec.AppendTransactions(nil, sets) }

func chunk(g txn.GID, part uint32) []byte {
	return codec.AppendChunk(nil, &codec.Chunk{GID: g, Part: part, Data: []byte{1, 'I'}})
}

func TestBarrier(t *testing.T) {
	r := newRecorder()
	r.entry(transactions(set(gid(1, 1), 0, 7)))
	r.entry(codec.AppendBarrier(nil, codec.Barrier{ID: gid(2, 5), Purpose: "test"}))
	r.entry(transactions(set(gid(1, 2), 1, 7)))
	if want := []string{fmt.Sprint(gid(2, 5), txn.LogIndex(2), 1, txn.LogIndex(1))}; !slices.Equal(r.barriers, want) || r.processed != 3 {
		t.Errorf("barriers %q, want %q; processed %d", r.barriers, want, r.processed)
	}
}

func TestFirstCommitterWinsWithinAndAcrossEntries(t *testing.T) {
	r := newRecorder()
	r.entry(transactions(set(gid(1, 1), 0, 7), set(gid(1, 2), 0, 7), set(gid(1, 3), 0, 8)))
	r.entry(transactions(set(gid(2, 1), 0, 7), set(gid(2, 2), 1, 7)))
	var got []string
	for _, d := range r.decisions {
		got = append(got, fmt.Sprint(d.Index, d.Verdict.CSN, d.Verdict.Reason))
	}
	want := []string{"1 1 none", "1 0 conflict", "1 2 none", "2 0 conflict", "2 3 none"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if r.processed != 2 || r.LastCSN() != 3 {
		t.Errorf("processed %d, last CSN %d", r.processed, r.LastCSN())
	}
}

func TestChunks(t *testing.T) {
	r := newRecorder()
	whole := set(gid(1, 1), 0, 1)
	whole.Chunks = 2
	r.entry(chunk(whole.GID, 0))
	r.entry(chunk(whole.GID, 0)) // proposed twice
	r.entry(chunk(whole.GID, 1))
	if s, err := r.Snapshot(); err != nil || s.Needs() != 1 {
		t.Errorf("snapshot over open chunks: needs the log from %d on, %v", s.Needs(), err)
	}
	r.entry(transactions(whole))
	if d := r.last(); !d.Verdict.Commits() || !slices.Equal(d.Chunks, []txn.LogIndex{1, 3}) {
		t.Errorf("%+v", d)
	}

	torn := set(gid(1, 2), 1, 2)
	torn.Chunks = 2
	r.entry(chunk(torn.GID, 0))
	r.entry(codec.AppendMember(nil, &codec.Member{Node: 1, Incarnation: 2})) // the origin started anew
	r.entry(transactions(torn))
	if d := r.last(); d.Verdict.Reason != txn.AbortRequested {
		t.Errorf("a write set without its chunks: %+v", d.Verdict)
	}

	aborted := set(gid(2, 3), 1, 3)
	aborted.Chunks = 1
	r.entry(chunk(aborted.GID, 0))
	r.entry(codec.AppendAbort(nil, codec.Abort{GID: aborted.GID, Reason: txn.AbortRequested}))
	r.entry(chunk(aborted.GID, 0)) // late
	r.entry(transactions(aborted))
	if d := r.last(); d.Verdict.Reason != txn.AbortRequested {
		t.Errorf("after Abort: %+v", d.Verdict)
	}
	if s, err := r.Snapshot(); err != nil || s.Needs() != 0 {
		t.Errorf("nothing is open: needs the log from %d on, %v", s.Needs(), err)
	}
}

// What an origin leaves unfinished is forgotten, by entries and by bytes, whatever kind of entry comes, and alike on a node
// that was restored meanwhile. If its end comes late it aborts; a part in time gives it time again.
func TestUnfinishedExpires(t *testing.T) {
	horizon := codec.AppendHorizon(nil, 0)
	large := codec.AppendChunk(nil, &codec.Chunk{GID: gid(2, 9), Part: 7, Data: make([]byte, 3<<20)}) // of nobody here
	several := func(r *recorder, n int) {
		for range n {
			r.entry(large)
		}
	}
	for name, by := range map[string]struct{ little, almost, over func(*recorder) }{
		"entries": {
			little: func(r *recorder) { r.entry(horizon) },
			almost: func(r *recorder) { r.index += chunkLifetime - 3; r.entry(horizon) },
			over:   func(r *recorder) { r.index += chunkLifetime; r.entry(horizon) },
		},
		"bytes": {
			little: func(r *recorder) { several(r, 1) },
			almost: func(r *recorder) { several(r, chunkLifetimeBytes/len(large)) },
			over:   func(r *recorder) { several(r, chunkLifetimeBytes/len(large)+1) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, copied := newRecorder(), newRecorder()
			late, again := set(gid(1, 1), 0, 1), set(gid(1, 2), 0, 2)
			late.Chunks, again.Chunks = 1, 2
			r.entry(chunk(late.GID, 0))
			by.little(r)
			r.entry(chunk(again.GID, 0))
			by.almost(r)
			copied.restoreFrom(t, r)
			for _, x := range []*recorder{r, copied} {
				x.entry(chunk(again.GID, 1))
				if _, first := x.Unfinished(); len(first) != 1 || first[again.GID] != 3 {
					t.Errorf("a life after the first parts: unfinished %v", first)
				}
				by.almost(x)
				x.entry(transactions(again))
				if d := x.last(); !d.Verdict.Commits() || d.Chunks[0] != 3 {
					t.Errorf("parts and end in time: %+v", d)
				}
				x.entry(transactions(late))
				if d := x.last(); d.Verdict.Reason != txn.AbortRequested {
					t.Errorf("an end that is late: %+v", d.Verdict)
				}
				x.entry(chunk(gid(1, 3), 0))
				by.over(x)
				if s, err := x.Snapshot(); err != nil || s.Needs() != 0 {
					t.Errorf("expired: needs the log from %d on, %v", s.Needs(), err)
				}
			}
			if digest(r) != digest(copied) {
				t.Error("a node that was restored decides otherwise")
			}
		})
	}
}

// restoreFrom makes r a copy of another machine, by a snapshot.
func (r *recorder) restoreFrom(t interface{ Fatal(...any) }, from *recorder) []byte {
	s, err := from.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var image bytes.Buffer
	if n, err := s.WriteTo(&image); err != nil || n != int64(image.Len()) {
		t.Fatal("wrote", n, "of", image.Len(), err)
	}
	if err := r.Restore(bytes.NewReader(image.Bytes())); err != nil {
		t.Fatal(err)
	}
	r.index = from.index
	return image.Bytes()
}

func TestUnreadableEntryStopsTheNode(t *testing.T) {
	r := newRecorder()
	r.entry([]byte("not an entry"))
	r.entry(transactions(set(gid(1, 1), 0, 1)))
	if !errors.Is(r.failure, txn.ErrCorrupt) && r.failure == nil {
		t.Errorf("failure %v", r.failure)
	}
	if len(r.decisions) != 0 || r.processed != 0 {
		t.Error("something was delivered after an entry that could not be read")
	}
}

// A machine restored from a snapshot anywhere in a log decides the rest as one that read all of it.
func TestSnapshotAnywhere(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		whole := newRecorder()
		var log [][]byte
		next := map[int]int{}
		for range rapid.IntRange(1, 40).Draw(t, "entries") {
			node := rapid.IntRange(1, 3).Draw(t, "node")
			next[node]++
			g := gid(node, next[node])
			switch rapid.SampledFrom([]string{"batch", "batch", "batch", "chunked", "abort", "asked", "horizon", "member", "found", "admit", "remove"}).Draw(t, "kind") {
			case "batch":
				var sets []*txn.WriteSet
				for range rapid.IntRange(1, 4).Draw(t, "size") {
					last := int(whole.LastCSN())
					seen := txn.CSN(rapid.IntRange(max(0, last-5), last).Draw(t, "seen"))
					sets = append(sets, set(gid(node, next[node]), seen, rapid.SliceOfN(rapid.IntRange(0, 9), 0, 4).Draw(t, "keys")...))
					next[node]++
				}
				log = append(log, transactions(sets...))
			case "chunked":
				w := set(g, whole.LastCSN(), 1)
				w.Chunks = 1
				log = append(log, chunk(g, 0))
				whole.entry(log[len(log)-1])
				log = append(log, transactions(w))
			case "abort":
				log = append(log, codec.AppendAbort(nil, codec.Abort{GID: g, Reason: txn.AbortRequested}), transactions(set(g, whole.LastCSN(), 1)))
				whole.entry(log[len(log)-2])
			case "asked":
				far := gid(node, next[node]+rapid.IntRange(0, 200).Draw(t, "ahead"))
				log = append(log, codec.AppendAbort(nil, codec.Abort{GID: far, Reason: txn.AbortRequested}))
			case "horizon":
				log = append(log, codec.AppendHorizon(nil, whole.LastCSN()/2+1))
			case "found":
				log = append(log, found(txn.UUID{byte(rapid.IntRange(1, 2).Draw(t, "cluster"))}, whole.Membership().Cluster, 1, 2))
			case "admit":
				log = append(log, admit(len(log)+1, rapid.IntRange(0, 4).Draw(t, "replaces")))
			case "remove":
				log = append(log, codec.AppendRemove(nil, codec.Remove{Node: txn.NodeID(node)}))
			case "member":
				log = append(log, codec.AppendMember(nil, &codec.Member{Node: txn.NodeID(node), Incarnation: rapid.SampledFrom([]uint64{1, 1, 1, 2}).Draw(t, "incarnation")}))
			}
			whole.entry(log[len(log)-1])
		}
		cut := rapid.IntRange(0, len(log)).Draw(t, "cut")
		first, second := newRecorder(), newRecorder()
		for _, e := range log[:cut] {
			first.entry(e)
		}
		image := second.restoreFrom(t, first)
		for _, e := range log[cut:] {
			second.entry(e)
		}
		if _, d := second.Digest(); second.LastCSN() != whole.LastCSN() || d != digest(whole) {
			t.Fatalf("last CSN %d, want %d; digest %x, want %x", second.LastCSN(), whole.LastCSN(), d, digest(whole))
		}
		if !bytes.Equal(second.outcomes.encode(), whole.outcomes.encode()) || !slices.Equal(second.outcomes.asked(), whole.outcomes.asked()) {
			t.Fatal("other outcomes are remembered")
		}
		if got, want := second.Membership(), whole.Membership(); !reflect.DeepEqual(got, want) {
			t.Fatalf("members %+v, want %+v", got, want)
		}
		if got, want := second.members.state(), whole.members.state(); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("members %+v, want %+v", got, want)
		}
		tail := whole.decisions[len(whole.decisions)-len(second.decisions):]
		for i, d := range second.decisions {
			if d.Verdict != tail[i].Verdict || d.Set.GID != tail[i].Set.GID || !slices.Equal(d.Chunks, tail[i].Chunks) {
				t.Fatalf("decision %d: %+v, want %+v", i, d, tail[i])
			}
		}
		// damage is found
		if len(image) > 0 {
			damaged := slices.Clone(image)
			damaged[rapid.IntRange(0, len(damaged)-1).Draw(t, "at")] ^= 0x40
			if err := newRecorder().Restore(bytes.NewReader(damaged)); err == nil {
				t.Fatal("a damaged snapshot was accepted")
			}
		}
	})
}

func digest(r *recorder) uint64 { _, d := r.Digest(); return d }
