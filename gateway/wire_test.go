package gateway

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/quorate/quorate/gateway/sqllex"
)

// frames cuts a stream into messages in every way the reader offers, and returns them all.
func frames(input io.Reader, limit int) (out [][]byte, err error) {
	rd := newReader(input, limit)
	for i := 0; ; i++ {
		m, err := rd.next(nil)
		if err != nil {
			return out, err
		}
		switch i % 3 {
		case 0:
			m, err = rd.whole(m)
			if err != nil {
				return out, err
			}
			out = append(out, bytes.Clone(m.data))
		case 1:
			b := bytes.Clone(m.data)
			if err := rd.relayRest(&m, func(p []byte) error { b = append(b, p...); return nil }); err != nil {
				return out, err
			}
			out = append(out, b)
		default:
			out = append(out, nil)
			if err := rd.discardRest(&m); err != nil {
				return out, err
			}
		}
	}
}

func TestReader(t *testing.T) {
	var stream []byte
	var want [][]byte
	for i, size := range []int{0, 1, 10, readBuffer - 5, readBuffer - 4, 3 * readBuffer, 5, 100000, 7, 2 * readBuffer, 0, 0} {
		b, at := begin(nil, byte('a'+i))
		b = end(append(b, bytes.Repeat([]byte{byte(i)}, size)...), at)
		stream = append(stream, b...)
		if i%3 == 2 {
			b = nil
		}
		want = append(want, b)
	}
	for name, r := range map[string]io.Reader{"whole": bytes.NewReader(stream), "byte by byte": iotest.OneByteReader(bytes.NewReader(stream)),
		"halves": iotest.HalfReader(bytes.NewReader(stream)), "error with data": iotest.DataErrReader(bytes.NewReader(stream))} {
		got, err := frames(r, 1<<20)
		if !errors.Is(err, io.EOF) || len(got) != len(want) {
			t.Fatalf("%s: %d messages, %v", name, len(got), err)
		}
		for i := range want {
			if !bytes.Equal(got[i], want[i]) {
				t.Errorf("%s: message %d differs", name, i)
			}
		}
	}
	var p *protocolError
	if _, err := frames(bytes.NewReader(stream), 1000); !errors.As(err, &p) {
		t.Errorf("oversized message: %v", err)
	}
}

func FuzzReader(f *testing.F) {
	f.Add([]byte("Q\x00\x00\x00\x05x"))
	f.Add([]byte("Q\x00\x00\x00\x03"))
	f.Add([]byte("Q\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := frames(iotest.OneByteReader(bytes.NewReader(b)), 1<<16)
		if err == nil {
			t.Fatal("a stream without an end")
		}
		var whole []byte
		for i, m := range got {
			if i%3 == 2 {
				return // what was discarded is not known
			}
			whole = append(whole, m...)
		}
		if !bytes.HasPrefix(b, whole) {
			t.Fatalf("%q became %q", b, whole)
		}
	})
}

// FuzzStartup: no startup packet, error or mechanism list makes the gateway panic, and none opens the side door.
func FuzzStartup(f *testing.F) {
	f.Add([]byte("user\x00postgres\x00options\x00-c default_transaction_read_only=off\x00\x00"), `-c a=b --c-d=e\ f -cx=y`)
	f.Fuzz(func(t *testing.T, body []byte, options string) {
		g := New(Config{Database: "postgres"})
		from := &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 5}
		packet, _, err := g.rewriteStartup(196608, body, from)
		if err == nil && !bytes.Contains(packet, []byte("-c quorate.client_address=10.0.0.1:5 -c default_transaction_read_only=on\x00")) {
			t.Fatalf("%q", packet)
		}
		out, _, err := rewriteOptions(options, nil, from)
		if err == nil {
			words := splitOptions(out)
			if words[len(words)-1] != "default_transaction_read_only=on" {
				t.Fatalf("%q became %q", options, out)
			}
			for _, w := range words[:len(words)-1] {
				if strings.HasPrefix(w, "default_transaction_read_only") {
					t.Fatalf("%q became %q", options, out)
				}
			}
		}
		errorField(body, 'C')
		appendMechanisms(nil, body)
		if len(body) > 5 {
			shiftPosition(body, 3)
		}
	})
}

func TestMetrics(t *testing.T) {
	r := prometheus.NewRegistry()
	m := newMetrics()
	if err := m.register(r); err != nil {
		t.Fatal(err)
	}
	m.aborts.WithLabelValues("conflict").Inc()
	m.refused.WithLabelValues(codeUnsupported).Inc()
	problems, err := testutil.GatherAndLint(r)
	if err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
	if err := m.register(r); err == nil {
		t.Error("registered twice")
	}
	m.unregister(r)
	if err := m.register(r); err != nil {
		t.Error(err)
	}
}

func TestErrors(t *testing.T) {
	for r := sqllex.Serializable; r <= sqllex.OwnSetting; r++ {
		if e := refusals[r]; e == nil || e.message == "" || e.code != map[bool]string{true: codeCannotChange, false: codeUnsupported}[r == sqllex.OwnSetting] || e.hint == "" && e.detail == "" && r < sqllex.OwnPublication {
			t.Errorf("refusal %d: %+v", r, e)
		}
	}
	m := (&sqlError{code: "42601", message: "é", hint: "h"}).append(nil)
	m = append(m[:len(m)-1], "P7\x00\x00"...)
	m = end(m, 0)
	if got := errorField(shiftPosition(m, 10)[5:], 'P'); string(got) != "17" {
		t.Errorf("position %s", got)
	}
}

// TestStatementSet: it is bounded.
func TestStatementSet(t *testing.T) {
	var s statementSet
	for i := range uint64(2*maxRemembered + 10) {
		s.add(i)
		if !s.has(i) {
			t.Fatalf("%d was forgotten at once", i)
		}
	}
	if n := len(*s.set.Load()); n > maxRemembered {
		t.Errorf("%d remembered", n)
	}
}

// TestAuthentication: passwords are relayed, also SCRAM without channel binding behind the gateway's own TLS.
func TestAuthentication(t *testing.T) {
	f := newFixture(t, 18)
	f.direct("SET password_encryption = 'scram-sha-256'; CREATE ROLE scram LOGIN PASSWORD 'secret'; CREATE ROLE plain LOGIN PASSWORD 'open'")
	f.direct("SET password_encryption = 'md5'; CREATE ROLE hashed LOGIN PASSWORD 'sesame'")
	hba := filepath.Join(f.server.Config().DataDir, "pg_hba.conf")
	old, err := os.ReadFile(hba)
	if err != nil {
		t.Fatal(err)
	}
	rules := "host all scram all scram-sha-256\nhost all plain all password\nhost all hashed all md5\n"
	if err := os.WriteFile(hba, append([]byte(rules), old...), 0o600); err != nil {
		t.Fatal(err)
	}
	f.direct("SELECT pg_reload_conf()")
	f.await("SELECT count(*)::text FROM pg_hba_file_rules WHERE auth_method = 'scram-sha-256' AND user_name = '{scram}'", "1")

	cfg := f.config()
	cfg.Registerer = nil
	cfg.TLS = &tls.Config{Certificates: []tls.Certificate{certificate(t)}}
	encrypted := *f
	encrypted.g = New(cfg)
	if err := encrypted.g.Open(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := encrypted.g.Close(); err != nil {
			t.Error(err)
		}
	}()
	for user, password := range map[string]string{"scram": "secret", "plain": "open", "hashed": "sesame"} {
		for _, gateway := range []*fixture{f, &encrypted} {
			cfg, err := pgconn.ParseConfig(strings.Replace(gateway.url(user), "sslmode=disable", "sslmode=prefer", 1))
			if err != nil {
				t.Fatal(err)
			}
			cfg.Password = password
			c, err := pgconn.ConnectConfig(timeout(t), cfg)
			if err != nil {
				t.Errorf("%s: %v", user, err)
				continue
			}
			_, secure := c.Conn().(*tls.Conn)
			if secure != (gateway == &encrypted) {
				t.Errorf("%s: encrypted %v", user, secure)
			}
			expect(t, c, "SELECT current_user", "("+user+") SELECT 1 I")
			if err := c.Close(context.Background()); err != nil {
				t.Error(err)
			}
			cfg.Password = "wrong"
			_, err = pgconn.ConnectConfig(timeout(t), cfg)
			var e *pgconn.PgError
			if !errors.As(err, &e) || e.Code != "28P01" {
				t.Errorf("%s with a wrong password: %v", user, err)
			}
		}
	}
	// An ordinary role can be nudged.
	f.direct("GRANT ALL ON t TO scram")
	direct, err := pgx.ParseConfig(strings.Replace(encrypted.url("scram"), "sslmode=disable", "sslmode=require", 1))
	if err != nil {
		t.Fatal(err)
	}
	direct.Password = "secret"
	direct.TLSConfig.NextProtos = []string{"postgresql"}
	direct.SSLNegotiation = "direct"
	c, err := pgx.ConnectConfig(timeout(t), direct)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(context.Background())
	if _, err := c.Exec(timeout(t), "INSERT INTO t VALUES (1)"); err != nil {
		t.Error(err)
	}
}

func certificate(t *testing.T) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
