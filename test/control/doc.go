// Package control tests what an operator looks at, with the programs that operators use: psql, grpcurl, Prometheus and
// promtool, HAProxy, and quorate's own command line, all against a real cluster.
package control
