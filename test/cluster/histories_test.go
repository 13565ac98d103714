package cluster_test

import (
	"context"
	"os"
	"regexp"
	"testing"
	"time"

	histories "github.com/quorate/quorate/test/check"
	"github.com/quorate/quorate/test/cluster"
	"github.com/quorate/quorate/test/workload"
)

// expected is what clients may be told when nothing is broken: conflicts, constraints, that they gave up, and that the
// session ends because its transaction was committed from the log.
var expected = regexp.MustCompile(`SQLSTATE (40001|40P01|23503|23505|57P01)|the client gave up`)

// TestHistories runs all workloads on all nodes at once and has a checker judge what their clients were told.
func TestHistories(t *testing.T) {
	c, ctx := shared(t)
	var urls []string
	for i := 1; i <= c.Nodes; i++ {
		urls = append(urls, cluster.URL(c.Gateway(i)))
	}
	w, err := workload.New(workload.Options{Nodes: urls, Seed: 1})
	check(t, err)
	check(t, w.Setup(ctx))
	check(t, c.Settle(ctx))

	working, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	w.Run(working)
	// Whatever breaks from here on, what the clients were told is judged.
	err = c.Settle(ctx)
	if err == nil {
		err = w.Final(ctx)
	}
	if err != nil {
		t.Error(err)
	}

	history := w.History()
	report := histories.Judge(history, histories.PerNode)
	t.Logf("%v", report.Counts)
	done := map[string]int{}
	for _, op := range history {
		switch {
		case op.Outcome == histories.OK:
			done[op.Kind]++
		case !expected.MatchString(op.Error):
			t.Errorf("without a fault, %v: %s", op, op.Error)
		}
	}
	for _, kind := range workload.Kinds() {
		if done[kind] == 0 {
			t.Errorf("%s did nothing", kind)
		}
	}
	if err := report.Err(); err != nil {
		t.Errorf("%v\nhistory: %s", err, keep(t, history))
	}
}

// keep writes a history to a file that outlives the test, for test/check/judge, and returns its name.
func keep(t *testing.T, history histories.History) string {
	t.Helper()
	file, err := os.CreateTemp("", "history-*.jsonl")
	check(t, err)
	check(t, histories.WriteHistory(file, history))
	check(t, file.Close())
	return file.Name()
}
