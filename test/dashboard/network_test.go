package dashboard_test

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp/kb"

	"github.com/quorate/quorate/internal/browser"
	"github.com/quorate/quorate/test/cluster"
	"github.com/quorate/quorate/test/network"
)

// certificates are what a browser that looks at a node trusts.
func certificates(c *cluster.Cluster, node int) []string {
	return []string{filepath.Join(c.CertDir(), fmt.Sprintf("node%d.crt", node))}
}

// signIn types a token where it is asked for.
func signIn(tab *browser.Tab, token string) {
	tab.AwaitText(patience, "#sign-in", "Token")
	tab.Type("#token", token+kb.Enter)
	tab.AwaitText(patience, "#verdict", "Healthy")
}

// TestPageOverTLS looks at nodes that are machines of their own, with certificates, as an operator with a token does: a
// direction that is broken is seen, a node gets its data anew, and leaves.
func TestPageOverTLS(t *testing.T) {
	dir, err := cluster.TempDir("")
	check(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
	binary, err := cluster.Build(t.Context(), dir, false)
	check(t, err)
	tokens := make(map[string]string) // by role
	var lines []byte
	for _, role := range []string{"read", "operate"} {
		tokens[role] = rand.Text()
		lines = fmt.Appendf(lines, "%s %x somebody\n", role, sha256.Sum256([]byte(tokens[role])))
	}
	file := filepath.Join(dir, "http.tokens")
	check(t, os.WriteFile(file, lines, 0o644))

	o := cluster.Options{Binary: binary, Certificates: true, Configuration: "http: {tokens: " + file + "}\n"}
	net, err := network.New(3)
	if err == nil {
		t.Cleanup(func() { check(t, net.Close()) })
		o.Network, o.Certificates = net, false
	} else if !errors.Is(err, network.ErrNotPermitted) {
		t.Fatal(err)
	}
	c, err := cluster.Start(t.Context(), o)
	check(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Logs(25))
		}
		check(t, errors.Join(c.Stop(), c.Destroy()))
	})
	tab := browser.Open(t, browser.Options{Noisy: true, Trusted: certificates(c, 1)})
	tab.Open("https://" + c.HTTP(1) + "/")
	signIn(tab, tokens["read"])
	tab.Await(patience, "no actions to who may only look", `Array.from(document.querySelectorAll(".menu")).every((m) => !m.checkVisibility())`)
	if browser.Value[string](tab, "document.cookie") != "" {
		t.Error("scripts can read the cookie, which is the token")
	}
	tab.Click("#leave")
	signIn(tab, tokens["operate"])
	tab.AwaitText(patience, "#links", "Every node hears every other.")

	t.Run("OneWay", func(t *testing.T) {
		if net == nil {
			t.Skip(network.ErrNotPermitted)
		}
		net.Set(2, 3, network.Link{Cut: true})
		cut := time.Now()
		tab.AwaitText(patience, "#links", "Node 3 has not heard node 2 for")
		took := time.Since(cut)
		t.Logf("what node 2 sends to node 3 is lost: shown after %v", took.Round(time.Millisecond))
		if took > inTime {
			t.Error("that is too late")
		}
		if got := browser.Value[string](tab, `document.querySelector("#matrix .lost").closest("tr").innerText`); !strings.HasPrefix(got, "node 3 hears") && !strings.HasPrefix(got, "node 2 hears") {
			t.Errorf("what is lost stands in the row %q", got)
		}
		tab.AwaitText(inTime, "#verdict", "Degraded")
		if got := tab.Visible("#links"); strings.Contains(got, "Node 1") || strings.Contains(got, "heard node 1") {
			t.Errorf("the page blames a node that is well: %q", got)
		}
		net.Set(2, 3, network.Link{})
		tab.AwaitText(patience, "#links", "Every node hears every other.")
		tab.AwaitText(patience, "#verdict", "Healthy")
	})

	// Node 1 is cut off. Its page says so, and so does the page of a node on the other side.
	t.Run("Isolated", func(t *testing.T) {
		if net == nil {
			t.Skip(network.ErrNotPermitted)
		}
		other := browser.Open(t, browser.Options{Noisy: true, Trusted: certificates(c, 2)})
		other.Open("https://" + c.HTTP(2) + "/")
		signIn(other, tokens["read"])
		isolate := func(link network.Link) {
			for _, peer := range []int{2, 3} {
				net.Set(1, peer, link)
				net.Set(peer, 1, link)
			}
		}
		isolate(network.Link{Cut: true})
		cut := time.Now()
		said := func(side string) {
			t.Helper()
			took := time.Since(cut)
			t.Logf("%s says so after %v", side, took.Round(time.Millisecond))
			if took > inTime {
				t.Errorf("%s says so after %v, and must within %v", side, took, inTime)
			}
		}
		tab.AwaitText(patience, "#verdict-text", "This node hears 1 of 3 voters, and 2 are needed")
		tab.AwaitText(patience, "#strip", "Node 1 is cut off from the majority: commits wait here.")
		said("the node that is cut off")
		other.AwaitText(patience, "#node-1 ~ .chip", "not reached")
		said("the other side")
		other.AwaitText(patience, "#troubles", "node 1 is not reached: node 2 and node 3 do not hear it.")
		other.AwaitText(patience, "#events", "Without node 1, which does not answer.")
		tab.AwaitText(patience, "#verdict", "No quorum")
		tab.AwaitText(patience, "#events", "Without node 2 and node 3, which do not answer.")
		other.AwaitText(patience, "#verdict-text", "No node may fail now: commits would stop.") // there is a leader, again
		isolate(network.Link{})
		for _, page := range []*browser.Tab{tab, other} {
			page.AwaitText(patience, "#links", "Every node hears every other.")
			page.AwaitText(patience, "#verdict", "Healthy")
			page.AwaitText(patience, "#events", "node 1 has lost contact with the majority: it takes no writes")
		}
	})

	// confirm takes an action that wants the node's name: nothing else is taken for it.
	confirm := func(node, action string) {
		t.Helper()
		choose(tab, node, action)
		tab.Type("#ask-input", "node 1")
		if !browser.Value[bool](tab, `document.querySelector("#ask-yes").disabled`) {
			t.Errorf("%s of node %s is confirmed by another's name", action, node)
		}
		tab.Clear("#ask-input")
		tab.Type("#ask-input", "node "+node)
		tab.Click("#ask-yes")
	}
	confirm("3", "Resync…")
	tab.AwaitText(patience, "#toast", "Node 3 sets its data aside and copies those of another.")
	tab.AwaitText(patience, "#node-4 ~ .chip", "active") // as a new member in its place
	tab.Await(patience, "the old one to be gone", `document.querySelector("#node-3") === null`)
	tab.AwaitText(patience, "#verdict", "Healthy")
	confirm("4", "Remove…")
	tab.AwaitText(patience, "#toast", "Node 4 is removed.")
	tab.Await(patience, "two nodes", `document.querySelectorAll("#cards .card").length === 2`)
	tab.AwaitText(patience, "#events", "node 4 was removed")
	tab.AwaitText(patience, "#strip", "Live from node 1")
}
