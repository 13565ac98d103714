package dashboard_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/dashboard"
)

// request makes a request and returns its answer, whose body is closed with the test.
func request(t *testing.T, method, url, body string, header ...string) *http.Response {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		if header[i] == "Host" {
			r.Host = header[i+1]
		}
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

// roles are tokens as a node would have them.
func roles(r *http.Request) dashboard.Role {
	return map[string]dashboard.Role{
		"Bearer look": dashboard.Reader, "Bearer act": dashboard.Operator,
	}[r.Header.Get("Authorization")]
}

const jsonType = "application/json"

func TestWhoMayWhat(t *testing.T) {
	_, url := serve(t, dashboard.Config{Source: three(), Role: roles})
	drain := `{"action":"drain","node":2}`
	for _, c := range []struct {
		name, method, path, body, token string
		want                            int
	}{
		{"anybody gets the page", "GET", "/", "", "", 200},
		{"anybody gets the script", "GET", "/dashboard/page.js", "", "", 200},
		{"nobody looks", "GET", "/dashboard/stream", "", "", 401},
		{"a wrong token does not look", "GET", "/dashboard/stream", "", "wrong", 401},
		{"a reader looks", "GET", "/dashboard/stream", "", "look", 200},
		{"nobody acts", "POST", "/dashboard/action", drain, "", 401},
		{"a reader does not act", "POST", "/dashboard/action", drain, "look", 403},
		{"an operator acts", "POST", "/dashboard/action", drain, "act", 200},
		{"actions are posted", "GET", "/dashboard/action", "", "act", 405},
		{"nothing else is there", "GET", "/dashboard/page/index.html", "", "act", 404},
		{"nothing above is there", "GET", "/dashboard/..%2f..%2fetc/passwd", "", "act", 404},
	} {
		t.Run(c.name, func(t *testing.T) {
			resp := request(t, c.method, url+c.path, c.body, "Authorization", "Bearer "+c.token, "Content-Type", jsonType)
			if resp.StatusCode != c.want {
				t.Errorf("got %s, want %d", resp.Status, c.want)
			}
			if resp.StatusCode == 401 && resp.Header.Get("WWW-Authenticate") == "" {
				t.Error("401 without WWW-Authenticate")
			}
		})
	}
}

func TestRoleIsTold(t *testing.T) {
	_, url := serve(t, dashboard.Config{Source: three(), Role: roles})
	for token, want := range map[string]string{"": "nobody", "look": "read", "act": "operate"} {
		var got struct{ Role string }
		resp := request(t, "GET", url+"/dashboard/session", "", "Authorization", "Bearer "+token)
		if err := json.NewDecoder(resp.Body).Decode(&got); err != nil || got.Role != want {
			t.Errorf("token %q: role %q (%v), want %q", token, got.Role, err, want)
		}
	}
}

func TestHeaders(t *testing.T) {
	_, url := serve(t, dashboard.Config{Source: three()})
	for _, path := range []string{"/", "/dashboard/page.js", "/dashboard/page.css", "/dashboard/session", "/nothing"} {
		resp := request(t, "GET", url+path, "")
		for name, want := range map[string]string{
			"Content-Security-Policy": "default-src 'none'", "X-Content-Type-Options": "nosniff",
		} {
			if got := resp.Header.Get(name); !strings.HasPrefix(got, want) {
				t.Errorf("%s: %s: %q, want %q", path, name, got, want)
			}
		}
		if policy := resp.Header.Get("Content-Security-Policy"); strings.Contains(policy, "unsafe") || strings.Contains(policy, "http") {
			t.Errorf("%s: the policy allows %q", path, policy)
		}
	}
	page := request(t, "GET", url+"/", "")
	again := request(t, "GET", url+"/", "", "If-None-Match", page.Header.Get("ETag"))
	if again.StatusCode != http.StatusNotModified {
		t.Errorf("a page that is known: %s, want 304", again.Status)
	}
}

func TestMalformedActions(t *testing.T) {
	s := three()
	s.act = func(a dashboard.Action) (string, error) { t.Errorf("%+v was done", a); return "", nil }
	_, url := serve(t, dashboard.Config{Source: s})
	for body, want := range map[string]string{
		``:                                      "read the action",
		`null`:                                  "action: \"\"",
		`{"action":"drain"`:                     "read the action",
		`{"action":"drain","node":2} {}`:        "something follows",
		`{"action":"drain","node":2,"force":1}`: "unknown field",
		`{"action":"explode","node":2}`:         `action: "explode": must be one of drain`,
		`{"action":"drain"}`:                    "node: 0: must be at least 1",
		`{"action":"drain","node":-1}`:          "read the action",
		`{"action":"drain","node":4294967296}`:  "read the action",
		`{"action":"remove","node":2}`:          `confirm: "": must be "node 2"`,
		`{"action":"resync","node":2,"confirm":"node 3"}`:                     `must be "node 2"`,
		`{"action":"drain","node":2,"confirm":"` + strings.Repeat("x", 9<<10): "too large",
	} {
		resp := request(t, "POST", url+"/dashboard/action", body, "Content-Type", jsonType)
		var got struct{ Error string }
		if err := json.NewDecoder(resp.Body).Decode(&got); err != nil || resp.StatusCode != 400 || !strings.Contains(got.Error, want) {
			t.Errorf("%.60s: %s %q (%v), want 400 and %q", body, resp.Status, got.Error, err, want)
		}
	}
	for _, kind := range []string{"", "text/plain", "application/x-www-form-urlencoded", "nonsense/"} {
		if resp := request(t, "POST", url+"/dashboard/action", `{"action":"drain","node":2}`, "Content-Type", kind); resp.StatusCode != 415 {
			t.Errorf("Content-Type %q: %s, want 415", kind, resp.Status)
		}
	}
}

// What the node answers to an action is what its operator reads.
func TestActionAnswers(t *testing.T) {
	s := three()
	_, url := serve(t, dashboard.Config{Source: s})
	for _, c := range []struct {
		err  error
		want int
		says string
	}{
		{nil, 200, "node 2 was removed"},
		{status.Error(codes.FailedPrecondition, "the majority would be lost"), 409, "the majority would be lost"},
		{status.Error(codes.Unavailable, "there is no leader"), 503, "there is no leader"},
		{status.Error(codes.NotFound, "node 2 is no member"), 404, "node 2 is no member"},
		{status.Error(codes.Unimplemented, "not here"), 501, "not here"},
		{errors.New("disk full"), 500, "disk full"},
	} {
		var asked dashboard.Action
		s.mu.Lock()
		s.act = func(a dashboard.Action) (string, error) { asked = a; return "node 2 was removed", c.err }
		s.mu.Unlock()
		resp := request(t, "POST", url+"/dashboard/action", `{"action":"remove","node":2,"confirm":"node 2"}`, "Content-Type", jsonType)
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != c.want || !bytes.Contains(body, []byte(c.says)) {
			t.Errorf("%v: %s %s (%v), want %d and %q", c.err, resp.Status, body, err, c.want, c.says)
		}
		if asked != (dashboard.Action{Name: dashboard.Remove, Node: 2}) {
			t.Errorf("asked for %+v", asked)
		}
	}
}

// message is an update as a page reads it.
type message struct {
	First     bool
	At        int64
	Build     string
	Verdict   *struct{ Level, Title, Text string }
	Cluster   *struct{ Name string }
	Nodes     []struct{ ID int }
	Links     []json.RawMessage
	Samples   []struct{ At int64 }
	Stages    []string
	Conflicts []struct{ ID, Table string }
	Events    []struct{ ID string }
	Silent    []struct{ Node int }
}

// stream is a page that reads one line after the other.
type stream struct {
	t     *testing.T
	lines *bufio.Scanner
	body  io.Closer
}

func openStream(t *testing.T, url string) *stream {
	t.Helper()
	resp := request(t, "GET", url+"/dashboard/stream", "")
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatalf("stream: %s, %s", resp.Status, resp.Header.Get("Content-Type"))
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 16<<20)
	return &stream{t, lines, resp.Body}
}

func (s *stream) next() message {
	s.t.Helper()
	for s.lines.Scan() {
		data, ok := strings.CutPrefix(s.lines.Text(), "data: ")
		if !ok {
			continue
		}
		var m message
		if err := json.Unmarshal([]byte(data), &m); err != nil {
			s.t.Fatalf("%v: %s", err, data)
		}
		return m
	}
	s.t.Fatalf("the stream has ended: %v", s.lines.Err())
	return message{}
}

// until reads up to a message that will do.
func (s *stream) until(will func(message) bool) message {
	s.t.Helper()
	for {
		if m := s.next(); will(m) {
			return m
		}
	}
}

func TestStreamIsWholeFirstAndThenWhatChanges(t *testing.T) {
	s := three()
	_, url := serve(t, dashboard.Config{Source: s})
	in := openStream(t, url)
	m := in.next()
	if !m.First || m.Build == "" || m.Verdict == nil || m.Verdict.Level != dashboard.Healthy || m.Cluster == nil || len(m.Nodes) != 3 || len(m.Links) != 6 {
		t.Fatalf("the first message: %+v", m)
	}
	if m := in.next(); m.First || m.Verdict != nil || m.Cluster != nil || m.Nodes != nil || m.Links != nil || m.At == 0 {
		t.Fatalf("nothing has changed, and this was sent: %+v", m)
	}
	s.change(func(v *dashboard.View) { gone(v, 3) })
	m = in.until(func(m message) bool { return m.Nodes != nil })
	if m.Verdict == nil || m.Verdict.Level != dashboard.Degraded || m.Cluster != nil || m.Links != nil {
		t.Fatalf("a node has gone, and this was sent: %+v", m)
	}
	// A list is sent once, and then only what is new in it.
	for _, id := range []string{"1 10", "2 3", "1 11"} {
		s.change(func(v *dashboard.View) {
			v.Events = append(v.Events[:len(v.Events):len(v.Events)], dashboard.Event{ID: id, Severity: "info", Text: "x"})
		})
		m := in.until(func(m message) bool { return m.Events != nil })
		if len(m.Events) != 1 || m.Events[0].ID != id {
			t.Fatalf("event %s: %+v", id, m.Events)
		}
	}
	// Where a conflict was may be found out late, and what the stages of a commit are, too.
	for _, table := range []string{"", "t"} {
		s.change(func(v *dashboard.View) {
			v.Conflicts = []dashboard.Conflict{{ID: "7", Table: table}, {ID: "8"}}
		})
		m = in.until(func(m message) bool { return m.Conflicts != nil })
		if want := map[string]int{"": 2, "t": 1}[table]; len(m.Conflicts) != want || m.Conflicts[0].ID != "7" || m.Conflicts[0].Table != table {
			t.Fatalf("conflicts at %q: %+v", table, m.Conflicts)
		}
	}
	s.count(dashboard.Counters{Stages: []dashboard.Stage{{Name: "order"}}})
	if m := in.until(func(m message) bool { return m.Stages != nil }); m.First || len(m.Stages) != 1 || m.Stages[0] != "order" {
		t.Fatalf("the stages: %+v", m)
	}
	if m := in.until(func(m message) bool { return len(m.Samples) > 0 }); m.Stages != nil {
		t.Fatalf("the stages again: %+v", m)
	}
	if m := openStream(t, url).next(); !m.First || len(m.Events) != 3 || len(m.Conflicts) != 2 || len(m.Stages) != 1 {
		t.Fatalf("another page begins with %+v", m)
	}
}

// A page that opens has a past, and the charts grow by a point a second.
func TestHistory(t *testing.T) {
	s := three()
	_, url := serve(t, dashboard.Config{Source: s})
	seen := len(openStream(t, url).until(func(m message) bool { return len(m.Samples) > 0 }).Samples)
	in := openStream(t, url)
	if m := in.next(); len(m.Samples) < seen {
		t.Fatalf("%d samples, after somebody else has seen %d", len(m.Samples), seen)
	}
	a := in.until(func(m message) bool { return len(m.Samples) > 0 }).Samples
	b := in.until(func(m message) bool { return len(m.Samples) > 0 }).Samples
	if len(a) != 1 || len(b) != 1 || b[0].At <= a[0].At {
		t.Fatalf("samples %v, then %v", a, b)
	}
}

// Nobody is asked for a view that nobody looks at, and the last who leaves turns off the light.
func TestNobodyLooks(t *testing.T) {
	s := three()
	_, url := serve(t, dashboard.Config{Source: s})
	ctx, leave := context.WithCancel(t.Context())
	r, err := http.NewRequestWithContext(ctx, "GET", url+"/dashboard/stream", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(resp.Body)
	for range 20 {
		if _, err := lines.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	leave()
	resp.Body.Close()
	views := func() int { s.mu.Lock(); defer s.mu.Unlock(); return s.views }
	for end := time.Now().Add(10 * time.Second); ; {
		before := views()
		time.Sleep(200 * time.Millisecond) // ten intervals, in which nothing must happen
		if views() == before {
			break
		}
		if time.Now().After(end) {
			t.Fatal("views are still made")
		}
	}
}

// A page that does not read holds up nobody and costs nothing but its place: when it reads again, it gets the newest.
func TestSlowReader(t *testing.T) {
	s := three()
	d, url := serve(t, dashboard.Config{Source: s})
	d.SetPatience(time.Minute)
	conn := openSilent(t, url)
	quick := openStream(t, url)
	quick.next()
	// More than any buffer between the two holds.
	const changes = 40
	for i := range changes {
		s.change(func(v *dashboard.View) { v.Cluster.Name = strings.Repeat("x", 256<<10) + time.Duration(i).String() })
		quick.until(func(m message) bool {
			return m.Cluster != nil && strings.HasSuffix(m.Cluster.Name, "x"+time.Duration(i).String())
		})
	}
	if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, 16<<20)
	got := 0
	for lines.Scan() {
		if !strings.Contains(lines.Text(), `"cluster":`) {
			continue
		}
		got++
		if strings.Contains(lines.Text(), "x"+time.Duration(changes-1).String()+`"`) {
			if got > changes*3/4 {
				t.Fatalf("the slow page was sent %d states of %d: nothing was left out", got, changes)
			}
			return
		}
	}
	t.Fatalf("the slow page never got the newest state: %v", lines.Err())
}

// openSilent opens a stream that nobody reads.
func openSilent(t *testing.T, url string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.(*net.TCPConn).SetReadBuffer(64 << 10); err != nil { // else the kernel reads for it
		t.Fatal(err)
	}
	// HTTP/1.0 knows no chunks, so that lines are lines.
	if _, err := io.WriteString(conn, "GET /dashboard/stream HTTP/1.0\r\nHost: localhost\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	return conn
}

// A page that takes nothing for long loses its place.
func TestDeadReader(t *testing.T) {
	s := three()
	d, url := serve(t, dashboard.Config{Source: s})
	d.SetPatience(100 * time.Millisecond)
	openSilent(t, url)
	for i := 0; !d.Watched(); i++ {
		time.Sleep(time.Millisecond)
	}
	for i, end := 0, time.Now().Add(time.Minute); d.Watched(); i++ {
		s.change(func(v *dashboard.View) { v.Cluster.Name = strings.Repeat("x", 1<<20) + time.Duration(i).String() })
		time.Sleep(20 * time.Millisecond)
		if time.Now().After(end) {
			t.Fatal("it is still being served")
		}
	}
}

func TestTooManyPages(t *testing.T) {
	_, url := serve(t, dashboard.Config{Source: three()})
	var all []*stream
	for range 64 {
		all = append(all, openStream(t, url))
	}
	if resp := request(t, "GET", url+"/dashboard/stream", ""); resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
		t.Fatalf("one page too many: %s", resp.Status)
	}
	all[0].body.Close()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if request(t, "GET", url+"/dashboard/stream", "").StatusCode == 200 {
			return
		}
		if time.Now().After(end) {
			t.Fatal("the place of a page that has gone is not given away")
		}
	}
}
