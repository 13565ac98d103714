// Command bench measures what a cluster costs: it runs pgbench on one stock PostgreSQL and through a cluster,
// interleaved on the same machine, and prints the ratios, and what each committed transaction took of disk flushes,
// WAL and CPU on each node.
//
// Stock PostgreSQL gets the settings of the nodes' servers where they matter, among them the isolation level, and is
// reached over TCP like the cluster. A ratio is taken within a round, in which all sides run directly after one
// another, and the median of the rounds is shown: a machine that is slow for a while is slow for all.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/quorate/quorate/test/cluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

// plan is what to measure.
type plan struct {
	duration time.Duration // of one run of pgbench
	rounds   int
	clients  []int
	scripts  []string
	places   []place
	scale    int
	protocol string
	pgBin    string // "" finds or fetches PostgreSQL 18
	binary   string // "" builds quorate
}

// place is where all data lie.
type place struct {
	name string
	dir  string // "" is the system's directory for temporary files
}

// tmpfsDir is memory on every Linux: without a disk only CPU counts.
const tmpfsDir = "/dev/shm"

func parse(args []string, stderr io.Writer) (plan, error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	duration := flags.Duration("duration", 5*time.Second, "length of one run of pgbench, in whole seconds")
	rounds := flags.Int("rounds", 3, "rounds of which the median is shown")
	clients := flags.String("clients", "1,8,32", "numbers of clients")
	only := flags.String("only", "simple-update,tpcb-like,select-only,control-room", "scripts of pgbench to run, and what the control room costs")
	where := flags.String("where", "disk,tmpfs", "where the data lie: disk, tmpfs ("+tmpfsDir+")")
	dir := flags.String("dir", "", "parent of the data directories on disk (default: the system's directory for temporary files)")
	scale := flags.Int("scale", 10, "scale of pgbench's tables, 100,000 rows each")
	protocol := flags.String("protocol", "simple", "simple, extended or prepared")
	pgBin := flags.String("pg-bin", "", "directory of postgres and initdb (default: find PostgreSQL 18, else fetch it)")
	binary := flags.String("quorate", "", "the quorate command (default: build it)")
	short := flags.Bool("short", false, "less than a minute: one round of simple-update with 8 clients on tmpfs, and reads")
	if err := flags.Parse(args); err != nil {
		return plan{}, err
	}
	if flags.NArg() > 0 {
		return plan{}, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if *short {
		set := map[string]bool{}
		flags.Visit(func(f *flag.Flag) { set[f.Name] = true })
		for name, value := range map[string]string{
			"duration": "3s", "rounds": "1", "clients": "8", "only": "simple-update,select-only", "where": "tmpfs", "scale": "1",
		} {
			if !set[name] {
				if err := flags.Set(name, value); err != nil {
					return plan{}, err
				}
			}
		}
	}
	p := plan{duration: *duration, rounds: *rounds, scale: *scale, protocol: *protocol, pgBin: *pgBin, binary: *binary}
	if p.duration < time.Second || p.rounds < 1 || p.scale < 1 {
		return plan{}, errors.New("-duration must be 1s or more, -rounds and -scale 1 or more")
	}
	for text := range strings.SplitSeq(*clients, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > 64 {
			return plan{}, fmt.Errorf("-clients: %q is not a number from 1 to 64", text)
		}
		p.clients = append(p.clients, n)
	}
	for script := range strings.SplitSeq(*only, ",") {
		if !slices.Contains([]string{"simple-update", "tpcb-like", "select-only", "control-room"}, script) {
			return plan{}, fmt.Errorf("-only: %q is not simple-update, tpcb-like, select-only or control-room", script)
		}
		p.scripts = append(p.scripts, script)
	}
	if !slices.Contains([]string{"simple", "extended", "prepared"}, p.protocol) {
		return plan{}, fmt.Errorf("-protocol: %q is not simple, extended or prepared", p.protocol)
	}
	for name := range strings.SplitSeq(*where, ",") {
		switch name {
		case "disk":
			p.places = append(p.places, place{name, *dir})
		case "tmpfs":
			p.places = append(p.places, place{name, tmpfsDir})
		default:
			return plan{}, fmt.Errorf("-where: %q is not disk or tmpfs", name)
		}
	}
	return p, nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	p, err := parse(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	if err != nil {
		return err
	}
	// Before anything is started: a missing program should not show after minutes.
	if _, err := cluster.Tool("pgbench"); err != nil {
		return err
	}
	if slices.Contains(p.scripts, "select-only") {
		if _, err := findPgbouncer(); err != nil {
			return err
		}
	}
	if p.binary == "" {
		dir, err := cluster.TempDir("")
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
		if p.binary, err = cluster.Build(ctx, dir, false); err != nil {
			return err
		}
	}
	install, err := findPostgres(ctx, p.pgBin, stderr)
	if err != nil {
		return err
	}
	describe(stdout, p, install.Version.String())
	for _, where := range p.places {
		if err := measure(ctx, p, where, install, stdout, stderr); err != nil {
			return fmt.Errorf("measure on %s: %w", where.name, err)
		}
	}
	return nil
}
