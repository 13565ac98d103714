package config

import (
	"net/url"
	"strconv"
)

// Tracing sends spans of transactions to an OpenTelemetry collector.
type Tracing struct {
	// Endpoint is the URL at which a collector takes traces over HTTP, for example http://127.0.0.1:4318/v1/traces.
	// Default empty: nothing is traced, at no cost.
	Endpoint string `yaml:"endpoint,omitempty"`
	// Sample is the share of transactions that are traced, from 0.0001 to 1. Which ones, their GIDs say, so that all
	// nodes with the same share trace the same. Default 0.01.
	Sample float64 `yaml:"sample,omitempty"`
}

const defaultSample = 0.01

func (t Tracing) validate(v *validator) {
	if t.Sample < 0.0001 || t.Sample > 1 {
		v.add("tracing.sample", strconv.FormatFloat(t.Sample, 'g', -1, 64), "must be from 0.0001 to 1")
	}
	if t.Endpoint == "" {
		return
	}
	if u, err := url.Parse(t.Endpoint); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		v.add("tracing.endpoint", t.Endpoint, "must be a URL such as http://127.0.0.1:4318/v1/traces")
	}
}
