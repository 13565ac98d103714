// Package node wires one node together: PostgreSQL, capture, coordinator, consensus, certifier, apply, gateway and
// the admin API. It is the only package that knows all others; it decides when the node accepts writes.
package node

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/quorate/quorate/admin"
	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/gateway"
	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/replication/apply"
	"github.com/quorate/quorate/replication/capture"
	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/coord"
)

// maxNodes is how many nodes a cluster can have: each sequence is divided into as many residues when it is created.
const maxNodes = 16

// Certifier window, in transactions. A node that is further behind than horizonKeep has its writes aborted with 40001.
const (
	horizonKeep = 100_000
	horizonStep = 50_000
)

// maxLag is how many transactions this node may be behind the log before it stops taking new ones into the log: its
// own clients then wait for its PostgreSQL, instead of queues growing.
const maxLag = 2048

// Node is a running node. Its methods may be called concurrently.
type Node struct {
	cfg         config.Config
	version     string
	log         *slog.Logger
	incarnation uint64

	server    *pgserver.Server // nil: PostgreSQL is not managed by us
	metrics   *prometheus.Registry
	machine   *replication.Machine
	pipeline  *apply.Pipeline
	coord     *coord.Coordinator
	capture   *capture.Capture
	catalog   *pg.Catalog
	consensus atomic.Pointer[consensus.Consensus] // the log begins to play before Open has returned it
	gateway   atomic.Pointer[gateway.Gateway]
	grpc      *grpc.Server
	admin     atomic.Pointer[admin.Admin]

	token     string       // of this node's DDL messages
	start     txn.CSN      // everything up to it was committed here when the node started
	announced chan txn.CSN // the CSN at which the log says that this incarnation has started
	strays    prometheus.Counter

	state    atomic.Pointer[state]
	pruning  atomic.Bool // a Horizon entry of ours is under way
	stopping atomic.Bool
	ctx      context.Context
	cancel   context.CancelCauseFunc
	group    *errgroup.Group
	opened   []func(context.Context) error // what Close undoes, in reverse
	closing  sync.Once
	closeErr error
}

// state is what the node tells the world about itself.
type state struct {
	name   string // of DESIGN 9: catching-up, active, failed
	reason string // why it does not accept writes; empty when active
}

// Open starts a node of this version of Quorate and returns when its clients can connect; it accepts writes once it has
// caught up with the log. ctx bounds the start only. On an error everything that was started is stopped again.
func Open(ctx context.Context, cfg config.Config, version string, log *slog.Logger) (_ *Node, err error) {
	n := &Node{cfg: cfg, version: version, log: log.With(logkey.Node, cfg.Node), metrics: prometheus.NewRegistry(), announced: make(chan txn.CSN, 1)}
	n.setState("starting", "the node is starting")
	var seed [8]byte
	if _, err := rand.Read(seed[:]); err != nil {
		return nil, fmt.Errorf("draw an incarnation: %w", err)
	}
	n.incarnation = binary.BigEndian.Uint64(seed[:])
	n.metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	var lifetime context.Context
	lifetime, n.cancel = context.WithCancelCause(context.Background())
	n.group, n.ctx = errgroup.WithContext(lifetime)
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close(context.WithoutCancel(ctx)))
		}
	}()
	// The order matters. PostgreSQL first: how far it is decides where applying starts. Its consumers next, so that
	// the log, which begins to play as soon as consensus is open, finds them. Clients last.
	for _, step := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"PostgreSQL", n.openPostgres},
		{"replication", n.openReplication},
		{"admin API", n.openAdmin},
		{"consensus", n.openConsensus},
		{"gRPC", n.serveGRPC},
		{"HTTP", n.openHTTP},
		{"gateway", n.openGateway},
	} {
		if err := step.run(ctx); err != nil {
			return nil, fmt.Errorf("open %s: %w", step.name, err)
		}
	}
	n.group.Go(func() error { return n.join(n.ctx) })
	return n, nil
}

// Wait returns when the node cannot go on, with the reason, or nil after Close.
func (n *Node) Wait() error {
	<-n.ctx.Done()
	if err := context.Cause(n.ctx); !errors.Is(err, errClosed) {
		return err
	}
	return nil
}

var errClosed = errors.New("node closed")

// Close stops the node: clients first, PostgreSQL last. Transactions that wait for the log end as unknown; the log
// decides them. It is idempotent.
func (n *Node) Close(ctx context.Context) error {
	n.closing.Do(func() {
		n.stopping.Store(true)
		n.setState("stopping", "the node is stopping")
		var errs []error
		for i := len(n.opened) - 1; i >= 0; i-- {
			errs = append(errs, n.opened[i](ctx))
		}
		n.cancel(errClosed)
		n.closeErr = errors.Join(append(errs, n.group.Wait())...)
	})
	return n.closeErr
}

func (n *Node) onClose(f func(context.Context) error) { n.opened = append(n.opened, f) }

func (n *Node) setState(name, reason string) {
	n.state.Store(&state{name, reason})
	if a := n.admin.Load(); a != nil {
		a.SetServing(reason == "")
	}
}

// fail stops the node for a reason that going on would make worse.
func (n *Node) fail(err error) {
	if n.stopping.Load() {
		return
	}
	n.log.Error("the node stops", logkey.Error, err)
	n.setState("failed", err.Error())
	n.cancel(err)
}

// accepting returns nil when clients may write.
func (n *Node) accepting() error {
	if s := n.state.Load(); s.reason != "" {
		return errors.New(s.reason)
	}
	return nil
}
