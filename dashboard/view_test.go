package dashboard

import (
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/quorate/quorate/txn"
)

func cluster(n int) *View {
	v := &View{Cluster: Cluster{Node: 1, Leader: 1, Quorum: true}}
	for id := 1; id <= n; id++ {
		v.Nodes = append(v.Nodes, Node{ID: txn.NodeID(id), State: "active", Voter: true, Reachable: true, Writes: true})
	}
	return v
}

func TestAssess(t *testing.T) {
	for _, c := range []struct {
		name    string
		nodes   int
		change  func(*View)
		level   string
		mayFail int
		text    string // part of text or troubles
	}{
		{"three", 3, func(*View) {}, Healthy, 1, "One more node may fail."},
		{"five", 5, func(*View) {}, Healthy, 2, "2 more nodes may fail."},
		{"one alone is as it should be", 1, func(*View) {}, Healthy, 0, "No node may fail now"},
		{"one of three gone", 3, func(v *View) { v.Nodes[2].Reachable = false; v.Nodes[2].Reason = "no heartbeat" }, Degraded, 0, "node 3 is not reached: no heartbeat."},
		{"two of three gone", 3, func(v *View) {
			v.Nodes[1].Reachable, v.Nodes[2].Reachable, v.Cluster.Quorum, v.Cluster.Leader = false, false, false, 0
		}, NoQuorum, 0, "This node reaches 1 of 3 voters, and 2 are needed: nothing can be committed here. Bring back node 2 or node 3."},
		{"not heard, before Raft has given up", 3, func(v *View) { v.Nodes[1].Reachable, v.Nodes[2].Reachable = false, false }, NoQuorum, 0,
			"This node hears 1 of 3 voters, and 2 are needed: commits wait here, and are refused soon if this lasts."},
		{"electing", 3, func(v *View) { v.Cluster.Leader = 0 }, Degraded, 1, "There is no leader"},
		{"catching up", 3, func(v *View) { v.Nodes[1].State, v.Nodes[1].Reason = "catching-up", "it applies the log." }, Degraded, 1, "node 2 is catching-up: it applies the log."},
		{"read only", 3, func(v *View) { v.Nodes[1].Writes = false }, Degraded, 1, "node 2 takes no writes."},
		{"a witness takes no writes", 3, func(v *View) { v.Nodes[1].Writes, v.Nodes[1].Witness = false, true }, Healthy, 1, "One more"},
		{"who has no vote is no majority", 3, func(v *View) { v.Nodes[2].Voter = false }, Healthy, 0, "No node may fail now"},
		{"one direction", 3, func(v *View) { v.Links = []Link{{From: 3, To: 2, Known: true, Lost: true}} }, Degraded, 1, "node 2 does not hear node 3."},
		{"an unknown direction is not broken", 3, func(v *View) { v.Links = []Link{{From: 3, To: 2, Lost: true}} }, Healthy, 1, "One more"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := cluster(c.nodes)
			c.change(v)
			d := assess(v)
			if d.Level != c.level || d.MayFail != c.mayFail {
				t.Errorf("got %s, %d may fail; want %s, %d", d.Level, d.MayFail, c.level, c.mayFail)
			}
			if all := d.Text + "\n" + strings.Join(d.Troubles, "\n"); !strings.Contains(all, c.text) {
				t.Errorf("got %q, want %q", all, c.text)
			}
		})
	}
}

// That nobody hears a node that is gone is one trouble, not one for each who does not hear it.
func TestAssessSaysThingsOnce(t *testing.T) {
	v := cluster(3)
	v.Nodes[2].Reachable = false
	v.Links = []Link{{From: 3, To: 1, Known: true, Lost: true}, {From: 3, To: 2, Known: true, Lost: true}}
	if d := assess(v); len(d.Troubles) != 1 {
		t.Errorf("troubles: %q", d.Troubles)
	}
}

func TestQuantile(t *testing.T) {
	h := Histogram{Bounds: []float64{1, 2, 4}, Counts: []uint64{50, 90, 100}, Total: 100}
	for q, want := range map[float64]float64{0.25: 0.5, 0.5: 1, 0.7: 1.5, 0.9: 2, 0.95: 3, 1: 4} {
		if got := h.quantile(q); math.Abs(got-want) > 1e-9 {
			t.Errorf("quantile %v: %v, want %v", q, got, want)
		}
	}
	// Above the last bound nothing is known but that.
	if got := (Histogram{Bounds: []float64{1}, Counts: []uint64{0}, Total: 5}).quantile(0.5); got != 1 {
		t.Errorf("above all bounds: %v", got)
	}
	for _, h := range []Histogram{{}, {Total: 3}, {Bounds: []float64{1}, Total: 3}} {
		if got := h.quantile(0.5); got != 0 {
			t.Errorf("%+v: %v", h, got)
		}
	}
}

func TestBetween(t *testing.T) {
	before := Counters{Commits: 100, Own: 50, Aborts: map[string]uint64{"conflict": 5},
		Stages: []Stage{{"order", Histogram{[]float64{0.001, 0.01}, []uint64{10, 10}, 10}}}}
	now := Counters{Commits: 300, Own: 30, Aborts: map[string]uint64{"conflict": 9, "new": 2},
		Stages: []Stage{{"order", Histogram{[]float64{0.001, 0.01}, []uint64{10, 20}, 20}}, {"idle", Histogram{[]float64{1}, []uint64{0}, 0}}}}
	s := between(&before, &now, time.UnixMilli(1234), 2*time.Second)
	// Own has begun anew: what is there now has come since.
	if s.At != 1234 || s.Commits != 100 || s.Own != 15 || s.Aborts["conflict"] != 2 || s.Aborts["new"] != 1 {
		t.Errorf("%+v", s)
	}
	// All ten of these two seconds lie in the second bucket; those from before do not count.
	if s.P50["order"] != 5.5 || len(s.P50) != 1 || len(s.P99) != 1 {
		t.Errorf("p50 %v, p99 %v", s.P50, s.P99)
	}
	restarted := Counters{Stages: []Stage{{"order", Histogram{[]float64{0.001, 0.01}, []uint64{4, 4}, 4}}}}
	if s := between(&now, &restarted, time.Now(), time.Second); s.P50["order"] != 0.5 || s.Commits != 0 {
		t.Errorf("after a restart: %+v", s)
	}
}

func TestRound(t *testing.T) {
	for x, want := range map[float64]float64{0: 0, 1234: 1230, 0.012345: 0.0123, 9.999: 10, math.Inf(1): 0, math.NaN(): 0} {
		if got := round(x); math.Abs(got-want) > 1e-12 {
			t.Errorf("round(%v) = %v, want %v", x, got, want)
		}
	}
}

// The history is bounded, and whoever has missed more than it holds gets what it holds.
func TestHistoryIsBounded(t *testing.T) {
	d, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 * remembered {
		d.remember(&Counters{}, &Counters{}, time.Second)
	}
	d.now = &frame{sequence: 1}
	d.history[0].At = 42
	var seen cursor
	if u, _ := d.since(&seen); len(u.Samples) != remembered || u.Samples[0].At != 42 || cap(d.history) > 2*remembered {
		t.Errorf("%d samples, %d kept", len(u.Samples), cap(d.history))
	}
	d.now.sequence++
	if u, _ := d.since(&seen); len(u.Samples) != 0 {
		t.Errorf("%d samples again", len(u.Samples))
	}
}

func TestListsAreBounded(t *testing.T) {
	d, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	d.streams = 1
	v := View{}
	for i := range 5 * listed {
		v.Events = append(v.Events, Event{ID: strconv.Itoa(i)})
		v.Conflicts = append(v.Conflicts, Conflict{ID: strconv.Itoa(i)})
		v.Transactions = append(v.Transactions, Transaction{GID: "x"})
	}
	if err := d.show(1, &v); err != nil {
		t.Fatal(err)
	}
	u, _ := d.since(&cursor{})
	if len(u.Events) != listed || u.Events[listed-1].ID != strconv.Itoa(5*listed-1) || len(u.Conflicts) != listed {
		t.Errorf("%d events, %d conflicts", len(u.Events), len(u.Conflicts))
	}
	if n := strings.Count(string(u.parts[partTransactions]), "gid"); n != waiting {
		t.Errorf("%d transactions", n)
	}
}

func TestPolicyNamesNobodyElse(t *testing.T) {
	for path, f := range must(loadFiles()) {
		for _, outside := range []string{"http://", "https://", "//cdn", "@import"} {
			// The name of a namespace loads nothing.
			if text := strings.ReplaceAll(string(f.content), "http://www.w3.org/2000/svg", ""); strings.Contains(text, outside) {
				t.Errorf("%s mentions %s", path, outside)
			}
		}
	}
	if !slices.Contains(strings.Split(policy, "; "), "default-src 'none'") {
		t.Error(policy)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
