package consensus

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/quorate/quorate/txn"
)

// ReadIndex is a read barrier. It returns an index such that a node whose machine has applied it (Status.AppliedIndex)
// has seen everything that was committed when the call began. It may be asked on any node. The error wraps
// txn.ErrNoQuorum, or txn.ErrOutcomeUnknown if ctx ends or the leader is lost while the question is under way; either
// way it may simply be asked again.
func (c *Consensus) ReadIndex(ctx context.Context) (txn.LogIndex, error) {
	began := time.Now()
	index, err := c.queue.do(ctx, newRequest(nil))
	if err != nil {
		return 0, fmt.Errorf("read index: %w", err)
	}
	c.contact.heard(began, index)
	return index, nil
}

// readRounds gives read barriers on the leader. One round, which costs a heartbeat to a majority, serves all that
// asked before it began; those who ask during one share the next.
type readRounds struct {
	mu      sync.Mutex
	next    []func(txn.LogIndex, error)
	running bool
}

// readBarrier calls answer, on another goroutine, once the barrier stands or has failed.
func (c *Consensus) readBarrier(answer func(txn.LogIndex, error)) {
	c.reads.mu.Lock()
	defer c.reads.mu.Unlock()
	c.reads.next = append(c.reads.next, answer)
	if !c.reads.running {
		c.reads.running = true
		c.futures.Go(c.runReadRounds)
	}
}

func (c *Consensus) runReadRounds() {
	for {
		c.reads.mu.Lock()
		askers := c.reads.next
		c.reads.next = nil
		c.reads.running = len(askers) > 0
		c.reads.mu.Unlock()
		if len(askers) == 0 {
			return
		}
		index, err := c.readRound()
		for _, answer := range askers {
			answer(index, err)
		}
	}
}

func (c *Consensus) readRound() (txn.LogIndex, error) {
	r := c.leading.current()
	if r.Leader != c.config.Node {
		return 0, fmt.Errorf("%w: not the leader", txn.ErrNoQuorum)
	}
	select {
	case <-r.primed:
	case <-r.ctx.Done():
		return 0, fmt.Errorf("%w: leadership lost", txn.ErrNoQuorum)
	case <-c.closing.Done():
		return 0, fmt.Errorf("%w: %w", txn.ErrNoQuorum, txn.ErrClosed)
	}
	// Whatever was acknowledged in this term was handed to the machine before that, and whatever earlier, before the
	// barrier that primed the reign.
	began := time.Now()
	index := txn.LogIndex(c.feed.handed.Load())
	// This only has heartbeats sent at once. Its answer is not worth waiting for. It counts members without a vote, and
	// answers to heartbeats that were under way already: if this process was frozen in between, they may be of a time
	// before somebody else was elected. And it never comes if whom it waits for is removed.
	_ = c.raft.VerifyLeader()
	for {
		_, _, changed := c.configured.read()
		ok, more := c.transport.answers.since(began, r.Term, voters(c.servers()), serverID(c.config.Node))
		// Had another led in between, index would say nothing about its entries.
		if !c.leads(r) {
			return 0, fmt.Errorf("%w: leadership lost", txn.ErrNoQuorum)
		}
		if ok {
			return index, nil
		}
		select {
		case <-more:
		case <-changed: // who is waited for may have lost its vote
		case <-r.ctx.Done(): // without a majority at the latest when the lease ends
		case <-c.closing.Done():
			return 0, fmt.Errorf("%w: %w", txn.ErrNoQuorum, txn.ErrClosed)
		}
	}
}
