package security

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// authority issues what "quorate cert" refuses to.
type authority struct{ pair tls.Certificate }

func loadAuthority(t *testing.T, dir string) authority {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key"))
	check(t, err)
	return authority{pair}
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	return authority{sign(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "Quorate cluster CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}, nil)}
}

// issue issues a certificate of this role, valid from one time to another, both from now.
func (a authority) issue(t *testing.T, role string, from, to time.Duration) tls.Certificate {
	t.Helper()
	return sign(t, leaf(role, from, to), &a.pair)
}

// self is one that is signed by nobody else.
func (a authority) self(t *testing.T) tls.Certificate {
	t.Helper()
	return sign(t, leaf("node", -time.Hour, time.Hour), nil)
}

func leaf(role string, from, to time.Duration) *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: "intruder", OrganizationalUnit: []string{role}}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(from), NotAfter: time.Now().Add(to), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
}

func sign(t *testing.T, template *x509.Certificate, by *tls.Certificate) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	parent, signer := template, crypto.PrivateKey(key)
	if by != nil {
		parent, signer = by.Leaf, by.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	check(t, err)
	cert, err := x509.ParseCertificate(der)
	check(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: cert}
}
