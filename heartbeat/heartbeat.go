// Package heartbeat tells each member of the cluster whom it hears, and whom the others hear. Every member calls every
// other one in each interval. A call carries the sender's own report (its health, and one row of the matrix: how old
// the last heartbeat of each other member is to it) and the newest reports that it has of the others, so that every
// member that hears anybody knows the whole matrix.
//
// Age, loss and jitter are the receiver's measurements, by its own monotonic clock: nothing depends on clocks that
// agree. Heartbeats travel over TCP like everything else between members, because what counts is whether that works: a
// network that loses all packets in one direction breaks both, for TCP and so for Raft. What breaks in one direction
// above it (connections that only one side may open, a process that answers and sends nothing) shows in one direction.
//
// A member is lost after a time in which this process was at work and heard nothing: on a machine without a processor to
// spare, what lies unread is not what was not sent. Ages are by the clock all the same.
//
// Who leads and whether there is a quorum is not decided by heartbeats but by Raft. What they tell of lag, flow control goes by.
package heartbeat

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// The defaults of Config.
const (
	DefaultInterval = 250 * time.Millisecond
	DefaultTimeout  = time.Second
)

// maxReports bounds what is taken from one call, and maxUnanswered the calls to one member that are under way.
const (
	maxReports    = 64
	maxUnanswered = 4
)

// Config of a Monitor. All fields are required unless they say otherwise.
type Config struct {
	Cluster   string // its name, for messages
	ClusterID txn.UUID
	Node      txn.NodeID
	// Peers returns the other members as of now. It must not block.
	Peers func() []txn.NodeID
	// Conn returns the connection to a member. It must not block.
	Conn func(txn.NodeID) (grpc.ClientConnInterface, error)
	// Health says how this node is. It is called once in each interval and must not block. What it returns is not
	// changed, nor may the caller change it afterwards.
	Health func() *pb.Health
	// Changed takes what the monitor notices. It must not block, nor call the monitor.
	Changed func(Change)
	// Interval between heartbeats, and Timeout, the age from which on a member counts as lost; 0 means the default.
	Interval, Timeout time.Duration
	Registerer        prometheus.Registerer
}

// Change is something that the monitor has noticed.
type Change struct {
	Kind Kind
	Node txn.NodeID // the other member; this one for Frozen
	// For is how long the member was not heard (Lost, Heard), or this process stood still (Frozen).
	For time.Duration
}

// Kind of a Change.
type Kind uint8

// The kinds.
const (
	// Lost: nothing has come from a member within the timeout.
	Lost Kind = iota + 1
	// Heard: a member is heard again, or for the first time.
	Heard
	// Restarted: a member is heard under another incarnation.
	Restarted
	// Frozen: this process itself did not run. Members are not called lost for it.
	Frozen
)

// Monitor sends, receives and remembers. It is safe for concurrent use.
type Monitor struct {
	pb.UnimplementedHeartbeatServer
	cfg         Config
	incarnation uint64
	began       time.Time
	metrics     *metrics

	mu       sync.Mutex
	sequence uint64
	resumed  time.Time     // since when this process has been running without a break
	ticked   time.Time     // when tick was last at work
	awake    time.Duration // how long this process has been at work, at ticked
	peers    map[txn.NodeID]*peer
	reports  map[txn.NodeID]*known // of others
	// promised is the highest term and commit index that each other node has ever told of: it gave its word for them. One that
	// has lost its log tells of less, which takes nothing back. It stays when a node is no member any more: while this node
	// reads the log anew it may not know all of them, and there are few ids.
	promised map[txn.NodeID]*pb.Health
	news     chan struct{} // closed with the next report; nil: nobody waits
}

// peer is what this node measures of another member.
type peer struct {
	incarnation, before uint64        // of its process, and of the one before that
	last                time.Time     // when its latest heartbeat arrived; zero: never
	lastAwake           time.Duration // and for how long this process had been at work then
	sent                float64       // and when that was sent, by its clock
	first, highest      uint64        // sequence numbers
	got                 uint64        // bit i: highest-i has arrived
	jitter              float64       // seconds
	roundTrip           float64       // seconds; 0: unknown
	heard               bool
	unanswered          int
}

// known is a report and when it was made.
type known struct {
	*pb.Report
	made time.Time
}

// New returns a Monitor that sends once Run is called.
func New(c Config) (*Monitor, error) {
	c.Interval, c.Timeout = cmp.Or(c.Interval, DefaultInterval), cmp.Or(c.Timeout, DefaultTimeout)
	var incarnation [8]byte
	if _, err := rand.Read(incarnation[:]); err != nil {
		return nil, fmt.Errorf("draw an incarnation: %w", err)
	}
	m := &Monitor{
		cfg: c, incarnation: binary.BigEndian.Uint64(incarnation[:]), began: time.Now(), ticked: time.Now(),
		peers: make(map[txn.NodeID]*peer), reports: make(map[txn.NodeID]*known), promised: make(map[txn.NodeID]*pb.Health),
	}
	m.metrics = newMetrics(m)
	if c.Registerer != nil {
		if err := c.Registerer.Register(m.metrics); err != nil {
			return nil, fmt.Errorf("register heartbeat metrics: %w", err)
		}
	}
	return m, nil
}

// Register adds the service to a gRPC server.
func (m *Monitor) Register(on grpc.ServiceRegistrar) { pb.RegisterHeartbeatServer(on, m) }

// Interval and Timeout are those of the Config, with defaults.
func (m *Monitor) Interval() time.Duration { return m.cfg.Interval }

// Timeout is the age from which on a member counts as lost.
func (m *Monitor) Timeout() time.Duration { return m.cfg.Timeout }

// Run sends heartbeats until ctx ends, and then waits for those under way.
func (m *Monitor) Run(ctx context.Context) error {
	var calls sync.WaitGroup
	defer calls.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ticker := time.NewTicker(m.cfg.Interval)
	defer ticker.Stop()
	for {
		now := time.Now()
		reports, due := m.tick()
		for _, id := range due {
			calls.Go(func() { m.call(ctx, id, reports) })
		}
		select {
		case <-ticker.C:
			if stood := time.Since(now) - m.cfg.Interval; stood > m.cfg.Timeout {
				m.wake(stood)
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// wake notes that this process stood still.
func (m *Monitor) wake(stood time.Duration) {
	m.mu.Lock()
	m.resumed = time.Now()
	m.mu.Unlock()
	m.cfg.Changed(Change{Kind: Frozen, Node: m.cfg.Node, For: stood})
}

// tick judges who is lost, and returns what to send and to whom.
func (m *Monitor) tick() (reports []*pb.Report, due []txn.NodeID) {
	members := m.cfg.Peers()
	health := m.cfg.Health()
	var changes []Change
	m.mu.Lock()
	now := time.Now()
	m.awake, m.ticked = m.awakeLocked(now), now
	for id := range m.peers {
		if !slices.Contains(members, id) {
			delete(m.peers, id)
		}
	}
	for id := range m.reports {
		if !slices.Contains(members, id) {
			delete(m.reports, id)
		}
	}
	for _, id := range members {
		p := m.peers[id]
		if p == nil {
			p = &peer{}
			m.peers[id] = p
		}
		if p.heard && !m.hearsLocked(p, now) && now.Sub(m.resumed) > m.cfg.Timeout {
			p.heard, p.roundTrip = false, 0
			changes = append(changes, Change{Kind: Lost, Node: id, For: now.Sub(p.last)})
		}
		if p.unanswered < maxUnanswered {
			p.unanswered++
			due = append(due, id)
		}
	}
	m.sequence++
	reports = append(reports, m.ownLocked(now, health))
	for _, k := range m.reports {
		reports = append(reports, k.at(now))
	}
	m.mu.Unlock()
	for _, c := range changes {
		m.cfg.Changed(c)
	}
	return reports, due
}

// awakeLocked returns for how long this process has been at work. Of a time in which it was late for its own heartbeat only
// what it had planned counts, and half as much again: it was starved of the processor, and others' heartbeats lay unread
// meanwhile. Called with mu held.
func (m *Monitor) awakeLocked(now time.Time) time.Duration {
	return m.awake + min(now.Sub(m.ticked), m.cfg.Interval*3/2)
}

// hearsLocked reports whether a heartbeat of a member has come within the timeout, as far as this process was awake: who
// is starved does not blame others. Called with mu held.
func (m *Monitor) hearsLocked(p *peer, now time.Time) bool {
	return !p.last.IsZero() && m.awakeLocked(now)-p.lastAwake <= m.cfg.Timeout
}

// at returns the report as of now.
func (k *known) at(now time.Time) *pb.Report {
	return &pb.Report{
		Node: k.Node, Incarnation: k.Incarnation, Sequence: k.Sequence, AgeSeconds: now.Sub(k.made).Seconds(),
		SentSeconds: k.SentSeconds, Health: k.Health, Heard: k.Heard,
	}
}

// ownLocked makes this node's report. Called with mu held.
func (m *Monitor) ownLocked(now time.Time, health *pb.Health) *pb.Report {
	r := &pb.Report{
		Node: uint32(m.cfg.Node), Incarnation: m.incarnation, Sequence: m.sequence,
		SentSeconds: now.Sub(m.began).Seconds(), Health: health,
	}
	for id, p := range m.peers {
		r.Heard = append(r.Heard, p.cell(id, now, m.cfg.Interval))
	}
	slices.SortFunc(r.Heard, func(a, b *pb.Heard) int { return cmp.Compare(a.Node, b.Node) })
	return r
}

func (p *peer) cell(id txn.NodeID, now time.Time, interval time.Duration) *pb.Heard {
	h := &pb.Heard{Node: uint32(id), Loss: p.loss(now, interval), JitterSeconds: p.jitter}
	if !p.last.IsZero() {
		age := now.Sub(p.last).Seconds()
		h.AgeSeconds = &age
	}
	if p.roundTrip > 0 {
		roundTrip := p.roundTrip
		h.RoundTripSeconds = &roundTrip
	}
	return h
}

// window is how many heartbeats loss is a share of.
const window = 64

// loss is the share of the latest heartbeats that did not come, those included that should have come by now.
func (p *peer) loss(now time.Time, interval time.Duration) float64 {
	if p.last.IsZero() {
		return 0
	}
	overdue := uint64(0)
	if intervals := now.Sub(p.last) / interval; intervals > 1 {
		overdue = min(uint64(intervals)-1, window)
	}
	total := min(p.highest-p.first+1+overdue, window)
	got := uint64(0)
	if known := total - overdue; known > 0 {
		got = uint64(bits.OnesCount64(p.got << (window - known)))
	}
	return float64(total-got) / float64(total)
}

// call sends one heartbeat to a member.
func (m *Monitor) call(ctx context.Context, to txn.NodeID, reports []*pb.Report) {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.Timeout)
	defer cancel()
	conn, err := m.cfg.Conn(to)
	began := time.Now()
	if err == nil {
		_, err = pb.NewHeartbeatClient(conn).Beat(ctx, &pb.BeatRequest{
			Cluster: m.cfg.Cluster, ClusterId: m.cfg.ClusterID[:], To: uint32(to), Reports: reports,
		})
	}
	took := time.Since(began).Seconds()
	m.metrics.sent.Inc()
	if err != nil {
		m.metrics.failed.Inc() // why, the age that the receiver sees is the measure of
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.peers[to]
	if p == nil {
		return // removed meanwhile
	}
	p.unanswered--
	switch {
	case err != nil:
	case p.roundTrip == 0:
		p.roundTrip = took
	default:
		p.roundTrip += (took - p.roundTrip) / 8
	}
}

// Beat implements the RPC.
func (m *Monitor) Beat(_ context.Context, req *pb.BeatRequest) (*pb.BeatResponse, error) {
	if !bytes.Equal(req.GetClusterId(), m.cfg.ClusterID[:]) || req.GetTo() != uint32(m.cfg.Node) {
		return nil, status.Errorf(codes.FailedPrecondition, "a heartbeat for node %d of cluster %q (%x) reached node %s of cluster %q (%s)",
			req.GetTo(), req.GetCluster(), req.GetClusterId(), m.cfg.Node, m.cfg.Cluster, m.cfg.ClusterID)
	}
	if len(req.Reports) == 0 || len(req.Reports) > maxReports || slices.ContainsFunc(req.Reports, malformed) {
		return nil, status.Error(codes.InvalidArgument, "malformed heartbeat")
	}
	members := m.cfg.Peers()
	from := txn.NodeID(req.Reports[0].Node)
	if !slices.Contains(members, from) {
		return nil, status.Errorf(codes.PermissionDenied, "node %s is no other member", from)
	}
	m.metrics.received.Inc()
	m.mu.Lock()
	now := time.Now()
	change := m.takeLocked(from, req.Reports[0], now)
	for _, r := range req.Reports {
		if id := txn.NodeID(r.Node); slices.Contains(members, id) {
			m.learnLocked(id, r, now)
		}
	}
	m.mu.Unlock()
	if change.Kind != 0 {
		m.cfg.Changed(change)
	}
	return &pb.BeatResponse{}, nil
}

// Recall implements the RPC.
func (m *Monitor) Recall(_ context.Context, req *pb.RecallRequest) (*pb.RecallResponse, error) {
	if !bytes.Equal(req.GetClusterId(), m.cfg.ClusterID[:]) {
		return nil, status.Errorf(codes.FailedPrecondition, "node %s is of another cluster, %q (%s)", m.cfg.Node, m.cfg.Cluster, m.cfg.ClusterID)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return &pb.RecallResponse{Health: m.promised[txn.NodeID(req.GetNode())]}, nil
}

func malformed(r *pb.Report) bool {
	if r == nil || len(r.Heard) > maxReports || !duration(r.AgeSeconds) || !duration(r.SentSeconds) || r.Sequence == 0 || r.Incarnation == 0 {
		return true
	}
	return slices.ContainsFunc(r.Heard, func(h *pb.Heard) bool {
		return h == nil || !duration(h.GetAgeSeconds()) || !duration(h.GetRoundTripSeconds()) || !duration(h.Loss) || !duration(h.JitterSeconds)
	})
}

// duration reports whether seconds are some: at least 0, and within a time.Duration.
func duration(seconds float64) bool {
	return seconds >= 0 && seconds < math.MaxInt64/1e9
}

// takeLocked measures a heartbeat that has come from its sender. Called with mu held.
func (m *Monitor) takeLocked(from txn.NodeID, r *pb.Report, now time.Time) (change Change) {
	p := m.peers[from]
	if p == nil {
		p = &peer{}
		m.peers[from] = p
	}
	if r.Incarnation == p.before {
		return change // what an earlier process had sent last
	}
	silence := now.Sub(p.last)
	if p.last.IsZero() {
		silence = 0
	}
	if r.Incarnation != p.incarnation {
		if p.incarnation != 0 {
			change = Change{Kind: Restarted, Node: from, For: silence}
		}
		p.before, p.incarnation = p.incarnation, r.Incarnation
		p.first, p.highest, p.got, p.jitter = r.Sequence, r.Sequence, 1, 0
	} else {
		if r.Sequence > p.highest {
			// The spacing that the sender gave it against the one at which it came.
			spacing := now.Sub(p.last).Seconds() - (r.SentSeconds - p.sent)
			p.jitter += (math.Abs(spacing) - p.jitter) / 16
			p.got = p.got<<(r.Sequence-p.highest) | 1 // shifts beyond its width leave nothing
			p.highest = r.Sequence
		} else if late := p.highest - r.Sequence; late < window {
			p.got |= 1 << late
			p.first = min(p.first, r.Sequence)
		}
	}
	if r.Sequence == p.highest {
		p.last, p.lastAwake, p.sent = now, m.awakeLocked(now), r.SentSeconds
	}
	if !p.heard {
		p.heard = true
		if change.Kind == 0 {
			change = Change{Kind: Heard, Node: from, For: silence}
		}
	}
	return change
}

// learnLocked keeps a report if it is newer than the one at hand, and what it promises in any case. Of one process the
// higher number is newer; of different processes, the one that was made later. Called with mu held.
func (m *Monitor) learnLocked(id txn.NodeID, r *pb.Report, now time.Time) {
	if said, had := r.Health, m.promised[id]; said != nil && (had == nil || said.Term > had.Term || said.CommitIndex > had.CommitIndex) {
		m.promised[id] = &pb.Health{Term: max(said.Term, had.GetTerm()), CommitIndex: max(said.CommitIndex, had.GetCommitIndex())}
	}
	made := now.Add(-time.Duration(r.AgeSeconds * float64(time.Second)))
	if k := m.reports[id]; k != nil {
		if same := k.Incarnation == r.Incarnation; same && r.Sequence <= k.Sequence || !same && !made.After(k.made) {
			return
		}
	}
	m.reports[id] = &known{r, made}
	if m.news != nil {
		close(m.news)
		m.news = nil
	}
}

// News returns a channel that is closed when the next report of another member has come.
func (m *Monitor) News() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.news == nil {
		m.news = make(chan struct{})
	}
	return m.news
}

// EachHeard calls f, which must be quick, with the newest that each other member has said of itself, if one of its own
// heartbeats has come within the timeout.
func (m *Monitor) EachHeard(f func(id txn.NodeID, h *pb.Health)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	for id, p := range m.peers {
		if k := m.reports[id]; k != nil && k.Health != nil && m.hearsLocked(p, now) {
			f(id, k.Health)
		}
	}
}

// Reports returns the newest report of each member that is known, this node's own, made now with this health,
// included, ascending. Ages, those in the rows too, are as of now. The caller must not change what they point to.
func (m *Monitor) Reports(health *pb.Health) []*pb.Report {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	all := []*pb.Report{m.ownLocked(now, health)}
	for _, k := range m.reports {
		r := k.at(now)
		r.Heard = make([]*pb.Heard, 0, len(k.Heard))
		for _, h := range k.Heard {
			cell := &pb.Heard{Node: h.Node, RoundTripSeconds: h.RoundTripSeconds, Loss: h.Loss, JitterSeconds: h.JitterSeconds}
			if h.AgeSeconds != nil {
				age := *h.AgeSeconds + r.AgeSeconds
				cell.AgeSeconds = &age
			}
			r.Heard = append(r.Heard, cell)
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b *pb.Report) int { return cmp.Compare(a.Node, b.Node) })
	return all
}

// Hears reports whether a heartbeat of the member has come within the timeout.
func (m *Monitor) Hears(id txn.NodeID) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.peers[id]
	return p != nil && m.hearsLocked(p, time.Now())
}
