package coord

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// scriptedOrder is a log whose answers the test gives: it shows how the coordinator behaves for each of them.
type scriptedOrder struct {
	proposals chan proposal
	leader    chan struct{} // one value for each AwaitLeader that may return
	lagging   chan struct{} // unless nil, Admit waits until it is closed
	read      chan struct{} // unless nil, AwaitDecided waits until it is closed
}

func (o *scriptedOrder) Admit(ctx context.Context) error { return wait(ctx, o.lagging) }

func (o *scriptedOrder) AwaitDecided(ctx context.Context, _ txn.LogIndex) error {
	return wait(ctx, o.read)
}

func wait(ctx context.Context, c chan struct{}) error {
	if c == nil {
		return nil
	}
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

type proposal struct {
	entry  codec.Entry
	answer chan error
}

func (o *scriptedOrder) Propose(ctx context.Context, data []byte) (txn.LogIndex, error) {
	entry, err := codec.Decode(data)
	if err != nil {
		return 0, err
	}
	p := proposal{entry, make(chan error)}
	select {
	case o.proposals <- p:
	case <-ctx.Done():
		return 0, fmt.Errorf("propose: %w", txn.ErrNoQuorum)
	}
	select {
	case err := <-p.answer:
		return 1, err
	case <-ctx.Done():
		return 0, fmt.Errorf("propose: %w", txn.ErrOutcomeUnknown)
	}
}

func (o *scriptedOrder) AwaitLeader(ctx context.Context) error {
	select {
	case <-o.leader:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

type fixedVisibility struct{ applied, seen txn.CSN }

func (v fixedVisibility) Applied() txn.CSN                      { return v.applied }
func (v fixedVisibility) Seen(context.Context) (txn.CSN, error) { return v.seen, nil }

type bench struct {
	*testing.T
	*Coordinator
	order *scriptedOrder
}

// run runs f in fake time against a started coordinator, and checks that nothing is left afterwards.
func run(t *testing.T, f func(b bench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		order := &scriptedOrder{proposals: make(chan proposal), leader: make(chan struct{})}
		c := New(Config{Node: 1, Incarnation: 7, Database: "postgres", Order: order, Visibility: fixedVisibility{10, 12},
			Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		f(bench{t, c, order})
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func (b bench) begin() *Transaction {
	b.Helper()
	t, err := b.Begin(b.Context(), 11, 99)
	if err != nil {
		b.Fatal(err)
	}
	return t
}

func (b bench) next(t *Transaction) txn.Event {
	b.Helper()
	e, err := t.Next(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	return e
}

func (b bench) want(t *Transaction, step txn.Step) txn.Event {
	b.Helper()
	e := b.next(t)
	if e.Step != step {
		b.Fatalf("step %s (%+v), want %s", e.Step, e, step)
	}
	return e
}

func (b bench) mark(t *Transaction) { b.Marked(t.GID(), someSet(), nil, nil) }

func (b bench) forget(gids ...txn.GID) {
	b.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, g := range gids {
		if b.open[g] != nil {
			b.Errorf("%s is still known", g)
		}
	}
}

func someSet() *txn.WriteSet {
	return &txn.WriteSet{XID: 5, Keys: []txn.KeyUse{{Mode: txn.ModeWrite}}, Changes: []byte{1, 'I'}, Rows: 1}
}

func TestCommitInTurn(t *testing.T) {
	run(t, func(b bench) {
		tx := b.begin()
		if tx.Base() != 11 || tx.Seen() != 12 || !b.Expecting(tx.Seal()) {
			b.Fatalf("base %d, seen %d", tx.Base(), tx.Seen())
		}
		if forged := (txn.Seal{GID: tx.GID()}); b.Expecting(forged) {
			b.Error("a seal that somebody made of the GID is expected")
		}
		b.mark(tx)
		p := <-b.order.proposals
		set := p.entry.Transactions[0]
		if set.GID != tx.GID() || set.Base != 11 || set.Seen != 12 || set.Database != "postgres" || set.XID != 5 {
			b.Errorf("proposed %+v", set)
		}
		if held := b.Decided(tx.GID(), txn.Verdict{CSN: 13}); held != tx { // the log may be faster than Propose's answer
			b.Fatal("not held")
		}
		p.answer <- nil
		ended := release(tx)
		if e := b.want(tx, txn.StepRelease); e.CSN != 13 {
			b.Errorf("released at %d", e.CSN)
		}
		tx.Committed()
		if !<-ended {
			b.Error("not committed")
		}
		tx.Close()
		b.forget(tx.GID())
	})
}

func TestStepsWithoutTheLog(t *testing.T) {
	run(t, func(b bench) {
		tx := b.begin()
		b.Marked(tx.GID(), nil, nil, nil)
		b.want(tx, txn.StepNudge)
		b.Marked(tx.GID(), &txn.WriteSet{}, nil, nil)
		b.want(tx, txn.StepLocal)
		tx.Close()

		failed := b.begin()
		b.Marked(failed.GID(), nil, nil, errors.New("spill directory full"))
		if e := b.want(failed, txn.StepAbort); e.Reason != txn.AbortCapture {
			b.Errorf("reason %s", e.Reason)
		}

		forgotten := b.begin()
		forgotten.Close()
		if b.Expecting(forgotten.Seal()) {
			b.Error("a closed transaction is expected")
		}
		b.mark(forgotten) // late: ignored
		b.forget(tx.GID(), failed.GID(), forgotten.GID())
	})
}

func TestConflict(t *testing.T) {
	run(t, func(b bench) {
		tx := b.begin()
		b.mark(tx)
		(<-b.order.proposals).answer <- nil
		if held := b.Decided(tx.GID(), txn.Verdict{Reason: txn.AbortConflict, With: 12}); held != nil {
			b.Error("an abort is held")
		}
		if e := b.want(tx, txn.StepAbort); e.Reason != txn.AbortConflict || e.With != 12 {
			b.Errorf("%+v", e)
		}
		b.forget(tx.GID())
	})
}

func TestBatchFormsWhileAProposalIsInFlight(t *testing.T) {
	run(t, func(b bench) {
		first := b.begin()
		b.mark(first)
		p := <-b.order.proposals
		var rest []*Transaction
		for range 5 {
			tx := b.begin()
			b.mark(tx)
			rest = append(rest, tx)
		}
		p.answer <- nil
		p = <-b.order.proposals
		if len(p.entry.Transactions) != 5 {
			b.Fatalf("batch of %d", len(p.entry.Transactions))
		}
		for i, set := range p.entry.Transactions {
			if set.GID != rest[i].GID() {
				b.Errorf("place %d: %s", i, set.GID)
			}
		}
		p.answer <- nil
	})
}

// What is on its way when a batch is due goes with it; what begins later, or takes long, does not hold it up.
func TestBatchWaitsForWhatIsOnItsWay(t *testing.T) {
	run(t, func(b bench) {
		first, second, lost, closed := b.begin(), b.begin(), b.begin(), b.begin()
		b.mark(first)
		synctest.Wait()
		later := b.begin()
		start := time.Now()
		lost.Lost()
		b.want(lost, txn.StepAbort)
		closed.Close()
		b.mark(second)
		p := <-b.order.proposals
		if len(p.entry.Transactions) != 2 || !time.Now().Equal(start) {
			b.Errorf("batch of %d after %s", len(p.entry.Transactions), time.Since(start))
		}
		p.answer <- nil

		third := b.begin()
		b.mark(third)
		p = <-b.order.proposals // while later still checks its constraints
		if waited := time.Since(start); len(p.entry.Transactions) != 1 || waited != gatherTimeout {
			b.Errorf("batch of %d after %s", len(p.entry.Transactions), waited)
		}
		b.mark(later)
		p.answer <- nil
		p = <-b.order.proposals
		if waited := time.Since(start); len(p.entry.Transactions) != 1 || waited != gatherTimeout {
			b.Errorf("a lone one after %s", waited)
		}
		p.answer <- nil
	})
}

// While many wait for their turn, nothing is gained by deciding more.
func TestBatchGrowsWhileTransactionsWaitForTheirTurn(t *testing.T) {
	run(t, func(b bench) {
		var first []*Transaction
		for range maxUnfinished + 1 {
			tx := b.begin()
			b.mark(tx)
			first = append(first, tx)
		}
		for decided := 0; decided < len(first); {
			p := <-b.order.proposals
			for _, set := range p.entry.Transactions {
				decided++
				b.Decided(set.GID, txn.Verdict{CSN: txn.CSN(12 + decided)})
			}
			p.answer <- nil
		}
		for range 3 {
			b.mark(b.begin())
		}
		synctest.Wait()
		select {
		case <-b.order.proposals:
			t.Fatal("proposed while others wait for their turn")
		default:
		}
		release(first[0])
		b.want(first[0], txn.StepRelease)
		first[0].Committed()
		if p := <-b.order.proposals; len(p.entry.Transactions) != 3 {
			t.Errorf("batch of %d", len(p.entry.Transactions))
		} else {
			p.answer <- nil
		}
	})
}

// release returns what takes the word on the transaction's end; a second one would not fit.
func release(tx *Transaction) (ended <-chan bool) {
	c := make(chan bool, 1)
	tx.Release(func(committed bool) {
		select {
		case c <- committed:
		default:
			panic("ended twice")
		}
	})
	return c
}

// Whoever releases a transaction may write its COMMIT for the session, but only if that waits for just this.
func TestOnRelease(t *testing.T) {
	run(t, func(b bench) {
		decided := func(csn txn.CSN) (*Transaction, *[]txn.GID) {
			tx, through := b.begin(), new([]txn.GID)
			tx.OnRelease(func(gid txn.GID) {
				if len(tx.events) > 0 {
					b.Error("the session was woken first")
				}
				*through = append(*through, gid)
			})
			b.mark(tx)
			(<-b.order.proposals).answer <- nil
			b.Decided(tx.GID(), txn.Verdict{CSN: csn})
			return tx, through
		}
		waits, through := decided(13)
		ended := release(waits)
		b.want(waits, txn.StepRelease)
		if !slices.Equal(*through, []txn.GID{waits.GID()}) {
			b.Errorf("let through: %v", *through)
		}
		waits.Committed()
		waits.Committed() // which changes nothing
		if !<-ended {
			b.Error("not committed")
		}
		lost, through := decided(14)
		lost.Lost()
		if <-release(lost) || len(*through) > 0 {
			b.Errorf("a lost one: let through %v", *through)
		}
		lost.Visible(14)
		b.want(lost, txn.StepVisible)
		left, through := decided(15)
		left.Close()
		if <-release(left) || len(*through) > 0 {
			b.Errorf("one without a session: let through %v", *through)
		}
		left.Visible(15)
		told, through := decided(16)
		told.c.mu.Lock()
		told.giveUp(errNoVerdict) // the session has not read it yet
		told.c.mu.Unlock()
		release(told)
		if len(*through) > 0 {
			b.Errorf("one that is told something else: let through %v", *through)
		}
		b.want(told, txn.StepUnknown)
		b.want(told, txn.StepRelease)
		told.Committed()
	})
}

// A session whose local transaction is gone learns its fate from the log, wherever it was when it died.
func TestLost(t *testing.T) {
	run(t, func(b bench) {
		early := b.begin()
		early.Lost()
		if e := b.want(early, txn.StepAbort); e.Reason != txn.AbortEvicted {
			b.Errorf("reason %s", e.Reason)
		}
		b.mark(early) // its marker comes all the same

		proposedOne := b.begin()
		b.mark(proposedOne)
		p := <-b.order.proposals
		queuedOne := b.begin()
		b.mark(queuedOne)
		queuedOne.Lost()
		proposedOne.Lost()
		p.answer <- nil
		b.want(queuedOne, txn.StepAbort)
		held := b.Decided(proposedOne.GID(), txn.Verdict{CSN: 20})
		if held == nil {
			b.Fatal("a lost transaction must stay known until it is visible")
		}
		if <-release(held) {
			b.Error("lost and committed")
		}
		held.Visible(20)
		b.want(proposedOne, txn.StepVisible)

		releasedOne := b.begin()
		b.mark(releasedOne)
		(<-b.order.proposals).answer <- nil
		ended := release(b.Decided(releasedOne.GID(), txn.Verdict{CSN: 21}))
		b.want(releasedOne, txn.StepRelease)
		releasedOne.Close() // the session died inside COMMIT
		if <-ended {
			b.Error("closed and committed")
		}
		releasedOne.Visible(21)
		b.forget(early.GID(), proposedOne.GID(), queuedOne.GID(), releasedOne.GID())
	})
}

// Whoever releases may not have heard yet that the server is gone.
func TestReleaseAfterDetach(t *testing.T) {
	run(t, func(b bench) {
		tx := b.begin()
		tx.OnRelease(func(txn.GID) { b.Error("let through, and no server is there") })
		b.mark(tx)
		(<-b.order.proposals).answer <- nil
		b.Decided(tx.GID(), txn.Verdict{CSN: 13})
		b.Detach()
		b.want(tx, txn.StepVisible)
		if <-release(tx) || len(tx.events) > 0 {
			b.Errorf("committed, or %d more steps", len(tx.events))
		}
		tx.Close()
	})
}

// When the server is gone, the log's word is enough, whether it was said before or comes later.
func TestDetach(t *testing.T) {
	run(t, func(b bench) {
		waiting, released, later, conflicting, early := b.begin(), b.begin(), b.begin(), b.begin(), b.begin()
		for _, tx := range []*Transaction{waiting, released, later, conflicting} {
			b.mark(tx)
			(<-b.order.proposals).answer <- nil
		}
		release(b.Decided(released.GID(), txn.Verdict{CSN: 13}))
		b.want(released, txn.StepRelease)
		b.Decided(waiting.GID(), txn.Verdict{CSN: 14})
		b.Detach()
		for _, tx := range []*Transaction{released, waiting} {
			tx.Lost()
			b.want(tx, txn.StepVisible)
			tx.Close()
		}
		if held := b.Decided(later.GID(), txn.Verdict{CSN: 15}); held != nil {
			b.Error("held, and nobody is there to release it")
		}
		if e := b.want(later, txn.StepVisible); e.CSN != 15 {
			b.Errorf("visible as %d", e.CSN)
		}
		later.Close()
		b.Decided(conflicting.GID(), txn.Verdict{Reason: txn.AbortConflict, With: 15})
		b.want(conflicting, txn.StepAbort)
		if e := b.want(early, txn.StepAbort); e.Reason != txn.AbortCapture { // nobody sends its marker any more
			b.Errorf("reason %s", e.Reason)
		}
		early.Lost()
		if _, err := b.Begin(b.Context(), 1, 1); !errors.Is(err, txn.ErrClosed) {
			b.Errorf("Begin after Detach: %v", err)
		}
		b.forget(waiting.GID(), released.GID(), later.GID(), conflicting.GID(), early.GID())
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.waiting != 0 {
			b.Errorf("%d are waiting", b.waiting)
		}
	})
}

func TestNoQuorumUndoes(t *testing.T) {
	run(t, func(b bench) {
		tx := b.begin()
		b.mark(tx)
		for range 3 {
			(<-b.order.proposals).answer <- txn.ErrNoQuorum
			b.order.leader <- struct{}{}
		}
		(<-b.order.proposals).answer <- txn.ErrNoQuorum // and no leader until CommitTimeout
		if e := b.want(tx, txn.StepAbort); e.Reason != txn.AbortNoQuorum {
			b.Errorf("reason %s", e.Reason)
		}
	})
}

// A wait for a PostgreSQL is no lack of a majority, and says so.
func TestBehind(t *testing.T) {
	behind := func(b bench, tx *Transaction, start time.Time) {
		b.Helper()
		if e := b.want(tx, txn.StepAbort); e.Reason != txn.AbortBehind || time.Since(start) != 10*time.Second {
			b.Errorf("reason %s after %s", e.Reason, time.Since(start))
		}
		b.forget(tx.GID())
	}
	t.Run("flow control", func(t *testing.T) {
		run(t, func(b bench) {
			b.order.lagging = make(chan struct{})
			tx, large := b.begin(), b.begin()
			start := time.Now()
			b.mark(tx)
			set := someSet()
			set.Chunks = 1
			b.Marked(large.GID(), set, &someParts{parts: [][]byte{{1, 'I'}}}, nil)
			behind(b, tx, start)
			behind(b, large, start)
			if p := <-b.order.proposals; p.entry.Abort == nil {
				b.Errorf("want an Abort entry: %+v", p.entry)
			} else {
				p.answer <- nil
			}
			close(b.order.lagging)
			cutOff := b.begin()
			b.mark(cutOff)
			(<-b.order.proposals).answer <- txn.ErrNoQuorum
			if e := b.want(cutOff, txn.StepAbort); e.Reason != txn.AbortNoQuorum {
				b.Errorf("reason %s", e.Reason)
			}
		})
	})
	t.Run("others wait for their turn", func(t *testing.T) {
		run(t, func(b bench) {
			var first []*Transaction
			for range maxUnfinished + 1 {
				first = append(first, b.begin())
			}
			for _, tx := range first {
				b.mark(tx)
			}
			p := <-b.order.proposals
			p.answer <- nil
			for n, set := range p.entry.Transactions {
				b.Decided(set.GID, txn.Verdict{CSN: txn.CSN(13 + n)})
			}
			if b.waiting != maxUnfinished+1 {
				b.Fatalf("%d wait", b.waiting)
			}
			tx, start := b.begin(), time.Now()
			b.mark(tx)
			behind(b, tx, start)
		})
	})
}

// One attempt that may have reached the log is enough: then only the log can say no.
func TestUnknownIsNeverReportedAsAbort(t *testing.T) {
	run(t, func(b bench) {
		tx := b.begin()
		b.mark(tx)
		(<-b.order.proposals).answer <- txn.ErrOutcomeUnknown
		b.order.leader <- struct{}{}
		(<-b.order.proposals).answer <- txn.ErrNoQuorum
		start := time.Now()
		b.want(tx, txn.StepUnknown)
		if waited := time.Since(start); waited != 10*time.Second {
			b.Errorf("waited %s", waited)
		}
		tx.Close()
		held := b.Decided(tx.GID(), txn.Verdict{CSN: 30})
		if held == nil {
			b.Fatal("must stay known")
		}
		if <-release(held) {
			b.Error("closed and committed")
		}
		held.Visible(30)
		b.forget(tx.GID())
	})
}

// What is neither certainly in the log nor certainly not is decided as soon as somebody leads again, also if the session has
// long gone: by the log itself, or by an Abort entry.
func TestDoubtfulIsSettled(t *testing.T) {
	run(t, func(b bench) {
		b.order.read = make(chan struct{})
		never, committed, decided := b.begin(), b.begin(), b.begin()
		all := []*Transaction{never, committed, decided}
		for _, tx := range all {
			b.mark(tx)
		}
		p := <-b.order.proposals
		if n := len(p.entry.Transactions); n != len(all) {
			b.Fatalf("batch of %d", n)
		}
		p.answer <- txn.ErrOutcomeUnknown // and no leader until CommitTimeout
		for _, tx := range all {
			b.want(tx, txn.StepUnknown)
			tx.Close()
			if tx.set != nil {
				b.Error("the write set is kept")
			}
		}
		if f := b.InFlight(); len(f) != 3 || f[0].Stage != "in doubt" {
			b.Errorf("in flight: %+v", f)
		}
		time.Sleep(65 * time.Second) // in the middle of an attempt
		if b.Decided(decided.GID(), txn.Verdict{Reason: txn.AbortConflict}); len(b.InFlight()) != 2 {
			b.Error("decided, and still in flight")
		}
		settle := func(tx *Transaction) {
			b.Helper()
			p := <-b.order.proposals
			if p.entry.Abort == nil || p.entry.Abort.GID != tx.GID() {
				b.Fatalf("want an Abort entry for %s: %+v", tx.GID(), p.entry)
			}
			p.answer <- txn.ErrOutcomeUnknown
			b.order.leader <- struct{}{}
			(<-b.order.proposals).answer <- nil
			synctest.Wait()
		}
		settle(never)
		if f := b.InFlight(); len(f) != 2 {
			b.Fatalf("the log may still have let it commit: in flight %+v", f)
		}
		close(b.order.read)
		settle(committed)
		b.forget(never.GID(), committed.GID(), decided.GID())
	})
	run(t, func(b bench) {
		b.order.read = make(chan struct{})
		tx := b.begin()
		b.mark(tx)
		(<-b.order.proposals).answer <- txn.ErrOutcomeUnknown
		b.want(tx, txn.StepUnknown)
		tx.Close()
		(<-b.order.proposals).answer <- nil
		held := b.Decided(tx.GID(), txn.Verdict{CSN: 13}) // the log had it, before the Abort entry
		close(b.order.read)
		synctest.Wait()
		if held != tx || len(b.InFlight()) != 1 {
			b.Fatal("not held")
		}
		release(held)
		held.Visible(13)
		b.forget(tx.GID())
	})
}

func TestReservedGID(t *testing.T) {
	run(t, func(b bench) {
		reserved := b.Reserve()
		next := reserved
		if next.Sequence++; !b.GaveOut(reserved) || b.GaveOut(next) {
			b.Errorf("%s counts as given out: %v, %s, which comes next: %v", reserved, b.GaveOut(reserved), next, b.GaveOut(next))
		}
		other := b.begin()
		tx, err := b.BeginAs(b.Context(), reserved, 11, 99)
		if err != nil {
			b.Fatal(err)
		}
		if tx.GID() != reserved || other.GID() == reserved {
			b.Errorf("GIDs %s and %s, reserved %s", tx.GID(), other.GID(), reserved)
		}
		b.mark(tx)
		p := <-b.order.proposals
		if got := p.entry.Transactions[0].GID; got != reserved {
			b.Errorf("proposed as %s", got)
		}
		p.answer <- nil
	})
}

// A node that is cut off right after its proposal was accepted never sees the verdict.
func TestNoVerdict(t *testing.T) {
	run(t, func(b bench) {
		tx := b.begin()
		b.mark(tx)
		start := time.Now()
		(<-b.order.proposals).answer <- nil
		b.want(tx, txn.StepUnknown)
		if waited := time.Since(start); waited != 10*time.Second {
			b.Errorf("waited %s", waited)
		}
		tx.Close()
		if b.Decided(tx.GID(), txn.Verdict{CSN: 30}) == nil {
			b.Error("must stay known: the log applies it")
		}
	})
}

// Wherever commits wait while nothing can be ordered, none waits for longer than CommitTimeout: not behind others
// either.
func TestQueueDoesNotAddUpWaits(t *testing.T) {
	run(t, func(b bench) {
		start := time.Now()
		var all []*Transaction
		for range 10 {
			tx := b.begin()
			b.mark(tx)
			all = append(all, tx)
			synctest.Wait() // each in a batch of its own, or behind one that is under way
			time.Sleep(700 * time.Millisecond)
		}
		go func() {
			for {
				select {
				case p := <-b.order.proposals:
					p.answer <- txn.ErrNoQuorum
				case <-b.Context().Done():
					return
				}
			}
		}()
		for i, tx := range all {
			if e := b.want(tx, txn.StepAbort); e.Reason != txn.AbortNoQuorum {
				b.Errorf("reason %s", e.Reason)
			}
			begun := time.Duration(i) * 700 * time.Millisecond
			if waited := time.Since(start) - begun; waited > 10*time.Second {
				b.Errorf("number %d waited %s", i, waited)
			}
			b.forget(tx.GID())
		}
	})
}

// What cannot be ordered in parts is given up without waiting for an Abort entry, which cannot be ordered either.
func TestLargeWriteSetWithoutQuorum(t *testing.T) {
	run(t, func(b bench) {
		tx := b.begin()
		set := someSet()
		set.Chunks = 1
		b.Marked(tx.GID(), set, &someParts{parts: [][]byte{{1, 'I'}}}, nil)
		start := time.Now()
		(<-b.order.proposals).answer <- txn.ErrOutcomeUnknown
		b.want(tx, txn.StepAbort) // its last entry was not even proposed
		if waited := time.Since(start); waited != 10*time.Second {
			b.Errorf("waited %s", waited)
		}
	})
}

func TestDuplicateVerdictIsIgnored(t *testing.T) {
	run(t, func(b bench) {
		tx := b.begin()
		b.mark(tx)
		(<-b.order.proposals).answer <- txn.ErrOutcomeUnknown
		b.order.leader <- struct{}{}
		p := <-b.order.proposals
		b.Decided(tx.GID(), txn.Verdict{CSN: 31})
		p.answer <- nil
		if b.Decided(tx.GID(), txn.Verdict{Reason: txn.AbortDuplicate}) != nil {
			b.Error("decided twice")
		}
		release(tx)
		b.want(tx, txn.StepRelease)
		tx.Committed()
	})
}

type someParts struct {
	parts  [][]byte
	closed bool
}

func (p *someParts) Next() ([]byte, error) {
	if len(p.parts) == 0 {
		return nil, io.EOF
	}
	part := p.parts[0]
	p.parts = p.parts[1:]
	return part, nil
}

func (p *someParts) Close() error { p.closed = true; return nil }

func TestLargeWriteSetTravelsInParts(t *testing.T) {
	run(t, func(b bench) {
		tx := b.begin()
		parts := &someParts{parts: [][]byte{{1, 'I'}, {1, 'U'}}}
		set := someSet()
		set.Chunks = 2
		b.Marked(tx.GID(), set, parts, nil)
		for i := range 2 {
			p := <-b.order.proposals
			if p.entry.Chunk == nil || p.entry.Chunk.Part != uint32(i) || p.entry.Chunk.GID != tx.GID() {
				b.Fatalf("part %d: %+v", i, p.entry)
			}
			p.answer <- nil
		}
		p := <-b.order.proposals
		if len(p.entry.Transactions) != 1 || p.entry.Transactions[0].Chunks != 2 || !parts.closed {
			b.Errorf("last part: %+v", p.entry)
		}
		p.answer <- nil

		gone := b.begin()
		b.Marked(gone.GID(), set, &someParts{parts: [][]byte{{1, 'I'}, {1, 'U'}}}, nil)
		p = <-b.order.proposals
		gone.Lost()
		p.answer <- nil
		if p = <-b.order.proposals; p.entry.Abort == nil || p.entry.Abort.GID != gone.GID() {
			b.Fatalf("want an Abort entry, so that nodes drop the parts: %+v", p.entry)
		}
		p.answer <- nil
		b.want(gone, txn.StepAbort)
	})
}

func TestCloseAnswersEverybody(t *testing.T) {
	run(t, func(b bench) {
		waiting, inLog := b.begin(), b.begin()
		b.mark(inLog)
		<-b.order.proposals
		b.shut()
		b.want(waiting, txn.StepAbort)
		b.want(inLog, txn.StepUnknown)
		if _, err := b.Begin(b.Context(), 1, 1); !errors.Is(err, txn.ErrClosed) {
			b.Errorf("Begin after close: %v", err)
		}
	})
}
