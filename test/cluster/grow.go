package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Prepare returns a cluster of o.Nodes places, each with a configuration for a node, and no node yet. Unlike in the clusters
// that Start makes, the place of a node is not its id, which the cluster gives out.
func Prepare(o Options) (*Cluster, error) {
	root, err := TempDir(o.Under)
	if err != nil {
		return nil, err
	}
	base, ports, err := claimPorts(o.Nodes)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(root))
	}
	c := &Cluster{
		Dir: filepath.Join(root, "cluster"), Nodes: o.Nodes,
		options: o, root: root, base: base, ports: ports, singles: map[int]*process{},
	}
	for i := 1; i <= o.Nodes; i++ {
		if err := c.place(i, false); err != nil {
			return nil, errors.Join(err, c.Destroy())
		}
	}
	return c, nil
}

// Found makes a cluster of one node, with "quorate init", at the first of o.Nodes places. Join fills the others.
func Found(ctx context.Context, o Options) (*Cluster, error) {
	c, err := Prepare(o)
	if err != nil {
		return nil, err
	}
	if o.Populate != nil {
		err = o.Populate(ctx, filepath.Join(c.NodeDir(1), "pgdata"))
	}
	if err == nil {
		_, err = c.Command(ctx, "init", "--config", c.Config(1))
	}
	if err == nil {
		err = c.StartNode(1)
	}
	if err == nil {
		err = c.AwaitState(ctx, 1, "active")
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("found cluster: %w\n%s", err, c.Logs(60)), c.Destroy())
	}
	return c, nil
}

// FoundTogether makes a cluster of o.Nodes nodes at once, each in an empty directory with a list of all.
func FoundTogether(ctx context.Context, o Options) (*Cluster, error) {
	c, err := Prepare(o)
	if err != nil {
		return nil, err
	}
	var members strings.Builder
	for i := 1; i <= c.Nodes; i++ {
		fmt.Fprintf(&members, "  - {id: %d, grpc: %q, raft: %q}\n", i, c.GRPC(i), c.Raft(i))
	}
	start := func() error {
		for i := 1; i <= c.Nodes; i++ {
			text, err := os.ReadFile(c.Config(i))
			if err == nil {
				err = os.WriteFile(c.Config(i), fmt.Appendf(text, "node: %d\nmembers:\n%s", i, &members), 0o644)
			}
			if err == nil {
				err = c.StartNode(i)
			}
			if err != nil {
				return err
			}
		}
		for i := 1; i <= c.Nodes; i++ {
			if err := c.AwaitState(ctx, i, "active"); err != nil {
				return err
			}
		}
		return nil
	}
	if err := start(); err != nil {
		return nil, errors.Join(fmt.Errorf("found cluster: %w\n%s", err, c.Logs(60)), c.Destroy())
	}
	return c, nil
}

// Config is the configuration file of a place.
func (c *Cluster) Config(i int) string { return filepath.Join(c.NodeDir(i), "quorate.yaml") }

func (c *Cluster) place(i int, witness bool) error {
	bin := c.options.PGBin
	if c.options.PGBins != nil {
		bin = c.options.PGBins[i-1]
	}
	postgres := fmt.Sprintf("postgres: {managed: true, auth: trust, port: %d, bin_dir: %q}\n", c.base+postgresPorts+i, bin)
	listen := fmt.Sprintf("gateway: %q, ", c.address(gatewayPorts, i))
	if witness {
		postgres, listen = "role: witness\n", ""
	}
	text := fmt.Sprintf("cluster: grown\ndata_dir: .\n%slisten: {%sgrpc: %q, http: %q, raft: %q}\n", postgres, listen, c.GRPC(i), c.HTTP(i), c.Raft(i))
	text += c.options.Configuration
	if err := os.MkdirAll(c.NodeDir(i), 0o755); err != nil {
		return err
	}
	return os.WriteFile(c.Config(i), []byte(text), 0o644)
}

// Join starts a node at a place that has none, with "quorate join" by way of another, and returns at once.
func (c *Cluster) Join(i, by int, more ...string) error {
	args := append([]string{"join", "--config", c.Config(i), "--peer", c.GRPC(by)}, more...)
	p, err := startProcess(startHere, filepath.Join(c.root, fmt.Sprintf("run-node%d.log", i)), c.options.Binary, args...)
	if err != nil {
		return fmt.Errorf("join node at %d: %w", i, err)
	}
	c.singles[i] = p
	return nil
}

// MakeWitness has the node that will be at a place be one without PostgreSQL.
func (c *Cluster) MakeWitness(i int) error { return c.place(i, true) }

// JoinWitness is Join of a node without PostgreSQL.
func (c *Cluster) JoinWitness(i, by int) error {
	if err := c.MakeWitness(i); err != nil {
		return err
	}
	return c.Join(i, by)
}

// Shell starts the node at a place with a line for the shell, which must be a command of quorate's, and returns at once.
func (c *Cluster) Shell(i int, line string) error {
	p, err := startProcess(startHere, filepath.Join(c.root, fmt.Sprintf("run-node%d.log", i)), "sh", "-c", "exec "+line)
	if err != nil {
		return fmt.Errorf("start node at %d: %w", i, err)
	}
	c.singles[i] = p
	return nil
}

// StopNode ends the node at a place, as a user would.
func (c *Cluster) StopNode(i int) error {
	p := c.singles[i]
	delete(c.singles, i)
	return p.stop(fmt.Sprintf("node at %d", i))
}

// NodeStatus is what a node says of itself or of another.
type NodeStatus struct {
	ID        int
	Role      string
	State     string
	Reason    string
	Addresses struct{ GRPC string }
}

// Members returns the members as the node at place i has them, and the id of that node.
func (c *Cluster) Members(ctx context.Context, i int) (self int, members []NodeStatus, err error) {
	out, err := c.Status(ctx, i, "-o", "json")
	if err != nil {
		return 0, nil, err
	}
	var s struct {
		Node    int
		Members []NodeStatus
	}
	if err := json.Unmarshal(out, &s); err != nil {
		return 0, nil, fmt.Errorf("read status: %w", err)
	}
	return s.Node, s.Members, nil
}

// ID returns the id of the node at a place.
func (c *Cluster) ID(ctx context.Context, i int) (int, error) {
	self, _, err := c.Members(ctx, i)
	return self, err
}

// AwaitState waits until the node at a place says that it is in a state.
func (c *Cluster) AwaitState(ctx context.Context, i int, state string) error {
	const interval = 200 * time.Millisecond // each look is a process, which takes from what is waited for
	return pollEvery(ctx, interval, func() error {
		if p := c.singles[i]; p != nil {
			select {
			case <-p.done:
				return stopPolling{fmt.Errorf("node at %d: it ended: %w", i, p.exit())}
			default:
			}
		}
		self, members, err := c.Members(ctx, i)
		if err != nil {
			return err
		}
		at := slices.IndexFunc(members, func(m NodeStatus) bool { return m.ID == self })
		if at < 0 {
			return fmt.Errorf("node %d does not list itself", self)
		}
		if members[at].State != state {
			return fmt.Errorf("node %d is %s, not %s: %s", self, members[at].State, state, members[at].Reason)
		}
		return nil
	})
}

// Change runs a command about the node at place i, by way of the node at place by.
func (c *Cluster) Change(ctx context.Context, command string, i, by int, args ...string) (string, error) {
	id, err := c.ID(ctx, i)
	if err != nil {
		return "", err
	}
	out, err := c.ask(ctx, command, by, append([]string{fmt.Sprint(id)}, args...)...)
	return strings.TrimSpace(string(out)), err
}
