package consensus

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/quorate/quorate/internal/logkey"
)

// Raft bounds its log by a number of entries alone. Those of large transactions have megabytes each, so that the same
// number may be anything between what fits a cache and what fills a disk. So bytes are counted here, and Raft's bounds are
// changed at run time to keep these.

// logSizes counts the bytes of the entries in the log.
type logSizes struct {
	mu    sync.Mutex
	first uint64   // index of the first
	sizes []uint32 // of each; they cost less than the entry's place in any cache
	total uint64
	// snapshot is the index of the newest snapshot, and grown how many bytes there are behind it.
	snapshot, grown uint64
}

// entrySize is what an entry counts: its data, and what is about it on disk.
func entrySize(l *raft.Log) uint32 { return uint32(len(l.Data)+len(l.Extensions)) + 32 }

func (s *logSizes) add(logs []*raft.Log) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range logs {
		if l.Index != s.first+uint64(len(s.sizes)) || len(s.sizes) == 0 {
			s.first, s.sizes, s.total, s.grown = l.Index, s.sizes[:0], 0, 0 // a log never has gaps
		}
		s.sizes = append(s.sizes, entrySize(l))
		s.total += uint64(entrySize(l))
		if l.Index > s.snapshot {
			s.grown += uint64(entrySize(l))
		}
	}
}

// remove forgets the entries from min to max, which are at the beginning or at the end.
func (s *logSizes) remove(min, max uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	end := s.first + uint64(len(s.sizes))
	upTo := end
	if max < end {
		upTo = max + 1
	}
	switch {
	case len(s.sizes) == 0 || max < s.first || min >= end:
		return
	case min <= s.first:
		n := int(upTo - s.first)
		s.sizes = append(s.sizes[:0], s.sizes[n:]...) // in place: what was there once is not kept
		s.first += uint64(n)
	default:
		s.sizes = s.sizes[:min-s.first]
	}
	s.total = s.bytesLocked(s.first)
	s.grown = s.bytesLocked(s.snapshot + 1)
}

// bytesLocked returns how many bytes there are from an index on.
func (s *logSizes) bytesLocked(from uint64) (bytes uint64) {
	for i := len(s.sizes) - 1; i >= 0 && s.first+uint64(i) >= from; i-- {
		bytes += uint64(s.sizes[i])
	}
	return bytes
}

// covered notes that there is a snapshot.
func (s *logSizes) covered(index uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.snapshot, s.grown = index, s.bytesLocked(index+1)
}

// newest returns how many of the newest entries have no more than so many bytes together, at least one.
func (s *logSizes) newest(bytes uint64) (entries uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := len(s.sizes) - 1; i >= 0; i-- {
		if uint64(s.sizes[i]) > bytes {
			break
		}
		bytes -= uint64(s.sizes[i])
		entries++
	}
	return max(entries, 1)
}

func (s *logSizes) read() (bytes, entries, grown uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.total, uint64(len(s.sizes)), s.grown
}

// measure reads the sizes of what is in the log.
func (s *logSizes) measure(log raft.LogStore) error {
	first, err := log.FirstIndex()
	if err != nil {
		return fmt.Errorf("read first index: %w", err)
	}
	last, err := log.LastIndex()
	if err != nil {
		return fmt.Errorf("read last index: %w", err)
	}
	for index := first; index <= last && last > 0; index++ {
		var l raft.Log
		if err := log.GetLog(index, &l); err != nil {
			return fmt.Errorf("read entry %d: %w", index, err)
		}
		s.add([]*raft.Log{&l})
	}
	return nil
}

// measureLog begins to count.
func (c *Consensus) measureLog() error {
	sizes := c.stores.log.sizes
	list, err := c.stores.snapshots.List()
	if err != nil {
		return fmt.Errorf("list snapshots: %w", err)
	}
	if len(list) > 0 {
		sizes.covered(list[0].Index)
	}
	if err := sizes.measure(c.stores.log); err != nil {
		return fmt.Errorf("measure the log: %w", err)
	}
	c.logGrown()
	return nil
}

// retain is called when a snapshot is written and Raft is about to truncate the log behind it: by as many entries as
// both bounds allow to stay, but not past what the snapshot needs.
func (c *Consensus) retain(snapshot, needs uint64) {
	c.stores.log.needed.Store(needs)
	c.stores.log.sizes.covered(snapshot)
	c.reload(func(r *raft.ReloadableConfig) {
		r.TrailingLogs = min(c.config.TrailingLogs, c.stores.log.sizes.newest(c.config.TrailingBytes))
	})
}

// runGrowth takes a snapshot whenever the log has grown by SnapshotBytes since the last one, until closing.
func (c *Consensus) runGrowth() {
	// A machine that is behind, or cannot be read now, is asked again after a while.
	again := time.NewTimer(0)
	defer again.Stop()
	for {
		select {
		case <-again.C:
		case <-c.closing.Done():
			return
		}
		select {
		case <-c.grown:
		case <-c.closing.Done():
			return
		}
		if _, _, grown := c.stores.log.sizes.read(); grown < c.config.SnapshotBytes {
			again.Reset(0)
			continue
		}
		if err := c.TakeSnapshot(); err != nil {
			level := c.logger.Info
			if errors.Is(err, errBehind) {
				level = c.logger.Debug // every machine is, now and then
			}
			level("no snapshot although the log has grown", logkey.Error, err)
			again.Reset(growthRetry)
			c.logGrown()
			continue
		}
		again.Reset(0)
	}
}

// growthRetry is how long a snapshot that could not be taken is not tried again.
const growthRetry = 2 * time.Second

// logGrown wakes runGrowth if there is something to do.
func (c *Consensus) logGrown() {
	if _, _, grown := c.stores.log.sizes.read(); grown < c.config.SnapshotBytes {
		return
	}
	select {
	case c.grown <- struct{}{}:
	default:
	}
}
