package heartbeat

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	m                      *Monitor
	sent, failed, received prometheus.Counter
}

var (
	ageDesc = prometheus.NewDesc("quorate_heartbeat_age_seconds",
		"Time since the last heartbeat of another member arrived here.", []string{"peer"}, nil)
	roundTripDesc = prometheus.NewDesc("quorate_heartbeat_round_trip_seconds",
		"Time for a heartbeat to another member and its answer, smoothed.", []string{"peer"}, nil)
	lossDesc = prometheus.NewDesc("quorate_heartbeat_loss_ratio",
		"Share of the latest 64 heartbeats of another member that did not arrive.", []string{"peer"}, nil)
	jitterDesc = prometheus.NewDesc("quorate_heartbeat_jitter_seconds",
		"How much the spacing of another member's heartbeats varies, smoothed.", []string{"peer"}, nil)
)

func newMetrics(m *Monitor) *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "quorate_heartbeat_" + name, Help: help})
	}
	return &metrics{
		m:        m,
		sent:     counter("sent_total", "Heartbeats sent to other members."),
		failed:   counter("failed_total", "Heartbeats of those that were not answered in time."),
		received: counter("received_total", "Heartbeats received from other members."),
	}
}

// Describe implements prometheus.Collector.
func (c *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{ageDesc, roundTripDesc, lossDesc, jitterDesc} {
		ch <- d
	}
	for _, counter := range []prometheus.Counter{c.sent, c.failed, c.received} {
		counter.Describe(ch)
	}
}

// Collect implements prometheus.Collector. A member that was never heard has no age.
func (c *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, counter := range []prometheus.Counter{c.sent, c.failed, c.received} {
		counter.Collect(ch)
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	now := time.Now()
	for id, p := range c.m.peers {
		cell := p.cell(id, now, c.m.cfg.Interval)
		name := strconv.FormatUint(uint64(id), 10)
		gauge := func(d *prometheus.Desc, value float64) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, name)
		}
		if cell.AgeSeconds != nil {
			gauge(ageDesc, *cell.AgeSeconds)
			gauge(lossDesc, cell.Loss)
			gauge(jitterDesc, cell.JitterSeconds)
		}
		if cell.RoundTripSeconds != nil {
			gauge(roundTripDesc, *cell.RoundTripSeconds)
		}
	}
}
