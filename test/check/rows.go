package check

import (
	"cmp"
	"maps"
	"math"
	"slices"
	"time"
)

// table is what is known of the rows of one table.
type table struct {
	name string
	refs string
	rows map[int64]*row
}

// row is the life of one row.
type row struct {
	key      string
	inserted int   // the transaction
	deleted  []int // those that may have deleted it
}

// judgeRows checks unique and foreign keys, and that rows are there from their insert to their delete.
func (j *judge) judgeRows() {
	tables := map[string]*table{}
	get := func(a Action) *table {
		t := tables[a.Table]
		if t == nil {
			t = &table{name: a.Table, refs: a.Refs, rows: map[int64]*row{}}
			tables[a.Table] = t
		}
		return t
	}
	for i := range j.history {
		for _, a := range j.history[i].Do {
			if a.Do != Insert {
				continue
			}
			t := get(a)
			if other, taken := t.rows[a.Row]; taken {
				j.anomaly("unusable history", []int{other.inserted, i}, "a row is inserted once: %s", a)
				continue
			}
			t.rows[a.Row] = &row{key: a.Key, inserted: i}
		}
	}
	for i := range j.history {
		if j.history[i].Outcome == Failed {
			continue
		}
		for _, a := range j.history[i].Do {
			if a.Do == Delete {
				if r := j.row(get(a), i, Row{a.Row, a.Key}); r != nil {
					r.deleted = append(r.deleted, i)
				}
			}
		}
	}
	for i := range j.history {
		if j.history[i].Outcome != OK {
			continue
		}
		keys := map[string]map[string]bool{} // by table, as this transaction has read them
		for _, a := range j.history[i].Do {
			if a.Do == Scan {
				keys[a.Table] = j.judgeScan(i, get(a), a)
			}
		}
		for _, a := range j.history[i].Do {
			parents, both := keys[a.Refs]
			if a.Do != Scan || !both || j.history[i].Isolation == ReadCommitted {
				continue // only in one snapshot each child has its parent
			}
			for _, r := range a.Rows {
				if !parents[r.Key] {
					j.anomaly("orphan", []int{i}, "row %d of %s refers to %s of %s, which is not there", r.Row, a.Table, r.Key, a.Refs)
				}
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(tables)) {
		t := tables[name]
		j.judgeDeletes(t)
		if t.refs == "" {
			j.judgeUnique(t)
		}
	}
}

// row returns what is known of a row that a transaction has met.
func (j *judge) row(t *table, i int, met Row) *row {
	r := t.rows[met.Row]
	switch {
	case r == nil:
		j.anomaly("unwritten value", []int{i}, "nobody has inserted row %d of %s", met.Row, t.name)
	case r.key != met.Key:
		j.anomaly("unwritten value", []int{r.inserted, i}, "row %d of %s was inserted with key %s and read with %s", met.Row, t.name, r.key, met.Key)
	case j.history[r.inserted].Outcome == Failed:
		j.anomaly("G1a (aborted read)", []int{i, r.inserted}, "T1 has met row %d of %s, which T2 inserted, and T2 has failed", met.Row, t.name)
	}
	return r
}

// judgeScan checks what a transaction has read of a table and returns the keys.
func (j *judge) judgeScan(i int, t *table, a Action) map[string]bool {
	op := &j.history[i]
	keys := map[string]bool{}
	there := map[int64]bool{}
	for _, met := range a.Rows {
		if keys[met.Key] && t.refs == "" {
			j.anomaly("duplicate key", []int{i}, "one scan of %s shows key %s twice", t.name, met.Key)
		}
		if there[met.Row] {
			j.anomaly("duplicate row", []int{i}, "one scan of %s shows row %d twice", t.name, met.Row)
		}
		keys[met.Key], there[met.Row] = true, true
		r := j.row(t, i, met)
		if r == nil || !op.Final {
			continue
		}
		for _, d := range r.deleted {
			if j.history[d].Outcome == OK && j.history[d].End < op.Start {
				j.anomaly("lost delete", []int{d, i}, "T1 was told that it had deleted row %d of %s, and T2, which was to see everything, still meets it", met.Row, t.name)
				break
			}
		}
	}
	if !op.Final {
		return keys
	}
	for _, id := range slices.Sorted(maps.Keys(t.rows)) {
		r := t.rows[id]
		inserter := &j.history[r.inserted]
		if !there[id] && inserter.Outcome == OK && inserter.End < op.Start && len(r.deleted) == 0 {
			j.anomaly("lost insert", []int{r.inserted, i}, "T1 was told that it had inserted row %d of %s, nobody may have deleted it, and T2, which was to see everything, does not see it", id, t.name)
		}
	}
	return keys
}

// judgeDeletes checks that a row is deleted once.
func (j *judge) judgeDeletes(t *table) {
	for _, id := range slices.Sorted(maps.Keys(t.rows)) {
		sure := slices.DeleteFunc(slices.Clone(t.rows[id].deleted), func(i int) bool { return j.history[i].Outcome != OK })
		if len(sure) > 1 {
			j.anomaly("deleted twice", sure[:2], "T1 and T2 were both told that they had deleted row %d of %s", id, t.name)
		}
	}
}

// judgeUnique checks that at no time two rows of one key were acknowledged and surely still there. Everything that is
// acknowledged is in the one order of commits already, and every prefix of it obeys the constraint.
func (j *judge) judgeUnique(t *table) {
	type change struct {
		at     time.Duration
		insert bool
		row    int64
	}
	byKey := map[string][]change{}
	for id, r := range t.rows {
		inserter := &j.history[r.inserted]
		if inserter.Outcome != OK {
			continue
		}
		gone := time.Duration(math.MaxInt64) // when it may have been deleted at the earliest
		for _, d := range r.deleted {
			gone = min(gone, j.history[d].Start)
		}
		if gone > inserter.End {
			byKey[r.key] = append(byKey[r.key], change{inserter.End, true, id}, change{gone, false, id})
		}
	}
	for _, key := range slices.Sorted(maps.Keys(byKey)) {
		changes := byKey[key]
		slices.SortFunc(changes, func(a, b change) int {
			if c := cmp.Compare(a.at, b.at); c != 0 {
				return c
			}
			if a.insert != b.insert { // who goes makes room
				if b.insert {
					return -1
				}
				return 1
			}
			return cmp.Compare(a.row, b.row)
		})
		var live []int64
		for _, c := range changes {
			if !c.insert {
				live = slices.DeleteFunc(live, func(id int64) bool { return id == c.row })
				continue
			}
			if len(live) > 0 {
				j.anomaly("duplicate key", []int{t.rows[live[0]].inserted, t.rows[c.row].inserted},
					"T1 and T2 were both told that they had inserted key %s into %s, and nobody may have deleted it between", key, t.name)
			}
			live = append(live, c.row)
		}
	}
}
