package gateway

import (
	"encoding/binary"
	"net"
	"net/netip"
)

// Rule decides about clients by where they come from.
type Rule struct {
	From   netip.Prefix
	Access RuleAccess
}

// RuleAccess is what a Rule says.
type RuleAccess uint8

// The decisions.
const (
	Deny RuleAccess = iota
	AllowTLS
	Allow
)

// clientAddress is where a connection comes from; invalid if that is no IP address.
func clientAddress(conn net.Conn) netip.Addr {
	a, ok := conn.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	return a.AddrPort().Addr().Unmap().WithZone("")
}

// admit applies the rules for client addresses.
func (g *Gateway) admit(from netip.Addr, encrypted bool) error {
	access := Allow
	if len(g.cfg.Rules) > 0 {
		access = Deny
	}
	for _, r := range g.cfg.Rules {
		if r.From.Contains(from) {
			access = r.Access
			break
		}
	}
	if access == Deny {
		return &sqlError{code: codeAuthorization, message: "connections from " + from.String() + " are not allowed by the gateway's rules for clients"}
	}
	if !encrypted && (access == AllowTLS || g.cfg.RequireTLS) {
		return &sqlError{code: codeAuthorization, message: "the gateway requires TLS of connections from " + from.String(),
			hint: "Set sslmode=require or stronger."}
	}
	return nil
}

// proof notices whether the server has asked a client who it is.
type proof struct{ asked bool }

// authentication takes an authentication request from the server, and refuses to call that a login which was none.
// PostgreSQL may trust the connection that it is asked over, be it because of where it comes from or of who is at its
// other end (trust, peer, ident). That is this gateway, and no reason to trust the gateway's client.
func (p *proof) authentication(kind uint32, from netip.Addr, trustLoopback bool) error {
	const ok, cleartext, md5, gss, sspi, sasl = 0, 3, 5, 7, 9, 10
	switch kind {
	case cleartext, md5, gss, sspi, sasl:
		p.asked = true
	case ok:
		if !p.asked && !(trustLoopback && from.IsLoopback()) {
			return &sqlError{code: codeAuthorization, message: "this node's PostgreSQL has not asked for a password, and the gateway lets nobody in without",
				detail: "Its pg_hba.conf trusts the connections of the gateway, which says nothing about the gateway's clients.",
				hint:   "Use scram-sha-256 in pg_hba.conf for the connections that the gateway makes, or connect to PostgreSQL itself."}
		}
	}
	return nil
}

// authenticationKind returns what an AuthenticationXXX message asks for.
func authenticationKind(body []byte) (uint32, error) {
	if len(body) < 4 {
		return 0, &protocolError{"short authentication request from server"}
	}
	return binary.BigEndian.Uint32(body), nil
}
