package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/quorate/quorate/internal/pgserver"
)

// supervisor keeps the PostgreSQL servers of a cluster running that the nodes attach to: what systemd would do. A server
// that has ended, for whatever reason, is started again.
type supervisor struct {
	ctx     context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup
	servers []*pgserver.Server
	failed  []error // of each server, why it could not be started the last time
}

// startServers starts a server for each node, on directories that may hold the data of an earlier run, and begins to
// look after them.
func (c *Cluster) startServers(ctx context.Context) error {
	s := &supervisor{}
	for i := 1; i <= c.Nodes; i++ {
		server, err := c.startServer(ctx, i)
		if err != nil {
			return errors.Join(fmt.Errorf("start PostgreSQL of node %d: %w", i, err), s.stop())
		}
		s.servers = append(s.servers, server)
	}
	s.failed = make([]error, len(s.servers))
	s.ctx, s.cancel = context.WithCancel(context.Background())
	for i := range s.servers {
		s.running.Go(func() { s.supervise(i) })
	}
	c.supervisor = s
	return nil
}

func (c *Cluster) startServer(ctx context.Context, i int) (*pgserver.Server, error) {
	bin, err := c.programs(ctx)
	if err != nil {
		return nil, err
	}
	install, err := pgserver.Find(ctx, pgserver.FindOptions{BinDir: bin})
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.NodeDir(i), 0o755); err != nil {
		return nil, err
	}
	server, err := pgserver.New(pgserver.Config{
		Install: install, DataDir: filepath.Join(c.NodeDir(i), "pgdata"), SocketDir: filepath.Join(c.NodeDir(i), "run"),
		Port: c.base + postgresPorts + i, Password: Password,
		Settings:      pgserver.NodeSettings(install.Version, pgserver.Sizing{Clients: 100, Workers: 8}), // a node's defaults
		EndWithParent: true,
	})
	if err != nil {
		return nil, err
	}
	if _, err := server.Init(ctx); err != nil {
		return nil, err
	}
	return server, server.Start(ctx)
}

// restartPause is how long a supervisor waits before it tries again what has just failed.
const restartPause = 100 * time.Millisecond

func (s *supervisor) supervise(i int) {
	for {
		select {
		case <-s.servers[i].Done():
		case <-s.ctx.Done():
			return
		}
		err := s.servers[i].Start(s.ctx)
		if s.ctx.Err() != nil {
			return
		}
		if s.failed[i] = err; err != nil {
			select {
			case <-time.After(restartPause):
			case <-s.ctx.Done():
			}
		}
	}
}

// stop stops the servers. Its error also tells of those that could not be started again.
func (s *supervisor) stop() error {
	if s.cancel != nil {
		s.cancel()
		s.running.Wait()
	}
	errs := s.failed
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	for _, server := range s.servers {
		errs = append(errs, server.Stop(ctx))
	}
	return errors.Join(errs...)
}

// stopServers stops the servers that the nodes are attached to, if there are such.
func (c *Cluster) stopServers() error {
	if c.supervisor == nil {
		return nil
	}
	err := c.supervisor.stop()
	c.supervisor = nil
	return err
}

// programs is the directory of PostgreSQL's programs.
func (c *Cluster) programs(ctx context.Context) (string, error) {
	if c.options.PGBin != "" {
		return c.options.PGBin, nil
	}
	in, err := pgserver.Find(ctx, pgserver.FindOptions{})
	if err != nil {
		in, err = pgserver.Fetch(ctx, fetchMajor, io.Discard)
	}
	return in.BinDir, err
}
