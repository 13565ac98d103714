package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/quorate/quorate/test/cluster"
	"github.com/quorate/quorate/test/faults"
	"github.com/quorate/quorate/test/network"
)

// measured are the faults whose cost is measured by default, each for a leader and for a follower.
var measured = []faults.Kind{
	faults.PostgresKilled, faults.SidecarKilled, faults.NodeKilled, faults.SidecarStopped,
	faults.SidecarFrozen, faults.PostgresFrozen, faults.Isolated, faults.Deaf, faults.Mute, faults.Partial,
}

const (
	// observed is how long a fault lasts that is measured.
	observed = 6 * time.Second
	// steady is how long clients work before and after it.
	steady = 2 * time.Second
	// clientsPerNode and measurePause make a load that a small machine is not busy with.
	clientsPerNode = 4
	measurePause   = 5 * time.Millisecond
)

// Measure says, for each fault, how long clients of the nodes that it did not hit could not commit, and what all clients
// were told. It writes a table.
func Measure(ctx context.Context, binary string, kinds []faults.Kind, rounds int, out io.Writer) (err error) {
	if len(kinds) == 0 {
		kinds = append([]faults.Kind{""}, measured...)
	}
	net, err := network.New(nodes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, net.Close()) }()
	c, err := cluster.Start(ctx, cluster.Options{Binary: binary, Nodes: nodes, Network: net})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Destroy()) }()
	conn, err := c.Connect(ctx, 1)
	if err != nil {
		return err
	}
	if _, err := conn.Exec(ctx, "CREATE TABLE measured (id text PRIMARY KEY)"); err != nil {
		return fmt.Errorf("create table: %w", err)
	}
	if err := conn.Close(ctx); err != nil {
		return fmt.Errorf("close session: %w", err)
	}
	injector := faults.NewInjector(c, net)
	supervised, stop := context.WithCancel(ctx)
	supervisor := make(chan error, 1)
	go func() { supervisor <- injector.Supervise(supervised) }()
	defer func() { stop(); err = errors.Join(err, <-supervisor) }()

	fmt.Fprintf(out, "| fault | of the | others without a commit, median and longest of %d | told at the node that is hit | told at others |\n|---|---|---|---|---|\n", rounds)
	for _, kind := range kinds {
		for _, role := range []faults.Role{faults.Leader, faults.Follower} {
			var pauses []time.Duration
			hit, others := map[string]int{}, map[string]int{}
			for round := range rounds {
				if err := settle(ctx, c); err != nil {
					return err
				}
				m := &measurement{cluster: c, commits: map[int][]time.Time{}, told: map[int]map[string]int{}}
				pause, broken, err := m.run(ctx, injector, faults.Fault{Kind: kind, Role: role, Seed: uint64(round)})
				if err != nil {
					return fmt.Errorf("measure %s of %s: %w", kind, role, err)
				}
				pauses = append(pauses, pause)
				for i, told := range m.told {
					into := others
					if slices.Contains(broken, i) {
						into = hit
					}
					for state, n := range told {
						into[state] += n
					}
				}
			}
			slices.Sort(pauses)
			fmt.Fprintf(out, "| %s | %s | %v, %v | %s | %s |\n", cmp.Or(kind, "none"), role,
				pauses[len(pauses)/2].Round(10*time.Millisecond), pauses[len(pauses)-1].Round(10*time.Millisecond), counts(hit), counts(others))
		}
	}
	return nil
}

func counts(told map[string]int) string {
	var parts []string
	for _, state := range slices.Sorted(maps.Keys(told)) {
		parts = append(parts, fmt.Sprintf("%s %d×", state, told[state]))
	}
	return strings.Join(parts, ", ")
}

// measurement is what clients of all nodes live through in one fault.
type measurement struct {
	cluster *cluster.Cluster

	mu      sync.Mutex
	commits map[int][]time.Time    // by node
	told    map[int]map[string]int // by node: errors by SQLSTATE
}

// run returns the longest time for which the clients of a node that was not hit could not commit, and which nodes were.
func (m *measurement) run(ctx context.Context, injector *faults.Injector, f faults.Fault) (time.Duration, []int, error) {
	working, stop := context.WithCancel(ctx)
	var clients sync.WaitGroup
	for i := 1; i <= m.cluster.Nodes; i++ {
		for range clientsPerNode {
			clients.Go(func() { m.client(working, i) })
		}
	}
	wait(ctx, steady)
	begun := time.Now()
	var hit []int
	var err error
	if f.Kind == "" {
		wait(ctx, observed)
	} else if a, injected := injector.Inject(ctx, f); injected == nil {
		hit = a.Hit
		wait(ctx, observed)
		err = injector.Heal(ctx, a)
	} else {
		err = injected
	}
	wait(ctx, steady)
	stop()
	clients.Wait()
	longest := time.Duration(0)
	for i := 1; i <= m.cluster.Nodes; i++ {
		if slices.Contains(hit, i) {
			continue
		}
		last := begun
		for _, at := range append(m.commits[i], time.Now()) {
			if at.After(begun) {
				longest = max(longest, at.Sub(last))
				last = at
			}
		}
	}
	return longest, hit, err
}

// client commits at one node, whatever happens to it.
func (m *measurement) client(ctx context.Context, i int) {
	var conn *pgx.Conn
	defer func() {
		if conn != nil {
			_ = conn.Close(context.WithoutCancel(ctx)) // broken or not, it is not needed any more
		}
	}()
	for ctx.Err() == nil {
		err := m.commit(ctx, i, &conn)
		m.mu.Lock()
		switch {
		case err == nil:
			m.commits[i] = append(m.commits[i], time.Now())
		case ctx.Err() == nil:
			if m.told[i] == nil {
				m.told[i] = map[string]int{}
			}
			m.told[i][cmp.Or(cluster.SQLState(err), "connection lost")]++
		}
		m.mu.Unlock()
		wait(ctx, measurePause)
	}
}

func (m *measurement) commit(ctx context.Context, i int, conn **pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, transactionTimeout)
	defer cancel()
	if *conn == nil || (*conn).IsClosed() {
		var err error
		if *conn, err = m.cluster.Connect(ctx, i); err != nil {
			*conn = nil
			return err
		}
	}
	_, err := (*conn).Exec(ctx, "INSERT INTO measured VALUES ($1)", rand.Text())
	return err
}
