package check

import (
	"cmp"
	"maps"
	"slices"
	"sort"
	"time"
)

// counter is one counter and everything that may have been added to it.
type counter struct {
	key     string
	account bool
	opened  int64
	maybe   sums         // by all that may have committed, at the time they began
	surely  map[int]sums // by those that were acknowledged, at that time, in one scope
	all     sums         // the same in all scopes, for final reads
}

// sums are amounts at times.
type sums []amount

type amount struct {
	at              time.Duration
	plus, minus     int64 // of what is added and what is taken
	plusTo, minusTo int64 // with all earlier ones, once totalled
}

func (s sums) total() {
	slices.SortStableFunc(s, func(a, b amount) int { return cmp.Compare(a.at, b.at) })
	var plus, minus int64
	for i := range s {
		plus, minus = plus+s[i].plus, minus+s[i].minus
		s[i].plusTo, s[i].minusTo = plus, minus
	}
}

// before returns the sums of everything earlier than a time.
func (s sums) before(at time.Duration) (plus, minus int64) {
	if n := sort.Search(len(s), func(i int) bool { return s[i].at >= at }); n > 0 {
		return s[n-1].plusTo, s[n-1].minusTo
	}
	return 0, 0
}

func amountOf(at time.Duration, value int64) amount {
	return amount{at: at, plus: max(value, 0), minus: min(value, 0)}
}

// judgeCounters checks each value that was read against what must have been added by then and what may have been.
func (j *judge) judgeCounters() {
	counters := map[string]*counter{}
	get := func(key string) *counter {
		c := counters[key]
		if c == nil {
			c = &counter{key: key, surely: map[int]sums{}}
			counters[key] = c
		}
		return c
	}
	var total int64 // of all accounts
	for i := range j.history {
		op := &j.history[i]
		if op.Outcome == Failed {
			continue
		}
		for _, a := range op.Do {
			switch a.Do {
			case Open:
				c := get(a.Key)
				c.account, c.opened = true, c.opened+a.Value
				total += a.Value
			case Add:
				c := get(a.Key)
				c.maybe = append(c.maybe, amountOf(op.Start, a.Value))
				if op.Outcome == OK {
					end := amountOf(op.End, a.Value)
					c.surely[j.scope(op)] = append(c.surely[j.scope(op)], end)
					c.all = append(c.all, end)
				}
			}
		}
	}
	for _, c := range counters {
		c.maybe.total()
		c.all.total()
		for _, s := range c.surely {
			s.total()
		}
	}
	for i := range j.history {
		op := &j.history[i]
		if op.Outcome != OK {
			continue
		}
		own := map[string]int64{}
		for _, a := range op.Do {
			switch a.Do {
			case Add:
				own[a.Key] += a.Value
			case Count:
				j.judgeCount(i, get(a.Key), a.Value, own[a.Key])
			case Balances:
				var sum int64
				for _, key := range slices.Sorted(maps.Keys(a.Counts)) {
					value := a.Counts[key]
					sum += value
					j.judgeCount(i, get(key), value, own[key])
				}
				if sum != total {
					j.anomaly("unbalanced bank", []int{i}, "the accounts add up to %d, and must to %d in each snapshot", sum, total)
				}
			}
		}
	}
}

// judgeCount checks a value that a transaction has read after having added own itself.
func (j *judge) judgeCount(i int, c *counter, value, own int64) {
	op := &j.history[i]
	surely := c.surely[j.scope(op)]
	if op.Final {
		surely = c.all
	}
	mustPlus, mustMinus := surely.before(op.Start)
	mayPlus, mayMinus := c.maybe.before(op.End)
	// What the transaction adds itself began before it ended, and it saw exactly what it had added by then.
	for _, a := range op.Do {
		if a.Do == Add && a.Key == c.key {
			mayPlus, mayMinus = mayPlus-max(a.Value, 0), mayMinus-min(a.Value, 0)
		}
	}
	low, high := c.opened+own+mustPlus+mayMinus, c.opened+own+mayPlus+mustMinus
	switch {
	case c.account && value < 0:
		j.anomaly("negative balance", []int{i}, "account %s is at %d", c.key, value)
	case value < low:
		j.anomaly("counter too low", []int{i}, "counter %s was read as %d; what had been acknowledged makes it at least %d: an update is lost", c.key, value, low)
	case value > high:
		j.anomaly("counter too high", []int{i}, "counter %s was read as %d; everything that may have happened makes it at most %d", c.key, value, high)
	}
}
