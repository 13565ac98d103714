// Package consensus orders bytes: what is proposed on any node reaches the Machine of every node in one order, once
// a majority holds it on disk. It knows nothing of transactions. It is a shell around hashicorp/raft which closes that
// library's known holes from outside, forwards proposals to the leader, and tells followers of commits at once.
// DESIGN.md, beside this file, says how and why.
package consensus

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"github.com/hashicorp/raft-wal/verifier"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
)

// Entry is one committed proposal.
type Entry struct {
	Index txn.LogIndex // ascending, with gaps: Raft has entries of its own
	Term  uint64
	Data  []byte // as proposed; shared with other readers, so it must not be changed
}

// Machine is what the entries are for. Its methods are called by one goroutine at a time.
type Machine interface {
	// Apply takes the next entries, in order, at least one. It may block: Raft goes on, and what this node has not
	// applied waits in its log. After a restart entries come again that were applied before, from the last snapshot
	// on. The slice is only lent; the Data in it may be kept.
	Apply(entries []Entry)
	// Snapshot captures everything that was applied so far. It is called between two calls of Apply and holds up the
	// next one, so the work belongs into WriteTo. An error means "not now": it is tried again later.
	Snapshot() (Snapshot, error)
	// Restore replaces the state by what WriteTo wrote. It is called before any Apply, during Open or, on a node
	// that is new, after it. It may be called again, after an error or for a newer snapshot.
	Restore(r io.Reader) error
}

// Snapshot is a captured state. The log up to it, but for what it Needs, may be forgotten once it is written.
type Snapshot interface {
	// Needs is the lowest index of an entry that the snapshot covers and that the machine may still read by Entry when it
	// goes on from the snapshot; 0: none. The log is kept from there on until a later snapshot is written. A node that is
	// sent the snapshot because it has no log does not get those entries.
	Needs() txn.LogIndex
	// WriteTo may run beside Apply, and may block until what the snapshot covers is durable elsewhere.
	WriteTo(w io.Writer) (int64, error)
	// Release ends the snapshot, written or not.
	Release()
}

// The errors of this package's own. The first two are reasons to stop: see Failed.
var (
	// ErrBehind: the leader no longer has the entries that this node needs next, only a snapshot, and a snapshot is
	// never installed over a log. The node must be cloned and come back under a new identity with an empty directory.
	ErrBehind = errors.New("log ends before the leader's begins")
	// ErrTransferStuck: Raft believes for ever that it is handing over leadership. Closing and opening again mends it.
	ErrTransferStuck = errors.New("leadership transfer never ends")
	// ErrSize: an entry is empty or larger than MaxData.
	ErrSize = errSize
)

var errSize = fmt.Errorf("entry is empty or larger than %d bytes", MaxData)

// State is this node's part in Raft.
type State uint8

// The states.
const (
	Follower State = iota
	Candidate
	Leader
	Stopped
)

var stateNames = [...]string{"follower", "candidate", "leader", "stopped"}

// String returns the name used in logs and the status page.
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return "invalid"
}

// Status is a snapshot of what this node believes. The fields are read one after another.
type Status struct {
	Node         txn.NodeID
	State        State
	Leader       txn.NodeID // 0: not known
	Term         uint64
	LastIndex    txn.LogIndex // in this node's log
	CommitIndex  txn.LogIndex // known here to be committed
	AppliedIndex txn.LogIndex // the last entry that Machine.Apply has returned for, or Restore covered
	// LastContact is when this node last heard from the leader; zero if it leads or never has.
	LastContact   time.Time
	QuorumContact time.Time // see Consensus.QuorumContact
	Members       []Member  // see Consensus.Members
}

// Consensus is one member of the group. All methods may be called from any goroutine.
type Consensus struct {
	config      Config
	logger      *slog.Logger
	dialOptions []grpc.DialOption
	metrics     *metrics
	stores      *stores
	transport   *transport
	raft        *raft.Raft
	feed        *feed

	queue     *requestQueue
	budget    *semaphore.Weighted // bytes in flight
	leading   *leadership
	notices   *noticeBoard
	reads     readRounds
	contact   contact
	transfers *transferWatch
	local     *proposals
	conns     map[txn.NodeID]connection // belongs to runLink; Close has it afterwards

	configured *configured
	changing   chan struct{} // holds something during a change of the members
	reloading  sync.Mutex    // held during a change of Raft's settings
	grown      chan struct{} // capacity 1: the log may have grown by SnapshotBytes

	// What runs, grouped by when Close ends it.
	closing context.Context // ended first
	close   context.CancelFunc
	calls   gate           // calls of the gRPC service, and prime
	drivers sync.WaitGroup // what runs until then: runLink and its like
	futures sync.WaitGroup // what waits for Raft's futures
	stopped chan struct{}  // closed once Raft has stopped
	watcher sync.WaitGroup // observe
	applier sync.WaitGroup // feed.run

	closeOnce sync.Once
	closeErr  error

	failed  chan struct{}
	failMu  sync.Mutex
	failErr error
}

// Open starts this node's part in the group. It returns as soon as the node takes part: a leader, and the entries
// that are committed already, come later.
func Open(cfg Config, m Machine) (_ *Consensus, err error) {
	cfg.setDefaults()
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("open consensus: %w", err)
	}
	c := &Consensus{
		config:      cfg,
		logger:      cfg.Logger,
		dialOptions: dialOptions(cfg.DialOptions),
		contact:     contact{gap: cfg.quorumTimeout()},
		queue:       newRequestQueue(),
		budget:      semaphore.NewWeighted(maxInFlight),
		leading:     newLeadership(),
		notices:     newNoticeBoard(),
		conns:       make(map[txn.NodeID]connection),
		configured:  newConfigured(cfg.Node),
		changing:    make(chan struct{}, 1),
		grown:       make(chan struct{}, 1),
		stopped:     make(chan struct{}),
		failed:      make(chan struct{}),
	}
	c.closing, c.close = context.WithCancel(context.Background())
	c.feed = newFeed(m)
	c.feed.fail, c.feed.committed, c.feed.configured = c.fail, c.committed, c.configured.set
	c.transfers = &transferWatch{limit: 2 * cfg.ElectionTimeout, stuck: c.fail}
	c.metrics = newMetrics(c.Status, func() (bytes, entries uint64) {
		bytes, entries, _ = c.stores.log.sizes.read()
		return bytes, entries
	}, &c.config)
	if err := c.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("open consensus: %w", err), c.shut())
	}
	return c, nil
}

// open fills c part by part; shut copes with what is missing. The stores come first: their lock keeps another process
// out before anything is changed.
func (c *Consensus) open() (err error) {
	if c.stores, err = openStores(&c.config, c.stored, c.storeFailed, c.verified); err != nil {
		return err
	}
	c.feed.read, c.feed.latest = c.stores.log.GetLog, c.stores.latestSnapshot
	c.feed.restored, c.feed.written = c.stores.snapshotConfiguration, c.retain
	if err := c.measureLog(); err != nil {
		return err
	}
	if c.transport, err = c.listen(); err != nil {
		return err
	}
	if err := c.startRaft(); err != nil {
		return err
	}
	c.start()
	return c.metrics.register(c.config.Registerer)
}

// dialOptions adds to the caller's what links need: a leader that comes back must be found again soon.
func dialOptions(given []grpc.DialOption) []grpc.DialOption {
	options := []grpc.DialOption{grpc.WithNoProxy(), grpc.WithConnectParams(grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
		MinConnectTimeout: 2 * time.Second,
	})}
	if len(given) == 0 {
		return append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))
	}
	return append(options, given...)
}

func (c *Consensus) listen() (*transport, error) {
	return listenRaft(c.config.RaftAddress, transportConfig{
		streamConfig: streamConfig{
			node: c.config.Node, cluster: c.config.ClusterID,
			serverTLS: c.config.ServerTLS, clientTLS: c.config.ClientTLS, verifyPeer: c.config.VerifyPeer,
			refused: c.connectionRefused,
		},
		logger:         newHCLog(c.logger),
		refuseSnapshot: c.refuseSnapshot,
		injected:       c.metrics.notices.Inc,
	})
}

// connectionRefused does not warn: strangers should not be able to fill anybody's disk. A member that is turned away by
// mistake says so itself.
func (c *Consensus) connectionRefused(reason string, err error) {
	c.metrics.refusals.WithLabelValues(reason).Inc()
	c.logger.Debug("raft connection refused", logkey.Reason, reason, logkey.Error, err)
}

func (c *Consensus) startRaft() error {
	conf := c.config.raftConfig()
	existing, err := raft.HasExistingState(c.stores.log, c.stores.stable, c.stores.snapshots)
	if err != nil {
		return fmt.Errorf("read state: %w", err)
	}
	if !existing && len(c.config.Bootstrap) > 0 {
		err := raft.BootstrapCluster(conf, c.stores.log, c.stores.stable, c.stores.snapshots, c.transport, c.config.bootstrap())
		if err != nil {
			return fmt.Errorf("bootstrap: %w", err)
		}
	}
	// What is there already is not stored again: without this, notices would not do for it.
	var last raft.Log
	index, err := c.stores.log.LastIndex()
	if err == nil && index > 0 {
		err = c.stores.log.GetLog(index, &last)
	}
	if err != nil {
		return fmt.Errorf("read last entry: %w", err)
	}
	c.transport.stored(last.Index, last.Term)
	c.raft, err = raft.NewRaft(conf, c.feed, c.stores.log, c.stores.stable, c.stores.snapshots, c.transport)
	if err != nil {
		return fmt.Errorf("start Raft: %w", err)
	}
	c.transport.self.Store(c.raft)
	return nil
}

// start begins all that runs beside Raft.
func (c *Consensus) start() {
	events := make(chan raft.Observation, 64)
	// Blocking: a change of leadership must not be missed, and the reader is quick.
	c.raft.RegisterObserver(raft.NewObserver(events, true, func(o *raft.Observation) bool {
		switch o.Data.(type) {
		case raft.LeaderObservation, raft.RaftState:
			return true
		}
		return false
	}))
	c.local = c.newProposals()
	c.applier.Go(c.feed.run)
	c.watcher.Go(func() { c.observe(events) })
	c.drivers.Go(c.runLink)
	c.drivers.Go(c.runVerification)
	c.drivers.Go(c.runContact)
	c.drivers.Go(c.runSuspicion)
	c.drivers.Go(c.runGrowth)
}

// stored passes on what the log has stored: see transport.stored.
func (c *Consensus) stored(index, term uint64) {
	if c.transport != nil { // not yet while bootstrapping
		c.metrics.flushes.Inc()
		c.transport.stored(index, term)
		c.logGrown()
	}
}

// storeFailed hears that the disk has refused an append: it is full, or broken. A leader steps down then, by itself;
// but a follower would go on without learning what is committed, and its clients wait.
func (c *Consensus) storeFailed(err error) {
	if c.closing.Err() == nil {
		c.fail(fmt.Errorf("log store: %w", err))
	}
}

// committed is called by Raft's FSM goroutine, with the last entry of a batch, before the batch goes to the machine.
// Raft gives us no earlier sight of a commit. Only an entry of the term that this node leads may be announced: it
// alone can be the previous entry of a message of that term which commits it.
func (c *Consensus) committed(term uint64, index txn.LogIndex) {
	self := c.transport.self.Load()
	if self != nil && self.State() == raft.Leader && self.CurrentTerm() == term {
		c.notices.publish(term, index)
	}
}

// refuseSnapshot keeps a leader from installing a snapshot over a log. Raft would panic or try for ever if that log
// has diverged (hashicorp/raft issue 697), and the machine cannot jump.
func (c *Consensus) refuseSnapshot(at uint64) error {
	last, err := c.stores.log.LastIndex()
	if err != nil {
		return fmt.Errorf("read last index: %w", err)
	}
	if last == 0 && c.feed.pristine() {
		return nil
	}
	err = fmt.Errorf("refuse snapshot at %d: %w: last entry here is %d; clone this node under a new identity", at, ErrBehind, last)
	c.fail(err)
	return err
}

// runVerification has the members compare their logs every VerifyInterval while this node leads and the log grows: a
// barrier is an entry which the verifier takes for a checkpoint.
func (c *Consensus) runVerification() {
	ticker := time.NewTicker(c.config.VerifyInterval)
	defer ticker.Stop()
	var verified uint64
	for {
		select {
		case <-ticker.C:
		case <-c.closing.Done():
			return
		}
		if c.raft.State() != raft.Leader || c.raft.LastIndex() == verified {
			continue
		}
		if err := c.raft.Barrier(0).Error(); err != nil {
			c.logger.Info("log verification not started", logkey.Error, err)
			continue
		}
		verified = c.raft.LastIndex()
	}
}

// verified hears what came of comparing a range of this node's log with the checksum that the leader made of it.
func (c *Consensus) verified(r verifier.VerificationReport) {
	var end raft.Log
	err := c.stores.log.GetLog(r.Range.End, &end)
	if err == nil && !endsRange(&end, r) {
		return
	}
	if err == nil {
		err = r.Err
	}
	var mismatch verifier.ErrChecksumMismatch
	switch {
	case err == nil:
		c.metrics.verifications.WithLabelValues("equal").Inc()
	case errors.As(err, &mismatch):
		c.metrics.verifications.WithLabelValues("different").Inc()
		c.fail(fmt.Errorf("verify log: %w: %w", txn.ErrDiverged, err))
	case errors.Is(err, verifier.ErrRangeMismatch), c.closing.Err() != nil:
		// The range begins before this node's log, or the log is being closed.
	default:
		c.metrics.verifications.WithLabelValues("error").Inc()
		c.logger.Warn("log verification failed", "range", r.Range.String(), logkey.Error, err)
	}
}

// endsRange reports whether an entry, which is now where the range ends, is the barrier that the range was compared for. It
// may be a no-op, see isCheckpoint. Or the log was truncated meanwhile, and what was read was another leader's: a leader that
// wakes up writes a barrier at once, with the sum of what it has, and learns only then that it leads no more. If the
// barrier is still there, so is all before it.
func endsRange(end *raft.Log, r verifier.VerificationReport) bool {
	if end.Type != raft.LogBarrier || len(end.Extensions) != 24 {
		return false
	}
	word := func(i int) uint64 { return binary.LittleEndian.Uint64(end.Extensions[8*i:]) }
	return word(0) == verifier.ExtensionMagicPrefix && word(1) == r.Range.Start && word(2) == r.ExpectedSum
}

// fail records why this node cannot go on. It keeps voting and storing, which is safe, until its owner closes it, but
// proposes and applies nothing more.
func (c *Consensus) fail(err error) {
	c.failMu.Lock()
	defer c.failMu.Unlock()
	if c.failErr != nil {
		return
	}
	c.failErr = err
	close(c.failed)
	c.feed.halt()
	c.logger.Error("consensus failed", logkey.Error, err)
}

// Failed returns a channel that is closed when this node must stop; Err then says why.
func (c *Consensus) Failed() <-chan struct{} { return c.failed }

// Err returns why this node must stop, nil if it need not. It wraps ErrBehind, ErrTransferStuck, txn.ErrDiverged or
// an error of the log store.
func (c *Consensus) Err() error {
	c.failMu.Lock()
	defer c.failMu.Unlock()
	return c.failErr
}

// Propose has data ordered, and returns its index once a majority holds it on disk; every Machine gets it, this
// node's not necessarily before Propose returns. It works on any node: a follower forwards to the leader. Any number
// of calls may run at once. data must not be changed afterwards, whatever the result.
//
// The error wraps txn.ErrNoQuorum if data is certainly not in the log and never will be, and txn.ErrOutcomeUnknown if
// it may be, now or later. Propose does not wait for a leader: see WaitLeader. It waits for an answer until ctx ends,
// and also while too many bytes are in flight.
func (c *Consensus) Propose(ctx context.Context, data []byte) (txn.LogIndex, error) {
	if len(data) == 0 || len(data) > MaxData {
		return 0, fmt.Errorf("propose %d bytes: %w", len(data), ErrSize)
	}
	began := time.Now()
	index, err := c.propose(ctx, data)
	if err != nil {
		c.metrics.proposalFailed(err)
		return 0, fmt.Errorf("propose entry: %w", err)
	}
	c.contact.heard(began, index)
	c.metrics.proposeSeconds.Observe(time.Since(began).Seconds())
	return index, nil
}

func (c *Consensus) propose(ctx context.Context, data []byte) (txn.LogIndex, error) {
	if err := c.Err(); err != nil {
		return 0, fmt.Errorf("%w: node has failed: %w", txn.ErrNoQuorum, err)
	}
	weight := int64(len(data) + requestWeight)
	if err := c.budget.Acquire(ctx, weight); err != nil {
		return 0, fmt.Errorf("%w: not sent: %w", txn.ErrNoQuorum, err)
	}
	defer c.budget.Release(weight)
	return c.queue.do(ctx, newRequest(data))
}

// requestWeight is what a proposal costs in memory beside its data.
const requestWeight = 512

// Entry returns what was proposed at index, which this node's log must hold: an index that Machine.Apply has been
// given and no snapshot has covered yet. What it returns must not be changed.
func (c *Consensus) Entry(index txn.LogIndex) ([]byte, error) { return c.stores.readEntry(index) }

// Replace has another machine take the place of the one that entries are given to now. It is fed as after a restart:
// restored from the newest snapshot, if there is one, then given every entry behind that. Meanwhile Raft goes on. The
// old machine must let go of a call that it is in, and so must a snapshot of it that is being written; after Replace
// neither is used any more. After an error the old one stays.
func (c *Consensus) Replace(ctx context.Context, m Machine) error {
	r := &replacement{machine: m, answer: make(chan error, 1)}
	select {
	case c.feed.replacements <- r:
		return <-r.answer
	case <-ctx.Done():
		return fmt.Errorf("replace machine: %w", context.Cause(ctx))
	case <-c.feed.stop:
		return fmt.Errorf("replace machine: %w", txn.ErrClosed)
	}
}

// TakeSnapshot takes a snapshot now, and truncates the log as far as that and Config.TrailingLogs allow. With nothing
// new since the last one it does nothing.
func (c *Consensus) TakeSnapshot() error {
	if err := c.raft.Snapshot().Error(); err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) {
		return fmt.Errorf("take snapshot: %w", err)
	}
	return nil
}

// Status returns what this node believes.
func (c *Consensus) Status() Status {
	_, leader := c.raft.LeaderWithID()
	s := Status{
		Node:          c.config.Node,
		State:         stateOf(c.raft.State()),
		Leader:        nodeID(leader),
		Term:          c.raft.CurrentTerm(),
		LastIndex:     txn.LogIndex(c.raft.LastIndex()),
		CommitIndex:   txn.LogIndex(c.raft.CommitIndex()),
		AppliedIndex:  txn.LogIndex(c.feed.applied.Load()),
		Members:       c.Members(),
		QuorumContact: c.QuorumContact(),
	}
	if s.State != Leader {
		s.LastContact = c.raft.LastContact()
	}
	return s
}

func stateOf(s raft.RaftState) State {
	switch s {
	case raft.Follower:
		return Follower
	case raft.Candidate:
		return Candidate
	case raft.Leader:
		return Leader
	}
	return Stopped
}

// Close ends this node's part; a leader hands over first. It waits for every goroutine, also for calls of the machine
// and of WriteTo that are running, so the machine must let those go. Proposals without an answer end with
// txn.ErrOutcomeUnknown. Closing twice, or nil, does nothing more. A disk or other members that hang delay it by a bounded
// time only; what could not be ended then is an error.
func (c *Consensus) Close() error {
	if c == nil {
		return nil
	}
	c.closeOnce.Do(func() { c.closeErr = c.shut() })
	return c.closeErr
}

func (c *Consensus) shut() error {
	var first error
	keep := func(err error) {
		if err != nil && first == nil {
			first = fmt.Errorf("close consensus: %w", err)
		}
	}
	c.close()
	c.metrics.unregister()

	// Raft forgets futures that are queued when it stops. While it runs it resolves every one, in time: it commits
	// them, refuses them or loses its leadership. So all that waits for one ends before Raft does. Only a leader whose
	// followers beat, but cannot store, would keep both leadership and futures. It is made to lose the lease.
	if c.transport != nil {
		defer time.AfterFunc(c.QuorumTimeout(), c.transport.stream.hangUp).Stop()
	}
	c.drivers.Wait()
	c.queue.admit(fmt.Errorf("%w: %w", txn.ErrNoQuorum, txn.ErrClosed))
	c.calls.close()
	if c.local != nil {
		close(c.local.pending)
	}
	c.futures.Wait()
	for _, to := range c.conns {
		keep(to.Close())
	}
	c.feed.halt() // Raft's FSM goroutine may wait for a snapshot of the machine
	if c.raft != nil {
		c.handOver()
		stopped := c.raft.Shutdown()
		keep(c.transport.Close()) // or Raft would wait for answers of members that hang
		if err := within(3*c.config.WriteDeadline, stopped.Error); err != nil {
			keep(fmt.Errorf("stop Raft: %w", err))
			return first // its stores are in use
		}
	} else if c.transport != nil {
		keep(c.transport.Close())
	}
	close(c.stopped)
	c.watcher.Wait() // not before Raft has stopped: it blocks until its observations are read
	c.applier.Wait()
	if c.stores != nil {
		keep(c.stores.close())
	}
	return first
}

// within waits for something that cannot be called off, not longer than limit.
func within(limit time.Duration, wait func() error) error {
	done := make(chan error, 1)
	go func() { done <- wait() }()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		return fmt.Errorf("it still hangs after %v", limit)
	}
}

// handOver lets another member lead at once, rather than after the others have missed this one for a while. Nobody
// proposes here any more, so that issue 696 of hashicorp/raft, a transfer that never ends, does no harm.
func (c *Consensus) handOver() {
	others := slices.DeleteFunc(voters(c.servers()), func(id raft.ServerID) bool { return id == serverID(c.config.Node) })
	if c.raft.State() != raft.Leader || len(others) == 0 {
		return
	}
	if err := c.raft.LeadershipTransfer().Error(); err != nil {
		c.logger.Info("leadership not handed over", logkey.Error, err)
	}
}

// gate lets calls in until it is closed.
type gate struct {
	mu     sync.Mutex
	closed bool
	inside sync.WaitGroup
}

// enter reports whether the caller may go on; if so it must call leave.
func (g *gate) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.inside.Add(1)
	return true
}

func (g *gate) leave() { g.inside.Done() }

// close lets nobody in any more, and waits until all have left.
func (g *gate) close() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.inside.Wait()
}
