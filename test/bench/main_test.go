package main

import (
	"bytes"
	"strings"
	"testing"
)

// TestRun measures for a second each, with all that a real run does except the reads, which need pgbouncer.
func TestRun(t *testing.T) {
	var out bytes.Buffer
	err := run(t.Context(), []string{
		"-short", "-duration", "1s", "-only", "simple-update", "-clients", "3",
	}, &out, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"### Writes, on tmpfs", "| simple-update | 3 |", "| three nodes, node 3 |"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing from\n%s", want, out.String())
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for _, args := range []string{
		"-clients 0", "-clients 1,x", "-only all", "-where ram", "-duration 10ms", "-protocol binary", "-rounds 0", "surplus",
	} {
		if _, err := parse(strings.Fields(args), t.Output()); err == nil {
			t.Errorf("%s was accepted", args)
		}
	}
}

func TestMedian(t *testing.T) {
	for _, test := range []struct {
		in   []float64
		want float64
	}{{[]float64{3}, 3}, {[]float64{9, 1, 4}, 4}, {[]float64{4, 1, 2, 9}, 3}} {
		if got := middle(test.in); got != test.want {
			t.Errorf("middle(%v) = %v, want %v", test.in, got, test.want)
		}
	}
}
