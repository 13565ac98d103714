package consensus

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A silent leader is looked for once, when it has been silent for between one and one and a half timeouts.
func TestSuspicion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const timeout = time.Second
		var at atomic.Pointer[time.Time]
		heard := func() { now := time.Now(); at.Store(&now) }
		heard()
		var leader atomic.Bool
		leader.Store(true)
		looks := make(chan time.Duration, 10)
		s := suspicion{
			timeout: timeout,
			contact: func() (time.Time, bool) { return *at.Load(), leader.Load() },
			look:    func() { looks <- time.Since(*at.Load()) },
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); s.run(ctx) }()
		for range 50 {
			for range 30 {
				time.Sleep(timeout / 7)
				heard()
			}
			if len(looks) > 0 {
				t.Fatal("looked for a leader that can be heard")
			}
			if silent := <-looks; silent < timeout || silent > timeout*3/2 {
				t.Errorf("looked after %v", silent)
			}
			time.Sleep(10 * timeout)
			if len(looks) > 0 {
				t.Fatal("looked twice")
			}
		}
		leader.Store(false)
		heard()
		time.Sleep(10 * timeout)
		if len(looks) > 0 {
			t.Error("looked for nobody")
		}
		cancel()
		<-ended
	})
}

// A leader that has fallen silent is replaced soon, by Raft's means.
func TestSilentLeaderIsReplaced(t *testing.T) {
	const timeout = 2 * time.Second
	tc := newCluster(t, 3, func(c *Config) {
		c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLease = timeout, timeout, timeout
	})
	leader := tc.leader()
	tc.propose(leader, "before")
	other := tc.nodes[(leader+1)%3].c
	_, first := other.Leadership()
	_, second := tc.nodes[(leader+2)%3].c.Leadership()
	silent := time.Now()
	tc.nodes[leader].c.transport.stream.hangUp()
	<-first
	<-second
	// Its last word may be a moment older, and time passes on a busy machine.
	if took := time.Since(silent); took < timeout/2 || took > timeout*3/2+timeout/2 {
		t.Errorf("the followers have noticed after %v", took)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := other.WaitLeader(ctx); err != nil {
		t.Error(err)
	}
}
