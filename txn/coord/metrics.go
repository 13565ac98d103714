package coord

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/quorate/quorate/txn"
)

type metrics struct {
	capture prometheus.Histogram
	order   prometheus.Histogram
	total   prometheus.Histogram
	batch   prometheus.Histogram
	decided *prometheus.CounterVec
	nudges  prometheus.Counter
}

func newMetrics(r prometheus.Registerer) metrics {
	buckets := prometheus.ExponentialBuckets(0.0001, 2, 18) // 0.1 ms to 13 s
	m := metrics{
		capture: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "quorate_coord_capture_seconds", Help: "From the start of a commit until its write set is complete (marker and decoding).", Buckets: buckets}),
		order:   prometheus.NewHistogram(prometheus.HistogramOpts{Name: "quorate_coord_order_seconds", Help: "From a complete write set to its verdict (batching, Raft, certification).", Buckets: buckets}),
		total:   prometheus.NewHistogram(prometheus.HistogramOpts{Name: "quorate_coord_commit_seconds", Help: "From the start of a commit until the server has committed it.", Buckets: buckets}),
		batch:   prometheus.NewHistogram(prometheus.HistogramOpts{Name: "quorate_coord_batch_transactions", Help: "Transactions per proposed log entry.", Buckets: prometheus.ExponentialBuckets(1, 2, 9)}),
		decided: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "quorate_coord_transactions_total", Help: "This node's own transactions by verdict; reason none is a commit."}, []string{"reason"}),
		nudges:  prometheus.NewCounter(prometheus.CounterOpts{Name: "quorate_coord_nudges_total", Help: "Markers that arrived before their seal."}),
	}
	for reason := txn.AbortNone; reason <= txn.AbortBehind; reason++ {
		m.decided.WithLabelValues(reason.String())
	}
	r.MustRegister(m.capture, m.order, m.total, m.batch, m.decided, m.nudges)
	return m
}
