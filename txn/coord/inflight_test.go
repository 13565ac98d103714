package coord

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/quorate/quorate/txn"
)

// A transaction is followed from its COMMIT to its end: in what is in flight, and in the spans of its life.
func TestTransactionsAreFollowed(t *testing.T) {
	run(t, func(b bench) {
		var spans []string
		b.mu.Lock()
		b.cfg.Trace = func(s Span) {
			spans = append(spans, fmt.Sprintf("%d %s %v csn %d %s", s.GID.Sequence, s.Name, s.To.Sub(s.From), s.CSN, s.Outcome))
		}
		b.mu.Unlock()
		stage := func(want string) {
			t.Helper()
			all := b.InFlight()
			got := ""
			if len(all) == 1 {
				got = all[0].Stage
			}
			if got != want {
				t.Errorf("in flight is %+v, want one in stage %q", all, want)
			}
		}
		tx := b.begin()
		stage("marker")
		time.Sleep(1 * time.Millisecond)
		b.mark(tx)
		p := <-b.order.proposals
		stage("proposed")
		time.Sleep(2 * time.Millisecond)
		b.Decided(tx.GID(), txn.Verdict{CSN: 13})
		p.answer <- nil
		stage("decided")
		time.Sleep(3 * time.Millisecond)
		release(tx)
		stage("released")
		b.want(tx, txn.StepRelease)
		tx.Committed()
		tx.Close()
		stage("")

		lost := b.begin()
		b.mark(lost)
		(<-b.order.proposals).answer <- nil
		b.Decided(lost.GID(), txn.Verdict{Reason: txn.AbortConflict, With: 12})
		b.want(lost, txn.StepAbort)

		doubtful := b.begin()
		b.mark(doubtful)
		p = <-b.order.proposals
		p.answer <- nil
		b.want(doubtful, txn.StepUnknown) // nothing has come of it in time
		stage("in doubt")

		want := []string{
			"1 capture 1ms csn 0 ", "1 queue 0s csn 0 ", "1 order 2ms csn 13 ", "1 publish 3ms csn 13 ", "1 commit 6ms csn 13 committed",
			"2 capture 0s csn 0 ", "2 queue 0s csn 0 ", "2 order 0s csn 0 ", "2 commit 0s csn 0 conflict",
			"3 capture 0s csn 0 ", "3 queue 0s csn 0 ",
		}
		if !slices.Equal(spans, want) {
			t.Errorf("spans are %q, want %q", spans, want)
		}
	})
}
