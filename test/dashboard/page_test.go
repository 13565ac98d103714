package dashboard_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/chromedp/kb"

	"github.com/quorate/quorate/internal/browser"
	"github.com/quorate/quorate/test/cluster"
)

// inTime is how soon the page must show what its node knows.
const inTime = 2 * time.Second

// patience bounds what takes as long as it takes on a busy machine.
const patience = 90 * time.Second

// open starts a cluster with clients that write on nodes until the test ends.
func open(t *testing.T, nodes ...int) (*cluster.Cluster, context.Context) {
	t.Helper()
	dir, err := cluster.TempDir("")
	check(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
	binary, err := cluster.Build(t.Context(), dir, false)
	check(t, err)
	c, err := cluster.Start(t.Context(), cluster.Options{Binary: binary})
	check(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Logs(25))
		}
		check(t, c.Destroy())
	})
	ctx, cancel := context.WithCancel(context.Background())
	var clients sync.WaitGroup
	t.Cleanup(func() { cancel(); clients.Wait() })
	conn, err := c.Connect(ctx, 1)
	check(t, err)
	_, err = conn.Exec(ctx, "CREATE TABLE work (id int PRIMARY KEY, n int NOT NULL); INSERT INTO work SELECT i, 0 FROM generate_series(1, 200) i")
	check(t, errors.Join(err, conn.Close(ctx)))
	check(t, c.Settle(ctx))
	for _, node := range nodes {
		for i := range 2 {
			clients.Go(func() { work(ctx, c, node, i) })
		}
	}
	return c, ctx
}

// work is a client that goes on whatever happens. Two clients of different nodes often want the same row.
func work(ctx context.Context, c *cluster.Cluster, node, seed int) {
	for n := seed; ctx.Err() == nil; {
		conn, err := c.Connect(ctx, node)
		for err == nil {
			n = (n*5 + 1) % 16
			statement, cancel := context.WithTimeout(ctx, 20*time.Second)
			_, err = conn.Exec(statement, "UPDATE work SET n = n + 1 WHERE id = $1", n+1)
			cancel()
			if cluster.IsConflict(err) {
				err = nil
			}
			pause(ctx, 10*time.Millisecond) // a page is to be looked at, not a server to be loaded
		}
		if conn != nil {
			closing, cancel := context.WithTimeout(context.Background(), time.Second)
			_ = conn.Close(closing) // it has failed already
			cancel()
		}
		pause(ctx, 100*time.Millisecond)
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// knows waits until a metric of a node has a value, and sends when.
func knows(ctx context.Context, c *cluster.Cluster, node int, metric string, value float64) <-chan time.Time {
	at := make(chan time.Time, 1)
	go func() {
		for ctx.Err() == nil {
			m, err := c.Metrics(ctx, node)
			if got, ok := m[metric]; err == nil && ok && got == value {
				at <- time.Now()
				return
			}
			pause(ctx, 20*time.Millisecond)
		}
	}()
	return at
}

// shows waits until the page shows something, and checks that it does in time, once the node knows.
func shows(t *testing.T, tab *browser.Tab, known <-chan time.Time, selector, text string) {
	t.Helper()
	tab.AwaitText(patience, selector, text)
	seen := time.Now()
	select {
	case at := <-known:
		t.Logf("%q after %v", text, seen.Sub(at).Round(time.Millisecond))
		if late := seen.Sub(at); late > inTime {
			t.Errorf("the page shows %q %v after its node has known it, and must within %v", text, late, inTime)
		}
	case <-time.After(inTime):
		t.Errorf("the page shows %q, and the node does not know", text)
	}
}

func signal(t *testing.T, c *cluster.Cluster, s syscall.Signal, nodes ...int) {
	t.Helper()
	for _, node := range nodes {
		pid, err := c.SidecarPID(node)
		check(t, err)
		check(t, syscall.Kill(pid, s))
	}
}

func page(c *cluster.Cluster, node int) string { return "http://" + c.HTTP(node) + "/" }

// choose takes an action from a node's menu.
func choose(tab *browser.Tab, node, action string) {
	button := fmt.Sprintf(`Array.from(document.querySelectorAll("[aria-labelledby=node-%s] .menu button")).find((b) => b.textContent === %q)`, node, action)
	tab.Await(patience, action+" of node "+node, button+" !== undefined")
	tab.Click(fmt.Sprintf("[aria-labelledby=node-%s] summary", node))
	browser.Value[bool](tab, button+`.click() === undefined`)
}

// TestPage follows a cluster through a night.
func TestPage(t *testing.T) {
	c, ctx := open(t, 1, 2)
	tab := browser.Open(t, browser.Options{Noisy: true})
	tab.Open(page(c, 1))

	tab.AwaitText(patience, "#verdict", "Healthy")
	tab.AwaitText(patience, "#verdict-text", "One more node may fail.")
	for node := 1; node <= 3; node++ {
		tab.AwaitText(patience, fmt.Sprintf("#node-%d ~ .chip", node), "active")
	}
	tab.Await(patience, "commits", `Number(document.querySelector("#plot-commits b").innerText) > 1`)
	tab.Await(patience, "latencies of four stages", `Array.from(document.querySelectorAll("#plot-latency99 b")).filter((b) => / m?s$/.test(b.innerText)).length === 4`)
	tab.Await(patience, "the lag of three nodes", `Array.from(document.querySelectorAll("#plot-lag b")).filter((b) => /^[0-9]/.test(b.innerText)).length === 3`)
	tab.Await(patience, "the depth of two queues", `Array.from(document.querySelectorAll("#plot-queue b")).filter((b) => /^[0-9]/.test(b.innerText)).length === 2`)
	tab.Await(patience, "aborts by reason", `Array.from(document.querySelectorAll("#plot-aborts span")).some((s) => ["conflict", "evicted"].includes(s.innerText))`)
	tab.Await(patience, "a heartbeat of every pair", `document.querySelectorAll("#matrix .fresh, #matrix .late").length === 6`)
	tab.AwaitText(patience, "#conflict-rows", "public.work (id)=(")
	tab.AwaitText(patience, "#events", "leads")
	tab.AwaitText(patience, "#cards", "PostgreSQL 1")
	// Of node 2 it shows what only node 2 knows: its transactions before they are decided, and its events.
	tab.Await(patience, "transactions of another node", `Array.from(document.querySelectorAll("#transaction-rows tr")).some((tr) => tr.children[0].innerText.startsWith("2-") && tr.children[1].innerText === "node 2")`)
	tab.AwaitText(patience, "#events", "node 2 starts")

	t.Log("an operator moves the leadership and drains a node")
	leader := strings.TrimPrefix(tab.Visible("#facts div:first-child dd"), "node ")
	follower := map[string]string{"1": "2", "2": "3", "3": "2"}[leader]
	choose(tab, follower, "Make it the leader…")
	tab.Click("#ask-yes")
	tab.AwaitText(patience, "#facts div:first-child dd", "node "+follower)
	choose(tab, "3", "Drain…")
	tab.Click("#ask-yes")
	tab.AwaitText(patience, "#toast", "Node 3 is drained.")
	tab.AwaitText(inTime, "#node-3 ~ .chip", "draining")
	tab.AwaitText(patience, "#troubles", "node 3 is draining")
	choose(tab, "3", "Resume")
	tab.Click("#ask-yes")
	tab.AwaitText(patience, "#node-3 ~ .chip", "active")

	t.Log("a node is killed")
	known := knows(ctx, c, 1, "quorate_node_members_heard", 2)
	check(t, c.KillNode(ctx, 3))
	shows(t, tab, known, "#node-3 ~ .chip", "not reached")
	tab.AwaitText(inTime, "#verdict", "Degraded")
	tab.AwaitText(inTime, "#verdict-text", "No node may fail now")
	tab.AwaitText(inTime, "#links", "Node 1 has not heard node 3")
	tab.AwaitText(inTime, "#events", "node 3 is not heard any more")
	// What it had to tell is missing, and that is said.
	for _, part := range []string{"#events", "#transactions", "#conflicts"} {
		tab.AwaitText(patience, part, "Without node 3, which does not answer.")
	}

	t.Log("it comes back")
	known = knows(ctx, c, 1, "quorate_node_members_heard", 3)
	check(t, c.StartNode(3))
	shows(t, tab, known, "#links", "Every node hears every other.")
	tab.AwaitText(patience, "#verdict", "Healthy")
	tab.AwaitText(patience, "#events", "node 3 starts after a life that ended without being stopped")
	tab.Await(patience, "nobody to be missing", `Array.from(document.querySelectorAll(".silent")).every((p) => p.hidden)`)

	t.Log("two nodes stand still: no quorum")
	known = knows(ctx, c, 1, "quorate_node_quorum", 0)
	signal(t, c, syscall.SIGSTOP, 2, 3)
	defer func() {
		if t.Failed() {
			signal(t, c, syscall.SIGCONT, 2, 3)
		}
	}()
	shows(t, tab, known, "#verdict", "No quorum")
	tab.AwaitText(inTime, "#verdict-text", "This node reaches 1 of 3 voters, and 2 are needed")
	tab.AwaitText(inTime, "#strip", "Node 1 has no quorum: clients can read here, not write.")
	tab.AwaitText(inTime, "#node-1 ~ .chip", "read only")
	if title := browser.Value[string](tab, "document.title"); !strings.HasPrefix(title, "✕ No quorum") {
		t.Errorf("the title is %q", title)
	}
	tab.AwaitText(patience, "#transactions", "in doubt") // the clients' commits

	t.Log("they go on")
	known = knows(ctx, c, 1, "quorate_node_quorum", 1)
	signal(t, c, syscall.SIGCONT, 2, 3)
	tab.Await(patience, "a quorum", `!document.querySelector("#verdict").innerText.includes("No quorum")`)
	seen := time.Now()
	if late := seen.Sub(<-known); late > inTime {
		t.Errorf("the page shows the quorum %v after its node knows it", late)
	}
	tab.AwaitText(patience, "#verdict", "Healthy")

	t.Log("the node that serves the page stands still")
	signal(t, c, syscall.SIGSTOP, 1)
	stopped := time.Now()
	tab.AwaitText(patience, "#strip", "Stale: no news from node 1")
	if took := time.Since(stopped); took > inTime+inTime {
		t.Errorf("the page says after %v that it is stale", took)
	}
	signal(t, c, syscall.SIGCONT, 1)
	tab.AwaitText(patience, "#strip", "Live from node 1")

	t.Log("and is restarted")
	browser.Value[bool](tab, `(window.before = true)`)
	check(t, c.KillNode(ctx, 1))
	tab.AwaitText(patience, "#strip", "Stale: no news from node 1")
	check(t, c.StartNode(1))
	tab.AwaitText(patience, "#strip", "Live from node 1")
	tab.AwaitText(patience, "#verdict", "Healthy")
	if !browser.Value[bool](tab, `window.before === true`) {
		t.Error("the page was loaded again")
	}
	tab.Await(patience, "commits", `Number(document.querySelector("#plot-commits b").innerText) > 1`)

	t.Log("and from then on asks who looks")
	token := addToken(t, c, 1)
	check(t, c.KillNode(ctx, 1))
	check(t, c.StartNode(1))
	tab.AwaitText(patience, "#sign-in", "Token")
	tab.Type("#token", token+kb.Enter)
	tab.AwaitText(patience, "#strip", "Live from node 1")
	tab.AwaitText(patience, "#cards", "node 1")
	tab.Await(patience, "no actions to who may only look", `Array.from(document.querySelectorAll(".menu")).every((m) => !m.checkVisibility())`)
}

// addToken gives a node a token for looking, from its next start on.
func addToken(t *testing.T, c *cluster.Cluster, node int) string {
	t.Helper()
	file := filepath.Join(c.NodeDir(node), "http.tokens")
	token := rand.Text()
	check(t, os.WriteFile(file, fmt.Appendf(nil, "read %x somebody\n", sha256.Sum256([]byte(token))), 0o600))
	config, err := os.OpenFile(filepath.Join(c.NodeDir(node), "quorate.yaml"), os.O_APPEND|os.O_WRONLY, 0)
	check(t, err)
	_, err = fmt.Fprintf(config, "http: {tokens: %s}\n", file)
	check(t, errors.Join(err, config.Close()))
	return token
}

// TestStressPage keeps a page open, and opens it again and again, and finds that neither it nor its node grows. Lists and charts
// are full after some minutes; for a shorter time only what is far beyond them is noticed.
func TestStressPage(t *testing.T) {
	text := os.Getenv("QUORATE_STRESS")
	if text == "" {
		t.Skip("QUORATE_STRESS is not set, and this takes its time")
	}
	length, err := time.ParseDuration(text)
	check(t, err)
	heap, nodes := int64(2<<20), int64(6000)
	if length >= 10*time.Minute {
		heap, nodes = 1<<20, 500
	}
	c, ctx := open(t, 1, 2, 3)
	goroutines := func() int {
		m, err := c.Metrics(ctx, 1)
		check(t, err)
		n, ok := m["go_goroutines"]
		if !ok {
			t.Fatal("node 1 does not tell how many goroutines it has")
		}
		return int(n)
	}
	tab := browser.Open(t, browser.Options{})
	tab.Open(page(c, 1))
	tab.AwaitText(patience, "#verdict", "Healthy")
	pause(ctx, length/2)
	before, had := tab.Memory(), goroutines()
	pause(ctx, length/2)
	after, has := tab.Memory(), goroutines()
	t.Logf("after %v: %+v and %d goroutines; after %v: %+v and %d", length/2, before, had, length, after, has)
	tab.AwaitText(patience, "#strip", "Live from node 1")
	if grown := after.Heap - before.Heap; grown > heap {
		t.Errorf("the page's heap has grown by %d bytes", grown)
	}
	if after.Nodes > before.Nodes+nodes || after.Listeners > before.Listeners+50 {
		t.Errorf("the page's document has grown: %+v, then %+v", before, after)
	}
	// Sessions and connections of the work that goes on come and go; a page that was closed leaves more than that.
	const opened, few = 15, 10
	if has > had+few {
		t.Errorf("the node had %d goroutines and has %d", had, has)
	}
	for range opened {
		tab.Reload()
		tab.AwaitText(patience, "#strip", "Live from node 1")
	}
	for began := time.Now(); ; pause(ctx, 100*time.Millisecond) {
		now := goroutines()
		if now <= had+few {
			break
		}
		if time.Since(began) > patience {
			t.Fatalf("the node had %d goroutines, and has %d after a page was opened %d times", had, now, opened)
		}
	}
}
