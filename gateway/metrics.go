package gateway

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/quorate/quorate/txn"
)

type metrics struct {
	sessions prometheus.Gauge
	commits  prometheus.Counter
	aborts   *prometheus.CounterVec
	wraps    prometheus.Counter
	repeats  prometheus.Counter
	refused  *prometheus.CounterVec
	evicted  prometheus.Counter
	marker   prometheus.Histogram
	commit   prometheus.Histogram
}

func newMetrics() *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "quorate_gateway_" + name, Help: help})
	}
	latency := func(name, help string) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Name: "quorate_gateway_" + name, Help: help,
			Buckets: prometheus.ExponentialBuckets(0.0001, 2, 18)}) // 0.1 ms … 13 s
	}
	vec := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "quorate_gateway_" + name, Help: help}, []string{label})
	}
	m := &metrics{
		sessions: prometheus.NewGauge(prometheus.GaugeOpts{Name: "quorate_gateway_sessions", Help: "Clients connected."}),
		commits:  counter("commits_total", "Replicated transactions that committed here."),
		aborts:   vec("aborts_total", "Transactions aborted instead of committed, by reason.", "reason"),
		wraps:    counter("statement_wraps_total", "Statements outside a block that were put into one."),
		repeats:  counter("statement_repeats_total", "Statements repeated because they turned out to write."),
		refused:  vec("refusals_total", "Statements and connections refused, by SQLSTATE.", "sqlstate"),
		evicted:  counter("evictions_total", "Transactions asked to make way for an entry of the log."),
		marker:   latency("marker_seconds", "Time from COMMIT to the marker's being written."),
		commit:   latency("commit_seconds", "Time from COMMIT to its answer, of replicated transactions."),
	}
	for reason := txn.AbortConflict; reason <= txn.AbortBehind; reason++ {
		m.aborts.WithLabelValues(reason.String())
	}
	return m
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.sessions, m.commits, m.aborts, m.wraps, m.repeats, m.refused, m.evicted, m.marker, m.commit}
}

func (m *metrics) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	var err error
	for _, c := range m.all() {
		err = errors.Join(err, r.Register(c))
	}
	return err
}

func (m *metrics) unregister(r prometheus.Registerer) {
	if r == nil {
		return
	}
	for _, c := range m.all() {
		r.Unregister(c)
	}
}
