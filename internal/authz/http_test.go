package authz

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/quorate/quorate/internal/pki"
)

type tokenFile struct{ name, read, operate string }

func writeTokens(t *testing.T) tokenFile {
	t.Helper()
	f := tokenFile{name: filepath.Join(t.TempDir(), "tokens")}
	read, line1, err := NewToken(pki.Read, "grafana")
	if err != nil {
		t.Fatal(err)
	}
	operate, line2, err := NewToken(pki.Operate, "ann")
	if err != nil {
		t.Fatal(err)
	}
	f.read, f.operate = read, operate
	if err := os.WriteFile(f.name, []byte("# who\n\n"+line1+line2), 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

func newHTTP(t *testing.T, cfg HTTPConfig) *HTTP {
	t.Helper()
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.Registerer = prometheus.NewRegistry()
	h, err := NewHTTP(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// site serves /look and /act behind their roles, /health to everybody, and login and logout.
func site(h *HTTP) http.Handler {
	mux := http.NewServeMux()
	say := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write([]byte(FromContext(r.Context()).Name)) })
	mux.Handle("/look", h.Require(pki.Read, say))
	mux.Handle("/act", h.Require(pki.Operate, say))
	mux.Handle("/health", say)
	mux.HandleFunc("/login", h.Login)
	mux.HandleFunc("/logout", h.Logout)
	return h.Wrap(mux)
}

// ask makes a request; each of how changes it.
func ask(site http.Handler, method, path string, how ...func(*http.Request)) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, "http://127.0.0.1:8432"+path, nil)
	for _, f := range how {
		f(r)
	}
	w := httptest.NewRecorder()
	site.ServeHTTP(w, r)
	return w
}

func header(name, value string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set(name, value) }
}

func bearer(token string) func(*http.Request) { return header("Authorization", "Bearer "+token) }

func certificate(role string) func(*http.Request) {
	return func(r *http.Request) {
		leaf := &x509.Certificate{}
		leaf.Subject.CommonName, leaf.Subject.OrganizationalUnit = "bob", []string{role}
		r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}
		if role != "unverified" {
			r.TLS.VerifiedChains = [][]*x509.Certificate{{leaf}}
		}
	}
}

func TestRequire(t *testing.T) {
	f := writeTokens(t)
	h := newHTTP(t, HTTPConfig{Tokens: f.name, TLS: true})
	s := site(h)
	cookie := func(token string) func(*http.Request) {
		return func(r *http.Request) { r.AddCookie(&http.Cookie{Name: "__Host-quorate", Value: token}) }
	}
	for _, tc := range []struct {
		name      string
		how       []func(*http.Request)
		look, act int
		who       string
	}{
		{"nobody", nil, 401, 401, ""},
		{"a token to look", []func(*http.Request){bearer(f.read)}, 200, 403, "grafana"},
		{"a token to act", []func(*http.Request){bearer(f.operate)}, 200, 200, "ann"},
		{"a wrong token", []func(*http.Request){bearer(f.operate + "x")}, 401, 401, ""},
		{"no token", []func(*http.Request){bearer("")}, 401, 401, ""},
		{"another scheme", []func(*http.Request){header("Authorization", "Basic "+f.operate)}, 401, 401, ""},
		{"a cookie", []func(*http.Request){cookie(f.operate)}, 200, 200, "ann"},
		{"a wrong token hides a cookie", []func(*http.Request){bearer("x"), cookie(f.operate)}, 401, 401, ""},
		{"a certificate to look", []func(*http.Request){certificate("read")}, 200, 403, "bob"},
		{"a certificate to act", []func(*http.Request){certificate("operate")}, 200, 200, "bob"},
		{"a node", []func(*http.Request){certificate("node")}, 200, 200, "bob"},
		{"a certificate without a role", []func(*http.Request){certificate("accounting")}, 401, 401, ""},
		{"a certificate that nobody has verified", []func(*http.Request){certificate("unverified")}, 401, 401, ""},
		{"an old cookie beside a certificate", []func(*http.Request){cookie("gone"), certificate("read")}, 200, 403, "bob"},
	} {
		look, act := ask(s, "GET", "/look", tc.how...), ask(s, "POST", "/act", tc.how...)
		if look.Code != tc.look || act.Code != tc.act || look.Code == 200 && look.Body.String() != tc.who {
			t.Errorf("%s: look %d, act %d, who %q; want %d, %d, %q", tc.name, look.Code, act.Code, look.Body, tc.look, tc.act, tc.who)
		}
		if open := ask(s, "GET", "/health", tc.how...); open.Code != 200 || open.Body.String() != "" {
			t.Errorf("%s: health is %d for %q", tc.name, open.Code, open.Body)
		}
	}
	refused := ask(s, "GET", "/look")
	for name, want := range map[string]string{"WWW-Authenticate": "Bearer", "Content-Security-Policy": "default-src 'none'", "X-Frame-Options": "DENY"} {
		if got := refused.Header().Get(name); !strings.Contains(got, want) {
			t.Errorf("header %s is %q", name, got)
		}
	}
}

func TestLogin(t *testing.T) {
	f := writeTokens(t)
	for _, secure := range []bool{true, false} {
		s := site(newHTTP(t, HTTPConfig{Tokens: f.name, TLS: secure}))
		post := func(token string, how ...func(*http.Request)) *httptest.ResponseRecorder {
			r := httptest.NewRequest("POST", "http://127.0.0.1/login", strings.NewReader(url.Values{"token": {token}}.Encode()))
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			for _, f := range how {
				f(r)
			}
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			return w
		}
		if w := post("wrong"); w.Code != 401 || len(w.Result().Cookies()) != 0 {
			t.Errorf("a wrong token: %d, %v", w.Code, w.Result().Cookies())
		}
		if w := post(strings.Repeat("x", maxLogin+1)); w.Code != 400 {
			t.Errorf("a huge form: %d", w.Code)
		}
		if w := post(f.read, header("Sec-Fetch-Site", "cross-site")); w.Code != 403 {
			t.Errorf("login from another site: %d", w.Code)
		}
		w := post(" " + f.read + "\n")
		if w.Code != 204 || len(w.Result().Cookies()) != 1 {
			t.Fatalf("login: %d, %v", w.Code, w.Result().Cookies())
		}
		c := w.Result().Cookies()[0]
		if !c.HttpOnly || c.SameSite != http.SameSiteStrictMode || c.Secure != secure || c.Path != "/" || c.Domain != "" ||
			strings.HasPrefix(c.Name, "__Host-") != secure {
			t.Errorf("cookie: %+v", c)
		}
		if w := ask(s, "GET", "/look", func(r *http.Request) { r.AddCookie(c) }); w.Code != 200 {
			t.Errorf("with the cookie: %d", w.Code)
		}
		if w := ask(s, "POST", "/logout"); w.Code != 204 || w.Result().Cookies()[0].MaxAge >= 0 {
			t.Errorf("logout: %d, %v", w.Code, w.Result().Cookies())
		}
		for _, path := range []string{"/login", "/logout"} {
			if w := ask(s, "GET", path); w.Code != 405 {
				t.Errorf("GET %s: %d", path, w.Code)
			}
		}
	}
}

// On loopback everybody may do everything, except pages of other sites by way of somebody's browser.
func TestOpen(t *testing.T) {
	s := site(newHTTP(t, HTTPConfig{Hosts: []string{"node1"}}))
	host := func(name string) func(*http.Request) { return func(r *http.Request) { r.Host = name } }
	for _, tc := range []struct {
		name string
		how  func(*http.Request)
		want int
	}{
		{"curl", func(*http.Request) {}, 200},
		{"localhost", host("localhost:8432"), 200},
		{"IPv6", host("[::1]:8432"), 200},
		{"configured", host("node1:8432"), 200},
		{"the page itself", header("Sec-Fetch-Site", "same-origin"), 200},
		{"another site's form", header("Sec-Fetch-Site", "cross-site"), 403},
		{"another port's form", header("Sec-Fetch-Site", "same-site"), 403},
		{"another site's form in an old browser", header("Origin", "http://evil.example"), 403},
		{"a name that was made to mean loopback", host("evil.example:8432"), 421},
		{"an address that is not loopback", host("10.0.0.1:8432"), 421},
		{"no name", host(""), 421},
	} {
		if w := ask(s, "POST", "/act", tc.how); w.Code != tc.want {
			t.Errorf("%s: %d, want %d", tc.name, w.Code, tc.want)
		}
	}
	// With tokens, loopback is no reason to trust anybody.
	f := writeTokens(t)
	s = site(newHTTP(t, HTTPConfig{Tokens: f.name}))
	if w := ask(s, "GET", "/look"); w.Code != 401 {
		t.Errorf("without a token on loopback: %d", w.Code)
	}
	if w := ask(s, "GET", "/look", bearer(f.read), host("node.example")); w.Code != 200 {
		t.Errorf("with a token by a name: %d", w.Code)
	}
}

// What acts is logged with who did it, and the token is not.
func TestOperationsAreLogged(t *testing.T) {
	f := writeTokens(t)
	var log bytes.Buffer
	s := site(newHTTP(t, HTTPConfig{Tokens: f.name, TLS: true, Logger: slog.New(slog.NewTextHandler(&log, nil))}))
	ask(s, "POST", "/act", bearer(f.operate))
	if got := log.String(); !strings.Contains(got, "caller=ann") || !strings.Contains(got, "path=/act") || strings.Contains(got, f.operate) {
		t.Errorf("logged: %s", got)
	}
}

func TestTokenFile(t *testing.T) {
	_, line, err := NewToken(pki.Read, "x")
	if err != nil {
		t.Fatal(err)
	}
	hash := strings.Fields(line)[1]
	for _, tc := range []struct{ text, want string }{
		{"read " + hash, "line 1: it has 2 fields"},
		{"\nwrite " + hash + " x", `line 2: role "write"`},
		{"node " + hash + " x", `role "node"`},
		{"read " + hash[1:] + " x", "SHA-256"},
		{"read secret x", "SHA-256"},
		{"read " + hash + " \x01", "printable"},
		{strings.Repeat(line, maxTokens+1), "more than 1000"},
		{strings.Repeat("#", maxTokenFile+1), "bytes"},
	} {
		name := filepath.Join(t.TempDir(), "tokens")
		if err := os.WriteFile(name, []byte(tc.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readTokens(name); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%.40q: %v, want %s", tc.text, err, tc.want)
		}
	}
	loose := filepath.Join(t.TempDir(), "tokens")
	if err := os.WriteFile(loose, []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	if list, err := readTokens(loose); err != nil || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	if err := os.Chmod(loose, 0o620); err != nil {
		t.Fatal(err)
	}
	if _, err := readTokens(loose); err == nil || !strings.Contains(err.Error(), "chmod go-w") {
		t.Errorf("a file that others can write: %v", err)
	}
	for _, name := range []string{"", "a b", "ä", strings.Repeat("x", 65)} {
		if _, _, err := NewToken(pki.Read, name); err == nil {
			t.Errorf("a token for %q", name)
		}
	}
	if _, _, err := NewToken(pki.Node, "x"); err == nil {
		t.Error("a token that makes a node")
	}
}
