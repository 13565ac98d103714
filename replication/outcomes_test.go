package replication

import (
	"context"
	"errors"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// The memory never says anything but the first decision, or that it has forgotten; and the newest are there.
func TestOutcomes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		keep := rapid.IntRange(1, 300).Draw(t, "keep")
		o := newOutcomes(keep)
		o.begin(1, 1)
		o.begin(1, 2)
		first := map[txn.GID]bool{}
		var order []txn.GID
		for range rapid.IntRange(0, 600).Draw(t, "decisions") {
			g := txn.GID{Node: 1, Incarnation: rapid.Uint64Range(1, 2).Draw(t, "incarnation"), Sequence: rapid.Uint64Range(1, 500).Draw(t, "sequence")}
			committed := rapid.Bool().Draw(t, "committed")
			if rapid.IntRange(0, 9).Draw(t, "ask") == 0 {
				if before := o.find(g); o.ask(g) && before == Undecided && o.find(g) == Aborted {
					first[g] = false
					order = append(order, g)
				}
				continue
			}
			if old := o.tooOld(g); !old {
				if _, again := first[g]; !again {
					first[g] = committed
					order = append(order, g)
				}
			}
			o.add(g, committed)
		}
		found := 0
		for g, committed := range first {
			switch got := o.find(g); {
			case got == Forgotten:
			case got == Committed && committed, got == Aborted && !committed:
				found++
			default:
				t.Fatalf("%s is %d, committed %v", g, got, committed)
			}
		}
		if asked := len(o.asked()); found < min(keep, len(order)) || o.count > keep+64 || found != o.count+asked {
			t.Fatalf("%d of %d are remembered, %d counted and %d asked about, want %d", found, len(order), o.count, asked, keep)
		}
		again := newOutcomes(keep)
		if err := again.decode(o.encode(), o.asked()); err != nil {
			t.Fatal(err)
		}
		for g := range first {
			if again.find(g) != o.find(g) {
				t.Fatalf("%s is %d, and was %d", g, again.find(g), o.find(g))
			}
		}
		if image := o.encode(); len(image) > 0 {
			cut := rapid.IntRange(0, len(image)-1).Draw(t, "cut")
			_ = again.decode(image[:cut], o.asked()) // must not panic
		}
	})
}

func TestOutcomeIsFinal(t *testing.T) {
	r := newRecorder()
	r.entry(codec.AppendMember(nil, &codec.Member{Node: 1, Incarnation: 1}))
	if got := r.Outcome(gid(2, 1)); got != Forgotten {
		t.Errorf("of a node nobody has heard of: %d", got)
	}
	if got := r.Outcome(gid(1, 1)); got != Undecided {
		t.Errorf("before: %d", got)
	}
	abort := func(g txn.GID) []byte {
		return codec.AppendAbort(nil, codec.Abort{GID: g, Reason: txn.AbortRequested})
	}
	r.entry(transactions(set(gid(1, 1), 0, 7), set(gid(1, 2), 0, 7)))
	r.entry(abort(gid(1, 1)))
	r.entry(abort(gid(1, 3)))
	for i, want := range []Outcome{Committed, Aborted, Aborted, Undecided} {
		if got := r.Outcome(gid(1, i+1)); got != want {
			t.Errorf("number %d: %d, want %d", i+1, got, want)
		}
	}
	// Asked about long before its COMMIT: the certifier has forgotten that, but whoever asked has not.
	r.entry(codec.AppendHorizon(nil, 1))
	r.entry(transactions(set(gid(1, 4), 1, 8), set(gid(1, 5), 2, 9)))
	r.entry(codec.AppendHorizon(nil, 3))
	r.entry(transactions(set(gid(1, 3), 3, 1)))
	if d := r.last(); d.Verdict.Commits() {
		t.Errorf("a transaction that somebody was told is aborted: %+v", d.Verdict)
	}
	// Given out so long ago that the memory cannot tell it from one that was decided.
	for i := range 200 {
		r.entry(transactions(set(gid(1, 100+i), 3)))
	}
	r.entry(transactions(set(gid(1, 6), 3, 1)))
	if d := r.last(); d.Verdict.Commits() || r.Outcome(gid(1, 6)) != Forgotten {
		t.Errorf("a forgotten GID: %+v, outcome %d", d.Verdict, r.Outcome(gid(1, 6)))
	}
	// A log from before there were announcements, or a snapshot from before there was this memory.
	r.entry(transactions(set(gid(3, 70), 3, 1)))
	if d := r.last(); !d.Verdict.Commits() {
		t.Errorf("of an incarnation nobody has announced: %+v", d.Verdict)
	}
}

// Whoever asks about a GID that is still to come settles that one and nothing else, however far it is, however long ago.
func TestAskingAheadHarmsNobody(t *testing.T) {
	r := newRecorder()
	ask := func(node int, sequence uint64) Outcome {
		g := gid(node, 0)
		g.Sequence = sequence
		r.entry(codec.AppendAbort(nil, codec.Abort{GID: g, Reason: txn.AbortRequested}))
		return r.Outcome(g)
	}
	decide := func(node int, sequences ...int) (reasons []txn.AbortReason) {
		for _, sequence := range sequences {
			r.entry(transactions(set(gid(node, sequence), r.LastCSN())))
			reasons = append(reasons, r.last().Verdict.Reason)
		}
		return reasons
	}
	is := func(what string, got []txn.AbortReason, want ...txn.AbortReason) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	const commits, aborts = txn.AbortNone, txn.AbortRequested
	for node := range 2 {
		r.entry(codec.AppendMember(nil, &codec.Member{Node: txn.NodeID(node + 1), Incarnation: 1}))
	}
	is("at first", decide(2, 1), commits)
	for _, sequence := range []uint64{3, 1000, math.MaxUint64} {
		if got := ask(2, sequence); got != Aborted {
			t.Errorf("asked about %d: %d", sequence, got)
		}
	}
	for n := range 200 { // far more than are kept
		decide(1, n+1)
	}
	if got := r.Outcome(gid(2, 1)); got != Forgotten {
		t.Errorf("long ago: %d", got)
	}
	is("of a node that has written little", decide(2, 2, 3, 4, 70, 999, 1000, 1001), commits, aborts, commits, commits, commits, aborts, commits)
	if got := ask(2, math.MaxUint64); got != Aborted {
		t.Errorf("asked again: %d", got)
	}

	// More questions than there is room for are not answered, and settle nothing.
	for n := range maxAsked - 1 {
		ask(2, uint64(1e6+n))
	}
	if got := ask(2, 5000); got != Undecided {
		t.Errorf("one question too many: %d", got)
	}
	if got := ask(2, 1e6); got != Aborted {
		t.Errorf("one that was asked: %d", got)
	}
	copied := newRecorder()
	copied.restoreFrom(t, r)
	if got := copied.outcomes.asked(); len(got) != maxAsked || !slices.Equal(got, r.outcomes.asked()) {
		t.Errorf("a snapshot holds %d questions", len(got))
	}
	is("what was not settled", decide(2, 5000), commits)

	// Of an incarnation that has ended nothing is to come, so that there is always an answer, and it is forgotten like others.
	r.entry(codec.AppendMember(nil, &codec.Member{Node: 2, Incarnation: 2}))
	r.entry(codec.AppendMember(nil, &codec.Member{Node: 1, Incarnation: 2}))
	if got := ask(1, 5001); got != Aborted || len(r.outcomes.asked()) != 0 {
		t.Errorf("of an incarnation that has ended: %d; %d questions are kept", got, len(r.outcomes.asked()))
	}
}

func TestWaitFor(t *testing.T) {
	r := newRecorder()
	r.entry(codec.AppendMember(nil, &codec.Member{Node: 1, Incarnation: 1}))
	if err := r.WaitFor(t.Context(), 1); err != nil {
		t.Error(err)
	}
	done := make(chan error, 1)
	go func() { done <- r.WaitFor(t.Context(), 2) }()
	r.entry(transactions(set(gid(1, 1), 0, 7)))
	if err := <-done; err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.WaitFor(ctx, 9); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
