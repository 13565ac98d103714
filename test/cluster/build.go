package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/quorate/quorate/internal/pgserver"
)

// Build compiles the quorate command into dir and returns its path. With race it has the race detector in it, and
// is then several times slower and bigger: fit for tests, not for measurements.
//
// Linking takes seconds, and the tests of many packages want the same program. So it is linked in the tree's bin, where the next
// one finds that it is up to date, and dir gets a copy, which stays as it is when somebody changes the code while tests run.
func Build(ctx context.Context, dir string, race bool) (string, error) {
	name, args := "quorate-tested", []string{"build"}
	if race {
		name, args = "quorate-tested-race", append(args, "-race")
	}
	module, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("build quorate: find its source: %w", err)
	}
	bin := filepath.Join(strings.TrimSpace(string(module)), "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return "", fmt.Errorf("build quorate: %w", err)
	}
	linked, path := filepath.Join(bin, name), filepath.Join(dir, name)
	unlock, err := pgserver.Lock(ctx, linked+".lock")
	if err != nil {
		return "", fmt.Errorf("build quorate: %w", err)
	}
	defer unlock()
	args = append(args, "-ldflags=-w", "-o", linked, "github.com/quorate/quorate/cmd/quorate") // nobody debugs it
	if out, err := exec.CommandContext(ctx, "go", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build quorate: %w\n%s", err, out)
	}
	if out, err := exec.CommandContext(ctx, "cp", "--reflink=auto", linked, path).CombinedOutput(); err != nil {
		return "", fmt.Errorf("copy quorate: %w\n%s", err, out)
	}
	return path, nil
}

// TempDir makes a directory that a server running as an unprivileged user can reach; os.MkdirTemp's are closed.
// Under is the parent, "" the system's directory for temporary files.
func TempDir(under string) (string, error) {
	dir, err := os.MkdirTemp(under, "quorate-test-")
	if err != nil {
		return "", fmt.Errorf("make directory: %w", err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", errors.Join(fmt.Errorf("open directory: %w", err), os.RemoveAll(dir))
	}
	return dir, nil
}

// portBlocks are the distances from the base port at which "quorate demo" puts gateway, PostgreSQL, gRPC, HTTP and
// Raft of a node.
var portBlocks = [...]int{gatewayPorts, postgresPorts, grpcPorts, httpPorts, raftPorts}

const (
	gatewayPorts  = 0
	postgresPorts = 100
	grpcPorts     = 200
	httpPorts     = 300
	raftPorts     = 400
)

// claimPorts finds a base port whose whole block is free now, and keeps it for the caller until claim is closed: listening
// on the base itself, which no node does, keeps others from the ports of nodes that are down. It stays below the range from
// which Linux takes ports for outgoing connections.
func claimPorts(nodes int) (base int, claim io.Closer, err error) {
	const low, high, step = 10000, 31000, 500
	// Start at a place of this process's own: several tests may run side by side.
	start := os.Getpid() % ((high - low) / step)
	for i := range (high - low) / step {
		base := low + (start+i)%((high-low)/step)*step
		claim, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", base))
		if err != nil {
			continue
		}
		if portsFree(base, nodes) {
			return base, claim, nil
		}
		if err := claim.Close(); err != nil {
			return 0, nil, fmt.Errorf("find free ports: %w", err)
		}
	}
	return 0, nil, fmt.Errorf("find free ports: none in %d to %d", low, high)
}

func portsFree(base, nodes int) bool {
	for _, block := range portBlocks {
		for i := 1; i <= nodes; i++ {
			l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", base+block+i))
			if err != nil {
				return false
			}
			if l.Close() != nil {
				return false
			}
		}
	}
	return true
}

// tail returns the last n lines of a text.
func tail(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}
