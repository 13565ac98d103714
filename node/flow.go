package node

import (
	"context"
	"fmt"
	"time"

	"github.com/quorate/quorate/internal/logkey"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// Flow control. What a member has not applied yet waits in its log, so nobody's memory depends on it; but a member that
// falls ever further behind is of no use. So first the others slow down for it. If that is no help, and a majority
// keeps up without it, it retires: it is not active until it has caught up, and nobody waits for it. Both go by
// heartbeats. A member that is not heard is not waited for.

const (
	// maxLag is how many transactions this node's own PostgreSQL may be behind the log before the node stops taking new ones
	// into the log: its own clients then wait for it, instead of queues growing. It is below limits.apply_transactions,
	// beyond which the log is not read.
	maxLag = 2048
	// maxDelay is the longest that a proposal is held up while it still passes.
	maxDelay = 250 * time.Millisecond
)

// throttle returns how long a proposal is to be held up for a member that is lag transactions behind, or that it must wait
// until that is less.
func throttle(lag, limit uint64) (delay time.Duration, wait bool) {
	switch {
	case lag <= limit:
		return 0, false
	case lag >= 2*limit:
		return 0, true
	}
	return time.Duration(float64(maxDelay) * float64(lag-limit) / float64(limit)), false
}

// behind returns how many transactions a member lags behind the newest, if that counts: it is active, and holds data. A
// witness applies nothing, and nobody waits for it.
func behind(h *pb.Health, newest uint64) (lag uint64, counts bool) {
	if h.GetState() != stateActive || h.AppliedCsn == nil {
		return 0, false
	}
	return newest - min(newest, h.GetAppliedCsn()), true
}

// slowest returns how far behind the slowest active member is that is heard, other than this node.
func (n *Node) slowest(last txn.CSN) (slowest uint64) {
	n.seen.beats.EachHeard(func(_ txn.NodeID, h *pb.Health) {
		lag, _ := behind(h, uint64(last))
		slowest = max(slowest, lag)
	})
	return slowest
}

// awaitOthers holds up a proposal for as long as flow control asks.
func (o order) awaitOthers(ctx context.Context) error {
	for {
		news := o.n.seen.beats.News()
		lag := o.n.slowest(o.machine.LastCSN())
		delay, wait := throttle(lag, uint64(o.n.cfg.Limits.Lag))
		if delay == 0 && !wait {
			return nil
		}
		if !wait {
			news = nil // once is enough, whatever comes
		} else {
			delay = maxDelay // it may not be heard any more, of which there are no news
		}
		timer := time.NewTimer(delay)
		select {
		case <-news:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("wait for a member that is %d transactions behind: %w", lag, context.Cause(ctx))
		}
		timer.Stop()
		if !wait {
			return nil
		}
	}
}

// keepUp returns when this node has held up the others for too long: it is so far behind, and most of those that are active
// are not. That keeps nodes from retiring one after the other when there is simply too much to do for all.
func (i *incarnation) keepUp(ctx context.Context) {
	limit := uint64(i.n.cfg.Limits.Lag)
	var since time.Time
	i.lookAtLag(ctx, func(lag uint64, active, keeping int) bool {
		switch {
		case lag <= limit:
			since = time.Time{}
		case since.IsZero():
			since = time.Now()
		}
		return !since.IsZero() && time.Since(since) >= i.n.cfg.Limits.LagPatience && keeping > active/2
	})
}

// retire waits until this node, of which clients expect nothing meanwhile, has nearly caught up.
func (i *incarnation) retire(ctx context.Context) {
	n := i.n
	n.retired.Store(true)
	defer n.retired.Store(false)
	reason := "PostgreSQL is behind what the cluster commits, and the others do not wait any more"
	n.states.set(stateCatchingUp, reason)
	n.log.Warn("the node is not active until it has caught up", logkey.Reason, reason, logkey.CSN, i.pipeline.Applied())
	i.lookAtLag(ctx, func(lag uint64, _, _ int) bool { return lag <= uint64(n.cfg.Limits.Lag)/4 })
}

// lookAtLag calls done now and then, until it says so or ctx ends, with how far this node is behind, how many nodes are
// active, this one included, and how many of those are not as far behind as the limit.
func (i *incarnation) lookAtLag(ctx context.Context, done func(lag uint64, active, keeping int) bool) {
	ticker := time.NewTicker(observeTick)
	defer ticker.Stop()
	for {
		newest := uint64(i.machine.LastCSN())
		i.n.seen.beats.EachHeard(func(_ txn.NodeID, h *pb.Health) { newest = max(newest, h.GetCsn()) })
		active, keeping := 1, 0
		limit := uint64(i.n.cfg.Limits.Lag)
		i.n.seen.beats.EachHeard(func(_ txn.NodeID, h *pb.Health) {
			if lag, counts := behind(h, newest); counts {
				active++
				if lag <= limit {
					keeping++
				}
			}
		})
		if done(newest-min(newest, uint64(i.pipeline.Applied())), active, keeping) {
			return
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}
