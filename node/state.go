package node

import (
	"errors"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// The states of a node, as "quorate status" and the metrics show them. Only an active one takes clients.
const (
	stateStarting   = "starting"
	stateJoining    = "joining"     // admitted, and waiting for the log
	stateCloning    = "cloning"     // copies another member's data
	stateCatchingUp = "catching-up" // follows the log to where the cluster was when it came
	stateActive     = "active"
	stateDraining   = "draining"   // takes no more clients, votes and applies
	stateRecovering = "recovering" // without its PostgreSQL, which is being started or awaited
	stateFailed     = "failed"     // fenced for good: going on would make it worse, and it takes somebody to look
	stateRemoved    = "removed"    // belongs to the cluster no more
	stateStopping   = "stopping"
)

var allStates = []string{
	stateStarting, stateJoining, stateCloning, stateCatchingUp, stateActive, stateDraining, stateRecovering, stateFailed, stateRemoved, stateStopping,
}

// state is what the node tells the world about itself.
type state struct {
	name   string
	reason string // why it does not take clients; empty when active
}

// states is where the node's state is kept. From failed only removed and stopping follow, from removed only stopping, and
// after stopping nothing.
type states struct {
	changed func(state) // called in order, must not block

	mu  sync.Mutex
	now state
}

func (s *states) current() state {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

// set reports whether the state was changed.
func (s *states) set(name, reason string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	final := false
	switch s.now.name {
	case stateStopping:
		final = true
	case stateRemoved:
		final = name != stateStopping
	case stateFailed:
		final = name != stateStopping && name != stateRemoved
	}
	if final || s.now == (state{name, reason}) {
		return false
	}
	s.now = state{name, reason}
	if s.changed != nil {
		s.changed(s.now)
	}
	return true
}

// Describe and Collect make states a metric: 1 for the state that the node is in, 0 for the others.
func (s *states) Describe(ch chan<- *prometheus.Desc) { ch <- stateDesc }

func (s *states) Collect(ch chan<- prometheus.Metric) {
	now := s.current().name
	for _, name := range allStates {
		value := 0.0
		if name == now {
			value = 1
		}
		ch <- prometheus.MustNewConstMetric(stateDesc, prometheus.GaugeValue, value, name)
	}
}

var stateDesc = prometheus.NewDesc("quorate_node_state", "1 for the state that the node is in, 0 for the others.", []string{"state"}, nil)

// hopeless reports whether an incarnation that ended with err would end so again, whatever happens to the server: its
// data contradict the log, or the log cannot be read, by this build at least. Everything else, a lack of connections or disk say, may pass.
func hopeless(err error) bool {
	var newer *codec.VersionError
	return errors.Is(err, txn.ErrDiverged) || errors.Is(err, txn.ErrCorrupt) || errors.As(err, &newer)
}

// patience spaces attempts to take PostgreSQL up again: the first is made at once, the next ones ever later, until
// an incarnation has lasted.
type patience struct{ next time.Duration }

const (
	firstWait = 100 * time.Millisecond
	lastWait  = 5 * time.Second
	lasting   = 30 * time.Second
)

// wait returns how long to wait before the next attempt.
func (p *patience) wait() time.Duration {
	now := p.next
	p.next = min(max(2*now, firstWait), lastWait)
	return now
}

// lasted tells for how long the attempt went well.
func (p *patience) lasted(d time.Duration) {
	if d >= lasting {
		p.next = 0
	}
}
