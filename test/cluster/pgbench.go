package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Tool finds one of PostgreSQL's client programs: in PATH, or where Debian puts them.
func Tool(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/" + name)
	if err != nil || len(found) == 0 {
		return "", fmt.Errorf("find %s: not in PATH nor in /usr/lib/postgresql; on Debian: apt-get install postgresql (pgbench is in it, psql in postgresql-client)", name)
	}
	slices.Sort(found)
	return found[len(found)-1], nil
}

// Pgbench is one run of pgbench.
type Pgbench struct {
	Address  string
	Args     []string // for example -N, or -i -s 10
	Clients  int
	Duration time.Duration // whole seconds; 0 leaves it to Args
	MaxTries int           // of a transaction that ends in a serialization failure or a deadlock; 0 means 1
}

// PgbenchResult is what pgbench counted.
type PgbenchResult struct {
	Transactions int64 // committed
	Failed       int64 // given up after MaxTries
	Retries      int64
	TPS          float64 // without the time of connecting
	Latency      time.Duration
	Output       string
}

var (
	pgbenchDone    = regexp.MustCompile(`number of transactions actually processed: (\d+)`)
	pgbenchFailed  = regexp.MustCompile(`number of failed transactions: (\d+)`)
	pgbenchRetries = regexp.MustCompile(`total number of retries: (\d+)`)
	pgbenchTPS     = regexp.MustCompile(`tps = ([\d.]+) \(without initial connection time\)`)
	pgbenchLatency = regexp.MustCompile(`latency average = ([\d.]+) ms`)
)

// Run runs pgbench to its end. An aborted client is an error.
func (b Pgbench) Run(ctx context.Context) (PgbenchResult, error) {
	path, err := Tool("pgbench")
	if err != nil {
		return PgbenchResult{}, err
	}
	host, port, err := net.SplitHostPort(b.Address)
	if err != nil {
		return PgbenchResult{}, fmt.Errorf("run pgbench: %w", err)
	}
	args := []string{"-h", host, "-p", port, "-U", "postgres"}
	if b.Clients > 0 {
		args = append(args, "-n", "-c", strconv.Itoa(b.Clients), "-j", strconv.Itoa(min(b.Clients, 2)))
		args = append(args, "--max-tries", strconv.Itoa(max(b.MaxTries, 1)))
	}
	if b.Duration > 0 {
		args = append(args, "-T", strconv.Itoa(max(1, int(b.Duration/time.Second))))
	}
	args = append(args, b.Args...)
	cmd := exec.CommandContext(ctx, path, append(args, "postgres")...)
	cmd.Env = append(os.Environ(), "PGPASSWORD="+Password)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return PgbenchResult{}, fmt.Errorf("run pgbench %s: %w\n%s", strings.Join(b.Args, " "), err, tail(string(out), 30))
	}
	r := PgbenchResult{Output: string(out)}
	if b.Clients == 0 {
		return r, nil
	}
	if strings.Contains(r.Output, "Run was aborted") {
		return r, fmt.Errorf("run pgbench %s: a client aborted\n%s", strings.Join(b.Args, " "), tail(r.Output, 30))
	}
	if err := scan(r.Output, pgbenchDone, &r.Transactions); err != nil {
		return r, err
	}
	if r.Transactions == 0 { // then it prints no speed
		return r, nil
	}
	var latency float64
	err = errors.Join(scan(r.Output, pgbenchTPS, &r.TPS), scan(r.Output, pgbenchLatency, &latency))
	if err != nil {
		return r, err
	}
	r.Latency = time.Duration(latency * float64(time.Millisecond))
	// pgbench prints these two only when more than one try is allowed, or something failed.
	_ = scan(r.Output, pgbenchFailed, &r.Failed)
	_ = scan(r.Output, pgbenchRetries, &r.Retries)
	return r, nil
}

func scan(output string, pattern *regexp.Regexp, into any) error {
	m := pattern.FindStringSubmatch(output)
	if m == nil {
		return fmt.Errorf("read output of pgbench: no match for %q in\n%s", pattern, tail(output, 30))
	}
	_, err := fmt.Sscan(m[1], into)
	return err
}
