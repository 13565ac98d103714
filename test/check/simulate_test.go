package check_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/quorate/quorate/test/check"
)

// database is a replicated database as simple as can be, which keeps the promises that the checker knows: one log of
// commits, nodes that apply it in order and lag behind, snapshots, first committer wins. It can be told to break
// each of them.
type database struct {
	random  *rand.Rand
	broken  map[fault]bool
	latest  map[string]int // the place in the log of the last entry that changed a key
	log     []entry
	nodes   []*node
	now     time.Duration
	history check.History
	value   int64 // the last that was given out: no two writes write the same
	process int

	decisions []check.Decision // what the log says
}

type fault string

const (
	noCertification fault = "no certification"
	dirtyRead       fault = "dirty read"
	failedCommits   fault = "a transaction that failed commits"
	lostEntry       fault = "an acknowledged entry is lost"
	skippedEntry    fault = "one node skips an entry"
	appliedTwice    fault = "an entry is applied twice"
	tornApply       fault = "an entry is applied in two steps"
	swappedEntries  fault = "a node applies entries in another order"
	earlyAnswer     fault = "a commit is acknowledged before its node shows it"
	movingSnapshot  fault = "each statement has a snapshot of its own"
	ownWrites       fault = "a transaction does not see its own writes"
)

// entry is a place in the log: what each key is changed by.
type entry []change

// change is one write. apply makes the new value from that which the node has.
type change struct {
	key   string
	apply func([]int64) []int64
}

// node has all versions of all keys; the position is how many entries it has applied.
type node struct {
	versions map[string][]version
	position int
	order    []int // of entries to apply next, when they are not in order
	rest     entry // of the last entry, when it is torn
	dirty    map[*session]map[string][]int64
}

type version struct {
	position int
	value    []int64
}

func newDatabase(random *rand.Rand, nodes int, faults ...fault) *database {
	d := &database{random: random, broken: map[fault]bool{}, latest: map[string]int{}}
	for _, f := range faults {
		d.broken[f] = true
	}
	for range nodes {
		d.nodes = append(d.nodes, &node{versions: map[string][]version{}, dirty: map[*session]map[string][]int64{}})
	}
	return d
}

// chance is true once in n times, when the fault is there to happen.
func (d *database) chance(f fault, n int) bool { return d.broken[f] && d.random.IntN(n) == 0 }

func (n *node) at(key string, position int) []int64 {
	versions := n.versions[key]
	for i := len(versions) - 1; i >= 0; i-- {
		if versions[i].position <= position {
			return versions[i].value
		}
	}
	return nil
}

func (n *node) change(c change) {
	n.versions[c.key] = append(n.versions[c.key], version{n.position, c.apply(n.at(c.key, n.position))})
}

// step lets a node apply its next entry.
func (d *database) step(n *node) {
	for _, c := range n.rest {
		n.change(c)
	}
	n.rest = nil
	if n.position == len(d.log) {
		return
	}
	if len(n.order) == 0 {
		n.order = []int{n.position}
		if n.position+1 < len(d.log) && d.broken[swappedEntries] {
			n.order = []int{n.position + 1, n.position}
		}
	}
	e := d.log[n.order[0]]
	n.order = n.order[1:]
	n.position++
	if d.chance(skippedEntry, 30) {
		return
	}
	if len(e) > 1 && d.broken[tornApply] {
		e, n.rest = e[:1], e[1:]
	}
	for _, c := range e {
		n.change(c)
	}
	if d.chance(appliedTwice, 10) {
		for _, c := range e {
			n.change(c)
		}
	}
}

// session is a client with its transaction.
type session struct {
	d        *database
	node     *node
	op       check.Op
	left     int // actions to do
	snapshot int
	base     int
	seen     map[string]int // when a key was locked by a write at read committed
	writes   entry
}

func (d *database) session(node int) *session {
	d.process++
	return &session{d: d, node: d.nodes[node-1], op: check.Op{Process: d.process, Node: node}}
}

func (d *database) tick() time.Duration { d.now += time.Microsecond; return d.now }

func (s *session) begin(isolation check.Isolation, actions int) {
	s.op = check.Op{Start: s.d.tick(), Process: s.op.Process, Node: s.op.Node, Isolation: isolation}
	s.left, s.base, s.snapshot, s.writes, s.seen = actions, s.node.position, s.node.position, nil, map[string]int{}
}

func (s *session) do(a check.Action) { s.op.Do = append(s.op.Do, a) }

func (s *session) get(key string) []int64 {
	value := s.node.at(key, s.snapshot)
	if s.d.chance(dirtyRead, 3) {
		for _, process := range slices.SortedFunc(maps.Keys(s.node.dirty), func(a, b *session) int { return a.op.Process - b.op.Process }) {
			if v, ok := s.node.dirty[process][key]; ok && process != s {
				value = v
			}
		}
	}
	if s.d.chance(ownWrites, 3) {
		return value
	}
	for _, c := range s.writes {
		if c.key == key {
			value = c.apply(value)
		}
	}
	return value
}

func (s *session) put(key string, apply func([]int64) []int64) {
	s.writes = append(s.writes, change{key, apply})
	if _, again := s.seen[key]; !again {
		s.seen[key] = s.snapshot
	}
	dirty := s.node.dirty[s]
	if dirty == nil {
		dirty = map[string][]int64{}
		s.node.dirty[s] = dirty
	}
	dirty[key] = apply(s.get(key))
}

func set(value ...int64) func([]int64) []int64 {
	return func([]int64) []int64 { return value }
}

func first(value []int64) int64 {
	if len(value) == 0 {
		return 0
	}
	return value[0]
}

var accounts = []string{"a", "b", "c"}

// act does one random action.
func (s *session) act() {
	d := s.d
	if s.op.Isolation == check.ReadCommitted || s.d.broken[movingSnapshot] {
		s.snapshot = s.node.position
	}
	s.left--
	pick := func(prefix string) string { return fmt.Sprint(prefix, d.random.IntN(3)) }
	d.value++
	value := d.value
	switch d.random.IntN(12) {
	case 0, 1:
		key := pick("list")
		s.put(key, func(v []int64) []int64 { return append(slices.Clone(v), value) })
		s.do(check.Action{Do: check.Append, Key: key, Value: value})
	case 2, 3, 4:
		key := pick("list")
		s.do(check.Action{Do: check.List, Key: key, List: s.get(key)})
	case 5:
		key := pick("register")
		s.do(check.Action{Do: check.Read, Key: key, Value: first(s.get(key))})
	case 6:
		key := pick("register")
		if d.random.IntN(2) == 0 {
			s.do(check.Action{Do: check.Read, Key: key, Value: first(s.get(key))})
		}
		s.put(key, set(value))
		s.do(check.Action{Do: check.Write, Key: key, Value: value})
	case 7:
		s.put("counter", func(v []int64) []int64 { return []int64{first(v) + 1} })
		s.do(check.Action{Do: check.Add, Key: "counter", Value: 1})
	case 8:
		s.do(check.Action{Do: check.Count, Key: "counter", Value: first(s.get("counter"))})
	case 9:
		from, to := d.random.IntN(len(accounts)), d.random.IntN(len(accounts))
		if from == to || first(s.get("account/"+accounts[from])) < 5 {
			return
		}
		s.transfer(accounts[from], -5)
		s.transfer(accounts[to], 5)
	case 10:
		s.balances()
	case 11:
		s.family(value)
	}
}

// family inserts and deletes parents, one per key, and children of them.
func (s *session) family(value int64) {
	key := string(rune('P' + s.d.random.IntN(2)))
	parent, children := "parent/"+key, "children/"+key
	switch s.d.random.IntN(4) {
	case 0:
		if len(s.get(parent)) == 0 {
			s.put(parent, set(value))
			s.do(check.Action{Do: check.Insert, Table: "parent", Row: value, Key: key})
		}
	case 1:
		if len(s.get(parent)) > 0 && len(s.get(children)) == 0 {
			s.do(check.Action{Do: check.Delete, Table: "parent", Row: first(s.get(parent)), Key: key})
			s.put(parent, set())
			s.put(children, set())
		}
	case 2:
		switch there := s.get(children); {
		case len(s.get(parent)) == 0:
		case len(there) < 2:
			s.put(children, func(v []int64) []int64 { return append(slices.Clone(v), value) })
			s.do(check.Action{Do: check.Insert, Table: "child", Refs: "parent", Row: value, Key: key})
		default:
			s.put(children, func(v []int64) []int64 { return v[min(1, len(v)):] })
			s.do(check.Action{Do: check.Delete, Table: "child", Refs: "parent", Row: there[0], Key: key})
		}
	default:
		s.scan()
	}
}

func (s *session) transfer(account string, amount int64) {
	s.put("account/"+account, func(v []int64) []int64 { return []int64{first(v) + amount} })
	s.do(check.Action{Do: check.Add, Key: account, Value: amount})
}

func (s *session) balances() {
	counts := map[string]int64{}
	for _, account := range accounts {
		counts[account] = first(s.get("account/" + account))
	}
	s.do(check.Action{Do: check.Balances, Counts: counts})
}

func (s *session) scan() {
	parents, children := check.Action{Do: check.Scan, Table: "parent"}, check.Action{Do: check.Scan, Table: "child", Refs: "parent"}
	for _, key := range []string{"P", "Q"} {
		for _, id := range s.get("parent/" + key) {
			parents.Rows = append(parents.Rows, check.Row{Row: id, Key: key})
		}
		for _, id := range s.get("children/" + key) {
			children.Rows = append(children.Rows, check.Row{Row: id, Key: key})
		}
	}
	s.do(parents)
	s.do(children)
}

// end commits, or not.
func (s *session) end(final bool) {
	d := s.d
	delete(s.node.dirty, s)
	s.op.Final = final
	conflict := false
	for _, c := range s.writes {
		// At read committed a statement that only adds works on what is there when it has the lock.
		since := s.snapshot
		if s.op.Isolation == check.ReadCommitted {
			since = s.seen[c.key]
		}
		conflict = conflict || d.latest[c.key] > since
	}
	if d.broken[noCertification] {
		conflict = false
	}
	if len(s.writes) > 0 {
		d.value++
		s.op.Name = fmt.Sprint("T", d.value)
	}
	gaveUp := !final && d.random.IntN(20) == 0
	lost := !final && d.random.IntN(20) == 0 // the connection, at commit
	s.op.Outcome = check.OK
	switch {
	case conflict || gaveUp && !lost:
		s.op.Outcome = check.Failed
	case lost:
		s.op.Outcome = check.Unknown
	}
	if commits := !conflict && !gaveUp || d.chance(failedCommits, 2); commits && len(s.writes) > 0 && !d.chance(lostEntry, 30) {
		d.log = append(d.log, s.writes)
		decision := check.Decision{Name: s.op.Name, Base: uint64(s.base), Seen: uint64(s.node.position), CSN: uint64(len(d.log))}
		for _, c := range s.writes {
			d.latest[c.key] = len(d.log)
			decision.Keys = append(decision.Keys, "W:"+c.key)
		}
		d.decisions = append(d.decisions, decision)
		for s.node.position < len(d.log) && s.op.Outcome == check.OK && !d.broken[earlyAnswer] {
			d.step(s.node)
		}
	}
	if s.op.End = d.tick(); len(s.op.Do) > 0 {
		d.history = append(d.history, s.op)
	}
}

// simulate runs sessions on all nodes until there are enough transactions, then reads everything.
func simulate(random *rand.Rand, nodes, transactions int, faults ...fault) check.History {
	return simulated(random, nodes, transactions, faults...).history
}

func simulated(random *rand.Rand, nodes, transactions int, faults ...fault) *database {
	d := newDatabase(random, nodes, faults...)
	setup := d.session(1)
	setup.begin(check.RepeatableRead, 0)
	for _, account := range accounts {
		setup.put("account/"+account, set(20))
		setup.do(check.Action{Do: check.Open, Key: account, Value: 20})
	}
	d.log = append(d.log, setup.writes)
	d.decisions = append(d.decisions, check.Decision{Name: "setup", CSN: 1})
	for _, n := range d.nodes {
		for _, c := range setup.writes {
			n.change(c)
		}
		n.position++
	}
	setup.op.Outcome, setup.op.End = check.OK, d.tick()
	d.history = append(d.history, setup.op)

	var sessions []*session
	for node := range nodes {
		for range 3 {
			sessions = append(sessions, d.session(node+1))
		}
	}
	for len(d.history) < transactions {
		if random.IntN(4) == 0 {
			d.step(d.nodes[random.IntN(nodes)])
			continue
		}
		s := sessions[random.IntN(len(sessions))]
		switch {
		case s.op.Start == 0:
			isolation := check.RepeatableRead
			if random.IntN(4) == 0 {
				isolation = check.ReadCommitted
			}
			s.begin(isolation, 1+random.IntN(5))
		case s.left > 0:
			s.act()
		default:
			s.end(false)
			s.op.Start = 0
			if s.op.Outcome == check.Unknown { // the client connects again
				d.process++
				s.op.Process = d.process
			}
		}
	}
	for i, n := range d.nodes {
		for n.position < len(d.log) || n.rest != nil {
			d.step(n)
		}
		s := d.session(i + 1)
		s.begin(check.RepeatableRead, 0)
		for k := range 3 {
			list, register := fmt.Sprint("list", k), fmt.Sprint("register", k)
			s.do(check.Action{Do: check.List, Key: list, List: s.get(list)})
			s.do(check.Action{Do: check.Read, Key: register, Value: first(s.get(register))})
		}
		s.do(check.Action{Do: check.Count, Key: "counter", Value: first(s.get("counter"))})
		s.balances()
		s.scan()
		s.end(true)
	}
	return d
}

// TestCorrectDatabasePasses: what keeps its promises is never accused.
func TestCorrectDatabasePasses(t *testing.T) {
	var permitted int
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		nodes := rapid.IntRange(1, 4).Draw(t, "nodes")
		transactions := rapid.IntRange(5, 600).Draw(t, "transactions")
		freshness := check.PerNode
		if nodes == 1 {
			freshness = check.Everywhere
		}
		d := simulated(rand.New(rand.NewPCG(seed, 0)), nodes, transactions)
		report := check.Judge(d.history, freshness)
		if err := report.Err(); err != nil {
			t.Fatal(err)
		}
		// A log whose beginning was truncated shows less, and nothing that is not so.
		for _, log := range [][]check.Decision{d.decisions, d.decisions[rapid.IntRange(0, len(d.decisions)-1).Draw(t, "truncated"):]} {
			if err := check.JudgeLog(d.history, log).Err(); err != nil {
				t.Fatal(err)
			}
		}
		for _, a := range report.Permitted {
			if strings.Contains(a.Name, "write skew") {
				permitted++
			}
		}
	})
	if permitted == 0 {
		t.Error("no history had a write skew, so none was shown to be allowed")
	}
}

// TestFaultsAreCaught: whatever promise the database breaks, every history shows it, and among five are the anomalies
// that one would expect.
func TestFaultsAreCaught(t *testing.T) {
	for f, names := range map[fault][]string{
		noCertification: {"lost update", "G-single (read skew)", "orphan", "duplicate key"},
		dirtyRead:       {"G1a (aborted read)", "duplicate element"},
		failedCommits:   {"G1a (aborted read)"},
		lostEntry:       {"lost append", "counter too low", "lost insert", "stale read"},
		skippedEntry:    {"incompatible order", "lost append", "lost update"},
		appliedTwice:    {"duplicate element", "counter too high", "duplicate row"},
		tornApply:       {"G-single (read skew)", "unbalanced bank"},
		swappedEntries:  {"incompatible order", "G0 (dirty write), out of order"},
		earlyAnswer:     {"stale read"},
		movingSnapshot:  {"internal inconsistency", "G-single (read skew)"},
		ownWrites:       {"internal inconsistency"},
	} {
		t.Run(string(f), func(t *testing.T) {
			found := map[string]bool{}
			for seed := range uint64(5) {
				report := check.Judge(simulate(rand.New(rand.NewPCG(seed, 1)), 3, 1500, f), check.PerSession)
				if report.Err() == nil {
					t.Errorf("seed %d: nothing found", seed)
				}
				for _, a := range report.Anomalies {
					found[a.Name] = true
				}
			}
			for _, name := range names {
				if !found[name] {
					t.Errorf("no %q, only %q", name, slices.Sorted(maps.Keys(found)))
				}
			}
		})
	}
}

// TestLogCatchesFaults: with the log at hand, whatever promise the database breaks is seen too, but for an answer that
// comes too early, which is a matter of what clients saw when.
func TestLogCatchesFaults(t *testing.T) {
	for f, names := range map[fault][]string{
		noCertification: {"lost update", "not the state at its snapshot"},
		dirtyRead:       {"not the state at its snapshot"},
		failedCommits:   {"aborted, but committed"},
		lostEntry:       {"lost commit"},
		skippedEntry:    {"not the state at its snapshot"},
		appliedTwice:    {"not the state at its snapshot"},
		tornApply:       {"not the state at its snapshot"},
		swappedEntries:  {"not the state at its snapshot"},
		movingSnapshot:  {"not the state at its snapshot"},
		ownWrites:       {"not the state at its snapshot"},
	} {
		t.Run(string(f), func(t *testing.T) {
			for seed := range uint64(5) {
				d := simulated(rand.New(rand.NewPCG(seed, 1)), 3, 1500, f)
				report := check.JudgeLog(d.history, d.decisions)
				for _, name := range names {
					if !report.Has(name) {
						t.Errorf("seed %d: no %q:\n%s", seed, name, report)
					}
				}
			}
		})
	}
}

// TestLogByItself: what is wrong with a log needs no history.
func TestLogByItself(t *testing.T) {
	good := []check.Decision{{Name: "a", CSN: 1, Keys: []string{"W:x"}}, {Name: "b", Base: 1, Seen: 1, CSN: 2, Keys: []string{"W:x", "R:y"}}, {Name: "c"}}
	for name, tc := range map[string]struct {
		spoil func(log []check.Decision) []check.Decision
		want  string
	}{
		"good": {func(log []check.Decision) []check.Decision { return log }, ""},
		"aborted at first": {func(log []check.Decision) []check.Decision {
			return append(log, check.Decision{Name: "c", Seen: 2, CSN: 3})
		}, ""},
		"gap":             {func(log []check.Decision) []check.Decision { log[1].CSN = 3; return log }, "order broken"},
		"seen itself":     {func(log []check.Decision) []check.Decision { log[1].Seen = 2; return log }, "order broken"},
		"base above seen": {func(log []check.Decision) []check.Decision { log[1].Base = 2; return log }, "order broken"},
		"overlap":         {func(log []check.Decision) []check.Decision { log[1].Base, log[1].Seen = 0, 0; return log }, "lost update"},
		"twice": {func(log []check.Decision) []check.Decision {
			return append(log, check.Decision{Name: "a", Seen: 2, CSN: 3})
		}, "committed twice"},
	} {
		report := check.JudgeLog(nil, tc.spoil(slices.Clone(good)))
		if tc.want == "" && report.Err() != nil || tc.want != "" && !report.Has(tc.want) {
			t.Errorf("%s: want %q, have\n%s", name, tc.want, report)
		}
	}
}
