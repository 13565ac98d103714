package control

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// spans is a collector of traces. It remembers which nodes told what of which transaction.
type spans struct {
	mu   sync.Mutex
	seen map[string][]string // by GID: trace, node, name
}

func (s *spans) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	type attributes []struct {
		Key   string
		Value struct{ StringValue string }
	}
	find := func(all attributes, key string) string {
		for _, a := range all {
			if a.Key == key {
				return a.Value.StringValue
			}
		}
		return ""
	}
	var req struct {
		ResourceSpans []struct {
			Resource   struct{ Attributes attributes }
			ScopeSpans []struct {
				Spans []struct {
					TraceID, Name string
					Attributes    attributes
				}
			}
		}
	}
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, rs := range req.ResourceSpans {
		for _, ss := range rs.ScopeSpans {
			for _, span := range ss.Spans {
				gid := find(span.Attributes, "quorate.gid")
				s.seen[gid] = append(s.seen[gid], span.TraceID+" "+find(rs.Resource.Attributes, "service.instance.id")+" "+span.Name)
			}
		}
	}
}

// A transaction is followed by its GID from the gateway to the last node, in logs and in one trace.
func TestTracing(t *testing.T) {
	c, ctx := start(t)
	collected := &spans{seen: make(map[string][]string)}
	collector := httptest.NewServer(collected)
	defer collector.Close()
	for node := 1; node <= c.Nodes; node++ {
		file := filepath.Join(c.NodeDir(node), "quorate.yaml")
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		// Back at the end: the collector is gone then.
		t.Cleanup(func() {
			if err := os.WriteFile(file, text, 0o644); err != nil {
				t.Error(err)
			}
		})
		if err := os.WriteFile(file, fmt.Appendf(slices.Clone(text), "tracing: {endpoint: %q, sample: 1}\nlog: {level: debug}\n", collector.URL+"/v1/traces"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := c.KillNode(ctx, node); err != nil {
			t.Fatal(err)
		}
		restart(t, ctx, c, node)
	}
	conn, err := c.Connect(ctx, 2)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var gid string
	tx, err := conn.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := tx.QueryRow(ctx, "SELECT quorate.current_gid()").Scan(&gid); err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(ctx, "UPDATE account SET v = v + 1 WHERE id = 99"); err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	await(t, ctx, "the trace", func() error {
		collected.mu.Lock()
		defer collected.mu.Unlock()
		seen := collected.seen[gid]
		for _, want := range []string{"2 capture", "2 queue", "2 order", "2 publish", "2 commit", "1 apply", "3 apply"} {
			if !slices.ContainsFunc(seen, func(s string) bool { return strings.HasSuffix(s, " "+want) }) {
				return fmt.Errorf("%s is not among %q", want, seen)
			}
		}
		for _, s := range seen {
			if s[:32] != seen[0][:32] {
				return fmt.Errorf("more than one trace: %q", seen)
			}
		}
		return nil
	})
	await(t, ctx, "the logs", func() error {
		for _, line := range []string{"node=2 gid=" + gid + " span=commit", "node=1 gid=" + gid + " span=apply", "node=3 gid=" + gid + " span=apply"} {
			if !strings.Contains(c.Logs(2000), line) {
				return fmt.Errorf("%q is in no log", line)
			}
		}
		return nil
	})
}
