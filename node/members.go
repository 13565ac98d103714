package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/quorate/quorate/admin"
	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/events"
	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// ledger is what follows the log here, with a PostgreSQL or without; nil before there is either.
func (n *Node) ledger() *replication.Machine {
	if i := n.current.Load(); i != nil {
		return i.machine
	}
	if o := n.observer.Load(); o != nil {
		return o.machine
	}
	return nil
}

// membership is who belongs to the cluster, as far as this node has the log.
func (n *Node) membership() replication.Membership {
	if m := n.ledger(); m != nil {
		return m.Membership()
	}
	return replication.Membership{}
}

// servers are the members of the Raft group.
func (n *Node) servers() []consensus.Member {
	if c := n.consensus.Load(); c != nil {
		return c.Members()
	}
	return nil
}

// members returns all members as of now, this node included, by id. Who they are the log says; before it has founded
// the cluster, the list of those who found it; and without a log, what was noted last. How they are reached, they have announced; of those who never have, Raft
// knows the addresses.
func (n *Node) members() []admin.Member { return n.membersIn(n.membership()) }

// membersIn is members by what the log says up to some place.
func (n *Node) membersIn(in replication.Membership) []admin.Member {
	known := make(map[txn.NodeID]admin.Member)
	listed := n.cfg.Members
	if noted := n.identity.get().Members; len(noted) > 0 {
		listed = noted
	}
	for _, m := range listed {
		known[m.ID] = admin.Member{ID: m.ID, Raft: m.Raft, GRPC: m.GRPC, HTTP: m.HTTP, Gateway: m.Gateway, Witness: m.Witness()}
	}
	for _, s := range n.servers() {
		m := known[s.Node]
		m.ID, m.Raft, m.GRPC = s.Node, s.RaftAddress, s.GRPCAddress
		known[s.Node] = m
	}
	for _, m := range in.Members {
		at, is := known[m.Node]
		if m.GRPCAddress != "" {
			at = admin.Member{ID: m.Node, Raft: m.RaftAddress, GRPC: m.GRPCAddress, HTTP: m.HTTPAddress, Gateway: m.GatewayAddress}
		} else if !is {
			continue
		}
		at.Witness = m.Role == codec.RoleWitness
		known[m.Node] = at
	}
	if in.Founded() {
		maps.DeleteFunc(known, func(id txn.NodeID, _ admin.Member) bool { _, is := in.Find(id); return !is })
	}
	return slices.SortedFunc(maps.Values(known), func(a, b admin.Member) int { return int(a.ID) - int(b.ID) })
}

// grpcAddress is where a member's gRPC server is.
func (n *Node) grpcAddress(id txn.NodeID) (string, bool) {
	for _, m := range n.members() {
		if m.ID == id {
			return m.GRPC, true
		}
	}
	return "", false
}

// membershipChanged takes from the log what has become of the members. When the log is read again, after a restart or with
// a new incarnation, so is what has become of them long ago: that is not noted again. Nor is what was before this node came.
func (n *Node) membershipChanged(c replication.Change, now replication.Membership) {
	self := n.cfg.Node
	if slices.Contains(c.Removed, self) {
		n.wasRemoved(c.Reason)
	} else if _, is := now.Find(self); !is {
		return
	}
	if !n.seen.events.News(uint64(c.Index)) {
		return
	}
	if c.Founded {
		n.log.Info("the log has founded the cluster")
	}
	if c.Admitted != 0 {
		n.log.Info("a member was admitted", "member", c.Admitted)
		n.event(events.Info, eventMemberAdmitted, c.Admitted, fmt.Sprintf("node %s was admitted", c.Admitted))
	}
	for _, id := range c.Removed {
		n.log.Info("a member was removed", "member", id, logkey.Reason, c.Reason)
		n.event(events.Info, eventMemberRemoved, id, fmt.Sprintf("node %s was removed: %s", id, c.Reason))
	}
}

// founding is the entry by which the log learns who the members are at first, nil if it is not for this node to say.
func (n *Node) founding(now replication.Membership) []byte {
	id := n.identity.get()
	switch {
	case now.Cluster == id.ClusterID, !id.Request.IsZero() && id.Previous.IsZero():
		return nil // known, or this node has joined and will be told
	case now.Founded() && id.Previous.IsZero():
		return nil
	case now.Founded():
		// Forced. Which cluster the log is of only the log knows: forcing may have been repeated before the node ran.
		return codec.AppendFound(nil, &codec.Found{Cluster: id.ClusterID, Previous: now.Cluster, Founders: []codec.Founder{n.founder(id.Node, 0, n.cfg.Witness())}})
	}
	f := &codec.Found{Cluster: id.ClusterID, MaxNodes: uint32(id.MaxNodes)}
	for slot, m := range n.cfg.Members {
		f.Founders = append(f.Founders, n.founder(m.ID, slot, m.Witness()))
	}
	if len(f.Founders) == 0 {
		f.Founders = []codec.Founder{n.founder(id.Node, 0, n.cfg.Witness())}
	}
	return codec.AppendFound(nil, f)
}

func (n *Node) founder(id txn.NodeID, slot int, witness bool) codec.Founder {
	f := codec.Founder{Node: id, Slot: uint32(slot)}
	if witness {
		f.Role = codec.RoleWitness
	}
	return f
}

// announce puts into the log that this node has started, and before it, if need be, who the members are.
func (n *Node) announce(ctx context.Context, m *replication.Machine, incarnation uint64, postgres string) error {
	self, c := n.cfg.Self(), n.consensus.Load()
	announcement := codec.AppendMember(nil, &codec.Member{
		Node: n.cfg.Node, Incarnation: incarnation, RaftAddress: self.Raft, GRPCAddress: self.GRPC,
		HTTPAddress: self.HTTP, GatewayAddress: self.Gateway, Version: n.version, PostgresVersion: postgres, Format: codec.Version,
	})
	try := func() error {
		index, err := c.ReadIndex(ctx)
		if err != nil {
			return err
		}
		if err := m.WaitFor(ctx, index); err != nil {
			return err
		}
		if err := n.checkAnnounced(m); err != nil {
			return err
		}
		if err := n.speak(ctx); err != nil {
			return err
		}
		if f := n.founding(m.Membership()); f != nil {
			if _, err := c.Propose(ctx, f); err != nil {
				return err
			}
		}
		_, err = c.Propose(ctx, announcement)
		return err
	}
	for {
		err := try()
		if err == nil || errors.Is(err, errSetBack) {
			return err
		}
		n.log.Info("the node is not in the cluster yet", logkey.Reason, err)
		if err := n.awaitLeader(ctx); err != nil {
			return err
		}
	}
}

// slot is this node's residue of every sequence. The log gives it out; before it has, the founders take theirs in the order of
// their list.
func (n *Node) slot() int {
	if m, is := n.membership().Find(n.cfg.Node); is && m.Slot != replication.NoSlot {
		return m.Slot
	}
	return max(0, slices.IndexFunc(n.cfg.Members, func(m config.Member) bool { return m.ID == n.cfg.Node }))
}

// maxNodes is among how many nodes sequences are divided. The log says it; before it does, the configuration that founds the cluster.
// PostgreSQL keeps what it was told first.
func (n *Node) maxNodes() int {
	return cmp.Or(n.membership().MaxNodes, n.identity.get().MaxNodes, replication.DefaultMaxNodes)
}
