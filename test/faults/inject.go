package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/quorate/quorate/test/cluster"
	"github.com/quorate/quorate/test/network"
)

// Injector breaks one cluster. Its methods are safe for concurrent use: faults may overlap.
type Injector struct {
	cluster *cluster.Cluster
	network *network.Network

	mu        sync.Mutex   // one start or end of a fault at a time
	down      map[int]int  // by node: for how many faults its sidecar is to stay down
	ended     map[int]bool // by node: its sidecar has been ended, and not started again yet
	surprises []error      // ends of sidecars that nobody has asked for
	active    map[*Active]bool
}

// Active is a fault that has begun.
type Active struct {
	What  string // what was done, to whom
	Hit   []int  // the nodes that it hits
	links map[way]network.Link
	heal  func(ctx context.Context) error
}

// way is one direction between two nodes.
type way struct{ from, to int }

// NewInjector returns an Injector. Without a network, nil, faults of the network are not to be had.
func NewInjector(c *cluster.Cluster, n *network.Network) *Injector {
	return &Injector{cluster: c, network: n, down: map[int]int{}, ended: map[int]bool{}, active: map[*Active]bool{}}
}

// Kinds returns what this Injector can break.
func (x *Injector) Kinds() []Kind {
	if x.network == nil {
		return OnProcesses
	}
	return slices.Concat(OnProcesses, OnNetwork)
}

// LeaderOf returns who leads, in the newest term that a node knows of; 0 if none does. Whoever does not answer at once is
// not asked again.
func LeaderOf(ctx context.Context, c *cluster.Cluster) int {
	const patience = 300 * time.Millisecond
	leader, newest := 0, 0.0
	for i := 1; i <= c.Nodes; i++ {
		asked, cancel := context.WithTimeout(ctx, patience)
		m, err := c.Metrics(asked, i)
		cancel()
		if term := m["quorate_consensus_term"]; err == nil && term >= newest {
			if who := int(m["quorate_consensus_leader_node"]); who != 0 || term > newest {
				leader, newest = who, term
			}
		}
	}
	return leader
}

// choice is what a fault leaves open.
type choice struct {
	random *rand.Rand
	order  []int // of all nodes: the first is the one that is hit
}

func (x *Injector) choose(ctx context.Context, f Fault) choice {
	ch := choice{random: rand.New(rand.NewPCG(f.Seed, 1))}
	ch.order = ch.random.Perm(x.cluster.Nodes)
	for i := range ch.order {
		ch.order[i]++
	}
	leader := LeaderOf(ctx, x.cluster)
	if at := slices.Index(ch.order, leader); at >= 0 {
		ch.order = slices.Delete(ch.order, at, at+1)
		if f.Role == Leader {
			ch.order = slices.Insert(ch.order, 0, leader)
		} else {
			ch.order = append(ch.order, leader)
		}
	}
	return ch
}

// Inject begins a fault. What is broken already cannot be broken again, which is no error.
func (x *Injector) Inject(ctx context.Context, f Fault) (*Active, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.inject(ctx, f.Kind, x.choose(ctx, f))
}

// InjectAt begins a fault at one node, whatever its role is.
func (x *Injector) InjectAt(ctx context.Context, kind Kind, node int, seed uint64) (*Active, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	ch := choice{random: rand.New(rand.NewPCG(seed, 1)), order: []int{node}}
	for i := 1; i <= x.cluster.Nodes; i++ {
		if i != node {
			ch.order = append(ch.order, i)
		}
	}
	return x.inject(ctx, kind, ch)
}

// inject begins a fault of the first node of a choice. Requires mu.
func (x *Injector) inject(ctx context.Context, kind Kind, ch choice) (*Active, error) {
	a := &Active{What: fmt.Sprintf("node %d", ch.order[0]), Hit: ch.order[:1], heal: func(context.Context) error { return nil }}
	if err := x.begin(ctx, kind, ch, a); err != nil {
		return nil, fmt.Errorf("inject %s: %w", kind, err)
	}
	x.active[a] = true
	x.setLinks()
	return a, nil
}

// Heal ends a fault.
func (x *Injector) Heal(ctx context.Context, a *Active) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.active[a] {
		return nil
	}
	delete(x.active, a)
	x.setLinks()
	if err := a.heal(ctx); err != nil {
		return fmt.Errorf("heal %s: %w", a.What, err)
	}
	return nil
}

// setLinks makes each link as bad as all faults together want it. Requires mu.
func (x *Injector) setLinks() {
	if x.network == nil {
		return
	}
	for from := 1; from <= x.cluster.Nodes; from++ {
		for to := 1; to <= x.cluster.Nodes; to++ {
			var all network.Link
			for a := range x.active {
				l := a.links[way{from, to}]
				all.Cut = all.Cut || l.Cut
				all.Loss = max(all.Loss, l.Loss)
				all.Delay += l.Delay
				all.Jitter += l.Jitter
			}
			x.network.Set(from, to, all)
		}
	}
}

func (x *Injector) begin(ctx context.Context, kind Kind, ch choice, a *Active) error {
	i, others := ch.order[0], ch.order[1:]
	switch kind {
	case PostgresKilled:
		return signal(first(x.postgres(i)), syscall.SIGKILL)
	case BackendKilled:
		if all := x.postgres(i); len(all) > 1 {
			return signal([]int{all[1+ch.random.IntN(len(all)-1)]}, syscall.SIGKILL)
		}
		return nil
	case SidecarKilled:
		return x.takeDown(a, []int{i}, func(int) error { return signal(x.sidecar(i), syscall.SIGKILL) })
	case SidecarStopped:
		return x.takeDown(a, []int{i}, func(int) error { return signal(x.sidecar(i), syscall.SIGTERM) })
	case NodeKilled:
		return x.takeDown(a, []int{i}, func(int) error { return x.killNode(i, ch.random) })
	case AllKilled:
		a.What, a.Hit = fmt.Sprintf("nodes %v", ch.order), ch.order
		return x.takeDown(a, ch.order, func(i int) error { return x.killNode(i, ch.random) })
	case SidecarFrozen:
		return freeze(a, x.sidecar(i))
	case PostgresFrozen:
		return freeze(a, x.postgres(i))
	case NodeFrozen:
		return freeze(a, append(x.sidecar(i), x.postgres(i)...))
	case SessionsEnded:
		x.endSessions(ctx, a, i, ch.random)
		return nil
	}
	a.links = map[way]network.Link{}
	bad := network.Link{Cut: true}
	switch kind {
	case Lossy:
		bad = network.Link{Loss: 0.02 + 0.3*ch.random.Float64()}
		a.What += fmt.Sprintf(", %.0f %% of packets", 100*bad.Loss)
	case Slow:
		bad = network.Link{Delay: time.Duration(1+ch.random.IntN(200)) * time.Millisecond}
		bad.Jitter = bad.Delay / 4
		a.What += fmt.Sprintf(", by %v", bad.Delay)
	case Partial:
		a.What, a.Hit = fmt.Sprintf("node %d and node %d", i, others[0]), []int{i, others[0]}
		others = others[:1]
	case Severed:
		a.What, a.Hit = "all nodes", ch.order
		for _, from := range ch.order {
			for _, to := range ch.order {
				a.links[way{from, to}] = bad
			}
		}
	}
	for _, other := range others {
		if kind != Deaf {
			a.links[way{i, other}] = bad
		}
		if kind != Mute {
			a.links[way{other, i}] = bad
		}
	}
	return nil
}

// takeDown ends sidecars, which start again, in this order, when the fault is over. Requires mu.
func (x *Injector) takeDown(a *Active, nodes []int, end func(i int) error) error {
	var errs []error
	for _, i := range nodes {
		x.down[i]++
		x.ended[i] = true
		errs = append(errs, end(i))
	}
	a.heal = func(context.Context) error {
		var errs []error
		for _, i := range nodes {
			x.down[i]--
			errs = append(errs, x.tend(i))
		}
		return errors.Join(errs...)
	}
	return errors.Join(errs...)
}

// tend starts the sidecar of a node that should run and does not. Requires mu.
func (x *Injector) tend(i int) error {
	if x.down[i] > 0 || x.cluster.NodeRuns(i) {
		return nil
	}
	if !x.ended[i] && len(x.active) == 0 {
		x.surprises = append(x.surprises, fmt.Errorf("node %d ended by itself", i))
	}
	x.ended[i] = false
	return x.cluster.StartNode(i)
}

// Supervise starts what should run and does not, as an init system would, until the context ends. It returns what it
// could not start, and which sidecars ended while nothing was broken: what cannot work with its PostgreSQL when it starts
// says so and ends, and an init system tries again.
func (x *Injector) Supervise(ctx context.Context) error {
	const interval = 50 * time.Millisecond
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			x.mu.Lock()
			defer x.mu.Unlock()
			return errors.Join(x.surprises...)
		case <-ticker.C:
		}
		x.mu.Lock()
		for i := 1; i <= x.cluster.Nodes; i++ {
			if err := x.tend(i); err != nil {
				x.mu.Unlock()
				return err
			}
		}
		x.mu.Unlock()
	}
}

// Dump ends all sidecars with SIGQUIT, which makes them write what each goroutine was doing, and waits until they have.
func (x *Injector) Dump(ctx context.Context) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	for i := 1; i <= x.cluster.Nodes; i++ {
		pids := x.sidecar(i)
		if err := errors.Join(signal(pids, syscall.SIGQUIT), signal(pids, syscall.SIGCONT)); err != nil {
			return err
		}
		for len(alive(pids)) > 0 {
			select {
			case <-ctx.Done():
				return fmt.Errorf("dump node %d: %w", i, ctx.Err())
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	return nil
}

// killNode kills both parts of a node, the one or the other first.
func (x *Injector) killNode(i int, random *rand.Rand) error {
	parts := [][]int{x.sidecar(i), first(x.postgres(i))}
	if random.IntN(2) == 0 {
		slices.Reverse(parts)
	}
	return signal(slices.Concat(parts...), syscall.SIGKILL)
}

// freeze stops processes, parents before children so that none is added meanwhile.
func freeze(a *Active, pids []int) error {
	a.heal = func(context.Context) error { return signal(pids, syscall.SIGCONT) }
	return signal(pids, syscall.SIGSTOP)
}

// endSessions ends some of a server's sessions, clients' and the sidecar's own, again and again until the fault is over.
func (x *Injector) endSessions(ctx context.Context, a *Active, i int, random *rand.Rand) {
	share, pause := 0.1+0.5*random.Float64(), time.Duration(50+random.IntN(500))*time.Millisecond
	a.What += fmt.Sprintf(", %.0f %% each %v", 100*share, pause)
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			x.endSome(ctx, i, share)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
		}
	}()
	a.heal = func(context.Context) error {
		cancel()
		<-done
		return nil
	}
}

func (x *Injector) endSome(ctx context.Context, i int, share float64) {
	const patience = time.Second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	conn, err := x.cluster.Direct(ctx, i)
	if err != nil {
		return // another fault has taken the server away
	}
	defer conn.Close(ctx)
	// An error says that the server has gone, or this session with the others: there is nothing left to break.
	_, _ = conn.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
		WHERE backend_type IN ('client backend', 'walsender') AND pid <> pg_backend_pid() AND random() < $1`, share)
}

// The processes of a node. One that does not run has none: there is nothing to break then.

func (x *Injector) sidecar(i int) []int {
	pid, err := x.cluster.SidecarPID(i)
	if err != nil || !x.belongs(i, pid) {
		return nil
	}
	return alive([]int{pid})
}

// postgres returns the postmaster and its processes.
func (x *Injector) postgres(i int) []int {
	pid, err := x.cluster.PostmasterPID(i)
	if err != nil || !x.belongs(i, pid) {
		return nil
	}
	tree, err := cluster.Tree(pid)
	if err != nil {
		return nil
	}
	var pids []int
	for _, p := range tree {
		pids = append(pids, p.PID)
	}
	return alive(pids)
}

// belongs reports whether a process is one of the node's. Who was killed leaves a file with an id that may be somebody else's by now.
func (x *Injector) belongs(i, pid int) bool {
	p, err := cluster.ReadProcess(pid)
	return err == nil && strings.Contains(p.Command, x.cluster.NodeDir(i)+"/")
}

func alive(pids []int) []int {
	return slices.DeleteFunc(pids, func(pid int) bool {
		p, err := cluster.ReadProcess(pid)
		return err != nil || p.Zombie
	})
}

// signal sends a signal to processes; those that have ended meanwhile do not mind.
func signal(pids []int, signal syscall.Signal) error {
	var errs []error
	for _, pid := range pids {
		if err := syscall.Kill(pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			errs = append(errs, fmt.Errorf("%v to process %d: %w", signal, pid, err))
		}
	}
	return errors.Join(errs...)
}

func first(pids []int) []int { return pids[:min(1, len(pids))] }
