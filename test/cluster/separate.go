package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// networkBase is the base port where every node has an address of its own.
const networkBase = 6000

// runAll starts every node by itself, and returns when all let writes through.
func (c *Cluster) runAll(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := c.certify(ctx); err != nil {
		return err
	}
	// Who comes over a network is let in by a password only, whatever PostgreSQL thinks of the gateway.
	if err := os.WriteFile(filepath.Join(c.root, "password"), []byte(Password+"\n"), 0o600); err != nil {
		return err
	}
	if c.options.Supervised {
		if err := c.startServers(ctx); err != nil {
			return err
		}
	}
	for i := 1; i <= c.Nodes; i++ {
		if err := c.configure(ctx, i); err != nil {
			return fmt.Errorf("configure node %d: %w", i, err)
		}
		if err := c.StartNode(i); err != nil {
			return err
		}
	}
	for i := 1; i <= c.Nodes; i++ {
		if err := c.awaitGateway(ctx, i); err != nil {
			return err
		}
	}
	for i := 1; i <= c.Nodes; i++ {
		if err := c.AwaitNode(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

// configure writes the configuration of a node that has none.
func (c *Cluster) configure(ctx context.Context, i int) error {
	file := filepath.Join(c.NodeDir(i), "quorate.yaml")
	if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	bin, err := c.programs(ctx)
	if err != nil {
		return err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "cluster: tested\nnode: %d\ndata_dir: .\n", i)
	server := "managed: true, bin_dir: " + bin
	if c.options.Supervised {
		server = "managed: false, host: " + filepath.Join(c.NodeDir(i), "run")
	}
	fmt.Fprintf(&b, "postgres: {%s, password_file: %s, port: %d}\n", server, filepath.Join(c.root, "password"), c.base+postgresPorts+i)
	in := c.CertDir()
	fmt.Fprintf(&b, "tls: {ca: %s/ca.crt, cert: %s/node%d.crt, key: %s/node%d.key}\n", in, in, i, in, i)
	addresses := func(i int) string {
		return fmt.Sprintf("gateway: '%s', grpc: '%s', http: '%s', raft: '%s'", c.Gateway(i), c.GRPC(i), c.HTTP(i), c.Raft(i))
	}
	fmt.Fprintf(&b, "listen: {%s}\nmembers:\n", addresses(i))
	for member := 1; member <= c.Nodes; member++ {
		fmt.Fprintf(&b, "  - {id: %d, %s}\n", member, addresses(member))
	}
	b.WriteString(c.options.Configuration)
	if err := os.MkdirAll(c.NodeDir(i), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, []byte(b.String()), 0o644)
}

// fetchMajor is the PostgreSQL that is fetched where none is installed, as the demo does.
const fetchMajor = 18

// awaitGateway returns when a node that StartNode has started takes clients.
func (c *Cluster) awaitGateway(ctx context.Context, i int) error {
	p := c.singles[i]
	return poll(ctx, func() error {
		select {
		case <-p.done:
			return stopPolling{fmt.Errorf("run node %d: it ended: %w", i, p.exit())}
		default:
		}
		conn, err := c.Connect(ctx, i)
		if err != nil {
			return err
		}
		closeConn(conn)
		return nil
	})
}
