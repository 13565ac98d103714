package node

import (
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/txn"
)

// ForceNewCluster makes a cluster of its own of a node that does not run, for when the majority is gone for good. It goes on
// with what this node's log holds; what was acknowledged and only others had is lost. The cluster has another id from then on,
// by which the members that are believed to be gone stay out of it, should they come back. It returns the last index of the log. Interrupted
// anywhere, it can be called again, and must be before the node runs.
func ForceNewCluster(cfg config.Config, log *slog.Logger) (last txn.LogIndex, err error) {
	id, err := config.ReadIdentity(cfg.DataDir)
	if err != nil {
		return 0, err
	}
	switch {
	case cfg.Witness():
		return 0, errors.New("this node is a witness: a cluster cannot go on without data")
	case id.State != config.StateMember && id.State != config.StateRecovering:
		return 0, fmt.Errorf("this node is %s: only a member can go on alone", id.State)
	case !id.Started:
		return 0, errors.New("this node has never been in the cluster: it has nothing to go on with")
	}
	if _, err := os.Stat(id.RaftDir(cfg.DataDir)); err != nil {
		return 0, fmt.Errorf("this node's log is missing, and with it what it could go on with: %w", err)
	}
	if id.State == config.StateMember {
		id.State, id.Previous, id.ClusterID, id.Rejoin = config.StateRecovering, id.ClusterID, txn.NewUUID(), txn.UUID{}
		if err := id.Save(cfg.DataDir); err != nil {
			return 0, err
		}
	}
	self := cfg.Self()
	last, err = consensus.RecoverCluster(
		consensus.Config{Node: id.Node, Dir: id.RaftDir(cfg.DataDir), RaftAddress: cfg.Listen.Raft, Logger: log},
		consensus.Member{Node: id.Node, RaftAddress: self.Raft, GRPCAddress: self.GRPC})
	if err != nil {
		return 0, err
	}
	id.State, id.LogLost = config.StateMember, ""
	return last, id.Save(cfg.DataDir)
}
