package apply

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/quorate/quorate/internal/invariant"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
)

// state is what an entry of the queue is doing. Changed only under Pipeline.mu.
type state uint8

const (
	stateWaiting    state = iota // no worker has it yet; a local one: not its turn yet
	stateRunning                 // a worker executes it
	stateReady                   // executed and held: its worker reads, waiting for a COMMIT that somebody else writes
	stateCommitting              // COMMIT was, or is just being, written; perhaps together with the last changes
	stateEvicted                 // held, but it blocked an earlier one: ROLLBACK was written instead
)

// entry is what becomes visible at once: one transaction, or a group of remote ones merged into one.
type entry struct {
	items   []Item
	first   txn.CSN
	last    txn.CSN
	index   txn.LogIndex // the last item's
	done    txn.LogIndex // every transaction of the log up to this index is in or before this entry
	after   txn.CSN      // its conflicts: it starts when everything up to this CSN is visible
	bytes   int
	rows    uint64
	local   Local
	barrier bool
	state   state
	yield   txn.CSN // evicted for this one: execute again when it is visible
	worker  *worker // once running
	since   time.Time
	// Of a released local one.
	released time.Time
	ended    bool // somebody sees to its end: its session's later word counts no more
}

// alone reports whether e is never merged with others.
func (e *entry) alone() bool { return e.local != nil || e.barrier || len(e.items[0].Chunks) > 0 }

// lookahead bounds how far past entries that wait for others a worker looks for one that can start.
const lookahead = 64

// Pipeline executes transactions and makes them visible in order. All methods are safe for concurrent use.
//
// There is no publisher thread. Whoever completes an entry, a worker or the session of a local one, sends the next one on
// its way: it writes the COMMIT on the connection of the worker that holds it, which is reading already, or releases a
// local one. So the chain of commits, the only sequential part, costs one write and one wake-up for each.
type Pipeline struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics

	applied      atomic.Uint64 // CSN
	appliedIndex atomic.Uint64
	durable      atomic.Uint64 // CSN
	inFlight     atomic.Uint64 // last CSN of the entry whose COMMIT is on its way; 0: none
	truncated    atomic.Uint64 // the era in which the other one's progress table was truncated
	generation   atomic.Uint64 // raised when DDL became visible: statements and relations are looked up anew

	mu        sync.Mutex
	queue     deque[*entry] // in CSN order; the first is the next to become visible
	unstarted deque[*entry] // those of queue that no worker has yet; no local ones
	idle      []*worker     // the last one is taken first: its caches are warm
	keys      map[txn.Key]keyUses
	enqueued  txn.CSN // the highest that was queued
	barrier   txn.CSN // the latest barrier
	items     int
	bytes     int
	space     chan struct{} // closed when something was taken out of a full queue; nil if nobody waits
	// suspended: the server may have restarted. Nothing is committed until that is known.
	suspended bool
	// holding: nothing after held becomes visible, until Hold's release.
	holding bool
	held    txn.CSN
	life    string // of the server; set once
	failure error

	flushing chan struct{} // full while a flush is under way

	waiters waiters
	lost    chan *entry // the released local transaction that has not committed, as far as its session knows
	overdue *time.Timer // for the released local transaction to end
	workers []*worker   // the first is the one that re-applies lost local transactions
	busy    chan struct{}
	asleep  atomic.Bool // the monitor waits for busy
	stopped chan struct{}
}

// New returns a Pipeline that starts with Run.
func New(c Config) *Pipeline {
	c = c.withDefaults()
	p := &Pipeline{
		cfg: c, log: c.Logger.With(logkey.Component, "apply", logkey.Database, c.Database),
		keys: map[txn.Key]keyUses{}, enqueued: c.Start,
		suspended: true,
		life:      c.Life,
		lost:      make(chan *entry, 1), // only the head is released
		overdue:   time.NewTimer(c.LocalTimeout),
		busy:      make(chan struct{}, 1),
		flushing:  make(chan struct{}, 1),
		stopped:   make(chan struct{}),
	}
	p.applied.Store(uint64(c.Start))
	p.durable.Store(uint64(c.Start))
	p.metrics = newMetrics(c.Registerer, p)
	for n := range c.Workers + 1 {
		p.workers = append(p.workers, newWorker(p, n))
	}
	return p
}

// Run applies until ctx ends, which returns nil, or until an entry cannot be applied exactly, which is never skipped:
// the error then wraps txn.ErrDiverged, ErrServerLost or what kept PostgreSQL or the log from working. Local
// transactions that were not released stay open. Run once.
func (p *Pipeline) Run(ctx context.Context) error {
	group, inner := errgroup.WithContext(ctx)
	for _, w := range p.workers[1:] {
		group.Go(func() error { return w.loop(inner) })
	}
	group.Go(func() error { return p.finishLocals(inner) })
	group.Go(func() error { return p.watchServer(inner) })
	group.Go(func() error { return p.keepDurable(inner) })
	group.Go(func() error { return p.breakBlockades(inner) })
	err := group.Wait()
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		err = nil
	}
	p.mu.Lock()
	p.failure = txn.ErrClosed
	if err != nil {
		p.failure = err
	}
	p.mu.Unlock()
	close(p.stopped)
	return err
}

// Enqueue adds the next transactions, all of one log entry; they come in CSN order without gaps, from one goroutine at
// a time. It waits while the queue is full. Items up to Config.Start are booked and ignored. The error is ctx's or,
// wrapped, why the Pipeline stopped.
func (p *Pipeline) Enqueue(ctx context.Context, items ...Item) error {
	p.mu.Lock()
	for _, item := range items {
		if item.CSN <= p.cfg.Start {
			continue
		}
		size := len(item.Set.Changes) + len(item.Set.Keys)*24 + 256
		if err := p.awaitSpace(ctx, size); err != nil {
			p.mu.Unlock()
			return err
		}
		invariant.Check(item.CSN == p.enqueued+1, "apply: transaction %d queued after %d", item.CSN, p.enqueued)
		p.enqueued = item.CSN
		p.items++
		p.bytes += size
		p.add(item, size)
	}
	release := p.advance()
	p.schedule()
	p.mu.Unlock()
	release.do(p)
	return nil
}

// awaitSpace waits until an item of this size fits. Requires mu, which it gives up meanwhile; what is queued is sent
// on its way first, since only that makes space.
func (p *Pipeline) awaitSpace(ctx context.Context, size int) error {
	for p.failure == nil && p.items > 0 && (p.items >= p.cfg.MaxItems || p.bytes+size > p.cfg.MaxBytes) {
		if p.space == nil {
			p.space = make(chan struct{})
		}
		space, release := p.space, p.advance()
		p.schedule()
		p.mu.Unlock()
		release.do(p)
		var err error
		select {
		case <-space:
		case <-ctx.Done():
			err = ctx.Err()
		case <-p.stopped:
			err = p.stopError()
		}
		p.mu.Lock()
		if err != nil {
			return err
		}
	}
	if p.failure != nil {
		return fmt.Errorf("apply: %w", p.failure)
	}
	return nil
}

// add puts an item into the queue: into the last entry if that is better than one of its own.
func (p *Pipeline) add(item Item, size int) {
	single := entry{items: []Item{item}, local: item.Local, barrier: item.Set.Barrier}
	tail, _ := p.queue.last()
	mergeable := tail != nil && tail.state == stateWaiting && !(p.holding && tail.first <= p.held) && !tail.alone() && !single.alone() &&
		len(tail.items) < p.cfg.GroupItems && tail.rows+item.Set.Rows <= uint64(p.cfg.GroupRows) && tail.bytes+size <= p.cfg.GroupBytes
	var from txn.CSN // conflicts from here on are with the tail itself
	if mergeable {
		from = tail.first
	}
	conflict, before := p.conflicts(item.Set.Keys, from)
	conflict, before = max(conflict, p.barrier), max(before, p.barrier)
	if mergeable {
		// A conflict with the tail would make the item wait for it anyway. Otherwise merging pays when no worker
		// would start it now, or when it came together with the tail; but not at the price of making the tail wait for what only the item conflicts with.
		spare := p.worthAnother() && (len(p.idle) > 1 || len(p.idle) == 1 && p.unstarted.len() == 0)
		mergeable = conflict >= tail.first || (!spare || tail.index == item.Index) && before <= tail.after
	}
	p.note(item.Set.Keys, item.CSN)
	if mergeable {
		tail.items = append(tail.items, item)
		tail.last, tail.index = item.CSN, item.Index
		tail.after = max(tail.after, before)
		tail.bytes += size
		tail.rows += item.Set.Rows
		return
	}
	e := &single
	e.first, e.last, e.index = item.CSN, item.CSN, item.Index
	e.after, e.bytes, e.rows = conflict, size, item.Set.Rows
	e.since = time.Now()
	if e.barrier {
		e.after = item.CSN - 1
		p.barrier = item.CSN
	}
	p.queue.push(e)
	if e.local == nil {
		p.unstarted.push(e)
	}
}

// Hold keeps what is enqueued from now on from becoming visible until release is called, so that there is a moment at
// which exactly the transactions up to csn are visible: after WaitFor(csn) and before release. That moment should be
// short. It is called where Enqueue is, and fails while another one lasts.
func (p *Pipeline) Hold() (csn txn.CSN, release func(), err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.holding {
		return 0, nil, errors.New("another snapshot is being taken")
	}
	p.holding, p.held = true, p.enqueued
	return p.held, p.unhold, nil
}

func (p *Pipeline) unhold() {
	p.mu.Lock()
	p.holding = false
	next := p.advance()
	p.mu.Unlock()
	next.do(p)
}

// Skip tells that every committing transaction of the log up to this index was enqueued; for an entry that holds
// several, only after the last of them. AppliedIndex follows in order. Without it AppliedIndex stays one below the
// latest index, since more transactions of that entry may follow.
func (p *Pipeline) Skip(index txn.LogIndex) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if tail, ok := p.queue.last(); ok {
		tail.done = max(tail.done, index)
		return
	}
	if uint64(index) > p.appliedIndex.Load() {
		p.appliedIndex.Store(uint64(index))
	}
}

// Applied returns the CSN up to which everything is visible.
func (p *Pipeline) Applied() txn.CSN { return txn.CSN(p.applied.Load()) }

// AppliedIndex returns the log index up to which everything is visible; not that it is durable.
func (p *Pipeline) AppliedIndex() txn.LogIndex { return txn.LogIndex(p.appliedIndex.Load()) }

// Seen returns Applied, after a COMMIT that was in flight when the call began is booked: a statement that waited for
// that transaction may have gone on before Applied says so. It does not wait for long, because what is in flight may be
// waiting for the caller's own transaction: the changes that were sent with the COMMIT, or those of a COMMIT that was lost. At
// worst the caller is then aborted for a conflict that is none.
func (p *Pipeline) Seen(ctx context.Context) (txn.CSN, error) {
	csn := txn.CSN(p.inFlight.Load())
	if csn <= p.Applied() {
		return p.Applied(), nil
	}
	brief, cancel := context.WithTimeout(ctx, seenFor*p.cfg.BlockedAfter)
	defer cancel()
	if err := p.WaitFor(brief, csn); err != nil && brief.Err() == nil {
		return 0, err
	}
	return p.Applied(), ctx.Err()
}

// seenFor is how long Seen waits, in BlockedAfter: much longer than a small transaction takes.
const seenFor = 4

// WaitFor returns when csn is visible. The error is ctx's or, wrapped, why the Pipeline stopped.
func (p *Pipeline) WaitFor(ctx context.Context, csn txn.CSN) error {
	if p.Applied() >= csn {
		return nil
	}
	woken, forget := p.waiters.add(csn)
	defer forget()
	if p.Applied() >= csn { // became visible before the waiter was registered
		return nil
	}
	select {
	case <-woken:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-p.stopped:
		return p.stopError()
	}
}

func (p *Pipeline) stopError() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Errorf("apply: %w", p.failure)
}

// release is a COMMIT to be let through, outside the lock.
type release struct {
	session *session
	local   *entry
}

func (r release) do(p *Pipeline) {
	switch {
	case r.session != nil:
		r.session.writeCommit()
	case r.local != nil:
		p.overdue.Reset(p.cfg.LocalTimeout)
		r.local.local.Release(func(committed bool) { p.localEnded(r.local, committed) })
	}
}

// advance lets the head through if it is ready. Requires mu; the result must be done without it.
func (p *Pipeline) advance() (r release) {
	head, ok := p.queue.first()
	if !ok || !p.open(head) {
		return r
	}
	switch {
	case head.local != nil && head.state == stateWaiting:
		r.local, head.released = head, time.Now()
	case head.state == stateReady: // also a local one, when it is applied from the log
		r.session = head.worker.session
	default:
		return r
	}
	p.letThrough(head)
	return r
}

// claim lets e through if it is its turn, for the worker that executes it and is about to send COMMIT with the rest.
func (p *Pipeline) claim(e *entry) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if head, _ := p.queue.first(); head != e || !p.open(head) {
		return false
	}
	p.letThrough(e)
	return true
}

// open reports whether the head may become visible. Requires mu.
func (p *Pipeline) open(head *entry) bool {
	return !p.suspended && p.failure == nil && !(p.holding && head.last > p.held)
}

// letThrough requires mu.
func (p *Pipeline) letThrough(head *entry) {
	head.state = stateCommitting
	p.inFlight.Store(uint64(head.last))
}

// visible books the head, which has committed, and sends the next one on its way.
func (p *Pipeline) visible(e *entry) {
	if e.barrier {
		p.generation.Add(1)
		if p.cfg.Changed != nil {
			p.cfg.Changed()
		}
	}
	p.mu.Lock()
	head, ok := p.queue.first()
	invariant.Check(ok && head == e && e.state == stateCommitting, "apply: transaction %d became visible out of turn", e.last)
	p.queue.pop()
	p.applied.Store(uint64(e.last))
	if index := uint64(max(e.done, e.index-1)); index > p.appliedIndex.Load() {
		p.appliedIndex.Store(index)
	}
	p.inFlight.Store(0)
	next := p.advance()
	p.mu.Unlock()
	next.do(p) // first of all: the others wait for it
	p.waiters.wake(e.last)

	p.metrics.applied(e)
	if p.cfg.Visible != nil && e.local == nil {
		for i := range e.items {
			p.cfg.Visible(e.items[i].Set.GID, e.items[i].CSN, e.since)
		}
	}
	p.mu.Lock()
	for i := range e.items {
		p.forget(e.items[i].Set.Keys)
	}
	p.items -= len(e.items)
	p.bytes -= e.bytes
	if p.space != nil {
		close(p.space)
		p.space = nil
	}
	p.schedule()
	p.mu.Unlock()
}

// spread is how many transactions must be queued for each worker at work before another one joins. One that is not
// started is merged with those that follow, and a transaction in a group costs a fraction of a lone one; so as long as
// the queue is short, workers are saved, not time. Nobody waits for it: what a client waits for is local.
const spread = 8

// worthAnother reports whether another worker should start something that is not the head. Requires mu.
func (p *Pipeline) worthAnother() bool {
	atWork := p.cfg.Workers - len(p.idle)
	return atWork <= 0 || p.items >= spread*atWork
}

// schedule gives entries whose conflicts are over to idle workers. Requires mu.
//
// The head is always started: whatever else is at work may be waiting for it. That is also why nothing is forgotten,
// since whatever becomes visible calls schedule.
//
// The last idle worker is kept for the earliest entry that has none. Otherwise later entries, each waiting for its
// turn after that one, could hold all workers, and nothing would ever move.
func (p *Pipeline) schedule() {
	for i := 0; i < min(p.unstarted.len(), lookahead) && len(p.idle) > 0; {
		e := p.unstarted.at(i)
		if head, _ := p.queue.first(); e != head && !p.worthAnother() || len(p.idle) == 1 && i > 0 {
			return
		}
		if e.after > p.Applied() {
			i++
			continue
		}
		p.unstarted.remove(i)
		w := p.idle[len(p.idle)-1]
		p.idle = p.idle[:len(p.idle)-1]
		e.state, e.worker = stateRunning, w
		w.work <- e
	}
}

// keyUses holds, for one key, the latest unfinished transaction that used it in each mode. Since everything before a
// visible transaction is visible too, the latest is the only one worth waiting for.
type keyUses [txn.NumModes]txn.CSN

// conflicts returns the latest unfinished transaction that conflicts with the keys, and the latest one before from.
func (p *Pipeline) conflicts(keys []txn.KeyUse, from txn.CSN) (latest, before txn.CSN) {
	for _, k := range keys {
		uses, ok := p.keys[k.Key]
		if !ok {
			continue
		}
		for mode, csn := range uses {
			if csn == 0 || !txn.Conflicts(txn.Mode(mode), k.Mode) {
				continue
			}
			latest = max(latest, csn)
			switch {
			case csn < from:
				before = max(before, csn)
			case txn.Mode(mode) == txn.ModeReference || txn.Mode(mode) == txn.ModeIntent:
				// These modes do not conflict with themselves, so an earlier use may hide behind the tail's.
				before = max(before, from-1)
			}
		}
	}
	return latest, before
}

func (p *Pipeline) note(keys []txn.KeyUse, csn txn.CSN) {
	for _, k := range keys {
		uses := p.keys[k.Key]
		uses[k.Mode] = csn
		p.keys[k.Key] = uses
	}
}

func (p *Pipeline) forget(keys []txn.KeyUse) {
	applied := p.Applied()
	for _, k := range keys {
		uses, ok := p.keys[k.Key]
		if !ok {
			continue
		}
		var latest txn.CSN
		for _, csn := range uses {
			latest = max(latest, csn)
		}
		if latest <= applied {
			delete(p.keys, k.Key)
		}
	}
}

// lag returns how many transactions are queued and for how long the next one has been. For metrics.
func (p *Pipeline) lag() (items, bytes int, age time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if head, ok := p.queue.first(); ok {
		age = time.Since(head.since)
	}
	return p.items, p.bytes, age
}

// InFlight is a remote transaction that is decided and not visible yet, for those who look.
type InFlight struct {
	GID   txn.GID
	CSN   txn.CSN
	Stage string // "waiting", "executing", "executed", "committing" (perhaps with changes on their way) or "evicted"
	Since time.Time
}

var stageNames = [...]string{
	stateWaiting: "waiting", stateRunning: "executing", stateReady: "executed", stateCommitting: "committing", stateEvicted: "evicted",
}

// InFlight returns the first of them, at most so many, in their order. Those that wait in an open transaction of this
// node are left out.
func (p *Pipeline) InFlight(most int) []InFlight {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []InFlight
	for i := 0; i < p.queue.len() && len(all) < most; i++ {
		e := p.queue.at(i)
		if e.local != nil {
			continue
		}
		for _, item := range e.items[:min(len(e.items), most-len(all))] {
			all = append(all, InFlight{GID: item.Set.GID, CSN: item.CSN, Stage: stageNames[e.state], Since: e.since})
		}
	}
	return all
}

// Queue returns how many transactions are decided and not visible, and for how long the next one has been.
func (p *Pipeline) Queue() (transactions int, age time.Duration) {
	items, _, age := p.lag()
	return items, age
}
