package consensus

import (
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/quorate/quorate/txn"
)

type metrics struct {
	proposeSeconds prometheus.Histogram
	failures       *prometheus.CounterVec
	elections      prometheus.Counter
	notices        prometheus.Counter
	flushes        prometheus.Counter
	verifications  *prometheus.CounterVec
	refusals       *prometheus.CounterVec

	all      []prometheus.Collector
	registry prometheus.Registerer
}

const (
	namespace = "quorate"
	subsystem = "consensus"
)

// newMetrics makes the metrics. status is called from register until unregister.
func newMetrics(status func() Status, kept func() (bytes, entries uint64), bounds *Config) *metrics {
	counter := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help}
	}
	gauge := func(name, help string, of func(Status) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(
			prometheus.GaugeOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help},
			func() float64 { return of(status()) })
	}
	m := &metrics{
		proposeSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "propose_seconds",
			Help:    "Time from proposing an entry on this node until it was known to be committed.",
			Buckets: prometheus.ExponentialBuckets(0.00025, 2, 16),
		}),
		failures: prometheus.NewCounterVec(
			counter("proposals_failed_total", "Proposals of this node that failed, by what is known of them."), []string{"outcome"}),
		elections: prometheus.NewCounter(
			counter("elections_total", "Elections that this node has stood for.")),
		notices: prometheus.NewCounter(
			counter("notices_injected_total", "Commit notices that told this node's Raft of a commit before the leader's next message.")),
		flushes: prometheus.NewCounter(
			counter("log_flushes_total", "Appends to this node's log; each is one flush of its file.")),
		verifications: prometheus.NewCounterVec(
			counter("log_verifications_total", "Comparisons of a range of this node's log with the leader's checksum."), []string{"result"}),
	}
	m.refusals = prometheus.NewCounterVec(
		counter("connections_refused_total", "Raft connections to this node that were turned away, by why."), []string{"reason"})
	m.all = []prometheus.Collector{
		m.proposeSeconds, m.failures, m.elections, m.notices, m.flushes, m.verifications, m.refusals,
		gauge("leader_node", "The node that this node believes to lead; 0: none.", func(s Status) float64 { return float64(s.Leader) }),
		gauge("term", "Raft's current term.", func(s Status) float64 { return float64(s.Term) }),
		gauge("last_index", "Index of the last entry in this node's log.", func(s Status) float64 { return float64(s.LastIndex) }),
		gauge("commit_index", "Index of the last entry known to be committed.", func(s Status) float64 { return float64(s.CommitIndex) }),
		gauge("quorum_contact_age_seconds", "Time since this node last knew that a majority was there.", func(s Status) float64 {
			return time.Since(s.QuorumContact).Seconds()
		}),
		gauge("applied_index", "Index of the last entry that this node's state machine has taken.", func(s Status) float64 { return float64(s.AppliedIndex) }),
	}
	for name, of := range map[string]struct {
		help  string
		value func() uint64
	}{
		"log_bytes":         {"Bytes of the entries in this node's log.", func() uint64 { bytes, _ := kept(); return bytes }},
		"log_entries":       {"Entries in this node's log.", func() uint64 { _, entries := kept(); return entries }},
		"log_bytes_limit":   {"Bytes of entries that may stay in the log behind a snapshot.", func() uint64 { return bounds.TrailingBytes }},
		"log_entries_limit": {"Entries that may stay in the log behind a snapshot.", func() uint64 { return bounds.TrailingLogs }},
	} {
		m.all = append(m.all, prometheus.NewGaugeFunc(
			prometheus.GaugeOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: of.help},
			func() float64 { return float64(of.value()) }))
	}
	for _, outcome := range []string{outcomeRefused, outcomeUnknown} {
		m.failures.WithLabelValues(outcome)
	}
	for _, reason := range refusals {
		m.refusals.WithLabelValues(reason)
	}
	return m
}

func (m *metrics) register(with prometheus.Registerer) error {
	if with == nil {
		return nil
	}
	m.registry = with
	for i, collector := range m.all {
		if err := with.Register(collector); err != nil {
			m.all = m.all[:i] // what unregister is to take back
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	return nil
}

const (
	outcomeRefused = "refused"
	outcomeUnknown = "unknown"
)

func (m *metrics) proposalFailed(err error) {
	outcome := outcomeRefused
	if errors.Is(err, txn.ErrOutcomeUnknown) {
		outcome = outcomeUnknown
	}
	m.failures.WithLabelValues(outcome).Inc()
}

func (m *metrics) unregister() {
	if m.registry == nil {
		return
	}
	for _, collector := range m.all {
		m.registry.Unregister(collector)
	}
}
