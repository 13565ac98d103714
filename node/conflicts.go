package node

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/quorate/quorate/replication/apply"
	"github.com/quorate/quorate/replication/capture"
	"github.com/quorate/quorate/txn"
)

// Bounds of what is remembered of conflicts: how many; how many of the latest commits' GIDs; and of the losers' changes,
// from which it is found out where the conflict was when somebody asks, and not before, each and all together.
const (
	keptConflicts = 512
	keptWinners   = 8192
	maxLoser      = 64 << 10
	maxLosers     = 4 << 20
)

// The kinds of conflicts.
const (
	conflictCertified = "certification" // the log decided
	conflictEvicted   = "eviction"      // the loser stood in the way of one that is decided
)

// conflict is one transaction that lost to another.
type conflict struct {
	number uint64 // rises with each, from 1
	at     time.Time
	kind   string
	loser  txn.GID // zero if it had none yet
	node   txn.NodeID
	winner txn.CSN
	gid    txn.GID // of the winner; zero if not remembered
	key    txn.Key
	mode   txn.Mode

	pid    uint32  // of an evicted session,
	by     txn.CSN // for what it was asked to make way,
	unique bool    // and whether what is in set is in the way by a value in a unique index

	// set is what place is found out from, until it is known: the loser's changes, or the row that the winner of an
	// eviction waited for. Nil if it is too large to keep, or nothing is known.
	set   *txn.WriteSet
	place capture.Place
}

// conflicts are the latest ones, and the latest commits. The zero value is ready for use.
type conflicts struct {
	mu      sync.Mutex
	latest  []conflict // the newest last
	noted   uint64     // how many there have been
	bytes   int        // of the losers' changes
	winners [keptWinners]struct {
		csn txn.CSN
		gid txn.GID
	}
}

// committed notes who has a CSN.
func (c *conflicts) committed(csn txn.CSN, gid txn.GID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := &c.winners[csn%keptWinners]
	w.csn, w.gid = csn, gid
}

// certified notes a loser by the certifier's verdict.
func (c *conflicts) certified(set *txn.WriteSet, v txn.Verdict) {
	one := conflict{kind: conflictCertified, loser: set.GID, node: set.GID.Node, winner: v.With, key: v.Key, mode: v.Mode}
	if len(set.Changes) <= maxLoser {
		// A copy: the changes are a part of the log's entry, which would be kept with them.
		one.set = &txn.WriteSet{GID: set.GID, Database: set.Database, Changes: slices.Clone(set.Changes)}
	}
	c.add(one)
}

// evicted notes a session that was asked to make way; asking again is no new conflict.
func (c *conflicts) evicted(node txn.NodeID, b apply.Blockade) (fresh bool) {
	c.mu.Lock()
	known := slices.ContainsFunc(c.latest[max(0, len(c.latest)-32):], func(o conflict) bool {
		return o.kind == conflictEvicted && o.pid == b.PID && o.by == b.By
	})
	c.mu.Unlock()
	if known {
		return false
	}
	one := conflict{kind: conflictEvicted, node: node, winner: b.By, pid: b.PID, by: b.By, place: capture.Place{Table: b.Where.Table}}
	if b.Where.Whole {
		one.place.Key = "whole table"
	}
	if b.Where.Row != nil {
		one.winner, one.unique = b.Where.CSN, b.Where.Unique // of several that are applied as one
		if len(b.Where.Row.Changes) <= maxLoser {
			one.set = b.Where.Row
		}
	}
	c.add(one)
	return true
}

func (c *conflicts) add(one conflict) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.noted++
	one.number, one.at = c.noted, time.Now()
	if w := c.winners[one.winner%keptWinners]; w.csn == one.winner {
		one.gid = w.gid
	}
	if one.set != nil {
		c.bytes += len(one.set.Changes)
	}
	c.latest = append(c.latest, one)
	if len(c.latest) >= 2*keptConflicts {
		for i := range c.latest[:keptConflicts] {
			c.dropSet(&c.latest[i])
		}
		c.latest = slices.Clone(c.latest[keptConflicts:])
	}
	for i := 0; c.bytes > maxLosers; i++ {
		c.dropSet(&c.latest[i])
	}
}

// dropSet is called with mu held.
func (c *conflicts) dropSet(one *conflict) {
	if one.set != nil {
		c.bytes -= len(one.set.Changes)
		one.set = nil
	}
}

// list returns the latest, all or those of a kind, the newest first, and finds out where they were. An error of the catalog
// ends that; what is not known then is found out the next time.
func (c *conflicts) list(ctx context.Context, kind string, most int, locate func(context.Context, *conflict) (capture.Place, bool, error)) []conflict {
	var found []conflict
	c.mu.Lock()
	for i := len(c.latest) - 1; i >= 0 && len(found) < most; i-- {
		if kind == "" || c.latest[i].kind == kind {
			found = append(found, c.latest[i])
		}
	}
	c.mu.Unlock()
	for i := range found {
		one := &found[i]
		if one.set == nil {
			continue
		}
		place, ok, err := locate(ctx, one)
		if err != nil {
			break
		}
		if ok {
			one.place = place
		}
		c.located(one.number, one.place)
	}
	return found
}

// located remembers where a conflict was.
func (c *conflicts) located(number uint64, place capture.Place) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.latest {
		if one := &c.latest[i]; one.number == number {
			c.dropSet(one)
			one.place = place
		}
	}
}
