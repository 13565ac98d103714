// Package pki makes the private certificates by which the nodes of a cluster and the people who operate it know each
// other, and keeps those of a running node: read again when the files change, so that they are renewed without a
// restart.
//
// Everything rests on one certificate authority that belongs to the cluster alone. Whoever has a certificate of it is
// who its subject says: the common name is a name for logs, and the one organizational unit is the Role. An authority
// of the operator's own will do as well, as long as its certificates carry the role there and it does not hand out
// such certificates to others.
package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
)

// Role says what the owner of a certificate may do. Each includes those before it.
type Role uint8

// The roles. Their names are what stands in the organizational unit of a certificate's subject.
const (
	None    Role = iota // nothing
	Read                // look
	Operate             // change the cluster
	Node                // be a member: read and write the log, clone the data
)

var roleNames = [...]string{"none", "read", "operate", "node"}

// String returns the name.
func (r Role) String() string {
	if int(r) < len(roleNames) {
		return roleNames[r]
	}
	return "invalid"
}

// ParseRole is the inverse of String, for the roles that can be given.
func ParseRole(name string) (Role, error) {
	for r := Read; r <= Node; r++ {
		if r.String() == name {
			return r, nil
		}
	}
	return None, fmt.Errorf("role %q is none of read, operate, node", name)
}

// RoleOf returns the role that a certificate carries: None unless its subject names exactly one. That the certificate
// is genuine must have been verified.
func RoleOf(c *x509.Certificate) Role {
	role := None
	for _, unit := range c.Subject.OrganizationalUnit {
		r, err := ParseRole(unit)
		if err != nil {
			continue // units that are not ours
		}
		if role != None {
			return None // which of them was meant is not ours to guess
		}
		role = r
	}
	return role
}

// Peer returns the verified certificate of the other side of a connection: nil if it has shown none.
func Peer(s tls.ConnectionState) *x509.Certificate {
	if len(s.VerifiedChains) == 0 || len(s.VerifiedChains[0]) == 0 {
		return nil
	}
	return s.VerifiedChains[0][0]
}

// VerifyNode refuses the other side of a connection unless its certificate is a node's.
func VerifyNode(s tls.ConnectionState) error {
	c := Peer(s)
	if c == nil {
		return errors.New("the other side has shown no certificate")
	}
	if role := RoleOf(c); role != Node {
		return fmt.Errorf("the certificate of %q has role %s: it must be a node's (subject OU=node)", c.Subject.CommonName, role)
	}
	return nil
}
