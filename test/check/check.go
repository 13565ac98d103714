package check

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Freshness says which reads must see what was acknowledged before they began. Final reads must see everything,
// whatever the freshness.
type Freshness int

const (
	PerSession Freshness = iota // those of the same session
	PerNode                     // those on the same node, as long as it has not crashed
	Everywhere                  // all, as on a single server
)

// Anomaly is something that the history shows and the database promised not to do.
type Anomaly struct {
	Name string // what the literature calls it
	Text string // who did what
}

// shown is how many anomalies of one name are told in full.
const shown = 3

// Report is the judgement of a history.
type Report struct {
	Anomalies []Anomaly
	// Permitted are cycles that no serial order explains, and that the isolation levels of the transactions allow.
	Permitted []Anomaly
	Counts    map[Outcome]int
	Reads     int            // how many JudgeLog has compared with the log
	more      map[string]int // anomalies that are not told, by name
}

// Err returns nil when there is no anomaly.
func (r Report) Err() error {
	if len(r.Anomalies) == 0 {
		return nil
	}
	r.Permitted = nil
	return errors.New(r.String())
}

// Has reports whether there is an anomaly of this name.
func (r Report) Has(name string) bool {
	return slices.ContainsFunc(r.Anomalies, func(a Anomaly) bool { return a.Name == name })
}

// String tells everything that was found.
func (r Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d transactions: %d ok, %d failed, %d unknown\n",
		r.Counts[OK]+r.Counts[Failed]+r.Counts[Unknown], r.Counts[OK], r.Counts[Failed], r.Counts[Unknown])
	for _, part := range []struct {
		title string
		found []Anomaly
	}{{"anomaly", r.Anomalies}, {"permitted", r.Permitted}} {
		for i, a := range part.found {
			fmt.Fprintf(&b, "%s: %s\n%s", part.title, a.Name, a.Text)
			last := i == len(part.found)-1 || part.found[i+1].Name != a.Name
			if n := r.more[part.title+a.Name]; last && n > 0 {
				fmt.Fprintf(&b, "  … and %d more\n", n)
			}
		}
	}
	return b.String()
}

// judge is the work of one Judge.
type judge struct {
	history   History
	freshness Freshness
	// happened tells which transactions have committed: those that are said to, and those of unknown outcome whose
	// writes somebody has read.
	happened  []bool
	g         graph
	snapshots []event // the first of each transaction
	commits   []event
	keys      []string // of lists and registers; edges have the number
	keyNumber map[string]int32
	lists     map[string]*object
	registers map[string]*object
	told      map[int32]bool // transactions of anomalies that a cycle would only tell again
	found     []Anomaly
	permitted []Anomaly
	count     map[string]int
}

// Judge judges a history.
func Judge(history History, freshness Freshness) Report {
	j := &judge{
		history: history, freshness: freshness,
		keyNumber: map[string]int32{}, lists: map[string]*object{}, registers: map[string]*object{},
		told: map[int32]bool{}, count: map[string]int{},
	}
	j.collect()
	j.events()
	j.judgeLists()
	j.judgeRegisters()
	j.clock()
	j.cycles()
	j.judgeCounters()
	j.judgeRows()

	r := Report{Anomalies: j.found, Permitted: j.permitted, Counts: map[Outcome]int{}, more: map[string]int{}}
	for _, found := range [][]Anomaly{r.Anomalies, r.Permitted} {
		slices.SortStableFunc(found, func(a, b Anomaly) int { return cmp.Compare(a.Name, b.Name) })
	}
	for name, n := range j.count {
		r.more[name] = n - shown
	}
	for i := range history {
		r.Counts[history[i].Outcome]++
	}
	return r
}

// anomaly records one and shows the transactions that are involved, which the text calls T1, T2 and so on.
func (j *judge) anomaly(name string, ops []int, format string, args ...any) {
	j.tell(&j.found, "anomaly", name, ops, fmt.Sprintf(format, args...))
}

func (j *judge) tell(into *[]Anomaly, title, name string, ops []int, text string) {
	if j.count[title+name]++; j.count[title+name] > shown {
		return
	}
	var b strings.Builder
	for i, op := range ops {
		fmt.Fprintf(&b, "  T%d: %s\n", i+1, j.history[op])
	}
	for line := range strings.SplitSeq(text, "\n") {
		fmt.Fprintf(&b, "  %s\n", line)
	}
	*into = append(*into, Anomaly{name, b.String()})
}

// events makes the events of all transactions that have committed. At repeatable read that is one snapshot and the
// commit; at read committed each action has a snapshot of its own. A transaction that wrote nothing has no place in
// the order of commits: it ends with its snapshot, however old that was on its node.
func (j *judge) events() {
	j.snapshots, j.commits = make([]event, len(j.history)), make([]event, len(j.history))
	for i := range j.history {
		op := &j.history[i]
		if !j.happened[i] {
			continue
		}
		n := 1
		if op.Isolation == ReadCommitted {
			n = max(1, len(op.Do))
		}
		if op.writes() {
			n++
		}
		first := j.g.event(i)
		last := first
		for range n - 1 {
			last = j.g.event(i)
			j.g.edge(last-1, edge{to: last, kind: within})
		}
		j.snapshots[i], j.commits[i] = first, last
		if last != first {
			j.g.edge(last, edge{to: first, kind: serial})
		}
	}
}

// snapshot is what an action of a transaction has read from.
func (j *judge) snapshot(op, action int) event {
	if j.history[op].Isolation == ReadCommitted {
		return j.snapshots[op] + event(action)
	}
	return j.snapshots[op]
}

// overwriting is the event of a transaction that must come after the commit of the transaction whose version it
// replaces: first committer wins, so that had to be in its snapshot; at read committed the statement waited for it.
func (j *judge) overwriting(op int) event {
	if j.history[op].Isolation == ReadCommitted {
		return j.commits[op]
	}
	return j.snapshots[op]
}

// acknowledged reports whether the client knew at the end of a transaction that it had committed.
func (j *judge) acknowledged(op int) bool { return j.history[op].Outcome == OK }

// scope is where a transaction is seen at once, and what must be seen: equal scopes see each other.
func (j *judge) scope(op *Op) int {
	switch j.freshness {
	case PerSession:
		return op.Process
	case PerNode:
		return op.Node
	default:
		return 0
	}
}

// clock adds what follows from the time at which clients began and knew outcomes.
func (j *judge) clock() {
	var ends, commits, final []stamp
	scopes := map[int][2][]stamp{}
	for i := range j.history {
		op := &j.history[i]
		if !j.happened[i] {
			continue
		}
		scope := scopes[j.scope(op)]
		if j.acknowledged(i) {
			end := stamp{at: op.End, event: j.commits[i]}
			ends, scope[0] = append(ends, end), append(scope[0], end)
		}
		if op.writes() {
			commits = append(commits, stamp{at: op.Start, event: j.commits[i]})
		}
		start := stamp{at: op.Start, event: j.snapshots[i]}
		if op.Final {
			final = append(final, start)
		} else {
			scope[1] = append(scope[1], start)
		}
		scopes[j.scope(op)] = scope
	}
	j.g.chain(edge{kind: order}, ends, commits)
	j.g.chain(edge{kind: session}, ends, final)
	for _, scope := range scopes {
		j.g.chain(edge{kind: session}, scope[0], scope[1])
	}
}

// cycles finds cycles, from those that need the fewest promises to be forbidden to those that need all. A
// component that contains a transaction of a cycle found before would tell the same story again.
func (j *judge) cycles() {
	for _, allowed := range []kinds{within | ww, within | ww | wr, within | depend, promised, within | depend | serial} {
		components := j.g.components(allowed)
		slices.SortFunc(components, func(a, b []event) int { return cmp.Compare(slices.Min(a), slices.Min(b)) })
		for _, component := range components {
			if slices.ContainsFunc(component, func(v event) bool { return j.told[j.g.op[v]] }) {
				continue
			}
			slices.Sort(component)
			cycle := j.g.cycle(component, allowed)
			if len(cycle) == 0 {
				continue // a transaction alone, whose commit comes before its snapshot
			}
			ops := make([]int, len(cycle))
			for i, s := range cycle {
				ops[i] = s.from
				j.told[int32(s.from)] = true
			}
			if allowed&serial == 0 {
				j.tell(&j.found, "anomaly", j.nameOf(cycle), ops, j.explain(cycle))
			} else {
				j.tell(&j.permitted, "permitted", j.nameOfPermitted(ops), ops, j.explain(cycle))
			}
		}
	}
}

// nameOf names a cycle that is forbidden.
func (j *judge) nameOf(cycle []step) string {
	count := map[kinds]int{}
	for _, s := range cycle {
		count[s.kind]++
	}
	name := "G-nonadjacent (long fork)"
	switch {
	case count[rw] == 1 && len(cycle) == 2 && count[ww] == 1 && cycle[0].key == cycle[1].key:
		name = "lost update"
	case count[rw] == 1 && count[ww]+count[wr] == 0:
		return "stale read"
	case count[rw] == 1:
		name = "G-single (read skew)"
	case count[rw] == 0 && count[wr] == 0:
		name = "G0 (dirty write)"
	case count[rw] == 0:
		name = "G1c (circular information flow)"
	}
	switch {
	case count[session] > 0:
		name += ", stale"
	case count[order] > 0:
		name += ", out of order"
	}
	return name
}

func (j *judge) nameOfPermitted(ops []int) string {
	if slices.ContainsFunc(ops, func(op int) bool { return j.history[op].Isolation == ReadCommitted }) {
		return "not serializable, at read committed"
	}
	return "G2-item (write skew)"
}

// explain tells, edge by edge, why each transaction of a cycle comes before the next.
func (j *judge) explain(cycle []step) string {
	lines := make([]string, len(cycle))
	for i, s := range cycle {
		a, b := i+1, (i+1)%len(cycle)+1
		var why string
		switch s.kind {
		case ww, wr, rw:
			why = j.dependency(s.edge, a, b)
		case session:
			where := map[Freshness]string{PerSession: "in the same session", PerNode: "on the same node", Everywhere: "on a database that is never stale"}[j.freshness]
			if j.history[s.to].Final {
				where = "and everything was to be visible by then"
			}
			why = fmt.Sprintf("T%d was acknowledged at %v, before T%d began at %v, %s", a, j.history[s.from].End, b, j.history[s.to].Start, where)
		case order:
			why = fmt.Sprintf("T%d was over at %v, before T%d began at %v, so it commits first", a, j.history[s.from].End, b, j.history[s.to].Start)
		}
		lines[i] = fmt.Sprintf("T%d before T%d: %s", a, b, why)
	}
	return strings.Join(lines, "\n")
}

func (j *judge) dependency(e edge, a, b int) string {
	key := j.keys[e.key]
	wrote, what := "wrote", "register"
	if j.lists[key] != nil {
		wrote, what = "appended", "list"
	}
	switch e.kind {
	case ww:
		return fmt.Sprintf("T%d %s %d to %s, and T%d %s %d after it", a, wrote, e.from, key, b, wrote, e.over)
	case wr:
		return fmt.Sprintf("T%d %s %d to %s, and T%d has read it", a, wrote, e.from, key, b)
	default:
		seen := fmt.Sprintf("T%d has read %s %s up to %d", a, what, key, e.from)
		if e.from == 0 {
			seen = fmt.Sprintf("T%d has read %s %s without a value", a, what, key)
		} else if what == "register" {
			seen = fmt.Sprintf("T%d has read %d in register %s", a, e.from, key)
		}
		return fmt.Sprintf("%s, not yet the %d that T%d %s", seen, e.over, b, wrote)
	}
}
