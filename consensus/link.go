package consensus

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"

	"github.com/quorate/quorate/internal/logkey"
	pb "github.com/quorate/quorate/proto/quorate/consensus/v1"
	"github.com/quorate/quorate/txn"
)

// Link retries. A failed attempt is not repeated at once, because nothing tells when the other side is ready: its
// Raft, which made it leader, may be up before its gRPC server.
const (
	linkRetryMin = 20 * time.Millisecond
	linkRetryMax = time.Second
)

// runLink carries the queue's requests to whoever leads, until closing.
func (c *Consensus) runLink() {
	retry := linkRetryMin
	for {
		r := c.leading.current()
		switch r.Leader {
		case 0:
			c.queue.admit(errNoLeader)
			select {
			case <-r.ctx.Done():
			case <-c.closing.Done():
				return
			}
		case c.config.Node:
			c.queue.admit(nil)
			if !c.localLink(r) {
				return
			}
		default:
			c.queue.admit(nil)
			began := time.Now()
			err := c.remoteLink(r)
			if c.closing.Err() != nil {
				return
			}
			if r.ctx.Err() != nil { // someone else leads now
				retry = linkRetryMin
				continue
			}
			c.logger.Warn("link to leader failed", "leader", r.Leader, logkey.Error, err)
			if time.Since(began) > linkRetryMax {
				retry = linkRetryMin
			}
			timer := time.NewTimer(retry)
			select {
			case <-timer.C:
			case <-r.ctx.Done():
			case <-c.closing.Done():
			}
			timer.Stop()
			retry = min(2*retry, linkRetryMax)
		}
	}
}

// localLink proposes to this node's own Raft while it leads. It returns false when closing.
func (c *Consensus) localLink(r *reign) bool {
	var batch []*request
	for {
		select {
		case <-c.queue.ready:
		case <-r.ctx.Done():
			return true
		case <-c.closing.Done():
			return false
		}
		batch = c.queue.take(batch[:0])
		for _, q := range batch {
			if q.data == nil {
				c.readBarrier(q.finish)
				continue
			}
			c.local.propose(c.raft, q.data, q.finish)
		}
		clear(batch)
	}
}

// proposals waits for the futures of one source of proposals, in the order in which they were made. That is the order
// in which Raft resolves them, so that one goroutine is enough for any number.
type proposals struct {
	pending chan proposal
}

type proposal struct {
	future raft.ApplyFuture
	answer func(txn.LogIndex, error)
}

// newProposals starts the goroutine; close(pending) ends it once every future is resolved.
func (c *Consensus) newProposals() *proposals {
	p := &proposals{pending: make(chan proposal, 4*maxAppend)}
	c.futures.Go(func() {
		for w := range p.pending {
			err := w.future.Error()
			c.transfers.proposed(err)
			if err != nil {
				w.answer(0, classify(err))
				continue
			}
			w.answer(txn.LogIndex(w.future.Index()), nil)
		}
	})
	return p
}

// propose blocks while Raft or answer is busy: that is the back-pressure.
func (p *proposals) propose(to *raft.Raft, data []byte, answer func(txn.LogIndex, error)) {
	p.pending <- proposal{to.ApplyLog(raft.Log{Data: data}, 0), answer}
}

// remoteLink sends requests to another leader, and takes its answers and commit notices. It ends, with the cause,
// when the stream breaks, when another leads and when closing. What was sent and not answered is then unknown.
func (c *Consensus) remoteLink(r *reign) error {
	conn, err := c.connect(r.Leader)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	defer context.AfterFunc(c.closing, cancel)()
	stream, err := pb.NewConsensusClient(conn).Link(ctx, grpc.WaitForReady(true))
	if err != nil {
		return fmt.Errorf("open link: %w", err)
	}
	hello := &pb.ToLeader{Hello: &pb.Hello{
		Cluster: c.config.ClusterID[:], From: uint32(c.config.Node), To: uint32(r.Leader),
	}}
	if err := stream.Send(hello); err != nil && !errors.Is(err, io.EOF) { // of which the receiver learns the cause
		return fmt.Errorf("open link: %w", err)
	}
	sent := newSentRequests()
	var receiver sync.WaitGroup
	receiver.Go(func() {
		defer cancel()
		err = c.receive(stream, sent)
	})

	var batch []*request
	var sendErr error
	for sendErr == nil {
		select {
		case <-c.queue.ready:
			batch = c.queue.take(batch[:0])
			// gRPC has serialised the message when Send returns, or on error the receiver knows the cause.
			sendErr = stream.Send(sent.message(batch))
			clear(batch)
			continue
		case <-ctx.Done():
		}
		break
	}
	cancel()
	receiver.Wait()
	sent.abandon(err)
	return err
}

// receive handles what the leader sends until the stream ends.
func (c *Consensus) receive(stream grpc.BidiStreamingClient[pb.ToLeader, pb.FromLeader], sent *sentRequests) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("receive from leader: %w", err)
		}
		// The notice first: it lets Raft work while the answers wake their callers.
		if n := m.GetNotice(); n != nil {
			c.transport.notice(n.GetTerm(), n.GetIndex())
		}
		for _, a := range m.GetAnswers() {
			sent.answer(a)
		}
		if m.GetRemoved() {
			c.configured.gone()
		}
	}
}

// sentRequests are those of one stream that have no answer yet.
type sentRequests struct {
	mu   sync.Mutex
	last uint64
	open map[uint64]*request
}

func newSentRequests() *sentRequests { return &sentRequests{open: make(map[uint64]*request)} }

// message numbers the requests, remembers them and makes the message that carries them.
func (s *sentRequests) message(batch []*request) *pb.ToLeader {
	m := &pb.ToLeader{Requests: make([]*pb.Request, len(batch))}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, r := range batch {
		s.last++
		s.open[s.last] = r
		if r.data == nil {
			m.Requests[i] = &pb.Request{Id: s.last, Body: &pb.Request_Read{Read: &pb.ReadBarrier{}}}
			continue
		}
		m.Requests[i] = &pb.Request{Id: s.last, Body: &pb.Request_Propose{Propose: r.data}}
	}
	return m
}

// answer ends the request that a speaks of. One that is not open is ignored.
func (s *sentRequests) answer(a *pb.Answer) {
	s.mu.Lock()
	r := s.open[a.GetId()]
	delete(s.open, a.GetId())
	s.mu.Unlock()
	if r == nil {
		return
	}
	switch a.GetOutcome() {
	case pb.Outcome_OUTCOME_DONE:
		r.finish(txn.LogIndex(a.GetIndex()), nil)
	case pb.Outcome_OUTCOME_REFUSED:
		r.finish(0, fmt.Errorf("%w: leader: %s", txn.ErrNoQuorum, a.GetDetail()))
	default:
		r.finish(0, fmt.Errorf("%w: leader: %s", txn.ErrOutcomeUnknown, a.GetDetail()))
	}
}

// abandon ends all that is open, unknown because of err.
func (s *sentRequests) abandon(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, r := range s.open {
		delete(s.open, id)
		r.finish(0, fmt.Errorf("%w: link to leader lost: %w", txn.ErrOutcomeUnknown, err))
	}
}

// connection leads to a member's gRPC server.
type connection struct {
	*grpc.ClientConn
	address string
}

// connect returns the connection to a member's gRPC server, which is made once for an address and mends itself.
func (c *Consensus) connect(to txn.NodeID) (*grpc.ClientConn, error) {
	m, ok := c.member(to)
	if !ok { // the log here may not be so far
		return nil, fmt.Errorf("connect to node %s: its gRPC address is not known yet", to)
	}
	had, ok := c.conns[to]
	if ok && had.address == m.GRPCAddress {
		return had.ClientConn, nil
	}
	conn, err := grpc.NewClient(m.GRPCAddress, c.dialOptions...)
	if err != nil {
		return nil, fmt.Errorf("connect to node %s: %w", to, err)
	}
	c.conns[to] = connection{conn, m.GRPCAddress}
	if ok {
		err = had.Close()
	}
	return conn, err
}
