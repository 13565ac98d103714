package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"strings"
	"time"
)

// How long certificates are valid. An authority's is renewed by hand and everybody has to get the new one, so it is
// long; the others are what is lost with a disk, so they are not.
const (
	AuthorityLifetime = 10 * 365 * 24 * time.Hour
	DefaultLifetime   = 365 * 24 * time.Hour
	backdated         = time.Hour // for clocks that differ
)

// Pair is a certificate and its private key, in PEM.
type Pair struct{ Cert, Key []byte }

// Authority issues certificates. It is safe for concurrent use.
type Authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// NewAuthority makes a certificate authority, valid from now on.
func NewAuthority(name string, now time.Time) (*Authority, Pair, error) {
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             now.Add(-backdated),
		NotAfter:              now.Add(AuthorityLifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	pair, cert, key, err := issue(template, nil, nil)
	if err != nil {
		return nil, Pair{}, fmt.Errorf("make certificate authority: %w", err)
	}
	return &Authority{cert, key}, pair, nil
}

// LoadAuthority reads one that NewAuthority has made, or another's.
func LoadAuthority(certFile, keyFile string) (*Authority, error) {
	pair, _, err := readPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("read certificate authority: %w", err)
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if !ok || !pair.Leaf.IsCA {
		return nil, fmt.Errorf("read certificate authority: %s is not the certificate of an authority", certFile)
	}
	return &Authority{pair.Leaf, signer}, nil
}

// Request asks an authority for a certificate.
type Request struct {
	Name     string // who it is for: shown in logs
	Role     Role
	Hosts    []string // addresses and names by which others reach it: for nodes, at least one
	Lifetime time.Duration
}

// maxName is what X.509 allows for a common name.
const maxName = 64

var hostName = regexp.MustCompile(`^(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*$`)

// Issue makes a certificate that is valid from now on, though never longer than the authority's own. A node's is good
// for both sides of a connection, all others only for clients: nobody who may look can pass for a node.
func (a *Authority) Issue(r Request, now time.Time) (Pair, error) {
	if r.Name == "" || len(r.Name) > maxName {
		return Pair{}, fmt.Errorf("issue certificate: name %q must have 1 to %d bytes", r.Name, maxName)
	}
	if r.Role < Read || r.Role > Node {
		return Pair{}, fmt.Errorf("issue certificate: role %s cannot be given", r.Role)
	}
	if r.Lifetime <= 0 {
		return Pair{}, fmt.Errorf("issue certificate: lifetime %s must be positive", r.Lifetime)
	}
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: r.Name, OrganizationalUnit: []string{r.Role.String()}},
		NotBefore:   now.Add(-backdated),
		NotAfter:    now.Add(r.Lifetime),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if template.NotAfter.After(a.cert.NotAfter) {
		template.NotAfter = a.cert.NotAfter
	}
	if !template.NotAfter.After(now) {
		return Pair{}, fmt.Errorf("issue certificate: the authority itself has expired at %s", a.cert.NotAfter.Format(time.RFC3339))
	}
	if r.Role == Node {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
		if len(r.Hosts) == 0 {
			return Pair{}, errors.New("issue certificate: a node needs the addresses or names by which others reach it")
		}
	} else if len(r.Hosts) > 0 {
		return Pair{}, fmt.Errorf("issue certificate: only a node has hosts, not role %s", r.Role)
	}
	for _, host := range r.Hosts {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else if len(host) <= 253 && hostName.MatchString(host) {
			template.DNSNames = append(template.DNSNames, strings.ToLower(host))
		} else {
			return Pair{}, fmt.Errorf("issue certificate: host %q is neither an IP address nor a name (a port does not belong here)", host)
		}
	}
	pair, _, _, err := issue(template, a.cert, a.key)
	if err != nil {
		return Pair{}, fmt.Errorf("issue certificate: %w", err)
	}
	return pair, nil
}

// issue makes a key and a certificate for it, signed by itself if there is no parent. The serial number is drawn.
func issue(template, parent *x509.Certificate, signer crypto.Signer) (Pair, *x509.Certificate, crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Pair{}, nil, nil, err
	}
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		return Pair{}, nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return Pair{}, nil, nil, err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return Pair{}, nil, nil, err
	}
	return Pair{
		Cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		Key:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}),
	}, cert, key, nil
}

// maxFile bounds what is read of a file: a certificate has about a kilobyte, and a path may name anything.
const maxFile = 1 << 20

// readFile reads a file of bounded size.
func readFile(name string) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, fmt.Errorf("%s is no regular file of at most %d bytes", name, maxFile)
	}
	return os.ReadFile(name)
}

// readPair reads a certificate with those that follow it in the file, and its key.
func readPair(certFile, keyFile string) (pair tls.Certificate, chain []*x509.Certificate, err error) {
	if err := checkSecret(keyFile); err != nil {
		return pair, nil, err
	}
	key, err := readFile(keyFile)
	if err != nil {
		return pair, nil, err
	}
	cert, err := readFile(certFile)
	if err != nil {
		return pair, nil, err
	}
	if pair, err = tls.X509KeyPair(cert, key); err != nil {
		return pair, nil, fmt.Errorf("certificate %s with key %s: %w", certFile, keyFile, err)
	}
	chain, err = parseCertificates(certFile, cert)
	return pair, chain, err
}

func parseCertificates(name string, text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parse %s: %w", name, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("%s holds no certificate in PEM", name)
	}
	return certs, nil
}
