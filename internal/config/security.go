package config

import (
	"fmt"
	"net"
	"net/netip"
)

// TLS names the files, in PEM, by which this node and the other members know each other, and by which people and
// programs reach gRPC and HTTP. All or none. Without them everything but the gateway listens on loopback only, and
// everybody there may do everything. They are read again when they change.
type TLS struct {
	// CA holds the certificates of the authorities that are trusted, most often one, which belongs to the cluster alone.
	CA string `yaml:"ca,omitempty"`
	// Cert is this node's certificate, with role node, for the hosts of its addresses in Members.
	Cert string `yaml:"cert,omitempty"`
	// Key is its private key, which nobody else may be able to read.
	Key string `yaml:"key,omitempty"`
}

// Given reports whether there are any.
func (t TLS) Given() bool { return t != TLS{} }

// Gateway says who may connect to PostgreSQL through this node, and how.
type Gateway struct {
	TLS GatewayTLS `yaml:"tls,omitempty"`
	// Clients are the rules for client addresses: the first that covers one decides, and an address that none covers is
	// refused. Without rules every address is allowed. They come before, and never replace, what PostgreSQL asks for.
	Clients []ClientRule `yaml:"clients,omitempty"`
}

// GatewayTLS is what clients of PostgreSQL are offered.
type GatewayTLS struct {
	// Cert and Key are files in PEM. Default: those of Config.TLS, if any. They are read again when they change.
	Cert string `yaml:"cert,omitempty"`
	Key  string `yaml:"key,omitempty"`
	// Require refuses clients without TLS, whatever the rules say.
	Require bool `yaml:"require,omitempty"`
}

// ClientRule decides about clients by where they come from.
type ClientRule struct {
	// From is a network such as 10.0.0.0/8, or one address.
	From string `yaml:"from"`
	// Access is allow, tls (allowed with TLS only) or deny.
	Access string `yaml:"access"`
}

// The values of ClientRule.Access.
const (
	ClientsAllowed = "allow"
	ClientsWithTLS = "tls"
	ClientsDenied  = "deny"
)

// Prefix returns From in terms of netip.
func (r ClientRule) Prefix() (netip.Prefix, error) {
	if a, err := netip.ParseAddr(r.From); err == nil && a.Zone() == "" {
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(r.From)
	if err != nil {
		return p, fmt.Errorf("%q is neither a network such as 10.0.0.0/8 nor an address", r.From)
	}
	return p.Masked(), nil
}

// HTTP configures the HTTP side.
type HTTP struct {
	// Tokens is a file of the people and programs that may look at, or act on, the cluster over HTTP: see "quorate
	// http-token". It is read again when it changes. Without it only certificates count, and on loopback without TLS
	// everybody may do everything.
	Tokens string `yaml:"tokens,omitempty"`
}

func (c *Config) completeSecurity(path func(*string)) {
	for _, p := range []*string{&c.TLS.CA, &c.TLS.Cert, &c.TLS.Key, &c.Gateway.TLS.Cert, &c.Gateway.TLS.Key, &c.HTTP.Tokens} {
		path(p)
	}
	if c.Gateway.TLS.Cert == "" && c.Gateway.TLS.Key == "" {
		c.Gateway.TLS.Cert, c.Gateway.TLS.Key = c.TLS.Cert, c.TLS.Key
	}
}

func (c *Config) validateSecurity(v *validator) {
	if t := c.TLS; t.Given() {
		const together = "is required: ca, cert and key belong together"
		for _, f := range []struct{ name, value string }{{"ca", t.CA}, {"cert", t.Cert}, {"key", t.Key}} {
			if f.value == "" {
				v.add("tls."+f.name, "", together)
			}
		}
	} else {
		for _, l := range []struct{ field, address string }{
			{"listen.grpc", c.Listen.GRPC}, {"listen.http", c.Listen.HTTP}, {"listen.raft", c.Listen.Raft},
		} {
			if l.address != "" && !Loopback(l.address) {
				v.add(l.field, l.address, "is reached from elsewhere, and without certificates everybody there would be a member: "+
					"listen on 127.0.0.1, or set tls (quorate cert ca, then quorate cert node, make the files)")
			}
		}
	}
	g := c.Gateway
	switch {
	case g.TLS.Cert == "" && g.TLS.Key != "":
		v.add("gateway.tls.cert", "", "is required: cert and key belong together")
	case g.TLS.Cert != "" && g.TLS.Key == "":
		v.add("gateway.tls.key", "", "is required: cert and key belong together")
	}
	offered := g.TLS.Cert != ""
	if g.TLS.Require && !offered {
		v.add("gateway.tls.require", "true", "needs gateway.tls.cert and key, or tls")
	}
	for i, r := range g.Clients {
		field := fmt.Sprintf("gateway.clients[%d]", i)
		if _, err := r.Prefix(); err != nil {
			v.add(field+".from", r.From, "must be a network such as 10.0.0.0/8, or an address")
		}
		v.oneOf(field+".access", r.Access, ClientsAllowed, ClientsWithTLS, ClientsDenied)
		if r.Access == ClientsWithTLS && !offered {
			v.add(field+".access", r.Access, "needs gateway.tls.cert and key, or tls")
		}
	}
}

// Loopback reports whether a listener on host:port is reached from this machine alone. Names other than localhost may
// come to mean anything.
func Loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
