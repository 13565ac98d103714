package authz

import (
	"context"
	"log/slog"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/internal/pki"
)

// Methods says which role each method of a gRPC server takes, by full name ("/package.Service/Method"). None is for
// everybody who gets as far as calling.
type Methods map[string]pki.Role

// Missing returns the methods of a server that m does not know, in order.
func (m Methods) Missing(s *grpc.Server) []string {
	var missing []string
	for service, info := range s.GetServiceInfo() {
		for _, method := range info.Methods {
			if name := "/" + service + "/" + method.Name; !m.has(name) {
				missing = append(missing, name)
			}
		}
	}
	slices.Sort(missing)
	return missing
}

func (m Methods) has(method string) bool {
	_, ok := m[method]
	return ok
}

// GRPC authorises the calls of a gRPC server.
type GRPC struct {
	methods Methods
	open    bool
	log     *slog.Logger
	refused prometheus.Counter
}

// NewGRPC returns one for a server with mutual TLS or, if open, for one on loopback without: everybody may call
// everything there that methods knows. A method that it does not know nobody may call.
func NewGRPC(methods Methods, open bool, log *slog.Logger, reg prometheus.Registerer) (*GRPC, error) {
	g := &GRPC{methods: methods, open: open, log: log,
		refused: prometheus.NewCounter(prometheus.CounterOpts{Name: "quorate_grpc_refused_total", Help: "gRPC calls that were refused for lack of rights."}),
	}
	return g, reg.Register(g.refused)
}

// Options are what the server is made with.
func (g *GRPC) Options() []grpc.ServerOption {
	return []grpc.ServerOption{grpc.ChainUnaryInterceptor(g.unary), grpc.ChainStreamInterceptor(g.stream)}
}

func (g *GRPC) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	ctx, err := g.authorise(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (g *GRPC) stream(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	ctx, err := g.authorise(s.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	return next(srv, &stream{s, ctx})
}

// stream is one whose context knows the caller.
type stream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *stream) Context() context.Context { return s.ctx }

func (g *GRPC) authorise(ctx context.Context, method string) (context.Context, error) {
	caller := local
	if !g.open {
		caller = callerOf(ctx)
	}
	needed, known := g.methods[method]
	switch {
	case !known:
		g.refused.Inc()
		return nil, status.Errorf(codes.PermissionDenied, "nobody may call %s: no role is given for it", method)
	case caller.Role < needed:
		g.refused.Inc()
		return nil, status.Errorf(codes.PermissionDenied, "%q has role %s: %s takes a certificate with role %s", caller.Name, caller.Role, method, needed)
	}
	if needed == pki.Operate && caller.Role == pki.Operate { // nodes pass on what somebody has asked another node for
		g.log.Info("operation over gRPC", "method", method, "caller", caller.Name, logkey.Client, address(ctx))
	}
	return withCaller(ctx, caller), nil
}

func callerOf(ctx context.Context) Caller {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Caller{}
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return Caller{}
	}
	return certified(info.State)
}

func address(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		return p.Addr.String()
	}
	return ""
}
