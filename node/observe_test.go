package node

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/quorate/quorate/events"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/replication/apply"
	"github.com/quorate/quorate/replication/capture"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// People look events up by their kind.
func TestEventKindsAreDocumented(t *testing.T) {
	source, err := os.ReadFile("observe.go")
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../docs/observability.md")
	if err != nil {
		t.Fatal(err)
	}
	kinds := regexp.MustCompile(`(?m)^\tevent\w+ += "(\w+)"$`).FindAllSubmatch(source, -1)
	if len(kinds) < 15 {
		t.Fatalf("%d kinds", len(kinds))
	}
	for _, m := range kinds {
		if !strings.Contains(string(page), "`"+string(m[1])+"`") {
			t.Errorf("docs/observability.md does not tell of %s", m[1])
		}
	}
}

func gid(sequence uint64) txn.GID { return txn.GID{Node: 2, Incarnation: 1, Sequence: sequence} }

// Conflicts are located when somebody asks, once; memory is bounded whatever the losers were.
func TestConflicts(t *testing.T) {
	var c conflicts
	calls := 0
	var fail error
	locate := func(_ context.Context, one *conflict) (capture.Place, bool, error) {
		calls++
		return capture.Place{Table: "t", Key: one.set.GID.String()}, true, fail
	}
	list := func(most int) []conflict { return c.list(t.Context(), "", most, locate) }

	c.committed(5, gid(100))
	c.certified(&txn.WriteSet{GID: gid(1), Changes: make([]byte, 10)}, txn.Verdict{Reason: txn.AbortConflict, With: 5, Mode: txn.ModeWrite})
	c.certified(&txn.WriteSet{GID: gid(2), Changes: make([]byte, maxLoser+1)}, txn.Verdict{Reason: txn.AbortConflict, With: 6, Mode: txn.ModeWrite})
	// The transaction that process 77 is in the way of is 5, applied together with 6; of process 78 nothing is known.
	row := apply.Contention{Table: "t", Row: &txn.WriteSet{GID: gid(100), Changes: make([]byte, 10)}, CSN: 5}
	if !c.evicted(1, apply.Blockade{PID: 77, By: 6, Where: row}) || c.evicted(1, apply.Blockade{PID: 77, By: 6}) || !c.evicted(1, apply.Blockade{PID: 78, By: 6}) {
		t.Error("asking again is a new conflict, or a new one is not")
	}
	fail = errors.New("no catalog")
	if got := list(10); len(got) != 4 || got[3].place.Table != "" {
		t.Errorf("without a catalog: %+v", got)
	}
	fail = nil
	got := list(10)
	if len(got) != 4 || got[3].loser != gid(1) || got[3].gid != gid(100) || got[3].place.Key != gid(1).String() || got[2].gid != (txn.GID{}) || got[2].place.Table != "" ||
		got[1].kind != conflictEvicted || got[1].winner != 5 || got[1].gid != gid(100) || got[1].place.Key != gid(100).String() || got[0].winner != 6 || got[0].place.Table != "" {
		t.Errorf("conflicts are %+v", got)
	}
	for kind, numbers := range map[string][]uint64{conflictEvicted: {4, 3}, conflictCertified: {2, 1}, "other": nil} {
		var found []uint64
		for _, one := range c.list(t.Context(), kind, 2, locate) {
			found = append(found, one.number)
		}
		if !slices.Equal(found, numbers) {
			t.Errorf("of kind %s there are %v, want %v", kind, found, numbers)
		}
	}
	calls = 0
	if again := list(10); calls != 0 || again[3].place != got[3].place || c.bytes != 0 {
		t.Errorf("located again %d times, %d bytes are kept", calls, c.bytes)
	}

	for i := range uint64(5 * keptConflicts) {
		c.certified(&txn.WriteSet{GID: gid(10 + i), Changes: make([]byte, maxLoser)}, txn.Verdict{Reason: txn.AbortConflict, With: txn.CSN(i)})
		if c.bytes > maxLosers || len(c.latest) > 2*keptConflicts {
			t.Fatalf("after %d: %d bytes, %d conflicts", i, c.bytes, len(c.latest))
		}
	}
	got = list(1 << 20)
	kept := 0
	for _, one := range got {
		if one.place.Table != "" {
			kept++
		}
	}
	if len(got) < keptConflicts || got[0].loser != gid(10+5*keptConflicts-1) || kept != maxLosers/maxLoser || c.bytes != 0 {
		t.Errorf("%d conflicts, the latest %v, %d of them located, %d bytes", len(got), got[0].loser, kept, c.bytes)
	}
}

// TestMembershipIsNotedOnce: the log is read again after a restart and with each new incarnation, and what became of the
// members long ago is not noted as if it had happened now. What was before this node came it has not seen happen.
func TestMembershipIsNotedOnce(t *testing.T) {
	const self = 2
	dir := t.TempDir()
	now := func(ids ...txn.NodeID) (m replication.Membership) {
		for _, id := range ids {
			m.Members = append(m.Members, replication.Member{Member: codec.Member{Node: id}})
		}
		return m
	}
	replay := func(n *Node) {
		n.membershipChanged(replication.Change{Index: 3, Removed: []txn.NodeID{7}}, now(1))
		n.membershipChanged(replication.Change{Index: 5, Admitted: self}, now(1, self))
		n.membershipChanged(replication.Change{Index: 8, Admitted: 4, Removed: []txn.NodeID{3}, Reason: "it was replaced"}, now(1, self, 4))
	}
	for life := range 3 {
		log, err := events.Open(dir, func(err error) { t.Error(err) })
		if err != nil {
			t.Fatal(err)
		}
		n := &Node{log: slog.New(slog.DiscardHandler)}
		n.cfg.Node, n.seen.events, n.seen.changed = self, log, make(chan struct{})
		replay(n)
		replay(n)
		if life == 2 {
			n.membershipChanged(replication.Change{Index: 9, Removed: []txn.NodeID{4}, Reason: "x"}, now(1, self))
		}
		var texts []string
		for _, e := range slices.Backward(log.Find(events.Query{})) {
			texts = append(texts, e.Text)
		}
		want := []string{"node 2 was admitted", "node 4 was admitted", "node 3 was removed: it was replaced", "node 4 was removed: x"}
		if life < 2 {
			want = want[:3]
		}
		if !slices.Equal(texts, want) {
			t.Errorf("life %d: %q", life, texts)
		}
		if err := log.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDecisionsAreCountedOnce: an incarnation that is given the log again does not count again what another has counted.
func TestDecisionsAreCountedOnce(t *testing.T) {
	n := &Node{}
	n.cfg.Node = 2
	n.seen.decided = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "decided"}, []string{"reason"})
	entry := func(index txn.LogIndex, csns ...txn.CSN) (all []replication.Decision) {
		for _, csn := range csns {
			all = append(all, replication.Decision{Index: index, Set: &txn.WriteSet{GID: gid(uint64(csn))}, Verdict: txn.Verdict{CSN: csn}})
		}
		return all
	}
	for _, start := range []txn.CSN{2, 3} { // the second begins at what the server had on disk
		i := &incarnation{n: n, start: start}
		i.noteDecisions(entry(10, 1, 2, 3))
		i.noteDecisions(entry(12, 4, 5))
	}
	(&incarnation{n: n, start: 5}).noteDecisions(entry(13, 6))
	if got := n.seen.commits.Load(); got != 4 {
		t.Errorf("%d commits are counted of 3 to 6", got)
	}
}
