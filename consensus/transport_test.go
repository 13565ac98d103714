package consensus

import (
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/quorate/quorate/txn"
)

func TestHeartbeatFilter(t *testing.T) {
	beat := func(term uint64) raft.RPC {
		return raft.RPC{Command: &raft.AppendEntriesRequest{Term: term}}
	}
	for _, tc := range []struct {
		name  string
		rpc   raft.RPC
		state raft.RaftState
		term  uint64
		fast  bool
	}{
		{"follower, same term", beat(7), raft.Follower, 7, true},
		{"follower, newer term", beat(8), raft.Follower, 7, false},
		{"follower, older term", beat(6), raft.Follower, 7, false},
		{"candidate", beat(7), raft.Candidate, 7, false},
		{"leader, newer term", beat(8), raft.Leader, 7, false},
		{"leader, same term", beat(7), raft.Leader, 7, false},
		{"no heartbeat", raft.RPC{Command: &raft.RequestVoteRequest{Term: 7}}, raft.Follower, 7, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if fast := heartbeatIsHarmless(tc.rpc, tc.state, tc.term); fast != tc.fast {
				t.Errorf("fast = %v", fast)
			}
		})
	}
}

// listen starts a transport without Raft behind it.
func listen(t *testing.T, node txn.NodeID, refuse func(uint64) error) *transport {
	t.Helper()
	if refuse == nil {
		refuse = func(uint64) error { return nil }
	}
	tr, err := listenRaft("127.0.0.1:0", transportConfig{
		streamConfig: streamConfig{node: node, refused: func(string, error) {}}, logger: hclog.NewNullLogger(), refuseSnapshot: refuse, injected: func() {},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
	})
	return tr
}

// With no Raft known yet, and with one that is not a follower of the term, a heartbeat comes out on the main queue,
// through the real network.
func TestHeartbeatGoesToMainThread(t *testing.T) {
	t.Cleanup(func() { requireNoGoroutines(t) })
	receiver, sender := listen(t, 2, nil), listen(t, 1, nil)
	fast := make(chan raft.RPC, 1)
	receiver.SetHeartbeatHandler(func(rpc raft.RPC) { fast <- rpc })
	done := make(chan error, 1)
	go func() {
		var response raft.AppendEntriesResponse
		done <- sender.AppendEntries("2", raft.ServerAddress(receiver.stream.Addr().String()), &raft.AppendEntriesRequest{
			RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte("1"), Addr: []byte("a")}, Term: 9,
		}, &response)
	}()
	select {
	case rpc := <-receiver.Consumer():
		rpc.Respond(&raft.AppendEntriesResponse{Term: 9, Success: true}, nil)
	case <-fast:
		t.Fatal("handled beside the main thread")
	case <-time.After(patience):
		t.Fatal("lost")
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestTransportKeepsPreVote(t *testing.T) {
	var tr any = &transport{}
	if _, ok := tr.(raft.WithPreVote); !ok {
		t.Error("the transport lost RequestPreVote")
	}
	if _, ok := tr.(raft.WithClose); !ok {
		t.Error("the transport lost Close")
	}
}

// appendFrom is what a leader of term sends with entries up to last, committed being its commit index.
func appendFrom(term, last, committed uint64) raft.RPC {
	return raft.RPC{Command: &raft.AppendEntriesRequest{
		RPCHeader: raft.RPCHeader{ID: []byte{byte(term)}}, Term: term, LeaderCommitIndex: committed,
		Entries: []*raft.Log{{Index: last, Term: term}},
	}}
}

func TestNoticeInjection(t *testing.T) {
	type step struct {
		do   func(*transport)
		want uint64 // the index injected after it; 0: none
	}
	sees := func(term, last, committed uint64) func(*transport) {
		return func(tr *transport) { tr.inspect(appendFrom(term, last, committed)) }
	}
	stores := func(index, term uint64) func(*transport) { return func(tr *transport) { tr.stored(index, term) } }
	told := func(term, index uint64) func(*transport) { return func(tr *transport) { tr.notice(term, index) } }

	for name, steps := range map[string][]step{
		"after its entry":              {{sees(3, 10, 9), 0}, {stores(10, 3), 0}, {told(3, 10), 10}},
		"once only":                    {{sees(3, 10, 9), 0}, {stores(10, 3), 0}, {told(3, 10), 10}, {told(3, 10), 0}, {stores(11, 3), 0}},
		"overtakes its entry":          {{told(3, 10), 0}, {sees(3, 10, 9), 0}, {stores(10, 3), 10}},
		"overtakes several, kept":      {{sees(3, 9, 8), 0}, {stores(9, 3), 0}, {told(3, 11), 0}, {stores(10, 3), 0}, {stores(11, 3), 11}},
		"the highest is kept":          {{sees(3, 9, 8), 0}, {told(3, 11), 0}, {told(3, 10), 0}, {stores(11, 3), 11}},
		"older term":                   {{sees(4, 10, 9), 0}, {stores(10, 4), 0}, {told(3, 10), 0}},
		"newer term than Raft's":       {{sees(3, 10, 9), 0}, {stores(10, 3), 0}, {told(4, 10), 0}},
		"newer term replaces":          {{sees(3, 10, 9), 0}, {told(3, 12), 0}, {told(4, 11), 0}, {sees(4, 11, 9), 0}, {stores(11, 4), 11}},
		"older term does not replace":  {{told(4, 11), 0}, {told(3, 12), 0}, {sees(4, 11, 9), 0}, {stores(11, 4), 11}},
		"last entry of an older term":  {{sees(4, 10, 9), 0}, {stores(10, 3), 0}, {told(4, 10), 0}, {stores(11, 4), 10}},
		"leader said so itself":        {{sees(3, 10, 10), 0}, {stores(10, 3), 0}, {told(3, 10), 0}},
		"said by a message after":      {{told(3, 10), 0}, {sees(3, 10, 9), 0}, {sees(3, 11, 10), 0}, {stores(11, 3), 0}},
		"stale leader forgets nothing": {{sees(4, 10, 9), 0}, {sees(3, 12, 12), 0}, {stores(10, 4), 0}, {told(4, 10), 10}},
	} {
		t.Run(name, func(t *testing.T) {
			tr := &transport{wake: make(chan struct{}, 1)}
			for i, s := range steps {
				s.do(tr)
				var got uint64
				select {
				case <-tr.wake:
					rpc, ok := tr.injection()
					if !ok {
						t.Fatalf("step %d: woken for nothing", i)
					}
					m := rpc.Command.(*raft.AppendEntriesRequest)
					got = m.LeaderCommitIndex
					if m.PrevLogEntry != got || m.PrevLogTerm != m.Term || len(m.Entries) != 0 || m.ID[0] != byte(m.Term) {
						t.Errorf("step %d: injected %+v", i, m)
					}
				default:
				}
				if got != s.want {
					t.Fatalf("step %d: injected %d, want %d", i, got, s.want)
				}
			}
		})
	}
}

// The refusal reaches the sender, whose connection is not left in the middle of the snapshot.
func TestSnapshotRefusal(t *testing.T) {
	t.Cleanup(func() { requireNoGoroutines(t) })
	receiver := listen(t, 2, func(uint64) error { return ErrBehind })
	sender := listen(t, 1, nil)
	body := make([]byte, 1<<20)
	request := &raft.InstallSnapshotRequest{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte("1"), Addr: []byte("a")},
		Term:      2, Size: int64(len(body)), LastLogIndex: 9,
	}
	var response raft.InstallSnapshotResponse
	err := sender.InstallSnapshot("2", raft.ServerAddress(receiver.stream.Addr().String()), request, &response, newZeros(len(body)))
	if err == nil || err.Error() != ErrBehind.Error() {
		t.Errorf("install snapshot: %v", err)
	}
}
