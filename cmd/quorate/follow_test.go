package main

import (
	"strings"
	"testing"
	"time"

	pb "github.com/quorate/quorate/proto/quorate/v1"
)

// Events that are followed are lines in columns, whatever is to come, or documents; what is printed is where to go on.
func TestFollowerPrints(t *testing.T) {
	e := &pb.Event{Node: 2, Number: 7, TimeMs: time.Date(2026, 11, 21, 10, 0, 0, 0, time.Local).UnixMilli(), Severity: pb.Severity_SEVERITY_WARNING, Kind: "peer_lost",
		Text: "node 3 is not\x1b[2J heard any more", About: 3, Fields: map[string]string{"repetitions": "4"}}
	for format, want := range map[string]string{
		"table": "2026-11-21 10:00:00.000   2  warning  peer_lost        node 3 is not·[2J heard any more (and 4 times more)\n",
		"json":  `"number":7,"severity":"warning","kind":"peer_lost","about":3,`,
		"yaml":  "\nnumber: 7\nseverity: warning\n",
	} {
		var out, log strings.Builder
		a := asking{output: output{format: format, color: "auto"}}
		f := follower{asking: &a, out: &out, log: &log, after: map[uint32]*pb.EventCursor{}, away: true}
		if err := f.took([]*pb.Event{e}); err != nil {
			t.Fatal(err)
		}
		if got := out.String(); !strings.Contains(got, want) || format == "table" && got != want || format == "json" && strings.Count(got, "\n") != 1 {
			t.Errorf("%s: %q, want %q", format, got, want)
		}
		if at := f.after[2]; at.GetNumber() != 7 || at.GetTimeMs() != e.TimeMs || !strings.Contains(log.String(), "again") || f.away {
			t.Errorf("goes on at %v, and says %q", at, &log)
		}
	}
}
