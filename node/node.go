// Package node wires one node together: PostgreSQL, capture, coordinator, consensus, certifier, apply, gateway and
// the admin API. It is the only package that knows all others; it decides when the node accepts writes.
//
// A part of the node lives as long as the process: consensus, gateway, the APIs. The other part is an incarnation,
// which lives as long as PostgreSQL does. DESIGN.md beside this file tells how the one outlives the other.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/quorate/quorate/admin"
	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/events"
	"github.com/quorate/quorate/gateway"
	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/internal/otlp"
	"github.com/quorate/quorate/internal/peers"
	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/internal/pki"
	"github.com/quorate/quorate/replication/clone"
	"github.com/quorate/quorate/txn"
)

// Certifier window, in transactions. A node that is further behind than horizonKeep has its writes aborted with 40001.
const (
	horizonKeep = 100_000
	horizonStep = 50_000
)

// Node is a running node. Its methods may be called concurrently.
type Node struct {
	cfg      config.Config
	version  string
	log      *slog.Logger
	identity identity
	states   states

	server    *pgserver.Server // nil: PostgreSQL is not managed by us
	current   atomic.Pointer[incarnation]
	observer  atomic.Pointer[observer]            // what follows the log before there is an incarnation, or instead of one
	consensus atomic.Pointer[consensus.Consensus] // the log begins to play before Open has returned it; nil: removed, or the log is lost
	gateway   atomic.Pointer[gateway.Gateway]
	grpc      *grpc.Server
	admin     atomic.Pointer[admin.Admin]
	observe   *admin.Observe
	met       atomic.Bool // see starting.go
	peers     *peers.Pool

	certificates      *pki.Credentials               // nil: on loopback, without
	clientCertificate *pki.Credentials               // what the gateway shows; nil: no TLS there
	cloning           atomic.Pointer[clone.Progress] // of the copy that this node is being given; nil: none

	metrics    *prometheus.Registry
	seen       seen
	traces     *otlp.Exporter // nil: nobody takes spans
	strays     prometheus.Counter
	recoveries prometheus.Counter

	retired     atomic.Bool               // see flow.go
	fresh       atomic.Pointer[time.Time] // see access.go; nil: nothing is known to be shown yet
	rejoining   sync.Mutex                // held while the node asks to be admitted anew
	returning   atomic.Bool               // it asks until it is, unattended
	superseding atomic.Bool               // it sees to it that the member leaves in whose place it was joined
	pruning     atomic.Bool               // a Horizon entry of ours is under way
	drained     atomic.Bool               // an operator has sent the clients away
	ctx         context.Context
	cancel      context.CancelCauseFunc
	group       *errgroup.Group
	fenced      context.Context
	fence       context.CancelCauseFunc       // ends fenced, and with it the incarnations for good, and nothing else
	lived       chan struct{}                 // closed when the last incarnation has ended; nil before the first is accompanied
	opened      []func(context.Context) error // what Close undoes, in reverse
	closing     sync.Once
	closeErr    error
}

// Open starts a node of this version of Quorate, as what its data directory says that it is (config.ClaimDataDir), and returns when its clients can connect; it accepts writes once it has
// caught up with the log. ctx bounds the start only. On an error everything that was started is stopped again; it is ErrStopped
// if ctx was cancelled before the node was open, and stopping it went well.
func Open(ctx context.Context, cfg config.Config, id config.Identity, version string, log *slog.Logger) (*Node, error) {
	n := newNode(cfg, id, version, log)
	err := n.open(ctx, log)
	if err == nil {
		return n, nil
	}
	stopped := errors.Is(ctx.Err(), context.Canceled) // then what was under way has been broken off, and has not failed
	if stopped {
		n.log.Info("the node was told to stop while it started", logkey.Error, err)
	} else {
		n.event(events.Error, eventStartFailed, n.cfg.Node, fmt.Sprintf("node %s cannot start: %v", n.cfg.Node, err))
	}
	closeErr := n.Close(context.WithoutCancel(ctx))
	switch {
	case !stopped:
		return nil, errors.Join(err, closeErr)
	case closeErr != nil:
		return nil, closeErr
	}
	return nil, ErrStopped
}

// ErrStopped is Open's when it was told to stop, and has: nothing has failed.
var ErrStopped = errors.New("the node was stopped before it had started")

// open takes the steps.
func (n *Node) open(ctx context.Context, log *slog.Logger) error {
	if err := n.openCertificates(ctx); err != nil {
		return fmt.Errorf("open certificates: %w", err)
	}
	if err := n.apply(ctx); err != nil {
		return err
	}
	n.log = log.With(logkey.Node, n.cfg.Node)
	for _, step := range n.steps() {
		if step.waits != "" && n.states.current().name == stateStarting {
			n.states.set(stateStarting, "the node is starting: it waits for "+step.waits)
		}
		if err := step.run(ctx); err != nil {
			return fmt.Errorf("open %s: %w", step.name, err)
		}
	}
	return nil
}

// newNode returns a node of which nothing is open.
func newNode(cfg config.Config, id config.Identity, version string, log *slog.Logger) *Node {
	n := &Node{
		cfg: cfg, version: version, identity: identity{dir: cfg.DataDir, now: id}, log: log.With(logkey.Node, cfg.Node), metrics: prometheus.NewRegistry(),
		strays:     prometheus.NewCounter(prometheus.CounterOpts{Name: "quorate_node_strays_total", Help: "Commits that bypassed the gateway."}),
		recoveries: prometheus.NewCounter(prometheus.CounterOpts{Name: "quorate_node_recoveries_total", Help: "Times that PostgreSQL was lost and taken up again."}),
	}
	n.states.changed = n.stateChanged
	n.states.set(stateStarting, "the node is starting")
	n.metrics.MustRegister(n.strays, n.recoveries, &n.states)
	var lifetime context.Context
	lifetime, n.cancel = context.WithCancelCause(context.Background())
	n.group, n.ctx = errgroup.WithContext(lifetime)
	n.fenced, n.fence = context.WithCancelCause(n.ctx)
	return n
}

// ID is the node's own, which a node that has just joined learns in Open.
func (n *Node) ID() txn.NodeID { return n.cfg.Node }

type step struct {
	name  string
	run   func(context.Context) error
	waits string // for what, as far as it may take its time
}

// steps are what opening consists of. The order matters. HTTP and gRPC before PostgreSQL, which may take minutes to replay its WAL:
// whoever asks for liveness must not take that for a dead process and kill it, and whoever wants to know hears what the node
// waits for. PostgreSQL before the log: how far it is decides where applying starts. The log, which begins to play as soon as
// consensus is open, finds what consumes it. Behind it the node is one among the members. Clients last.
func (n *Node) steps() []step {
	id := n.identity.get()
	steps := []step{
		{name: "observation", run: n.openObservation}, {name: "tracing", run: n.openTracing}, {name: "admin API", run: n.openAdmin},
		{name: "HTTP", run: n.openHTTP}, {name: "gRPC", run: n.serveGRPC},
	}
	members := step{name: "members", run: n.meet}
	if id.State == config.StateRemoved {
		return append(steps, step{name: "removed node", run: n.staysRemoved}, members)
	}
	steps = append(steps, step{name: "log", run: n.checkLog, waits: "the other members to say how far its log was"})
	switch {
	case n.cfg.Witness():
		steps = append(steps, step{name: "witness", run: n.openObserver})
	case id.State == config.StateJoining:
		steps = append(steps, step{name: "PostgreSQL", run: n.describeServer}, step{name: "joining", run: n.openObserver})
	default:
		steps = append(steps, step{name: "PostgreSQL", run: n.openIncarnation, waits: "its PostgreSQL"})
	}
	steps = append(steps, step{name: "consensus", run: n.openConsensus, waits: "its log"}, members, step{name: "recovery", run: n.accompanyAll})
	if !n.cfg.Witness() {
		steps = append(steps, step{name: "gateway", run: n.openGateway})
	}
	return steps
}

// Wait returns when the node cannot go on, with the reason, or nil after Close. A node whose data are at fault goes on,
// fenced, to say so.
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
		n.states.set(stateStopping, "the node is stopping")
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

func (n *Node) stateChanged(s state) {
	if a := n.admin.Load(); a != nil && s.reason != "" {
		a.SetServing(false) // that it serves, watch finds, which knows of the quorum too
	}
	n.stateEvent(s)
	if s.name == stateFailed {
		n.log.Error("the node is fenced", logkey.Reason, s.reason)
	}
}

// fail ends the process, for what a new start may mend.
func (n *Node) fail(err error) {
	if n.states.set(stateFailed, err.Error()) {
		n.cancel(err)
	}
}

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

// committing returns nil when transactions that have begun may commit.
func (n *Node) committing() error {
	if n.states.current().name == stateDraining {
		return nil
	}
	return n.accepting()
}

// accepting returns nil when clients may write.
func (n *Node) accepting() error {
	if s := n.states.current(); s.reason != "" {
		return errors.New(s.reason)
	}
	return nil
}
