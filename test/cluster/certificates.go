package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
)

// CertDir is where the certificates of a cluster in a network are: ca, node<i>, and operator for who tests.
func (c *Cluster) CertDir() string { return filepath.Join(c.root, "certificates") }

// certify makes the certificates of a cluster whose nodes talk over a network, once.
func (c *Cluster) certify(ctx context.Context) error {
	if err := os.Mkdir(c.CertDir(), 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}
	if c.options.Certify != nil {
		return c.options.Certify(c.CertDir())
	}
	if err := c.cert(ctx, "ca"); err != nil {
		return err
	}
	for i := 1; i <= c.Nodes; i++ {
		if err := c.cert(ctx, "node", "--name", fmt.Sprintf("node%d", i), "--host", c.host(i)); err != nil {
			return err
		}
	}
	return c.cert(ctx, "client", "--name", "operator", "--role", "operate")
}

func (c *Cluster) cert(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, c.options.Binary, append(append([]string{"cert"}, args...), "--dir", c.CertDir())...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make certificate %v: %w: %s", args, err, out)
	}
	return nil
}

// credentials are the flags by which commands may do everything.
func (c *Cluster) credentials() []string {
	if !c.options.separate() {
		return nil
	}
	in := c.CertDir()
	return []string{"--ca", filepath.Join(in, "ca.crt"), "--cert", filepath.Join(in, "operator.crt"), "--key", filepath.Join(in, "operator.key")}
}

// getHTTP asks node i, as who may do everything.
func (c *Cluster) getHTTP(ctx context.Context, i int, path string) (*http.Response, error) {
	// A connection that is kept would be one of the node's goroutines; and may lead to a network that is no more.
	transport, scheme := &http.Transport{DisableKeepAlives: true}, "http"
	if c.options.separate() {
		pair, err := tls.LoadX509KeyPair(filepath.Join(c.CertDir(), "operator.crt"), filepath.Join(c.CertDir(), "operator.key"))
		if err != nil {
			return nil, err
		}
		ca, err := os.ReadFile(filepath.Join(c.CertDir(), "ca.crt"))
		if err != nil {
			return nil, err
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(ca) // if it holds none, no node will do
		transport.TLSClientConfig, scheme = &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: roots}, "https"
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://"+c.HTTP(i)+path, nil)
	if err != nil {
		return nil, err
	}
	return (&http.Client{Transport: transport}).Do(request)
}
