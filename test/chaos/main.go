// Command chaos runs a cluster, works on it from all sides, breaks parts of it as a seed says, and judges what the clients
// were told.
//
//	go run ./test/chaos -seed 7 -duration 1m
//
// Or it measures how long faults keep clients from committing:
//
//	go run ./test/chaos -measure 5
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/quorate/quorate/test/cluster"
	"github.com/quorate/quorate/test/faults"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(1)
	}
}

func command(ctx context.Context) (err error) {
	o := Options{Log: os.Stdout}
	flag.Uint64Var(&o.Seed, "seed", uint64(time.Now().UnixNano())%1_000_000, "`number` that decides which faults come when")
	flag.DurationVar(&o.Duration, "duration", time.Minute, "how long faults go on")
	race := flag.Bool("race", false, "with the race detector in the nodes, which makes them slow")
	kinds := flag.String("faults", "", "only these `kinds`, separated by commas; default all: "+fmt.Sprint(slices.Concat(faults.OnProcesses, faults.OnNetwork)))
	measure := flag.Int("measure", 0, "instead, measure how long each fault keeps clients from committing, in so many `rounds`")
	flag.Parse()
	if *kinds != "" {
		for kind := range strings.SplitSeq(*kinds, ",") {
			o.Kinds = append(o.Kinds, faults.Kind(kind))
		}
	}
	dir, err := cluster.TempDir("")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if o.Binary, err = cluster.Build(ctx, dir, *race); err != nil {
		return err
	}
	if *measure > 0 {
		return Measure(ctx, o.Binary, o.Kinds, *measure, os.Stdout)
	}
	summary, err := Run(ctx, o)
	fmt.Print(summary)
	return err
}
