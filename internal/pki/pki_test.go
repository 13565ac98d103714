package pki

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quorate/quorate/internal/reload"
)

// place writes a pair to files and returns what Credentials read.
func place(t *testing.T, dir, name string, ca []byte, p Pair) Files {
	t.Helper()
	f := Files{CA: filepath.Join(dir, name+".ca"), Cert: filepath.Join(dir, name+".crt"), Key: filepath.Join(dir, name+".key")}
	for file, text := range map[string][]byte{f.CA: ca, f.Cert: p.Cert, f.Key: p.Key} {
		if err := WriteSecret(file, text, true); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func authority(t *testing.T) (*Authority, []byte) {
	t.Helper()
	a, pair, err := NewAuthority("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return a, pair.Cert
}

func issued(t *testing.T, a *Authority, name string, role Role, at time.Time) Pair {
	t.Helper()
	r := Request{Name: name, Role: role, Lifetime: 24 * time.Hour}
	if role == Node {
		r.Hosts = []string{"127.0.0.1", "Node1.Example"}
	}
	p, err := a.Issue(r, at)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func opened(t *testing.T, f Files) *Credentials {
	t.Helper()
	c, err := Open(f, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// shake connects a client to a server and returns what each says of it, and who the server saw.
func shake(t *testing.T, server, client *tls.Config) (peer tls.ConnectionState, serverErr, clientErr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			serverErr = err
			return
		}
		defer conn.Close()
		c := tls.Server(conn, server)
		if serverErr = c.HandshakeContext(t.Context()); serverErr == nil {
			peer = c.ConnectionState()
			_, serverErr = c.Write([]byte("x"))
		}
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := tls.Client(conn, client)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if clientErr = c.HandshakeContext(ctx); clientErr == nil { // in TLS 1.3 the server's refusal comes with the first read
		_, clientErr = io.ReadFull(c, make([]byte, 1))
	}
	_ = conn.Close()
	<-done
	return peer, serverErr, clientErr
}

func dialling(c *Credentials, host string) *tls.Config {
	cfg := c.Client()
	cfg.ServerName = host
	return cfg
}

// Who gets past a listener for nodes, and whom a node that connects takes for one.
func TestHandshakes(t *testing.T) {
	ours, ourCA := authority(t)
	theirs, theirCA := authority(t)
	dir := t.TempDir()
	node := opened(t, place(t, dir, "node", ourCA, issued(t, ours, "one", Node, time.Now())))
	other := opened(t, place(t, dir, "other", ourCA, issued(t, ours, "two", Node, time.Now())))
	person := opened(t, place(t, dir, "person", ourCA, issued(t, ours, "ann", Operate, time.Now())))
	stranger := opened(t, place(t, dir, "stranger", theirCA, issued(t, theirs, "one", Node, time.Now())))
	// Trusts us, and shows what its own authority says.
	impostor := opened(t, place(t, dir, "impostor", append(append([]byte{}, theirCA...), ourCA...), issued(t, theirs, "one", Node, time.Now())))
	expired := place(t, dir, "expired", ourCA, issued(t, ours, "old", Node, time.Now().Add(-23*time.Hour-59*time.Minute)))
	late := opened(t, expired)

	// Signed by an authority that also signs other servers.
	web, _, _, err := issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "web", OrganizationalUnit: []string{"web"}}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, ours.cert, ours.key)
	if err != nil {
		t.Fatal(err)
	}
	server := opened(t, place(t, dir, "web", ourCA, web))

	peer, serverErr, clientErr := shake(t, node.Server(), dialling(other, "127.0.0.1"))
	if serverErr != nil || clientErr != nil {
		t.Fatalf("two nodes: %v, %v", serverErr, clientErr)
	}
	if err := VerifyNode(peer); err != nil || Peer(peer).Subject.CommonName != "two" {
		t.Errorf("two nodes: the server sees %v, %v", Peer(peer), err)
	}
	if peer, serverErr, clientErr = shake(t, node.Server(), dialling(person, "node1.example")); serverErr != nil || clientErr != nil {
		t.Errorf("a person: %v, %v", serverErr, clientErr)
	}
	if err := VerifyNode(peer); err == nil || RoleOf(Peer(peer)) != Operate {
		t.Errorf("a person passes for a node: %v", err)
	}

	for _, tc := range []struct {
		name           string
		server, client *tls.Config
		want           string // in what either side says
	}{
		{"no certificate", node.Server(), &tls.Config{InsecureSkipVerify: true}, "certificate required"},
		{"another authority's", node.Server(), dialling(impostor, "127.0.0.1"), "unknown authority"},
		{"a server of another authority", stranger.Server(), dialling(node, "127.0.0.1"), "unknown authority"},
		{"a server elsewhere", other.Server(), dialling(node, "127.0.0.2"), "not 127.0.0.2"},
		{"a person's certificate on a server", person.Server(), dialling(node, "127.0.0.1"), "IP SANs"},
		{"a server that is no node", server.Server(), dialling(node, "127.0.0.1"), "must be a node's"},
		{"old TLS", node.Server(), &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}, "protocol version"},
		{"expired", node.Server(), func() *tls.Config {
			c := dialling(late, "127.0.0.1")
			c.Time = func() time.Time { return time.Now().Add(-time.Hour) }
			return c
		}(), ""},
	} {
		if tc.name == "expired" {
			tc.server = tc.server.Clone()
			later := func() time.Time { return time.Now().Add(time.Hour) }
			inner := tc.server.GetConfigForClient
			tc.server.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
				c, err := inner(h)
				c.Time = later
				return c, err
			}
			tc.want = "expired"
		}
		_, serverErr, clientErr := shake(t, tc.server, tc.client)
		if serverErr == nil || clientErr == nil || !strings.Contains(fmt.Sprint(serverErr, clientErr), tc.want) {
			t.Errorf("%s: the server says %v, the client %v: want %q", tc.name, serverErr, clientErr, tc.want)
		}
	}
}

// The certificate and the authorities of a running node change under it.
func TestReload(t *testing.T) {
	ours, ourCA := authority(t)
	next, nextCA := authority(t)
	dir := t.TempDir()
	files := place(t, dir, "node", ourCA, issued(t, ours, "one", Node, time.Now()))
	var logged bytes.Buffer
	now := time.Now()
	c, err := open(files, slog.New(slog.NewTextHandler(&logged, nil)), func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	server := c.Server()
	client := func() error {
		peer := opened(t, place(t, dir, "peer", append(append([]byte{}, ourCA...), nextCA...), issued(t, next, "two", Node, time.Now())))
		_, serverErr, clientErr := shake(t, server, dialling(peer, "127.0.0.1"))
		return errors.Join(serverErr, clientErr)
	}
	if client() == nil {
		t.Fatal("a certificate of an authority that is not trusted yet is good")
	}

	// A new authority is trusted beside the old one, and gives the node a new certificate.
	renewed := issued(t, next, "one again", Node, time.Now())
	place(t, dir, "node", append(append([]byte{}, ourCA...), nextCA...), renewed)
	if name := c.Certificate().Subject.CommonName; name != "one" {
		t.Errorf("the files are read again at once: %s", name)
	}
	now = now.Add(reload.Interval)
	if err := client(); err != nil {
		t.Errorf("after the change: %v", err)
	}
	if name := c.Certificate().Subject.CommonName; name != "one again" {
		t.Errorf("the certificate is still that of %s", name)
	}

	// What cannot be used does no harm, is told of once, and what is good after it is taken.
	for _, tc := range []struct {
		broken Pair
		ca     []byte
		want   string
	}{
		{Pair{Cert: []byte("garbage"), Key: renewed.Key}, nextCA, "failed to find any PEM data"},
		{Pair{Cert: renewed.Cert, Key: issued(t, next, "x", Node, time.Now()).Key}, nextCA, "does not match"},
		{issued(t, next, "past", Node, time.Now().Add(-48*time.Hour)), nextCA, "not now"},
		{renewed, ourCA, "unknown authority"},
		{renewed, []byte("nothing"), "no certificate"},
	} {
		logged.Reset()
		place(t, dir, "node", tc.ca, tc.broken)
		for range 3 {
			now = now.Add(reload.Interval)
			if name := c.Certificate().Subject.CommonName; name != "one again" {
				t.Fatalf("%s: the certificate is that of %s", tc.want, name)
			}
		}
		if got := logged.String(); strings.Count(got, "level=ERROR") != 1 || !strings.Contains(got, tc.want) {
			t.Errorf("want one error with %q, got %s", tc.want, got)
		}
	}
	if err := os.Remove(files.Key); err != nil {
		t.Fatal(err)
	}
	now = now.Add(reload.Interval)
	if err := client(); err != nil {
		t.Errorf("with its key removed: %v", err)
	}
	place(t, dir, "node", nextCA, issued(t, next, "three", Node, time.Now()))
	now = now.Add(reload.Interval)
	if name := c.Certificate().Subject.CommonName; name != "three" {
		t.Errorf("the certificate is that of %s after it was mended", name)
	}
}

func TestOpenRefuses(t *testing.T) {
	a, ca := authority(t)
	_, otherCA := authority(t)
	dir := t.TempDir()
	good := issued(t, a, "one", Node, time.Now())
	for _, tc := range []struct {
		name, want string
		files      Files
	}{
		{"missing", "no such file", Files{CA: dir + "/a", Cert: dir + "/b", Key: dir + "/c"}},
		{"expired", "not now", place(t, dir, "expired", ca, issued(t, a, "old", Node, time.Now().Add(-48*time.Hour)))},
		{"other authority", "unknown authority", place(t, dir, "foreign", otherCA, good)},
		{"swapped", "does not match", place(t, dir, "swapped", ca, Pair{good.Cert, issued(t, a, "two", Node, time.Now()).Key})},
		{"too large", "no regular file", place(t, dir, "large", ca, Pair{good.Cert, bytes.Repeat([]byte("x"), maxFile+1)})},
		{"directory", "no regular file", Files{CA: dir, Cert: place(t, dir, "dir", ca, good).Cert, Key: dir + "/dir.key"}},
	} {
		_, err := Open(tc.files, slog.New(slog.DiscardHandler))
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
	open1 := place(t, dir, "readable", ca, good)
	if err := os.Chmod(open1.Key, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(open1, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a key that all can read: %v", err)
	}
	person := opened(t, place(t, dir, "person", ca, issued(t, a, "ann", Read, time.Now())))
	if err := person.RequireNode(); err == nil || !strings.Contains(err.Error(), "role read") {
		t.Errorf("a person's certificate for a node: %v", err)
	}
	if err := opened(t, place(t, dir, "node", ca, good)).RequireNode(); err != nil {
		t.Error(err)
	}
}

func TestIssueRefuses(t *testing.T) {
	a, _ := authority(t)
	for _, tc := range []struct {
		want string
		r    Request
	}{
		{`name ""`, Request{Role: Read, Lifetime: time.Hour}},
		{"64 bytes", Request{Name: strings.Repeat("x", 65), Role: Read, Lifetime: time.Hour}},
		{"role none", Request{Name: "x", Lifetime: time.Hour}},
		{"lifetime", Request{Name: "x", Role: Read}},
		{"needs the addresses", Request{Name: "x", Role: Node, Lifetime: time.Hour}},
		{"only a node", Request{Name: "x", Role: Read, Hosts: []string{"h"}, Lifetime: time.Hour}},
		{`"h:1"`, Request{Name: "x", Role: Node, Hosts: []string{"h:1"}, Lifetime: time.Hour}},
		{`"a b"`, Request{Name: "x", Role: Node, Hosts: []string{"a b"}, Lifetime: time.Hour}},
		{`""`, Request{Name: "x", Role: Node, Hosts: []string{""}, Lifetime: time.Hour}},
	} {
		if _, err := a.Issue(tc.r, time.Now()); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: %v", tc.r, err)
		}
	}
	if _, err := a.Issue(Request{Name: "x", Role: Read, Lifetime: time.Hour}, time.Now().Add(2*AuthorityLifetime)); err == nil {
		t.Error("an authority that has expired issues")
	}
}

// An authority that was written is the same when it is read.
func TestAuthorityFiles(t *testing.T) {
	_, pair, err := NewAuthority("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	f := place(t, dir, "ca", pair.Cert, pair)
	a, err := LoadAuthority(f.Cert, f.Key)
	if err != nil {
		t.Fatal(err)
	}
	node := place(t, dir, "node", pair.Cert, issued(t, a, "one", Node, time.Now()))
	opened(t, node)
	if _, err := LoadAuthority(node.Cert, node.Key); err == nil {
		t.Error("a node is taken for an authority")
	}
	if err := WriteSecret(f.Key, []byte("x"), false); !errors.Is(err, fs.ErrExist) {
		t.Errorf("overwriting a key: %v", err)
	}
	if info, err := os.Stat(f.Key); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key: %v, %v", info.Mode(), err)
	}
	left, err := filepath.Glob(filepath.Join(dir, ".*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// Two roles in one certificate are none.
func TestRoleOf(t *testing.T) {
	a, _ := authority(t)
	for units, want := range map[string]Role{"": None, "read": Read, "node": Node, "it department,operate": Operate, "read,operate": None, "Node": None} {
		leaf := *a.cert
		leaf.Subject.OrganizationalUnit = strings.Split(units, ",")
		if got := RoleOf(&leaf); got != want {
			t.Errorf("%q is %s, want %s", units, got, want)
		}
	}
}
