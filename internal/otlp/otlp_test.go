package otlp_test

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/quorate/quorate/internal/otlp"
	"github.com/quorate/quorate/txn"
)

// span is what a collector reads of one.
type span struct {
	TraceID, SpanID, ParentSpanID, Name string
	StartTimeUnixNano, EndTimeUnixNano  string
	Status                              struct{ Code int }
}

// collector takes spans as OTLP's JSON form prescribes, and nothing else.
type collector struct {
	t      *testing.T
	mu     sync.Mutex
	spans  []span
	refuse bool
}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refuse {
		http.Error(w, "busy", http.StatusServiceUnavailable)
		return
	}
	body, err := io.ReadAll(r.Body)
	var req struct {
		ResourceSpans []struct {
			Resource struct {
				Attributes []struct {
					Key   string
					Value struct{ StringValue string }
				}
			}
			ScopeSpans []struct{ Spans []span }
		}
	}
	if err != nil || json.Unmarshal(body, &req) != nil || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/json" || r.URL.Path != "/v1/traces" {
		c.t.Errorf("request %s %s %v: %s", r.Method, r.URL, r.Header, body)
		return
	}
	for _, rs := range req.ResourceSpans {
		if rs.Resource.Attributes[0].Key != "service.name" || rs.Resource.Attributes[0].Value.StringValue != "quorate" {
			c.t.Errorf("resource %+v", rs.Resource)
		}
		for _, ss := range rs.ScopeSpans {
			c.spans = append(c.spans, ss.Spans...)
		}
	}
}

// export runs an exporter of a node over some spans, to its end.
func export(t *testing.T, c *collector, node txn.NodeID, sample float64, spans ...otlp.Span) {
	t.Helper()
	server := httptest.NewServer(c)
	defer server.Close()
	e := otlp.New(otlp.Config{Endpoint: server.URL + "/v1/traces", Sample: sample, Node: node, Cluster: "c", Version: "v", Logger: slog.New(slog.DiscardHandler)})
	for _, s := range spans {
		e.Record(s)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := e.Run(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestNodesShareATrace(t *testing.T) {
	gid := txn.GID{Node: 1, Incarnation: 0xabc, Sequence: 7}
	began := time.Unix(1_800_000_000, 123)
	c := &collector{t: t}
	export(t, c, 1, 1, otlp.Span{GID: gid, Name: "order", From: began, To: began.Add(time.Millisecond), CSN: 5},
		otlp.Span{GID: gid, Name: otlp.Root, From: began, To: began.Add(2 * time.Millisecond), CSN: 5, Outcome: "committed"})
	export(t, c, 2, 1, otlp.Span{GID: gid, Name: "apply", From: began, To: began.Add(time.Millisecond)})
	export(t, c, 3, 1, otlp.Span{GID: gid, Name: "apply", From: began, To: began.Add(time.Millisecond)},
		otlp.Span{GID: txn.GID{Node: 1, Incarnation: 0xabc, Sequence: 8}, Name: otlp.Root, From: began, To: began, Outcome: "conflict"})
	if len(c.spans) != 5 {
		t.Fatalf("%d spans", len(c.spans))
	}
	root, ids := c.spans[1], map[string]bool{}
	if root.Name != "commit" || root.ParentSpanID != "" || len(root.TraceID) != 32 || len(root.SpanID) != 16 || root.StartTimeUnixNano != "1800000000000000123" || root.Status.Code != 0 {
		t.Errorf("root %+v", root)
	}
	for i, s := range c.spans[:4] {
		if s.TraceID != root.TraceID || i != 1 && s.ParentSpanID != root.SpanID || ids[s.SpanID] {
			t.Errorf("span %+v of %+v", s, root)
		}
		ids[s.SpanID] = true
	}
	if other := c.spans[4]; other.TraceID == root.TraceID || other.Status.Code != 2 {
		t.Errorf("of another transaction: %+v", other)
	}
}

func TestSampling(t *testing.T) {
	var spans []otlp.Span
	for i := range uint64(2000) {
		spans = append(spans, otlp.Span{GID: txn.GID{Node: 1, Incarnation: 1, Sequence: i + 1}, Name: otlp.Root})
	}
	one, other, none := &collector{t: t}, &collector{t: t}, &collector{t: t}
	export(t, one, 1, 0.1, spans...)
	export(t, other, 2, 0.1, spans...)
	export(t, none, 1, 0, spans...)
	if n := len(one.spans); n < 120 || n > 280 || len(other.spans) != n || len(none.spans) != 0 {
		t.Fatalf("%d and %d of 2000 at a tenth, %d at none", n, len(other.spans), len(none.spans))
	}
	for i := range one.spans {
		if one.spans[i].TraceID != other.spans[i].TraceID {
			t.Fatal("nodes sample different transactions")
		}
	}
}

// A collector that takes nothing costs nothing but its spans.
func TestRefusal(t *testing.T) {
	c := &collector{t: t, refuse: true}
	export(t, c, 1, 1, otlp.Span{GID: txn.GID{Node: 1, Incarnation: 1, Sequence: 1}, Name: otlp.Root})
	if len(c.spans) != 0 {
		t.Errorf("%d spans", len(c.spans))
	}
	e := otlp.New(otlp.Config{Endpoint: "http://127.0.0.1:1/", Sample: 1, Logger: slog.New(slog.DiscardHandler)})
	for i := range uint64(20000) { // far more than are kept
		e.Record(otlp.Span{GID: txn.GID{Node: 1, Incarnation: 1, Sequence: i + 1}, Name: otlp.Root})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := e.Run(ctx); err != nil {
		t.Fatal(err)
	}
}
