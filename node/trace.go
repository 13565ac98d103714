package node

import (
	"context"
	"log/slog"
	"time"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/internal/otlp"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/coord"
)

// A transaction is followed by its GID: at debug level every part of its life, at its origin and wherever else it is
// applied, is a line of the log; with tracing in the configuration some transactions' parts are spans. Otherwise nobody
// is called, and nothing is measured that metrics do not measure anyway.

// openTracing begins to send spans, if there is somebody who takes them.
func (n *Node) openTracing(context.Context) error {
	if n.cfg.Tracing.Endpoint == "" {
		return nil
	}
	n.traces = otlp.New(otlp.Config{
		Endpoint: n.cfg.Tracing.Endpoint, Sample: n.cfg.Tracing.Sample, Node: n.cfg.Node, Cluster: n.cfg.Cluster, Version: n.version,
		Logger: n.log.With(logkey.Component, "tracing"),
	})
	n.alongside(n.traces.Run)
	return nil
}

// following reports whether transactions are to be followed at all.
func (n *Node) following() bool {
	return n.traces != nil || n.log.Enabled(context.Background(), slog.LevelDebug)
}

// traceCommit returns what takes the parts of this node's own transactions, nil if nobody wants them.
func (n *Node) traceCommit() func(coord.Span) {
	if !n.following() {
		return nil
	}
	return func(s coord.Span) { n.follow(otlp.Span(s)) }
}

// traceApply returns what takes other nodes' transactions when they have become visible here.
func (n *Node) traceApply() func(txn.GID, txn.CSN, time.Time) {
	if !n.following() {
		return nil
	}
	return func(gid txn.GID, csn txn.CSN, queued time.Time) {
		n.follow(otlp.Span{GID: gid, Name: "apply", From: queued, To: time.Now(), CSN: csn})
	}
}

func (n *Node) follow(s otlp.Span) {
	if n.traces != nil {
		n.traces.Record(s)
	}
	if n.log.Enabled(context.Background(), slog.LevelDebug) { // before its attributes are made
		n.log.Debug("transaction", logkey.GID, s.GID, "span", s.Name, logkey.Duration, s.To.Sub(s.From), logkey.CSN, s.CSN, "outcome", s.Outcome)
	}
}
