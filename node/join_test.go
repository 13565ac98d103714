package node

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// A node that joins waits for large transactions whose first parts it lacks, and for no others: until they end, or it has
// waited for long enough and aborts them.
func TestAwaitReadable(t *testing.T) {
	machine := replication.New(replication.Config{
		Deliver: func([]replication.Decision) {}, Processed: func(txn.LogIndex) {}, Fail: func(err error) { t.Error(err) },
	})
	index := txn.LogIndex(0)
	entry := func(data []byte) {
		index++
		machine.Apply(index, data)
	}
	gid := func(sequence uint64) txn.GID { return txn.GID{Node: 1, Incarnation: 7, Sequence: sequence} }
	abort := func(g txn.GID) error {
		entry(codec.AppendAbort(nil, codec.Abort{GID: g, Reason: txn.AbortRequested}))
		return nil
	}
	readable := func(index txn.LogIndex) bool { return index > 2 } // the log begins there
	for n := range uint64(3) {
		entry(codec.AppendChunk(nil, &codec.Chunk{GID: gid(n + 1), Data: []byte{1, 'I'}}))
	}

	var aborted []txn.GID
	done := make(chan error, 1)
	go func() {
		done <- awaitReadable(t.Context(), machine, time.Minute, readable, func(g txn.GID) error {
			aborted = append(aborted, g)
			return nil
		})
	}()
	entry(codec.AppendTransactions(nil, []*txn.WriteSet{{GID: gid(1), Database: "postgres", Chunks: 1, Rows: 1}}))
	select {
	case err := <-done:
		t.Fatalf("it did not wait for the second transaction: %v", err)
	default:
	}
	_ = abort(gid(2)) // its origin has given it up
	if err := <-done; err != nil || len(aborted) != 0 {
		t.Errorf("when all have ended: %v, aborted %v", err, aborted)
	}

	readable = func(index txn.LogIndex) bool { return index > 3 }
	if err := awaitReadable(t.Context(), machine, time.Millisecond, readable, abort); err != nil {
		t.Error(err)
	}
	if _, first := machine.Unfinished(); len(first) != 0 {
		t.Errorf("still unfinished: %v", first)
	}

	entry(codec.AppendChunk(nil, &codec.Chunk{GID: gid(4), Data: []byte{1, 'I'}}))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := awaitReadable(ctx, machine, time.Minute, func(txn.LogIndex) bool { return false }, func(txn.GID) error { return ctx.Err() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
