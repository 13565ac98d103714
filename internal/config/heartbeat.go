package config

import "time"

// Heartbeat is how members watch each other: for what people are shown, and for slowing down for a member that is behind. No vote
// and no commit depends on it. The same on all nodes: each judges the others' heartbeats by its own settings.
type Heartbeat struct {
	// Interval is how often this node tells each other member how it is and whom it hears. Default 250ms, from 50ms to 5s.
	Interval time.Duration `yaml:"interval,omitempty"`
	// Timeout is how old a member's last heartbeat is when it counts as lost. Default 1s, or four intervals if that is more; at least
	// three intervals, so that one that is late is not taken for a member that is lost, and at most 1m.
	Timeout time.Duration `yaml:"timeout,omitempty"`
}

const (
	defaultHeartbeatInterval = 250 * time.Millisecond
	defaultHeartbeatTimeout  = time.Second
)

func (h *Heartbeat) complete() {
	orDefault(&h.Interval, defaultHeartbeatInterval)
	orDefault(&h.Timeout, max(defaultHeartbeatTimeout, 4*h.Interval))
}

func (h Heartbeat) validate(v *validator) {
	if h.Interval < 50*time.Millisecond || h.Interval > 5*time.Second {
		v.add("heartbeat.interval", h.Interval.String(), "must be from 50ms to 5s")
		return // and then the timeout cannot be judged
	}
	if h.Timeout < 3*h.Interval || h.Timeout > time.Minute {
		v.add("heartbeat.timeout", h.Timeout.String(), "must be from %s, three times heartbeat.interval, to 1m", 3*h.Interval)
	}
}
