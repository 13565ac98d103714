package node

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/replication/apply"
	"github.com/quorate/quorate/replication/capture"
	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
	"github.com/quorate/quorate/txn/coord"
)

// incarnation is what of a node lives as long as its PostgreSQL does: everything between the server and the log. When
// the server is lost, be it for a moment, commits that were visible may be gone, so nothing of it can go on: a new
// incarnation finds out what the server still has, is given the log again from its newest snapshot, and begins where
// the server ends. Transactions of earlier incarnations have no session any more; what became of them the server is
// asked, one by one.
type incarnation struct {
	n       *Node
	id      uint64 // in the GIDs of its transactions
	token   string // of this node's DDL messages
	start   txn.CSN
	life    string        // of the server
	server  config.Server // with the incarnations before this one
	version string        // of the server
	metrics *prometheus.Registry

	catalog  *pg.Catalog
	machine  *replication.Machine
	pipeline *apply.Pipeline
	coord    *coord.Coordinator
	capture  *capture.Capture

	barriers  barriers
	announced chan txn.CSN // the CSN at which the log says that this incarnation has begun
	ctx       context.Context
	cancel    context.CancelCauseFunc // with why it has ended
	running   sync.WaitGroup
	telling   sync.WaitGroup // the coordinator, which goes on until every client has been told
	told      context.CancelFunc
}

// applyRetry is how long what must be applied next may fail for lack of resources before the node gives up and fences
// itself: until then its clients see no more than a node that lags.
const applyRetry = 5 * time.Second

// captureRetry is how long capture may get no further before the incarnation ends: until then COMMITs wait for it. The next one
// makes the replication slot anew if that is gone.
const captureRetry = 10 * time.Second

// drawIncarnation returns what tells one life of a node from another.
func drawIncarnation() (uint64, error) {
	var id [8]byte
	if _, err := rand.Read(id[:]); err != nil {
		return 0, fmt.Errorf("draw an incarnation: %w", err)
	}
	return binary.BigEndian.Uint64(id[:]), nil
}

// begin brings PostgreSQL up and starts what works with it. What follows the log begins to do so when it is given to
// consensus.
func (n *Node) begin(ctx context.Context) (_ *incarnation, err error) {
	id, err := drawIncarnation()
	if err != nil {
		return nil, err
	}
	i := &incarnation{n: n, id: id, metrics: prometheus.NewRegistry(), announced: make(chan txn.CSN, 1)}
	if err := n.openPostgres(ctx, i); err != nil {
		return nil, err
	}
	if err := i.open(); err != nil {
		return nil, err
	}
	i.run()
	return i, nil
}

// open builds everything between capture and the log, and between the log and PostgreSQL.
func (i *incarnation) open() error {
	n := i.n
	lookups, err := n.parseConn("quorate catalog")
	if err != nil {
		return err
	}
	stream, err := n.parseConn("quorate capture")
	if err != nil {
		return err
	}
	spill := filepath.Join(n.cfg.DataDir, "spill")
	if err := os.MkdirAll(spill, 0o700); err != nil {
		return fmt.Errorf("make the spill directory: %w", err)
	}
	start := prometheus.NewGauge(prometheus.GaugeOpts{Name: "quorate_node_start_csn", Help: "The transaction up to which PostgreSQL was known to be when it was last taken up; what follows was applied again, or found there."})
	start.Set(float64(i.start))
	i.metrics.MustRegister(start)
	i.catalog = pg.NewCatalog(lookups)
	i.machine = replication.New(replication.Config{
		Deliver:   i.deliver,
		Processed: func(index txn.LogIndex) { i.pipeline.Skip(index); n.prune(i.machine) },
		Durable:   func(csn txn.CSN) error { return i.pipeline.Flush(i.ctx, csn) },
		Member:    i.memberStarted,
		Changed:   func(c replication.Change) { n.membershipChanged(c, i.machine.Membership()) },
		Barrier:   i.barrier,
		Fail:      i.fail,
	})
	i.pipeline = apply.New(apply.Config{
		Connect:    n.connect,
		Part:       n.part,
		Evict:      n.evict,
		Changed:    i.catalog.Invalidate,
		Visible:    n.traceApply(),
		Start:      i.start,
		Life:       i.life,
		Database:   n.cfg.Postgres.Database,
		Workers:    n.cfg.Apply.Workers,
		MaxItems:   n.cfg.Limits.ApplyTransactions,
		MaxBytes:   int(n.cfg.Limits.ApplyMemory),
		RetryFor:   applyRetry,
		Logger:     n.log.With(logkey.Component, "apply"),
		Registerer: i.metrics,
	})
	i.coord = coord.New(coord.Config{
		Node:          n.cfg.Node,
		Incarnation:   i.id,
		Database:      n.cfg.Postgres.Database,
		Order:         order{i},
		Visibility:    i.pipeline,
		CommitTimeout: n.cfg.CommitTimeout,
		Trace:         n.traceCommit(),
		Logger:        n.log.With(logkey.Component, "coord"),
		Registerer:    i.metrics,
	})
	// What a session wrote in a later life of the server is based on what that life has lost. Only capture hands it on.
	stream.AfterConnect = i.pipeline.Verify
	i.capture = capture.New(capture.Config{
		Conn:     stream,
		Database: n.cfg.Postgres.Database,
		Token:    i.token,
		Catalog:  i.catalog,
		Sink:     sink{i},
		SpillDir: spill,
		// Raft sends up to 128 entries in one message, so parts of large transactions are kept small.
		Limits:     capture.Limits{Memory: int(n.cfg.Limits.CaptureMemory), PartSize: 256 << 10},
		RetryFor:   captureRetry,
		Logger:     n.log.With(logkey.Component, "capture"),
		Registerer: i.metrics,
	})
	return nil
}

var (
	errEnded         = errors.New("ended without an error")
	errServerStopped = errors.New("the server has stopped")
)

func (i *incarnation) run() {
	i.ctx, i.cancel = context.WithCancelCause(context.Background())
	part := func(name string, f func(context.Context) error) {
		i.running.Go(func() {
			err := f(i.ctx)
			if err == nil {
				err = errEnded
			}
			i.fail(fmt.Errorf("%s: %w", name, err))
		})
	}
	part("apply", i.pipeline.Run)
	part("capture", i.capture.Run)
	part("sequences", i.reserveSequences)
	i.running.Go(func() { i.watchHealth(i.ctx) })
	i.running.Go(func() { i.keepFresh(i.ctx) })
	if i.n.server != nil {
		stopped := i.n.server.Done()
		i.running.Go(func() {
			select {
			case <-stopped:
				i.fail(errServerStopped)
			case <-i.ctx.Done():
			}
		})
	}
	telling, told := context.WithCancel(context.Background())
	i.told = told
	i.telling.Go(func() {
		if err := i.coord.Run(telling); err != nil {
			i.fail(fmt.Errorf("coordinator: %w", err))
		}
	})
}

// fail ends the incarnation; the first reason counts.
func (i *incarnation) fail(err error) { i.cancel(err) }

// end stops everything that works with PostgreSQL and returns when each client that waited for a COMMIT has been told
// what the log says of it, or that this is not known: the log goes on to be read meanwhile.
func (i *incarnation) end() error {
	i.cancel(errClosed)
	i.running.Wait()
	i.coord.Detach()
	err := i.n.endSessions(i.n.cfg.CommitTimeout + tellTimeout)
	i.told() // who still waits is told that the outcome is unknown
	i.telling.Wait()
	if err != nil {
		i.n.log.Warn("commits are left undecided", logkey.Reason, err)
		err = i.n.endSessions(tellTimeout)
	}
	return errors.Join(err, i.catalog.Close(context.Background()))
}

// tellTimeout is how long a session may take to end, once it knows what to tell its client.
const tellTimeout = 5 * time.Second

func (n *Node) endSessions(patience time.Duration) error {
	g := n.gateway.Load()
	if g == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return g.EndSessions(ctx)
}

// catchUp waits until this node has everything that was committed when it came.
func (i *incarnation) catchUp(ctx context.Context) error {
	select {
	case <-i.capture.Ready():
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	// The announcement is a log entry, so what was committed before it comes before it.
	if err := i.n.announce(ctx, i.machine, i.id, i.version); err != nil {
		return err
	}
	select {
	case csn := <-i.announced:
		// What earlier incarnations committed is in the progress then, and nobody asks about it again.
		if err := i.pipeline.Flush(ctx, csn); err != nil {
			return err
		}
		return i.n.identity.change(func(id *config.Identity) { id.Server = id.Server.CaughtUp() })
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// memberStarted takes a member's announcement from the log.
func (i *incarnation) memberStarted(m codec.Member) {
	i.n.log.Info("a member has started", "member", m.Node, logkey.Address, m.GRPCAddress)
	if m.Node == i.n.cfg.Node && m.Incarnation == i.id {
		select {
		case i.announced <- i.machine.LastCSN(): // called between entries, so exact
		default: // announced twice
		}
	}
}
