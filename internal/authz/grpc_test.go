package authz

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/internal/pki"
)

type certificates struct {
	dir string
	ca  *pki.Authority
}

func newCertificates(t *testing.T) certificates {
	t.Helper()
	ca, pair, err := pki.NewAuthority("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c := certificates{t.TempDir(), ca}
	if err := pki.WriteSecret(filepath.Join(c.dir, "ca"), pair.Cert, false); err != nil {
		t.Fatal(err)
	}
	return c
}

// of returns the credentials of somebody new.
func (c certificates) of(t *testing.T, name string, role pki.Role) *pki.Credentials {
	t.Helper()
	r := pki.Request{Name: name, Role: role, Lifetime: time.Hour}
	if role == pki.Node {
		r.Hosts = []string{"127.0.0.1"}
	}
	p, err := c.ca.Issue(r, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	f := pki.Files{CA: filepath.Join(c.dir, "ca"), Cert: filepath.Join(c.dir, name+".crt"), Key: filepath.Join(c.dir, name+".key")}
	for file, text := range map[string][]byte{f.Cert: p.Cert, f.Key: p.Key} {
		if err := pki.WriteSecret(file, text, true); err != nil {
			t.Fatal(err)
		}
	}
	credentials, err := pki.Open(f, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return credentials
}

const (
	check = "/grpc.health.v1.Health/Check"
	watch = "/grpc.health.v1.Health/Watch"
	list  = "/grpc.health.v1.Health/List"
)

// serve starts a server of the health service, whose methods stand for any.
func serve(t *testing.T, methods Methods, creds credentials.TransportCredentials) (address string) {
	t.Helper()
	g, err := NewGRPC(methods, creds == nil, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	options := g.Options()
	if creds != nil {
		options = append(options, grpc.Creds(creds))
	}
	s := grpc.NewServer(options...)
	healthpb.RegisterHealthServer(s, health.NewServer())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

func dial(t *testing.T, address string, creds credentials.TransportCredentials) healthpb.HealthClient {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return healthpb.NewHealthClient(conn)
}

// call calls the three methods and returns what comes of each.
func call(t *testing.T, c healthpb.HealthClient) map[string]codes.Code {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	got := map[string]codes.Code{}
	_, err := c.Check(ctx, &healthpb.HealthCheckRequest{})
	got[check] = status.Code(err)
	_, err = c.List(ctx, &healthpb.HealthListRequest{})
	got[list] = status.Code(err)
	s, err := c.Watch(ctx, &healthpb.HealthCheckRequest{})
	if err == nil {
		_, err = s.Recv()
	}
	got[watch] = status.Code(err)
	return got
}

func TestMethodsTakeRoles(t *testing.T) {
	certs := newCertificates(t)
	methods := Methods{check: pki.Read, watch: pki.Operate} // and nobody may list
	address := serve(t, methods, ServerCredentials(certs.of(t, "node", pki.Node)))
	for _, tc := range []struct {
		role         pki.Role
		check, watch codes.Code
	}{
		{pki.Read, codes.OK, codes.PermissionDenied},
		{pki.Operate, codes.OK, codes.OK},
		{pki.Node, codes.OK, codes.OK},
	} {
		got := call(t, dial(t, address, ClientCredentials(certs.of(t, tc.role.String()+"-client", tc.role))))
		if got[check] != tc.check || got[watch] != tc.watch || got[list] != codes.PermissionDenied {
			t.Errorf("%s: %v", tc.role, got)
		}
	}
	stranger := newCertificates(t).of(t, "stranger", pki.Node)
	for name, creds := range map[string]credentials.TransportCredentials{"plain": insecure.NewCredentials(), "stranger": ClientCredentials(stranger)} {
		for method, code := range call(t, dial(t, address, creds)) {
			if code != codes.Unavailable {
				t.Errorf("%s gets %s from %s", name, code, method)
			}
		}
	}
}

// Without certificates a server is on loopback; what nobody has thought of is refused all the same.
func TestOpenServer(t *testing.T) {
	address := serve(t, Methods{check: pki.Read, watch: pki.Node}, nil)
	got := call(t, dial(t, address, insecure.NewCredentials()))
	if got[check] != codes.OK || got[watch] != codes.OK || got[list] != codes.PermissionDenied {
		t.Errorf("%v", got)
	}
}

// A client that connects again shows the certificate that its file holds by then.
func TestClientsReload(t *testing.T) {
	certs := newCertificates(t)
	server := certs.of(t, "node", pki.Node)
	address := serve(t, Methods{check: pki.Operate}, ServerCredentials(server))
	creds := ClientCredentials(certs.of(t, "ann", pki.Read))
	if got := call(t, dial(t, address, creds)); got[check] != codes.PermissionDenied {
		t.Fatalf("to look: %v", got)
	}
	certs.of(t, "ann", pki.Operate) // the same files
	deadline := time.Now().Add(20 * time.Second)
	for {
		got := call(t, dial(t, address, creds.Clone()))
		if got[check] == codes.OK {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("to act: %v", got)
		}
		time.Sleep(50 * time.Millisecond) // files are looked at once a second: there is nothing to wait on
	}
}

func TestRefusalSaysWhatIsNeeded(t *testing.T) {
	certs := newCertificates(t)
	address := serve(t, Methods{check: pki.Operate}, ServerCredentials(certs.of(t, "node", pki.Node)))
	_, err := dial(t, address, ClientCredentials(certs.of(t, "ann", pki.Read))).Check(t.Context(), &healthpb.HealthCheckRequest{})
	for _, want := range []string{`"ann" has role read`, "role operate", check} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %s", err, want)
		}
	}
}
