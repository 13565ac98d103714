package gateway

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

func TestClientRules(t *testing.T) {
	rule := func(from string, access RuleAccess) Rule { return Rule{netip.MustParsePrefix(from), access} }
	rules := []Rule{rule("10.0.0.5/32", Deny), rule("10.0.0.0/8", Allow), rule("192.168.0.0/16", AllowTLS), rule("fd00::/8", AllowTLS), rule("fd00::1/128", Allow)}
	for _, tc := range []struct {
		from               string
		plain, tls         bool // what the rules allow
		anyPlain, required bool // what no rules allow, and what is left without TLS if it is required
	}{
		{"10.1.2.3", true, true, true, false},
		{"10.0.0.5", false, false, true, false},
		{"192.168.1.1", false, true, true, false},
		{"172.16.0.1", false, false, true, false},
		{"127.0.0.1", false, false, true, false},
		{"fd00::1", false, true, true, false}, // the first rule counts, not the narrowest
	} {
		from := netip.MustParseAddr(tc.from)
		g := &Gateway{cfg: Config{Rules: rules}}
		if got := [2]bool{g.admit(from, false) == nil, g.admit(from, true) == nil}; got != [2]bool{tc.plain, tc.tls} {
			t.Errorf("%s is allowed without and with TLS: %v, want %v %v", tc.from, got, tc.plain, tc.tls)
		}
		g.cfg.RequireTLS = true
		if g.admit(from, false) == nil != tc.required || (g.admit(from, true) == nil) != tc.tls {
			t.Errorf("%s with TLS required: %v, %v", tc.from, g.admit(from, false), g.admit(from, true))
		}
		if g := (&Gateway{}); g.admit(from, false) == nil != tc.anyPlain {
			t.Errorf("%s without rules: %v", tc.from, g.admit(from, false))
		}
	}
	mapped := &net.TCPAddr{IP: net.ParseIP("::ffff:10.0.0.1")}
	if a := clientAddress(addressed{remote: mapped}); !rules[1].From.Contains(a) {
		t.Errorf("%v is %v", mapped, a)
	}
	if err := (&Gateway{cfg: Config{Rules: rules}}).admit(clientAddress(addressed{remote: &net.UnixAddr{}}), true); err == nil {
		t.Error("a client without an address is allowed by rules for addresses")
	}
}

// addressed is a connection of which only the address is asked.
type addressed struct {
	net.Conn
	remote net.Addr
}

func (a addressed) RemoteAddr() net.Addr { return a.remote }

// An answer of the server counts as a login only if a question came before it.
func TestLoginNeedsProof(t *testing.T) {
	local, remote := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("10.0.0.1")
	for _, tc := range []struct {
		name  string
		kinds []uint32
		from  netip.Addr
		trust bool
		want  bool
	}{
		{"trust, remote", []uint32{0}, remote, false, false},
		{"trust, remote, although loopback is trusted", []uint32{0}, remote, true, false},
		{"trust, here", []uint32{0}, local, false, false},
		{"trust, here, wanted", []uint32{0}, local, true, true},
		{"no address", []uint32{0}, netip.Addr{}, true, false},
		{"password", []uint32{3, 0}, remote, false, true},
		{"scram", []uint32{10, 11, 12, 0}, remote, false, true},
		{"what is no question", []uint32{12, 0}, remote, false, false},
	} {
		var p proof
		var err error
		for _, kind := range tc.kinds {
			err = errors.Join(err, p.authentication(kind, tc.from, tc.trust))
		}
		if (err == nil) != tc.want {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

// With a real server that trusts everybody, and clients that are not to be trusted by it.
func TestServerTrustIsNoLogin(t *testing.T) {
	f := newFixture(t, 18)
	cfg := f.config()
	cfg.Registerer, cfg.TrustLoopback = nil, false
	strict := *f
	strict.g = New(cfg)
	if err := strict.g.Open(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := strict.g.Close(); err != nil {
			t.Error(err)
		}
	}()
	_, err := pgconn.Connect(timeout(t), strict.url("postgres"))
	var e *pgconn.PgError
	if !errors.As(err, &e) || e.Code != codeAuthorization || e.Severity != "FATAL" || !strings.Contains(e.Hint, "scram-sha-256") {
		t.Errorf("connecting without a password: %v", err)
	}
	c, err := pgconn.Connect(timeout(t), f.url("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(context.Background())
	// Where the client is, the session can be asked.
	expect(t, c, "SELECT current_setting('quorate.client_address')", "("+c.Conn().LocalAddr().String()+") SELECT 1 I")
	for _, forged := range []string{"&quorate.client_address=10.0.0.1", "&options=-c%20quorate.client_address%3D10.0.0.1", "&options=--quorate.client-address%3D10.0.0.1"} {
		if _, err := pgconn.Connect(timeout(t), f.url("postgres")+forged); !errors.As(err, &e) || e.Code != codeCannotChange {
			t.Errorf("%s: %v", forged, err)
		}
	}
}

// Who only connects takes places that are not the clients', and not without end.
func TestManyConnections(t *testing.T) {
	f := newFixture(t, 18)
	var silent []net.Conn
	defer func() {
		for _, c := range silent {
			_ = c.Close()
		}
	}()
	cfg := f.g.cfg
	limit := 2*cfg.MaxConnections + spareConnections
	refused := 0
	for range limit + 20 {
		c, err := net.Dial("tcp", f.g.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		silent = append(silent, c)
	}
	for _, c := range silent[limit:] {
		if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 200)
		if n, err := c.Read(b); err == nil && strings.Contains(string(b[:n]), codeTooMany) {
			refused++
		}
	}
	if refused != 20 {
		t.Errorf("%d of 20 too many were refused", refused)
	}
	for _, c := range silent[:40] {
		_ = c.Close()
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		c, err := pgconn.Connect(timeout(t), f.url("postgres"))
		if err == nil {
			_ = c.Close(context.Background())
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("when some have gone: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
