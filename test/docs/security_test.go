package docs

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/quorate/quorate/test/cluster"
)

// TestSecurity runs the commands of docs/security.md in order, in one shell: up to where the first asks a node they are
// what a cluster is made with, the others are for that cluster. Its nodes are on this machine, so that they have another
// address and other ports than stand there.
func TestSecurity(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "docs", "security.md"))
	if err != nil {
		t.Fatal(err)
	}
	commands := shellCommands(string(text))
	asked := 0
	for asked < len(commands) && !strings.Contains(commands[asked], "--address") {
		asked++
	}
	if asked == 0 || asked == len(commands) {
		t.Fatalf("docs/security.md has the commands %q", commands)
	}
	dir, err := cluster.TempDir("")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	binary, err := cluster.Build(t.Context(), dir, false)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), demoTimeout)
	defer cancel()
	in := func(certificates string, more ...string) *strings.Replacer {
		return strings.NewReplacer(append([]string{"quorate ", binary + " ", "/etc/quorate", certificates}, more...)...)
	}
	c, err := cluster.Start(ctx, cluster.Options{
		Binary: binary, Certificates: true,
		Certify: func(dir string) error {
			names := in(dir, "node1.example", "127.0.0.1", "node2.example", "127.0.0.1", "node3.example", "127.0.0.1")
			for _, command := range commands[:asked] {
				t.Logf("%s\n%s", command, output(t, ctx, names.Replace(command)))
			}
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Destroy(); err != nil {
			t.Error(err)
		}
	})
	_, gateway, _ := strings.Cut(c.Gateway(1), ":")
	here := in(c.CertDir(), "node1.example:7432", c.GRPC(1), "node1.example:8432", c.HTTP(1), "node1.example", "127.0.0.1", "port=6432", "port="+gateway)
	environment := ""
	for _, command := range commands[asked:] {
		command = here.Replace(command)
		if strings.HasPrefix(command, "export ") {
			environment = command + "; "
			continue
		}
		command = "export PGPASSWORD=" + strconv.Quote(cluster.Password) + "; " + environment + command
		if strings.Contains(command, " status ") {
			command = "for i in $(seq 50); do sleep 0.2; " + command + " && exit; done; false" // who types is slower than files are read again
		}
		said := output(t, ctx, command)
		t.Logf("%s\n%s", command, said)
		if strings.Contains(command, " status ") && strings.Count(said, "active") != c.Nodes {
			t.Errorf("not all nodes are active")
		}
	}
	if err := c.Stop(); err != nil {
		t.Error(err)
	}
}
