package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/node"
	"github.com/quorate/quorate/txn"
)

func initCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "init --config FILE",
		Short: "Make a cluster of one node",
		Long: "Make a cluster of one node, to which others can be joined. A PostgreSQL that is configured and has data already is adopted in\n" +
			"place: when the node runs, nothing is rewritten, and only the schema quorate is added. Check it with \"quorate doctor\" before.",
		GroupID: groupChange,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := freshConfig(file, "quorate init")
			if err != nil {
				return err
			}
			if cfg.Witness() {
				return fmt.Errorf("%w: role is witness, and a cluster begins with a node that has data", errUsage)
			}
			if have, err := config.ReadIdentity(cfg.DataDir); err == nil {
				return fmt.Errorf("data_dir %q belongs to node %s of cluster %q already: start it with \"quorate run --config %s\"", cfg.DataDir, have.Node, have.Cluster, file)
			} else if !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			id := config.Identity{Cluster: cfg.Cluster, ClusterID: txn.NewUUID(), Node: 1, State: config.StateMember, MaxNodes: cfg.MaxNodes}
			if err := id.Save(cfg.DataDir); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "cluster %s is made, with node 1; start it with: quorate run --config %s\n", cfg.Cluster, file)
			return err
		},
	}
	cmd.Flags().StringVar(&file, "config", os.Getenv("QUORATE_CONFIG"), "configuration `file` ($QUORATE_CONFIG)")
	return cmd
}

// freshConfig reads the configuration of a node that gets its id from the cluster.
func freshConfig(file, command string) (config.Config, error) {
	if file == "" {
		return config.Config{}, usage("config", `""`, "is required")
	}
	cfg, err := config.Load(file)
	if err == nil && len(cfg.Members) > 0 {
		err = fmt.Errorf("%w: %s lists the members, which found a cluster when they are all started with \"quorate run\"; without node and members, %s can be used", errUsage, file, command)
	}
	return cfg, err
}

func joinCommand() *cobra.Command {
	var file, token string
	var peers []string
	var replace uint32
	cmd := &cobra.Command{
		Use:   "join --config FILE --peer HOST:PORT [--token TOKEN] [--replace NODE]",
		Short: "Make this node a member of a cluster, and run it",
		Long: "Make this node a member of a cluster, and run it like \"quorate run\". It copies the data of another member while everybody goes on\n" +
			"writing, follows the log from there, and gets its vote. When that was interrupted, \"quorate join\" and \"quorate run\" go on with it.\n" +
			"A data directory of PostgreSQL that is there already is set aside, and removed when the node is a member.\n\n" +
			"With --replace another member goes when this one is active: it is drained and leaves, or, if it does not answer, is removed.",
		GroupID: groupChange,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := freshConfig(file, "quorate join")
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("replace") && replace == 0 {
				return usage("replace", "0", "must be the id of a member")
			}
			if err := applyAt(cfg, file, peers, token, txn.NodeID(replace)); err != nil {
				return err
			}
			return runNode(cmd.Context(), file, cmd.ErrOrStderr(), func(ctx context.Context, n *node.Node) {
				showJoining(ctx, func() joinProgress { return joinProgressOf(n) }, cmd.OutOrStdout(), isTerminal(cmd.OutOrStdout()))
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&file, "config", os.Getenv("QUORATE_CONFIG"), "configuration `file` ($QUORATE_CONFIG)")
	f.StringSliceVar(&peers, "peer", nil, "gRPC `address` of a member; several can be given")
	f.StringVar(&token, "token", os.Getenv("QUORATE_TOKEN"), "`token` that \"quorate token create\" has made ($QUORATE_TOKEN)")
	f.Uint32Var(&replace, "replace", 0, "`id` of the member that is to go when this one is active")
	return cmd
}

// applyAt writes into the data directory that the node wants to join, and how. Of a node that was admitted it changes nothing but whom
// it replaces.
func applyAt(cfg config.Config, file string, peers []string, token string, replace txn.NodeID) error {
	have, err := config.ReadIdentity(cfg.DataDir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		have = config.Identity{Cluster: cfg.Cluster, State: config.StateApplying, Request: txn.NewUUID()}
	case err != nil:
		return err
	case have.Cluster != cfg.Cluster:
		return fmt.Errorf("data_dir %q belongs to cluster %q: cluster is %q", cfg.DataDir, have.Cluster, cfg.Cluster)
	case have.State == config.StateRemoved:
		return fmt.Errorf("data_dir %q belongs to node %s, which was removed: a node joins with an empty data_dir", cfg.DataDir, have.Node)
	case have.State == config.StateMember:
		return fmt.Errorf("data_dir %q belongs to node %s of cluster %q, a member: start it with \"quorate run --config %s\"", cfg.DataDir, have.Node, have.Cluster, file)
	}
	if replace != 0 {
		have.Supersedes = replace
	}
	if have.State == config.StateJoining {
		return have.Save(cfg.DataDir)
	}
	if len(peers) > 0 {
		have.Peers = peers
	}
	if token != "" {
		have.Token = token
	}
	if len(have.Peers) == 0 {
		return usage("peer", `""`, "is required: the gRPC address of a member")
	}
	for _, p := range have.Peers {
		if _, _, err := net.SplitHostPort(p); err != nil {
			return usage("peer", p, "must be host:port")
		}
	}
	return have.Save(cfg.DataDir)
}

// The intervals at which progress is shown.
const (
	barInterval  = 200 * time.Millisecond
	lineInterval = 5 * time.Second
)

// joinProgress is how far a node is on its way into a cluster.
type joinProgress struct {
	node, state, reason string
	copying             *copyProgress // nil: nothing is being copied, or how much there is is not known yet
}

// copyProgress is how far its copy of another member's data is.
type copyProgress struct {
	phase, donor string
	bytes, total uint64
	rate         float64       // bytes per second
	left         time.Duration // negative: not known
}

func joinProgressOf(n *node.Node) joinProgress {
	s := n.Status()
	p := joinProgress{node: n.ID().String(), state: s.State, reason: s.Reason}
	if c, ok := n.Cloning(); ok && c.Total > 0 {
		now := time.Now()
		p.copying = &copyProgress{phase: string(c.Phase), donor: c.Donor.String(), bytes: c.Bytes, total: c.Total, rate: c.Rate(now), left: -1}
		if left, known := c.ETA(now); known {
			p.copying.left = left
		}
	}
	return p
}

// showJoining shows how far a node is, until it is a member: as a bar on a terminal, else as lines.
func showJoining(ctx context.Context, look func() joinProgress, out io.Writer, terminal bool) {
	ticker := time.NewTicker(barInterval)
	defer ticker.Stop()
	var last string
	var shown time.Time
	for {
		p := look()
		changed := p.state + p.reason
		if p.copying != nil {
			changed += p.copying.phase
		}
		switch {
		case terminal:
			fmt.Fprintf(out, "\r\x1b[K%s", p)
		case changed != last || time.Since(shown) >= lineInterval:
			fmt.Fprintln(out, p)
			last, shown = changed, time.Now()
		}
		if p.state == "active" || p.state == "failed" || p.state == "removed" {
			if terminal {
				fmt.Fprintln(out)
			}
			return
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

const barWidth = 30

func (p joinProgress) String() string {
	c := p.copying
	if c == nil {
		text := "node " + p.node + " is " + p.state
		if p.reason != "" {
			text += ": " + p.reason
		}
		return text
	}
	share := float64(min(c.bytes, c.total)) / float64(c.total) // the total is estimated
	filled := int(share * barWidth)
	text := fmt.Sprintf("%s from node %s [%s%s] %3.0f%%, %s of %s, %s/s", c.phase, c.donor, strings.Repeat("#", filled), strings.Repeat(".", barWidth-filled),
		100*share, bytesText(c.bytes), bytesText(c.total), bytesText(uint64(c.rate)))
	if c.left >= 0 {
		text += fmt.Sprintf(", %v left", c.left.Round(time.Second))
	}
	return text
}

func bytesText(n uint64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
}
