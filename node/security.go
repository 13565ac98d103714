package node

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionalpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"

	"github.com/quorate/quorate/gateway"
	"github.com/quorate/quorate/internal/authz"
	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/invariant"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/internal/peers"
	"github.com/quorate/quorate/internal/pki"
	consensuspb "github.com/quorate/quorate/proto/quorate/consensus/v1"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/replication/clone"
)

// methods says who may call what over gRPC. A node with a method that is missing here does not start.
var methods = authz.Methods{
	healthpb.Health_Check_FullMethodName: pki.None, // that is: whoever has a certificate
	healthpb.Health_List_FullMethodName:  pki.None,
	healthpb.Health_Watch_FullMethodName: pki.None,

	reflectionpb.ServerReflection_ServerReflectionInfo_FullMethodName:    pki.Read,
	reflectionalpha.ServerReflection_ServerReflectionInfo_FullMethodName: pki.Read,

	consensuspb.Consensus_Link_FullMethodName: pki.Node,
	pb.Heartbeat_Beat_FullMethodName:          pki.Node,
	pb.Heartbeat_Recall_FullMethodName:        pki.Node,
	pb.Recovery_Offer_FullMethodName:          pki.Node,
	pb.Recovery_Clone_FullMethodName:          pki.Node, // all data, and the passwords' hashes
	pb.Cluster_Hash_FullMethodName:            pki.Node, // holds commits until it has its snapshot

	pb.Membership_Add_FullMethodName:                pki.Node, // and a token
	pb.Membership_Remove_FullMethodName:             pki.Operate,
	pb.Membership_Leave_FullMethodName:              pki.Operate,
	pb.Membership_Promote_FullMethodName:            pki.Operate,
	pb.Membership_Demote_FullMethodName:             pki.Operate,
	pb.Membership_TransferLeadership_FullMethodName: pki.Operate,
	pb.Membership_Drain_FullMethodName:              pki.Operate,
	pb.Membership_Resume_FullMethodName:             pki.Operate,
	pb.Membership_Resync_FullMethodName:             pki.Operate,
	pb.Membership_List_FullMethodName:               pki.Read,

	pb.Tokens_Create_FullMethodName: pki.Operate,
	pb.Tokens_Revoke_FullMethodName: pki.Operate,
	pb.Tokens_List_FullMethodName:   pki.Read,

	pb.Cluster_Status_FullMethodName:       pki.Read,
	pb.Cluster_Verify_FullMethodName:       pki.Read,
	pb.Observe_Watch_FullMethodName:        pki.Read,
	pb.Observe_Transactions_FullMethodName: pki.Read,
	pb.Observe_Lookup_FullMethodName:       pki.Read,
	pb.Observe_Conflicts_FullMethodName:    pki.Read,
	pb.Observe_Events_FullMethodName:       pki.Read,
	pb.Observe_Follow_FullMethodName:       pki.Read,
}

// Limits on what strangers can take up. A handshake is short; connections of those who belong here are few and last.
const (
	handshakeTimeout = 10 * time.Second
	maxConnections   = 1000 // to one listener; more wait until one ends
	maxHeader        = 64 << 10
	bodyTimeout      = 30 * time.Second
	maxBody          = 1 << 20
)

// openCertificates reads the certificates by which the members know each other, if the node has any.
func (n *Node) openCertificates(context.Context) error {
	log := n.log.With(logkey.Component, "tls")
	if t := n.cfg.TLS; t.Given() {
		c, err := pki.Open(pki.Files{CA: t.CA, Cert: t.Cert, Key: t.Key}, log)
		if err != nil {
			return fmt.Errorf("tls: %w", err)
		}
		if err := c.RequireNode(); err != nil {
			return fmt.Errorf("tls.cert: %w", err)
		}
		// Others would refuse to talk to it, each in its own log.
		for field, address := range map[string]string{"raft": n.cfg.Advertise.Raft, "grpc": n.cfg.Advertise.GRPC} {
			if host, _, err := net.SplitHostPort(address); err == nil && c.Certificate().VerifyHostname(host) != nil {
				return fmt.Errorf("tls.cert: %s is not for %s, by which others reach this node (advertise.%s): make one with \"quorate cert node --host %s\"", t.Cert, host, field, host)
			}
		}
		n.certificates = c
		n.metrics.MustRegister(expiry("node", c))
	} else {
		log.Info("without tls in the configuration this node is reached from this machine only, and everybody here may do everything")
	}
	if n.cfg.Witness() {
		return nil // it has no gateway
	}
	if t := n.cfg.Gateway.TLS; t.Cert != "" {
		c, err := pki.Open(pki.Files{Cert: t.Cert, Key: t.Key}, log)
		if err != nil {
			return fmt.Errorf("gateway.tls: %w", err)
		}
		n.clientCertificate = c
		n.metrics.MustRegister(expiry("gateway", c))
	} else if !config.Loopback(n.cfg.Listen.Gateway) {
		log.Warn("clients of PostgreSQL are reached over the network without encryption: set tls or gateway.tls", logkey.Address, n.cfg.Listen.Gateway)
	}
	return nil
}

func expiry(purpose string, c *pki.Credentials) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "quorate_certificate_expiry_timestamp_seconds", Help: "When the certificate in use expires, in seconds since 1970.",
		ConstLabels: prometheus.Labels{"purpose": purpose},
	}, func() float64 { return float64(c.Certificate().NotAfter.Unix()) })
}

// newGRPC returns the gRPC server, which serves nobody yet.
func (n *Node) newGRPC() (*grpc.Server, error) {
	guard, err := authz.NewGRPC(methods, n.certificates == nil, n.log.With(logkey.Component, "grpc"), n.metrics)
	if err != nil {
		return nil, err
	}
	options := slices.Concat(guard.Options(), n.gate(), clone.ServerOptions(), peers.ServerOptions())
	options = append(options, grpc.ConnectionTimeout(handshakeTimeout), grpc.MaxHeaderListSize(maxHeader))
	if n.certificates != nil {
		options = append(options, grpc.Creds(authz.ServerCredentials(n.certificates)))
	}
	return grpc.NewServer(options...), nil
}

// dialOptions are how this node connects to the gRPC servers of others.
func (n *Node) dialOptions() []grpc.DialOption {
	creds := insecure.NewCredentials()
	if n.certificates != nil {
		creds = authz.ClientCredentials(n.certificates)
	}
	return append(peers.DialOptions(), grpc.WithTransportCredentials(creds))
}

// dial connects to a node's gRPC server, for one question. The caller closes the connection.
func (n *Node) dial(address string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+address, n.dialOptions()...)
}

// listen listens for people and members, no more than maxConnections of them at a time.
func listen(ctx context.Context, field, address string) (net.Listener, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	return netutil.LimitListener(l, maxConnections), nil
}

// newGuard returns what every HTTP handler but those for health stands behind.
func (n *Node) newGuard() (*authz.HTTP, error) {
	var hosts []string
	for _, address := range []string{n.cfg.Listen.HTTP, n.cfg.Self().HTTP} {
		if host, _, err := net.SplitHostPort(address); err == nil {
			hosts = append(hosts, host)
		}
	}
	guard, err := authz.NewHTTP(authz.HTTPConfig{
		Tokens: n.cfg.HTTP.Tokens, TLS: n.certificates != nil, Hosts: hosts,
		Logger: n.log.With(logkey.Component, "http"), Registerer: n.metrics,
	})
	if err != nil {
		return nil, fmt.Errorf("http.tokens: %w", err)
	}
	return guard, nil
}

// serveHTTP serves until the server is closed.
func (n *Node) serveHTTP(listener net.Listener, handler http.Handler) (*http.Server, func() error) {
	server := &http.Server{
		Handler:           limitBody(handler),
		ReadHeaderTimeout: handshakeTimeout, // of the handshake as well
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(n.log.With(logkey.Component, "http").Handler(), slog.LevelDebug), // strangers' mistakes
	}
	serve := func() error { return server.Serve(listener) }
	if n.certificates != nil {
		server.TLSConfig = n.certificates.OptionalServer("h2", "http/1.1")
		serve = func() error { return server.ServeTLS(listener, "", "") }
	}
	return server, serve
}

// limitBody bounds what a request may send, and how slowly. A limit for the whole server would end streams of events too.
func limitBody(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 {
			b := &body{http.MaxBytesReader(w, r.Body, maxBody), http.NewResponseController(w)}
			b.until(time.Now().Add(bodyTimeout))
			r.Body = b
		}
		next.ServeHTTP(w, r)
	})
}

// body is a request's, with a time limit that ends with it: left behind, the limit would cut off the answer.
type body struct {
	io.ReadCloser
	conn *http.ResponseController
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err == io.EOF {
		b.until(time.Time{})
	}
	return n, err
}

// until fails only on a connection that is lost, which reading tells.
func (b *body) until(deadline time.Time) { _ = b.conn.SetReadDeadline(deadline) }

// clientTLS is what the gateway offers to clients, nil for nothing.
func (n *Node) clientTLS() *tls.Config {
	if n.clientCertificate == nil {
		return nil
	}
	return n.clientCertificate.PlainServer()
}

// clientRules are the rules for addresses of clients of PostgreSQL.
func (n *Node) clientRules() []gateway.Rule {
	access := map[string]gateway.RuleAccess{
		config.ClientsAllowed: gateway.Allow, config.ClientsWithTLS: gateway.AllowTLS, config.ClientsDenied: gateway.Deny,
	}
	var rules []gateway.Rule
	for _, r := range n.cfg.Gateway.Clients {
		from, err := r.Prefix()
		invariant.Check(err == nil, "client rule from %q was validated", r.From)
		rules = append(rules, gateway.Rule{From: from, Access: access[r.Access]})
	}
	return rules
}

// trustLoopback says whether a client from this machine may come in without a password where PostgreSQL asks for none:
// where that was asked for, and where PostgreSQL is reached by TCP, so that it lets the same client in if it connects
// there itself. Behind the socket of a server that somebody else has set up it may ask who the other side is (peer).
func (n *Node) trustLoopback() bool {
	p := n.cfg.Postgres
	if p.Managed {
		return p.Auth == "trust"
	}
	return !strings.HasPrefix(p.Host, "/")
}
