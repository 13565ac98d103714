package consensus

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"
	"github.com/hashicorp/raft-wal/verifier"

	"github.com/quorate/quorate/txn"
)

// keyCurrentTerm is where Raft's stable store has the current term.
var keyCurrentTerm = []byte("CurrentTerm")

// RecoverCluster makes a stopped node the only member of its group, so that it can go on alone when the majority is gone
// for good. Of cfg it uses Node, Dir, LogStore and Logger; addresses are those that self has from now on. Every entry of
// the node's log stays, also what was never committed, which the node commits when it leads; what only the others
// had is lost. It returns the index of the last entry. Doing it again changes nothing.
//
// The node must be opened under another Config.ClusterID afterwards: members that were only believed to be gone know
// another continuation of the same log, and nothing but the cluster's identity keeps them apart.
//
// Unlike Raft's own function of that name this one adds a configuration to the log, instead of putting everything
// into a snapshot and the log away: a machine may be behind, and needs the entries yet.
func RecoverCluster(cfg Config, self Member) (last txn.LogIndex, err error) {
	cfg.setDefaults()
	cfg.RaftAddress, cfg.Bootstrap = self.RaftAddress, []Member{self}
	if err := cfg.validate(); err != nil {
		return 0, fmt.Errorf("recover cluster: %w", err)
	}
	s, err := openStores(&cfg, func(uint64, uint64) {}, func(error) {}, func(verifier.VerificationReport) {})
	if err != nil {
		return 0, fmt.Errorf("recover cluster: %w", err)
	}
	index, err := s.forceConfiguration(cfg.bootstrap())
	if err = errors.Join(err, s.close()); err != nil {
		return 0, fmt.Errorf("recover cluster: %w", err)
	}
	return txn.LogIndex(index), nil
}

// forceConfiguration appends a configuration as nobody but a leader may.
func (s *stores) forceConfiguration(to raft.Configuration) (uint64, error) {
	index, term, servers, err := s.ending()
	if err != nil {
		return 0, err
	}
	if index == 0 {
		return 0, errors.New("there is neither a log nor a snapshot: nothing to recover from")
	}
	if slices.Equal(servers, to.Servers) {
		return index, nil
	}
	current, err := s.stable.GetUint64(keyCurrentTerm)
	if err != nil {
		return 0, fmt.Errorf("read current term: %w", err)
	}
	// A term of its own. Nobody has voted in it, and no other log has an entry of it.
	term = max(term, current) + 1
	if err := s.stable.SetUint64(keyCurrentTerm, term); err != nil {
		return 0, fmt.Errorf("write current term: %w", err)
	}
	index++
	err = s.log.StoreLog(&raft.Log{
		Index: index, Term: term, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(to), AppendedAt: time.Now(),
	})
	if err != nil {
		return 0, fmt.Errorf("append configuration: %w", err)
	}
	return index, nil
}

// ending returns what the log and the newest snapshot end with, and the latest configuration in them.
func (s *stores) ending() (index, term uint64, servers []raft.Server, err error) {
	list, err := s.snapshots.List()
	if err != nil {
		return 0, 0, nil, fmt.Errorf("list snapshots: %w", err)
	}
	if len(list) > 0 {
		index, term, servers = list[0].Index, list[0].Term, list[0].Configuration.Servers
	}
	first, err := s.log.FirstIndex()
	if err != nil {
		return 0, 0, nil, fmt.Errorf("read first index: %w", err)
	}
	last, err := s.log.LastIndex()
	if err != nil {
		return 0, 0, nil, fmt.Errorf("read last index: %w", err)
	}
	for at := max(first, index+1); at <= last && last > 0; at++ {
		var l raft.Log
		if err := s.log.GetLog(at, &l); err != nil {
			return 0, 0, nil, fmt.Errorf("read entry %d: %w", at, err)
		}
		index, term = l.Index, l.Term
		if l.Type == raft.LogConfiguration {
			servers = raft.DecodeConfiguration(l.Data).Servers
		}
	}
	return index, term, servers, nil
}
