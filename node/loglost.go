package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/quorate/quorate/internal/config"
)

// A node whose log was set back, or is missing, has lost votes and entries that it has given its word for. If it voted, an
// election could be won without the acknowledged entries; if it was alone, it would found its cluster anew. So it does not
// take part in Raft, in this start and all that follow. It answers who asks how it is, until it joins the cluster anew
// ("quorate resync"), which it asks those for that it has last known as members.

// logLost is why the log is not worth anything any more.
type logLost string

func (l logLost) Error() string {
	return fmt.Sprintf("%s; the votes that the node gave are lost with it, and it does not vote any more: %v", string(l), errSetBack)
}

func (logLost) Unwrap() error { return errSetBack }

// checkLog finds out, before anything works with it, whether the log is lost.
func (n *Node) checkLog(context.Context) error {
	id := n.identity.get()
	if id.LogLost != "" {
		n.fence(logLost(id.LogLost))
		return nil
	}
	if !id.Started {
		return nil
	}
	dir := id.RaftDir(n.cfg.DataDir)
	switch _, err := os.Stat(dir); {
	case errors.Is(err, fs.ErrNotExist):
		return n.loseLog(logLost("the log of this node, " + dir + ", is missing"))
	case err != nil:
		return fmt.Errorf("look for the log: %w", err)
	}
	return nil
}

// loseLog fences a node before it opens its log, for good.
func (n *Node) loseLog(why logLost) error {
	n.fence(why)
	return n.identity.change(func(id *config.Identity) { id.LogLost = string(why) })
}

// noteMembers keeps what a node without a log would have to know.
func (n *Node) noteMembers() error {
	if !n.membership().Founded() {
		return nil
	}
	var now []config.Member
	for _, m := range n.members() {
		listed := config.Member{ID: m.ID, Raft: m.Raft, GRPC: m.GRPC, HTTP: m.HTTP, Gateway: m.Gateway}
		if m.Witness {
			listed.Role = config.RoleWitness
		}
		now = append(now, listed)
	}
	if slices.Equal(now, n.identity.get().Members) {
		return nil
	}
	return n.identity.change(func(id *config.Identity) { id.Members = now })
}
