package consensus

import (
	"bytes"
	"errors"
	"io"
	"sync"
	"testing"

	"github.com/hashicorp/raft"

	"github.com/quorate/quorate/txn"
)

// newTestFeed returns a feed that runs, and the log that it re-reads from.
func newTestFeed(t *testing.T, m Machine) (*feed, *raft.InmemStore) {
	log := raft.NewInmemStore()
	f := newFeed(m)
	f.read, f.fail, f.committed = log.GetLog, func(err error) { t.Error(err) }, func(uint64, txn.LogIndex) {}
	f.written = func(uint64, uint64) {}
	f.configured = func(uint64, []raft.Server) {}
	f.restored = func() (uint64, []raft.Server, error) { return 0, nil, nil }
	var running sync.WaitGroup
	running.Go(f.run)
	t.Cleanup(func() {
		f.halt()
		running.Wait()
	})
	return f, log
}

var noServers = raft.EncodeConfiguration(raft.Configuration{})

// A machine that is behind costs a bounded amount of memory, and misses nothing.
func TestFeedSpillsToLog(t *testing.T) {
	m := newRecorder()
	m.hold = make(chan struct{})
	f, log := newTestFeed(t, m)
	const n = 3 * feedEntries
	commands := 0
	for index := uint64(1); index <= n; index++ {
		l := &raft.Log{Index: index, Term: 1, Data: []byte{byte(index)}}
		switch index % 10 {
		case 3:
			l.Type, l.Data = raft.LogConfiguration, noServers
		case 7:
			l.Type = raft.LogNoop
		default:
			commands++
		}
		if err := log.StoreLog(l); err != nil {
			t.Fatal(err)
		}
		if l.Type == raft.LogNoop {
			continue // Raft keeps these to itself
		}
		if responses := f.ApplyBatch([]*raft.Log{l}); len(responses) != 1 {
			t.Fatalf("%d responses", len(responses))
		}
	}
	f.mu.Lock()
	if len(f.queue) > feedEntries || !f.spilled {
		t.Errorf("%d entries in memory, spilled %v", len(f.queue), f.spilled)
	}
	f.mu.Unlock()
	if _, err := f.Snapshot(); !errors.Is(err, errBehind) {
		t.Errorf("snapshot of a machine that is behind: %v", err)
	}
	close(m.hold)
	entries := m.awaitCount(t, commands)
	var last txn.LogIndex
	for _, e := range entries {
		if e.Index <= last || e.Data[0] != byte(e.Index) || e.Index%10 == 3 || e.Index%10 == 7 {
			t.Fatalf("entry %d after %d", e.Index, last)
		}
		last = e.Index
	}
	if len(entries) != commands {
		t.Errorf("%d entries, want %d", len(entries), commands)
	}
	// Back to normal: the next ones do not need the log.
	f.ApplyBatch([]*raft.Log{{Index: n + 1, Term: 1, Data: []byte{1}}})
	m.awaitIndex(t, n+1)
}

func TestSnapshotRoundTrip(t *testing.T) {
	m := newRecorder()
	f, _ := newTestFeed(t, m)
	// The last entry is a configuration: Raft's index of the snapshot is then not that of our last command.
	f.ApplyBatch([]*raft.Log{{Index: 5, Term: 2, Data: []byte("five")}, {Index: 6, Term: 2, Type: raft.LogConfiguration, Data: noServers}})
	snapshot, err := f.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var written sink
	if err := snapshot.Persist(&written); err != nil {
		t.Fatal(err)
	}
	snapshot.Release()
	data := written.Bytes()

	restored := newRecorder()
	g, _ := newTestFeed(t, restored)
	if !g.pristine() {
		t.Error("a new feed is not pristine")
	}
	if err := g.Restore(io.NopCloser(bytes.NewReader(data))); err != nil {
		t.Fatal(err)
	}
	if g.applied.Load() != 5 || g.handed.Load() != 5 || !g.pristine() || len(restored.entries) != 1 {
		t.Errorf("applied %d, handed %d, %d entries", g.applied.Load(), g.handed.Load(), len(restored.entries))
	}
	g.ApplyBatch([]*raft.Log{{Index: 7, Term: 2, Data: []byte("seven")}})
	restored.awaitIndex(t, 7)
	if g.pristine() {
		t.Error("pristine after an entry")
	}
	for name, bad := range map[string][]byte{"empty": nil, "short": data[:10], "no magic": append([]byte("X"), data...)} {
		h, _ := newTestFeed(t, newRecorder())
		if err := h.Restore(io.NopCloser(bytes.NewReader(bad))); err == nil {
			t.Errorf("%s: restored", name)
		}
	}
}

type sink struct{ bytes.Buffer }

func (*sink) ID() string    { return "test" }
func (*sink) Cancel() error { return nil }
func (*sink) Close() error  { return nil }
