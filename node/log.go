package node

import (
	"encoding/hex"
	"fmt"

	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// LogRecord is what the log says of one transaction, as JSON shows it. Fields are only ever added.
type LogRecord struct {
	Index txn.LogIndex `json:"index"`
	GID   string       `json:"gid"`
	XID   txn.XID      `json:"xid"` // at the origin
	Base  txn.CSN      `json:"base"`
	Seen  txn.CSN      `json:"seen"`
	CSN   txn.CSN      `json:"csn,omitempty"`   // if it commits
	Abort string       `json:"abort,omitempty"` // why it does not
	With  txn.CSN      `json:"with,omitempty"`  // of a conflict: to whom it lost
	Rows  uint64       `json:"rows"`
	// Keys are what it is certified by: the mode (see txn.Mode), a colon, and the hash of the key.
	Keys []string `json:"keys"`
}

// ReadLog reads the log of a node that does not run, from its data directory, and tells each transaction in it, in order, with
// the verdict that every node reaches. Where the log's beginning has been truncated, it begins behind a snapshot. The last
// entries may not have been committed.
func ReadLog(dataDir string, tell func(LogRecord) error) error {
	var failed error
	keep := func(err error) {
		if failed == nil {
			failed = err
		}
	}
	machine := replication.New(replication.Config{
		Deliver: func(decisions []replication.Decision) {
			for _, d := range decisions {
				if failed == nil {
					keep(tell(newLogRecord(d)))
				}
			}
		},
		Processed: func(txn.LogIndex) {},
		Durable:   func(txn.CSN) error { return nil },
		Member:    func(codec.Member) {},
		Changed:   func(replication.Change) {},
		Barrier:   func(codec.Barrier, txn.LogIndex) {},
		Fail:      keep,
	})
	id, err := config.ReadIdentity(dataDir)
	if err != nil {
		return err
	}
	err = consensus.ReadLog(id.RaftDir(dataDir), machine.Restore, func(e consensus.Entry) error {
		machine.Apply(e.Index, e.Data)
		return failed
	})
	if err != nil {
		return fmt.Errorf("read the log of %s: %w", dataDir, err)
	}
	return nil
}

func newLogRecord(d replication.Decision) LogRecord {
	r := LogRecord{
		Index: d.Index, GID: d.Set.GID.String(), XID: d.Set.XID, Base: d.Set.Base, Seen: d.Set.Seen,
		CSN: d.Verdict.CSN, With: d.Verdict.With, Rows: d.Set.Rows, Keys: make([]string, 0, len(d.Set.Keys)),
	}
	if !d.Verdict.Commits() {
		r.Abort = d.Verdict.Reason.String()
	}
	for _, k := range d.Set.Keys {
		r.Keys = append(r.Keys, k.Mode.String()+":"+hex.EncodeToString(k.Key[:]))
	}
	return r
}
