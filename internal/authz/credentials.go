package authz

import (
	"context"
	"net"

	"google.golang.org/grpc/credentials"

	"github.com/quorate/quorate/internal/pki"
)

// ServerCredentials are those of a gRPC server that only owners of certificates reach.
func ServerCredentials(c *pki.Credentials) credentials.TransportCredentials {
	return credentials.NewTLS(c.Server("h2"))
}

// ClientCredentials are those of connections to nodes. Each one that is made, and made again, takes what the files hold
// then.
func ClientCredentials(c *pki.Credentials) credentials.TransportCredentials {
	return &clientCredentials{TransportCredentials: credentials.NewTLS(c.Client("h2")), from: c}
}

// clientCredentials differ from gRPC's own in not keeping the certificates that they began with.
type clientCredentials struct {
	credentials.TransportCredentials // of the beginning: for Info
	from                             *pki.Credentials
}

func (c *clientCredentials) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return credentials.NewTLS(c.from.Client("h2")).ClientHandshake(ctx, authority, conn)
}

func (c *clientCredentials) Clone() credentials.TransportCredentials {
	return &clientCredentials{TransportCredentials: c.TransportCredentials.Clone(), from: c.from}
}
