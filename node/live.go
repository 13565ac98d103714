package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/replication/apply"
)

// live accompanies incarnations, the first and those that follow it, until ctx ends or one has ended for good. Then
// the node is fenced, but it still votes, stores the log and answers those who ask how it is.
//
// There is none at first if the node joins, and still has to get its data, or if PostgreSQL was away when it started.
func (n *Node) live(ctx context.Context, i *incarnation) {
	var waits patience
	catchingUp := "the node is catching up with the cluster"
	if i == nil {
		begin := n.reopen
		if n.identity.joining() {
			begin = n.join
		}
		var err error
		if i, err = begin(ctx, &waits); err != nil {
			n.liveWithout(err)
			return
		}
	}
	for {
		began := time.Now()
		n.states.set(stateCatchingUp, catchingUp)
		cause := n.accompany(ctx, i)
		waits.lasted(time.Since(began))
		if ctx.Err() != nil {
			cause = context.Cause(ctx)
		}
		switch {
		case ctx.Err() != nil, hopeless(cause):
			n.liveWithout(cause)
		default:
			reason := reasonOf(cause)
			n.states.set(stateRecovering, reason)
			// It may not be over: who looks should not have to be there at the right moment.
			catchingUp = "the node is catching up with the cluster; it had stopped because: " + reason
		}
		if err := i.end(); err != nil {
			n.log.Warn("end of what worked with PostgreSQL", logkey.Error, err)
		}
		if ctx.Err() != nil || hopeless(cause) {
			return
		}
		var err error
		if i, err = n.reopen(ctx, &waits); err != nil {
			n.liveWithout(err)
			return
		}
	}
}

// liveWithout says why there will be no more incarnation.
func (n *Node) liveWithout(cause error) {
	var lost logLost
	if errors.As(cause, &lost) && n.consensus.Load() != nil {
		// PostgreSQL, which was away when the node started, says so only now. It begins again, without the log. If that cannot be
		// noted the process ends: as long as it runs it votes.
		err := n.loseLog(lost)
		if err == nil {
			err = ErrReopen
		}
		n.cancel(err)
	}
	switch {
	case errors.Is(cause, errClosed):
	case errors.Is(cause, errRemoved):
		n.states.set(stateRemoved, cause.Error())
	default:
		n.states.set(stateFailed, cause.Error())
	}
}

// accompany makes the node active when the incarnation has caught up, and returns why it has ended.
func (n *Node) accompany(ctx context.Context, i *incarnation) error {
	defer context.AfterFunc(ctx, func() { i.fail(context.Cause(ctx)) })()
	began := time.Now()
	err := i.catchUp(i.ctx)
	if err == nil {
		err = n.becomeMember(i.ctx)
	}
	if err == nil {
		n.log.Info("the node accepts writes", logkey.CSN, i.pipeline.Applied(), logkey.Duration, time.Since(began))
		n.forgetSetAside()
		for i.ctx.Err() == nil {
			n.operational()
			if i.keepUp(i.ctx); i.ctx.Err() == nil {
				i.retire(i.ctx)
			}
		}
	} else if i.ctx.Err() == nil {
		i.fail(fmt.Errorf("catch up: %w", err))
	}
	return context.Cause(i.ctx)
}

// reopen takes PostgreSQL up again, however long that takes. An error is ctx's, or a hopeless one.
func (n *Node) reopen(ctx context.Context, waits *patience) (*incarnation, error) {
	for {
		timer := time.NewTimer(waits.wait())
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, context.Cause(ctx)
		}
		i, err := n.begin(ctx)
		if err == nil {
			n.current.Store(i)
			if err = n.consensus.Load().Replace(ctx, machine{i}); err == nil {
				n.recoveries.Inc()
				n.log.Info("PostgreSQL is taken up again", logkey.CSN, uint64(i.start))
				return i, nil
			}
			err = errors.Join(err, i.end())
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if hopeless(err) {
			return nil, err
		}
		n.states.set(stateRecovering, awayBecause(err))
		n.log.Warn("PostgreSQL cannot be taken up again yet", logkey.Error, err, logkey.Duration, waits.next)
	}
}

const serverAway = "the node's PostgreSQL server is not running"

func awayBecause(err error) string { return fmt.Sprintf("%s: %v", serverAway, err) }

// reasonOf says in the words of an operator why an incarnation has ended.
func reasonOf(err error) string {
	if errors.Is(err, apply.ErrServerLost) || errors.Is(err, errServerStopped) {
		return serverAway
	}
	return err.Error()
}
