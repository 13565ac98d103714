// Package otlp sends spans of transactions to an OpenTelemetry collector, in the JSON form of OTLP over HTTP, which every
// collector takes. OpenTelemetry's own library would do that with some thirty modules and a context handed through every
// call; here neither is needed. A transaction's GID is known wherever something happens to it, so the trace's id is made
// of the GID: all nodes add to one trace without telling each other, and all sample the same transactions.
package otlp

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
)

// Config of an Exporter. All fields are required.
type Config struct {
	Endpoint string  // the URL that takes traces, such as http://127.0.0.1:4318/v1/traces
	Sample   float64 // the share of transactions that are traced, 0 to 1
	Node     txn.NodeID
	Cluster  string
	Version  string
	Logger   *slog.Logger
}

// Span is a part of a transaction's life.
type Span struct {
	GID      txn.GID
	Name     string // Root for the whole; each other name once for a transaction and node
	From, To time.Time
	CSN      txn.CSN // 0: none
	Outcome  string  // of Root: "committed", or why not
}

// Root is the name of the span that the others are parts of. The origin sends it, at the end.
const Root = "commit"

// Bounds: spans that wait, those sent at once, and how long that may take. What does not fit is left out: tracing never
// holds up a transaction.
const (
	maxWaiting = 8192
	maxBatch   = 512
	interval   = time.Second
	timeout    = 5 * time.Second
)

// Exporter is safe for concurrent use. Nothing is sent before Run.
type Exporter struct {
	cfg    Config
	limit  uint64 // of the hash of those that are traced
	client http.Client

	mu      sync.Mutex
	waiting []Span
	omitted int
}

// New returns an Exporter.
func New(c Config) *Exporter {
	e := &Exporter{cfg: c, client: http.Client{Timeout: timeout}}
	if c.Sample >= 1 {
		e.limit = math.MaxUint64
	} else {
		e.limit = uint64(c.Sample * math.MaxUint64)
	}
	return e
}

// identify returns the ids of a transaction's trace and root span, and the hash by which it is sampled.
func identify(gid txn.GID) (trace [16]byte, root [8]byte, hash uint64) {
	sum := sha256.Sum256([]byte("quorate " + gid.String()))
	return [16]byte(sum[:16]), [8]byte(sum[16:24]), binary.BigEndian.Uint64(sum[24:])
}

// Record takes a span, if its transaction is among those that are traced. It does not block.
func (e *Exporter) Record(s Span) {
	if _, _, hash := identify(s.GID); hash > e.limit || e.limit == 0 {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.waiting) == maxWaiting {
		e.omitted++
		return
	}
	e.waiting = append(e.waiting, s)
}

// Run sends what was recorded until ctx ends, and then what is left.
func (e *Exporter) Run(ctx context.Context) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	failing := false
	for {
		ended := false
		select {
		case <-ticker.C:
		case <-ctx.Done():
			ended = true
		}
		err := e.send(context.WithoutCancel(ctx))
		if err != nil != failing { // once, not every second
			if failing = err != nil; failing {
				e.cfg.Logger.Warn("traces are not taken", logkey.Error, err)
			} else {
				e.cfg.Logger.Info("traces are taken again")
			}
		}
		if ended {
			return nil
		}
	}
}

// send sends everything that waits. What is not taken is left out.
func (e *Exporter) send(ctx context.Context) error {
	e.mu.Lock()
	all, omitted := e.waiting, e.omitted
	e.waiting, e.omitted = nil, 0
	e.mu.Unlock()
	if omitted > 0 {
		e.cfg.Logger.Warn("spans were left out", "spans", omitted)
	}
	for len(all) > 0 {
		batch := all[:min(len(all), maxBatch)]
		all = all[len(batch):]
		if err := e.post(ctx, batch); err != nil {
			return err
		}
	}
	return nil
}

func (e *Exporter) post(ctx context.Context, batch []Span) error {
	body, err := json.Marshal(e.encode(batch))
	if err != nil {
		return fmt.Errorf("encode spans: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, e.cfg.Endpoint, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("send spans: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := e.client.Do(req)
	if err != nil {
		return fmt.Errorf("send spans: %w", err)
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<16)) // so that the connection can be used again
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("send spans: %s", resp.Status)
	}
	return nil
}

// The JSON form of OTLP: https://opentelemetry.io/docs/specs/otlp/. Ids are hexadecimal, 64-bit numbers are strings.
type (
	request struct {
		ResourceSpans []resourceSpans `json:"resourceSpans"`
	}
	resourceSpans struct {
		Resource   resource     `json:"resource"`
		ScopeSpans []scopeSpans `json:"scopeSpans"`
	}
	resource struct {
		Attributes []attribute `json:"attributes"`
	}
	scopeSpans struct {
		Scope scope  `json:"scope"`
		Spans []span `json:"spans"`
	}
	scope struct {
		Name    string `json:"name"`
		Version string `json:"version"`
	}
	span struct {
		TraceID    string      `json:"traceId"`
		SpanID     string      `json:"spanId"`
		ParentID   string      `json:"parentSpanId,omitempty"`
		Name       string      `json:"name"`
		Kind       int         `json:"kind"`
		Start      string      `json:"startTimeUnixNano"`
		End        string      `json:"endTimeUnixNano"`
		Attributes []attribute `json:"attributes"`
		Status     *result     `json:"status,omitempty"`
	}
	result struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	}
	attribute struct {
		Key   string `json:"key"`
		Value value  `json:"value"`
	}
	value struct {
		String string `json:"stringValue"`
	}
)

const (
	kindInternal = 1
	statusError  = 2
	committed    = "committed"
)

func (e *Exporter) encode(batch []Span) request {
	spans := make([]span, 0, len(batch))
	for _, s := range batch {
		trace, root, _ := identify(s.GID)
		encoded := span{
			TraceID: hex.EncodeToString(trace[:]), SpanID: hex.EncodeToString(root[:]), Name: s.Name, Kind: kindInternal,
			Start: strconv.FormatInt(s.From.UnixNano(), 10), End: strconv.FormatInt(s.To.UnixNano(), 10),
			Attributes: []attribute{{"quorate.gid", value{s.GID.String()}}},
		}
		if s.CSN != 0 {
			encoded.Attributes = append(encoded.Attributes, attribute{"quorate.csn", value{strconv.FormatUint(uint64(s.CSN), 10)}})
		}
		if s.Outcome != "" {
			encoded.Attributes = append(encoded.Attributes, attribute{"quorate.outcome", value{s.Outcome}})
			if s.Outcome != committed {
				encoded.Status = &result{statusError, s.Outcome}
			}
		}
		if s.Name != Root {
			encoded.ParentID = encoded.SpanID
			id := sha256.Sum256(fmt.Appendf(trace[:], " %d %s", e.cfg.Node, s.Name))
			encoded.SpanID = hex.EncodeToString(id[:8])
		}
		spans = append(spans, encoded)
	}
	return request{[]resourceSpans{{
		resource{[]attribute{
			{"service.name", value{"quorate"}}, {"service.namespace", value{e.cfg.Cluster}}, {"service.instance.id", value{e.cfg.Node.String()}},
			{"service.version", value{e.cfg.Version}},
		}},
		[]scopeSpans{{scope{"quorate", e.cfg.Version}, spans}},
	}}}
}
