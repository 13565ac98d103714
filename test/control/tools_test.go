package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
	"github.com/quorate/quorate/test/cluster"
)

// The rules fire when they should, as promtool judges.
func TestAlertRules(t *testing.T) {
	dir := filepath.Join(root(t), "configs")
	execute(t, t.Context(), nil, "promtool", "check", "rules", filepath.Join(dir, "alerts.yaml"))
	execute(t, t.Context(), nil, "promtool", "test", "rules", filepath.Join(dir, "alerts_test.yaml"))
	rules, err := os.ReadFile(filepath.Join(dir, "alerts.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile(filepath.Join(dir, "alerts_test.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`alert: (\w+)`).FindAllSubmatch(rules, -1) {
		if strings.Count(string(tests), "alertname: "+string(m[1])) < 2 {
			t.Errorf("%s is not tested for firing and for keeping quiet", m[1])
		}
	}
}

// metricName finds the names of metrics in expressions of PromQL.
var metricName = regexp.MustCompile(`\b(quorate_[a-z0-9_]+|process_[a-z0-9_]+)\b`)

// exposed returns the names of a node's metrics, as their TYPE lines give them, and lints them.
func exposed(t *testing.T, ctx context.Context, c *cluster.Cluster, node int) (names []string) {
	t.Helper()
	status, text, err := get(ctx, "GET", "http://"+c.HTTP(node)+"/metrics")
	if err != nil || status != 200 {
		t.Fatalf("metrics: %d, %v", status, err)
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("metric %s: %s", p.Metric, p.Text)
	}
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+) `).FindAllStringSubmatch(text, -1) {
		names = append(names, m[1])
	}
	return names
}

// Names follow the conventions, and what rules and dashboard ask for exists.
func TestMetricNames(t *testing.T) {
	c, ctx := start(t)
	sql(t, ctx, c, 1, "UPDATE account SET v = v + 1 WHERE id = 1")
	names := exposed(t, ctx, c, 1)
	// Only with certificates.
	names = append(names, "quorate_certificate_expiry_timestamp_seconds")
	for _, file := range []string{"alerts.yaml", "grafana.json"} {
		text, err := os.ReadFile(filepath.Join(root(t), "configs", file))
		if err != nil {
			t.Fatal(err)
		}
		expressions := string(text)
		if file == "alerts.yaml" { // descriptions mention names too: they must exist as well
			expressions = regexp.MustCompile(`(?m)^#.*$`).ReplaceAllString(expressions, "")
		}
		found := metricName.FindAllString(expressions, -1)
		if len(found) < 20 {
			t.Fatalf("%s names %d metrics", file, len(found))
		}
		for _, name := range found {
			base := strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_sum"), "_count")
			if !slices.Contains(names, name) && !slices.Contains(names, base) {
				t.Errorf("%s: there is no metric %s", file, name)
			}
		}
	}
	var board struct {
		Panels []struct {
			ID      int
			Title   string
			Type    string
			GridPos struct{ H, W, X, Y int }
			Targets []struct{ Expr string }
		}
	}
	text, err := os.ReadFile(filepath.Join(root(t), "configs", "grafana.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &board); err != nil {
		t.Fatal(err)
	}
	ids := make(map[int]bool)
	for _, p := range board.Panels {
		if ids[p.ID] || p.Title == "" || p.GridPos.X+p.GridPos.W > 24 || p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %+v", p)
		}
		ids[p.ID] = true
	}
}

// prometheus starts one that scrapes the cluster by our rules, and returns a function that evaluates an expression.
func prometheus(t *testing.T, ctx context.Context, c *cluster.Cluster) func(expr string) (map[string]float64, error) {
	t.Helper()
	dir := t.TempDir()
	var targets []string
	for i := 1; i <= c.Nodes; i++ {
		targets = append(targets, strconv.Quote(c.HTTP(i)))
	}
	config := fmt.Sprintf("global: {scrape_interval: 500ms, evaluation_interval: 500ms}\nrule_files: [%q]\nscrape_configs: [{job_name: quorate, static_configs: [{targets: [%s]}]}]\n",
		filepath.Join(root(t), "configs", "alerts.yaml"), strings.Join(targets, ", "))
	file := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	address := fmt.Sprintf("127.0.0.1:%d", pgtest.FreePort(t))
	background(t, "prometheus", "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+address)
	await(t, ctx, "Prometheus", func() error {
		status, _, err := get(ctx, "GET", "http://"+address+"/-/ready")
		if status != 200 {
			return fmt.Errorf("%d, %v", status, err)
		}
		return nil
	})
	return func(expr string) (map[string]float64, error) {
		_, body, err := get(ctx, "GET", "http://"+address+"/api/v1/query?query="+url.QueryEscape(expr))
		if err != nil {
			return nil, err
		}
		var answer struct {
			Error string
			Data  struct {
				Result []struct {
					Metric map[string]string
					Value  [2]any
				}
			}
		}
		if err := json.Unmarshal([]byte(body), &answer); err != nil || answer.Error != "" {
			return nil, fmt.Errorf("%s: %s %w", expr, answer.Error, err)
		}
		values := make(map[string]float64)
		for _, r := range answer.Data.Result {
			text, _ := r.Value[1].(string)
			value, err := strconv.ParseFloat(text, 64)
			if err != nil {
				return nil, err
			}
			values[strings.Join([]string{r.Metric["instance"], r.Metric["alertname"], r.Metric["peer"]}, " ")] = value
		}
		return values, nil
	}
}

// A real Prometheus scrapes every node, can evaluate what the dashboard shows, and raises the alarm when a node dies.
func TestPrometheus(t *testing.T) {
	c, ctx := start(t)
	query := prometheus(t, ctx, c)
	await(t, ctx, "all nodes to be scraped", func() error {
		up, err := query(`up{job="quorate"} == 1`)
		if err != nil || len(up) != c.Nodes {
			return fmt.Errorf("up: %v, %w", up, err)
		}
		return nil
	})
	sql(t, ctx, c, 2, "UPDATE account SET v = v + 1 WHERE id = 2")
	await(t, ctx, "the commit to be counted", func() error {
		commits, err := query(`quorate_gateway_commits_total`)
		if err != nil || commits[c.HTTP(2)+"  "] < 1 {
			return fmt.Errorf("commits: %v, %w", commits, err)
		}
		return nil
	})
	if heard, err := query(`quorate_node_members_heard`); err != nil || len(heard) != 3 {
		t.Errorf("members heard: %v, %v", heard, err)
	}
	// Every expression of the dashboard is one.
	text, err := os.ReadFile(filepath.Join(root(t), "configs", "grafana.json"))
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &board); err != nil {
		t.Fatal(err)
	}
	variables := strings.NewReplacer("$job", "quorate", "$instance", ".*", "$__rate_interval", "5s")
	for _, p := range board.Panels {
		for _, target := range p.Targets {
			if _, err := query(variables.Replace(target.Expr)); err != nil {
				t.Errorf("panel %q: %v", p.Title, err)
			}
		}
	}
	if err := c.KillNode(ctx, 3); err != nil {
		t.Fatal(err)
	}
	await(t, ctx, "the alarm", func() error {
		alerts, err := query(`ALERTS{alertname=~"QuorateNodeDown|QuorateNoSpareNode"}`)
		if err != nil || alerts[c.HTTP(3)+" QuorateNodeDown "] != 1 || alerts[c.HTTP(1)+" QuorateNoSpareNode "] != 1 {
			return fmt.Errorf("alerts: %v, %w", alerts, err)
		}
		return nil
	})
	restart(t, ctx, c, 3)
}

// HAProxy with the configuration that we give away leads clients to a node that takes writes, away from one that dies
// and from one that has no quorum.
func TestHAProxy(t *testing.T) {
	c, ctx := start(t)
	text, err := os.ReadFile(filepath.Join(root(t), "configs", "haproxy.cfg"))
	if err != nil {
		t.Fatal(err)
	}
	ports := [...]int{pgtest.FreePort(t), pgtest.FreePort(t)}
	replace := []string{"bind :5432", fmt.Sprintf("bind 127.0.0.1:%d", ports[0]), "bind :5433", fmt.Sprintf("bind 127.0.0.1:%d", ports[1])}
	for i := 1; i <= c.Nodes; i++ {
		replace = append(replace, fmt.Sprintf("10.0.0.%d:6432 check port 8432", i),
			fmt.Sprintf("%s check port %s", c.Gateway(i), c.HTTP(i)[strings.LastIndexByte(c.HTTP(i), ':')+1:]))
	}
	config := strings.NewReplacer(replace...).Replace(string(text))
	if strings.Contains(config, "10.0.0.") && strings.Contains(config, "check port 8432") {
		t.Fatalf("the configuration has other addresses than this test knows:\n%s", config)
	}
	file := filepath.Join(t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	background(t, program("haproxy"), "-db", "-f", file)
	node := func(port int) (string, error) {
		short, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		conn, err := pgx.Connect(short, fmt.Sprintf("postgres://postgres@127.0.0.1:%d/postgres?sslmode=disable", port))
		if err != nil {
			return "", err
		}
		defer conn.Close(short)
		if port == ports[0] {
			if _, err := conn.Exec(short, "UPDATE account SET v = v + 1 WHERE id = 3"); err != nil && !cluster.IsConflict(err) {
				return "", err
			}
		}
		var name string
		err = conn.QueryRow(short, "SHOW quorate.node").Scan(&name)
		return name, err
	}
	// through returns the nodes that a number of new connections reach.
	through := func(port int) (map[string]bool, error) {
		reached := make(map[string]bool)
		for range 6 {
			name, err := node(port)
			if err != nil {
				return nil, err
			}
			reached[name] = true
		}
		return reached, nil
	}
	for _, port := range ports {
		await(t, ctx, "all nodes", func() error {
			reached, err := through(port)
			if err == nil && len(reached) != 3 {
				err = fmt.Errorf("reached %v", reached)
			}
			return err
		})
	}
	if err := c.KillNode(ctx, 1); err != nil {
		t.Fatal(err)
	}
	took := await(t, ctx, "the others", func() error {
		reached, err := through(ports[0])
		if err == nil && (len(reached) != 2 || reached["1"]) {
			err = fmt.Errorf("reached %v", reached)
		}
		return err
	})
	t.Logf("without the node that was killed after %v", took.Round(time.Millisecond))
	if err := c.KillNode(ctx, 2); err != nil {
		t.Fatal(err)
	}
	await(t, ctx, "nobody to take writes", func() error {
		if name, err := node(ports[0]); err == nil {
			return fmt.Errorf("node %s took a write", name)
		}
		status, _, err := get(ctx, "GET", "http://"+c.HTTP(3)+"/read-write")
		if status != 503 {
			return fmt.Errorf("/read-write of node 3: %d, %w", status, err)
		}
		return nil
	})
	restart(t, ctx, c, 1, 2)
	await(t, ctx, "all nodes again", func() error {
		reached, err := through(ports[0])
		if err == nil && len(reached) != 3 {
			err = errors.New("not all nodes are reached")
		}
		return err
	})
}
