package consensus

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quorate/quorate/txn"
)

// gatedProxy stands in front of a member's Raft address. Each direction has a gate; closed, it holds bytes back.
type gatedProxy struct {
	net.Listener
	in, out sync.RWMutex // closed while locked
	held    atomic.Int32 // answers that wait for out
}

func newGatedProxy(t *testing.T, address, behind string) *gatedProxy {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	p := &gatedProxy{Listener: l}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", behind)
			if err != nil {
				_ = conn.Close() // the member is gone
				continue
			}
			go copyThrough(server, conn, &p.in, new(atomic.Int32))
			go copyThrough(conn, server, &p.out, &p.held)
		}
	}()
	return p
}

func copyThrough(to, from net.Conn, open *sync.RWMutex, held *atomic.Int32) {
	defer to.Close()
	buf := make([]byte, 4096)
	for {
		n, err := from.Read(buf)
		held.Add(1)
		open.RLock()
		held.Add(-1)
		if err == nil {
			_, err = to.Write(buf[:n])
		}
		open.RUnlock()
		if err != nil {
			_, _ = io.Copy(io.Discard, from) // until it is closed too
			return
		}
	}
}

// An answer that was under way when a read barrier is asked for proves nothing of the time since: this node may have
// been frozen in between, and somebody else elected.
func TestBarrierWantsFreshAnswers(t *testing.T) {
	proxies := make([]*gatedProxy, 3)
	tc := newCluster(t, 3, func(cfg *Config) {
		cfg.CommitTimeout = time.Minute // only heartbeats
		i := int(cfg.Node) - 1
		behind := freeAddress(t)
		proxies[i] = newGatedProxy(t, cfg.RaftAddress, behind)
		t.Cleanup(func() { _ = proxies[i].Close() })
		cfg.RaftAddress = behind
	})
	leader := tc.leader()
	tc.propose(leader, "works")
	others := []*gatedProxy{proxies[(leader+1)%3], proxies[(leader+2)%3]}
	for _, p := range others {
		p.out.Lock()
	}
	for _, p := range others {
		for p.held.Load() == 0 {
			time.Sleep(time.Millisecond) // a heartbeat comes at its time
		}
	}
	for _, p := range others { // nothing that is sent from now on comes to them
		p.in.Lock()
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	asked := time.Now()
	answer := make(chan error, 1)
	go func() {
		_, err := tc.nodes[leader].c.ReadIndex(ctx)
		answer <- err
	}()
	time.Sleep(100 * time.Millisecond) // nothing tells when Raft has taken the question; well within the lease
	for _, p := range others {
		p.out.Unlock()
	}
	if err := <-answer; err == nil {
		t.Error("a barrier was given by answers to what was sent before it was asked for")
	}
	for _, n := range tc.nodes {
		if at := n.c.QuorumContact(); at.After(asked) {
			t.Errorf("node %s says that it heard from a majority %v after nobody could answer any more", n.config.Node, at.Sub(asked))
		}
	}
	for _, p := range others {
		p.in.Unlock()
	}
}

func TestQuorumContact(t *testing.T) {
	tc := newCluster(t, 3, nil)
	awaitContact := func(since time.Time) {
		t.Helper()
		for _, n := range tc.nodes {
			for deadline := time.Now().Add(patience); n.c != nil && !n.c.QuorumContact().After(since); {
				if time.Now().After(deadline) {
					t.Fatalf("node %s has not heard from a majority", n.config.Node)
				}
				time.Sleep(time.Millisecond) // an atomic value tells nobody that it changes
			}
		}
	}
	start := time.Now()
	awaitContact(start)
	awaitContact(time.Now()) // and goes on to
	leader := tc.leader()
	tc.stop((leader + 1) % 3)
	awaitContact(time.Now()) // two are a majority
	tc.stop(leader)
	stopped := time.Now()
	last := tc.nodes[(leader+2)%3].c
	for time.Since(stopped) < last.QuorumTimeout() {
		time.Sleep(10 * time.Millisecond) // what is tested is that nothing happens
		if at := last.QuorumContact(); at.After(stopped) {
			t.Fatalf("contact %v after the others had stopped", at.Sub(stopped))
		}
	}
	tc.start(leader)
	awaitContact(time.Now())
}

// What a contact tells does not move backwards, and one that comes after a gap begins anew.
func TestContactSince(t *testing.T) {
	c := contact{gap: 2 * time.Second}
	if got := c.read(); got != (Contact{}) {
		t.Errorf("before the first: %+v", got)
	}
	begin := time.Now()
	at := func(seconds int) time.Time { return begin.Add(time.Duration(seconds) * time.Second) }
	for _, step := range []struct {
		at, index          int
		want, wantI, since int
	}{
		{1, 5, 1, 5, 1},
		{3, 7, 3, 7, 1},
		{2, 6, 3, 7, 1}, // was slower
		{6, 9, 6, 9, 6}, // three seconds: frozen, or cut off
		{5, 8, 6, 9, 6}, // asked before the gap had ended, by then: proves nothing of later
		{8, 9, 8, 9, 6},
	} {
		c.heard(at(step.at), txn.LogIndex(step.index))
		if got, want := c.read(), (Contact{at(step.want), txn.LogIndex(step.wantI), at(step.since)}); got != want {
			t.Errorf("heard at %d: %+v, want %+v", step.at, got, want)
		}
	}
}
