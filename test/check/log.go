package check

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

// Decision is what the database's own log says of one transaction: the white box beside the history, which is what clients
// were told.
type Decision struct {
	Name string   `json:"gid"`
	Base uint64   `json:"base"` // how far the order was visible before the transaction took its first snapshot
	Seen uint64   `json:"seen"` // how far when it was made ready
	CSN  uint64   `json:"csn"`  // its place in the order; 0 if it aborts
	Keys []string `json:"keys"` // MODE:KEY
}

// ReadDecisions reads decisions as JSON, one per line, with whatever else stands there.
func ReadDecisions(r io.Reader) ([]Decision, error) {
	var log []Decision
	for in := bufio.NewReader(r); ; {
		line, err := in.ReadBytes('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("read decisions: %w", err)
		}
		if len(bytes.TrimSpace(line)) > 0 {
			var d Decision
			if err := json.Unmarshal(line, &d); err != nil {
				return nil, fmt.Errorf("read decision %d: %w", len(log)+1, err)
			}
			log = append(log, d)
		}
		if err != nil {
			return log, nil
		}
	}
}

// JudgeLog judges a history by the log. Where Judge looks for any order of commits that explains what clients saw, here the
// order is known, and so is the range in which each snapshot lies. Every transaction that has written must have its
// name in the history. Checked are: that the log says what clients were told; that no two transactions with a common
// key overlap in (snapshot, commit]; and that every read is the state at the snapshot: one for the whole transaction
// at repeatable read, one for each action, never an earlier one, at read committed. That takes time linear in the length
// of the history, and in how long transactions last.
//
// It knows the keys of lists, registers and counters. One that was written before the log begins, or by somebody whose
// transaction is not in the history, is left out.
func JudgeLog(history History, log []Decision) Report {
	j := &logJudge{
		judge:     judge{history: history, count: map[string]int{}},
		decisions: make(map[string]*Decision, len(log)),
		op:        map[string]int{},
		states:    map[string]*states{},
	}
	j.order(log)
	j.outcomes()
	j.versions(log)
	j.reads()
	r := Report{Anomalies: j.found, Counts: map[Outcome]int{}, Reads: j.compared, more: map[string]int{}}
	for name, n := range j.count {
		r.more[name] = n - shown
	}
	for i := range history {
		r.Counts[history[i].Outcome]++
	}
	return r
}

type logJudge struct {
	judge
	decisions map[string]*Decision
	op        map[string]int // by name
	first     uint64         // the CSN that the log begins with
	last      uint64
	states    map[string]*states
	opened    []string // the accounts
	begun     []begun  // what has committed, by when it began
	compared  int      // reads
}

// begun is when a transaction began, and the highest CSN of those that began no later.
type begun struct {
	at  time.Duration
	csn uint64
}

// states are what one list, register or counter was, one after the other.
type states struct {
	from []uint64 // CSN, ascending; the first is 0
	list [][]int64
	n    []int64
	// unknown: something wrote it of which the history tells nothing.
	unknown bool
}

// at returns which state was there when everything up to csn was visible.
func (s *states) at(csn uint64) int {
	i, found := slices.BinarySearch(s.from, csn)
	if !found {
		i--
	}
	return i
}

// order checks the log by itself.
func (j *logJudge) order(log []Decision) {
	wrote := map[string]uint64{} // key → who wrote it last
	for i := range log {
		d := &log[i]
		if other := j.decisions[d.Name]; other == nil || d.CSN != 0 {
			if other != nil && other.CSN != 0 {
				j.anomaly("committed twice", nil, "%s is CSN %d and CSN %d", d.Name, other.CSN, d.CSN)
			}
			j.decisions[d.Name] = d
		}
		if d.CSN == 0 {
			continue
		}
		if j.first == 0 {
			j.first = d.CSN
		} else if d.CSN != j.last+1 {
			j.anomaly("order broken", nil, "CSN %d (%s) comes after CSN %d", d.CSN, d.Name, j.last)
		}
		j.last = d.CSN
		if d.Base > d.Seen || d.Seen >= d.CSN {
			j.anomaly("order broken", nil, "%s has base %d, seen %d and CSN %d", d.Name, d.Base, d.Seen, d.CSN)
		}
		for _, key := range d.Keys {
			mode, name, _ := strings.Cut(key, ":")
			if mode != "W" && mode != "X" {
				continue
			}
			if before := wrote[name]; before > d.Seen && before != d.CSN {
				j.anomaly("lost update", nil, "%s (CSN %d) wrote a key that CSN %d has written, and had seen up to %d only", d.Name, d.CSN, before, d.Seen)
			}
			wrote[name] = d.CSN
		}
	}
}

// outcomes compares what clients were told with the log.
func (j *logJudge) outcomes() {
	for i := range j.history {
		op := &j.history[i]
		if op.Name == "" {
			continue
		}
		j.op[op.Name] = i
		d := j.decisions[op.Name]
		committed := d != nil && d.CSN != 0
		switch {
		case op.Outcome == OK && op.writes() && !committed && j.first <= 1:
			j.anomaly("lost commit", []int{i}, "the log knows of no commit of %s", op.Name)
		case op.Outcome == Failed && committed:
			j.anomaly("aborted, but committed", []int{i}, "%s has CSN %d", op.Name, d.CSN)
		}
		if committed {
			j.begun = append(j.begun, begun{op.Start, d.CSN})
		}
	}
	slices.SortFunc(j.begun, func(a, b begun) int { return cmp.Compare(a.at, b.at) })
	for i := 1; i < len(j.begun); i++ {
		j.begun[i].csn = max(j.begun[i].csn, j.begun[i-1].csn)
	}
}

// versions replays what was committed, in its order.
func (j *logJudge) versions(log []Decision) {
	for i := range j.history {
		op := &j.history[i]
		for _, a := range op.Do {
			switch {
			case a.Do == Open:
				s := j.of(a)
				s.n[0] = a.Value
				j.opened = append(j.opened, a.Key)
			case !isWrite(a) || op.Outcome == Failed:
			case op.Name == "", j.first > 1 && j.decisions[op.Name] == nil:
				j.of(a).unknown = true
			}
		}
	}
	for i := range log {
		d := &log[i]
		at, known := j.op[d.Name]
		if d.CSN == 0 || !known {
			continue
		}
		for _, a := range j.history[at].Do {
			if isWrite(a) {
				j.of(a).write(d.CSN, a)
			}
		}
	}
}

func isWrite(a Action) bool { return a.Do == Append || a.Do == Write || a.Do == Add }

// of returns the states of what an action is about; nil if it is nothing that is known here. Names of different kinds may
// be equal.
func (j *logJudge) of(a Action) *states {
	kind := map[Verb]string{Append: "list ", List: "list ", Write: "register ", Read: "register ", Open: "counter ", Add: "counter ", Count: "counter "}[a.Do]
	if kind == "" {
		return nil
	}
	s := j.states[kind+a.Key]
	if s == nil {
		s = &states{from: []uint64{0}, list: [][]int64{nil}, n: []int64{0}}
		j.states[kind+a.Key] = s
	}
	return s
}

// write adds what a transaction has made of it.
func (s *states) write(csn uint64, a Action) {
	last := len(s.from) - 1
	if s.from[last] != csn {
		s.from, s.list, s.n = append(s.from, csn), append(s.list, s.list[last]), append(s.n, s.n[last])
		last++
	}
	switch a.Do {
	case Append:
		s.list[last] = append(s.list[last][:len(s.list[last]):len(s.list[last])], a.Value)
	case Write:
		s.n[last] = a.Value
	case Add:
		s.n[last] += a.Value
	}
}

// reads looks for a snapshot that explains what each transaction has read.
func (j *logJudge) reads() {
	for i := range j.history {
		op := &j.history[i]
		if op.Outcome == Failed {
			continue
		}
		low, high := j.span(i)
		if low > high {
			continue // the order is broken, which has been told
		}
		var own own
		at := low
		for n, a := range op.Do {
			own.add(a)
			if !j.judged(a) {
				continue
			}
			j.compared++
			wants := own
			fits := func(csn uint64) bool { return j.shows(a, csn, wants) }
			if op.Isolation == RepeatableRead {
				if n > 0 && !j.firstRead(op, n) {
					continue // all reads are looked at together, at the first
				}
				fits = func(csn uint64) bool { return j.showsAll(op, csn) }
			}
			found, ok := j.search(op, a, at, high, fits)
			if !ok {
				j.anomaly("not the state at its snapshot", []int{i}, "%s: no CSN in [%d, %d] explains it", a, at, high)
				break
			}
			at = found
		}
	}
}

// span returns where a transaction's snapshots may lie: of what has committed, from its base (and at repeatable read from
// the last that wrote what it writes, too: first committer wins) to just before its own place.
func (j *logJudge) span(i int) (low, high uint64) {
	op := &j.history[i]
	if op.Final {
		return j.last, j.last
	}
	d := j.decisions[op.Name]
	if d == nil || d.CSN == 0 {
		// It has only read. What began later it cannot have seen.
		n, _ := slices.BinarySearchFunc(j.begun, op.End, func(b begun, end time.Duration) int {
			if b.at <= end {
				return -1
			}
			return 1
		})
		if n == 0 {
			return 0, 0
		}
		return 0, j.begun[n-1].csn
	}
	low, high = d.Base, d.CSN-1
	if op.Isolation != RepeatableRead {
		return low, high
	}
	for _, a := range op.Do {
		if isWrite(a) && !j.of(a).unknown {
			s := j.of(a)
			low = max(low, s.from[s.at(high)])
		}
	}
	return low, high
}

func isRead(a Action) bool { return a.Do == List || a.Do == Read || a.Do == Count || a.Do == Balances }

// judged reports whether an action is a read of something that is known.
func (j *logJudge) judged(a Action) bool {
	if a.Do == Balances {
		return len(j.opened) > 0 && !slices.ContainsFunc(j.opened, func(key string) bool { return j.of(Action{Do: Count, Key: key}).unknown })
	}
	return isRead(a) && !j.of(a).unknown
}

// firstRead reports whether no judged read comes before action n.
func (j *logJudge) firstRead(op *Op, n int) bool { return !slices.ContainsFunc(op.Do[:n], j.judged) }

// search finds a CSN in [low, high] that fits: the first one where another action is to be looked at afterwards, else any.
// Only those need be tried at which something changed.
func (j *logJudge) search(op *Op, a Action, low, high uint64, fits func(uint64) bool) (uint64, bool) {
	if fits(high) && (op.Isolation == RepeatableRead || len(op.Do) == 1) {
		return high, true
	}
	involved := []Action{a}
	if op.Isolation == RepeatableRead {
		involved = op.Do
	}
	next := []uint64{low}
	for _, a := range involved {
		if !j.judged(a) {
			continue
		}
		keys := []string{a.Key}
		if a.Do == Balances {
			keys, a.Do = j.opened, Count
		}
		for _, key := range keys {
			s := j.of(Action{Do: a.Do, Key: key})
			for n := s.at(low) + 1; n < len(s.from) && s.from[n] <= high; n++ {
				next = append(next, s.from[n])
			}
		}
	}
	slices.Sort(next)
	next = slices.Compact(next)
	if op.Isolation == RepeatableRead || len(op.Do) == 1 {
		slices.Reverse(next) // most are nearly fresh
	}
	for _, csn := range next {
		if fits(csn) {
			return csn, true
		}
	}
	return 0, false
}

// showsAll reports whether all reads of a transaction are the state at one place.
func (j *logJudge) showsAll(op *Op, csn uint64) bool {
	var own own
	for _, a := range op.Do {
		own.add(a)
		if j.judged(a) && !j.shows(a, csn, own) {
			return false
		}
	}
	return true
}

// shows reports whether a read is the state at one place, with what its own transaction had written on top.
func (j *logJudge) shows(a Action, csn uint64, own own) bool {
	value := func(key string) int64 {
		s := j.of(Action{Do: Count, Key: key})
		return s.n[s.at(csn)] + own.added[key]
	}
	switch a.Do {
	case List:
		s := j.of(a)
		there, mine := s.list[s.at(csn)], own.appended[a.Key]
		return len(a.List) == len(there)+len(mine) && slices.Equal(a.List[:len(there)], there) && slices.Equal(a.List[len(there):], mine)
	case Read:
		if v, wrote := own.written[a.Key]; wrote {
			return a.Value == v
		}
		s := j.of(a)
		return a.Value == s.n[s.at(csn)]
	case Count:
		return a.Value == value(a.Key)
	case Balances:
		there := map[string]int64{}
		for _, key := range j.opened {
			there[key] = value(key)
		}
		return maps.Equal(a.Counts, there)
	}
	return true
}

// own is what a transaction has written so far.
type own struct {
	appended map[string][]int64
	written  map[string]int64
	added    map[string]int64
}

func (o *own) add(a Action) {
	if o.appended == nil {
		*o = own{map[string][]int64{}, map[string]int64{}, map[string]int64{}}
	}
	switch a.Do {
	case Append:
		o.appended[a.Key] = append(o.appended[a.Key], a.Value)
	case Write:
		o.written[a.Key] = a.Value
	case Add:
		o.added[a.Key] += a.Value
	}
}
