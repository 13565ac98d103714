package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/quorate/quorate/internal/reload"
)

// Files names what Credentials are read from, all in PEM.
type Files struct {
	// CA holds the certificates of the authorities that are trusted; more than one while they change. Empty for a server
	// whose clients show none.
	CA string
	// Cert holds the certificate, and behind it those between it and the authority, if any.
	Cert string
	// Key belongs to Cert. Nobody but the owner may be able to read it.
	Key string
}

// Credentials are what one side of TLS connections shows and trusts. They are read again when the files have changed, and
// stay as they were if those cannot be used. All methods may be called from any goroutine.
type Credentials struct {
	files  Files
	now    func() time.Time
	loaded *reload.Value[loaded]
}

type loaded struct {
	pair  tls.Certificate
	trust *x509.CertPool // nil without a CA
}

// Open reads credentials. Those that could not serve are an error which names the file: a certificate that has
// expired, belongs to another key or comes from no authority in CA.
func Open(files Files, log *slog.Logger) (*Credentials, error) { return open(files, log, time.Now) }

func open(files Files, log *slog.Logger, now func() time.Time) (*Credentials, error) {
	c := &Credentials{files: files, now: now}
	var err error
	if c.loaded, err = reload.Open(c.load, log, now, files.CA, files.Cert, files.Key); err != nil {
		return nil, fmt.Errorf("read certificates: %w", err)
	}
	return c, nil
}

func (c *Credentials) load() (loaded, error) {
	var l loaded
	pair, chain, err := readPair(c.files.Cert, c.files.Key)
	if err != nil {
		return l, err
	}
	l.pair = pair
	leaf := pair.Leaf
	if now := c.now(); now.After(leaf.NotAfter) || now.Before(leaf.NotBefore) {
		return l, fmt.Errorf("the certificate in %s is valid from %s to %s: not now, %s", c.files.Cert,
			leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	if c.files.CA == "" {
		return l, nil
	}
	text, err := readFile(c.files.CA)
	if err != nil {
		return l, err
	}
	authorities, err := parseCertificates(c.files.CA, text)
	if err != nil {
		return l, err
	}
	l.trust = x509.NewCertPool()
	for _, a := range authorities {
		l.trust.AddCert(a)
	}
	between := x509.NewCertPool()
	for _, cert := range chain[1:] {
		between.AddCert(cert)
	}
	_, err = leaf.Verify(x509.VerifyOptions{
		Roots: l.trust, Intermediates: between, CurrentTime: c.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return l, fmt.Errorf("the certificate in %s is not good for connections under the authority in %s: %w", c.files.Cert, c.files.CA, err)
	}
	return l, nil
}

// Certificate is this side's own, for its subject, its names and when it expires.
func (c *Credentials) Certificate() *x509.Certificate { return c.loaded.Get().pair.Leaf }

// Server returns a configuration for listeners that nobody gets past who does not show a certificate of a trusted
// authority: TLS 1.3 only, since both ends are ours.
func (c *Credentials) Server(protocols ...string) *tls.Config {
	return c.server(tls.RequireAndVerifyClientCert, tls.VersionTLS13, protocols)
}

// OptionalServer is Server for clients that may have no certificate, browsers for example. One that is shown
// must be good.
func (c *Credentials) OptionalServer(protocols ...string) *tls.Config {
	return c.server(tls.VerifyClientCertIfGiven, tls.VersionTLS13, protocols)
}

// PlainServer is for clients that are known by other means: they are not asked for a certificate. They may be old, so
// that TLS 1.2 will do.
func (c *Credentials) PlainServer(protocols ...string) *tls.Config {
	return c.server(tls.NoClientCert, tls.VersionTLS12, protocols)
}

func (c *Credentials) server(auth tls.ClientAuthType, version uint16, protocols []string) *tls.Config {
	configure := func() *tls.Config {
		l := c.loaded.Get()
		return &tls.Config{
			MinVersion: version, Certificates: []tls.Certificate{l.pair}, ClientAuth: auth, ClientCAs: l.trust, NextProtos: protocols,
			// A resumed session would vouch for a certificate that was good under an authority of yesterday.
			SessionTicketsDisabled: true,
		}
	}
	outer := configure()
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return configure(), nil }
	return outer
}

// Client returns a configuration for one connection to a node, which begins now. The other side must have a node's
// certificate for the host that is dialled: the caller sets ServerName.
func (c *Credentials) Client(protocols ...string) *tls.Config {
	l := c.loaded.Get()
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{l.pair}, RootCAs: l.trust, NextProtos: protocols,
		VerifyConnection: VerifyNode,
	}
}

// RequireNode returns an error unless the credentials are a node's, for both sides of a connection.
func (c *Credentials) RequireNode() error {
	leaf := c.Certificate()
	if role := RoleOf(leaf); role != Node {
		return fmt.Errorf("the certificate in %s has role %s: a node needs one made with \"quorate cert node\" (subject OU=node)", c.files.Cert, role)
	}
	for _, usage := range leaf.ExtKeyUsage {
		if usage == x509.ExtKeyUsageServerAuth || usage == x509.ExtKeyUsageAny {
			return nil
		}
	}
	return errors.New("the certificate in " + c.files.Cert + " is not for servers (extended key usage)")
}
