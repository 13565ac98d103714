package node

import (
	"errors"
	"fmt"
	"time"

	"github.com/quorate/quorate/gateway"
	"github.com/quorate/quorate/internal/config"
)

// access says what clients may do, by how long ago this node last heard from a majority. It is asked before every
// statement.
func (n *Node) access() gateway.Access {
	if n.retired.Load() {
		return gateway.Behind
	}
	c := n.consensus.Load()
	return access(time.Since(c.QuorumContact()), c.QuorumTimeout(), n.cfg.MaxStaleness, n.cfg.ReadsWithoutQuorum)
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
	at := n.consensus.Load().QuorumContact()
	if at.IsZero() {
		return errors.New("no quorum: this node has not heard from a majority yet")
	}
	return fmt.Errorf("no quorum: this node last heard from a majority %v ago", time.Since(at).Round(time.Millisecond))
}
