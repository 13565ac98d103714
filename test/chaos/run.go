package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/quorate/quorate/test/check"
	"github.com/quorate/quorate/test/cluster"
	"github.com/quorate/quorate/test/faults"
	"github.com/quorate/quorate/test/network"
	"github.com/quorate/quorate/test/workload"
)

// Options of a run.
type Options struct {
	Binary   string
	Seed     uint64
	Duration time.Duration // how long faults go on
	Kinds    []faults.Kind // those to inject; none means all that this machine allows
	Log      io.Writer     // told what happens
}

// Summary is what a run has done.
type Summary struct {
	Options Options
	Faults  map[faults.Kind]int
	Counts  map[check.Outcome]int
	// Verified counts comparisons of rows in the midst of it, by how many nodes could take part.
	Verified map[int]int
	Took     time.Duration
}

func (s Summary) String() string {
	var b strings.Builder
	n := 0
	for _, kind := range slices.Sorted(maps.Keys(s.Faults)) {
		n += s.Faults[kind]
		fmt.Fprintf(&b, "  %-18s%4d\n", kind, s.Faults[kind])
	}
	return fmt.Sprintf("seed %d, %v: %d faults, %d transactions (%d committed, %d failed, %d unknown), all in %v\n"+
		"rows compared under load: %d times on three nodes, %d times on two\n%s",
		s.Options.Seed, s.Options.Duration, n, s.Counts[check.OK]+s.Counts[check.Failed]+s.Counts[check.Unknown],
		s.Counts[check.OK], s.Counts[check.Failed], s.Counts[check.Unknown], s.Took.Round(time.Second), s.Verified[3], s.Verified[2], b.String())
}

const (
	// nodes in a cluster.
	nodes = 3
	// transactionTimeout is how long a client waits. It is longer than commit_timeout, after which the cluster must answer.
	transactionTimeout = 20 * time.Second
	// currentGID asks a transaction for its name, by which the nodes' logs know it too.
	currentGID = "SELECT quorate.current_gid()"
	// clientPause keeps clients from taking all of a small machine, whose delays would then be the only fault.
	clientPause = 20 * time.Millisecond
	// verifyPause is how long after each comparison of rows the next one begins.
	verifyPause = 2 * time.Second
	// calm is how long clients go on after everything is mended.
	calm = 2 * time.Second
	// calmTimeout is how long nodes have to let go of what they do not need any more.
	calmTimeout = 30 * time.Second
	// recoveryTimeout is how long the cluster has, after everything is mended, until all nodes are equal and active.
	recoveryTimeout = 90 * time.Second
)

// run is one run under way.
type run struct {
	Options
	cluster  *cluster.Cluster
	network  *network.Network
	injector *faults.Injector
	workload *workload.Workload
	baseline [nodes + 1]resources
	begun    time.Time
	summary  Summary

	mu  sync.Mutex
	log strings.Builder
}

// Run runs a workload on a cluster that is broken again and again, and returns an error when the cluster broke a promise.
func Run(ctx context.Context, o Options) (summary Summary, err error) {
	r := &run{Options: o, begun: time.Now(), summary: Summary{Options: o, Faults: map[faults.Kind]int{}, Verified: map[int]int{}}}
	defer func() {
		r.summary.Took = time.Since(r.begun)
		summary = r.summary
		if err != nil {
			err = r.keep(err)
		}
		if r.cluster != nil {
			err = errors.Join(err, r.cluster.Destroy())
		}
		if r.network != nil {
			err = errors.Join(err, r.network.Close())
		}
	}()
	for _, step := range []func(context.Context) error{r.start, r.work, r.judge, r.judgeLogs} {
		if err := step(ctx); err != nil {
			return r.summary, err
		}
	}
	return r.summary, nil
}

// tell writes a line to the log.
func (r *run) tell(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	line := fmt.Sprintf("%8.3fs  %s\n", time.Since(r.begun).Seconds(), fmt.Sprintf(format, args...))
	r.log.WriteString(line)
	_, _ = io.WriteString(r.Log, line) // whoever does not listen misses it
}

func (r *run) start(ctx context.Context) (err error) {
	r.network, err = network.New(nodes)
	if errors.Is(err, network.ErrNotPermitted) {
		r.network = nil
		r.tell("faults of the network are left out: %v", err)
	} else if err != nil {
		return err
	}
	if r.cluster, err = cluster.Start(ctx, cluster.Options{Binary: r.Binary, Nodes: nodes, Network: r.network}); err != nil {
		return err
	}
	r.tell("a cluster of %d has started", nodes)
	r.injector = faults.NewInjector(r.cluster, r.network)
	if len(r.Kinds) == 0 {
		r.Kinds = r.injector.Kinds()
	}
	r.summary.Options = r.Options
	var urls []string
	for i := 1; i <= nodes; i++ {
		urls = append(urls, cluster.URL(r.cluster.Gateway(i)))
	}
	r.workload, err = workload.New(workload.Options{Nodes: urls, Seed: r.Seed, Timeout: transactionTimeout, Pause: clientPause, Name: currentGID})
	if err != nil {
		return err
	}
	if err := r.workload.Setup(ctx); err != nil {
		return err
	}
	if err := r.cluster.Settle(ctx); err != nil {
		return err
	}
	for i := 1; i <= nodes; i++ {
		if r.baseline[i], err = r.resources(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

// work runs clients and faults, and returns when all faults are mended and all clients have ended.
func (r *run) work(ctx context.Context) error {
	supervised, stopSupervising := context.WithCancel(ctx)
	supervisor := make(chan error, 1)
	go func() { supervisor <- r.injector.Supervise(supervised) }()
	working, stopWorking := context.WithCancel(ctx)
	clients := make(chan struct{})
	go func() {
		defer close(clients)
		r.workload.Run(working)
	}()
	verifier := make(chan error, 1)
	go func() { verifier <- r.verify(working) }()
	err := r.inject(ctx)
	if err == nil {
		r.tell("all faults are mended")
		if err = settle(ctx, r.cluster); err == nil {
			r.tell("all nodes commit again")
			err = r.verifyAll(ctx)
		}
		wait(ctx, calm)
	}
	stopWorking()
	<-clients
	err = errors.Join(err, <-verifier)
	stopSupervising()
	return errors.Join(err, <-supervisor)
}

// verify compares the rows of those nodes that can take part, again and again, while they are worked on and broken.
func (r *run) verify(ctx context.Context) error {
	for i := 1; ; i = i%nodes + 1 {
		wait(ctx, verifyPause)
		if ctx.Err() != nil {
			return nil
		}
		asked, cancel := context.WithTimeout(ctx, transactionTimeout)
		// That there is no answer, or not from all, is what the faults are for.
		v, _ := r.cluster.VerifyOnline(asked, i)
		cancel()
		if len(v.Differing) > 0 {
			return fmt.Errorf("at CSN %d nodes differ in %v", v.CSN, v.Differing)
		}
		compared := 0
		for _, m := range v.Members {
			if m.Error == "" {
				compared++
			}
		}
		r.summary.Verified[compared]++
	}
}

// verifyAll compares the rows of all nodes, under load.
func (r *run) verifyAll(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, calmTimeout)
	defer cancel()
	v, err := r.cluster.VerifyOnline(ctx, 1)
	for err != nil && strings.Contains(err.Error(), "another snapshot is being taken") && ctx.Err() == nil {
		wait(ctx, 100*time.Millisecond) // for verify, or what is left of it
		v, err = r.cluster.VerifyOnline(ctx, 1)
	}
	if err == nil {
		r.tell("at CSN %d all nodes have the same rows", v.CSN)
	}
	return err
}

// inject follows the plan.
func (r *run) inject(ctx context.Context) error {
	begun := time.Now()
	var healing sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	for _, f := range faults.Plan(r.Seed, r.Duration, r.Kinds) {
		wait(ctx, f.At-time.Since(begun))
		if ctx.Err() != nil {
			break
		}
		a, err := r.injector.Inject(ctx, f)
		if err != nil {
			errs = append(errs, err)
			break
		}
		r.summary.Faults[f.Kind]++
		r.tell("%s of %s for %v: %s", f.Kind, f.Role, f.For, a.What)
		healing.Go(func() {
			wait(ctx, f.For)
			if err := r.injector.Heal(context.WithoutCancel(ctx), a); err != nil {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
			r.tell("%s is over: %s", f.Kind, a.What)
		})
	}
	healing.Wait()
	return errors.Join(append(errs, ctx.Err())...)
}

func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// settle returns when every node takes writes and shows those of all others.
func settle(ctx context.Context, c *cluster.Cluster) error {
	ctx, cancel := context.WithTimeout(ctx, recoveryTimeout)
	defer cancel()
	for {
		err := c.Settle(ctx)
		if err == nil || ctx.Err() != nil {
			return err
		}
		wait(ctx, 50*time.Millisecond)
	}
}

// judge checks everything that must hold afterwards.
func (r *run) judge(ctx context.Context) error {
	if err := settle(ctx, r.cluster); err != nil {
		return err
	}
	if err := r.workload.Final(ctx); err != nil {
		return err
	}
	report := check.Judge(r.workload.History(), check.PerNode)
	r.summary.Counts = report.Counts
	errs := []error{report.Err(), r.cluster.CheckEqual(ctx), r.checkLogs()}
	ctx, cancel := context.WithTimeout(ctx, calmTimeout)
	defer cancel()
	errs = append(errs, r.cluster.CheckLeftovers(ctx))
	for i := 1; i <= nodes; i++ {
		errs = append(errs, r.checkResources(ctx, i))
	}
	return errors.Join(errs...)
}

// judgeLogs stops the cluster and judges the history by what each node has in its log.
func (r *run) judgeLogs(ctx context.Context) error {
	if err := r.cluster.Stop(); err != nil {
		return err
	}
	for i := 1; i <= nodes; i++ {
		log, err := r.cluster.Log(ctx, i)
		if err != nil {
			return err
		}
		decisions, err := check.ReadDecisions(bytes.NewReader(log))
		if err != nil {
			return fmt.Errorf("node %d: %w", i, err)
		}
		report := check.JudgeLog(r.workload.History(), decisions)
		if err := report.Err(); err != nil {
			return fmt.Errorf("by the log of node %d: %w", i, err)
		}
		if report.Reads == 0 {
			return fmt.Errorf("the log of node %d, %d transactions, has nothing to do with the history", i, len(decisions))
		}
		r.tell("the log of node %d, %d transactions, explains %d reads", i, len(decisions), report.Reads)
	}
	return nil
}

// resources are what a node must not take more of in the long run.
type resources struct {
	goroutines, files int
	spilled           []string
}

func (r *run) resources(ctx context.Context, i int) (resources, error) {
	const patience = 5 * time.Second
	asked, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	m, err := r.cluster.Metrics(asked, i)
	if err != nil {
		return resources{}, err
	}
	spilled, err := filepath.Glob(filepath.Join(r.cluster.NodeDir(i), "spill", "*"))
	if err != nil {
		return resources{}, fmt.Errorf("list spilled files: %w", err)
	}
	return resources{goroutines: int(m["go_goroutines"]), files: int(m["process_open_fds"]), spilled: spilled}, nil
}

// slack is by how much a node may differ from the beginning: who leads has more, and connections between members come and
// go.
const slack = 50

// checkResources waits until a node holds no more than at the beginning.
func (r *run) checkResources(ctx context.Context, i int) error {
	for {
		now, err := r.resources(ctx, i)
		before := r.baseline[i]
		if err == nil && (now.goroutines > before.goroutines+slack || now.files > before.files+slack || len(now.spilled) > 0) {
			err = fmt.Errorf("node %d holds %+v, more than the %+v at the beginning", i, now, before)
		}
		if err == nil || ctx.Err() != nil {
			r.tell("node %d: %d goroutines, %d files; at the beginning %d, %d", i, now.goroutines, now.files, before.goroutines, before.files)
			return err
		}
		wait(ctx, 100*time.Millisecond)
	}
}

// checkLogs looks for what no node may ever write.
func (r *run) checkLogs() error {
	var errs []error
	logs := r.cluster.Logs(1 << 30)
	for _, bad := range []string{"WARNING: DATA RACE", "panic:", "fatal error:", "PANIC:", "the node is fenced"} {
		for line := range strings.Lines(logs) {
			if strings.Contains(line, bad) {
				errs = append(errs, fmt.Errorf("in the logs: %s", strings.TrimSpace(line)))
				break
			}
		}
	}
	return errors.Join(errs...)
}

// keep writes what a failed run leaves to a directory, and says how to run it again.
func (r *run) keep(failure error) error {
	dir, err := os.MkdirTemp("", fmt.Sprintf("chaos-%d-", r.Seed))
	if err != nil {
		return errors.Join(failure, err)
	}
	var errs []error
	save := func(name string, write func(io.Writer) error) {
		file, err := os.Create(filepath.Join(dir, name))
		if err == nil {
			err = errors.Join(write(file), file.Close())
		}
		errs = append(errs, err)
	}
	text := func(s string) func(io.Writer) error {
		return func(w io.Writer) error { _, err := io.WriteString(w, s); return err }
	}
	save("faults.log", text(r.log.String()))
	if r.workload != nil {
		save("history.jsonl", func(w io.Writer) error { return check.WriteHistory(w, r.workload.History()) })
	}
	if r.injector != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		save("sessions.log", text(r.cluster.Activity(ctx)))
		errs = append(errs, r.injector.Dump(ctx)) // into their logs
		save("nodes.log", text(r.cluster.Logs(1<<30)))
	}
	return errors.Join(fmt.Errorf("%w\nagain: make chaos SEED=%d DURATION=%v\nfaults, history and logs: %s\njudge the history again: go run ./test/check/judge -freshness node %s",
		failure, r.Seed, r.Duration, dir, filepath.Join(dir, "history.jsonl")), errors.Join(errs...))
}
