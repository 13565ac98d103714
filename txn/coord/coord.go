// Package coord decides the origin's own transactions: it gives each COMMIT that a gateway session holds back a GID,
// pairs it with the write set that capture decoded, proposes the write set in batches, and tells the session, step by
// step, what the log says. It keeps no data: whatever it forgets in a crash, the log decides.
package coord

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/quorate/quorate/internal/invariant"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// Order is the log, as far as a coordinator needs it.
type Order interface {
	// Admit is flow control: it returns when the log may take more, at once unless a PostgreSQL lags far behind it. An error
	// is ctx's.
	Admit(ctx context.Context) error
	// Propose returns nil when data is in the log. An error wraps txn.ErrNoQuorum if data certainly is not and never
	// will be, txn.ErrOutcomeUnknown if it may be.
	Propose(ctx context.Context, data []byte) (txn.LogIndex, error)
	// AwaitLeader returns when some node leads, or ctx ends.
	AwaitLeader(ctx context.Context) error
	// AwaitDecided returns when Decided has been given what the log says before index. An error is ctx's.
	AwaitDecided(ctx context.Context, index txn.LogIndex) error
}

// Visibility is what the local PostgreSQL shows of the order.
type Visibility interface {
	// Applied: everything up to it is visible.
	Applied() txn.CSN
	// Seen is Applied after a commit that was in flight when the call began is booked.
	Seen(ctx context.Context) (txn.CSN, error)
}

// Config configures a Coordinator. Every field is required unless it says otherwise.
type Config struct {
	Node        txn.NodeID
	Incarnation uint64 // random, new at each start
	Database    string
	Order       Order
	Visibility  Visibility
	// CommitTimeout bounds how long a commit may wait for the log's verdict, from when its write set is complete; of a
	// large write set, for each part. Then it is undone where it certainly was not ordered, and reported as unknown where
	// it may have been: the log is made to decide it as soon as it can be. Default 10 s.
	CommitTimeout time.Duration
	// Trace, if set, takes the parts of a transaction's life as they end: "capture", "queue", "order", "publish", and last
	// the whole, "commit", with its outcome. It is called with locks held, and must not block or call the Coordinator.
	Trace      func(Span)
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Bounds of one batch. A larger write set than batchBytes travels alone.
const (
	batchBytes = 1 << 20
	batchCount = 256
)

// maxUnfinished is how many of this node's transactions may have been decided, but not yet been let through, when the
// next batch is proposed. Transactions become visible one after another, so while more than that wait for their turn,
// another decision gains nothing, and every entry costs all nodes the same whether it holds one transaction or ten.
// Batches thus grow under load, and a lone client never waits. It is as many as become visible during a proposal.
const maxUnfinished = 4

// Coordinator is safe for concurrent use. Run must be running for commits to make progress.
type Coordinator struct {
	cfg        Config
	metrics    metrics
	life       context.Context // ends when closed
	end        context.CancelFunc
	background errgroup.Group // a goroutine per large write set that is sent in parts, and per batch in doubt

	mu       sync.Mutex
	closed   bool
	detached bool
	sequence uint64
	open     map[txn.GID]*Transaction // registered and not finished
	queue    []*Transaction           // complete write sets that wait for a proposal; bounded by the open sessions
	blame    txn.AbortReason          // why what is queued waits at present
	waiting  int                      // how many are decided and not finished
	gathers  uint64                   // batches that were gathered
	coming   int                      // how many the batch that is being gathered still waits for
	due      *sync.Cond               // on mu: a batch may be due, or the coordinator was closed
}

// New returns a coordinator. It starts nothing.
func New(cfg Config) *Coordinator {
	if cfg.CommitTimeout <= 0 {
		cfg.CommitTimeout = 10 * time.Second
	}
	c := &Coordinator{cfg: cfg, open: make(map[txn.GID]*Transaction), blame: txn.AbortNoQuorum, metrics: newMetrics(cfg.Registerer)}
	c.due = sync.NewCond(&c.mu)
	c.life, c.end = context.WithCancel(context.Background())
	return c
}

// Run proposes until ctx ends, then fails what is still waiting and returns nil.
func (c *Coordinator) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, c.shut)
	defer stop()
	for batch := c.take(); batch != nil; batch = c.take() {
		c.propose(batch)
	}
	return c.background.Wait()
}

func (c *Coordinator) shut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.end()
	c.queue = nil
	for _, t := range c.open {
		if t.state == proposed {
			t.send(txn.Event{Step: txn.StepUnknown})
		} else if t.state < proposed {
			t.send(txn.Event{Step: txn.StepAbort, Reason: txn.AbortNoQuorum})
		}
	}
	c.due.Signal()
}

// Detach says that the local server is gone: what is still released is not let through, and no marker comes. From here on the
// log's word is the last: sessions whose transactions it lets commit, now or later, are told StepVisible at once. Those
// whose write set has not come are undone. No commit begins.
func (c *Coordinator) Detach() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.detached = true
	for _, t := range c.open {
		switch t.state {
		case registered:
			c.arrived(t)
			t.abort(txn.AbortCapture)
		case decided, released:
			c.finish(t)
			t.send(txn.Event{Step: txn.StepVisible, CSN: t.csn})
		}
	}
}

// Applied is the CSN up to which everything is visible here: a transaction's base.
func (c *Coordinator) Applied() txn.CSN { return c.cfg.Visibility.Applied() }

// Reserve returns a GID for somebody who has to know it before COMMIT. It need not be used.
func (c *Coordinator) Reserve() txn.GID {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.nextLocked()
}

// GaveOut reports whether somebody may know gid, one of this Coordinator's incarnation, from it.
func (c *Coordinator) GaveOut(gid txn.GID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return gid.Sequence <= c.sequence
}

func (c *Coordinator) nextLocked() txn.GID {
	c.sequence++
	return txn.GID{Node: c.cfg.Node, Incarnation: c.cfg.Incarnation, Sequence: c.sequence}
}

// Begin registers a COMMIT that server backend pid is about to ask for, and reads seen. The caller must Close the
// transaction.
func (c *Coordinator) Begin(ctx context.Context, base txn.CSN, pid uint32) (*Transaction, error) {
	return c.BeginAs(ctx, txn.GID{}, base, pid)
}

// BeginAs is Begin under a GID that Reserve returned; with the zero GID it is given a new one. A GID is good for one
// attempt.
func (c *Coordinator) BeginAs(ctx context.Context, gid txn.GID, base txn.CSN, pid uint32) (*Transaction, error) {
	seen, err := c.cfg.Visibility.Seen(ctx)
	if err != nil {
		return nil, fmt.Errorf("read seen: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.detached {
		return nil, fmt.Errorf("begin commit: %w", txn.ErrClosed)
	}
	if gid.IsZero() {
		gid = c.nextLocked()
	}
	invariant.Check(gid.Incarnation == c.cfg.Incarnation && c.open[gid] == nil, "begin commit of %s, which is in use or of another life", gid)
	t := &Transaction{
		c:      c,
		gid:    gid,
		nonce:  newNonce(),
		base:   min(base, seen),
		seen:   seen,
		pid:    pid,
		begun:  time.Now(),
		events: make(chan txn.Event, maxEvents),
	}
	c.open[t.gid] = t
	return t, nil
}

func newNonce() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // it never fails
	return binary.NativeEndian.Uint64(b[:])
}

// Expecting reports whether a session waits for a marker under this seal.
func (c *Coordinator) Expecting(seal txn.Seal) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.open[seal.GID]
	return t != nil && t.state == registered && !t.lost && t.nonce == seal.Nonce
}

// Marked takes the write set that belongs to a marker; capture calls it in WAL order. set is nil when the server
// still holds changes back.
func (c *Coordinator) Marked(gid txn.GID, set *txn.WriteSet, parts txn.Parts, err error) {
	c.mu.Lock()
	t := c.open[gid]
	if t == nil || t.state != registered || t.lost || c.closed {
		c.mu.Unlock()
		discard(parts)
		return
	}
	defer c.mu.Unlock()
	defer c.arrived(t)
	switch {
	case err != nil:
		c.cfg.Logger.Error("capture a write set", logkey.GID, gid, logkey.Error, err)
		t.abort(txn.AbortCapture)
	case set == nil:
		c.metrics.nudges.Inc()
		t.send(txn.Event{Step: txn.StepNudge})
	case set.Empty():
		discard(parts)
		t.state = finished
		delete(c.open, gid)
		t.send(txn.Event{Step: txn.StepLocal})
	default:
		set.GID, set.Database, set.Base, set.Seen = gid, c.cfg.Database, t.base, t.seen
		t.set = set
		t.marked = time.Now()
		c.metrics.capture.Observe(t.marked.Sub(t.begun).Seconds())
		t.trace("capture")
		if parts == nil {
			c.enqueue(t)
			return
		}
		t.state = sending
		c.background.Go(func() error { c.sendParts(t, parts); return nil })
	}
}

func discard(parts txn.Parts) {
	if parts != nil {
		_ = parts.Close() // a spill file that nobody reads any more; capture removes what is left at its start
	}
}

// enqueue is called with mu held.
func (c *Coordinator) enqueue(t *Transaction) {
	t.state = queued
	t.deadline = time.Now().Add(c.cfg.CommitTimeout)
	t.timer = time.AfterFunc(c.cfg.CommitTimeout, t.expire)
	c.queue = append(c.queue, t)
	if c.coming == 0 {
		c.due.Signal()
	}
}

func (c *Coordinator) enqueueUnlessLost(t *Transaction) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t.lost || c.closed {
		return false
	}
	c.enqueue(t)
	return true
}

// take waits for work and returns the next batch, nil when closed. What stays in the queue for too long is given up, for
// the reason that it waited for at that time.
func (c *Coordinator) take() []*Transaction {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		c.dropLate() // the last proposal may have taken long
		c.blame = txn.AbortBehind
		for (len(c.queue) == 0 || c.waiting > maxUnfinished) && !c.closed {
			c.due.Wait()
		}
		c.mu.Unlock()
		_ = c.cfg.Order.Admit(c.life) // it fails when closed, which is asked below
		c.mu.Lock()
		c.gather()
		c.dropLate()
		if c.closed {
			return nil
		}
		if len(c.queue) > 0 {
			break
		}
	}
	c.blame = txn.AbortNoQuorum
	n, size := 0, 0
	for n < len(c.queue) && n < batchCount && (n == 0 || size+len(c.queue[n].set.Changes) <= batchBytes) {
		size += len(c.queue[n].set.Changes)
		n++
	}
	batch := slices.Clone(c.queue[:n])
	for _, t := range batch {
		t.state = proposed
		t.trace("queue")
	}
	c.queue = c.queue[:copy(c.queue, c.queue[n:])]
	return batch
}

// dropLate gives up what has waited nearly as long as it may: an attempt with so little time left would most likely end
// as unknown, for it and for all that are in the batch with it. Called with mu held.
func (c *Coordinator) dropLate() {
	soon := time.Now().Add(c.cfg.CommitTimeout / 10)
	for len(c.queue) > 0 && c.queue[0].deadline.Before(soon) {
		c.unqueue(c.queue[0]).abort(c.blame)
	}
}

// unqueue is called with mu held.
func (c *Coordinator) unqueue(t *Transaction) *Transaction {
	c.queue = slices.DeleteFunc(c.queue, func(q *Transaction) bool { return q == t })
	return t
}

// gatherTimeout bounds gather: the server may check deferred constraints for long before it writes a marker.
const gatherTimeout = 2 * time.Millisecond

// gather waits, before a batch is proposed, for the transactions that are on their way to it: their markers are being
// written, most often by the same flush. Who they are is settled once, so that commits that begin later hold up nobody;
// and where there are none, as with a lone client, there is no wait. Called with mu held.
func (c *Coordinator) gather() {
	c.gathers++
	for _, t := range c.open {
		if t.state == registered && !t.lost {
			t.awaitedBy = c.gathers
			c.coming++
		}
	}
	if c.coming == 0 {
		return
	}
	batch := c.gathers
	timeout := time.AfterFunc(gatherTimeout, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.gathers == batch {
			c.coming = 0
			c.due.Signal()
		}
	})
	for c.coming > 0 && !c.closed {
		c.due.Wait()
	}
	timeout.Stop()
	c.gathers, c.coming = c.gathers+1, 0
}

// arrived says that a batch need not wait for t any more, whether it has come or not. Called with mu held.
func (c *Coordinator) arrived(t *Transaction) {
	if c.coming > 0 && t.awaitedBy == c.gathers {
		t.awaitedBy = 0
		if c.coming--; c.coming == 0 {
			c.due.Signal()
		}
	}
}

// propose gets a batch into the log or finds out that it is not there. Proposing twice is safe: the certifier knows
// every GID it has decided.
func (c *Coordinator) propose(batch []*Transaction) {
	c.metrics.batch.Observe(float64(len(batch)))
	ctx, cancel := context.WithDeadline(c.life, batch[0].deadline)
	defer cancel()
	_, err := c.persist(ctx, c.encode(batch))
	c.mu.Lock()
	defer c.mu.Unlock()
	var doubtful []*Transaction
	for _, t := range batch {
		switch {
		case t.state != proposed:
			// the log has spoken meanwhile
		case err == nil:
			// The verdict comes with the log, unless this node is cut off from it.
			if t.ordered = true; t.expired {
				t.giveUp(errNoVerdict)
			}
		case errors.Is(err, txn.ErrNoQuorum):
			t.abort(txn.AbortNoQuorum)
		default:
			t.giveUp(err)
			doubtful = append(doubtful, t)
		}
	}
	if len(doubtful) > 0 {
		c.background.Go(func() error { c.settle(doubtful); return nil })
	}
}

// encode returns a batch's log entry. The write sets are not needed any more after it.
func (c *Coordinator) encode(batch []*Transaction) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	sets := make([]*txn.WriteSet, len(batch))
	for i, t := range batch {
		sets[i], t.set = t.set, nil
	}
	return codec.AppendTransactions(nil, sets)
}

var errNoVerdict = errors.New("it is in the log, but the log does not come")

// persist proposes data until it is in the log or ctx has ended. The error wraps ErrNoQuorum only if no attempt can have
// reached the log.
func (c *Coordinator) persist(ctx context.Context, data []byte) (txn.LogIndex, error) {
	maybe := false
	for {
		index, err := c.cfg.Order.Propose(ctx, data)
		if err == nil {
			return index, nil
		}
		maybe = maybe || !errors.Is(err, txn.ErrNoQuorum)
		if waitErr := c.cfg.Order.AwaitLeader(ctx); waitErr != nil {
			if maybe {
				return 0, fmt.Errorf("order: %w: %w", txn.ErrOutcomeUnknown, context.Cause(ctx))
			}
			return 0, fmt.Errorf("order: %w", err)
		}
	}
}

// settle has the log decide transactions that are in it or not: nobody knows, and they would be open for ever if they are
// not. What the log has not let commit before an Abort entry it never will.
func (c *Coordinator) settle(doubtful []*Transaction) {
	for len(doubtful) > 0 && c.life.Err() == nil {
		t := doubtful[0]
		if c.isProposed(t) {
			ctx, cancel := context.WithTimeout(c.life, c.cfg.CommitTimeout)
			index, err := c.persist(ctx, abortEntry(t.gid))
			cancel()
			if err != nil {
				continue // there is no leader yet
			}
			if err := c.cfg.Order.AwaitDecided(c.life, index); err != nil {
				return // closed
			}
			c.abortUndecided(t)
		}
		doubtful = doubtful[1:]
	}
}

func (c *Coordinator) isProposed(t *Transaction) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return t.state == proposed
}

func (c *Coordinator) abortUndecided(t *Transaction) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t.state == proposed {
		t.abort(txn.AbortRequested)
	}
}

// sendParts puts the earlier parts of a large write set into the log, then queues its last.
func (c *Coordinator) sendParts(t *Transaction, parts txn.Parts) {
	err := func() error {
		for part := uint32(0); ; part++ {
			data, err := parts.Next()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("read spilled changes: %w", err)
			}
			if err := c.sendPart(codec.Chunk{GID: t.gid, Part: part, Data: data}); err != nil {
				return err
			}
			c.mu.Lock()
			gone := t.lost || c.closed
			c.mu.Unlock()
			if gone {
				return txn.ErrClosed
			}
		}
	}()
	if closeErr := parts.Close(); closeErr != nil {
		c.cfg.Logger.Warn("remove spilled changes", logkey.GID, t.gid, logkey.Error, closeErr)
	}
	if err == nil && c.enqueueUnlessLost(t) {
		return
	}
	if err != nil && !errors.Is(err, txn.ErrClosed) {
		c.cfg.Logger.Warn("send a large write set", logkey.GID, t.gid, logkey.Error, err)
	}
	reason := txn.AbortNoQuorum
	if errors.Is(err, errNotAdmitted) {
		reason = txn.AbortBehind
	}
	// The final entry was never proposed, so the transaction is not in the log: let every node drop its chunks. If this does
	// not get into the log either, they expire there. The client need not wait for that.
	c.mu.Lock()
	t.abort(reason)
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), c.cfg.CommitTimeout)
	defer cancel()
	if _, err := c.persist(ctx, abortEntry(t.gid)); err != nil {
		c.cfg.Logger.Warn("abort a large write set", logkey.GID, t.gid, logkey.Error, err)
	}
}

func abortEntry(gid txn.GID) []byte {
	return codec.AppendAbort(nil, codec.Abort{GID: gid, Reason: txn.AbortRequested})
}

var errNotAdmitted = errors.New("the log takes no more yet")

func (c *Coordinator) sendPart(chunk codec.Chunk) error {
	ctx, cancel := context.WithTimeout(context.Background(), c.cfg.CommitTimeout)
	defer cancel()
	if err := c.cfg.Order.Admit(ctx); err != nil {
		return fmt.Errorf("%w: %w", errNotAdmitted, err)
	}
	_, err := c.persist(ctx, codec.AppendChunk(nil, &chunk))
	return err
}

// finish ends a transaction that was decided. Called with mu held.
func (c *Coordinator) finish(t *Transaction) {
	t.state = finished
	t.trace("publish")
	t.traceEnd("committed")
	delete(c.open, t.gid)
	c.waiting--
	c.due.Signal()
}

// Decided takes the certifier's verdict on one of this node's transactions, in log order. For a commit it returns
// the open transaction, nil if no session holds it any more, so that the log alone must be applied.
func (c *Coordinator) Decided(gid txn.GID, v txn.Verdict) *Transaction {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.open[gid]
	if t == nil || v.Reason == txn.AbortDuplicate { // our own second proposal: the first decision stands
		return nil
	}
	invariant.Check(t.state == proposed, "transaction %s is decided in state %d, before it was proposed", gid, t.state)
	if !t.marked.IsZero() {
		c.metrics.order.Observe(time.Since(t.marked).Seconds())
	}
	c.metrics.decided.WithLabelValues(v.Reason.String()).Inc()
	t.timer.Stop()
	if v.Commits() {
		t.state, t.csn = decided, v.CSN
		t.trace("order")
		c.waiting++
		if c.detached {
			c.finish(t)
			t.send(txn.Event{Step: txn.StepVisible, CSN: t.csn})
			return nil
		}
		return t
	}
	t.state = finished
	t.trace("order")
	t.traceEnd(v.Reason.String())
	delete(c.open, gid)
	t.send(txn.Event{Step: txn.StepAbort, Reason: v.Reason, With: v.With})
	return nil
}
