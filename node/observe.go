package node

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/events"
	"github.com/quorate/quorate/heartbeat"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/replication/apply"
	"github.com/quorate/quorate/txn"
)

// seen is what a node notices, for those who look. Nothing of the node's work depends on it.
type seen struct {
	began  time.Time
	events *events.Log
	beats  *heartbeat.Monitor

	conflicts       conflicts
	commits, aborts atomic.Uint64 // of this node's own clients
	counted         atomic.Uint64 // log index up to which decisions are counted; whoever reads the log sets it
	decided         *prometheus.CounterVec
	throttled       prometheus.Histogram
	rates           atomic.Pointer[rates]
	server          atomic.Pointer[serverHealth] // nil: PostgreSQL is not there
	disk            atomic.Pointer[disk]
	ticked          atomic.Int64 // when watch last looked, in nanoseconds since began

	mu      sync.Mutex
	changed chan struct{} // closed when something is to be shown at once
}

// rates are per second.
type rates struct{ commits, aborts float64 }

// The kinds of events. Programs look for them: never rename.
const (
	eventStarted        = "started"
	eventStopped        = "stopped"
	eventStartFailed    = "start_failed"
	eventState          = "state"
	eventRecovering     = "recovering"
	eventFailed         = "failed"
	eventLeader         = "leader"
	eventQuorumLost     = "quorum_lost"
	eventQuorumRegained = "quorum_regained"
	eventPeerLost       = "peer_lost"
	eventPeerHeard      = "peer_heard"
	eventPeerRestarted  = "peer_restarted"
	eventFrozen         = "frozen"
	eventMemberAdmitted = "member_admitted"
	eventMemberRemoved  = "member_removed"
	eventFlowControl    = "flow_control"
	eventStray          = "stray"
)

// openObservation opens the log of events: first of all, so that it can say what keeps the node from starting.
func (n *Node) openObservation(context.Context) error {
	n.seen.began = time.Now()
	n.seen.changed = make(chan struct{})
	n.seen.decided = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "quorate_log_transactions_total", Help: "Transactions that the log has decided, of all nodes, by verdict; reason none is a commit.",
	}, []string{"reason"})
	for r := txn.AbortNone; r <= txn.AbortRequested; r++ {
		n.seen.decided.WithLabelValues(r.String())
	}
	n.seen.throttled = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "quorate_node_flow_control_seconds", Help: "How long batches of this node's transactions were held up because PostgreSQL, here or on another active node, lags behind the log.",
		Buckets: prometheus.ExponentialBuckets(0.001, 4, 8),
	})
	n.metrics.MustRegister(n.seen.decided, n.seen.throttled, healthCollector{n})
	if err := os.MkdirAll(n.cfg.DataDir, 0o755); err != nil {
		return fmt.Errorf("make data directory: %w", err)
	}
	log, err := events.Open(n.cfg.DataDir, func(err error) {
		n.log.Warn("an event is not on disk", logkey.Error, err)
	})
	if err != nil {
		return err
	}
	n.seen.events = log
	text := fmt.Sprintf("node %s starts", n.cfg.Node)
	if last := log.Find(events.Query{Limit: 1}); len(last) > 0 && last[0].Kind != eventStopped && last[0].Kind != eventStartFailed {
		text += " after a life that ended without being stopped"
	}
	n.event(events.Info, eventStarted, n.cfg.Node, text, "version", n.version)
	n.onClose(func(context.Context) error {
		if n.states.current().name == stateStopping {
			n.event(events.Info, eventStopped, n.cfg.Node, fmt.Sprintf("node %s stops", n.cfg.Node))
		}
		return log.Close()
	})
	n.lookAtDisk()
	return nil
}

// openHeartbeats makes the node hear the others, and answer them.
func (n *Node) openHeartbeats() error {
	beats, err := heartbeat.New(heartbeat.Config{
		Cluster: n.cfg.Cluster, ClusterID: n.identity.get().ClusterID, Node: n.cfg.Node, Peers: n.others, Health: n.health, Changed: n.heartbeatChanged,
		Conn:       func(id txn.NodeID) (grpc.ClientConnInterface, error) { return n.peers.Conn(id) },
		Interval:   n.cfg.Heartbeat.Interval,
		Timeout:    n.cfg.Heartbeat.Timeout,
		Registerer: n.metrics,
	})
	if err != nil {
		return err
	}
	beats.Register(n.grpc)
	n.seen.beats = beats
	return nil
}

// alongside runs what only looks, until the node ends.
func (n *Node) alongside(run func(context.Context) error) {
	n.group.Go(func() error { return run(n.ctx) })
}

// others are all members but this one.
func (n *Node) others() (ids []txn.NodeID) {
	for _, m := range n.members() {
		if m.ID != n.cfg.Node {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

// event notes what has happened. fields are names and values in turn.
func (n *Node) event(severity events.Severity, kind string, about txn.NodeID, text string, fields ...string) {
	if n.seen.events == nil {
		return // the log could not be opened
	}
	e := events.Event{Severity: severity, Kind: kind, Node: about, Text: text}
	if len(fields) > 0 {
		e.Fields = make(map[string]string)
		for pair := range slices.Chunk(fields, 2) {
			e.Fields[pair[0]] = pair[1]
		}
	}
	n.seen.events.Append(e)
	n.show()
}

// show has what has changed shown at once.
func (n *Node) show() {
	n.seen.mu.Lock()
	defer n.seen.mu.Unlock()
	close(n.seen.changed)
	n.seen.changed = make(chan struct{})
}

// Changed returns a channel that is closed when something has changed that is to be shown at once. Figures change
// without it.
func (n *Node) Changed() <-chan struct{} {
	n.seen.mu.Lock()
	defer n.seen.mu.Unlock()
	return n.seen.changed
}

func (n *Node) heartbeatChanged(c heartbeat.Change) {
	seconds := strconv.FormatFloat(c.For.Seconds(), 'f', 1, 64)
	switch c.Kind {
	case heartbeat.Lost:
		n.event(events.Warning, eventPeerLost, c.Node, fmt.Sprintf("node %s is not heard any more", c.Node))
	case heartbeat.Heard:
		n.event(events.Info, eventPeerHeard, c.Node, fmt.Sprintf("node %s is heard", c.Node), "silent_seconds", seconds)
	case heartbeat.Restarted:
		n.event(events.Info, eventPeerRestarted, c.Node, fmt.Sprintf("node %s was restarted", c.Node), "silent_seconds", seconds)
	case heartbeat.Frozen:
		n.event(events.Warning, eventFrozen, c.Node, "this process stood still: it was stopped, or its machine had no time for it", "seconds", seconds)
	}
}

// stateEvent notes a change of the node's state.
func (n *Node) stateEvent(s state) {
	text := fmt.Sprintf("node %s is %s", n.cfg.Node, s.name)
	if s.reason != "" {
		text += ": " + s.reason
	}
	switch s.name {
	case stateStarting, stateStopping: // have events of their own
	case stateFailed:
		n.event(events.Error, eventFailed, n.cfg.Node, text, "state", s.name)
	case stateRecovering:
		n.event(events.Warning, eventRecovering, n.cfg.Node, text, "state", s.name)
	default:
		n.event(events.Info, eventState, n.cfg.Node, text, "state", s.name)
	}
}

// noteDecisions notes what an entry of the log has decided. Whoever reads the log again, after a restart or for another
// incarnation, has been told before.
func (i *incarnation) noteDecisions(decisions []replication.Decision) {
	n := i.n
	index := uint64(decisions[0].Index)
	if index <= n.seen.counted.Load() {
		return
	}
	n.seen.counted.Store(index)
	for _, d := range decisions {
		own := d.Set.GID.Node == n.cfg.Node
		v := d.Verdict
		if v.Commits() {
			if v.CSN <= i.start {
				continue
			}
			n.seen.conflicts.committed(v.CSN, d.Set.GID)
			if own {
				n.seen.commits.Add(1)
			}
		} else {
			if i.machine.LastCSN() <= i.start {
				continue
			}
			if v.Reason == txn.AbortConflict {
				n.seen.conflicts.certified(d.Set, v)
			}
			if own {
				n.seen.aborts.Add(1)
			}
		}
		n.seen.decided.WithLabelValues(v.Reason.String()).Inc()
	}
}

// noteEviction notes that a session was asked to make way.
func (n *Node) noteEviction(b apply.Blockade) {
	if n.seen.conflicts.evicted(n.cfg.Node, b) {
		n.seen.aborts.Add(1)
	}
}

// observeTick is how often the node looks at itself.
const observeTick = 250 * time.Millisecond

// watch notices what nobody tells: who leads, whether there is a quorum.
func (n *Node) watch(ctx context.Context) error {
	ticker := time.NewTicker(observeTick)
	defer ticker.Stop()
	o := observation{n: n, quorum: true, rated: time.Now()}
	for {
		n.seen.ticked.Store(int64(time.Since(n.seen.began)))
		var leadership consensus.Leadership
		var changed <-chan struct{}
		if c := n.consensus.Load(); c != nil { // a removed node has none
			leadership, changed = c.Leadership()
		}
		o.look(leadership)
		select {
		case <-changed:
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// stuckAfter is for how long watch may not have looked before the process counts as dead. It takes no lock that work is
// done under, other than for an instant.
const stuckAfter = 10 * time.Second

// observation is what was noticed last.
type observation struct {
	n               *Node
	leadership      consensus.Leadership
	quorum          bool
	had             bool // a quorum, once
	lost            time.Time
	rated           time.Time
	commits, aborts uint64
	looked          time.Time
}

func (o *observation) look(l consensus.Leadership) {
	n := o.n
	if n.states.current().name == stateStopping {
		return
	}
	if l.Leader != 0 && l != o.leadership {
		o.leadership = l
		n.event(events.Info, eventLeader, l.Leader, fmt.Sprintf("node %s leads", l.Leader), "term", strconv.FormatUint(l.Term, 10))
	}
	quorum := n.hasQuorum()
	if a := n.admin.Load(); a != nil {
		a.SetServing(quorum && n.accepting() == nil) // before what is noted, which may wait for the disk
	}
	switch {
	case quorum == o.quorum:
	case quorum:
		silence := ""
		if o.had {
			silence = time.Since(o.lost).Round(time.Millisecond).String()
		}
		n.event(events.Info, eventQuorumRegained, n.cfg.Node, fmt.Sprintf("node %s is in contact with a majority", n.cfg.Node), "lost_for", silence)
	case o.had:
		o.lost = time.Now()
		n.event(events.Error, eventQuorumLost, n.cfg.Node, fmt.Sprintf("node %s has lost contact with the majority: it takes no writes", n.cfg.Node))
	}
	o.quorum, o.had = quorum, o.had || quorum
	now := time.Now()
	if passed := now.Sub(o.rated).Seconds(); passed >= 1 {
		commits, aborts := n.seen.commits.Load(), n.seen.aborts.Load()
		n.seen.rates.Store(&rates{float64(commits-o.commits) / passed, float64(aborts-o.aborts) / passed})
		o.rated, o.commits, o.aborts = now, commits, aborts
	}
	if now.Sub(o.looked) >= healthInterval {
		o.looked = now
		n.lookAtDisk()
	}
}

// A batch that has waited for less than quickFlow was only asked whether it must; from slowFlow on it is worth an event.
const (
	quickFlow = 500 * time.Microsecond
	slowFlow  = time.Second
)

// noteFlowControl begins to note that a batch is held up for a PostgreSQL that lags behind the log, this node's or another's;
// what it returns ends it, and is to be called however the wait ends.
func (n *Node) noteFlowControl(began time.Time) (end func()) {
	slow := time.AfterFunc(slowFlow, func() {
		n.event(events.Warning, eventFlowControl, n.cfg.Node, "writes of this node wait for a PostgreSQL, its own or another member's, that lags behind the log")
	})
	return func() {
		slow.Stop()
		if waited := time.Since(began); waited >= quickFlow {
			n.seen.throttled.Observe(waited.Seconds())
		}
	}
}
