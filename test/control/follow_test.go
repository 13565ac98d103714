package control

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/quorate/quorate/test/cluster"
)

// event is what "quorate events -o json" prints of one.
type event struct {
	Node, About int
	Number      uint64
	Kind        string
	Time        time.Time
}

func (e event) String() string {
	return fmt.Sprintf("%s of node %d at node %d", e.Kind, e.About, e.Node)
}

// followed is a running "quorate events --follow".
type followed struct {
	cmd         *exec.Cmd
	out, errors string // files
}

func followEvents(t *testing.T, ctx context.Context, c *cluster.Cluster, node int) *followed {
	t.Helper()
	dir := t.TempDir()
	f := &followed{exec.CommandContext(ctx, fixture.binary, "events", "--follow", "--limit", "5", "-o", "json"), filepath.Join(dir, "out"), filepath.Join(dir, "errors")}
	f.cmd.Env = append(os.Environ(), "QUORATE_ADDRESS="+c.GRPC(node))
	out, err := os.Create(f.out)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	errs, err := os.Create(f.errors)
	if err != nil {
		t.Fatal(err)
	}
	defer errs.Close()
	f.cmd.Stdout, f.cmd.Stderr = out, errs
	if err := f.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if f.cmd.ProcessState == nil {
			_ = f.cmd.Process.Kill()
			_ = f.cmd.Wait()
		}
	})
	return f
}

// events reads the whole lines that were printed.
func (f *followed) events() (all []event, err error) {
	text, err := os.ReadFile(f.out)
	if err != nil {
		return nil, err
	}
	lines := strings.SplitAfter(string(text), "\n")
	for _, line := range lines[:len(lines)-1] {
		var e event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		all = append(all, e)
	}
	return all, nil
}

func (f *followed) await(t *testing.T, ctx context.Context, what string, since time.Time) {
	t.Helper()
	await(t, ctx, what, func() error {
		all, err := f.events()
		for _, e := range all {
			if e.String() == what && e.Time.After(since) {
				return nil
			}
		}
		return fmt.Errorf("it is not among %v, %w", all, err)
	})
}

// Whoever follows the events gets each of every node once, although the node that is asked, or another, was away; among
// them that a process has slept, which it says itself.
func TestFollow(t *testing.T) {
	c, ctx := start(t)
	began := time.Now()
	first, third := followEvents(t, ctx, c, 1), followEvents(t, ctx, c, 3)
	for _, f := range []*followed{first, third} {
		await(t, ctx, "what has happened", func() error {
			if all, err := f.events(); len(all) != 5 {
				return fmt.Errorf("%v, %w", all, err)
			}
			return nil
		})
	}

	pid, err := c.SidecarPID(2)
	if err != nil {
		t.Fatal(err)
	}
	frozen := time.Now()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	first.await(t, ctx, "peer_lost of node 2 at node 1", began)
	time.Sleep(time.Second) // beyond all doubt
	slept := time.Since(frozen)
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	first.await(t, ctx, "frozen of node 2 at node 2", began)
	var told struct {
		Events []struct {
			Node   int
			Fields struct {
				Seconds float64 `json:",string"`
			}
		}
	}
	ask(t, ctx, c, 1, &told, "events", "--kind", "frozen", "--since", "5m")
	for _, e := range told.Events {
		if e.Node == 2 && (e.Fields.Seconds < slept.Seconds()-0.5 || e.Fields.Seconds > time.Since(frozen).Seconds()) {
			t.Errorf("node 2 says that it slept for %v s, and it was %v", e.Fields.Seconds, slept)
		}
	}

	if err := c.KillNode(ctx, 1); err != nil {
		t.Fatal(err)
	}
	third.await(t, ctx, "peer_lost of node 1 at node 3", began)
	restart(t, ctx, c, 1)
	first.await(t, ctx, "started of node 1 at node 1", began)

	var happened struct{ Events []event }
	ask(t, ctx, c, 2, &happened, "events", "--since", time.Since(began).String(), "--limit", "1000")
	if len(happened.Events) < 8 {
		t.Errorf("nothing has happened but %v", happened.Events)
	}
	for name, f := range map[string]*followed{"node 1": first, "node 3": third} {
		await(t, ctx, "all events by way of "+name, func() error {
			all, err := f.events()
			if err != nil {
				return err
			}
			last := make(map[int]uint64)
			times := make(map[string]int)
			for _, e := range all {
				if e.Number <= last[e.Node] {
					t.Fatalf("by way of %s, event %d of node %d comes after %d", name, e.Number, e.Node, last[e.Node])
				}
				last[e.Node] = e.Number
				times[fmt.Sprintf("%d/%d", e.Node, e.Number)]++
			}
			for _, e := range happened.Events {
				if times[fmt.Sprintf("%d/%d", e.Node, e.Number)] != 1 && e.Time.After(began) {
					return fmt.Errorf("%v, number %d, is not among %v", e, e.Number, all)
				}
			}
			return nil
		})
		if err := f.cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		if err := f.cmd.Wait(); err != nil {
			t.Errorf("interrupted, it ends with %v", err)
		}
		errs, err := os.ReadFile(f.errors)
		if err != nil {
			t.Fatal(err)
		}
		if lost := strings.Contains(string(errs), "no contact with"); lost != (f == first) || strings.Contains(string(errs), "quorate:") {
			t.Errorf("by way of %s it says:\n%s", name, errs)
		}
	}
}
