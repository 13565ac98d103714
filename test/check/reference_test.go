package check_test

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/quorate/quorate/test/check"
)

// explainable tells whether snapshot isolation has any way to produce a history of lists in which every outcome is
// known: it tries all orders of snapshots and commits on a database of one map.
func explainable(h check.History) bool {
	n := len(h)
	lists := map[string][]int64{}
	began, ended := make([]bool, n), make([]bool, n)
	dirty := make([]map[string]bool, n) // keys that others have committed since the snapshot
	reader := func(i int) bool {
		return !slices.ContainsFunc(h[i].Do, func(a check.Action) bool { return a.Do == check.Append })
	}
	// mayBegin and mayEnd: what follows from sessions and from the clock.
	mayBegin := func(i int) bool {
		for k := range h {
			if k != i && h[k].End < h[i].Start && (h[k].Process == h[i].Process || h[i].Final) && !ended[k] {
				return false
			}
		}
		own := map[string][]int64{}
		for _, a := range h[i].Do {
			if a.Do == check.Append {
				own[a.Key] = append(own[a.Key], a.Value)
			} else if !slices.Equal(slices.Concat(lists[a.Key], own[a.Key]), a.List) {
				return false
			}
		}
		return true
	}
	mayEnd := func(i int) bool {
		for k := range h {
			if k != i && h[k].End < h[i].Start && !reader(i) && !ended[k] {
				return false
			}
		}
		return !slices.ContainsFunc(h[i].Do, func(a check.Action) bool { return a.Do == check.Append && dirty[i][a.Key] })
	}
	var try func(left int) bool
	try = func(left int) bool {
		if left == 0 {
			return true
		}
		for i := range h {
			switch {
			case !began[i] && mayBegin(i):
				began[i], dirty[i] = true, map[string]bool{}
				ended[i] = reader(i)
				ok := try(left - 1)
				began[i], ended[i] = false, false
				if ok {
					return true
				}
			case began[i] && !ended[i] && mayEnd(i):
				before := map[string][]int64{}
				var marked []func()
				for _, a := range h[i].Do {
					if a.Do != check.Append {
						continue
					}
					if _, again := before[a.Key]; !again {
						before[a.Key] = lists[a.Key]
					}
					lists[a.Key] = append(slices.Clone(lists[a.Key]), a.Value)
					for k := range h {
						if k != i && began[k] && !ended[k] && !dirty[k][a.Key] {
							dirty[k][a.Key] = true
							marked = append(marked, func() { delete(dirty[k], a.Key) })
						}
					}
				}
				ended[i] = true
				ok := try(left - 1)
				ended[i] = false
				for key, list := range before {
					lists[key] = list
				}
				for _, undo := range marked {
					undo()
				}
				if ok {
					return true
				}
			}
		}
		return false
	}
	events := 0
	for i := range h {
		if events++; !reader(i) {
			events++
		}
	}
	return try(events)
}

// TestAgreesWithReference compares verdicts with those of the reference, on small histories of a database that is
// broken in ways that leave plausible histories. The last transaction reads all lists when everything is done, so that
// the order of versions is known and the checker has no excuse.
func TestAgreesWithReference(t *testing.T) {
	verdicts := map[bool]int{}
	rapid.Check(t, func(t *rapid.T) {
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 2))
		transactions := rapid.IntRange(2, 6).Draw(t, "transactions")
		for range 30 { // cheaper than so many draws
			h := listHistory(random, transactions)
			want := explainable(h)
			verdicts[want]++
			if err := check.Judge(h, check.PerSession).Err(); (err == nil) != want {
				t.Fatalf("snapshot isolation explains the history: %v\n%v\n%v", want, h, err)
			}
		}
	})
	if verdicts[true] == 0 || verdicts[false] == 0 {
		t.Errorf("one verdict was never met: %v", verdicts)
	}
}

// listHistory makes transactions that append to two lists and read beginnings of what the lists are in the end. Mostly
// they read what is older than they are.
func listHistory(random *rand.Rand, transactions int) check.History {
	keys := []string{"x", "y"}
	var h check.History
	final := map[string][]int64{}
	writer := map[int64]int{}
	clock := map[int]time.Duration{} // of each process
	var end time.Duration
	for i := range transactions {
		process := 1 + random.IntN(3)
		start := clock[process] + time.Duration(1+random.IntN(4))
		op := check.Op{
			Process: process, Node: process, Isolation: check.RepeatableRead, Outcome: check.OK,
			Start: start, End: start + time.Duration(1+random.IntN(8)),
		}
		clock[process], end = op.End, max(end, op.End)
		for range 1 + random.IntN(3) {
			key := keys[random.IntN(len(keys))]
			if random.IntN(2) == 0 {
				op.Do = append(op.Do, check.Action{Do: check.List, Key: key})
				continue
			}
			value := int64(len(writer) + 1)
			writer[value] = i
			op.Do = append(op.Do, check.Action{Do: check.Append, Key: key, Value: value})
			final[key] = append(final[key], value)
		}
		h = append(h, op)
	}
	for _, key := range keys { // in the order in which the writers ended, mostly
		list := final[key]
		slices.SortStableFunc(list, func(a, b int64) int { return int(h[writer[a]].End - h[writer[b]].End) })
		if len(list) > 1 && random.IntN(3) == 0 {
			n := random.IntN(len(list) - 1)
			list[n], list[n+1] = list[n+1], list[n]
		}
	}
	for i := range h {
		seen := map[string]int{} // how much of each list
		for _, key := range keys {
			n := 0
			for n < len(final[key]) && writer[final[key][n]] != i && (h[writer[final[key][n]]].End < h[i].Start) == (random.IntN(8) > 0) {
				n++
			}
			seen[key] = n
		}
		own := map[string][]int64{}
		for n := range h[i].Do {
			if a := &h[i].Do[n]; a.Do == check.Append {
				own[a.Key] = append(own[a.Key], a.Value)
			} else {
				a.List = slices.Concat(final[a.Key][:seen[a.Key]], own[a.Key])
			}
		}
	}
	last := check.Op{Process: 9, Node: 1, Isolation: check.RepeatableRead, Outcome: check.OK, Final: true, Start: end + 1, End: end + 2}
	for _, key := range keys {
		last.Do = append(last.Do, check.Action{Do: check.List, Key: key, List: final[key]})
	}
	return append(h, last)
}
