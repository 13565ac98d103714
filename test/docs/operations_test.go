package docs

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
	"github.com/quorate/quorate/test/cluster"
)

// procedure is a block of commands and, if one follows, what the last of them prints.
type procedure struct {
	commands []string
	prints   string
}

func procedures(markdown string) (all []procedure) {
	blocks := regexp.MustCompile("(?ms)^```(sh|text)\n(.*?)^```$").FindAllStringSubmatch(markdown, -1)
	for _, b := range blocks {
		if b[1] == "text" {
			all[len(all)-1].prints = strings.TrimSpace(b[2])
			continue
		}
		all = append(all, procedure{commands: strings.Split(strings.TrimSpace(b[2]), "\n")})
	}
	return all
}

var numbers = regexp.MustCompile(`\d+`)

// place is the number of the node that a command names.
func place(t *testing.T, command, before string) int {
	t.Helper()
	m := regexp.MustCompile(regexp.QuoteMeta(before) + `(\d)`).FindStringSubmatch(command)
	if m == nil {
		t.Fatalf("%q names no node", command)
	}
	n, err := strconv.Atoi(m[1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestOperations runs the commands of docs/operations.md in order, on nodes of this machine, and compares what they print.
// Those that go on as a node are awaited until it is active. What the text tells the reader to do without a command is done here.
func TestOperations(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "docs", "operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	all := procedures(string(text))
	if len(all) < 10 {
		t.Fatalf("docs/operations.md has %d procedures", len(all))
	}
	dir := t.TempDir()
	binary, err := cluster.Build(t.Context(), dir, false)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), demoTimeout)
	defer cancel()
	c, err := cluster.Prepare(cluster.Options{Binary: binary, Nodes: 5, PGBin: pgtest.Install(t, 18).BinDir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Logs(30))
		}
		if err := c.Destroy(); err != nil {
			t.Error(err)
		}
	})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(c.MakeWitness(4))
	names := []string{"quorate ", binary + " ", " token)", " " + filepath.Join(dir, "token") + ")"}
	back := []string{}
	for i := 1; i <= 5; i++ {
		file := "/etc/quorate/node" + strconv.Itoa(i) + ".yaml"
		names = append(names, file, c.Config(i), "node"+strconv.Itoa(i)+".example:7432", c.GRPC(i))
		back = append(back, c.Config(i), file)
	}
	here, there := strings.NewReplacer(names...), strings.NewReplacer(back...)
	for _, p := range all {
		said := ""
		for _, command := range p.commands {
			t.Log(command)
			switch words := strings.Fields(command); words[1] {
			case "run", "join":
				i := place(t, command, "node")
				if c.NodeRuns(i) { // it was drained to be restarted
					must(c.StopNode(i))
				}
				must(c.Shell(i, here.Replace(command)))
				must(c.AwaitState(ctx, i, "active"))
				if strings.Contains(command, " --replace ") {
					old := place(t, command, "--replace ")
					must(c.AwaitState(ctx, old, "removed"))
					must(c.StopNode(old))
				}
				continue
			case "remove": // of a node that is dead
				must(c.StopNode(place(t, command, "remove ")))
			case "recover":
				must(c.StopNode(5))
				must(c.StopNode(2))
			case "token":
				command = strings.Replace(command, "> token", "> "+filepath.Join(dir, "token"), 1)
				said = output(t, ctx, strings.Replace(strings.NewReplacer("node1.example:7432", c.GRPC(1)).Replace(command), "quorate ", binary+" ", 1))
				continue
			}
			said = output(t, ctx, here.Replace(command))
			if strings.Contains(command, " resync ") {
				awaitOther(t, ctx, c, 5, 5)
				must(c.AwaitState(ctx, 5, "active"))
			}
		}
		got := strings.TrimSpace(there.Replace(said))
		if p.prints != "" && numbers.ReplaceAllString(got, "N") != numbers.ReplaceAllString(p.prints, "N") {
			t.Errorf("%s prints\n%s\nand not\n%s", p.commands[len(p.commands)-1], got, p.prints)
		}
	}
	must(c.Stop())
}

// awaitOther waits until the node at a place has another id.
func awaitOther(t *testing.T, ctx context.Context, c *cluster.Cluster, at, id int) {
	t.Helper()
	for {
		now, err := c.ID(ctx, at)
		if err == nil && now != id {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the node is %d still: %v", now, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
