package consensus

import (
	"bytes"
	"errors"
	"io"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/quorate/quorate/proto/quorate/consensus/v1"
	"github.com/quorate/quorate/txn"
)

// Link implements the service by which followers reach this node when it leads, at its GRPCAddress. Three goroutines serve a
// follower: this one sends, one receives and proposes, one waits for Raft's futures. They end when the follower hangs up or
// this node closes.
func (c *Consensus) Link(stream grpc.BidiStreamingServer[pb.ToLeader, pb.FromLeader]) error {
	if !c.calls.enter() {
		return status.Error(codes.Unavailable, "node is shutting down")
	}
	defer c.calls.leave()

	answers := &answerBox{ready: make(chan struct{}, 1)}
	admitted := make(chan txn.NodeID, 1)
	received := make(chan error, 1)
	c.futures.Go(func() { received <- c.serveRequests(stream, answers, admitted) })

	var follower txn.NodeID
	var notices chan struct{} // there is one after every commit
	var told noticed
	held := false // by a committed configuration, since the call began
	for {
		select {
		case follower = <-admitted:
			notices = c.notices.subscribe()
			defer c.notices.unsubscribe(notices)
			continue
		case <-answers.ready:
		case <-notices:
		case err := <-received: // the follower hung up, or is none
			return err
		case <-c.closing.Done():
			return status.Error(codes.Unavailable, "node is shutting down")
		}
		m := &pb.FromLeader{Answers: answers.take()}
		if n := c.notices.read(); n != told {
			told = n
			m.Notice = &pb.Notice{Term: n.term, Index: uint64(n.index)}
		}
		holds := c.configured.holds(follower)
		m.Removed = held && !holds
		held = held || holds
		if m.Answers == nil && m.Notice == nil && !m.Removed {
			continue
		}
		if err := stream.Send(m); err != nil {
			return err
		}
		if m.Removed {
			return errStranger(follower)
		}
	}
}

// serveRequests proposes what the follower sends until it stops. One that is being removed is refused everything, and
// told so when its removal is committed.
func (c *Consensus) serveRequests(stream grpc.BidiStreamingServer[pb.ToLeader, pb.FromLeader], answers *answerBox, admitted chan<- txn.NodeID) error {
	first, err := stream.Recv()
	if err != nil {
		return hungUp(err)
	}
	from, err := c.admit(first.GetHello())
	if err != nil {
		return err
	}
	admitted <- from
	proposed := c.newProposals()
	defer close(proposed.pending)
	for {
		m, err := stream.Recv()
		if err != nil {
			return hungUp(err)
		}
		_, member := c.member(from)
		for _, r := range m.GetRequests() {
			id := r.GetId()
			answer := func(index txn.LogIndex, err error) { answers.add(id, index, err) }
			if !member {
				answer(0, ErrNotMember)
				continue
			}
			switch body := r.GetBody().(type) {
			case *pb.Request_Read:
				c.readBarrier(answer)
			case *pb.Request_Propose:
				if len(body.Propose) == 0 || len(body.Propose) > MaxData {
					answer(0, errSize)
					continue
				}
				proposed.propose(c.raft, body.Propose, answer)
			default:
				answer(0, errRequest)
			}
		}
	}
}

var errRequest = errors.New("request of a kind not known here")

// admit says whether somebody is a follower of this node.
func (c *Consensus) admit(h *pb.Hello) (txn.NodeID, error) {
	from := txn.NodeID(h.GetFrom())
	switch _, ok := c.member(from); {
	case !bytes.Equal(h.GetCluster(), c.config.ClusterID[:]):
		return 0, status.Errorf(codes.PermissionDenied, "node %s is of another cluster", from)
	case txn.NodeID(h.GetTo()) != c.config.Node:
		return 0, status.Errorf(codes.FailedPrecondition, "this is node %s, not %d", c.config.Node, h.GetTo())
	case !ok:
		return 0, errStranger(from)
	}
	return from, nil
}

func errStranger(n txn.NodeID) error {
	return status.Errorf(codes.PermissionDenied, "node %s is not a member of this cluster", n)
}

// hungUp is what a call ends with whose caller has stopped sending.
func hungUp(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// answerBox gathers answers while the previous message is being sent.
type answerBox struct {
	ready chan struct{} // capacity 1

	mu      sync.Mutex
	waiting []*pb.Answer
}

func (b *answerBox) add(id uint64, index txn.LogIndex, err error) {
	a := &pb.Answer{Id: id, Outcome: pb.Outcome_OUTCOME_DONE, Index: uint64(index)}
	if err != nil {
		a.Outcome = pb.Outcome_OUTCOME_REFUSED
		if errors.Is(err, txn.ErrOutcomeUnknown) {
			a.Outcome = pb.Outcome_OUTCOME_UNKNOWN
		}
		a.Detail = err.Error()
	}
	b.mu.Lock()
	b.waiting = append(b.waiting, a)
	b.mu.Unlock()
	select {
	case b.ready <- struct{}{}:
	default:
	}
}

// take returns what has gathered, nil if nothing.
func (b *answerBox) take() []*pb.Answer {
	b.mu.Lock()
	defer b.mu.Unlock()
	taken := b.waiting
	b.waiting = nil
	return taken
}
