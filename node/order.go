package node

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/events"
	"github.com/quorate/quorate/gateway"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/replication/apply"
	"github.com/quorate/quorate/replication/capture"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
	"github.com/quorate/quorate/txn/coord"
)

// This file holds the joints: each consumer declares the interface it needs in its own words, and here the packages
// that provide it are fitted to them.

// deliver takes the decisions of one log entry. Once the incarnation has ended, what commits is only told to the
// sessions that wait for it; the next one is given these entries again.
func (i *incarnation) deliver(decisions []replication.Decision) {
	i.noteDecisions(decisions)
	items := make([]apply.Item, 0, len(decisions))
	for _, d := range decisions {
		gid := d.Set.GID
		own := gid.Node == i.n.cfg.Node
		var held *coord.Transaction
		if own && gid.Incarnation == i.id {
			held = i.coord.Decided(gid, d.Verdict)
		}
		if !d.Verdict.Commits() {
			continue
		}
		item := apply.Item{CSN: d.Verdict.CSN, Index: d.Index, Set: d.Set, Chunks: d.Chunks}
		switch {
		case held != nil:
			item.Local = held
		case own && gid.Incarnation != i.id && item.CSN > i.start:
			var err error
			if item.Local, err = i.earlier(d); err != nil {
				i.fail(err)
				return
			}
		}
		items = append(items, item)
	}
	if i.ctx.Err() != nil {
		return
	}
	if err := i.pipeline.Enqueue(i.ctx, items...); err != nil {
		i.fail(fmt.Errorf("queue transactions for apply: %w", err))
	}
}

// earlier stands for a transaction that an earlier incarnation of this node proposed, and that may have committed.
type earlier struct{}

func (earlier) Release(ended func(committed bool)) { ended(false) }
func (earlier) PID() uint32                        { return 0 }
func (earlier) Visible(txn.CSN)                    {}

// machine fits an incarnation's replication.Machine to consensus.
type machine struct{ *incarnation }

func (m machine) Apply(entries []consensus.Entry) {
	for _, e := range entries {
		m.machine.Apply(e.Index, e.Data)
	}
}

func (m machine) Snapshot() (consensus.Snapshot, error) {
	s, err := m.machine.Snapshot()
	if err != nil {
		return nil, err
	}
	return snapshot{s}, nil
}

// Restore also checks what no snapshot is written without: that PostgreSQL holds durably what it covers.
func (m machine) Restore(r io.Reader) error {
	if err := m.machine.Restore(r); err != nil {
		return err
	}
	if begins := m.machine.LastCSN(); begins > m.start {
		err := fmt.Errorf("PostgreSQL has transactions up to %d only, and the log no longer those up to %d: it was set back, or is not this node's; clone the node: %w",
			m.start, begins, txn.ErrDiverged)
		m.fail(err) // Raft does not pass on what it is told, and tries an older snapshot
		return err
	}
	return nil
}

type snapshot struct{ *replication.Snapshot }

func (snapshot) Release() {}

// sink fits the coordinator to capture.
type sink struct{ *incarnation }

func (s sink) Expecting(seal txn.Seal) bool { return s.coord.Expecting(seal) }

func (s sink) Marked(m capture.Marker, set *txn.WriteSet, parts txn.Parts, err error) {
	s.coord.Marked(m.GID, set, parts, err)
}

func (s sink) Stray(xid uint32, lsn txn.LSN, rows uint64) {
	// Someone wrote behind the gateway's back: this node now holds rows that no other has.
	s.n.log.Error("a commit bypassed the gateway and was not replicated: this node differs from the others",
		logkey.XID, xid, logkey.LSN, lsn.String(), "rows", rows)
	s.n.strays.Inc()
	s.n.event(events.Error, eventStray, s.n.cfg.Node, "a commit bypassed the gateway and was not replicated: this node differs from the others",
		logkey.LSN, lsn.String(), "rows", strconv.FormatUint(rows, 10))
}

// coordinator fits the coordinator of the current incarnation to the gateway, whose sessions end before another begins.
type coordinator struct{ n *Node }

func (c coordinator) Applied() txn.CSN { return c.n.current.Load().coord.Applied() }

func (c coordinator) Reserve() txn.GID { return c.n.current.Load().coord.Reserve() }

func (c coordinator) Begin(ctx context.Context, gid txn.GID, base txn.CSN, pid uint32) (gateway.Commit, error) {
	if err := c.n.committing(); err != nil {
		return nil, fmt.Errorf("%w: %w", txn.ErrNoQuorum, err)
	}
	t, err := c.n.current.Load().coord.BeginAs(ctx, gid, base, pid)
	if err != nil {
		return nil, err
	}
	return t, nil
}

// TransactionStatus asks the log. If the log has no word on gid yet, the question puts one there: an Abort entry, so that
// what is answered stays true. It is in doubt as long as the log cannot be asked, or does not take the question because too
// many have been about what its origin has not proposed.
func (c coordinator) TransactionStatus(ctx context.Context, gid txn.GID) string {
	i, log := c.n.current.Load(), c.n.consensus.Load()
	if gid.Node == c.n.cfg.Node && gid.Incarnation == i.id && !i.coord.GaveOut(gid) {
		return gateway.StatusUnknown // an Abort would meet whoever gets it
	}
	steps := []func() (txn.LogIndex, error){
		func() (txn.LogIndex, error) { return 0, nil }, // what this node knows may be enough
		func() (txn.LogIndex, error) { return log.ReadIndex(ctx) },
		func() (txn.LogIndex, error) {
			return log.Propose(ctx, codec.AppendAbort(nil, codec.Abort{GID: gid, Reason: txn.AbortRequested}))
		},
	}
	outcome := replication.Forgotten
	for n, step := range steps {
		index, err := step()
		if err == nil {
			err = i.machine.WaitFor(ctx, index)
		}
		if err != nil {
			i.n.log.Info("the outcome of a transaction cannot be known now", logkey.GID, gid, logkey.Error, err)
			return gateway.StatusInDoubt
		}
		switch outcome = i.machine.Outcome(gid); {
		case outcome == replication.Committed:
			// Whoever hears of it should find it here. If that takes too long it is true all the same.
			if err := i.pipeline.WaitFor(ctx, i.machine.LastCSN()); err != nil {
				i.n.log.Info("a committed transaction is not visible here yet", logkey.GID, gid, logkey.Error, err)
			}
			return gateway.StatusCommitted
		case outcome == replication.Aborted:
			return gateway.StatusAborted
		case outcome == replication.Forgotten && n > 0:
			return gateway.StatusUnknown
		}
	}
	if outcome == replication.Undecided {
		i.n.log.Warn("the outcome of a transaction is not settled: too many questions about transactions that are still to come", logkey.GID, gid)
		return gateway.StatusInDoubt
	}
	return gateway.StatusUnknown // forgotten between the last two steps
}

// order fits consensus to the coordinator.
type order struct{ *incarnation }

// Admit waits while this node's PostgreSQL, or another's, is too far behind the log.
func (o order) Admit(ctx context.Context) error {
	defer o.n.noteFlowControl(time.Now())()
	if last := o.machine.LastCSN(); last > maxLag && o.pipeline.Applied() < last-maxLag {
		// What an incarnation that has ended still proposes is not for this node's PostgreSQL to wait for.
		if err := o.pipeline.WaitFor(ctx, last-maxLag); err != nil && o.ctx.Err() == nil {
			return fmt.Errorf("wait for apply to catch up: %w", err)
		}
	}
	return o.awaitOthers(ctx)
}

func (o order) Propose(ctx context.Context, data []byte) (txn.LogIndex, error) {
	return o.n.consensus.Load().Propose(ctx, data)
}

// AwaitDecided: the machine takes an entry when it has delivered those before.
func (o order) AwaitDecided(ctx context.Context, index txn.LogIndex) error {
	return o.machine.WaitFor(ctx, index)
}

// AwaitLeader is called after a proposal failed.
func (o order) AwaitLeader(ctx context.Context) error {
	return o.n.awaitLeader(ctx)
}

// prune lets the certifiers forget, by an entry in the log, so that all forget alike. Only the leader proposes it.
func (n *Node) prune(m *replication.Machine) {
	last, horizon := m.LastCSN(), m.Horizon()
	if last < horizon+horizonKeep+horizonStep {
		return
	}
	c := n.consensus.Load()
	if c == nil || c.Status().Leader != n.cfg.Node || !n.pruning.CompareAndSwap(false, true) {
		return
	}
	n.group.Go(func() error {
		defer n.pruning.Store(false)
		if _, err := c.Propose(n.ctx, codec.AppendHorizon(nil, last-horizonKeep)); err != nil {
			n.log.Warn("propose a horizon", logkey.CSN, last-horizonKeep, logkey.Error, err)
		}
		return nil
	})
}

func closeConn(ctx context.Context, conn *pgconn.PgConn) error {
	if err := conn.Close(ctx); err != nil {
		return fmt.Errorf("close connection to PostgreSQL: %w", err)
	}
	return nil
}
