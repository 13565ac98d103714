package node

import (
	"maps"
	"slices"

	"github.com/quorate/quorate/admin"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/txn"
)

// members returns all members as of now, this node included, by id.
func (n *Node) members() []admin.Member {
	known := make(map[txn.NodeID]admin.Member)
	for _, m := range n.cfg.Members {
		known[m.ID] = admin.Member{ID: m.ID, Raft: m.Raft, GRPC: m.GRPC, HTTP: m.HTTP, Gateway: m.Gateway}
	}
	if i := n.current.Load(); i != nil {
		for _, m := range i.machine.Membership().Members { // by what they have announced, which is newer
			known[m.Node] = admin.Member{ID: m.Node, Raft: m.RaftAddress, GRPC: m.GRPCAddress, HTTP: m.HTTPAddress, Gateway: m.GatewayAddress}
		}
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

// membershipChanged takes from the log what has become of the members.
func (n *Node) membershipChanged(c replication.Change) {
	if c.Founded {
		n.log.Info("the log has founded the cluster")
	}
	if c.Admitted != 0 {
		n.log.Info("a member was admitted", "member", c.Admitted)
	}
	for _, id := range c.Removed {
		n.log.Info("a member was removed", "member", id, logkey.Reason, c.Reason)
	}
}
