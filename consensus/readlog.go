package consensus

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/hashicorp/raft"
	"github.com/hashicorp/raft-wal/verifier"
)

// ReadLog hands out what a directory holds that no process has open: the oldest snapshot that the log continues, if there
// is need of one, then the entries behind it. The last of them may never have been committed: a log alone does not tell.
// An error of either function ends it.
func ReadLog(dir string, restore func(io.Reader) error, apply func(Entry) error) (err error) {
	if _, err := os.Stat(filepath.Join(dir, "stable.db")); err != nil {
		return fmt.Errorf("read log: %s holds none: %w", dir, err)
	}
	conf := Config{Dir: dir}
	if _, err := os.Stat(filepath.Join(dir, boltLogName)); err == nil {
		conf.LogStore = LogStoreBoltDB
	}
	conf.setDefaults()
	conf.Logger = slog.New(slog.DiscardHandler)
	s, err := openStores(&conf, func(uint64, uint64) {}, func(error) {}, func(verifier.VerificationReport) {})
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
