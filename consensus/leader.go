package consensus

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
)

// Leadership is who leads.
type Leadership struct {
	Leader txn.NodeID // 0: not known
	Term   uint64     // the term in which this was seen
}

// reign is one value of Leadership and how long it lasted.
type reign struct {
	Leadership
	ctx context.Context // ends with it
	end context.CancelFunc
	// primed is closed once this node, leading, has had a barrier of its term committed, and with it everything that
	// earlier leaders acknowledged.
	primed chan struct{}
}

// leadership follows Raft's observations.
type leadership struct {
	mu  sync.Mutex
	now *reign
}

func newLeadership() *leadership {
	l := &leadership{}
	l.now = newReign(Leadership{})
	return l
}

func newReign(of Leadership) *reign {
	r := &reign{Leadership: of, primed: make(chan struct{})}
	r.ctx, r.end = context.WithCancel(context.Background())
	return r
}

func (l *leadership) current() *reign {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now
}

// set begins a new reign if who leads has changed, and returns it, otherwise nil.
func (l *leadership) set(to Leadership) *reign {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.now.Leadership == to {
		return nil
	}
	l.now.end()
	l.now = newReign(to)
	return l.now
}

// Leadership returns who leads, and a channel that is closed when that is no longer so.
func (c *Consensus) Leadership() (Leadership, <-chan struct{}) {
	r := c.leading.current()
	return r.Leadership, r.ctx.Done()
}

// WaitLeader waits until a leader is known. The error wraps txn.ErrNoQuorum, and txn.ErrClosed after Close.
func (c *Consensus) WaitLeader(ctx context.Context) (txn.NodeID, error) {
	for {
		l, changed := c.Leadership()
		if l.Leader != 0 {
			return l.Leader, nil
		}
		select {
		case <-changed:
		case <-c.closing.Done():
			return 0, fmt.Errorf("wait for a leader: %w: %w", txn.ErrNoQuorum, txn.ErrClosed)
		case <-ctx.Done():
			return 0, fmt.Errorf("wait for a leader: %w: %w", txn.ErrNoQuorum, ctx.Err())
		}
	}
}

// observe turns Raft's observations into reigns until Raft has stopped.
func (c *Consensus) observe(events <-chan raft.Observation) {
	c.readLeadership()
	for {
		select {
		case event := <-events:
			if event.Data == raft.Candidate {
				c.metrics.elections.Inc()
			}
			// Events only say when to look: what they carry may be old already.
			c.readLeadership()
		case <-c.stopped:
			c.leading.set(Leadership{})
			return
		}
	}
}

func (c *Consensus) readLeadership() {
	_, id := c.raft.LeaderWithID()
	to := Leadership{Leader: nodeID(id), Term: c.raft.CurrentTerm()}
	if to.Leader == c.config.Node && c.raft.State() != raft.Leader {
		to.Leader = 0 // stepping down
	}
	r := c.leading.set(to)
	if r == nil {
		return
	}
	c.logger.Info("leadership changed", "leader", to.Leader, logkey.Term, to.Term)
	if to.Leader == c.config.Node {
		c.prime(r)
	}
}

// prime has a barrier committed at the beginning of a reign of this node. With it, all that earlier leaders
// acknowledged is committed and handed to the machine, so that read barriers may be given; and followers, by the
// notice, apply it without waiting for Raft's next message.
func (c *Consensus) prime(r *reign) {
	if !c.calls.enter() {
		return
	}
	go func() {
		defer c.calls.leave()
		for !c.primeOnce(r) {
			// Refused because of a transfer that may yet fail and leave us leading. Nothing tells when it does.
			timer := time.NewTimer(c.config.HeartbeatTimeout / 10)
			select {
			case <-timer.C:
			case <-r.ctx.Done():
			case <-c.closing.Done():
			}
			timer.Stop()
			if r.ctx.Err() != nil || c.closing.Err() != nil {
				return
			}
		}
	}()
}

func (c *Consensus) primeOnce(r *reign) bool {
	err := c.raft.Barrier(0).Error()
	c.transfers.proposed(err)
	if err != nil {
		c.logger.Info("barrier of new leader failed", logkey.Term, r.Term, logkey.Error, err)
		return false
	}
	index := c.raft.CommitIndex()
	if !c.leads(r) {
		return false
	}
	// index is of this term, because the barrier is.
	c.notices.publish(r.Term, txn.LogIndex(index))
	close(r.primed)
	return true
}

// leads reports whether this node has led without interruption since r began.
func (c *Consensus) leads(r *reign) bool {
	return r.Leader == c.config.Node && c.raft.State() == raft.Leader && c.raft.CurrentTerm() == r.Term
}

// TransferLeadership makes another voter lead: to, or with 0 the one that is furthest. It returns when that one does. On
// a node that does not lead the error wraps ErrNotLeader. The target is first brought up to date; if that takes longer
// than the election timeout, this node goes on leading. Meanwhile, proposals are refused.
func (c *Consensus) TransferLeadership(ctx context.Context, to txn.NodeID) error {
	if err := c.transferLeadership(ctx, to); err != nil {
		return fmt.Errorf("transfer leadership to %s: %w", successor(to), err)
	}
	return nil
}

func successor(n txn.NodeID) string {
	if n == 0 {
		return "another node"
	}
	return "node " + n.String()
}

func (c *Consensus) transferLeadership(ctx context.Context, to txn.NodeID) error {
	if !c.calls.enter() {
		return fmt.Errorf("%w: %w", ErrNotLeader, txn.ErrClosed)
	}
	defer c.calls.leave()
	r := c.leading.current()
	if r.Leader != c.config.Node {
		return errNotLeader(r.Leadership)
	}
	ask := c.raft.LeadershipTransfer
	if to != 0 {
		s, err := find(c.servers(), to)
		switch {
		case err != nil:
			return err
		case s.Suffrage != raft.Voter:
			return errors.New("it has no vote")
		case to == c.config.Node:
			return nil
		}
		ask = func() raft.Future { return c.raft.LeadershipTransferToServer(s.ID, s.Address) }
	}
	c.transfers.begin()
	answer := make(chan error, 1)
	c.futures.Go(func() { answer <- ask().Error() })
	select {
	case err := <-answer:
		if errors.Is(err, raft.ErrNotLeader) {
			return fmt.Errorf("%w: %w", ErrNotLeader, err)
		}
		if err != nil {
			return err
		}
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	leader, err := c.waitOther(ctx, r)
	if err == nil && leader != to && to != 0 {
		err = fmt.Errorf("node %s was elected", leader)
	}
	return err
}

// waitOther waits until the reign has ended and who leads next is known.
func (c *Consensus) waitOther(ctx context.Context, r *reign) (txn.NodeID, error) {
	select {
	case <-r.ctx.Done():
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	return c.WaitLeader(ctx)
}

// transferWatch finds out that a leadership transfer never ends: one that a step-down interrupts can leave Raft
// believing that it is in progress, so that this node, elected again, refuses every proposal for ever
// (hashicorp/raft issue 696). Only a new Raft instance gets out of that.
type transferWatch struct {
	limit time.Duration // longer than any transfer
	stuck func(error)

	refusing atomic.Bool // since is set; spares the lock for those that succeed
	mu       sync.Mutex
	since    time.Time // of the first refusal after the last success; zero: none
}

// begin forgets what earlier transfers did.
func (w *transferWatch) begin() { w.proposed(nil) }

// proposed is told the outcome of every proposal to this node's Raft.
func (w *transferWatch) proposed(err error) {
	if !errors.Is(err, raft.ErrLeadershipTransferInProgress) {
		if w.refusing.Load() && !errors.Is(err, raft.ErrNotLeader) {
			w.mu.Lock()
			w.since = time.Time{}
			w.refusing.Store(false)
			w.mu.Unlock()
		}
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.since.IsZero() {
		w.since = time.Now()
		w.refusing.Store(true)
		return
	}
	if lasted := time.Since(w.since); lasted > w.limit {
		w.stuck(fmt.Errorf("%w: proposals have been refused for %v", ErrTransferStuck, lasted))
	}
}

// classify wraps what Raft says about a proposal into what is known about it.
func classify(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress),
		errors.Is(err, raft.ErrEnqueueTimeout), errors.Is(err, raft.ErrAbortedByRestore):
		return fmt.Errorf("%w: %w", txn.ErrNoQuorum, err)
	}
	return fmt.Errorf("%w: %w", txn.ErrOutcomeUnknown, err)
}

// noticeBoard shows the newest commit notice to every link that this node serves.
type noticeBoard struct {
	mu     sync.Mutex
	newest noticed
	links  map[chan struct{}]bool // each of capacity 1
}

type noticed struct {
	term  uint64
	index txn.LogIndex
}

func newNoticeBoard() *noticeBoard { return &noticeBoard{links: make(map[chan struct{}]bool)} }

func (b *noticeBoard) publish(term uint64, index txn.LogIndex) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if term < b.newest.term || term == b.newest.term && index <= b.newest.index {
		return
	}
	b.newest = noticed{term, index}
	for wake := range b.links {
		select {
		case wake <- struct{}{}:
		default:
		}
	}
}

func (b *noticeBoard) read() noticed {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.newest
}

// subscribe returns a channel that has something in it after each publish. A link that comes late has one at once.
func (b *noticeBoard) subscribe() chan struct{} {
	wake := make(chan struct{}, 1)
	wake <- struct{}{}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.links[wake] = true
	return wake
}

func (b *noticeBoard) unsubscribe(wake chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.links, wake)
}
