package apply

import (
	"errors"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	transactions *prometheus.CounterVec
	group        prometheus.Histogram
	execution    prometheus.Histogram
	publishing   prometheus.Histogram
	evictions    *prometheus.CounterVec
	retries      *prometheus.CounterVec
	remote       prometheus.Counter
	local        prometheus.Counter
}

func newMetrics(r prometheus.Registerer, p *Pipeline) *metrics {
	seconds := prometheus.ExponentialBuckets(0.0001, 2, 16)
	m := &metrics{
		transactions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "quorate_apply_transactions_total", Help: "Transactions made visible, by where they ran.",
		}, []string{"origin"}),
		group: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "quorate_apply_group_transactions", Help: "Remote transactions that became visible at once.",
			Buckets: prometheus.ExponentialBuckets(1, 2, 8),
		}),
		execution: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "quorate_apply_execution_seconds", Help: "Time to execute the changes of one group, without waiting for its turn; with the COMMIT if it was its turn already.",
			Buckets: seconds,
		}),
		publishing: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "quorate_apply_publish_seconds", Help: "Time from executed, or for a local transaction from released, to visible; not of groups whose COMMIT went with their changes.",
			Buckets: seconds,
		}),
		evictions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "quorate_apply_evictions_total", Help: "Blockers of a committed transaction that were ended, by kind.",
		}, []string{"kind"}),
		retries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "quorate_apply_retries_total", Help: "Executions that had to be repeated, by reason.",
		}, []string{"reason"}),
	}
	for _, kind := range []string{"worker", "session", "other"} {
		m.evictions.WithLabelValues(kind)
	}
	m.remote, m.local = m.transactions.WithLabelValues("remote"), m.transactions.WithLabelValues("local")
	if r == nil {
		return m
	}
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	r.MustRegister(m.transactions, m.group, m.execution, m.publishing, m.evictions, m.retries,
		gauge("quorate_apply_queue_transactions", "Transactions that are decided but not visible.", func() float64 { n, _, _ := p.lag(); return float64(n) }),
		gauge("quorate_apply_queue_bytes", "Memory of the write sets of those.", func() float64 { _, n, _ := p.lag(); return float64(n) }),
		gauge("quorate_apply_lag_seconds", "How long the next transaction has been waiting to become visible.", func() float64 { _, _, d := p.lag(); return d.Seconds() }),
		gauge("quorate_apply_applied_csn", "CSN up to which everything is visible.", func() float64 { return float64(p.Applied()) }),
		gauge("quorate_apply_durable_csn", "CSN up to which everything is on disk: the log is never truncated past it.", func() float64 { return float64(p.Durable()) }))
	return m
}

func (m *metrics) applied(e *entry) {
	if e.local != nil {
		m.local.Inc()
		return
	}
	m.remote.Add(float64(len(e.items)))
	m.group.Observe(float64(len(e.items)))
}

func (m *metrics) executed(d time.Duration)  { m.execution.Observe(d.Seconds()) }
func (m *metrics) published(d time.Duration) { m.publishing.Observe(d.Seconds()) }
func (m *metrics) evicted(kind string)       { m.evictions.WithLabelValues(kind).Inc() }

func (m *metrics) retry(cause error) {
	reason := "data" // a row was not what it must be: it was tried too early, or the node has diverged
	var server *pgconn.PgError
	switch {
	case errors.Is(cause, errConnection):
		reason = "connection"
	case errors.Is(cause, errEvicted):
		reason = "evicted"
	case errors.As(cause, &server):
		reason = "sqlstate_" + server.Code
	}
	m.retries.WithLabelValues(reason).Inc()
}
