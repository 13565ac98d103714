// Package security tests what somebody who does not belong to a cluster, and reaches every port of it, learns and changes:
// nothing.
package security

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/test/cluster"
)

// timeLimit bounds the test, and patience one thing that a node should do soon.
const (
	timeLimit = 5 * time.Minute
	patience  = 30 * time.Second
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// start starts two nodes on loopback: neither can do without the other.
func start(t *testing.T) (c *cluster.Cluster, binary string, ctx context.Context) {
	t.Helper()
	dir, err := cluster.TempDir("")
	check(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
	check(t, os.WriteFile(filepath.Join(dir, "tokens"), nil, 0o600))
	binary, err = cluster.Build(t.Context(), dir, true)
	check(t, err)
	c, err = cluster.Start(t.Context(), cluster.Options{
		Binary: binary, Nodes: 2, Certificates: true,
		Configuration: fmt.Sprintf("http: {tokens: %s/tokens}\ngateway: {clients: [{from: 127.0.0.2, access: tls}, {from: 127.0.0.1, access: allow}]}\n", dir),
	})
	check(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Logs(20))
		}
		check(t, c.Destroy())
	})
	ctx, cancel := context.WithTimeout(t.Context(), timeLimit)
	t.Cleanup(cancel)
	return c, binary, ctx
}

func TestOutsiders(t *testing.T) {
	c, binary, ctx := start(t)
	o := newOutsider(t, c, binary)
	session, err := pgx.Connect(ctx, encryptedURL(c, 1))
	check(t, err)
	defer session.Close(ctx)
	_, err = session.Exec(ctx, "CREATE TABLE safe (id serial PRIMARY KEY)")
	check(t, err)
	works := func(t *testing.T) {
		t.Helper()
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		if _, err := session.Exec(ctx, "INSERT INTO safe DEFAULT VALUES"); err != nil {
			t.Fatalf("the cluster does not work any more: %v", err)
		}
	}
	before, err := c.Metrics(ctx, 1)
	check(t, err)

	t.Run("bytes", func(t *testing.T) { o.bytes(t); works(t) })
	t.Run("certificates", func(t *testing.T) { o.certificates(t); works(t) })
	t.Run("gateway", func(t *testing.T) { o.gateway(t, ctx); works(t) })
	t.Run("HTTP", func(t *testing.T) { o.http(t, ctx); works(t) })
	t.Run("roles", func(t *testing.T) { o.roles(t, ctx); works(t) })
	t.Run("grpcurl", func(t *testing.T) { o.grpcurl(t, ctx); works(t) })
	t.Run("tokens", func(t *testing.T) { o.tokens(t, ctx); works(t) })
	t.Run("patience", func(t *testing.T) { o.silence(t); works(t) })
	t.Run("crowds", func(t *testing.T) { o.crowd(t, func() { works(t) }); works(t) })

	// Nothing of it is left behind.
	deadline := time.Now().Add(patience)
	for {
		after, err := c.Metrics(ctx, 1)
		check(t, err)
		goroutines, memory := after["go_goroutines"]-before["go_goroutines"], after["process_resident_memory_bytes"]-before["process_resident_memory_bytes"]
		if goroutines < 50 && memory < 300<<20 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the node is left with %v goroutines and %v bytes more than before", goroutines, memory)
		}
		time.Sleep(100 * time.Millisecond)
	}
	check(t, session.Close(ctx))
	status, err := c.Status(ctx, 2)
	check(t, err)
	if strings.Count(string(status), "active") != 2 {
		t.Errorf("status:\n%s", status)
	}
	check(t, c.Stop())
}

func encryptedURL(c *cluster.Cluster, i int) string {
	return strings.Replace(cluster.URL(c.Gateway(i)), "sslmode=disable", "sslmode=verify-full&sslrootcert="+filepath.Join(c.CertDir(), "ca.crt"), 1)
}

// dialer connects from where the gateway asks for TLS.
var dialer = net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}, Timeout: patience}

// outsider is somebody who reaches all ports of node 1.
type outsider struct {
	c      *cluster.Cluster
	binary string
	roots  *x509.CertPool
	ports  map[string]string // address by name
}

func newOutsider(t *testing.T, c *cluster.Cluster, binary string) *outsider {
	t.Helper()
	ca, err := os.ReadFile(filepath.Join(c.CertDir(), "ca.crt"))
	check(t, err)
	o := &outsider{c: c, binary: binary, roots: x509.NewCertPool(), ports: map[string]string{
		"gateway": c.Gateway(1), "grpc": c.GRPC(1), "http": c.HTTP(1), "raft": c.Raft(1),
	}}
	o.roots.AppendCertsFromPEM(ca)
	return o
}

// say sends bytes and returns all that is answered until the node closes the connection, which it must do.
func say(conn net.Conn, text []byte) (string, error) {
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	_, _ = conn.Write(text) // it may have heard enough before the end
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.CloseWrite() // fails if it has been reset
	}
	answer, err := io.ReadAll(conn)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return string(answer), errors.New("it keeps the connection open")
	}
	return string(answer), nil
}

// tells reports whether an answer tells of the cluster.
func tells(answer string) bool {
	for _, secret := range []string{"tested", "node1", "node2", "leader", "active", "quorate_"} {
		if strings.Contains(answer, secret) {
			return true
		}
	}
	return false
}

// bytes says nonsense, and sense in the wrong place, to every port.
func (o *outsider) bytes(t *testing.T) {
	random := make([]byte, 64<<10)
	for i := range random {
		random[i] = byte(rand.Uint32())
	}
	texts := map[string][]byte{
		"nothing":         nil,
		"random":          random,
		"zeros":           make([]byte, 64<<10),
		"ones":            slices.Repeat([]byte{0xff}, 64<<10),
		"HTTP":            []byte("GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"),
		"HTTP/2":          []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"),
		"startup":         startup("user", "postgres", "database", "postgres"),
		"long startup":    append([]byte{0x7f, 0xff, 0xff, 0xff}, startup("user", "postgres")[4:]...),
		"short startup":   {0, 0, 0, 1, 0, 3, 0, 0},
		"open startup":    {0, 0, 0, 12, 0, 3, 0, 0, 'u', 's', 'e', 'r'},
		"cancel":          {0, 0, 0, 16, 4, 210, 22, 46, 0, 0, 0, 1, 0, 0, 0, 0},
		"half a cancel":   {0, 0, 0, 9, 4, 210, 22, 46, 0},
		"TLS of its own":  {0x16, 3, 1, 0xff, 0xff, 1, 0xff, 0xff, 0xff},
		"TLS before TLS":  append([]byte{0, 0, 0, 8, 4, 210, 22, 47}, startup("user", "postgres")...),
		"Raft's messages": append([]byte{0}, random...),
		"Raft's other":    append([]byte{3}, random...),
	}
	for port, address := range o.ports {
		for name, text := range texts {
			conn, err := dialer.Dial("tcp", address)
			check(t, err)
			answer, err := say(conn, text)
			if err != nil || tells(answer) || len(answer) > 500 {
				t.Errorf("%s at %s: %v, it says %.200q", name, port, err, answer)
			}
		}
	}
}

// startup is a startup packet of PostgreSQL.
func startup(words ...string) []byte {
	body := []byte{0, 3, 0, 0}
	for _, w := range words {
		body = append(append(body, w...), 0)
	}
	body = append(body, 0)
	return append([]byte{0, 0, 0, byte(len(body) + 4)}, body...)
}

// shown shows a certificate whatever the server would like to see.
func shown(c tls.Certificate) func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c, nil }
}

// certificates shows every port but the gateway's, which asks for none, what it should not take.
func (o *outsider) certificates(t *testing.T) {
	ours, theirs := loadAuthority(t, o.c.CertDir()), newAuthority(t)
	hour := time.Hour
	for _, tc := range []struct {
		name    string
		shown   func(*tls.CertificateRequestInfo) (*tls.Certificate, error)
		allowed string // the port that lets it in as far as to ask
	}{
		{"none", nil, "http"},
		{"another authority's", shown(theirs.issue(t, "node", -hour, hour)), ""},
		{"its own", shown(theirs.self(t)), ""},
		{"expired", shown(ours.issue(t, "node", -2*hour, -hour)), ""},
		{"not valid yet", shown(ours.issue(t, "node", hour, 2*hour)), ""},
	} {
		for port, address := range o.ports {
			if port == "gateway" {
				continue
			}
			conn, err := tls.Dial("tcp", address, &tls.Config{RootCAs: o.roots, GetClientCertificate: tc.shown, NextProtos: []string{"h2", "http/1.1"}})
			if err == nil { // the node's refusal comes with the first answer
				var answer string
				if answer, err = say(conn, []byte("GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")); tells(answer) {
					t.Errorf("%s at %s: it says %q", tc.name, port, answer)
				}
				if err == nil && answer != "" && port != tc.allowed {
					t.Errorf("%s at %s: it answers %q", tc.name, port, answer)
				}
			}
		}
	}
	// A person's certificate is good, and its owner no node.
	person := ours.issue(t, "operate", -hour, hour)
	conn, err := tls.Dial("tcp", o.ports["raft"], &tls.Config{RootCAs: o.roots, Certificates: []tls.Certificate{person}})
	if err == nil {
		var answer string
		if answer, err = say(conn, make([]byte, 1000)); err != nil || answer != "" {
			t.Errorf("a person at Raft's port: %v, %q", err, answer)
		}
	}
}

// gateway tries to get in without TLS, without or with a wrong password, and with too much of everything.
func (o *outsider) gateway(t *testing.T, ctx context.Context) {
	url := encryptedURL(o.c, 1)
	for name, tc := range map[string]struct{ url, code string }{
		"without TLS":      {cluster.URL(o.c.Gateway(1)), "28000"},
		"without password": {strings.Replace(url, ":"+cluster.Password+"@", "@", 1), ""},
		"wrong password":   {strings.Replace(url, ":"+cluster.Password+"@", ":wrong@", 1), "28P01"},
		"nobody":           {strings.Replace(url, "//postgres:", "//nobody:", 1), "28P01"},
		"another database": {strings.Replace(url, "/postgres?", "/template1?", 1), "0A000"},
		"replication":      {url + "&replication=database", "0A000"},
		"an endless name":  {strings.Replace(url, "//postgres:", "//"+strings.Repeat("x", 20000)+":", 1), ""},
	} {
		config, err := pgconn.ParseConfig(tc.url)
		check(t, err)
		config.DialFunc = dialer.DialContext
		conn, err := pgconn.ConnectConfig(ctx, config)
		if err == nil {
			check(t, conn.Close(ctx))
			t.Errorf("%s: let in", name)
			continue
		}
		var e *pgconn.PgError
		if tc.code != "" && (!errors.As(err, &e) || e.Code != tc.code) {
			t.Errorf("%s: %v, want %s", name, err, tc.code)
		}
	}
	// A message that never ends, in place of a password.
	conn, err := tls.Dial("tcp", o.ports["gateway"], &tls.Config{RootCAs: o.roots, NextProtos: []string{"postgresql"}})
	check(t, err)
	answer, err := say(conn, append(startup("user", "postgres", "database", "postgres"), append([]byte{'p', 0x7f, 0xff, 0xff, 0xff}, make([]byte, 100<<10)...)...))
	if err != nil || !strings.Contains(answer, "08P01") {
		t.Errorf("an endless password: %v, %q", err, answer)
	}
}

// http asks for what is not everybody's to know.
func (o *outsider) http(t *testing.T, ctx context.Context) {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: o.roots}}}
	ask := func(method, path, token string) (int, string) {
		t.Helper()
		r, err := http.NewRequestWithContext(ctx, method, "https://"+o.ports["http"]+path, strings.NewReader(strings.Repeat("x", 100)))
		check(t, err)
		if token != "" {
			r.Header.Set("Authorization", "Bearer "+token)
		}
		response, err := client.Do(r)
		check(t, err)
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		check(t, err)
		return response.StatusCode, string(body)
	}
	for _, path := range []string{"/", "/metrics", "/events", "/debug/pprof/", "/../metrics", "//metrics", "/metrics/..;/metrics"} {
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodDelete, "NONSENSE"} {
			for _, token := range []string{"", "wrong", strings.Repeat("x", 10000)} {
				if code, body := ask(method, path, token); code < 400 && path != "/" || tells(body) {
					t.Errorf("%s %s with token %.10q: %d %q", method, path, token, code, body)
				}
			}
		}
	}
	// Health is everybody's to know, and what it takes to be healthy is not.
	if code, body := ask(http.MethodGet, "/liveness", ""); code != http.StatusOK || strings.Contains(body, "tested") {
		t.Errorf("liveness: %d %q", code, body)
	}
	// A token is good as long as it stands in the file.
	token, err := o.c.Command(ctx, "http-token", "--name", "test", "--role", "read", "--file", o.tokenFile(t))
	check(t, err)
	token = strings.TrimSpace(token)
	awaitCode := func(want int) {
		t.Helper()
		for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
			code, _ := ask(http.MethodGet, "/metrics", token)
			if code == want {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("with the token: %d, want %d", code, want)
			}
		}
	}
	awaitCode(http.StatusOK)
	check(t, os.WriteFile(o.tokenFile(t), nil, 0o600))
	awaitCode(http.StatusUnauthorized)
}

// tokenFile is the file of tokens for HTTP.
func (o *outsider) tokenFile(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(o.c.NodeDir(1), "quorate.yaml"))
	check(t, err)
	_, rest, _ := strings.Cut(string(text), "tokens: ")
	name, _, found := strings.Cut(rest, "}")
	if !found {
		t.Fatalf("the configuration names no tokens:\n%s", text)
	}
	return name
}

// silence connects and says nothing, or hardly anything: no port waits for long, except the gateway, which gives who
// types a password as long as PostgreSQL does.
func (o *outsider) silence(t *testing.T) {
	const limit = 20 * time.Second
	var all sync.WaitGroup
	silent := func(name string, conn net.Conn, drip string) {
		all.Go(func() {
			defer conn.Close()
			began := time.Now()
			for _, b := range []byte(drip) {
				if _, err := conn.Write([]byte{b}); err != nil || time.Since(began) > limit {
					break
				}
				time.Sleep(200 * time.Millisecond) // this is what is tested
			}
			if err := conn.SetReadDeadline(began.Add(limit)); err != nil {
				return
			}
			if _, err := io.ReadAll(conn); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: the connection is open after %v", name, limit)
			}
		})
	}
	for port, address := range o.ports {
		if port == "gateway" {
			continue
		}
		for name, drip := range map[string]string{"nothing": "", "half a handshake": "\x16\x03\x01\x02\x00\x01\x00", "drops": strings.Repeat("\x16\x03\x01\x02\x00", 1000)} {
			conn, err := net.Dial("tcp", address)
			check(t, err)
			silent(name+" at "+port, conn, drip)
		}
	}
	conn, err := tls.Dial("tcp", o.ports["http"], &tls.Config{RootCAs: o.roots})
	check(t, err)
	silent("slow headers", conn, "GET / HTTP/1.1\r\nHost: x\r\n"+strings.Repeat("X: y\r\n", 1000))
	all.Wait()
}

// crowd takes up as many connections as it gets. Members and clients that are there do not notice.
func (o *outsider) crowd(t *testing.T, works func()) {
	var crowd []net.Conn
	defer func() {
		for _, conn := range crowd {
			_ = conn.Close()
		}
	}()
	for _, address := range o.ports {
		for range 400 {
			conn, err := net.DialTimeout("tcp", address, time.Second)
			if err != nil {
				break // it has enough
			}
			crowd = append(crowd, conn)
		}
	}
	works()
}
