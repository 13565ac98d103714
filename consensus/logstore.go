package consensus

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	wal "github.com/hashicorp/raft-wal"
	walmetrics "github.com/hashicorp/raft-wal/metrics"
	"github.com/hashicorp/raft-wal/verifier"
	"go.etcd.io/bbolt"

	"github.com/quorate/quorate/txn"
)

// The bounds of the log cache. Raft's own LogCache counts entries only: 512 chunks of a large transaction would be
// hundreds of megabytes.
const (
	cacheEntries = 1024
	cacheBytes   = 16 << 20
)

// errWriteDeadline is what an append fails with that took too long.
var errWriteDeadline = errors.New("log append missed its deadline")

type closableLogStore interface {
	raft.LogStore
	io.Closer
}

// stores are what Raft keeps on disk. The log is layered, from the outside: cache, checksums, deadline, files.
type stores struct {
	log       *logCache
	verified  *verifier.LogStore
	files     closableLogStore
	deadline  *deadlineStore
	stable    *raftboltdb.BoltStore
	snapshots *raft.FileSnapshotStore
}

// openStores opens or creates everything in cfg.Dir. onStored is told the last entry of each append that succeeded,
// onFailed that the disk did not take one, onReport the outcome of each verification.
func openStores(cfg *Config, onStored func(index, term uint64), onFailed func(error), onReport func(verifier.VerificationReport)) (_ *stores, err error) {
	s := &stores{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("create directory: %w", err)
	}
	// The stable store comes first: its file lock is what keeps a second process out of the directory.
	if s.stable, err = openBolt(filepath.Join(cfg.Dir, "stable.db")); err != nil {
		return nil, fmt.Errorf("open stable store: %w", err)
	}
	if err := checkLogStoreChoice(cfg); err != nil {
		return nil, err
	}
	switch cfg.LogStore {
	case LogStoreBoltDB:
		bolt, err := openBolt(filepath.Join(cfg.Dir, boltLogName))
		if err != nil {
			return nil, fmt.Errorf("open log store: %w", err)
		}
		s.files = bolt
	default:
		dir := filepath.Join(cfg.Dir, walLogName)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("create log directory: %w", err)
		}
		w, err := wal.Open(dir, wal.WithLogger(newHCLog(cfg.Logger)), wal.WithSegmentSize(cfg.walSegment))
		if err != nil {
			return nil, fmt.Errorf("open log store: %w", err)
		}
		s.files = w
	}
	s.deadline = newDeadlineStore(s.files, cfg.WriteDeadline)
	s.deadline.failed = onFailed
	s.verified = verifier.NewLogStore(s.deadline, isCheckpoint, onReport, &walmetrics.NoOpCollector{})
	s.log = newLogCache(s.verified, onStored)
	if s.snapshots, err = raft.NewFileSnapshotStoreWithLogger(cfg.Dir, 2, newHCLog(cfg.Logger)); err != nil {
		return nil, fmt.Errorf("open snapshot store: %w", err)
	}
	return s, nil
}

const (
	walLogName  = "wal"
	boltLogName = "log.db"
)

// checkLogStoreChoice refuses a directory whose log was written by the other kind of store: opening an empty log of
// this kind beside it would make the node forget what it acknowledged.
func checkLogStoreChoice(cfg *Config) error {
	other, name := LogStoreBoltDB, boltLogName
	if cfg.LogStore == LogStoreBoltDB {
		other, name = LogStoreWAL, walLogName
	}
	_, err := os.Stat(filepath.Join(cfg.Dir, name))
	if err == nil {
		return fmt.Errorf("log store: %q configured, but %s holds a log of %q", cfg.LogStore, cfg.Dir, other)
	}
	if !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("look for a log of the other kind: %w", err)
	}
	return nil
}

func openBolt(path string) (*raftboltdb.BoltStore, error) {
	return raftboltdb.New(raftboltdb.Options{
		Path: path,
		BoltOptions: &bbolt.Options{
			// Another process that has the file open is an error, not something to wait for.
			Timeout: 500 * time.Millisecond,
			// Together these two keep appends fast after a large truncation; either alone makes them slow.
			NoFreelistSync: true,
			FreelistType:   bbolt.FreelistMapType,
		},
	})
}

// close closes what is open, in reverse, and keeps the first error. Raft must have stopped.
func (s *stores) close() error {
	var first error
	keep := func(what string, err error) {
		if err != nil && first == nil {
			first = fmt.Errorf("close %s: %w", what, err)
		}
	}
	switch {
	case s.verified != nil: // closes the deadline store, that the files
		keep("log store", s.verified.Close())
	case s.files != nil:
		keep("log store", s.files.Close())
	}
	if s.stable != nil {
		keep("stable store", s.stable.Close())
	}
	return first
}

// isCheckpoint says at which entries the leader writes the checksum of the range since the last such entry, and
// followers compare theirs. A new leader's first entry, the no-op, begins a range: the range that ends in it began
// under another leader, and truncations may have made its sums meaningless. Barriers end a range.
func isCheckpoint(l *raft.Log) (bool, error) {
	return l.Type == raft.LogNoop || l.Type == raft.LogBarrier, nil
}

// logCache keeps the newest entries in memory, so that replication, apply and re-reading seldom touch the store.
type logCache struct {
	raft.LogStore
	onStored func(index, term uint64)
	sizes    *logSizes
	// needed is the first entry that the newest snapshot needs beside it; 0: none.
	needed atomic.Uint64

	mu     sync.RWMutex
	ring   [cacheEntries]*raft.Log
	lo, hi uint64 // the indexes held, hi inclusive; hi < lo: none
	bytes  int
}

func newLogCache(store raft.LogStore, onStored func(index, term uint64)) *logCache {
	return &logCache{LogStore: store, onStored: onStored, sizes: &logSizes{}, lo: 1}
}

// IsMonotonic implements raft.MonotonicLogStore for the store below.
func (c *logCache) IsMonotonic() bool {
	m, ok := c.LogStore.(raft.MonotonicLogStore)
	return ok && m.IsMonotonic()
}

func (c *logCache) GetLog(index uint64, out *raft.Log) error {
	c.mu.RLock()
	if c.lo <= index && index <= c.hi {
		*out = *c.ring[index%cacheEntries]
		c.mu.RUnlock()
		return nil
	}
	c.mu.RUnlock()
	return c.LogStore.GetLog(index, out)
}

func (c *logCache) StoreLog(l *raft.Log) error { return c.StoreLogs([]*raft.Log{l}) }

func (c *logCache) StoreLogs(logs []*raft.Log) error {
	if len(logs) == 0 {
		return nil
	}
	if err := c.LogStore.StoreLogs(logs); err != nil {
		return err
	}
	c.mu.Lock()
	for _, l := range logs {
		c.addLocked(l)
	}
	c.mu.Unlock()
	c.sizes.add(logs)
	last := logs[len(logs)-1]
	c.onStored(last.Index, last.Term)
	return nil
}

func (c *logCache) addLocked(l *raft.Log) {
	if l.Index != c.hi+1 {
		c.clearLocked()
		c.lo, c.hi = l.Index, l.Index-1
	}
	if c.hi-c.lo+1 == cacheEntries {
		c.evictLocked()
	}
	c.hi = l.Index
	c.ring[l.Index%cacheEntries] = l
	c.bytes += len(l.Data)
	for c.bytes > cacheBytes {
		c.evictLocked()
	}
}

func (c *logCache) evictLocked() {
	c.bytes -= len(c.ring[c.lo%cacheEntries].Data)
	c.ring[c.lo%cacheEntries] = nil
	c.lo++
}

func (c *logCache) clearLocked() {
	clear(c.ring[:])
	c.lo, c.hi, c.bytes = 1, 0, 0
}

// DeleteRange implements raft.LogStore. Of a prefix it leaves what is needed: Raft truncates by a number of entries behind
// the last, and would not know while more are appended. A suffix is never needed, since no snapshot covers it.
func (c *logCache) DeleteRange(min, max uint64) error {
	if needed := c.needed.Load(); min <= needed && needed <= max {
		if max = needed - 1; max < min {
			return nil
		}
	}
	c.mu.Lock()
	if min <= c.hi && c.lo <= max {
		c.clearLocked()
	}
	c.mu.Unlock()
	if err := c.LogStore.DeleteRange(min, max); err != nil {
		return err
	}
	c.sizes.remove(min, max)
	return nil
}

// deadlineStore bounds how long an append may take. Raft sends heartbeats while an append hangs, so a leader with a
// dead disk would lead for ever (hashicorp/raft issues 503 and 614); a failed append makes it step down.
//
// A write cannot be taken back, so it may still land later. Raft has then been told that it failed, and will write
// other entries at those indexes. Therefore no append begins while a late one is under way, and what a late one
// stored is removed first: nobody was told that it is there.
type deadlineStore struct {
	closableLogStore
	deadline time.Duration
	failed   func(error) // is told of an append that failed in time; nil: nobody

	mu   sync.Mutex // held for the length of an append; Raft does not overlap appends itself
	late *lateWrite
	// hidden is the first entry of late, for readers, who do not wait for appends; 0: none.
	hidden atomic.Uint64
	work   chan appendCall
	gone   chan struct{}
}

// appendCall is one call of StoreLogs on its way to the writer.
type appendCall struct {
	logs []*raft.Log
	done chan error // capacity 1
}

// lateWrite is an append that missed its deadline.
type lateWrite struct {
	first, last uint64
	done        chan error
}

func newDeadlineStore(store closableLogStore, deadline time.Duration) *deadlineStore {
	s := &deadlineStore{closableLogStore: store, deadline: deadline, work: make(chan appendCall), gone: make(chan struct{})}
	go func() {
		defer close(s.gone)
		for w := range s.work {
			w.done <- store.StoreLogs(w.logs)
		}
	}()
	return s
}

// IsMonotonic implements raft.MonotonicLogStore for the store below.
func (s *deadlineStore) IsMonotonic() bool {
	m, ok := s.closableLogStore.(raft.MonotonicLogStore)
	return ok && m.IsMonotonic()
}

func (s *deadlineStore) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

func (s *deadlineStore) StoreLogs(logs []*raft.Log) error {
	if len(logs) == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	timer := time.NewTimer(s.deadline)
	defer timer.Stop()
	if err := s.settleLateLocked(timer.C); err != nil {
		return err
	}
	w := appendCall{logs: logs, done: make(chan error, 1)}
	select {
	case s.work <- w:
	case <-timer.C:
		return fmt.Errorf("append entries from %d: %w of %v: not begun", logs[0].Index, errWriteDeadline, s.deadline)
	}
	select {
	case err := <-w.done:
		if err != nil && s.failed != nil {
			s.failed(fmt.Errorf("append entries from %d: %w", logs[0].Index, err))
		}
		return err
	case <-timer.C:
		s.hidden.Store(logs[0].Index)
		s.late = &lateWrite{first: logs[0].Index, last: logs[len(logs)-1].Index, done: w.done}
		return fmt.Errorf("append entries %d to %d: %w of %v", s.late.first, s.late.last, errWriteDeadline, s.deadline)
	}
}

// settleLateLocked waits for a late write to end, and removes what it stored.
func (s *deadlineStore) settleLateLocked(expired <-chan time.Time) error {
	if s.late == nil {
		return nil
	}
	var err error
	select {
	case err = <-s.late.done:
	case <-expired:
		return fmt.Errorf("append behind entries %d to %d: %w of %v", s.late.first, s.late.last, errWriteDeadline, s.deadline)
	}
	if err == nil {
		if err := s.closableLogStore.DeleteRange(s.late.first, s.late.last); err != nil {
			s.late.done <- nil // to be removed still
			return fmt.Errorf("remove late entries %d to %d: %w", s.late.first, s.late.last, err)
		}
	}
	s.late = nil
	s.hidden.Store(0)
	return nil
}

// GetLog implements raft.LogStore. It does not show what a late write may have stored: Raft takes the place of an entry
// that it finds for settled, and would append behind it.
func (s *deadlineStore) GetLog(index uint64, out *raft.Log) error {
	if first := s.hidden.Load(); first != 0 && index >= first {
		return raft.ErrLogNotFound
	}
	return s.closableLogStore.GetLog(index, out)
}

// DeleteRange settles a late write first, so that it cannot land behind the truncation of a suffix. It does not hold
// mu while it works: that would take the deadline from an append that waits for a hanging compaction. The append
// that may then begin is harmless, because whoever truncates a suffix is the one who appends.
func (s *deadlineStore) DeleteRange(min, max uint64) error {
	if err := s.settleLate(); err != nil {
		return err
	}
	return s.closableLogStore.DeleteRange(min, max)
}

func (s *deadlineStore) settleLate() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	timer := time.NewTimer(s.deadline)
	defer timer.Stop()
	return s.settleLateLocked(timer.C)
}

// Close waits for a late write, once more as long as the deadline, then closes the store.
func (s *deadlineStore) Close() error {
	close(s.work)
	if err := within(s.deadline, func() error { <-s.gone; return nil }); err != nil {
		return fmt.Errorf("append to the log: %w", err)
	}
	return s.closableLogStore.Close()
}

// latestSnapshot opens the newest snapshot, if there is one. Its index may be past the last command that it covers, and
// is where the log may begin.
func (s *stores) latestSnapshot() (index uint64, from io.ReadCloser, err error) {
	list, err := s.snapshots.List()
	if err != nil {
		return 0, nil, fmt.Errorf("list snapshots: %w", err)
	}
	if len(list) == 0 {
		return 0, nil, nil
	}
	meta, from, err := s.snapshots.Open(list[0].ID)
	if err != nil {
		return 0, nil, fmt.Errorf("open snapshot %s: %w", list[0].ID, err)
	}
	return meta.Index, from, nil
}

// snapshotConfiguration returns the configuration of the newest snapshot, which is the one that Raft restores unless it
// cannot be read.
func (s *stores) snapshotConfiguration() (index uint64, servers []raft.Server, err error) {
	list, err := s.snapshots.List()
	if err == nil && len(list) == 0 {
		err = errors.New("there is none")
	}
	if err != nil {
		return 0, nil, fmt.Errorf("look for the restored snapshot: %w", err)
	}
	return list[0].ConfigurationIndex, list[0].Configuration.Servers, nil
}

// readEntry returns the command at index.
func (s *stores) readEntry(index txn.LogIndex) ([]byte, error) {
	var l raft.Log
	if err := s.log.GetLog(uint64(index), &l); err != nil {
		return nil, fmt.Errorf("read entry %d: %w", index, err)
	}
	if l.Type != raft.LogCommand {
		return nil, fmt.Errorf("read entry %d: %w: it is %s, not a command", index, txn.ErrCorrupt, l.Type)
	}
	return l.Data, nil
}
