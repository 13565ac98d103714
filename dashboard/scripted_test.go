package dashboard_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/quorate/quorate/dashboard"
	"github.com/quorate/quorate/txn"
)

// scripted is a node that shows what a test says. What the page makes of a real cluster is tested in test/dashboard.
type scripted struct {
	mu       sync.Mutex
	view     dashboard.View
	counters dashboard.Counters
	act      func(dashboard.Action) (string, error)
	views    int
}

func (s *scripted) View() dashboard.View {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.views++
	v := s.view
	v.Nodes = append([]dashboard.Node(nil), v.Nodes...)
	return v
}

func (s *scripted) Counters() dashboard.Counters {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counters
}

func (s *scripted) Act(_ context.Context, a dashboard.Action) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.act(a)
}

// change edits what is shown.
func (s *scripted) change(f func(*dashboard.View)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.view)
}

// count sets what charts are made of.
func (s *scripted) count(c dashboard.Counters) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counters = c
}

func ptr[T any](v T) *T { return &v }

// three is a node of a healthy cluster of three.
func three() *scripted {
	s := &scripted{act: func(dashboard.Action) (string, error) { return "done", nil }}
	s.view.Cluster = dashboard.Cluster{
		Name: "example", Node: 1, Version: "v1", Leader: 2, Term: 7, CommitIndex: 1000, CSN: 900,
		Quorum: true, QuorumAge: dashboard.Ago(time.Millisecond), Access: "read-write", Late: dashboard.Millis(700 * time.Millisecond),
	}
	for id := txn.NodeID(1); id <= 3; id++ {
		role := "follower"
		if id == 2 {
			role = "leader"
		}
		s.view.Nodes = append(s.view.Nodes, dashboard.Node{
			ID: id, State: "active", Role: role, Voter: true, Reachable: true, Contact: dashboard.Ago(0), Writes: true,
			Gateway: fmt.Sprintf("127.0.0.1:600%d", id), HTTP: fmt.Sprintf("127.0.0.1:630%d", id), Version: "v1", Postgres: "18.1",
			Term: ptr(uint64(7)), AppliedIndex: ptr(txn.LogIndex(1000)), Lag: ptr(uint64(0)),
			Actions: []string{dashboard.Drain, dashboard.Transfer, dashboard.Remove},
		})
		for from := txn.NodeID(1); from <= 3; from++ {
			if from != id {
				s.view.Links = append(s.view.Links, dashboard.Link{From: from, To: id, Known: true, Age: dashboard.Ago(80 * time.Millisecond), RTT: dashboard.Ago(300 * time.Microsecond)})
			}
		}
	}
	return s
}

// cut makes a node hear nothing of another.
func cut(v *dashboard.View, from, to txn.NodeID) {
	links := append([]dashboard.Link(nil), v.Links...)
	for i := range links {
		if links[i].From == from && links[i].To == to {
			links[i].Lost, links[i].Age = true, dashboard.Ago(4*time.Second)
		}
	}
	v.Links = links
}

// gone makes a node unreachable for the one that tells.
func gone(v *dashboard.View, id txn.NodeID) {
	nodes := append([]dashboard.Node(nil), v.Nodes...)
	nodes[id-1].Reachable, nodes[id-1].Reason, nodes[id-1].Contact = false, "no heartbeat for 4s", dashboard.Ago(4*time.Second)
	v.Nodes = nodes
}

// serve runs a dashboard and returns it with the address of its page.
func serve(t *testing.T, c dashboard.Config) (*dashboard.Dashboard, string) {
	t.Helper()
	if c.Role == nil {
		c.Role = func(*http.Request) dashboard.Role { return dashboard.Operator }
	}
	c.Logger = slog.New(slog.DiscardHandler)
	if c.Interval == 0 {
		c.Interval = 20 * time.Millisecond
	}
	d, err := dashboard.New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	server := httptest.NewServer(d)
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("run the dashboard: %v", err)
		}
	})
	return d, server.URL
}
