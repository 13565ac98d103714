package authz

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/internal/pki"
	"github.com/quorate/quorate/internal/reload"
)

// HTTPConfig says how a node is reached over HTTP.
type HTTPConfig struct {
	// Tokens is the file of bearer tokens; "" is none.
	Tokens string
	// TLS says that connections are encrypted, and that certificates count.
	TLS bool
	// Hosts are further names, beside those of loopback, by which an address without TLS may be called.
	Hosts []string
	// Logger takes who has done what.
	Logger *slog.Logger
	// Registerer takes the metrics.
	Registerer prometheus.Registerer
}

// HTTP guards the handlers of an HTTP server. Its methods may be called from any goroutine.
//
// Somebody is known, first of all, by "Authorization: Bearer TOKEN", for programs; then by the cookie that Login gives
// for a token, for browsers; then by a client certificate. Without TLS and without tokens a node is on loopback, and
// everybody may do everything. What a browser sends by itself, be it cookie, certificate or just a request from this
// machine, does not prove that its user wants it: see Wrap.
type HTTP struct {
	cfg     HTTPConfig
	tokens  *reload.Value[tokens] // nil without a file
	origins *http.CrossOriginProtection
	refused prometheus.Counter
}

// NewHTTP reads the tokens.
func NewHTTP(cfg HTTPConfig) (*HTTP, error) {
	h := &HTTP{
		cfg: cfg, origins: http.NewCrossOriginProtection(),
		refused: prometheus.NewCounter(prometheus.CounterOpts{Name: "quorate_http_refused_total", Help: "HTTP requests that were refused for lack of rights."}),
	}
	if cfg.Tokens != "" {
		var err error
		h.tokens, err = reload.Open(func() (tokens, error) { return readTokens(cfg.Tokens) }, cfg.Logger, time.Now, cfg.Tokens)
		if err != nil {
			return nil, err
		}
	}
	if err := cfg.Registerer.Register(h.refused); err != nil {
		return nil, fmt.Errorf("register HTTP metrics: %w", err)
	}
	return h, nil
}

// policy is for pages that load nothing from elsewhere and have nothing written into them.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; " +
	"form-action 'self'; base-uri 'none'; frame-ancestors 'none'"

// Wrap goes around everything that a server serves. It sets headers by which a browser confines what it shows, refuses
// requests that change something and come from another site's page, and, where being on this machine is all that is
// asked of anybody, refuses names that are not this machine's: a page from elsewhere whose name suddenly means loopback
// (DNS rebinding) is told apart by nothing else.
func (h *HTTP) Wrap(next http.Handler) http.Handler {
	guarded := h.origins.Handler(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// No Strict-Transport-Security: it would be valid for every port of the host, whoever serves there.
		for name, value := range map[string]string{
			"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
			"Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin",
			"Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store",
		} {
			w.Header().Set(name, value)
		}
		if h.Open() && !h.local(r.Host) {
			h.refused.Inc()
			http.Error(w, "this node can be asked as localhost only: beyond it, it needs TLS", http.StatusMisdirectedRequest)
			return
		}
		guarded.ServeHTTP(w, r)
	})
}

// Open reports whether everybody may do everything.
func (h *HTTP) Open() bool { return !h.cfg.TLS && h.tokens == nil }

// Tokens reports whether there are tokens, so that it makes sense to ask a person for one.
func (h *HTTP) Tokens() bool { return h.tokens != nil }

func (h *HTTP) local(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.Trim(host, "[]")
	if ip := net.ParseIP(host); ip != nil {
		return ip.IsLoopback()
	}
	if strings.EqualFold(host, "localhost") {
		return true
	}
	for _, own := range h.cfg.Hosts {
		if strings.EqualFold(host, own) {
			return true
		}
	}
	return false
}

// Caller returns who makes a request: role None for somebody who is not known.
func (h *HTTP) Caller(r *http.Request) Caller {
	if h.Open() {
		return local
	}
	// A token that is shown on purpose counts, or is wrong: nothing else is looked for then.
	if header := r.Header.Get("Authorization"); header != "" {
		scheme, token, _ := strings.Cut(header, " ")
		if !strings.EqualFold(scheme, "Bearer") {
			return Caller{}
		}
		return h.find(token)
	}
	if cookie, err := r.Cookie(h.cookieName()); err == nil {
		if c := h.find(cookie.Value); c.Role != pki.None {
			return c
		}
	}
	if r.TLS != nil {
		return certified(*r.TLS)
	}
	return Caller{}
}

func (h *HTTP) find(token string) Caller {
	if h.tokens == nil {
		return Caller{}
	}
	return h.tokens.Get().find(strings.TrimSpace(token))
}

// Require serves next to those who have at least the role, and tells it who they are: see FromContext. Others get 401, or
// 403 if they are known. What may change something is logged with who did it.
func (h *HTTP) Require(role pki.Role, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller := h.Caller(r)
		switch {
		case caller.Role == pki.None:
			h.refused.Inc()
			w.Header().Set("WWW-Authenticate", `Bearer realm="quorate"`)
			http.Error(w, "a token or a certificate is needed", http.StatusUnauthorized)
			return
		case caller.Role < role:
			h.refused.Inc()
			http.Error(w, fmt.Sprintf("%s has role %s: this takes %s", caller.Name, caller.Role, role), http.StatusForbidden)
			return
		}
		if role >= pki.Operate {
			h.cfg.Logger.Info("operation over HTTP", "method", r.Method, logkey.Path, r.URL.Path,
				"caller", caller.Name, logkey.Client, r.RemoteAddr)
		}
		next.ServeHTTP(w, r.WithContext(withCaller(r.Context(), caller)))
	})
}

// cookieName has a prefix by which browsers accept the cookie only as this host's, over TLS.
func (h *HTTP) cookieName() string {
	if h.cfg.TLS {
		return "__Host-quorate"
	}
	return "quorate"
}

// sessionLength is how long a browser keeps a token.
const sessionLength = 12 * time.Hour

// maxLogin bounds the form that Login reads.
const maxLogin = 4 << 10

// Login takes a form with the field "token" by POST, and answers 204 with a cookie that stands for it, 401 without. The
// cookie is the token itself: it ends with it, on all nodes at once, and no list of sessions has to be kept.
func (h *HTTP) Login(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "POST a form with the field token", http.StatusMethodNotAllowed)
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxLogin)
	if err := r.ParseForm(); err != nil {
		http.Error(w, "POST a form with the field token", http.StatusBadRequest)
		return
	}
	token := strings.TrimSpace(r.PostForm.Get("token"))
	caller := h.find(token)
	if caller.Role == pki.None {
		h.refused.Inc()
		http.Error(w, "this token is not known here", http.StatusUnauthorized)
		return
	}
	h.cfg.Logger.Info("login over HTTP", "caller", caller.Name, logkey.Client, r.RemoteAddr)
	h.setCookie(w, token, int(sessionLength/time.Second))
	w.WriteHeader(http.StatusNoContent)
}

// Logout takes the cookie back, by POST.
func (h *HTTP) Logout(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "POST", http.StatusMethodNotAllowed)
		return
	}
	h.setCookie(w, "", -1)
	w.WriteHeader(http.StatusNoContent)
}

func (h *HTTP) setCookie(w http.ResponseWriter, value string, age int) {
	http.SetCookie(w, &http.Cookie{
		Name: h.cookieName(), Value: value, Path: "/", MaxAge: age,
		Secure: h.cfg.TLS, HttpOnly: true, SameSite: http.SameSiteStrictMode,
	})
}
