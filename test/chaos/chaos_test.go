package main

import (
	"os"
	"testing"
	"time"

	"github.com/quorate/quorate/test/cluster"
	"github.com/quorate/quorate/test/faults"
)

// TestSeeds runs a little chaos. In so short a time few seeds have every kind among them; these have. A seed that fails here fails with "make chaos" too, which see.
func TestSeeds(t *testing.T) {
	dir, err := cluster.TempDir("")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	binary, err := cluster.Build(t.Context(), dir, true)
	must(t, err)
	had := map[faults.Kind]int{}
	var possible []faults.Kind
	for _, seed := range []uint64{26, 50, 62} {
		summary, err := Run(t.Context(), Options{Binary: binary, Seed: seed, Duration: 12 * time.Second, Log: t.Output()})
		t.Log(summary)
		must(t, err)
		possible = summary.Options.Kinds
		for kind, n := range summary.Faults {
			had[kind] += n
		}
	}
	for _, kind := range possible {
		if had[kind] == 0 {
			t.Errorf("none of the seeds has %s", kind)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
