package consensus

import (
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// A writer goes on when nobody reads answers any more. Raft's own pipeline stops after a few messages.
func TestPipelineWithoutReader(t *testing.T) {
	t.Cleanup(func() { requireNoGoroutines(t) })
	receiver, sender := listen(t, 2, nil), listen(t, 1, nil)
	stop := make(chan struct{})
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		for {
			select {
			case rpc := <-receiver.Consumer():
				rpc.Respond(&raft.AppendEntriesResponse{Term: 9}, nil)
			case <-stop:
				return
			}
		}
	}()
	defer func() { close(stop); <-answered }()
	p, err := sender.AppendEntriesPipeline("2", raft.ServerAddress(receiver.stream.Addr().String()))
	if err != nil {
		t.Fatal(err)
	}
	const messages = 300 // more than can be under way
	sent := make(chan error, 1)
	go func() {
		for range messages {
			if _, err := p.AppendEntries(&raft.AppendEntriesRequest{
				RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte("1"), Addr: []byte("a")}, Term: 9,
				Entries: []*raft.Log{{Index: 1, Term: 9}},
			}, new(raft.AppendEntriesResponse)); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	select {
	case err = <-sent:
	case <-time.After(patience):
		t.Fatal("the writer waits for a reader that there is not")
	}
	if err != nil {
		t.Error(err)
	}
	for range messages { // and nothing is lost
		select {
		case answer := <-p.Consumer():
			if err := answer.Error(); err != nil || answer.Response().Term != 9 {
				t.Fatalf("%v, %+v", err, answer.Response())
			}
		case <-time.After(patience):
			t.Fatal("an answer is missing")
		}
	}
	for range 2 {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
}
