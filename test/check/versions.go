package check

import (
	"maps"
	"slices"
)

// object is one list or register, and who wrote what to it.
type object struct {
	key    string
	number int32
	writes map[int64]write
	reads  []read
}

type write struct {
	op     int
	before int64 // what its transaction wrote here before, 0 for nothing
	last   bool  // the last that its transaction wrote here: what others may read
}

// read is what a transaction read from outside: without what it had written itself.
type read struct {
	op, action int
	list       []int64 // of a list, in full
	own        int     // how many at its end are the transaction's own
	value      int64   // of a register; or the last of a list; 0 for nothing
}

func (r read) outside() []int64 { return r.list[:len(r.list)-r.own] }

// object returns a list or register, which the first mention makes.
func (j *judge) object(all map[string]*object, key string) *object {
	o := all[key]
	if o == nil {
		number, ok := j.keyNumber[key]
		if !ok {
			number = int32(len(j.keys))
			j.keyNumber[key] = number
			j.keys = append(j.keys, key)
		}
		o = &object{key: key, number: number, writes: map[int64]write{}}
		all[key] = o
	}
	return o
}

// collect finds out who wrote what, which transactions of unknown outcome have committed, and what each has read.
func (j *judge) collect() {
	j.happened = make([]bool, len(j.history))
	for i := range j.history {
		op := &j.history[i]
		latest := map[*object]int64{}
		for _, a := range op.Do {
			var o *object
			switch a.Do {
			case Append:
				o = j.object(j.lists, a.Key)
			case Write:
				o = j.object(j.registers, a.Key)
			default:
				continue
			}
			if other, taken := o.writes[a.Value]; taken || a.Value == 0 {
				j.anomaly("unusable history", []int{other.op, i}, "a value is written once: %s", a)
				continue
			}
			before := latest[o]
			if w, again := o.writes[before]; again {
				w.last = false
				o.writes[before] = w
			}
			o.writes[a.Value] = write{op: i, before: before, last: true}
			latest[o] = a.Value
		}
	}
	var queue []int
	for i := range j.history {
		if j.history[i].Outcome == OK {
			j.happened[i] = true
			queue = append(queue, i)
		}
	}
	saw := func(o *object, value int64) {
		if w, ok := o.writes[value]; ok && j.history[w.op].Outcome == Unknown && !j.happened[w.op] {
			j.happened[w.op] = true
			queue = append(queue, w.op)
		}
	}
	for ; len(queue) > 0; queue = queue[1:] {
		for _, a := range j.history[queue[0]].Do {
			switch a.Do {
			case List:
				o := j.object(j.lists, a.Key)
				for _, v := range a.List {
					saw(o, v)
				}
			case Read:
				saw(j.object(j.registers, a.Key), a.Value)
			}
		}
	}
	for i := range j.history {
		if j.happened[i] {
			j.collectReads(i)
		}
	}
}

// collectReads finds what a transaction has read from others, and whether what it read agrees with what it has done
// and read before.
func (j *judge) collectReads(i int) {
	op := &j.history[i]
	own := map[*object][]int64{}
	before := map[*object]read{} // the read from outside before, at repeatable read
	for n, a := range op.Do {
		switch a.Do {
		case Append:
			o := j.lists[a.Key]
			own[o] = append(own[o], a.Value)
		case Write:
			o := j.registers[a.Key]
			own[o] = append(own[o], a.Value)
		case List:
			o := j.lists[a.Key]
			r := read{op: i, action: n, list: a.List, own: len(own[o])}
			if len(a.List) < r.own || !slices.Equal(a.List[len(a.List)-r.own:], own[o]) {
				j.anomaly("internal inconsistency", []int{i}, "%s does not end in what the transaction itself has appended: %v", a, own[o])
				continue
			}
			if outside := r.outside(); len(outside) > 0 {
				r.value = outside[len(outside)-1]
			}
			if first, again := before[o]; again && !slices.Equal(first.outside(), r.outside()) {
				j.anomaly("internal inconsistency", []int{i}, "list %s changed under a transaction with one snapshot", a.Key)
				continue
			}
			if op.Isolation != ReadCommitted {
				before[o] = r
			}
			o.reads = append(o.reads, r)
		case Read:
			o := j.registers[a.Key]
			if wrote := own[o]; len(wrote) > 0 {
				if a.Value != wrote[len(wrote)-1] {
					j.anomaly("internal inconsistency", []int{i}, "%s, but the transaction itself had written %d", a, wrote[len(wrote)-1])
				}
				continue
			}
			r := read{op: i, action: n, value: a.Value}
			if first, again := before[o]; again && first.value != r.value {
				j.anomaly("internal inconsistency", []int{i}, "register %s changed under a transaction with one snapshot", a.Key)
				continue
			}
			if op.Isolation != ReadCommitted {
				before[o] = r
			}
			o.reads = append(o.reads, r)
		}
	}
}

// from returns who wrote a value that was read, and reports reads of what nobody ever wrote, or what was rolled back.
func (j *judge) from(o *object, r read, value int64) (write, bool) {
	w, ok := o.writes[value]
	switch {
	case !ok:
		j.anomaly("unwritten value", []int{r.op}, "nobody has written the %d in %s", value, o.key)
	case j.history[w.op].Outcome == Failed:
		j.anomaly("G1a (aborted read)", []int{r.op, w.op}, "T1 has read %d in %s, which T2 wrote, and T2 has failed", value, o.key)
		return w, false
	}
	return w, ok
}

// intermediate reports a read that ends in what its writer went on to change.
func (j *judge) intermediate(o *object, r read, w write) {
	if !w.last && w.op != r.op {
		j.anomaly("G1b (intermediate read)", []int{r.op, w.op}, "T1 has read %s as it was after the %d of T2, which then wrote on", o.key, r.value)
	}
}

// sorted returns objects in the order of their keys, so that reports of one history are equal.
func sorted(objects map[string]*object) []*object {
	var all []*object
	for _, key := range slices.Sorted(maps.Keys(objects)) {
		all = append(all, objects[key])
	}
	return all
}

func (j *judge) judgeLists() {
	for _, o := range sorted(j.lists) {
		j.judgeList(o)
	}
}

// judgeList takes the longest list that was read for the order of versions, which all other reads must be beginnings of.
func (j *judge) judgeList(o *object) {
	var long read
	for _, r := range o.reads {
		if len(r.list) > len(long.list) {
			long = r
		}
	}
	judged := map[int64]bool{}
	// Who wrote each version, none for what does not count; and for each version, the first from it on that counts.
	writers, next := make([]int, len(long.list)), make([]int, len(long.list)+1)
	place := map[int64]int{}
	for n, v := range long.list {
		writers[n] = none
		judged[v] = true
		w, ok := j.from(o, long, v)
		if first, twice := place[v]; twice {
			ops := []int{long.op}
			if _, known := o.writes[v]; known {
				ops = append(ops, w.op)
			}
			j.anomaly("duplicate element", ops, "T1 has read %d in list %s at places %d and %d; it was appended once", v, o.key, first+1, n+1)
			continue
		}
		place[v] = n
		if ok {
			writers[n] = w.op
			if w.before != 0 && (n == 0 || long.list[n-1] != w.before) {
				j.anomaly("torn transaction", []int{w.op, long.op}, "T1 appended %d and then %d to list %s, and T2 has not read them next to each other", w.before, v, o.key)
			}
		}
	}
	next[len(long.list)] = none
	for n := len(long.list) - 1; n >= 0; n-- {
		if next[n] = next[n+1]; writers[n] != none {
			next[n] = n
		}
	}

	// What was appended, and is not in the list: it comes after all that is.
	var unseen []stamp
	for _, v := range slices.Sorted(maps.Keys(o.writes)) {
		if w := o.writes[v]; j.happened[w.op] && !judged[v] {
			unseen = append(unseen, stamp{event: j.commits[w.op], value: v})
		}
	}
	unseen = j.lostAppends(o, unseen)
	afterAll := event(none)
	if len(unseen) > 0 {
		afterAll = j.g.event(none)
		for _, u := range unseen {
			j.g.edge(afterAll, edge{to: u.event, kind: rw, key: o.number, over: u.value})
		}
	}

	last := none
	for n, w := range writers {
		if w == none {
			continue
		}
		if last != none && writers[last] != w {
			j.g.edge(j.commits[writers[last]], edge{to: j.overwriting(w), kind: ww, key: o.number, from: long.list[last], over: long.list[n]})
		}
		last = n
	}
	if last != none {
		for _, u := range unseen {
			if w := o.writes[u.value].op; w != writers[last] {
				j.g.edge(j.commits[writers[last]], edge{to: j.overwriting(w), kind: ww, key: o.number, from: long.list[last], over: u.value})
			}
		}
	}

	for _, r := range o.reads {
		if !j.begins(o, r, long, judged) {
			continue
		}
		snapshot := j.snapshot(r.op, r.action)
		seen := len(r.list) - r.own
		if r.value != 0 {
			if w, ok := o.writes[r.value]; ok {
				j.intermediate(o, r, w)
				if j.happened[w.op] && w.op != r.op {
					j.g.edge(j.commits[w.op], edge{to: snapshot, kind: wr, key: o.number, from: r.value, over: r.value})
				}
			}
		}
		if n := next[seen]; n != none {
			if writers[n] != r.op {
				j.g.edge(snapshot, edge{to: j.commits[writers[n]], kind: rw, key: o.number, from: r.value, over: long.list[n]})
			}
		} else if afterAll != none {
			j.g.edge(snapshot, edge{to: afterAll, kind: rw, key: o.number, from: r.value})
		}
	}
}

// begins reports whether what was read is a beginning of the longest list. Elements that are in no list that was
// judged before are judged on the way.
func (j *judge) begins(o *object, r, long read, judged map[int64]bool) bool {
	for n, v := range r.list {
		if v == long.list[n] {
			continue
		}
		for _, v := range r.list[n:] {
			if !judged[v] {
				judged[v] = true
				j.from(o, r, v)
			}
		}
		j.anomaly("incompatible order", []int{r.op, long.op}, "T1 and T2 have read list %s and disagree on element %d: %d or %d", o.key, n+1, v, long.list[n])
		return false
	}
	return true
}

// lostAppends reports what was acknowledged before a final read that does not show it, and returns the others.
func (j *judge) lostAppends(o *object, unseen []stamp) []stamp {
	final := slices.DeleteFunc(slices.Clone(o.reads), func(r read) bool { return !j.history[r.op].Final })
	return slices.DeleteFunc(unseen, func(u stamp) bool {
		w := o.writes[u.value].op
		if !j.acknowledged(w) {
			return false
		}
		for _, r := range final {
			if j.history[w].End < j.history[r.op].Start {
				j.anomaly("lost append", []int{w, r.op}, "T1 was told that it had appended %d to list %s, and T2, which was to see everything, does not", u.value, o.key)
				return true
			}
		}
		return false
	})
}

func (j *judge) judgeRegisters() {
	for _, o := range sorted(j.registers) {
		j.judgeRegister(o)
	}
}

// judgeRegister orders versions by what is known of them. Who has read a version and written another, with one
// snapshot, has replaced the one by the other. And of two writers of which one was over before the other began, the
// other wrote later.
func (j *judge) judgeRegister(o *object) {
	type version struct {
		value int64
		op    int
	}
	wrote := map[int]int64{} // the last value of each transaction
	var ends, starts, overwrites []stamp
	place := map[int64]int{} // of the end of a version in ends
	ends = append(ends, stamp{at: -1, event: none})
	for _, v := range slices.Sorted(maps.Keys(o.writes)) {
		w := o.writes[v]
		if !w.last || !j.happened[w.op] {
			continue
		}
		wrote[w.op] = v
		op := &j.history[w.op]
		if j.acknowledged(w.op) {
			place[v] = len(ends)
			ends = append(ends, stamp{at: op.End, event: none, value: v})
		}
		starts = append(starts, stamp{at: op.Start, event: j.commits[w.op], value: v})
		overwrites = append(overwrites, stamp{at: op.Start, event: j.overwriting(w.op), value: v})
	}
	replaced := map[int64]version{}
	for _, r := range o.reads {
		v, writes := wrote[r.op]
		if !writes || j.history[r.op].Isolation == ReadCommitted {
			continue
		}
		if other, again := replaced[r.value]; again && other.op != r.op {
			j.anomaly("lost update", []int{other.op, r.op}, "T1 and T2 have both read %d in register %s and written another value; first committer wins", r.value, o.key)
			j.told[int32(other.op)], j.told[int32(r.op)] = true, true
			continue
		}
		replaced[r.value] = version{v, r.op}
	}
	// In one row the versions as readers see them, in the other as writers do.
	readersRow := j.g.chain(edge{kind: rw, key: o.number}, ends, starts)
	for n := range ends {
		if v := ends[n].value; v != 0 {
			ends[n].event = j.commits[o.writes[v].op]
		}
	}
	j.g.chain(edge{kind: ww, key: o.number}, ends, overwrites)

	for _, r := range o.reads {
		snapshot := j.snapshot(r.op, r.action)
		if r.value != 0 {
			w, ok := j.from(o, r, r.value)
			if !ok {
				continue
			}
			j.intermediate(o, r, w)
			if w.op != r.op {
				j.g.edge(j.commits[w.op], edge{to: snapshot, kind: wr, key: o.number, from: r.value, over: r.value})
			}
		}
		if next, ok := replaced[r.value]; ok && next.op != r.op {
			j.g.edge(snapshot, edge{to: j.commits[next.op], kind: rw, key: o.number, from: r.value, over: next.value})
		}
		if n, ok := place[r.value]; ok || r.value == 0 {
			j.g.edge(snapshot, edge{to: readersRow[n], kind: rw, key: o.number, from: r.value})
		}
	}
}
