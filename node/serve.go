package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"

	"github.com/quorate/quorate/admin"
	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/gateway"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/internal/peers"
	"github.com/quorate/quorate/internal/pki"
	consensuspb "github.com/quorate/quorate/proto/quorate/consensus/v1"
	"github.com/quorate/quorate/replication/clone"
)

// openAdmin opens the gRPC server, which other members' proposals come to as well.
func (n *Node) openAdmin(context.Context) (err error) {
	if n.grpc, err = n.newGRPC(); err != nil {
		return err
	}
	n.peers = peers.New(n.grpcAddress, append(n.dialOptions(), clone.DialOptions()...)...)
	n.onClose(func(context.Context) error { return n.peers.Close() })
	config := admin.Config{
		Cluster: n.cfg.Cluster, ClusterID: n.identity.get().ClusterID, Node: n.cfg.Node, Version: n.version, Members: n.members, Peers: n.peers, Source: n, Membership: n,
	}
	api := admin.New(config)
	n.observe = admin.NewObserve(config, n)
	n.onClose(func(context.Context) error { api.Close(); n.observe.Close(); return nil })
	n.observe.Register(n.grpc)
	if err := n.openHeartbeats(); err != nil {
		return err
	}
	api.Register(n.grpc)
	admin.RegisterTokens(n.grpc, n)
	n.openDonor()
	consensuspb.RegisterConsensusServer(n.grpc, link{n: n})
	n.admin.Store(api)
	return nil
}

// serveGRPC listens.
func (n *Node) serveGRPC(ctx context.Context) error {
	if missing := methods.Missing(n.grpc); len(missing) > 0 {
		return fmt.Errorf("no role is given for %v", missing)
	}
	listener, err := listen(ctx, "listen.grpc", n.cfg.Listen.GRPC)
	if err != nil {
		return err
	}
	n.onClose(func(context.Context) error { n.grpc.Stop(); return nil })
	n.run("gRPC", func(context.Context) error { return n.grpc.Serve(listener) })
	return nil
}

// Status says how the node is, for the API.
func (n *Node) Status() admin.Status {
	s := n.status()
	s.Health = n.health()
	s.Postgres = s.Health.PostgresVersion
	s.MaxNodes = n.membership().MaxNodes
	for _, r := range n.seen.beats.Reports(s.Health) {
		if r.Node == uint32(n.cfg.Node) {
			s.Hears = r.Heard
		}
	}
	return s
}

// status is what Status says but for the health.
func (n *Node) status() admin.Status {
	now := n.states.current()
	s := admin.Status{State: now.name, Reason: now.reason, Writes: now.reason == ""}
	if i := n.current.Load(); i != nil {
		applied := i.pipeline.Applied()
		s.CSN, s.Applied, s.AppliedIndex = i.machine.LastCSN(), &applied, i.pipeline.AppliedIndex()
	} else if m := n.ledger(); m != nil {
		s.CSN = m.LastCSN()
	}
	c := n.consensus.Load()
	if c == nil {
		s.LogFailure = cmp.Or(n.identity.get().LogLost, now.reason)
		return s
	}
	if s.Writes && n.access() != gateway.ReadWrite {
		s.Writes, s.Reason = false, n.noQuorum().Error()
	}
	if err := c.Err(); err != nil {
		s.LogFailure = err.Error()
	}
	view := c.Status()
	s.Leader, s.Term, s.CommitIndex = view.Leader, view.Term, view.CommitIndex
	switch view.State {
	case consensus.Leader:
		s.Role = admin.Leader
	case consensus.Candidate:
		s.Role = admin.Candidate
	default:
		s.Role = admin.Follower
	}
	return s
}

// gather collects the node's metrics and those of the current incarnation, which begin anew with it, and others.
func (n *Node) gather(others ...prometheus.Gatherer) ([]*dto.MetricFamily, error) {
	gatherers := append(prometheus.Gatherers{n.metrics}, others...)
	if i := n.current.Load(); i != nil {
		gatherers = append(gatherers, i.metrics)
	}
	return gatherers.Gather()
}

// serveMetrics serves the node's metrics and those of its process. They are not compressed: that would take longer than all the
// rest of it, to spare some tens of KiB a few times a minute.
func (n *Node) serveMetrics() http.Handler {
	process := prometheus.NewRegistry() // apart: it reads files, and the charts' samples, one a second, need nothing of it
	process.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	all := func() ([]*dto.MetricFamily, error) { return n.gather(process) }
	return promhttp.HandlerFor(prometheus.GathererFunc(all), promhttp.HandlerOpts{DisableCompression: true})
}

// openHTTP serves the probes, the dashboard and the metrics, while the node starts, too.
func (n *Node) openHTTP(ctx context.Context) error {
	guard, err := n.newGuard()
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", guard.Require(pki.Read, n.serveMetrics()))
	if err := n.openDashboard(mux, guard); err != nil {
		return err
	}
	if n.cfg.Pprof {
		profiles := http.NewServeMux()
		profiles.HandleFunc("/debug/pprof/", pprof.Index)
		profiles.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		profiles.HandleFunc("/debug/pprof/profile", pprof.Profile)
		profiles.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		profiles.HandleFunc("/debug/pprof/trace", pprof.Trace)
		mux.Handle("/debug/pprof/", guard.Require(pki.Operate, profiles)) // they show what is in memory
	}
	listener, err := listen(ctx, "listen.http", n.cfg.Listen.HTTP)
	if err != nil {
		return err
	}
	open := http.NewServeMux() // load balancers ask without a name, a token or a certificate
	for _, path := range admin.ProbePaths() {
		open.Handle(path, admin.HandleProbe(n.probe))
	}
	open.Handle("/", guard.Wrap(mux))
	server, serve := n.serveHTTP(listener, open)
	n.onClose(func(context.Context) error { return server.Close() })
	n.run("HTTP", func(context.Context) error {
		if err := serve(); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		<-n.ctx.Done()
		return nil
	})
	n.alongside(n.watch) // that it looks is what being alive means
	return nil
}

func (n *Node) openGateway(context.Context) error {
	network, address := n.serverAddress()
	g := gateway.New(gateway.Config{
		Listen:         n.cfg.Listen.Gateway,
		ServerNetwork:  network,
		ServerAddress:  address,
		Database:       n.cfg.Postgres.Database,
		Coordinator:    coordinator{n},
		Accepting:      n.admitting,
		Access:         n.access,
		View:           n.sqlView,
		Settings:       n.sqlSettings(),
		Terminate:      n.terminate,
		TLS:            n.clientTLS(),
		RequireTLS:     n.cfg.Gateway.TLS.Require,
		Rules:          n.clientRules(),
		TrustLoopback:  n.trustLoopback(),
		MaxConnections: n.cfg.Limits.Clients,
		MaxMessage:     int(n.cfg.Limits.Message),
		Logger:         n.log,
		Registerer:     n.metrics,
	})
	if err := g.Open(); err != nil {
		return err
	}
	n.gateway.Store(g)
	n.onClose(func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, drainTimeout)
		defer cancel()
		if err := g.Drain(ctx); err != nil {
			n.log.Info("transactions are cut off", logkey.Reason, err)
		}
		return g.Close()
	})
	return nil
}

// drainTimeout is how long running transactions have to end before a stopping node cuts them off.
const drainTimeout = 2 * time.Second

// terminate ends a server backend that does not let go of its transaction.
func (n *Node) terminate(ctx context.Context, pid uint32) error {
	conn, err := n.connect(ctx)
	if err != nil {
		return err
	}
	_, err = conn.Exec(ctx, fmt.Sprintf("SELECT pg_terminate_backend(%d)", pid)).ReadAll()
	if err != nil {
		err = fmt.Errorf("terminate backend %d: %w", pid, err)
	}
	return errors.Join(err, closeConn(ctx, conn))
}
