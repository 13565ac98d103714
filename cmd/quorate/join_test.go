package main

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// joining is what a node is, look by look: it waits for the log, then copies 2 GiB in seven seconds, and is active.
func joining() (looks []joinProgress) {
	looks = append(looks, joinProgress{node: "4", state: "joining", reason: "it waits for the log"})
	for n := range 36 {
		looks = append(looks, joinProgress{node: "4", state: "cloning", copying: &copyProgress{
			phase: "copy", donor: "2", bytes: uint64(n) << 26, total: 2 << 30, rate: 320 << 20, left: time.Duration(36-n) * 200 * time.Millisecond}})
	}
	return append(looks,
		joinProgress{node: "4", state: "cloning", copying: &copyProgress{phase: "flush", donor: "2", bytes: 2<<30 + 5, total: 2 << 30, rate: 320 << 20, left: -1}},
		joinProgress{node: "4", state: "active"})
}

func shownOf(t *testing.T, terminal bool) string {
	t.Helper()
	var out strings.Builder
	synctest.Test(t, func(t *testing.T) {
		left := joining()
		showJoining(t.Context(), func() joinProgress {
			p := left[0]
			left = left[1:]
			return p
		}, &out, terminal)
		if len(left) > 0 {
			t.Errorf("it ended %d looks too early", len(left))
		}
	})
	return out.String()
}

// TestJoiningLines: where the output is no terminal there is a line for each step, and one every five seconds.
func TestJoiningLines(t *testing.T) {
	want := []string{
		"node 4 is joining: it waits for the log",
		"copy from node 2 [..............................]   0%, 0.0 KiB of 2.0 GiB, 320.0 MiB/s, 7s left",
		"copy from node 2 [#######################.......]  78%, 1.6 GiB of 2.0 GiB, 320.0 MiB/s, 2s left",
		"flush from node 2 [##############################] 100%, 2.0 GiB of 2.0 GiB, 320.0 MiB/s",
		"node 4 is active",
	}
	if got := shownOf(t, false); got != strings.Join(want, "\n")+"\n" {
		t.Errorf("shown:\n%s\nwant\n%s", got, strings.Join(want, "\n"))
	}
}

// TestJoiningBar: on a terminal there is one line, written anew five times a second.
func TestJoiningBar(t *testing.T) {
	text, ended := strings.CutSuffix(shownOf(t, true), "\n")
	lines := strings.Split(text, "\r\x1b[K")
	if len(lines) != 1+len(joining()) || lines[0] != "" || !ended || strings.Contains(text, "\n") {
		t.Fatalf("shown: %q", text)
	}
	if got, want := lines[20], "copy from node 2 [################..............]  56%, 1.1 GiB of 2.0 GiB, 320.0 MiB/s, 4s left"; got != want {
		t.Errorf("shown %q, want %q", got, want)
	}
	if !slices.IsSortedFunc(lines[2:38], func(a, b string) int { return strings.Count(a, "#") - strings.Count(b, "#") }) {
		t.Errorf("the bar goes back:\n%s", strings.Join(lines, "\n"))
	}
	if lines[len(lines)-1] != "node 4 is active" {
		t.Errorf("at last %q", lines[len(lines)-1])
	}
}
