package consensus

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/hashicorp/raft"

	"github.com/quorate/quorate/internal/logkey"
)

// Raft looks whether its leader is silent at the end of random times between one and two heartbeat timeouts, so that it
// takes one to three until a follower has noticed, and with pre-vote a majority must have noticed. suspicion has it look when
// it is time: between one and one and a half timeouts after the last word. What is done then is Raft's decision, as ever.
type suspicion struct {
	timeout time.Duration                  // of heartbeats
	contact func() (at time.Time, ok bool) // when the leader was last heard; false: there is none to be heard
	look    func()
}

// run watches until ctx ends.
func (s *suspicion) run(ctx context.Context) {
	// Not all followers should stand for election at once: each has its own patience, another one every time.
	patience := s.patience()
	var looked time.Time // at the silence since then
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		at, ok := s.contact()
		silent := time.Since(at)
		switch {
		case !ok || at.Equal(looked):
			timer.Reset(s.timeout / 4) // there may be a leader again
		case silent < patience:
			timer.Reset(patience - silent)
		default:
			looked, patience = at, s.patience()
			s.look()
			timer.Reset(s.timeout / 4)
		}
	}
}

func (s *suspicion) patience() time.Duration { return s.timeout + rand.N(s.timeout/2) }

// runSuspicion watches the leader while this node follows.
func (c *Consensus) runSuspicion() {
	s := suspicion{
		timeout: c.config.HeartbeatTimeout,
		contact: func() (time.Time, bool) {
			_, leader := c.raft.LeaderWithID()
			return c.raft.LastContact(), leader != "" && c.raft.State() == raft.Follower
		},
		look: c.lookForLeader,
	}
	s.run(c.closing)
}

// lookForLeader has Raft compare the leader's silence with the heartbeat timeout now: it does so when that is shortened.
func (c *Consensus) lookForLeader() {
	for _, more := range []time.Duration{time.Nanosecond, 0} {
		c.reload(func(r *raft.ReloadableConfig) {
			r.HeartbeatTimeout, r.ElectionTimeout = c.config.HeartbeatTimeout+more, c.config.ElectionTimeout+more
		})
	}
}

// reload changes Raft's configuration while it runs.
func (c *Consensus) reload(change func(*raft.ReloadableConfig)) {
	c.reloading.Lock()
	defer c.reloading.Unlock()
	r := c.raft.ReloadableConfig()
	change(&r)
	if err := c.raft.ReloadConfig(r); err != nil {
		c.logger.Error("Raft refuses its settings", "settings", r, logkey.Error, err)
	}
}
