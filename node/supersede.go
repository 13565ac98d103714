package node

import (
	"context"
	"fmt"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/logkey"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// supersede has the member leave that this node was joined to replace ("quorate join --replace"). It asks until that one is no member
// any more; the identity remembers it for later starts.
func (n *Node) supersede(ctx context.Context, id txn.NodeID) error {
	for pause := firstAttempt; ; pause = min(2*pause, lastAttempt) {
		err := n.supersedeOnce(ctx, id)
		if err == nil || status.Code(err) == codes.NotFound {
			break
		}
		n.log.Info("the member that this node replaces has not left yet", "member", id, logkey.Reason, err)
		wait := pause
		if status.Code(err) == codes.FailedPrecondition {
			wait = hopelessAttempt // each attempt sends that member's clients away
		}
		if sleep(ctx, wait) != nil {
			return nil // the node ends, and goes on with it when it is started again
		}
	}
	n.log.Info("this node has replaced a member", "member", id)
	if err := n.identity.change(func(is *config.Identity) { is.Supersedes = 0 }); err != nil {
		n.log.Warn("that this node has replaced a member is not on disk: the next start looks again", logkey.Error, err)
	}
	return nil
}

// supersedeOnce has a member leave, or removes it if it does not answer. What would cost the cluster its quorum or its data is refused,
// and so it waits for that to pass.
func (n *Node) supersedeOnce(ctx context.Context, id txn.NodeID) error {
	if s := n.states.current(); s.name != stateActive {
		return fmt.Errorf("this node is %s", s.name)
	}
	ask := n.askMembership()
	_, err := ask.Leave(ctx, &pb.LeaveRequest{Node: uint32(id)})
	if status.Code(err) == codes.Unavailable {
		_, err = ask.Remove(ctx, &pb.RemoveRequest{Node: uint32(id), Reason: fmt.Sprintf("node %s has taken its place", n.cfg.Node)})
	}
	if err != nil {
		return err
	}
	votes := func(s consensus.Member) bool { return s.Node == n.cfg.Node && s.Voter }
	if slices.ContainsFunc(n.servers(), votes) {
		return nil
	}
	// There was no room for its vote as long as the other one had one.
	_, err = ask.Promote(ctx, &pb.PromoteRequest{Node: uint32(n.cfg.Node)})
	return err
}
