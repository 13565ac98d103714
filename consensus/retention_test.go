package consensus

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/quorate/quorate/txn"
)

// The counts are those of what is in the log, whatever is done to it.
func TestLogSizes(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var s logSizes
	var log []*raft.Log // what should be counted
	var snapshot uint64
	next := uint64(1)
	for range 3000 {
		switch k := random.IntN(10); {
		case k < 6:
			var batch []*raft.Log
			for range random.IntN(5) + 1 {
				batch = append(batch, &raft.Log{Index: next, Data: make([]byte, random.IntN(2000))})
				next++
			}
			s.add(batch)
			log = append(log, batch...)
		case k == 6 && len(log) > 0: // a prefix
			n := random.IntN(len(log)) + 1
			s.remove(log[0].Index, log[n-1].Index)
			log = log[n:]
		case k == 7 && len(log) > 0: // a suffix
			from := random.IntN(len(log))
			next = log[from].Index
			s.remove(next, log[len(log)-1].Index)
			log = log[:from]
		case k == 8 && len(log) > 0:
			snapshot = log[random.IntN(len(log))].Index
			s.covered(snapshot)
		case k == 9 && random.IntN(20) == 0: // what follows a snapshot that was installed
			next += 1000
			log = nil
		}
		var bytes, grown uint64
		for _, l := range log {
			bytes += uint64(entrySize(l))
			if l.Index > snapshot {
				grown += uint64(entrySize(l))
			}
		}
		if len(log) == 0 {
			continue // until the next entry it does not matter
		}
		if b, n, g := s.read(); b != bytes || n != uint64(len(log)) || g != grown {
			t.Fatalf("%d bytes, %d entries, %d since the snapshot; want %d, %d, %d", b, n, g, bytes, len(log), grown)
		}
		limit := uint64(random.IntN(20000))
		var want, sum uint64
		for i := len(log) - 1; i >= 0; i-- {
			if sum += uint64(entrySize(log[i])); sum > limit {
				break
			}
			want++
		}
		if got := s.newest(limit); got != max(want, 1) {
			t.Fatalf("%d of the newest have %d bytes, not %d", want, limit, got)
		}
	}
}

// Large entries do not fill the disk although there are few of them: snapshots come with the bytes, and behind them no more
// stays than may. Small ones are still bounded by their number.
func TestLogIsBoundedInBytes(t *testing.T) {
	parallel(t)
	const snapshotBytes, trailingBytes, size = 1 << 20, 512 << 10, 100 << 10
	tc := newCluster(t, 1, func(c *Config) {
		c.SnapshotBytes, c.TrailingBytes, c.TrailingLogs, c.LogStore = snapshotBytes, trailingBytes, 20, LogStoreBoltDB
	})
	tc.leader()
	kept := func() (bytes, entries uint64) {
		bytes, entries, _ = tc.nodes[0].c.stores.log.sizes.read()
		return bytes, entries
	}
	awaitKept := func(what string, ok func(bytes, entries uint64) bool) {
		t.Helper()
		for deadline := time.Now().Add(patience); !ok(kept()); {
			if time.Now().After(deadline) {
				bytes, entries := kept()
				t.Fatalf("%s: %d bytes, %d entries are kept", what, bytes, entries)
			}
			time.Sleep(5 * time.Millisecond) // truncation is not announced
		}
	}
	for range 40 { // 4 MB, which no number of entries bounds
		tc.propose(0, string(make([]byte, size)))
		awaitKept("while entries come", func(bytes, _ uint64) bool { return bytes <= snapshotBytes+trailingBytes+size })
	}
	first, err := tc.nodes[0].c.stores.log.FirstIndex()
	if err != nil || first < 20 {
		t.Errorf("the log begins at %d: %v", first, err)
	}
	bytes, entries := kept()
	tc.stop(0)
	tc.start(0)
	tc.leader()
	if b, n := kept(); b < bytes || b > bytes+1000 || n < entries || n > entries+4 { // it has entries of its own
		t.Errorf("%d bytes in %d entries are %d in %d after a restart", bytes, entries, b, n)
	}
	for range 100 {
		tc.propose(0, "small")
	}
	if err := tc.nodes[0].c.TakeSnapshot(); err != nil {
		t.Fatal(err)
	}
	awaitKept("of small ones", func(_, entries uint64) bool { return entries <= 20 })
	if len(tc.nodes[0].machine.awaitCount(t, 140)) != 140 {
		t.Error("entries were lost")
	}
}

// What a snapshot needs beside it stays in the log, while entries come and across a restart, and goes with a later snapshot
// that does not need it any more.
func TestLogKeepsWhatASnapshotNeeds(t *testing.T) {
	parallel(t)
	for _, store := range []string{LogStoreWAL, LogStoreBoltDB} {
		t.Run(store, func(t *testing.T) {
			tc := newCluster(t, 1, func(c *Config) { c.TrailingLogs, c.LogStore, c.walSegment = 5, store, 4<<10 })
			tc.leader()
			propose := func(n int) {
				for range n {
					tc.propose(0, string(make([]byte, 1<<10)))
				}
			}
			snapshot := func(needs txn.LogIndex) {
				t.Helper()
				m := tc.nodes[0].machine
				m.mu.Lock()
				m.needs = needs
				m.mu.Unlock()
				if err := tc.nodes[0].c.TakeSnapshot(); err != nil {
					t.Fatal(err)
				}
			}
			begins := func(what string, want func(first uint64) bool) {
				t.Helper()
				first, err := tc.nodes[0].c.stores.log.FirstIndex()
				_, entries, _ := tc.nodes[0].c.stores.log.sizes.read()
				last := uint64(tc.nodes[0].c.Status().LastIndex)
				if err != nil || !want(first) || first+entries != last+1 {
					t.Errorf("%s: the log begins at %d (%v) and %d entries up to %d are counted", what, first, err, entries, last)
				}
			}
			propose(50)
			snapshot(20)
			begins("needed from 20 on", func(first uint64) bool { return first == 20 })
			propose(50)
			snapshot(20) // nothing may be removed
			begins("still needed", func(first uint64) bool { return first == 20 })
			tc.stop(0)
			tc.start(0)
			tc.leader()
			if data, err := tc.nodes[0].c.Entry(20); err != nil || len(data) != 1<<10 {
				t.Errorf("entry 20 after a restart: %d bytes, %v", len(data), err)
			}
			propose(50)
			snapshot(0)
			begins("not needed any more", func(first uint64) bool { return first > 100 })
		})
	}
}
