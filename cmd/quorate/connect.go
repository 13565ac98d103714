package main

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/quorate/quorate/internal/authz"
	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/peers"
	"github.com/quorate/quorate/internal/pki"
)

// target is which node a command asks, and as whom.
type target struct {
	address string
	config  string
	files   pki.Files
}

// flags adds to a command what target is read from. Each flag has an environment variable of its name; what neither says
// is taken from a configuration file, if one is named.
func (t *target) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&t.address, "address", os.Getenv("QUORATE_ADDRESS"), "gRPC `address` of any node ($QUORATE_ADDRESS; default: that of --config)")
	f.StringVar(&t.config, "config", os.Getenv("QUORATE_CONFIG"), "a node's configuration `file`, for its address and certificates ($QUORATE_CONFIG)")
	f.StringVar(&t.files.CA, "ca", os.Getenv("QUORATE_CA"), "`file` with the cluster's certificate authority ($QUORATE_CA)")
	f.StringVar(&t.files.Cert, "cert", os.Getenv("QUORATE_CERT"), "`file` with your certificate, or this node's ($QUORATE_CERT)")
	f.StringVar(&t.files.Key, "key", os.Getenv("QUORATE_KEY"), "`file` with the key of --cert ($QUORATE_KEY)")
}

// complete fills in what the configuration file says, and checks that everything is there that is needed.
func (t *target) complete() error {
	if t.config != "" {
		c, err := config.Load(t.config)
		if err != nil {
			return err
		}
		t.address = cmp.Or(t.address, c.Self().GRPC, c.Listen.GRPC)
		if t.files == (pki.Files{}) {
			t.files = pki.Files{CA: c.TLS.CA, Cert: c.TLS.Cert, Key: c.TLS.Key}
		}
	}
	if t.address == "" {
		return usage("address", `""`, "is required: the gRPC address of any node (or --config, or $QUORATE_ADDRESS)")
	}
	if f := t.files; f != (pki.Files{}) {
		for _, part := range []struct{ flag, value string }{{"ca", f.CA}, {"cert", f.Cert}, {"key", f.Key}} {
			if part.value == "" {
				return usage(part.flag, `""`, "is required: --ca, --cert and --key belong together")
			}
		}
	}
	return nil
}

// dial returns a connection to the node, which is made when it is used. The caller closes it.
func (t *target) dial() (*grpc.ClientConn, error) {
	if err := t.complete(); err != nil {
		return nil, err
	}
	creds := insecure.NewCredentials()
	if t.files != (pki.Files{}) {
		c, err := pki.Open(t.files, slog.New(slog.DiscardHandler))
		if err != nil {
			return nil, err
		}
		creds = authz.ClientCredentials(c)
	} else if !config.Loopback(t.address) {
		return nil, errors.New("a node that is not on this machine is asked with a certificate only: --ca, --cert and --key, made with \"quorate cert client\"")
	}
	conn, err := grpc.NewClient("passthrough:///"+t.address, append(peers.DialOptions(), grpc.WithTransportCredentials(creds))...)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", t.address, err)
	}
	return conn, nil
}
