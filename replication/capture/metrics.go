package capture

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	open       prometheus.Gauge
	memory     prometheus.Gauge
	spilled    prometheus.Counter
	changes    prometheus.Counter
	strays     prometheus.Counter
	reconnects prometheus.Counter
	assemble   prometheus.Histogram
	delivery   prometheus.Histogram
	markers    struct{ complete, empty, unsealed, failed, ignored prometheus.Counter }
}

func newMetrics(r prometheus.Registerer) *metrics {
	const prefix = "quorate_capture_"
	buckets := prometheus.ExponentialBuckets(25e-6, 2.5, 14) // 25 µs to 3.7 s
	m := &metrics{
		open:       prometheus.NewGauge(prometheus.GaugeOpts{Name: prefix + "open_transactions", Help: "Transactions that have written something and not ended."}),
		memory:     prometheus.NewGauge(prometheus.GaugeOpts{Name: prefix + "memory_bytes", Help: "Changes of open transactions held in memory."}),
		spilled:    prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + "spilled_bytes_total", Help: "Changes of open transactions written to spill files."}),
		changes:    prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + "changes_total", Help: "Changes received that are to be replicated if their transaction commits."}),
		strays:     prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + "strays_total", Help: "Transactions that committed changes behind the gateway's back."}),
		reconnects: prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + "reconnects_total", Help: "Replication connections that were lost or could not be made."}),
		assemble:   prometheus.NewHistogram(prometheus.HistogramOpts{Name: prefix + "assemble_seconds", Help: "Time to make a write set at its marker.", Buckets: buckets}),
		delivery:   prometheus.NewHistogram(prometheus.HistogramOpts{Name: prefix + "delivery_seconds", Help: "From the server's sending of a marker until its write set is complete.", Buckets: buckets}),
	}
	markers := prometheus.NewCounterVec(prometheus.CounterOpts{Name: prefix + "markers_total", Help: "Markers, by what became of them: a complete write set, an empty one, one whose seal is missing, a failure, or ignored because nobody waits for it."}, []string{"result"})
	m.markers.complete = markers.WithLabelValues("complete")
	m.markers.empty = markers.WithLabelValues("empty")
	m.markers.unsealed = markers.WithLabelValues("unsealed")
	m.markers.failed = markers.WithLabelValues("failed")
	m.markers.ignored = markers.WithLabelValues("ignored")
	r.MustRegister(m.open, m.memory, m.spilled, m.changes, m.strays, m.reconnects, m.assemble, m.delivery, markers)
	return m
}
