package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/quorate/quorate/internal/pki"
)

func certCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cert",
		Short: "Make certificates for nodes and for the people who operate them",
		Long: "Make certificates for nodes and for the people who operate them: a private authority first, with \"cert ca\", then one for each\n" +
			"node with \"cert node\" and for each person or program with \"cert client\". An authority of your own will do as well, if it puts\n" +
			"the role (node, operate or read) into the subject's organizational unit, and the addresses of nodes into subjectAltName.",
	}
	cmd.AddCommand(certCACommand(), certNodeCommand(), certClientCommand())
	return cmd
}

// certFiles is where a command about certificates reads and writes.
type certFiles struct {
	dir     string
	replace bool
}

func (f *certFiles) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.dir, "dir", ".", "`directory` of ca.crt and ca.key, where the new files go as well")
	cmd.Flags().BoolVar(&f.replace, "force", false, "replace files that are there")
}

func (f *certFiles) path(name string) string { return filepath.Join(f.dir, name) }

// write writes a certificate and its key to name.crt and name.key, the key first: a certificate without one is of no use.
func (f *certFiles) write(name string, p pki.Pair) error {
	for _, file := range []struct {
		name string
		text []byte
	}{{name + ".key", p.Key}, {name + ".crt", p.Cert}} {
		err := pki.WriteSecret(f.path(file.name), file.text, f.replace)
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%s exists: --force replaces it", f.path(file.name))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (f *certFiles) authority() (*pki.Authority, error) {
	a, err := pki.LoadAuthority(f.path("ca.crt"), f.path("ca.key"))
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: make it with \"quorate cert ca --dir %s\"", err, f.dir)
	}
	return a, err
}

func certCACommand() *cobra.Command {
	var files certFiles
	var name string
	cmd := &cobra.Command{
		Use:   "ca",
		Short: "Make the authority that all certificates of one cluster come from",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, pair, err := pki.NewAuthority(name, time.Now())
			if err != nil {
				return err
			}
			if err := files.write("ca", pair); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "made %s and %s, valid for ten years\n"+
				"Who has ca.key can make himself a member: keep it off the nodes. ca.crt goes to everybody.\n"+
				"next, for each node: quorate cert node --dir %s --name NODE --host ADDRESS\n",
				files.path("ca.crt"), files.path("ca.key"), files.dir)
			return nil
		},
	}
	files.flags(cmd)
	cmd.Flags().StringVar(&name, "name", "Quorate cluster CA", "`name` in the certificate's subject")
	return cmd
}

// issueCommand is what "cert node" and "cert client" have in common.
func issueCommand(cmd *cobra.Command, r *pki.Request, next func(io.Writer, certFiles)) *cobra.Command {
	var files certFiles
	var days int
	cmd.Args = cobra.NoArgs
	inner := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := inner(cmd, args); err != nil {
			return err
		}
		if r.Name == "" || strings.ContainsAny(r.Name, `/\`) || strings.HasPrefix(r.Name, ".") || r.Name == "ca" {
			return usage("name", strconv.Quote(r.Name), "must be fit for the name of a file, and not ca")
		}
		if days < 1 || days > 3650 {
			return usage("days", strconv.Itoa(days), "must be from 1 to 3650")
		}
		r.Lifetime = time.Duration(days) * 24 * time.Hour
		a, err := files.authority()
		if err != nil {
			return err
		}
		pair, err := a.Issue(*r, time.Now())
		if err != nil {
			return err
		}
		if err := files.write(r.Name, pair); err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "made %s and %s: role %s, valid for %d days\n", files.path(r.Name+".crt"), files.path(r.Name+".key"), r.Role, days)
		next(cmd.OutOrStdout(), files)
		return nil
	}
	files.flags(cmd)
	cmd.Flags().StringVar(&r.Name, "name", "", "`name` of the files, and of the owner in logs (required)")
	cmd.Flags().IntVar(&days, "days", int(pki.DefaultLifetime/(24*time.Hour)), "how many days it is valid")
	return cmd
}

func certNodeCommand() *cobra.Command {
	r := pki.Request{Role: pki.Node}
	cmd := issueCommand(&cobra.Command{
		Use:   "node --name NAME --host ADDRESS...",
		Short: "Make a node's certificate",
		Long: "Make a node's certificate. It is good for the addresses given with --host: all by which other nodes, people, and clients of\n" +
			"PostgreSQL that verify it, reach this node. Its owner can be a member and so do everything: it belongs on the node, and nowhere else.",
		RunE: func(*cobra.Command, []string) error {
			if len(r.Hosts) == 0 {
				return usage("host", `""`, "is required: an IP address or a name by which others reach the node")
			}
			return nil
		},
	}, &r, func(w io.Writer, f certFiles) {
		fmt.Fprintf(w, "copy them and %s to the node, owned by the user it runs as, and name them in its configuration:\n"+
			"  tls: {ca: ca.crt, cert: %s.crt, key: %s.key}\n"+
			"A running node takes them when they replace the old ones, without a restart.\n", f.path("ca.crt"), r.Name, r.Name)
	})
	cmd.Flags().StringSliceVar(&r.Hosts, "host", nil, "IP `address` or name, without port; give it as often as needed")
	return cmd
}

func certClientCommand() *cobra.Command {
	var r pki.Request
	var role string
	cmd := issueCommand(&cobra.Command{
		Use:   "client --name NAME --role read|operate",
		Short: "Make the certificate of a person or a program",
		RunE: func(*cobra.Command, []string) (err error) {
			r.Role, err = pki.ParseRole(role)
			if err != nil || r.Role == pki.Node {
				return usage("role", strconv.Quote(role), "must be read, to look, or operate, to change the cluster")
			}
			return nil
		},
	}, &r, func(w io.Writer, f certFiles) {
		fmt.Fprintf(w, "next: quorate status --address NODE:PORT --ca %s --cert %s --key %s\n",
			f.path("ca.crt"), f.path(r.Name+".crt"), f.path(r.Name+".key"))
	})
	cmd.Flags().StringVar(&role, "role", "", "`role`: read or operate (required)")
	_ = cmd.RegisterFlagCompletionFunc("role", cobra.FixedCompletions([]string{"read", "operate"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}
