// Package docs tests what the documentation tells people to type.
package docs

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/quorate/quorate/test/cluster"
)

// root is the top of the source tree, seen from this package.
const root = "../.."

// recipes are the make targets that a test cannot run whole, because they run the tests themselves or for long. They
// are covered where their commands are: of each it is checked here that make would run that command.
var recipes = map[string]string{
	"make test":   "go test -race",
	"make bench":  "go run ./test/bench",
	"make stress": "./test/cluster",
	"make verify": "go vet ./...",
}

// demoTimeout bounds "make demo", a build from nothing included.
const demoTimeout = 5 * time.Minute

// TestReadme runs the commands of README.md, those in blocks in order and then those in sentences, as they stand there but for
// two things: the demo gets a directory and ports of its own, so that it does not meet one that runs already, and so get the
// commands that follow. What measures for long is only asked whether it would take its arguments.
func TestReadme(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	commands := shellCommands(string(text))
	if len(commands) == 0 {
		t.Fatal("README.md has no block marked sh")
	}
	ctx, cancel := context.WithTimeout(t.Context(), demoTimeout)
	defer cancel()
	var demo *cluster.Cluster
	defer func() {
		if demo != nil {
			if err := demo.Stop(); err != nil {
				t.Error(err)
			}
			if err := demo.Destroy(); err != nil {
				t.Error(err)
			}
		}
	}()
	for _, m := range inSentence.FindAllStringSubmatch(string(text), -1) {
		if !slices.Contains(commands, m[1]) {
			commands = append(commands, m[1])
		}
	}
	for _, command := range commands {
		want, isRecipe := recipes[command]
		switch {
		case isRecipe:
			if got := output(t, ctx, "make -n "+strings.TrimPrefix(command, "make ")); !strings.Contains(got, want) {
				t.Errorf("%s would not run %q:\n%s", command, want, got)
			}
		case strings.HasPrefix(command, "go run "):
			t.Logf("%s\n%s", command, output(t, ctx, command+" -h"))
		case command == "make demo":
			demo = startDemo(t, ctx)
		case demo == nil:
			t.Errorf("%q stands before make demo, and is not known to this test", command)
		default:
			// Who types is slower than replication; this test is not.
			if err := demo.Settle(ctx); err != nil {
				t.Fatal(err)
			}
			t.Logf("%s\n%s", command, output(t, ctx, onOwnPorts(command, demo)))
		}
	}
	if demo == nil {
		t.Error("README.md does not say make demo")
	}
}

// inSentence finds the commands that stand in a sentence.
var inSentence = regexp.MustCompile("`((?:make|go|git|bin/quorate|quorate|psql|curl) [^`\n]+)`")

// shellCommands returns the lines of all blocks marked sh; a line that ends in a backslash is joined with the next.
func shellCommands(markdown string) []string {
	var commands []string
	inside := false
	for line := range strings.Lines(strings.ReplaceAll(markdown, "\\\n", " ")) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "```"):
			inside = !inside && line == "```sh"
		case inside && line != "" && !strings.HasPrefix(line, "#"):
			commands = append(commands, line)
		}
	}
	return commands
}

// startDemo runs what "make demo" runs.
func startDemo(t *testing.T, ctx context.Context) *cluster.Cluster {
	t.Helper()
	const start = "bin/quorate demo"
	recipe := strings.TrimSpace(output(t, ctx, "make -n --no-print-directory demo"))
	build, last, ok := cutLastLine(recipe)
	if !ok || last != start {
		t.Fatalf("the last line of make demo is %q, want %q", last, start)
	}
	output(t, ctx, build)
	binary, err := filepath.Abs(filepath.Join(root, "bin", "quorate"))
	if err != nil {
		t.Fatal(err)
	}
	demo, err := cluster.Start(ctx, cluster.Options{Binary: binary})
	if err != nil {
		t.Fatal(err)
	}
	return demo
}

func cutLastLine(text string) (before, last string, ok bool) {
	i := strings.LastIndexByte(text, '\n')
	if i < 0 {
		return "", text, false
	}
	return text[:i], text[i+1:], true
}

// defaultPort is a port of "make demo": 6000, the block's distance, and the number of the node.
var defaultPort = regexp.MustCompile(`\b6[0-4]0[1-9]\b`)

// onOwnPorts replaces the ports of a demo with default ports by those of this one.
func onOwnPorts(command string, demo *cluster.Cluster) string {
	return defaultPort.ReplaceAllStringFunc(command, func(port string) string {
		node := int(port[3] - '0')
		address := []func(int) string{demo.Gateway, demo.Postgres, demo.GRPC, demo.HTTP, demo.Raft}[port[1]-'0'](node)
		return address[strings.LastIndexByte(address, ':')+1:]
	})
}

// output runs a shell command at the top of the source tree; it must succeed.
func output(t *testing.T, ctx context.Context, command string) string {
	t.Helper()
	cmd := exec.CommandContext(ctx, "sh", "-ec", command)
	cmd.Dir = root
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

func TestShellCommands(t *testing.T) {
	got := shellCommands("```sh\n# not this\nmake demo\n\npsql \\\n  -c 'x'\n```\ntext\n```\nnode 1\n```\n```sh\nmake test\n```\n")
	if want := "[make demo psql    -c 'x' make test]"; fmt.Sprint(got) != want {
		t.Errorf("got %v, want %v", got, want)
	}
}
