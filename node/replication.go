package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/replication/apply"
	"github.com/quorate/quorate/replication/capture"
	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
	"github.com/quorate/quorate/txn/coord"
)

// openReplication builds everything between capture and the log, and between the log and PostgreSQL.
func (n *Node) openReplication(context.Context) error {
	n.strays = prometheus.NewCounter(prometheus.CounterOpts{Name: "quorate_node_strays_total", Help: "Commits that bypassed the gateway."})
	n.metrics.MustRegister(n.strays)
	lookups, err := n.parseConn("quorate catalog")
	if err != nil {
		return err
	}
	n.catalog = pg.NewCatalog(lookups)
	n.onClose(n.catalog.Close)
	n.machine = replication.New(replication.Config{
		Deliver:   n.deliver,
		Processed: func(index txn.LogIndex) { n.pipeline.Skip(index); n.prune() },
		Durable:   n.durable,
		Member:    n.memberStarted,
		Fail:      n.fail,
	})
	n.pipeline = apply.New(apply.Config{
		Connect:    n.connect,
		Part:       n.part,
		Evict:      n.evict,
		Changed:    n.catalog.Invalidate,
		Start:      n.start,
		Database:   n.cfg.Postgres.Database,
		Workers:    n.cfg.Apply.Workers,
		MaxItems:   n.cfg.Limits.ApplyTransactions,
		MaxBytes:   int(n.cfg.Limits.ApplyMemory),
		Logger:     n.log.With(logkey.Component, "apply"),
		Registerer: n.metrics,
	})
	n.coord = coord.New(coord.Config{
		Node:          n.cfg.Node,
		Incarnation:   n.incarnation,
		Database:      n.cfg.Postgres.Database,
		Order:         order{n},
		Visibility:    n.pipeline,
		CommitTimeout: n.cfg.CommitTimeout,
		Logger:        n.log.With(logkey.Component, "coord"),
		Registerer:    n.metrics,
	})
	stream, err := n.parseConn("quorate capture")
	if err != nil {
		return err
	}
	spill := filepath.Join(n.cfg.DataDir, "spill")
	if err := os.MkdirAll(spill, 0o700); err != nil {
		return fmt.Errorf("make the spill directory: %w", err)
	}
	n.capture = capture.New(capture.Config{
		Conn:     stream,
		Database: n.cfg.Postgres.Database,
		Token:    n.token,
		Catalog:  n.catalog,
		Sink:     sink{n},
		SpillDir: spill,
		// Raft sends up to 128 entries in one message, so parts of large transactions are kept small.
		Limits:     capture.Limits{Memory: int(n.cfg.Limits.CaptureMemory), PartSize: 256 << 10},
		Logger:     n.log.With(logkey.Component, "capture"),
		Registerer: n.metrics,
	})
	// Whatever works with PostgreSQL ends before PostgreSQL does.
	n.onClose(func(context.Context) error { n.cancel(errClosed); return n.group.Wait() })
	n.run("apply", n.pipeline.Run)
	n.run("coordinator", n.coord.Run)
	n.run("capture", n.capture.Run)
	return nil
}

var errEnded = errors.New("ended without an error")

// run runs a part of the node until the node ends; if the part ends before, so does the node.
func (n *Node) run(name string, f func(context.Context) error) {
	n.group.Go(func() error {
		err := f(n.ctx)
		if err == nil {
			err = errEnded
		}
		if n.ctx.Err() == nil {
			n.fail(fmt.Errorf("%s: %w", name, err))
		}
		return nil
	})
}

// evict asks the gateway to abort the transaction of one of its sessions.
func (n *Node) evict(pid uint32, by txn.CSN) bool {
	g := n.gateway.Load()
	return g != nil && g.Evict(pid, by)
}

// part reads a chunk of a large transaction from the log.
func (n *Node) part(index txn.LogIndex) ([]byte, error) {
	data, err := n.consensus.Load().Entry(index)
	if err != nil {
		return nil, err
	}
	entry, err := codec.Decode(data)
	if err != nil {
		return nil, err
	}
	if entry.Kind != codec.KindChunk {
		return nil, fmt.Errorf("log entry %d is no chunk but %s: %w", index, entry.Kind, txn.ErrCorrupt)
	}
	return entry.Chunk.Data, nil
}

func (n *Node) openConsensus(context.Context) error {
	var members []consensus.Member
	for _, m := range n.cfg.Members {
		members = append(members, consensus.Member{Node: m.ID, RaftAddress: m.Raft, GRPCAddress: m.GRPC})
	}
	c, err := consensus.Open(consensus.Config{
		Node:        n.cfg.Node,
		Dir:         filepath.Join(n.cfg.DataDir, "raft"),
		RaftAddress: n.cfg.Listen.Raft,
		Bootstrap:   members,
		Logger:      n.log.With(logkey.Component, "consensus"),
		Registerer:  n.metrics,
	}, machine{n.machine})
	if err != nil {
		return err
	}
	n.consensus.Store(c)
	n.onClose(func(context.Context) error { return c.Close() })
	c.Register(n.grpc)
	n.group.Go(func() error {
		select {
		case <-c.Failed():
			n.fail(fmt.Errorf("consensus: %w", c.Err()))
		case <-n.ctx.Done():
		}
		return nil
	})
	return nil
}

// join waits until this node has everything that was committed when it came, then lets clients write.
func (n *Node) join(ctx context.Context) error {
	n.setState("catching-up", "the node is catching up with the cluster")
	started := time.Now()
	if err := n.catchUp(ctx); err != nil {
		if ctx.Err() == nil {
			n.fail(fmt.Errorf("catch up: %w", err))
		}
		return nil
	}
	n.setState("active", "")
	n.log.Info("the node accepts writes", logkey.CSN, n.pipeline.Applied(), logkey.Duration, time.Since(started))
	return nil
}

func (n *Node) catchUp(ctx context.Context) error {
	select {
	case <-n.capture.Ready():
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	// The announcement is a log entry, so what was committed before it comes before it.
	announcement := codec.AppendMember(nil, &codec.Member{
		Node: n.cfg.Node, Incarnation: n.incarnation, RaftAddress: n.cfg.Self().Raft, GRPCAddress: n.cfg.Self().GRPC,
		HTTPAddress: n.cfg.Self().HTTP, GatewayAddress: n.cfg.Self().Gateway, Version: n.version,
	})
	for {
		_, err := n.consensus.Load().Propose(ctx, announcement)
		if err == nil {
			break
		}
		n.log.Info("the node is not in the cluster yet", logkey.Reason, err)
		if err := (order{n}).AwaitLeader(ctx); err != nil {
			return err
		}
	}
	select {
	case csn := <-n.announced:
		return n.pipeline.WaitFor(ctx, csn)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// memberStarted takes a member's announcement from the log.
func (n *Node) memberStarted(m codec.Member) {
	n.log.Info("a member has started", "member", m.Node, logkey.Address, m.GRPCAddress)
	if m.Node == n.cfg.Node && m.Incarnation == n.incarnation {
		select {
		case n.announced <- n.machine.LastCSN(): // called between entries, so exact
		default: // announced twice
		}
	}
}
