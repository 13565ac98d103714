package dashboard

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
)

//go:embed page/index.html page/page.css page/page.js
var page embed.FS

// file is one of the page's files.
type file struct {
	content []byte
	kind    string
	tag     string // of the content, for If-None-Match
}

// The page's files by where they are served.
func loadFiles() (map[string]file, error) {
	files := map[string]file{}
	for path, f := range map[string]struct{ name, kind string }{
		"/":                   {"page/index.html", "text/html; charset=utf-8"},
		"/dashboard/page.css": {"page/page.css", "text/css; charset=utf-8"},
		"/dashboard/page.js":  {"page/page.js", "text/javascript; charset=utf-8"},
	} {
		content, err := page.ReadFile(f.name)
		if err != nil {
			return nil, fmt.Errorf("read the page: %w", err)
		}
		sum := sha256.Sum256(content)
		files[path] = file{content, f.kind, `"` + hex.EncodeToString(sum[:8]) + `"`}
	}
	return files, nil
}

// build changes when any of the page's files does.
func (d *Dashboard) build() string {
	return d.files["/"].tag + d.files["/dashboard/page.css"].tag + d.files["/dashboard/page.js"].tag
}

// policy lets the page load its own files, talk to its own server, and nothing else. Text from elsewhere cannot become
// markup even by mistake.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

const (
	// quietTime is how long a stream is silent at most, for whatever lies between; then too its reader is asked for
	// anew who he is.
	quietTime = 5 * time.Second
	// retryAfter is in seconds.
	retryAfter = "2"
	// actionTimeout bounds an action, a drain's wait for transactions included.
	actionTimeout = 2 * time.Minute
	maxAction     = 4 << 10
)

// ServeHTTP implements http.Handler.
func (d *Dashboard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Security-Policy", policy)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	d.mux.ServeHTTP(w, r)
}

func (d *Dashboard) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", d.serveFile)
	mux.HandleFunc("GET /dashboard/page.css", d.serveFile)
	mux.HandleFunc("GET /dashboard/page.js", d.serveFile)
	mux.HandleFunc("GET /dashboard/session", d.serveSession)
	mux.HandleFunc("GET /dashboard/stream", d.require(Reader, d.serveStream))
	mux.HandleFunc("POST /dashboard/action", d.require(Operator, d.serveAction))
	if d.cfg.Login != nil {
		mux.HandleFunc("POST /dashboard/login", d.cfg.Login)
		mux.HandleFunc("POST /dashboard/logout", d.cfg.Logout)
	}
	return mux
}

func (d *Dashboard) require(role Role, then http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		switch has := d.cfg.Role(r); {
		case has >= role:
			then(w, r)
		case has == Nobody:
			w.Header().Set("WWW-Authenticate", `Bearer realm="quorate"`)
			refuse(w, http.StatusUnauthorized, "a token or a certificate is needed")
		default:
			refuse(w, http.StatusForbidden, "you may look, not act")
		}
	}
}

// answer is every answer that is not a file or a stream.
type answer struct {
	Role    string `json:"role,omitempty"`
	Login   bool   `json:"login,omitempty"` // one can become somebody else with a token
	Message string `json:"message,omitempty"`
	Error   string `json:"error,omitempty"`
}

func respond(w http.ResponseWriter, code int, a answer) {
	text, err := json.Marshal(a)
	if err != nil { // strings only
		code, text = http.StatusInternalServerError, nil
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(text) // who does not read the answer gets none
}

func refuse(w http.ResponseWriter, code int, format string, args ...any) {
	respond(w, code, answer{Error: fmt.Sprintf(format, args...)})
}

func (d *Dashboard) serveFile(w http.ResponseWriter, r *http.Request) {
	f := d.files[r.URL.Path]
	w.Header().Set("Content-Type", f.kind)
	w.Header().Set("Cache-Control", "no-cache") // kept, and asked about each time
	w.Header().Set("ETag", f.tag)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(f.content))
}

// serveSession tells a page who it is.
func (d *Dashboard) serveSession(w http.ResponseWriter, r *http.Request) {
	names := [...]string{Nobody: "nobody", Reader: "read", Operator: "operate"}
	respond(w, http.StatusOK, answer{Role: names[d.cfg.Role(r)], Login: d.cfg.Login != nil})
}

// serveStream sends what is shown, and then every change of it.
func (d *Dashboard) serveStream(w http.ResponseWriter, r *http.Request) {
	if !d.attach() {
		w.Header().Set("Retry-After", retryAfter)
		refuse(w, http.StatusServiceUnavailable, "%d pages are open on this node, and more are not served", maxStreams)
		return
	}
	defer d.detach()
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no") // nginx, as a proxy
	to := http.NewResponseController(w)
	send := func(parts ...[]byte) error {
		if err := to.SetWriteDeadline(time.Now().Add(d.patience)); err != nil {
			return err
		}
		for _, p := range parts {
			if _, err := w.Write(p); err != nil {
				return err
			}
		}
		return to.Flush()
	}
	// Every error ends the stream, and there is nobody left to tell: the page connects again.
	if send([]byte(": quorate\n\n")) != nil {
		return
	}
	quiet := time.NewTicker(quietTime)
	defer quiet.Stop()
	var sent cursor
	for {
		u, news := d.since(&sent)
		if u != nil {
			text, err := u.encode()
			if err != nil {
				d.cfg.Logger.Error("the dashboard cannot be sent", logkey.Error, err)
				return
			}
			if send([]byte("data: "), text, []byte("\n\n")) != nil {
				return
			}
			// What came while this was sent is the next turn's.
		}
		select {
		case <-r.Context().Done():
			return
		case <-news:
		case <-quiet.C:
			if d.cfg.Role(r) < Reader || send([]byte(":\n\n")) != nil {
				return
			}
		}
	}
}

// order is the body of an action.
type order struct {
	Action string     `json:"action"`
	Node   txn.NodeID `json:"node"`
	// Confirm is what a person has typed: "node 2". Destructive actions need it.
	Confirm string `json:"confirm"`
}

func (d *Dashboard) serveAction(w http.ResponseWriter, r *http.Request) {
	// Other types are those that a form of any site may send.
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		refuse(w, http.StatusUnsupportedMediaType, "Content-Type: must be application/json")
		return
	}
	o, err := readOrder(http.MaxBytesReader(w, r.Body, maxAction))
	if err != nil {
		refuse(w, http.StatusBadRequest, "%v", err)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), actionTimeout)
	defer cancel()
	log := d.cfg.Logger.With("action", o.Action, "target", o.Node, logkey.Client, r.RemoteAddr)
	if d.cfg.Name != nil {
		log = log.With("caller", d.cfg.Name(r))
	}
	log.Info("an operator asks for an action")
	message, err := d.cfg.Source.Act(ctx, Action{Name: o.Action, Node: o.Node})
	if err != nil {
		log.Info("the action was not done", logkey.Error, err)
		s := status.Convert(err)
		refuse(w, httpCode(s.Code()), "%s", s.Message())
		return
	}
	respond(w, http.StatusOK, answer{Message: message})
}

func readOrder(body io.Reader) (order, error) {
	var o order
	in := json.NewDecoder(body)
	in.DisallowUnknownFields()
	if err := in.Decode(&o); err != nil {
		return o, fmt.Errorf("read the action: %w", err)
	}
	if _, err := in.Token(); !errors.Is(err, io.EOF) {
		return o, errors.New("read the action: something follows it")
	}
	typed, known := destructive[o.Action]
	if !known {
		return o, fmt.Errorf("action: %q: must be one of %s, %s, %s, %s, %s", o.Action, Drain, Resume, Transfer, Remove, Resync)
	}
	if o.Node == 0 {
		return o, errors.New("node: 0: must be at least 1")
	}
	if want := "node " + o.Node.String(); typed && o.Confirm != want {
		return o, fmt.Errorf("confirm: %q: must be %q", o.Confirm, want)
	}
	return o, nil
}

// httpCode is what a gRPC status is in HTTP.
func httpCode(c codes.Code) int {
	for _, pair := range []struct {
		http int
		grpc []codes.Code
	}{
		{http.StatusBadRequest, []codes.Code{codes.InvalidArgument, codes.OutOfRange}},
		{http.StatusUnauthorized, []codes.Code{codes.Unauthenticated}},
		{http.StatusForbidden, []codes.Code{codes.PermissionDenied}},
		{http.StatusNotFound, []codes.Code{codes.NotFound}},
		{http.StatusConflict, []codes.Code{codes.FailedPrecondition, codes.AlreadyExists, codes.Aborted}},
		{http.StatusNotImplemented, []codes.Code{codes.Unimplemented}},
		{http.StatusServiceUnavailable, []codes.Code{codes.Unavailable, codes.ResourceExhausted}},
		{http.StatusGatewayTimeout, []codes.Code{codes.DeadlineExceeded, codes.Canceled}},
	} {
		if slices.Contains(pair.grpc, c) {
			return pair.http
		}
	}
	return http.StatusInternalServerError
}
