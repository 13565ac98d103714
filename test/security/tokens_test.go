package security

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
)

// joiner is a witness that wants to join: a node that needs nothing but the token.
type joiner struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error

	mu   sync.Mutex
	said bytes.Buffer
}

func (j *joiner) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.said.Write(p)
}

func (j *joiner) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.said.String()
}

// quorate runs a command as the operator.
func (o *outsider) quorate(ctx context.Context, args ...string) (string, error) {
	in := o.c.CertDir()
	return o.c.Command(ctx, append(args, "--address", o.ports["grpc"],
		"--ca", filepath.Join(in, "ca.crt"), "--cert", filepath.Join(in, "operator.crt"), "--key", filepath.Join(in, "operator.key"))...)
}

// join starts a witness with a certificate of the cluster's authority.
func (o *outsider) join(t *testing.T, ctx context.Context, name, token string) *joiner {
	t.Helper()
	_, err := o.c.Command(ctx, "cert", "node", "--dir", o.c.CertDir(), "--name", name, "--host", "127.0.0.1")
	check(t, err)
	dir := t.TempDir()
	var ports []any
	for range 3 {
		ports = append(ports, fmt.Sprintf("127.0.0.1:%d", pgtest.FreePort(t)))
	}
	config := filepath.Join(dir, "quorate.yaml")
	in := o.c.CertDir()
	text := fmt.Sprintf("cluster: tested\nrole: witness\ndata_dir: .\nlisten: {grpc: '%s', http: '%s', raft: '%s'}\n", ports...) +
		fmt.Sprintf("tls: {ca: %s/ca.crt, cert: %s/%s.crt, key: %s/%s.key}\n", in, in, name, in, name)
	check(t, os.WriteFile(config, []byte(text), 0o600))
	j := &joiner{done: make(chan struct{})}
	j.cmd = exec.Command(o.binary, "join", "--config", config, "--peer", o.ports["grpc"], "--token", token)
	j.cmd.Stdout, j.cmd.Stderr = j, j
	check(t, j.cmd.Start())
	go func() {
		defer close(j.done)
		j.err = j.cmd.Wait()
	}()
	t.Cleanup(func() {
		if j.cmd.Process.Signal(syscall.SIGTERM) == nil { // otherwise it has ended
			select {
			case <-j.done:
			case <-time.After(patience):
				t.Errorf("%s does not end:\n%s", name, j)
				_ = j.cmd.Process.Kill()
				<-j.done
			}
		}
	})
	return j
}

// refused returns when the joiner has ended because nobody admits it.
func (j *joiner) refused(t *testing.T, want string) {
	t.Helper()
	select {
	case <-j.done:
		if j.err == nil || !strings.Contains(j.String(), want) {
			t.Errorf("it does not say %q:\n%s", want, j)
		}
	case <-time.After(patience):
		t.Errorf("it is not refused:\n%s", j)
	}
}

// tokens tries to join without a token that is good. A certificate of the authority alone makes nobody a member.
func (o *outsider) tokens(t *testing.T, ctx context.Context) {
	create := func(args ...string) string {
		t.Helper()
		said, err := o.quorate(ctx, append([]string{"token", "create"}, args...)...)
		check(t, err)
		return strings.TrimSpace(said)
	}
	o.join(t, ctx, "without", "").refused(t, "not a token")
	good := create("--ttl", "1h")
	o.join(t, ctx, "guessing", good[:37]+strings.Repeat("A", len(good)-37)).refused(t, "not known")
	revoked := create("--ttl", "1h")
	_, err := o.quorate(ctx, "token", "revoke", revoked[:36])
	check(t, err)
	o.join(t, ctx, "revoked", revoked).refused(t, "taken back")
	expired := create("--ttl", "1s")
	time.Sleep(2 * time.Second) // what is tested is that it has passed
	o.join(t, ctx, "expired", expired).refused(t, "expired")

	// Of two that have the same token for one, one gets in.
	first, second := o.join(t, ctx, "first", good), o.join(t, ctx, "second", good)
	var out *joiner
	select {
	case <-first.done:
		out = first
	case <-second.done:
		out = second
	case <-time.After(patience):
		t.Fatalf("both got in:\n%s\n%s", first, second)
	}
	out.refused(t, "token")
	list, err := o.quorate(ctx, "token", "list")
	check(t, err)
	if strings.Contains(list, good[37:]) || !strings.Contains(list, good[:36]+"  0 ") {
		t.Errorf("tokens:\n%s", list)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		status, err := o.quorate(ctx, "status")
		if err == nil && strings.Contains(status, "3 of 3 heard") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("nobody has joined: %v\n%s\n%s\n%s", err, status, first, second)
		}
	}
}
