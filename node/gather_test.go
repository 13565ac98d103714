package node

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/quorate/quorate/admin"
	"github.com/quorate/quorate/dashboard"
	"github.com/quorate/quorate/events"
	"github.com/quorate/quorate/internal/peers"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/replication/apply"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/coord"
)

// observing is a node of which nothing works but what is asked for by others who look. It keeps of what kind the conflicts
// were that it was asked for.
type observing struct {
	*Node
	mu    sync.Mutex
	asked []string
}

func (o *observing) Conflicts(ctx context.Context, kind string, most int) []*pb.Conflict {
	o.mu.Lock()
	o.asked = append(o.asked, kind)
	o.mu.Unlock()
	return o.Node.Conflicts(ctx, kind, most)
}

// lastAsked returns the last of them, and how many there were.
func (o *observing) lastAsked() (string, int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.asked) == 0 {
		return "none", 0
	}
	return o.asked[len(o.asked)-1], len(o.asked)
}

// observingTwo returns two nodes that reach each other.
func observingTwo(t *testing.T) (one, two *observing) {
	t.Helper()
	var members []admin.Member
	var listeners []net.Listener
	for id := txn.NodeID(1); id <= 2; id++ {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, l)
		members = append(members, admin.Member{ID: id, GRPC: l.Addr().String()})
	}
	start := func(id txn.NodeID) *observing {
		log, err := events.Open(t.TempDir(), func(err error) { t.Error(err) })
		if err != nil {
			t.Fatal(err)
		}
		n := &Node{log: slog.New(slog.DiscardHandler)}
		n.cfg.Node, n.seen.events, n.seen.changed = id, log, make(chan struct{})
		o := &observing{Node: n}
		pool := peers.New(func(other txn.NodeID) (string, bool) { return members[other-1].GRPC, true })
		n.observe = admin.NewObserve(admin.Config{Node: id, Members: func() []admin.Member { return members }, Peers: pool}, o)
		server := grpc.NewServer()
		n.observe.Register(server)
		var served sync.WaitGroup
		served.Go(func() {
			if err := server.Serve(listeners[id-1]); err != nil {
				t.Errorf("serve node %s: %v", id, err)
			}
		})
		t.Cleanup(func() {
			n.observe.Close()
			server.GracefulStop()
			served.Wait()
			if err := pool.Close(); err != nil {
				t.Error(err)
			}
			if err := log.Close(); err != nil {
				t.Error(err)
			}
		})
		return o
	}
	return start(1), start(2)
}

// What other members know comes while somebody looks: events as they happen, each once, and conflicts. What the log tells
// this node is not asked for again. When nobody looks any more all of it is dropped, and nobody is asked or followed.
func TestGatherer(t *testing.T) {
	one, two := observingTwo(t)
	note := func(n *observing, text string) { n.event(events.Info, eventState, n.cfg.Node, text) }
	note(one, "first of 1")
	note(two, "first of 2")
	g := newGatherer(one.Node)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = g.run(ctx) })
	defer running.Wait()
	defer cancel()
	texts := func(has *gathered) (all []string) {
		for _, e := range has.events {
			all = append(all, e.Text)
		}
		slices.Sort(all) // of two in one millisecond either may come first
		return all
	}
	// await looks until it is as it should be.
	await := func(what string, as func(*gathered) bool) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			has := g.look()
			if as(has) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s: %+v", what, has)
			}
		}
	}
	events := func(want ...string) {
		t.Helper()
		await(fmt.Sprintf("events %q", want), func(has *gathered) bool { return slices.Equal(texts(has), want) })
	}

	if got := texts(g.look()); !slices.Equal(got, []string{"first of 1"}) {
		t.Errorf("who begins to look sees %q", got)
	}
	events("first of 1", "first of 2")
	note(two, "second of 2")
	events("first of 1", "first of 2", "second of 2")
	note(one, "second of 1")
	events("first of 1", "first of 2", "second of 1", "second of 2")

	// Without an incarnation the node knows of no conflict itself; with one, it is told once what was before.
	two.seen.conflicts.certified(&txn.WriteSet{GID: gid(1)}, txn.Verdict{Reason: txn.AbortConflict, With: 5})
	await("a conflict that the log tells of", func(has *gathered) bool { return len(has.conflicts) == 1 })
	if kind, _ := two.lastAsked(); kind != "" {
		t.Errorf("a node that does not know of conflicts asks for %q only", kind)
	}
	one.current.Store(&incarnation{n: one.Node, coord: &coord.Coordinator{}, pipeline: &apply.Pipeline{}})
	await("that evictions are asked for only", func(*gathered) bool { kind, _ := two.lastAsked(); return kind == conflictEvicted })
	one.seen.conflicts.certified(&txn.WriteSet{GID: gid(2)}, txn.Verdict{Reason: txn.AbortConflict, With: 6})
	two.seen.conflicts.certified(&txn.WriteSet{GID: gid(2)}, txn.Verdict{Reason: txn.AbortConflict, With: 6})
	two.seen.conflicts.evicted(two.cfg.Node, apply.Blockade{PID: 77, By: 7})
	await("each of three conflicts once", func(has *gathered) bool {
		ids := make(map[string]bool)
		for _, c := range has.conflicts {
			ids[c.ID] = true
		}
		return len(ids) == 3 && len(has.conflicts) == 3 && has.conflicts[0].Loser == gid(1).String()
	})

	// Nobody looks.
	g.mu.Lock()
	g.looked = g.looked.Add(-time.Hour)
	g.mu.Unlock()
	dropped := func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.has == nil
	}
	for end := time.Now().Add(20 * time.Second); !dropped(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("what was gathered is kept though nobody looks")
		}
	}
	_, asked := two.lastAsked()
	note(two, "third of 2")
	note(one, "third of 1")
	if got := texts(g.look()); !slices.Equal(got, []string{"first of 1", "second of 1", "third of 1"}) {
		t.Errorf("who looks next sees %q", got)
	}
	events("first of 1", "first of 2", "second of 1", "second of 2", "third of 1", "third of 2")
	await("that node 2 is asked again", func(*gathered) bool { _, now := two.lastAsked(); return now > asked })
}

func TestNewest(t *testing.T) {
	at := func(id string, ms int64, text string) dashboard.Event {
		return dashboard.Event{ID: id, At: time.UnixMilli(ms), Text: text}
	}
	list := []dashboard.Event{at("1 1", 30, ""), at("1 2", 10, ""), at("2 1", 20, ""), at("1 2", 40, "again"), at("2 2", 30, "")}
	var got []string
	for _, e := range newest(3, list, whichEvent) {
		got = append(got, e.ID+e.Text)
	}
	if want := []string{"1 1", "2 2", "1 2again"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
