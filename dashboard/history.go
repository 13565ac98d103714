package dashboard

import (
	"math"
	"time"

	"github.com/quorate/quorate/txn"
)

// Counters is what charts are made of. All but Lag and Queue only ever grow, except that they begin anew with
// PostgreSQL's or the process's next life.
type Counters struct {
	Commits uint64            // of the whole cluster
	Own     uint64            // those that ran on this node
	Aborts  map[string]uint64 // of this node's transactions, by reason
	Stages  []Stage           // of this node's commits, in the order in which they are passed
	Lag     map[txn.NodeID]uint64
	Queue   map[string]uint64 // what waits on this node, by where
}

// Stage is how long one step of a commit took, all of them so far.
type Stage struct {
	Name      string
	Durations Histogram
}

// Histogram has, for each bound in seconds, how many were at most that long, and how many there were at all.
type Histogram struct {
	Bounds []float64
	Counts []uint64
	Total  uint64
}

// sample is a point of every chart. Rates are per second, over the time since the sample before.
type sample struct {
	At      int64                 `json:"at"` // Unix milliseconds
	Commits float64               `json:"commits"`
	Own     float64               `json:"own"`
	Aborts  map[string]float64    `json:"aborts"`
	P50     map[string]float64    `json:"p50"` // milliseconds; a stage that nothing passed is absent
	P99     map[string]float64    `json:"p99"`
	Lag     map[txn.NodeID]uint64 `json:"lag"`
	Queue   map[string]uint64     `json:"queue"`
}

// between makes a sample of two readings that lie that far apart.
func between(before, now *Counters, at time.Time, apart time.Duration) sample {
	rate := func(before, now uint64) float64 {
		return round(float64(grown(before, now)) / apart.Seconds())
	}
	s := sample{
		At: at.UnixMilli(), Commits: rate(before.Commits, now.Commits), Own: rate(before.Own, now.Own),
		Aborts: map[string]float64{}, P50: map[string]float64{}, P99: map[string]float64{}, Lag: now.Lag, Queue: now.Queue,
	}
	for reason, n := range now.Aborts {
		s.Aborts[reason] = rate(before.Aborts[reason], n)
	}
	for i, stage := range now.Stages {
		var earlier Histogram
		if i < len(before.Stages) && before.Stages[i].Name == stage.Name {
			earlier = before.Stages[i].Durations
		}
		if lately := stage.Durations.since(earlier); lately.Total > 0 {
			s.P50[stage.Name] = round(1000 * lately.quantile(0.5))
			s.P99[stage.Name] = round(1000 * lately.quantile(0.99))
		}
	}
	return s
}

// grown is by how much a counter has grown; one that is smaller than before has begun anew.
func grown(before, now uint64) uint64 {
	if now < before {
		return now
	}
	return now - before
}

// since returns what has come since an earlier reading.
func (h Histogram) since(before Histogram) Histogram {
	if len(before.Counts) != len(h.Counts) || before.Total > h.Total {
		return h
	}
	lately := Histogram{Bounds: h.Bounds, Counts: make([]uint64, len(h.Counts)), Total: h.Total - before.Total}
	for i := range h.Counts {
		if before.Counts[i] > h.Counts[i] {
			return h
		}
		lately.Counts[i] = h.Counts[i] - before.Counts[i]
	}
	return lately
}

// quantile estimates as Prometheus does: values are taken to be spread evenly within a bucket. What lies above the
// last bound is reported as that bound.
func (h Histogram) quantile(q float64) float64 {
	if len(h.Bounds) == 0 || len(h.Bounds) != len(h.Counts) {
		return 0
	}
	rank := q * float64(h.Total)
	lower, below := 0.0, 0.0
	for i, bound := range h.Bounds {
		upTo := float64(h.Counts[i])
		if upTo >= rank && upTo > below {
			return lower + (bound-lower)*(rank-below)/(upTo-below)
		}
		lower, below = bound, upTo
	}
	return h.Bounds[len(h.Bounds)-1]
}

// round keeps three digits: a history is sent to every page that opens.
func round(x float64) float64 {
	if x == 0 || math.IsNaN(x) || math.IsInf(x, 0) {
		return 0
	}
	scale := math.Pow(10, 2-math.Floor(math.Log10(math.Abs(x))))
	return math.Round(x*scale) / scale
}
