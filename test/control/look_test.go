package control

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/test/cluster"
)

// view is what "quorate nodes", "heartbeats" and "watch" print as JSON.
type view struct {
	Quorum      bool
	Leader      int
	Voters      int
	VotersHeard int `json:"voters_heard"`
	Nodes       []struct {
		ID     int
		Heard  bool
		Health *struct {
			State       string
			PostgresUp  bool    `json:"postgres_up"`
			SlotLag     *uint64 `json:"slot_lag_bytes"`
			Connections int     `json:"connections"`
			DiskFree    float64 `json:"disk_free_bytes"`
			Commits     float64 `json:"commits_per_second"`
			Most        int     `json:"max_connections"`
			Uptime      float64 `json:"uptime_seconds"`
			Oldest      float64 `json:"oldest_transaction_seconds"`
			Version     string
			Postgres    string `json:"postgres_version"`
		}
		Hears []struct {
			Node       int
			AgeSeconds *float64 `json:"age_seconds"`
		}
	}
}

// hears returns how long ago one node heard another, as the view has it.
func (v view) hears(hearer, other int) float64 {
	for _, n := range v.Nodes {
		for _, h := range n.Hears {
			if n.ID == hearer && h.Node == other && h.AgeSeconds != nil {
				return *h.AgeSeconds
			}
		}
	}
	return -1
}

func TestEveryNodeShowsTheCluster(t *testing.T) {
	c, ctx := start(t)
	for asked := 1; asked <= c.Nodes; asked++ {
		await(t, ctx, "a whole view", func() error {
			var v view
			ask(t, ctx, c, asked, &v, "nodes")
			if !v.Quorum || v.Leader == 0 || v.Voters != 3 || v.VotersHeard != 3 || len(v.Nodes) != 3 {
				return fmt.Errorf("node %d shows %+v", asked, v)
			}
			for _, n := range v.Nodes {
				if !n.Heard || n.Health == nil || n.Health.State != "active" || !n.Health.PostgresUp || n.Health.SlotLag == nil || *n.Health.SlotLag > 1<<30 || n.Health.Connections == 0 || n.Health.DiskFree == 0 ||
					n.Health.Most < n.Health.Connections || n.Health.Uptime <= 0 || n.Health.Version == "" || n.Health.Postgres == "" {
					return fmt.Errorf("node %d shows node %d as %+v", asked, n.ID, n.Health)
				}
				for _, other := range v.Nodes {
					if age := v.hears(n.ID, other.ID); n.ID != other.ID && (age < 0 || age > 1.5) {
						return fmt.Errorf("node %d shows that node %d heard node %d %v s ago", asked, n.ID, other.ID, age)
					}
				}
			}
			return nil
		})
	}
	// A transaction that is left open is seen from another node, and seen to end.
	open, err := c.Connect(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close(ctx)
	oldest := func() float64 {
		var v view
		ask(t, ctx, c, 2, &v, "nodes")
		for _, n := range v.Nodes {
			if n.ID == 1 && n.Health != nil {
				return n.Health.Oldest
			}
		}
		return -1
	}
	const long = 1.5 // seconds; the node's own transactions end at once
	began := time.Now()
	for _, s := range []string{"BEGIN", "SELECT FROM account LIMIT 1"} { // the gateway sends BEGIN with what follows
		if _, err := open.Exec(ctx, s); err != nil {
			t.Fatal(err)
		}
	}
	await(t, ctx, "an old transaction", func() error {
		switch age, most := oldest(), time.Since(began).Seconds(); {
		case age < long:
			return fmt.Errorf("the oldest is %v s old", age)
		case age > most:
			t.Errorf("a transaction that has been open for %v s is shown as %v s old", most, age)
		}
		return nil
	})
	if _, err := open.Exec(ctx, "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	await(t, ctx, "no old transaction", func() error {
		if age := oldest(); age < 0 || age >= long {
			return fmt.Errorf("the oldest is %v s old", age)
		}
		return nil
	})
	for _, command := range []string{"status", "nodes", "heartbeats", "events", "conflicts", "transactions"} {
		for _, format := range []string{"table", "json", "yaml"} {
			code, out, errs := quorate(t, ctx, c, 2, command, "-o", format)
			if code != 0 || out == "" || errs != "" {
				t.Errorf("quorate %s -o %s: %d, %q, %q", command, format, code, out, errs)
			}
		}
	}
	if code, out, _ := quorate(t, ctx, c, 1, "status", "--check"); code != 0 || !strings.Contains(out, "1 more may fail") {
		t.Errorf("status --check of a whole cluster: %d\n%s", code, out)
	}
	if code, out, errs := quorate(t, ctx, c, 1, "watch", "-n", "2", "-o", "json"); code != 0 || strings.Count(out, "\n") != 2 {
		t.Errorf("watch -n 2: %d, %q, %s", code, out, errs)
	}
	for _, tc := range []struct {
		args string
		code int
		want string
	}{
		{"transactions nonsense", 1, "one looks like"},
		{"transactions 1-2-3", 0, "unknown"},
		{"events --limit 1001", 1, "must be at most 1000"},
		{"events --severity loud", 2, "must be info, warning or error"},
		{"events --since -1h", 2, "must not be negative"},
		{"status --color green", 2, "must be one of auto, always, never"},
	} {
		code, out, errs := quorate(t, ctx, c, 1, strings.Fields(tc.args)...)
		if code != tc.code || !strings.Contains(out+errs, tc.want) {
			t.Errorf("quorate %s: %d, %s%s; want %d, %q", tc.args, code, out, errs, tc.code, tc.want)
		}
	}
}

func TestConflictsAndTransactions(t *testing.T) {
	c, ctx := start(t)
	// Two transactions change one row on two nodes, and one commits first.
	one, err := c.Connect(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close(ctx)
	var gid string
	for _, s := range []string{"BEGIN", "UPDATE account SET v = v + 1 WHERE id = 7"} {
		if _, err := one.Exec(ctx, s); err != nil {
			t.Fatal(err)
		}
	}
	if err := one.QueryRow(ctx, "SELECT quorate.current_gid()").Scan(&gid); err != nil {
		t.Fatal(err)
	}
	sql(t, ctx, c, 2, "UPDATE account SET v = v + 1 WHERE id = 7")
	if _, err := one.Exec(ctx, "COMMIT"); !cluster.IsConflict(err) {
		t.Fatalf("both commit: %v", err)
	}
	type conflict struct {
		Kind, GID, Table, Key string
		Node                  int
		WinnerNode            int `json:"winner_node"`
	}
	for asked := 1; asked <= c.Nodes; asked++ {
		await(t, ctx, "the conflict", func() error {
			var got struct{ Conflicts []conflict }
			ask(t, ctx, c, asked, &got, "conflicts")
			for _, f := range got.Conflicts {
				evicted := f.Kind == "eviction" && f.GID == "" // the other had come before COMMIT
				if (evicted || f.Kind == "certification" && f.GID == gid) && f.Table == "public.account" && f.Key == "(id)=(7)" && f.WinnerNode == 2 && f.Node == 1 {
					return nil
				}
			}
			return fmt.Errorf("node %d remembers %+v", asked, got.Conflicts)
		})
	}

	// One that has not come to its COMMIT is evicted, and it is told what for.
	for _, s := range []string{"ROLLBACK", "BEGIN", "SELECT FROM account WHERE id = 9 FOR UPDATE"} {
		if _, err := one.Exec(ctx, s); err != nil {
			t.Fatal(err)
		}
	}
	sql(t, ctx, c, 3, "UPDATE account SET v = v + 1 WHERE id BETWEEN 5 AND 15")
	await(t, ctx, "the eviction", func() error {
		code, out, errs := quorate(t, ctx, c, 2, "conflicts")
		if code != 0 || !regexp.MustCompile(`eviction +1 +- +3-.*public\.account +\(id\)=\(9\)\n`).MatchString(out) {
			return fmt.Errorf("%d\n%s%s", code, out, errs)
		}
		return nil
	})
	if got := psql(t, ctx, c.Gateway(2), `SELECT "table", key, winner_node FROM quorate.conflicts WHERE kind = 'eviction' ORDER BY at DESC LIMIT 1`); got != "public.account|(id)=(9)|3" {
		t.Errorf("SQL says of the eviction: %s", got)
	}

	// A transaction that has committed is found everywhere.
	if _, err := one.Exec(ctx, "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"BEGIN", "UPDATE account SET v = v + 1 WHERE id = 8"} {
		if _, err := one.Exec(ctx, s); err != nil {
			t.Fatal(err)
		}
	}
	if err := one.QueryRow(ctx, "SELECT quorate.current_gid()").Scan(&gid); err != nil {
		t.Fatal(err)
	}
	if _, err := one.Exec(ctx, "COMMIT"); err != nil {
		t.Fatal(err)
	}
	for asked := 1; asked <= c.Nodes; asked++ {
		await(t, ctx, "the outcome", func() error {
			var got struct{ Status string }
			ask(t, ctx, c, asked, &got, "transactions", gid)
			if got.Status != "committed" {
				return fmt.Errorf("node %d says %q of a transaction that has committed", asked, got.Status)
			}
			return nil
		})
	}

	// Some are seen on their way.
	working, stop := context.WithCancel(ctx)
	var clients sync.WaitGroup
	defer clients.Wait()
	defer stop()
	for node := 1; node <= c.Nodes; node++ {
		clients.Go(func() {
			for i := 0; working.Err() == nil; i++ {
				conn, err := c.Connect(working, node)
				if err != nil {
					continue // stopped, or the next attempt tells
				}
				for range 50 {
					_, _ = conn.Exec(working, "UPDATE account SET v = v + 1 WHERE id = $1", 10*node+i%10) // whether it commits does not matter here
				}
				_ = conn.Close(context.Background())
			}
		})
	}
	await(t, ctx, "a transaction in flight", func() error {
		var got struct {
			Transactions []struct{ GID, Stage string }
		}
		ask(t, ctx, c, 1, &got, "transactions")
		for _, f := range got.Transactions {
			if f.GID != "" && f.Stage != "" {
				return nil
			}
		}
		return errors.New("none")
	})
}

func TestSQL(t *testing.T) {
	c, ctx := start(t)
	for query, want := range map[string]string{
		"SELECT count(*), bool_and(state = 'active'), bool_and(heard) FROM quorate.nodes": "3|t|t",
		"SELECT count(*), max(age_seconds) < 1.5 FROM quorate.heartbeats":                 "6|t",
		"SELECT node, quorum, voters, voters_heard, leader > 0 FROM quorate.status":       "2|t|3|3|t",
		"SELECT count(*) > 0 FROM quorate.events WHERE kind = 'leader'":                   "t",
		"SELECT count(*) >= 0 FROM quorate.transactions":                                  "t",
		"SELECT count(*) >= 0 FROM quorate.conflicts":                                     "t",
		"SELECT now() - max(refreshed_at) < interval '1 second' FROM quorate.nodes":       "t",
		"SHOW quorate.node":                                                                    "2",
		"SHOW quorate.heartbeat.interval":                                                      "250ms",
		"SHOW quorate.reads_without_quorum":                                                    "allow",
		"SELECT count(DISTINCT node) FROM quorate.events":                                      "3",
		"SELECT n.node FROM quorate.nodes n JOIN quorate.status s USING (node)":                "2",
		"WITH lag AS (SELECT max(lag) AS most FROM quorate.nodes) SELECT most < 1000 FROM lag": "t",
	} {
		if got := psql(t, ctx, c.Gateway(2), query); got != want {
			t.Errorf("%s: %q, want %q", query, got, want)
		}
	}
	// Drivers that prepare get the same.
	conn, err := c.Connect(ctx, 2)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	for query, want := range map[string]string{
		"SHOW quorate.commit_timeout":                                        "10s",
		"SELECT current_setting('quorate.max_staleness')::interval::text":    "00:00:10",
		"SELECT pg_size_bytes(current_setting('quorate.limits.log'))::text":  "536870912",
		"SELECT string_agg(DISTINCT node::text, ' ') FROM quorate.events":    "1 2 3",
		"SELECT current_setting('quorate.node') FROM quorate.status LIMIT 1": "2",
	} {
		var got string
		if err := conn.QueryRow(ctx, query).Scan(&got); err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", query, got, err, want)
		}
	}
	// Nothing of it is replicated, or written at all: looking moves nothing.
	before := psql(t, ctx, c.Gateway(2), "SELECT max(applied_csn) FROM quorate.nodes")
	for range 5 {
		psql(t, ctx, c.Gateway(2), "SELECT count(*) FROM quorate.nodes")
	}
	if after := psql(t, ctx, c.Gateway(2), "SELECT max(applied_csn) FROM quorate.nodes"); after != before {
		t.Errorf("the newest transaction was %s and is %s after looking", before, after)
	}
}

// A node that dies is missed within two seconds by everybody, in whatever way one looks, and so is its coming back.
func TestLosses(t *testing.T) {
	c, ctx := start(t)
	const victim = 3
	began := time.Now()
	if err := c.KillNode(ctx, victim); err != nil {
		t.Fatal(err)
	}
	took := await(t, ctx, "the loss", func() error {
		var v view
		ask(t, ctx, c, 1, &v, "nodes")
		if v.VotersHeard != 2 || v.Nodes[victim-1].Heard {
			return fmt.Errorf("node 1 hears %d", v.VotersHeard)
		}
		return nil
	})
	t.Logf("a node that was killed is missed after %v", took.Round(time.Millisecond))
	if code, out, errs := quorate(t, ctx, c, 1, "status", "--check"); code != 3 || !strings.Contains(out, "none more may fail") || !strings.Contains(errs, "node 3 is no contact") {
		t.Errorf("status --check of a degraded cluster: %d\n%s%s", code, out, errs)
	}
	await(t, ctx, "the majority to take writes", func() error { // the victim may have led
		status, _, err := get(ctx, "OPTIONS", "http://"+c.HTTP(1)+"/read-write")
		if status != 200 {
			return fmt.Errorf("%d, %w", status, err)
		}
		return nil
	})

	// What it has to tell is missing, and that is said.
	var warned string
	config, err := pgx.ParseConfig(cluster.URL(c.Gateway(1)))
	if err != nil {
		t.Fatal(err)
	}
	config.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { warned = n.Severity + ": " + n.Message }
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	for _, view := range []string{"events", "transactions", "conflicts"} {
		var others int
		if err := conn.QueryRow(ctx, "SELECT count(*) FROM quorate."+view+" WHERE node < 3").Scan(&others); err != nil || view == "events" && others == 0 {
			t.Errorf("quorate.%s: %d, %v", view, others, err)
		}
		if want := "WARNING: quorate." + view + " is not complete: node 3 does not answer"; !strings.HasPrefix(warned, want) {
			t.Errorf("warned of %q, want %q", warned, want)
		}
	}
	if code, out, errs := quorate(t, ctx, c, 1, "conflicts"); code != 0 || !strings.Contains(out+errs, "node 3") {
		t.Errorf("conflicts without a node: %d\n%s%s", code, out, errs)
	}

	// The next one takes the quorum away.
	if err := c.KillNode(ctx, 2); err != nil {
		t.Fatal(err)
	}
	await(t, ctx, "the loss of the quorum", func() error {
		status, body, err := get(ctx, "GET", "http://"+c.HTTP(1)+"/read-write")
		if status != 503 {
			return fmt.Errorf("%d, %s, %v", status, body, err)
		}
		return nil
	})
	var quorum bool // asked first: max_staleness later, ten seconds, SQL is refused
	if err := conn.QueryRow(ctx, "SELECT quorum FROM quorate.status").Scan(&quorum); err != nil || quorum {
		t.Errorf("SQL says of the quorum: %t, %v", quorum, err)
	}
	if code, out, _ := quorate(t, ctx, c, 1, "status", "--check"); code != 4 || !strings.Contains(out, "NO QUORUM") {
		t.Errorf("status --check without quorum: %d\n%s", code, out)
	}
	await(t, ctx, "health to tell of it", func() error { // which is told by who looks at the quorum now and then
		if out := execute(t, ctx, nil, grpcurl(t, ctx), "-plaintext", c.GRPC(1), "grpc.health.v1.Health/Check"); !strings.Contains(out, `"NOT_SERVING"`) {
			return errors.New(out)
		}
		return nil
	})
	if status, _, err := get(ctx, "GET", "http://"+c.HTTP(1)+"/liveness"); status != 200 || err != nil {
		t.Errorf("liveness without quorum: %d, %v", status, err)
	}

	restart(t, ctx, c, 2, victim)
	await(t, ctx, "the events", func() error {
		var got struct {
			Events []struct {
				Kind  string
				Node  int
				About int
				Time  time.Time
			}
		}
		ask(t, ctx, c, victim, &got, "events", "--since", "5m", "--limit", "1000")
		seen := make(map[string]bool)
		for _, e := range got.Events {
			if e.Time.After(began) {
				seen[fmt.Sprintf("%s of node %d at node %d", e.Kind, e.About, e.Node)] = true
			}
		}
		for _, want := range []string{
			"peer_lost of node 3 at node 1", "peer_restarted of node 3 at node 1", "quorum_lost of node 1 at node 1", "quorum_regained of node 1 at node 1",
			"started of node 3 at node 3", "state of node 3 at node 3",
		} {
			if !seen[want] {
				return fmt.Errorf("%s is not among %v", want, seen)
			}
		}
		return nil
	})
	await(t, ctx, "health", func() error {
		if code, out, errs := quorate(t, ctx, c, 1, "status", "--check"); code != 0 {
			return fmt.Errorf("%d\n%s%s", code, out, errs)
		}
		return nil
	})
}
