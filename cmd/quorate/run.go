package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/spf13/cobra"

	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/node"
)

// closeTimeout bounds a node's shutdown, its PostgreSQL's checkpoint included.
const closeTimeout = 40 * time.Second

func runCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "run --config FILE",
		Short: "Run one node",
		Long: "Run one node until SIGINT or SIGTERM, which stop it and the PostgreSQL that it manages. " +
			"Another signal more than a second later ends the process at once and leaves PostgreSQL running; the next start takes it over.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if file == "" {
				return usage("config", `""`, "is required")
			}
			return runNode(cmd.Context(), file, cmd.ErrOrStderr(), nil)
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration `file`")
	return cmd
}

// shareProcessors leaves PostgreSQL, which does most of the work on this machine, at least half of the processors. A Go
// program that is given more than it can fill spends them on looking for work: with two nodes' worth of processes on two
// processors, a fifth of all its time. The environment variable GOMAXPROCS says otherwise.
func shareProcessors() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(1, runtime.GOMAXPROCS(0)/2))
	}
}

// runNode runs a node, and goes on with it when it has to begin anew under another identity. watch, if not nil, is called beside it.
func runNode(ctx context.Context, file string, stderr io.Writer, watch func(context.Context, *node.Node)) (err error) {
	shareProcessors()
	for {
		err := runOnce(ctx, file, stderr, watch)
		if !errors.Is(err, node.ErrReopen) || ctx.Err() != nil {
			return err
		}
	}
}

func runOnce(ctx context.Context, file string, stderr io.Writer, watch func(context.Context, *node.Node)) (err error) {
	cfg, err := config.Load(file)
	if err != nil {
		return err
	}
	identity, err := cfg.ClaimDataDir()
	if err != nil {
		return err
	}
	pid, err := lockPIDFile(filepath.Join(cfg.DataDir, pidFileName))
	if err != nil {
		return fmt.Errorf("run node %s with data_dir %q: %w", cfg.Node, cfg.DataDir, err)
	}
	defer func() { err = errors.Join(err, pid.release()) }()

	n, err := node.Open(ctx, cfg, identity, ownVersion(), newLogger(cfg.Log, stderr))
	if errors.Is(err, node.ErrStopped) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("start node %s: %w", cfg.Node, err)
	}
	if watch != nil {
		watching, stop := context.WithCancel(ctx)
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			watch(watching, n)
		}()
		defer func() { stop(); <-watched }()
	}
	failed := make(chan error, 1)
	go func() { failed <- n.Wait() }() // returns at the latest after Close
	select {
	case <-ctx.Done():
	case err = <-failed:
		if err != nil {
			err = fmt.Errorf("node %s failed: %w", n.ID(), err)
		}
	}
	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	if closeErr := n.Close(closing); closeErr != nil {
		err = errors.Join(err, fmt.Errorf("stop node %s: %w", n.ID(), closeErr))
	}
	return err
}

func newLogger(c config.Log, w io.Writer) *slog.Logger {
	o := &slog.HandlerOptions{Level: c.SlogLevel()}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}
