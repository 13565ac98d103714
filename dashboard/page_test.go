package dashboard_test

import (
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chromedp/chromedp/kb"

	"github.com/quorate/quorate/dashboard"
	"github.com/quorate/quorate/internal/browser"
	"github.com/quorate/quorate/txn"
)

// within is how soon the page shows what it is told; much, because the machines that test are busy.
const within = 20 * time.Second

// look opens the page of a source.
func look(t *testing.T, s *scripted, o browser.Options) *browser.Tab {
	t.Helper()
	_, url := serve(t, dashboard.Config{Source: s})
	tab := browser.Open(t, o)
	tab.Open(url)
	tab.AwaitText(within, "#strip", "Live from node 1")
	return tab
}

// What heartbeats are for: a direction that is broken is told from one that is not, in words and not by colour alone.
func TestPageShowsTheBrokenDirection(t *testing.T) {
	s := three()
	tab := look(t, s, browser.Options{})
	tab.AwaitText(within, "#links", "Every node hears every other.")
	s.change(func(v *dashboard.View) { cut(v, 3, 2) })
	tab.AwaitText(within, "#links", "✕ Node 2 has not heard node 3 for 4.0 s; node 3 does hear node 2: one direction is broken.")
	tab.AwaitText(within, "#verdict", "Degraded")
	tab.AwaitText(within, "#troubles", "node 2 does not hear node 3.")
	if got := tab.Visible("#matrix .lost"); got != "✕ 4.0 s" {
		t.Errorf("lost: %q", got)
	}
	if got := browser.Value[string](tab, `document.querySelector("#matrix .lost").closest("tr").innerText`); !strings.Contains(got, "node 2 hears") {
		t.Errorf("the cell is in the row %q", got)
	}
	// A screen reader is told of the change once, and not of every heartbeat.
	tab.AwaitText(within, "#said", "Degraded. One more node may fail.")
	// Of a node that is not heard nobody knows what it hears.
	s.change(func(v *dashboard.View) {
		gone(v, 3)
		for i := range v.Links {
			v.Links[i].Known = v.Links[i].To != 3
		}
	})
	tab.Await(within, "that nobody knows", `document.querySelectorAll("#matrix .unknown").length === 2`)
}

// A node whose connection stands and that says nothing is as stale as one that is gone.
func TestPageIsStaleWhenNothingComes(t *testing.T) {
	s := three()
	tab := look(t, s, browser.Options{})
	s.mu.Lock()
	begin := time.Now()
	tab.AwaitText(within, "#strip", "Stale: no news from node 1")
	if took := time.Since(begin); took < 2*time.Second {
		t.Errorf("stale after %v", took)
	}
	if title := browser.Value[string](tab, "document.title"); !strings.HasPrefix(title, "? Stale") {
		t.Errorf("title %q", title)
	}
	s.mu.Unlock()
	tab.AwaitText(within, "#strip", "Live from node 1")
	if browser.Value[bool](tab, `"stale" in document.body.dataset`) {
		t.Error("it still looks stale")
	}
}

func TestPageSignsIn(t *testing.T) {
	var now atomic.Int64
	_, url := serve(t, dashboard.Config{
		Source: three(),
		Role:   func(*http.Request) dashboard.Role { return dashboard.Role(now.Load()) },
		Login: func(w http.ResponseWriter, r *http.Request) {
			role, known := map[string]dashboard.Role{"look": dashboard.Reader, "act": dashboard.Operator}[r.FormValue("token")]
			if !known {
				http.Error(w, "not known", http.StatusUnauthorized)
				return
			}
			now.Store(int64(role))
			w.WriteHeader(http.StatusNoContent)
		},
		Logout: func(w http.ResponseWriter, _ *http.Request) { now.Store(0); w.WriteHeader(http.StatusNoContent) },
	})
	tab := browser.Open(t, browser.Options{Noisy: true}) // a browser reports every 401
	tab.Open(url)
	tab.AwaitText(within, "#sign-in", "Token")
	if got := tab.Visible("#cards"); got != "" {
		t.Fatalf("somebody who has not signed in sees %q", got)
	}
	tab.Type("#token", "wrong"+kb.Enter)
	tab.AwaitText(within, "#sign-in-error", "This node does not know that token.")
	tab.Clear("#token")
	tab.Type("#token", "look"+kb.Enter)
	tab.AwaitText(within, "#verdict", "Healthy")
	tab.AwaitText(within, "#cards", "node 3")
	if got := tab.Visible(".menu"); got != "" {
		t.Fatalf("somebody who may only look has %q", got)
	}
	tab.Click("#leave")
	tab.AwaitText(within, "#sign-in", "Token")
	tab.Type("#token", "act"+kb.Enter)
	tab.AwaitText(within, ".menu", "Actions")
	// A right that is taken away ends what is shown.
	now.Store(0)
	tab.AwaitText(within, "#sign-in", "Token")
	if browser.Value[bool](tab, `document.querySelector("#cards").checkVisibility({ visibilityProperty: true })`) {
		t.Error("what was shown to an operator is left to nobody")
	}
}

func TestPageActs(t *testing.T) {
	s := three()
	asked := make(chan dashboard.Action, 10)
	refuse := true
	s.act = func(a dashboard.Action) (string, error) {
		asked <- a
		if refuse {
			return "", fmt.Errorf("the majority would be lost")
		}
		return "node 3 was removed", nil
	}
	tab := look(t, s, browser.Options{Noisy: true}) // a browser reports every status 500
	tab.AwaitText(within, "#cards", "Actions")

	tab.Click(".card:nth-child(2) .menu summary")
	tab.Click(".card:nth-child(2) .menu button:nth-child(1)")
	tab.AwaitText(within, "#ask", "Drain node 2?")
	tab.Key(kb.Escape)
	tab.Await(within, "that Escape is No", `!document.querySelector("#ask").open`)

	tab.Click(".card:nth-child(3) .menu summary")
	tab.Click(".card:nth-child(3) .menu button:nth-child(3)")
	tab.AwaitText(within, "#ask", "Remove node 3?")
	for _, typed := range []string{"", "node 2", "3"} {
		tab.Clear("#ask-input")
		tab.Type("#ask-input", typed+" ")
		if !browser.Value[bool](tab, `document.querySelector("#ask-yes").disabled`) {
			t.Errorf("%q confirms", typed)
		}
	}
	if len(asked) != 0 {
		t.Fatalf("done without having been confirmed: %v", <-asked)
	}
	tab.Clear("#ask-input")
	tab.Type("#ask-input", "node 3"+kb.Enter)
	tab.AwaitText(within, "#ask-error", "Not done: the majority would be lost")
	s.mu.Lock()
	refuse = false
	s.mu.Unlock()
	tab.Click("#ask-yes")
	tab.AwaitText(within, "#toast", "node 3 was removed")
	for range 2 {
		if a := <-asked; a != (dashboard.Action{Name: dashboard.Remove, Node: 3}) {
			t.Errorf("asked for %+v", a)
		}
	}
}

// Everything can be reached and done without a mouse.
func TestPageByKeyboard(t *testing.T) {
	s := three()
	asked := make(chan dashboard.Action, 10)
	s.act = func(a dashboard.Action) (string, error) { asked <- a; return "done", nil }
	tab := look(t, s, browser.Options{})
	tab.AwaitText(within, "#cards", "Actions")
	focus := func() string {
		return browser.Value[string](tab, `(document.activeElement.getAttribute("aria-label") ?? document.activeElement.innerText).replace(/\s+/g, " ").trim()`)
	}
	var path []string
	for range 60 {
		tab.Key(kb.Tab)
		f := focus()
		if !browser.Value[bool](tab, `document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle !== "none" || document.activeElement.matches("input")`) {
			t.Errorf("that %q has the focus is not visible", f)
		}
		path = append(path, f)
		if f == "Actions for node 2" {
			break
		}
	}
	if path[0] != "Skip to the content" || path[len(path)-1] != "Actions for node 2" {
		t.Fatalf("the way of the focus: %q", path)
	}
	tab.Key(kb.Enter)
	tab.Key(kb.Tab)
	if f := focus(); f != "Drain…" {
		t.Fatalf("in the menu: %q", f)
	}
	tab.Key(kb.Enter)
	tab.AwaitText(within, "#ask", "Drain node 2?")
	tab.Await(within, "the focus in the dialog", `document.querySelector("#ask").contains(document.activeElement)`)
	for range 5 {
		if focus() == "Drain" {
			break
		}
		tab.Key(kb.Tab)
	}
	tab.Key(kb.Enter)
	if a := <-asked; a != (dashboard.Action{Name: dashboard.Drain, Node: 2}) {
		t.Errorf("asked for %+v", a)
	}
	tab.Await(within, "the dialog closed", `!document.querySelector("#ask").open`) // under it nothing can have the focus
	// Charts tell their figures.
	tab.Await(within, "points in the charts", `document.querySelector("#plot-lag canvas").getAttribute("aria-label")?.startsWith("Lag, ")`)
	tab.Focus("#plot-commits canvas")
	tab.Key(kb.ArrowLeft)
	tab.AwaitText(within, "#said", "Commits, ")
}

// contrast returns what of the visible text has less than 4.5 to 1 against what it stands on.
const contrast = `(() => {
  const parse = (c) => { const m = c.match(/[\d.]+/g).map(Number); return { r: m[0], g: m[1], b: m[2], a: m[3] ?? 1 }; };
  const over = (top, under) => ({ r: top.r * top.a + under.r * (1 - top.a), g: top.g * top.a + under.g * (1 - top.a), b: top.b * top.a + under.b * (1 - top.a), a: 1 });
  const light = ({ r, g, b }) => { const f = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b); };
  const ground = (e) => { const layers = []; for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c.a > 0) layers.push(c); if (c.a === 1) break; } return layers.reverse().reduce((under, top) => over(top, under), { r: 255, g: 255, b: 255, a: 1 }); };
  const bad = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n; (n = walk.nextNode());) {
    const e = n.parentElement;
    if (!n.textContent.trim() || !e.checkVisibility() || e.closest(".hidden, .skip, script, [aria-hidden=true]")) continue;
    const under = ground(e), text = over(parse(getComputedStyle(e).color), under);
    const [a, b] = [light(text), light(under)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push(n.textContent.trim() + " " + ratio.toFixed(2));
  }
  return bad;
})()`

// In both themes, on all widths and in all states text is legible and nothing sticks out at the side.
func TestPageIsLegible(t *testing.T) {
	s := three()
	tab := look(t, s, browser.Options{})
	s.change(func(v *dashboard.View) {
		v.Events = []dashboard.Event{
			{ID: "1", At: time.Now(), Severity: "info", Node: 1, Text: "node 2 leads"},
			{ID: "2", At: time.Now(), Severity: "warning", Node: 1, Text: strings.Repeat("unbreakable", 30)},
			{ID: "3", At: time.Now(), Severity: "error", Node: 1, Text: "fenced"},
		}
		v.Conflicts = []dashboard.Conflict{{ID: "1", At: time.Now(), Loser: "2-9f86d081884c7d65-412", Winner: "1-4c7d659f86d08188-80", Table: "public.accounts", Key: "(id)=(" + strings.Repeat("7", 200) + ")"}}
		v.Transactions = []dashboard.Transaction{{GID: "1-4c7d659f86d08188-1812", Stage: "in doubt", Doubt: true}}
		v.Cluster.Name = strings.Repeat("long-name-", 6)
		v.Nodes[0].Reason, v.Nodes[0].State = strings.Repeat("a very long reason ", 20), "recovering"
	})
	tab.AwaitText(within, "#events", "fenced")
	states := []func(v *dashboard.View){
		func(*dashboard.View) {},
		func(v *dashboard.View) { cut(v, 3, 2); gone(v, 3) },
		func(v *dashboard.View) { v.Cluster.Quorum, v.Cluster.Access, v.Cluster.Leader = false, "read-only", 0 },
	}
	levels := []string{"Degraded", "Degraded", "No quorum"}
	for i, change := range states {
		s.change(change)
		tab.AwaitText(within, "#verdict", levels[i])
		for _, o := range []browser.Options{{}, {Dark: true}, {Width: 900, Height: 700}, {Phone: true, Width: 360, Height: 740, Dark: true}, {Phone: true}} {
			tab.Emulate(o)
			tab.Await(within, "a page that is no wider than its window", `document.documentElement.scrollWidth <= innerWidth`)
			tab.Await(within, "that changes of colour have ended", `document.getAnimations().length === 0`)
			if bad := browser.Value[[]string](tab, contrast); len(bad) > 0 {
				t.Errorf("state %d, %+v: too little contrast: %q", i, o, bad)
			}
		}
	}
}

// While figures change, nothing moves.
func TestPageStandsStill(t *testing.T) {
	s := three()
	tab := look(t, s, browser.Options{})
	tab.Await(within, "charts", `document.querySelectorAll("#plot-commits li").length === 2`)
	browser.Value[bool](tab, `(window.moved = 0, new PerformanceObserver((l) => { for (const e of l.getEntries()) window.moved += e.value; }).observe({ type: "layout-shift" }), true)`)
	for i := range 30 {
		s.change(func(v *dashboard.View) {
			v.Cluster.CSN = txn.CSN(1) << i
			nodes := append([]dashboard.Node(nil), v.Nodes...)
			nodes[1].Lag, nodes[1].TPS = ptr(uint64(1)<<i), ptr(float64(i*i*i))
			v.Nodes = nodes
			links := append([]dashboard.Link(nil), v.Links...)
			links[0].Age = dashboard.Ago(time.Duration(i*i) * time.Millisecond)
			v.Links = links
			v.Transactions = []dashboard.Transaction{{GID: "1-4c7d659f86d08188-1812", Stage: "queued", Age: dashboard.Millis(i)}}[:i%2]
		})
		tab.AwaitText(within, "#cards", fmt.Sprintf("Lag %s ", grouped(1<<i)))
	}
	// One that the eye would see has about 0.01.
	if moved := browser.Value[float64](tab, "window.moved"); moved > 0.002 {
		t.Errorf("the page has moved by %v", moved)
	}
}

func grouped(n int) string {
	text := fmt.Sprint(n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// The theme that somebody has chosen wins over the system's and lasts.
func TestPageTheme(t *testing.T) {
	tab := look(t, three(), browser.Options{Dark: true})
	ground := func() string { return browser.Value[string](tab, `getComputedStyle(document.body).backgroundColor`) }
	dark := ground()
	tab.Click("#theme")
	tab.AwaitText(within, "#theme", "Theme: light")
	light := ground()
	if light == dark {
		t.Errorf("light and dark are both %s", light)
	}
	tab.Reload()
	tab.AwaitText(within, "#strip", "Live")
	if got := ground(); got != light || !strings.Contains(tab.Visible("#theme"), "light") {
		t.Errorf("after loading again: %s", got)
	}
}

// A page may stay open for weeks: what it keeps is bounded, and so is what it has made.
func TestPageKeepsItsSize(t *testing.T) {
	s := three()
	_, url := serve(t, dashboard.Config{Source: s, Interval: 10 * time.Millisecond})
	tab := browser.Open(t, browser.Options{})
	tab.Open(url)
	var n uint64
	// churn has everything change, many times.
	churn := func(times int) {
		for range times {
			n++
			s.change(func(v *dashboard.View) {
				v.Events = nil
				v.Conflicts = nil
				for i := range uint64(20) {
					v.Events = append(v.Events, dashboard.Event{ID: fmt.Sprint(n*20 + i), At: time.Now(), Severity: "warning", Text: fmt.Sprint("event ", n*20+i)})
					v.Conflicts = append(v.Conflicts, dashboard.Conflict{ID: fmt.Sprint(n*20 + i), At: time.Now(), Loser: fmt.Sprint(n)})
				}
				v.Transactions = make([]dashboard.Transaction, n%50)
				v.Cluster.CSN = txn.CSN(n)
			})
			tab.AwaitText(within, "#event-list li:first-child", fmt.Sprint("event ", n*20+19))
		}
	}
	churn(30) // all lists are full
	before := tab.Memory()
	churn(60)
	after := tab.Memory()
	t.Logf("before %+v, after %+v", before, after)
	if after.Nodes > before.Nodes+1500 || after.Listeners > before.Listeners+20 {
		t.Errorf("the document has grown: before %+v, after %+v", before, after)
	}
	if after.Heap > before.Heap+1<<20 {
		t.Errorf("the heap has grown by %d bytes", after.Heap-before.Heap)
	}
}

// What comes late is shown, on a page that is open; and what is not of today has its date.
func TestPageShowsWhatComesLate(t *testing.T) {
	s := three()
	at, now := time.Date(2024, 2, 29, 12, 13, 14, 0, time.Local), time.Now()
	conflict := func(table string) {
		s.change(func(v *dashboard.View) {
			v.Conflicts = []dashboard.Conflict{{ID: "7", At: at, Table: table, Key: "k"}}
		})
	}
	conflict("")
	s.change(func(v *dashboard.View) {
		v.Events = []dashboard.Event{
			{ID: "1", At: at, Severity: "info", Node: 1, Text: "x"},
			{ID: "2", At: now, Severity: "info", Node: 3, Text: "y"}, {ID: "3", At: now, Severity: "info", Node: 1, Text: "y"},
		}
	})
	tab := look(t, s, browser.Options{})
	tab.AwaitText(within, "#conflict-rows", "29 Feb 2024, 12:13:14")
	if got := tab.Visible("#event-list li:last-child time"); strings.Join(strings.Fields(got), " ") != "29 Feb 2024, 12:13:14" {
		t.Errorf("an event of long ago is of %q", got)
	}
	if got := tab.Visible("#event-list li:first-child time"); len(got) != len("12:13:14") {
		t.Errorf("an event of now is of %q", got)
	}
	// What several have noted at once is told once, and what comes late stands where it belongs.
	if rows := browser.Value[int](tab, `document.querySelectorAll("#event-list li").length`); rows != 2 {
		t.Errorf("%d events", rows)
	}
	tab.AwaitText(within, "#event-list li:first-child .who", "nodes 1, 3")
	s.change(func(v *dashboard.View) {
		late := dashboard.Event{ID: "4", At: at.Add(time.Hour), Severity: "info", Node: 2, Text: "of before"}
		v.Events = append([]dashboard.Event{v.Events[0], late}, v.Events[1:]...)
		v.Events = append(v.Events, dashboard.Event{ID: "5", At: now, Severity: "info", Node: 2, Text: "y"})
		v.Silent = []dashboard.Silent{{Node: 3, Reason: "no"}}
	})
	tab.AwaitText(within, "#event-list li:nth-child(2)", "of before")
	tab.AwaitText(within, "#event-list li:first-child .who", "all nodes")
	tab.AwaitText(within, "#transactions", "Without node 3, which does not answer.")
	conflict("accounts")
	tab.AwaitText(within, "#conflict-rows", "accounts k")
	if rows := browser.Value[int](tab, `document.querySelectorAll("#conflict-rows tr").length`); rows != 1 {
		t.Errorf("%d conflicts", rows)
	}
	s.count(dashboard.Counters{Stages: []dashboard.Stage{{Name: "order"}}})
	tab.AwaitText(within, "#plot-latency99", "order")
}

func TestPageSaysThatThereAreTooMany(t *testing.T) {
	_, url := serve(t, dashboard.Config{Source: three()})
	for range 64 {
		openStream(t, url)
	}
	tab := browser.Open(t, browser.Options{Noisy: true})
	tab.Open(url)
	tab.AwaitText(within, "#strip", "64 pages are open on this node")
}
