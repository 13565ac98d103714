// Package authz decides who may do what over gRPC and HTTP. Who somebody is, a certificate says, or over HTTP a token;
// what a role may do, the tables and the handlers that a node is built of say. What nobody has thought of is refused.
package authz

import (
	"context"
	"crypto/tls"

	"github.com/quorate/quorate/internal/pki"
)

// Caller is who has called.
type Caller struct {
	Name string // for logs
	Role pki.Role
}

// local is everybody, where a node listens on loopback without certificates.
var local = Caller{Name: "local", Role: pki.Node}

// certified is who a connection's certificate names: role None if it has shown none.
func certified(s tls.ConnectionState) Caller {
	c := pki.Peer(s)
	if c == nil {
		return Caller{}
	}
	return Caller{Name: c.Subject.CommonName, Role: pki.RoleOf(c)}
}

type contextKey struct{}

func withCaller(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, contextKey{}, c)
}

// FromContext returns who has made the call or request that ctx belongs to. It is the zero Caller, who may do nothing,
// unless this package has let it through.
func FromContext(ctx context.Context) Caller {
	c, _ := ctx.Value(contextKey{}).(Caller)
	return c
}
