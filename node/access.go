package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/gateway"
	"github.com/quorate/quorate/internal/config"
)

// access says what clients may do, by how old what this node shows may be. It is asked before every statement.
func (n *Node) access() gateway.Access {
	if n.retired.Load() {
		return gateway.Behind
	}
	c := n.consensus.Load()
	return access(time.Since(asOf(c.Contact(), n.fresh.Load())), c.QuorumTimeout(), n.cfg.MaxStaleness, n.cfg.ReadsWithoutQuorum)
}

func access(age, quorumTimeout, maxStaleness time.Duration, readsWithoutQuorum string) gateway.Access {
	cutOff := age > quorumTimeout
	switch {
	case age > maxStaleness, cutOff && readsWithoutQuorum == config.ReadsRefused:
		return gateway.NoAccess
	case cutOff:
		return gateway.ReadOnly
	}
	return gateway.ReadWrite
}

// asOf returns the instant that clients are answered as of. A node that was frozen, or cut off, hears from the majority
// long before it has applied what was committed meanwhile: until then it counts from what it has, which was all of it at
// the instant fresh. In contact without a gap it is flow control that looks after nodes which lag.
func asOf(contact consensus.Contact, fresh *time.Time) time.Time {
	if fresh != nil && fresh.Before(contact.Since) {
		return *fresh
	}
	return contact.At
}

// freshTick is how often a node looks whether it shows what it has heard of. Nothing tells when; after a gap, clients wait
// for it.
const freshTick = 25 * time.Millisecond

// keepFresh notes the latest instant as of which PostgreSQL shows everything, until ctx ends.
func (i *incarnation) keepFresh(ctx context.Context) {
	ticker := time.NewTicker(freshTick)
	defer ticker.Stop()
	var next consensus.Contact // the one whose index is waited for
	for {
		if c := i.n.consensus.Load(); c != nil && next.At.IsZero() {
			next = c.Contact()
		}
		if !next.At.IsZero() && i.pipeline.AppliedIndex() >= next.Index {
			shown := next.At
			i.n.fresh.Store(&shown)
			next = consensus.Contact{}
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// admitting returns nil when clients may connect, be it to read only.
func (n *Node) admitting() error {
	if err := n.accepting(); err != nil {
		return err
	}
	if n.access() == gateway.NoAccess {
		return n.noQuorum()
	}
	return nil
}

// noQuorum says since when there is none.
func (n *Node) noQuorum() error {
	contact := n.consensus.Load().Contact()
	at := asOf(contact, n.fresh.Load())
	age := time.Since(at).Round(time.Millisecond)
	switch {
	case at.IsZero():
		return errors.New("no quorum: this node has not heard from a majority yet")
	case at.Before(contact.Since):
		return fmt.Errorf("no quorum: this node hears from a majority again, and has yet to apply what was committed in the last %v", age)
	}
	return fmt.Errorf("no quorum: this node last heard from a majority %v ago", age)
}
