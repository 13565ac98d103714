package consensus

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"github.com/hashicorp/raft-wal/verifier"

	"github.com/quorate/quorate/txn"
)

// ReadLog hands out what a directory holds that no process has open: the oldest snapshot that the log continues, if there
// is need of one, then the entries behind it. The last of them may never have been committed: a log alone does not tell.
// An error of either function ends it.
func ReadLog(dir string, restore func(io.Reader) error, apply func(Entry) error) (err error) {
	s, err := openClosed(dir)
	if err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	defer func() { err = errors.Join(err, s.close()) }()
	first, firstErr := s.log.FirstIndex()
	last, lastErr := s.log.LastIndex()
	if err := errors.Join(firstErr, lastErr); err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	if first > 1 {
		if first, err = s.restoreBefore(first, restore); err != nil {
			return fmt.Errorf("read log: %w", err)
		}
	}
	for index := first; index <= last && index > 0; index++ {
		var l raft.Log
		if err := s.log.GetLog(index, &l); err != nil {
			return fmt.Errorf("read entry %d: %w", index, err)
		}
		if l.Type != raft.LogCommand {
			continue
		}
		if err := apply(entryOf(&l)); err != nil {
			return err
		}
	}
	return nil
}

// Promised returns what the log in a directory that no process has open has been promised: the newest term, in which there may be
// a vote, and the last entry that is stored. The error wraps fs.ErrNotExist if there is no log.
func Promised(dir string) (term uint64, last txn.LogIndex, err error) {
	s, err := openClosed(dir)
	if err != nil {
		return 0, 0, fmt.Errorf("read what the log has promised: %w", err)
	}
	defer func() { err = errors.Join(err, s.close()) }()
	index, err := s.log.LastIndex()
	if err != nil {
		return 0, 0, fmt.Errorf("read last index: %w", err)
	}
	list, err := s.snapshots.List() // the newest first
	if err != nil {
		return 0, 0, fmt.Errorf("list snapshots: %w", err)
	}
	if len(list) > 0 {
		index = max(index, list[0].Index)
	}
	term, err = s.stable.GetUint64(keyCurrentTerm)
	if err != nil && !errors.Is(err, raftboltdb.ErrKeyNotFound) {
		return 0, 0, fmt.Errorf("read current term: %w", err)
	}
	return term, txn.LogIndex(index), nil
}

// openClosed opens what a directory holds that no process has open, as it was written.
func openClosed(dir string) (*stores, error) {
	if _, err := os.Stat(filepath.Join(dir, "stable.db")); err != nil {
		return nil, fmt.Errorf("%s holds no log: %w", dir, err)
	}
	conf := Config{Dir: dir}
	if _, err := os.Stat(filepath.Join(dir, boltLogName)); err == nil {
		conf.LogStore = LogStoreBoltDB
	}
	conf.setDefaults()
	conf.Logger = slog.New(slog.DiscardHandler)
	return openStores(&conf, func(uint64, uint64) {}, func(error) {}, func(verifier.VerificationReport) {})
}

// restoreBefore hands out the oldest snapshot that a log beginning at first continues, and returns the index behind it.
func (s *stores) restoreBefore(first uint64, restore func(io.Reader) error) (uint64, error) {
	list, err := s.snapshots.List() // the newest first
	if err != nil {
		return 0, fmt.Errorf("list snapshots: %w", err)
	}
	for i := len(list) - 1; i >= 0; i-- {
		if list[i].Index+1 < first {
			continue
		}
		_, from, err := s.snapshots.Open(list[i].ID)
		if err != nil {
			return 0, fmt.Errorf("open snapshot %s: %w", list[i].ID, err)
		}
		index, err := readSnapshot(from, restore)
		return index + 1, errors.Join(err, from.Close())
	}
	return 0, fmt.Errorf("the log begins at %d, and no snapshot reaches there", first)
}
