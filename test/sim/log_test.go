package sim

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// orderedLog is the Raft log: what is in it stays, in one order for all. What happens to a proposal before is drawn.
type orderedLog struct {
	run *run

	mu         sync.Mutex
	entries    [][]byte
	grown      chan struct{} // closed and replaced when an entry was appended
	leaderless time.Time     // until then there is no leader
	late       int           // proposals on their way for which nobody waits any more
}

// What may become of a proposal, in percent; otherwise it is in the log, and its origin is told.
const (
	refusedPercent  = 4 // not in the log, and known not to be
	lostPercent     = 3 // not in the log, which is not known
	latePercent     = 4 // in the log, later than its origin is told that this is not known
	twicePercent    = 2 // in the log twice
	electionPercent = 1 // the leader changes
)

func (l *orderedLog) propose(ctx context.Context, n *node, data []byte) (txn.LogIndex, error) {
	what := "a proposal"
	if entry, err := codec.Decode(data); err == nil && entry.Kind == codec.KindChunk {
		what = "a part"
	}
	l.run.reach(n, what+" is sent")
	l.run.pause(500*time.Microsecond, "send", n.id)
	draw, election := l.run.draw(100, "fate", n.id), l.run.draw(100, "election", n.id) < electionPercent
	absence := time.Duration(l.run.draw(int(300*time.Millisecond), "absence", n.id))
	l.mu.Lock()
	now := time.Now()
	if election {
		l.leaderless = now.Add(absence)
		l.run.trace(n.id, "there is no leader")
	}
	if now.Before(l.leaderless) {
		draw %= refusedPercent + lostPercent + latePercent
	}
	l.mu.Unlock()
	within := func(percent int) bool { draw -= percent; return draw < 0 }
	switch {
	case within(refusedPercent):
		return 0, fmt.Errorf("refused: %w", txn.ErrNoQuorum)
	case within(lostPercent):
		l.run.pause(5*time.Millisecond, "lost", n.id)
		return 0, fmt.Errorf("lost: %w", txn.ErrOutcomeUnknown)
	case within(latePercent):
		l.underWay(1)
		l.run.group.Go(func() {
			l.run.pause(400*time.Millisecond, "late", n.id)
			l.append(n, data)
			l.underWay(-1)
		})
		l.run.pause(10*time.Millisecond, "unknown", n.id)
		return 0, fmt.Errorf("late: %w", txn.ErrOutcomeUnknown)
	case within(twicePercent):
		l.append(n, data)
	}
	index := l.append(n, data)
	l.run.reach(n, what+" is in the log")
	l.run.pause(300*time.Microsecond, "answer", n.id)
	return index, nil
}

func (l *orderedLog) awaitLeader(ctx context.Context) error {
	l.mu.Lock()
	wait := max(time.Until(l.leaderless), time.Millisecond)
	l.mu.Unlock()
	select {
	case <-time.After(wait):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (l *orderedLog) append(n *node, data []byte) txn.LogIndex {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries = append(l.entries, data)
	l.run.trace(n.id, "entry %d is in the log", len(l.entries))
	l.run.reference.apply(data)
	close(l.grown)
	l.grown = make(chan struct{})
	return txn.LogIndex(len(l.entries))
}

// read waits for the entry at index.
func (l *orderedLog) read(ctx context.Context, index txn.LogIndex) ([]byte, error) {
	for {
		l.mu.Lock()
		grown := l.grown
		if int(index) <= len(l.entries) {
			defer l.mu.Unlock()
			return l.entries[index-1], nil
		}
		l.mu.Unlock()
		select {
		case <-grown:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (l *orderedLog) underWay(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.late += n
}

// last is the last index, and whether no proposal is left that may come behind it although nobody waits for it.
func (l *orderedLog) last() (index txn.LogIndex, final bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return txn.LogIndex(len(l.entries)), l.late == 0
}

// reference is what the log means, in the plainest way: a list of what committed, compared with everything. It also
// knows what each transaction had seen of the rows that it wrote, which no certifier does.
type reference struct {
	run *run

	mu       sync.Mutex
	attempts map[txn.GID]attempt
	decided  map[txn.GID]bool // whether it commits
	parts    map[txn.GID]uint32
	order    []txn.GID // by CSN, from 1
	rows     map[string]string
}

// attempt is one transaction as its client made it.
type attempt struct {
	mark   string
	value  string
	before map[string]string // the values that it replaced
}

func (f *reference) apply(data []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	entry, err := codec.Decode(data)
	if err != nil {
		f.run.fail("decode what was proposed: %v", err)
		return
	}
	switch entry.Kind {
	case codec.KindChunk:
		if c := entry.Chunk; c.Part == f.parts[c.GID] {
			f.parts[c.GID]++
		} else {
			f.run.count("parts that come again")
		}
	case codec.KindAbort:
		if _, ok := f.decided[entry.Abort.GID]; !ok {
			f.decided[entry.Abort.GID] = false
		}
		delete(f.parts, entry.Abort.GID)
	case codec.KindMember: // what its earlier incarnations have left
		maps.DeleteFunc(f.parts, func(gid txn.GID, _ uint32) bool {
			left := gid.Node == entry.Member.Node && gid.Incarnation != entry.Member.Incarnation
			if _, ok := f.decided[gid]; left && !ok {
				f.run.count("parts of the dead")
			}
			return left
		})
	}
	for _, set := range entry.Transactions {
		if _, ok := f.decided[set.GID]; ok {
			f.run.count("duplicates")
			continue
		}
		if int(set.Seen) > len(f.order) {
			f.run.fail("%s has seen %d, there are %d in the log", set.GID, set.Seen, len(f.order))
			return
		}
		commits := f.parts[set.GID] == set.Chunks
		for _, later := range f.order[set.Seen:] {
			for row := range f.attempts[later].before {
				if _, both := f.attempts[set.GID].before[row]; both {
					commits = false
				}
			}
		}
		f.decided[set.GID] = commits
		if !commits {
			f.run.count("conflicts")
			continue
		}
		f.order = append(f.order, set.GID)
		a := f.attempts[set.GID]
		for row, before := range a.before {
			if f.rows[row] != before {
				f.run.fail("lost update: %s replaces %s = %q, which is %q", set.GID, row, before, f.rows[row])
			}
			f.rows[row] = a.value
		}
		f.rows[a.mark] = ""
	}
}

func (f *reference) begin(gid txn.GID, a attempt) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.attempts[gid] = a
}

func (f *reference) last() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.order)
}

func (f *reference) outcome(gid txn.GID) (commits, decided bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	commits, decided = f.decided[gid]
	return commits, decided
}

// mark is the row by which the transaction with a CSN is known.
func (f *reference) mark(csn int) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if csn > len(f.order) {
		return "nothing"
	}
	return f.attempts[f.order[csn-1]].mark
}

// difference tells how rows differ from what the log says they are.
func (f *reference) difference(rows map[string]string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var lines []string
	for row, value := range f.rows {
		if got, ok := rows[row]; !ok || got != value {
			lines = append(lines, fmt.Sprintf("%s is %q, there %v, not %q", row, got, ok, value))
		}
	}
	for row := range rows {
		if _, ok := f.rows[row]; !ok {
			lines = append(lines, row+" should not be there")
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "; ")
}

func rowName(n int) string { return "r" + strconv.Itoa(n) }

func rowNames(rows []int) (names []string) {
	for _, n := range rows {
		names = append(names, rowName(n))
	}
	return names
}
