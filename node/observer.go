package node

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// observer follows the log on a node that has no PostgreSQL: a witness, one that is joining, or one whose data cannot be
// used. It knows who the members are, and takes no part in what they hold.
type observer struct {
	n       *Node
	machine *replication.Machine
	// keep says that the log is kept, all of it, for a PostgreSQL that is still to come and may need it.
	keep        bool
	incarnation uint64
	announced   chan struct{} // closed when the log says that this node has started
}

func (n *Node) newObserver(keep bool) (*observer, error) {
	o := &observer{n: n, keep: keep, announced: make(chan struct{})}
	var err error
	if o.incarnation, err = drawIncarnation(); err != nil {
		return nil, err
	}
	o.machine = replication.New(replication.Config{
		Deliver:   func([]replication.Decision) {},
		Processed: func(txn.LogIndex) { n.prune(o.machine) },
		Durable:   func(txn.CSN) error { return nil }, // nothing of it is here
		Member:    o.memberStarted,
		Changed:   func(c replication.Change) { n.membershipChanged(c, o.machine.Membership()) },
		Barrier:   func(codec.Barrier, txn.LogIndex) {},
		Fail:      n.fence,
	})
	return o, nil
}

func (o *observer) memberStarted(m codec.Member) {
	o.n.log.Info("a member has started", "member", m.Node, logkey.Address, m.GRPCAddress)
	if m.Node == o.n.cfg.Node && m.Incarnation == o.incarnation {
		select {
		case <-o.announced: // announced twice
		default:
			close(o.announced)
		}
	}
}

// errKept: the log must not be truncated.
var errKept = errors.New("the log is kept for the node's PostgreSQL")

// Apply implements consensus.Machine.
func (o *observer) Apply(entries []consensus.Entry) {
	for _, e := range entries {
		o.machine.Apply(e.Index, e.Data)
	}
}

// Snapshot implements consensus.Machine.
func (o *observer) Snapshot() (consensus.Snapshot, error) {
	if o.keep {
		return nil, errKept
	}
	s, err := o.machine.Snapshot()
	if err != nil {
		return nil, err
	}
	return snapshot{s}, nil
}

// Restore implements consensus.Machine.
func (o *observer) Restore(r io.Reader) error { return o.machine.Restore(r) }

// openObserver gives consensus something to feed until there is a PostgreSQL, or for good.
func (n *Node) openObserver(context.Context) error {
	o, err := n.newObserver(!n.cfg.Witness())
	if err == nil {
		n.observer.Store(o)
	}
	return err
}

// attend is what a witness does: it says that it is there.
func (n *Node) attend(ctx context.Context) error {
	o := n.observer.Load()
	n.states.set(stateCatchingUp, "the node is catching up with the cluster")
	if err := n.awaitAdmission(ctx, o); err != nil {
		return err
	}
	if err := n.announce(ctx, o.machine, o.incarnation, ""); err != nil {
		return err
	}
	select {
	case <-o.announced:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := n.becomeMember(ctx); err != nil {
		return err
	}
	n.states.set(stateActive, "")
	n.log.Info("the node votes and stores the log")
	<-ctx.Done()
	return context.Cause(ctx)
}

// awaitAdmission waits until the leader sends this node the log, and the log says that it is a member.
func (n *Node) awaitAdmission(ctx context.Context, o *observer) error {
	if !n.identity.joining() {
		return nil
	}
	for {
		index, err := n.consensus.Load().ReadIndex(ctx)
		if err == nil {
			err = o.machine.WaitFor(ctx, index)
		}
		if err == nil {
			if _, is := o.machine.Membership().Find(n.cfg.Node); is {
				return nil
			}
			err = fmt.Errorf("the log does not have node %s", n.cfg.Node)
		}
		n.log.Info("the log does not reach this node yet", logkey.Reason, err)
		if err := n.awaitLeader(ctx); err != nil {
			return err
		}
	}
}
