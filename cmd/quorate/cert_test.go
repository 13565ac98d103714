package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The certificates that the commands make; nothing is overwritten by accident, and keys are their owner's alone.
func TestCert(t *testing.T) {
	dir := t.TempDir()
	try := func(code int, want string, args ...string) {
		t.Helper()
		got, stdout, stderr := do(t, append(append([]string{"cert"}, args...), "--dir", dir)...)
		if got != code || !strings.Contains(stdout+stderr, want) {
			t.Errorf("%v: exit code %d, want %d with %q; it says\n%s%s", args, got, code, want, stdout, stderr)
		}
	}
	try(exitFailure, `make it with "quorate cert ca`, "client", "--name", "ann", "--role", "read")
	try(exitOK, "quorate cert node", "ca")
	try(exitFailure, "--force replaces it", "ca")
	try(exitOK, "tls: {ca: ca.crt, cert: node1.crt, key: node1.key}", "node", "--name", "node1", "--host", "10.0.0.1", "--host", "node1.example")
	try(exitOK, "role operate", "client", "--name", "ann", "--role", "operate", "--days", "30")
	before, err := os.ReadFile(filepath.Join(dir, "ann.key"))
	if err != nil {
		t.Fatal(err)
	}
	try(exitFailure, "ann.key exists", "client", "--name", "ann", "--role", "operate")
	try(exitOK, "role read", "client", "--name", "ann", "--role", "read", "--force")
	if after, err := os.ReadFile(filepath.Join(dir, "ann.key")); err != nil || string(after) == string(before) {
		t.Errorf("--force replaces nothing: %v", err)
	}
	try(exitUsage, "--host", "node", "--name", "node2")
	try(exitUsage, "--name", "node", "--host", "10.0.0.1")
	try(exitUsage, "--name", "client", "--name", "../ann", "--role", "read")
	try(exitUsage, "--name", "client", "--name", "ca", "--role", "read", "--force")
	try(exitUsage, "--role", "client", "--name", "eve", "--role", "node")
	try(exitUsage, "--days", "client", "--name", "eve", "--role", "read", "--days", "0")
	try(exitFailure, `"10.0.0.1:7432"`, "node", "--name", "node2", "--host", "10.0.0.1:7432")

	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 6 {
		t.Errorf("there are %v, %v", files, err)
	}
	for _, f := range files {
		if info, err := f.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, %v", f.Name(), info.Mode(), err)
		}
	}
}

func TestHTTPToken(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tokens")
	for i, role := range []string{"read", "operate"} {
		code, token, stderr := do(t, "http-token", "--name", "ann", "--role", role, "--file", file)
		text, err := os.ReadFile(file)
		if code != exitOK || err != nil || len(strings.TrimSpace(token)) < 26 || strings.Count(string(text), "\n") != i+1 {
			t.Errorf("exit code %d, %v: %s%s\n%s", code, err, token, stderr, text)
		}
		if strings.Contains(string(text), strings.TrimSpace(token)) {
			t.Error("the token itself is in the file")
		}
	}
	for _, args := range []string{"--role read --file x", "--name ann --file x", "--name ann --role node --file x", "--name ann --role read"} {
		if code, _, stderr := do(t, append([]string{"http-token"}, strings.Fields(args)...)...); code != exitUsage {
			t.Errorf("%s: exit code %d, says %s", args, code, stderr)
		}
	}
}

// With what a command asks a node, and as whom.
func TestTarget(t *testing.T) {
	for args, want := range map[string]string{
		"--address 10.0.0.1:7432":                   "with a certificate only",
		"--address 127.0.0.1:1 --ca x":              "--cert",
		"--address 127.0.0.1:1 --ca x --cert x":     "--key",
		"--address h:1 --ca x --cert x --key /none": "no such file",
		"--config /none":                            "no such file",
	} {
		code, _, stderr := do(t, append([]string{"status"}, strings.Fields(args)...)...)
		if code == exitOK || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit code %d, says %s", args, code, stderr)
		}
	}
}

// A node does not start with a certificate that is of no use to it, and says why; and not beyond loopback without one.
func TestRunNeedsTheRightCertificate(t *testing.T) {
	dir := t.TempDir()
	for _, args := range []string{"ca", "node --name good --host 10.0.0.1", "node --name elsewhere --host 10.0.0.2", "client --name ann --role operate"} {
		if code, _, stderr := do(t, append(append([]string{"cert"}, strings.Fields(args)...), "--dir", dir)...); code != exitOK {
			t.Fatal(stderr)
		}
	}
	try := func(tls, want string, code int) {
		t.Helper()
		file := filepath.Join(dir, "quorate.yaml")
		text := "cluster: c\nnode: 1\nrole: witness\ndata_dir: data\nlisten: {grpc: '10.0.0.1:1', http: '10.0.0.1:2', raft: '10.0.0.1:3'}\n" +
			"members: [{id: 1, role: witness, grpc: '10.0.0.1:1', raft: '10.0.0.1:3'}, {id: 2, grpc: '10.0.0.2:1', raft: '10.0.0.2:3'}]\n" + tls
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, _, stderr := do(t, "run", "--config", file); got != code || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit code %d, want %d with %q; it says\n%s", tls, got, code, want, stderr)
		}
	}
	try("", "quorate cert ca", exitUsage)
	try("tls: {ca: ca.crt, cert: good.crt, key: ann.key}", "private key does not match", exitFailure)
	try("tls: {ca: ca.crt, cert: ann.crt, key: ann.key}", "has role operate", exitFailure)
	try("tls: {ca: ca.crt, cert: elsewhere.crt, key: elsewhere.key}", "is not for 10.0.0.1", exitFailure)
	// With the right one it comes as far as to listen where this machine has no address.
	try("tls: {ca: ca.crt, cert: good.crt, key: good.key}", "10.0.0.1:", exitFailure)
}
