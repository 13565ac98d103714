package node

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/quorate/quorate/dashboard"
	"github.com/quorate/quorate/events"
	"github.com/quorate/quorate/internal/logkey"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// gatherer brings together, while somebody looks, what a page shows and this node does not know at once: what the others
// know, and where conflicts were, which is found out with PostgreSQL's help. Events are pushed by who has noted them. Only
// what has no place in a log is asked for again and again: transactions that wait, and evictions.
type gatherer struct {
	n     *Node
	begun chan struct{} // somebody has begun to look

	mu     sync.Mutex // guards the rest
	looked time.Time
	has    *gathered // nil while nobody looks; replaced, never changed
}

// gathered is what has come. Lists are in the order of dashboard.View.
type gathered struct {
	transactions []dashboard.Transaction // of the others: this node's are looked at each time
	conflicts    []dashboard.Conflict
	events       []dashboard.Event
	silent       []dashboard.Silent
	// told is the incarnation in which all others have told of all conflicts that they remember: what the log has decided
	// since, it has read, or will, itself. Nil: ask again. A witness has no incarnation, and knows of no conflict.
	told *incarnation
}

const (
	shownEvents       = 200
	shownConflicts    = 200
	shownTransactions = 100
	gatherInterval    = time.Second
	gatherTimeout     = 5 * time.Second
)

func newGatherer(n *Node) *gatherer { return &gatherer{n: n, begun: make(chan struct{}, 1)} }

// look notes that somebody looks, and returns what there is: at first the events of this node.
func (g *gatherer) look() *gathered {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.looked = time.Now()
	if g.has == nil {
		g.has = &gathered{events: newest(shownEvents, asShown(g.n.Happened(&pb.EventsRequest{Limit: shownEvents}), shownEvent), whichEvent)}
		select {
		case g.begun <- struct{}{}:
		default: // what has begun before has just ended
		}
	}
	return g.has
}

// run gathers until ctx ends.
func (g *gatherer) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-g.begun:
			g.attend(ctx)
		}
	}
}

// attend gathers until nobody looks any more or ctx ends, and drops what there is: whoever looks next is not shown what was
// long ago.
func (g *gatherer) attend(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	var following sync.WaitGroup
	following.Go(func() { g.follow(ctx) })
	ticker := time.NewTicker(gatherInterval)
	defer ticker.Stop()
	for g.watched() && ctx.Err() == nil {
		if err := g.ask(ctx); err != nil && ctx.Err() == nil {
			g.n.log.Debug("gather for the dashboard", logkey.Error, err) // what is shown stays as it was
		}
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
	cancel()
	following.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.has = nil
}

func (g *gatherer) watched() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return time.Since(g.looked) <= 2*gatherInterval
}

// change is called by what attend has begun, and so while there is something to change.
func (g *gatherer) change(f func(*gathered)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	changed := *g.has
	f(&changed)
	g.has = &changed
}

// follow takes the events of all members as they happen, until ctx ends.
func (g *gatherer) follow(ctx context.Context) {
	took := func(found []*pb.Event) error {
		if len(found) > 0 {
			came := asShown(found, shownEvent)
			g.change(func(now *gathered) { now.events = newest(shownEvents, slices.Concat(now.events, came), whichEvent) })
		}
		return nil
	}
	latest, err := g.n.observe.Events(ctx, &pb.EventsRequest{Limit: shownEvents})
	if err == nil {
		_ = took(latest.Events) // never fails
		req := &pb.FollowRequest{After: latest.Cursors}
		if len(latest.Events) == shownEvents { // of who has not answered, what is not older than all of these
			req.SinceMs = latest.Events[shownEvents-1].TimeMs
		}
		err = g.n.observe.FollowEach(ctx, req, took)
	}
	if ctx.Err() == nil {
		g.n.log.Debug("follow events for the dashboard", logkey.Error, err) // the node is stopping
	}
}

// ask asks all members once.
func (g *gatherer) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, gatherTimeout)
	defer cancel()
	kind, reads := "", g.n.current.Load()
	g.mu.Lock()
	if reads != nil && g.has.told == reads {
		kind = conflictEvicted
	}
	g.mu.Unlock()
	var (
		transactions *pb.TransactionsResponse
		own, all     *pb.ConflictsResponse
		group        errgroup.Group
	)
	group.Go(func() (err error) {
		transactions, err = g.n.observe.Transactions(ctx, &pb.TransactionsRequest{Limit: shownTransactions})
		return err
	})
	group.Go(func() (err error) {
		own, err = g.n.observe.Conflicts(ctx, &pb.ConflictsRequest{Limit: shownConflicts, Local: true})
		return err
	})
	group.Go(func() (err error) {
		all, err = g.n.observe.Conflicts(ctx, &pb.ConflictsRequest{Limit: shownConflicts, Kind: kind})
		return err
	})
	if err := group.Wait(); err != nil {
		return err
	}
	waiting := slices.DeleteFunc(transactions.Transactions, func(t *pb.TransactionInFlight) bool { return t.Node == uint32(g.n.cfg.Node) })
	var silent []dashboard.Silent
	for _, u := range slices.Concat(transactions.Unreachable, all.Unreachable) {
		silent = append(silent, dashboard.Silent{Node: txn.NodeID(u.Node), Reason: u.Reason})
	}
	slices.SortStableFunc(silent, func(a, b dashboard.Silent) int { return cmp.Compare(a.Node, b.Node) })
	silent = slices.CompactFunc(silent, func(a, b dashboard.Silent) bool { return a.Node == b.Node })
	came := asShown(slices.Concat(all.Conflicts, own.Conflicts), shownConflict) // of its own the node knows best
	if len(silent) > 0 {
		reads = nil
	}
	g.change(func(now *gathered) {
		now.transactions, now.silent, now.told = asShown(waiting, shownTransaction), silent, reads
		now.conflicts = newest(shownConflicts, slices.Concat(now.conflicts, came), whichConflict)
	})
	return nil
}

// newest returns at most so many of a list's items, each once, as it is last in the list, in the order of their time.
func newest[T any](most int, list []T, which func(*T) (id string, at time.Time)) []T {
	places := make(map[string]int, len(list))
	var all []T
	for i := range list {
		id, _ := which(&list[i])
		if at, known := places[id]; known {
			all[at] = list[i]
			continue
		}
		places[id] = len(all)
		all = append(all, list[i])
	}
	slices.SortFunc(all, func(a, b T) int {
		idA, atA := which(&a)
		idB, atB := which(&b)
		return cmp.Or(atA.Compare(atB), cmp.Compare(idA, idB))
	})
	return all[max(0, len(all)-most):]
}

func whichEvent(e *dashboard.Event) (string, time.Time)       { return e.ID, e.At }
func whichConflict(c *dashboard.Conflict) (string, time.Time) { return c.ID, c.At }

func asShown[A, B any](all []A, one func(A) B) []B {
	shown := make([]B, len(all))
	for i, a := range all {
		shown[i] = one(a)
	}
	return shown
}

func shownTransaction(t *pb.TransactionInFlight) dashboard.Transaction {
	return dashboard.Transaction{GID: t.Gid, Node: txn.NodeID(t.Node), Stage: t.Stage, Age: millis(t.AgeSeconds), Doubt: t.Stage == "in doubt"}
}

func shownConflict(c *pb.Conflict) dashboard.Conflict {
	one := dashboard.Conflict{
		At: time.UnixMilli(c.TimeMs), Node: txn.NodeID(c.Node), Loser: c.Gid, Table: c.Table, Key: c.Key, Reason: c.Kind,
		Winner: cmp.Or(c.WinnerGid, fmt.Sprintf("CSN %d", c.WinnerCsn)),
	}
	// All members tell of a loser that the log knows, each with its own time; of any other, one member does.
	if one.ID = c.Kind + " " + c.Gid; c.Gid == "" {
		one.ID = fmt.Sprintf("%s %d %d %d", c.Kind, c.Node, c.TimeMs, c.WinnerCsn)
	}
	return one
}

func shownEvent(e *pb.Event) dashboard.Event {
	return dashboard.Event{
		ID: fmt.Sprintf("%d %d", e.Node, e.Number), At: time.UnixMilli(e.TimeMs), Severity: events.Severity(e.Severity).String(),
		Node: txn.NodeID(e.Node), Kind: e.Kind, Text: e.Text,
	}
}
