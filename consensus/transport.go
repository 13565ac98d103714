package consensus

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// rpcTimeout bounds one Raft message between members, answer included, and connecting. An install of a snapshot gets
// this much for every 256 KiB.
const rpcTimeout = 5 * time.Second

// transport is Raft's TCP transport with three changes to what reaches Raft from other members:
//
//   - Heartbeats that could change term or state go to Raft's main thread (filterHeartbeat).
//   - Commit notices become AppendEntries messages (notice, stored).
//   - Snapshots are refused unless this node holds nothing (inspect).
//
// And it notes when other members were last known to follow (AppendEntries).
//
// It embeds the transport, so that RequestPreVote and with it pre-vote stay available.
type transport struct {
	*raft.NetworkTransport
	transportConfig
	stream *streamLayer

	// self is set once Raft exists; until then every heartbeat goes to the main thread.
	self    atomic.Pointer[raft.Raft]
	answers answers

	out  chan raft.RPC // what Raft consumes
	wake chan struct{} // capacity 1: something may have to be injected
	done chan struct{}
	once sync.Once
	wg   sync.WaitGroup

	// mu protects what is known for commit notices.
	mu sync.Mutex
	// leader is the sender's part of the newest leader's AppendEntries, without entries. Term 0: none seen.
	leader raft.AppendEntriesRequest
	// committed is the highest commit index that Raft has been handed in that term.
	committed uint64
	// noticeTerm and noticeIndex are the highest notice.
	noticeTerm, noticeIndex uint64
	// storedIndex and storedTerm are the last entry of the newest append to the log.
	storedIndex, storedTerm uint64
}

type transportConfig struct {
	streamConfig
	logger hclog.Logger
	// refuseSnapshot, if it returns an error, is why a snapshot with that last index cannot be installed here.
	refuseSnapshot func(lastIndex uint64) error
	injected       func() // counts
}

// listenRaft binds address and starts the transport. Nothing is delivered before Raft consumes it.
func listenRaft(address string, conf transportConfig) (*transport, error) {
	stream, err := listenStream(address, conf.streamConfig)
	if err != nil {
		return nil, err
	}
	t := &transport{
		NetworkTransport: raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
			Stream: stream, Logger: conf.logger, MaxPool: 3, Timeout: rpcTimeout,
		}),
		transportConfig: conf,
		stream:          stream,
		out:             make(chan raft.RPC),
		wake:            make(chan struct{}, 1),
		done:            make(chan struct{}),
	}
	t.wg.Go(t.pump)
	return t, nil
}

// LocalAddr implements raft.Transport. What Raft calls the address of a sender it only compares: where to reach somebody
// is for its configuration to say, where it may change. So the identity does.
func (t *transport) LocalAddr() raft.ServerAddress { return raft.ServerAddress(serverID(t.node)) }

// Whom Raft dials it names by an address alone: what the other side is greeted as would be missing. So here every
// message is addressed to the identity and the address.

// RequestVote implements raft.Transport.
func (t *transport) RequestVote(id raft.ServerID, at raft.ServerAddress, m *raft.RequestVoteRequest, answer *raft.RequestVoteResponse) error {
	return t.NetworkTransport.RequestVote(id, target(id, at), m, answer)
}

// RequestPreVote implements raft.WithPreVote.
func (t *transport) RequestPreVote(id raft.ServerID, at raft.ServerAddress, m *raft.RequestPreVoteRequest, answer *raft.RequestPreVoteResponse) error {
	return t.NetworkTransport.RequestPreVote(id, target(id, at), m, answer)
}

// InstallSnapshot implements raft.Transport.
func (t *transport) InstallSnapshot(id raft.ServerID, at raft.ServerAddress, m *raft.InstallSnapshotRequest, answer *raft.InstallSnapshotResponse, data io.Reader) error {
	return t.NetworkTransport.InstallSnapshot(id, target(id, at), m, answer, data)
}

// TimeoutNow implements raft.Transport.
func (t *transport) TimeoutNow(id raft.ServerID, at raft.ServerAddress, m *raft.TimeoutNowRequest, answer *raft.TimeoutNowResponse) error {
	return t.NetworkTransport.TimeoutNow(id, target(id, at), m, answer)
}

// Consumer implements raft.Transport.
func (t *transport) Consumer() <-chan raft.RPC { return t.out }

// pump carries messages from the network to Raft, with the injected ones in between.
func (t *transport) pump() {
	for {
		select {
		case rpc := <-t.NetworkTransport.Consumer():
			if t.inspect(rpc) {
				t.deliver(rpc)
			}
		case <-t.wake:
			if rpc, ok := t.injection(); ok {
				t.injected()
				t.deliver(rpc)
			}
		case <-t.done:
			return
		}
	}
}

func (t *transport) deliver(rpc raft.RPC) {
	select {
	case t.out <- rpc:
	case <-t.done:
	}
}

// inspect looks at a message before Raft does, and reports whether Raft may have it.
func (t *transport) inspect(rpc raft.RPC) bool {
	switch m := rpc.Command.(type) {
	case *raft.AppendEntriesRequest:
		t.mu.Lock()
		if m.Term > t.leader.Term {
			t.leader = raft.AppendEntriesRequest{RPCHeader: m.RPCHeader, Term: m.Term}
			t.committed = 0
			t.wakeLocked() // its last entry may be here already
		}
		if m.Term == t.leader.Term {
			t.committed = max(t.committed, m.LeaderCommitIndex)
		}
		t.mu.Unlock()
	case *raft.InstallSnapshotRequest:
		if err := t.refuseSnapshot(m.LastLogIndex); err != nil {
			t.wg.Go(func() {
				// The sender reads no answer before all is sent.
				if _, copyErr := io.Copy(io.Discard, rpc.Reader); copyErr != nil {
					err = fmt.Errorf("%w (discard snapshot: %w)", err, copyErr)
				}
				rpc.Respond(nil, err)
			})
			return false
		}
	}
	return true
}

// notice takes a commit notice from the leader of term. It may come before its entry is stored, or before anything
// else of that leader: the highest is kept until then.
func (t *transport) notice(term, index uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if term < t.noticeTerm || term == t.noticeTerm && index <= t.noticeIndex {
		return
	}
	t.noticeTerm, t.noticeIndex = term, index
	t.wakeLocked()
}

// stored is told the last entry of each append to the log. Raft, which is in the middle of handling the message that
// brought it, takes the injected one after that.
func (t *transport) stored(index, term uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.storedIndex, t.storedTerm = index, term
	t.wakeLocked()
}

func (t *transport) wakeLocked() {
	if !t.dueLocked() {
		return
	}
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// dueLocked reports whether the notice says something new about an entry that is stored. The leader of the notice's
// term wrote the last entry stored, so everything before it is as in that leader's log.
func (t *transport) dueLocked() bool {
	return t.noticeIndex > 0 &&
		t.noticeTerm == t.leader.Term && t.noticeTerm == t.storedTerm &&
		t.noticeIndex <= t.storedIndex && t.noticeIndex > t.committed
}

// injection makes the empty AppendEntries which the leader itself could have sent when it sent the notice. Raft
// checks it like any other: term, previous entry, and that it commits nothing beyond that entry.
func (t *transport) injection() (raft.RPC, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.dueLocked() {
		return raft.RPC{}, false
	}
	m := t.leader
	m.PrevLogEntry, m.PrevLogTerm = t.noticeIndex, t.noticeTerm
	m.LeaderCommitIndex = t.noticeIndex
	t.committed = t.noticeIndex
	return raft.RPC{Command: &m, RespChan: make(chan raft.RPCResponse, 1)}, true
}

// SetHeartbeatHandler implements raft.Transport. Raft's handler runs on the connection's goroutine, beside the main
// thread that a slow disk may hold up.
func (t *transport) SetHeartbeatHandler(handle func(raft.RPC)) {
	t.NetworkTransport.SetHeartbeatHandler(func(rpc raft.RPC) {
		t.inspect(rpc)
		if t.fastHeartbeat(rpc) {
			handle(rpc)
			return
		}
		t.deliver(rpc)
	})
}

// fastHeartbeat reports whether a heartbeat may be handled beside the main thread: only if all it can do is to note
// leader and contact. With a newer term it would change term and state under the main thread's feet, and a leader
// could then write an entry under a term that it does not lead (hashicorp/raft issue 695).
func (t *transport) fastHeartbeat(rpc raft.RPC) bool {
	self := t.self.Load()
	return self != nil && heartbeatIsHarmless(rpc, self.State(), self.CurrentTerm())
}

func heartbeatIsHarmless(rpc raft.RPC, state raft.RaftState, term uint64) bool {
	m, ok := rpc.Command.(*raft.AppendEntriesRequest)
	return ok && state == raft.Follower && m.Term == term
}

// Close implements raft.WithClose: it cuts every connection, and waits for the goroutines that serve them.
func (t *transport) Close() error {
	var err error
	t.once.Do(func() {
		close(t.done)
		err = t.NetworkTransport.Close() // closes stream
		t.wg.Wait()
		t.stream.wait()
	})
	return err
}
