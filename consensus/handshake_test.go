package consensus

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/quorate/quorate/txn"
)

func FuzzReadGreeting(f *testing.F) {
	good := greeting{welcome, [16]byte{1, 2, 3}, 4, 5}.encode()
	f.Add(good)
	f.Add(append(good, "and more"...))
	f.Add(good[:greetingSize-1])
	f.Add([]byte("GET / HTTP/1.1\r\nHost: quorate\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		g, err := readGreeting(r)
		read := len(b) - r.Len()
		if read > greetingSize {
			t.Errorf("read %d bytes", read)
		}
		if err == nil && !bytes.Equal(g.encode(), b[:greetingSize]) {
			t.Errorf("%x was read as %+v", b, g)
		}
		if err != nil && !errors.Is(err, errNotGreeting) && !errors.Is(err, errGreetingVersion) {
			t.Error(err)
		}
	})
}

// listenAs starts a transport without Raft behind it, and counts whom it refuses.
func listenAs(t *testing.T, conf streamConfig) (*transport, map[string]*atomic.Int32) {
	t.Helper()
	refused := make(map[string]*atomic.Int32)
	for _, reason := range refusals {
		refused[reason] = new(atomic.Int32)
	}
	conf.refused = func(reason string, _ error) { refused[reason].Add(1) }
	tr, err := listenRaft("127.0.0.1:0", transportConfig{
		streamConfig: conf, logger: hclog.NewNullLogger(), refuseSnapshot: func(uint64) error { return nil }, injected: func() {},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
	})
	return tr, refused
}

// ask sends a message from one transport to another, which answers it.
func ask(from, to *transport, id raft.ServerID) error {
	done := make(chan error, 1)
	go func() {
		var answer raft.RequestVoteResponse
		done <- from.RequestVote(id, raft.ServerAddress(to.stream.Addr().String()+" 127.0.0.1:1"), &raft.RequestVoteRequest{
			RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte("1"), Addr: []byte("1")},
		}, &answer)
	}()
	select {
	case rpc := <-to.Consumer():
		rpc.Respond(&raft.RequestVoteResponse{}, nil)
		return <-done
	case err := <-done:
		return err
	case <-time.After(patience):
		return errors.New("nothing happens")
	}
}

// requireCut waits until the other side has hung up, and returns what it said before.
func requireCut(t *testing.T, conn net.Conn) []byte {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	said, err := io.ReadAll(conn)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Error("a stranger is still connected")
	}
	return said
}

func TestStrangersAreTurnedAway(t *testing.T) {
	parallel(t)
	t.Cleanup(func() { requireNoGoroutines(t) })
	cluster := [16]byte{7, 7, 7}
	tr, refused := listenAs(t, streamConfig{node: 2, cluster: cluster})
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", tr.stream.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	silent := dial()
	version := greeting{cluster: cluster, from: 1, to: 2}.encode()
	version[len(greetingMagic)]++
	for _, stranger := range []struct {
		name   string
		says   []byte
		hears  verdict // welcome: nothing at all
		reason string
	}{
		{"browser", []byte("GET / HTTP/1.1\r\n\r\n"), welcome, refusedGreeting},
		{"old node", append([]byte{3}, make([]byte, 100)...), welcome, refusedGreeting},
		{"TLS", []byte{22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}, welcome, refusedGreeting},
		{"without end", bytes.Repeat([]byte("quorate!"), 1<<16), welcome, refusedGreeting},
		{"another version", version, wrongVersion, refusedVersion},
		{"another cluster", greeting{cluster: [16]byte{8}, from: 1, to: 2}.encode(), wrongCluster, refusedCluster},
		{"another node", greeting{cluster: cluster, from: 1, to: 3}.encode(), wrongNode, refusedNode},
	} {
		before := refused[stranger.reason].Load()
		conn := dial()
		_, _ = conn.Write(stranger.says) // it may be cut while it speaks
		said := requireCut(t, conn)
		switch {
		case stranger.hears == welcome && len(said) > 0:
			t.Errorf("%s is told %q", stranger.name, said)
		case stranger.hears != welcome:
			if g, err := readGreeting(bytes.NewReader(said)); err != nil || g.verdict != stranger.hears || stranger.hears == wrongCluster && g.cluster == cluster {
				t.Errorf("%s is told %+v, %v", stranger.name, g, err)
			}
		}
		for deadline := time.Now().Add(patience); refused[stranger.reason].Load() != before+1; {
			if time.Now().After(deadline) {
				t.Fatalf("%s is not counted", stranger.name)
			}
			time.Sleep(time.Millisecond) // the answer may be there before
		}
	}
	other, _ := listenAs(t, streamConfig{node: 1, cluster: cluster})
	if err := ask(other, tr, "2"); err != nil {
		t.Errorf("a member is turned away: %v", err)
	}
	if err := ask(other, tr, "3"); err == nil {
		t.Error("node 2 was taken for node 3")
	}
	foreign, _ := listenAs(t, streamConfig{node: 1, cluster: [16]byte{8}})
	if err := ask(foreign, tr, "2"); err == nil {
		t.Error("a member of another cluster got through")
	}
	requireCut(t, silent) // in its time
}

// An answering side that is not who was meant is hung up on: it may be the one that is wrong.
func TestDialerLooksWhoAnswers(t *testing.T) {
	t.Cleanup(func() { requireNoGoroutines(t) })
	cluster := [16]byte{7}
	tr, _ := listenAs(t, streamConfig{node: 1, cluster: cluster})
	for name, answer := range map[string][]byte{
		"another cluster": greeting{cluster: [16]byte{8}, from: 2, to: 1}.encode(),
		"another node":    greeting{cluster: cluster, from: 3, to: 1}.encode(),
		"for another":     greeting{cluster: cluster, from: 2, to: 3}.encode(),
		"garbage":         make([]byte, 1000),
		"nothing":         nil,
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			defer l.Close()
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = readGreeting(conn)
			_, _ = conn.Write(answer)
			if answer == nil {
				_ = conn.Close()
			}
			_, _ = io.Copy(io.Discard, conn)
			_ = conn.Close()
		}()
		if _, err := tr.stream.Dial(target("2", raft.ServerAddress(l.Addr().String())), patience); err == nil {
			t.Errorf("%s: connected", name)
		}
	}
}

// So many silent strangers that no more are let in are gone after a while, and members get through again.
func TestManyStrangers(t *testing.T) {
	t.Cleanup(func() { requireNoGoroutines(t) })
	tr, refused := listenAs(t, streamConfig{node: 2})
	other, _ := listenAs(t, streamConfig{node: 1})
	var conns []net.Conn
	for range maxUnknown + 20 {
		conn, err := net.Dial("tcp", tr.stream.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		conns = append(conns, conn)
	}
	requireCut(t, conns[len(conns)-1])
	for deadline := time.Now().Add(patience); refused[refusedCrowded].Load() != 20; {
		if time.Now().After(deadline) {
			t.Fatalf("%d were turned away at once", refused[refusedCrowded].Load())
		}
		time.Sleep(time.Millisecond) // it is counted after it is cut
	}
	for _, conn := range conns {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
	for deadline := time.Now().Add(patience); ask(other, tr, "2") != nil; {
		if time.Now().After(deadline) {
			t.Fatal("members do not get through any more")
		}
	}
}

// authority signs certificates, in memory.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t}
	a.cert, a.key = a.make(&x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

func (a *authority) make(template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

func (a *authority) issue(role string) tls.Certificate {
	cert, key := a.make(&x509.Certificate{
		Subject: pkix.Name{OrganizationalUnit: []string{role}}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// secure makes a stream configuration encrypt with what current returns at the time of each connection.
func secure(c *streamConfig, current func() (tls.Certificate, *x509.CertPool)) {
	c.serverTLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		cert, pool := current()
		return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}, nil
	}}
	c.clientTLS = func() *tls.Config {
		cert, pool := current()
		return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, RootCAs: pool}
	}
	c.verifyPeer = func(s tls.ConnectionState) error {
		if role := s.PeerCertificates[0].Subject.OrganizationalUnit; len(role) != 1 || role[0] != "node" {
			return fmt.Errorf("role %q", role)
		}
		return nil
	}
}

func TestRaftConnectionsWithTLS(t *testing.T) {
	t.Cleanup(func() { requireNoGoroutines(t) })
	ours, theirs := newAuthority(t), newAuthority(t)
	of := func(a *authority, role string) func() (tls.Certificate, *x509.CertPool) {
		cert, pool := a.issue(role), a.pool()
		return func() (tls.Certificate, *x509.CertPool) { return cert, pool }
	}
	with := func(node txn.NodeID, current func() (tls.Certificate, *x509.CertPool)) (*transport, map[string]*atomic.Int32) {
		conf := streamConfig{node: node}
		if current != nil {
			secure(&conf, current)
		}
		return listenAs(t, conf)
	}
	var now atomic.Pointer[func() (tls.Certificate, *x509.CertPool)]
	first := of(ours, "node")
	now.Store(&first)
	tr, refused := with(2, func() (tls.Certificate, *x509.CertPool) { return (*now.Load())() })
	member, _ := with(1, of(ours, "node"))
	if err := ask(member, tr, "2"); err != nil {
		t.Fatalf("a member is turned away: %v", err)
	}
	plain, _ := with(1, nil)
	person, _ := with(1, of(ours, "operate"))
	stranger, _ := with(1, of(theirs, "node"))
	for name, from := range map[string]*transport{"without TLS": plain, "a person": person, "of another authority": stranger} {
		before := refused[refusedTLS].Load()
		if err := ask(from, tr, "2"); err == nil {
			t.Errorf("%s: got through", name)
		}
		for deadline := time.Now().Add(patience); refused[refusedTLS].Load() == before; {
			if time.Now().After(deadline) {
				t.Errorf("%s: not counted", name)
				break
			}
			time.Sleep(time.Millisecond) // the other side may hear of it later
		}
		if err := ask(member, from, "1"); err == nil {
			t.Errorf("%s: a member has connected to it", name)
		}
	}
	// Certificates can change while connections last; new ones are made with the new.
	second := of(theirs, "node")
	now.Store(&second)
	if err := ask(stranger, tr, "2"); err != nil {
		t.Errorf("after the change: %v", err)
	}
	if err := ask(member, tr, "2"); err != nil {
		t.Errorf("over the connection from before: %v", err)
	}
}

// A group whose connections are encrypted works, and tells how often somebody else tried.
func TestClusterWithTLS(t *testing.T) {
	parallel(t)
	a := newAuthority(t)
	tc := newCluster(t, 3, func(c *Config) {
		var s streamConfig
		cert, pool := a.issue("node"), a.pool()
		secure(&s, func() (tls.Certificate, *x509.CertPool) { return cert, pool })
		c.ServerTLS, c.ClientTLS, c.VerifyPeer, c.ClusterID = s.serverTLS, s.clientTLS, s.verifyPeer, [16]byte{1}
	})
	last := tc.propose(tc.follower(), string(make([]byte, 1<<20)))
	for _, n := range tc.nodes {
		n.machine.awaitIndex(t, last)
	}
	conn, err := net.Dial("tcp", tc.nodes[0].member.RaftAddress)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("hello, is anybody there?")); err != nil {
		t.Fatal(err)
	}
	requireCut(t, conn)
	if n := testutil.ToFloat64(tc.nodes[0].c.metrics.refusals.WithLabelValues(refusedTLS)); n != 1 {
		t.Errorf("%v are counted", n)
	}
}
