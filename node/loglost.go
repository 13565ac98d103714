package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"

	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/internal/peers"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
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
func (n *Node) checkLog(ctx context.Context) error {
	id := n.identity.get()
	if id.LogLost != "" {
		n.fence(logLost(id.LogLost))
		return nil
	}
	dir := id.RaftDir(n.cfg.DataDir)
	term, last, err := consensus.Promised(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist) && id.Started:
		return n.loseLog(logLost("the log of this node, " + dir + ", is missing"))
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	for _, said := range n.recall(ctx) {
		if said.Term > term || said.CommitIndex > uint64(last) {
			return n.loseLog(logLost(fmt.Sprintf("the log was set back: it ends at entry %d and in term %d, and the node has told the others of entry %d and term %d",
				last, term, said.CommitIndex, said.Term)))
		}
	}
	return nil
}

// recall asks the other members, at once, what this node has last said of itself. Terms and the entries that it knew to be committed were
// on its disk before it spoke of them. Who does not answer in time, or was itself started since, knows nothing.
func (n *Node) recall(ctx context.Context) (said []*pb.Health) {
	ctx, cancel := context.WithTimeout(ctx, aliveTimeout)
	defer cancel()
	cluster := n.identity.get().ClusterID
	var mu sync.Mutex
	var asking sync.WaitGroup
	for _, id := range n.others() {
		asking.Go(func() {
			resp, err := n.recallAt(ctx, id, &pb.RecallRequest{ClusterId: cluster[:], Node: uint32(n.cfg.Node)})
			if err != nil {
				n.log.Debug("ask what this node has been", "member", id, logkey.Error, err)
				return
			}
			if resp.Health != nil {
				mu.Lock()
				defer mu.Unlock()
				said = append(said, resp.Health)
			}
		})
	}
	asking.Wait()
	return said
}

// recallAt asks over a connection of its own. The peers' one would be slow to try again where all nodes are starting, and
// whoever asks about the others then is told that they do not answer.
func (n *Node) recallAt(ctx context.Context, id txn.NodeID, req *pb.RecallRequest) (*pb.RecallResponse, error) {
	address, ok := n.grpcAddress(id)
	if !ok {
		return nil, peers.ErrUnknown
	}
	conn, err := n.dial(address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return pb.NewHeartbeatClient(conn).Recall(ctx, req)
}

// loseLog fences a node before it opens its log, for good.
func (n *Node) loseLog(why logLost) error {
	n.fence(why)
	return n.identity.change(func(id *config.Identity) { id.LogLost = string(why) })
}

// noteMembers keeps what a node without a log would have to know.
func (n *Node) noteMembers() error {
	in := n.membership()
	if !in.Founded() {
		return nil
	}
	var now []config.Member
	for _, m := range n.membersIn(in) {
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
