package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"time"
)

// scrapeInterval is how often a watched node's metrics and health are asked for: more often than is usual.
const scrapeInterval = time.Second

// measureControl compares the cluster with nobody looking and with an audience at every node: the dashboard's stream,
// "quorate watch", and somebody who asks for metrics and health. Throughput differs by more from round to round than
// the audience costs, so what the nodes' processes use while no client is there is shown beside it: with an audience that is all
// that the control room costs, heartbeats included, and more than it costs alone.
func (r *rig) measureControl(ctx context.Context, p plan, where place, stdout, progress io.Writer) error {
	clients := slices.Max(p.clients)
	nodes := []string{r.cluster.Gateway(1)}
	sides := []side{{name: "nobody looks", nodes: nodes}, {name: "watched", nodes: nodes, audience: true}}
	samples, err := r.rounds(ctx, p, where, "simple-update", clients, sides, true, progress)
	if err != nil {
		return err
	}
	var idle [2]float64 // processors
	for s, side := range sides {
		if idle[s], err = r.idle(ctx, p, side); err != nil {
			return err
		}
		fmt.Fprintf(progress, "%s: no clients, %s: %.4f processors\n", where.name, side.name, idle[s])
	}
	perTransaction := func(s int) float64 {
		return median(samples[s], func(m sample) float64 { return float64(cpuTime(m.costs).Microseconds()) / m.transactions })
	}
	fmt.Fprintf(stdout, `### The control room, on %s

simple-update with %d clients at one node, with nobody looking and with the dashboard, "quorate watch" and a scraper of metrics
and health at each node; and how many processors the three nodes use without clients.

| | transactions/s | ratio | CPU µs per transaction, all nodes | processors without clients |
|---|---:|---:|---:|---:|
| nobody looks | %.0f | | %.0f | %.3f |
| watched | %.0f | **%.3f** | %.0f | %.3f |

`, where.name, clients, median(samples[0], tps), perTransaction(0), idle[0],
		median(samples[1], tps), ratio(samples[1], samples[0]), perTransaction(1), idle[1])
	return nil
}

// idle returns how many processors all nodes use together while no client is there.
func (r *rig) idle(ctx context.Context, p plan, s side) (processors float64, err error) {
	if s.audience {
		leave := r.watch(ctx, p.binary)
		defer func() { err = errors.Join(err, leave()) }()
	}
	before, err := r.read(ctx, false)
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	select {
	case <-time.After(3 * p.duration):
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	after, err := r.read(ctx, false)
	if err != nil {
		return 0, err
	}
	return (cpuTime(after) - cpuTime(before)).Seconds() / time.Since(begin).Seconds(), nil
}

// watch seats an audience at every node. leave ends it, and says whether it has seen what it came for.
func (r *rig) watch(ctx context.Context, binary string) (leave func() error) {
	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	errs := make(chan error, 3*r.cluster.Nodes)
	sit := func(what string, node int, look func() (seen int64, err error)) {
		group.Go(func() {
			seen, err := look()
			if err != nil && ctx.Err() == nil {
				errs <- fmt.Errorf("%s of node %d: %w", what, node, err)
			} else if seen == 0 {
				errs <- fmt.Errorf("%s of node %d has shown nothing", what, node)
			}
		})
	}
	for i := 1; i <= r.cluster.Nodes; i++ {
		base := "http://" + r.cluster.HTTP(i)
		sit("the dashboard", i, func() (int64, error) { return fetch(ctx, base+"/dashboard/stream") })
		sit("metrics and health", i, func() (seen int64, err error) {
			for {
				for _, path := range []string{"/metrics", "/health"} {
					n, err := fetch(ctx, base+path)
					seen += n
					if err != nil {
						return seen, err
					}
				}
				select {
				case <-time.After(scrapeInterval):
				case <-ctx.Done():
					return seen, nil
				}
			}
		})
		sit(`"quorate watch"`, i, func() (int64, error) {
			var out written
			cmd := exec.CommandContext(ctx, binary, "watch", "--address", r.cluster.GRPC(i))
			cmd.Stdout, cmd.Stderr = &out, os.Stderr
			cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
			cmd.WaitDelay = 5 * time.Second
			err := cmd.Run()
			return int64(out), err
		})
	}
	return func() error {
		cancel()
		group.Wait()
		close(errs)
		var all []error
		for err := range errs {
			all = append(all, err)
		}
		return errors.Join(all...)
	}
}

// written counts what is written to it.
type written int64

func (w *written) Write(b []byte) (int, error) {
	*w += written(len(b))
	return len(b), nil
}

// fetch reads an answer to its end, which for a stream is that of ctx.
func fetch(ctx context.Context, url string) (int64, error) {
	body, err := get(ctx, url)
	if err != nil {
		return 0, err
	}
	defer body.Close()
	return io.Copy(io.Discard, body)
}
