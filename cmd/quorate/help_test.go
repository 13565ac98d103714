package main

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Every command's help has an example, and what the examples say can be said.
func TestExamples(t *testing.T) {
	root := rootCommand()
	shown := make(map[string]bool)
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
		if cmd.Example == "" {
			t.Errorf("%s has no example", cmd.CommandPath())
		}
		shown[commandName(cmd)] = true
		for _, line := range strings.Split(cmd.Example, "\n") {
			line, _, _ = strings.Cut(line, "#")
			for _, end := range []string{"|", ">"} {
				line, _, _ = strings.Cut(line, end)
			}
			words, ok := strings.CutPrefix(strings.TrimSpace(line), "quorate ")
			if !ok {
				continue
			}
			of, args, err := root.Find(strings.Fields(strings.ReplaceAll(words, "'its disk is broken'", "broken")))
			if err == nil {
				err = of.ParseFlags(args)
			}
			if err == nil {
				err = of.ValidateArgs(of.Flags().Args())
			}
			if err != nil || cmd.HasParent() && of != cmd && of.Parent() != cmd {
				t.Errorf("%s: the example %q is of %q: %v", cmd.CommandPath(), line, of.CommandPath(), err)
			}
		}
	}
	walk(root)
	for name := range examples {
		if !shown[name] {
			t.Errorf("there is an example of %q, and no such command", name)
		}
	}
	if _, out, _ := do(t, "drain", "--help"); !strings.Contains(out, "quorate drain 3 --address 127.0.0.1:6201") {
		t.Errorf("help without example:\n%s", out)
	}
}

// What the shells are given is what they understand, as far as they are here.
func TestCompletionScripts(t *testing.T) {
	for shell, check := range map[string][]string{"bash": {"-n"}, "zsh": {"-n"}, "fish": {"--no-execute"}} {
		code, script, stderr := do(t, "completion", shell)
		if code != exitOK || !strings.Contains(script, "__complete") {
			t.Errorf("%s: %d %s", shell, code, stderr)
		}
		path, err := exec.LookPath(shell)
		if err != nil {
			t.Logf("no %s here", shell)
			continue
		}
		cmd := exec.CommandContext(t.Context(), path, check...)
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", shell, err, out)
		}
	}
}
