package control

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// bashCompletion completes a line as bash does when somebody presses Tab. The one function that the script takes from the package
// bash-completion, which machines may lack, stands here.
const bashCompletion = `
set -o errexit
_get_comp_words_by_ref() { words=("${COMP_WORDS[@]}"); cword=$COMP_CWORD; cur=${words[cword]}; prev=${words[cword-1]}; }
script=$(quorate completion bash)
eval "$script"
set +o errexit
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9
__start_quorate
printf '%s\n' "${COMPREPLY[@]}"
`

func TestCompletion(t *testing.T) {
	c, ctx := start(t)
	bin := t.TempDir()
	if err := os.Symlink(fixture.binary, filepath.Join(bin, "quorate")); err != nil {
		t.Fatal(err)
	}
	env := []string{"PATH=" + bin + ":/usr/bin:/bin", "QUORATE_ADDRESS=" + c.GRPC(2)}
	for line, want := range map[string]string{
		"quorate transf":                    "transfer-leadership",
		"quorate status --che":              "--check",
		"quorate events --severity w":       "warning",
		"quorate nodes -o ":                 "table json yaml",
		"quorate drain ":                    "1 2 3",
		"quorate transfer-leadership --to ": "1 2 3",
		"quorate drain 1 ":                  "",
	} {
		args := append([]string{"--noprofile", "--norc", "-c", bashCompletion, "bash"}, strings.Split(line, " ")...)
		await(t, ctx, "the completion", func() error { // a node that is busy may not answer in the time that a shell waits
			var got []string
			for _, one := range strings.Split(strings.TrimSpace(execute(t, ctx, env, "bash", args...)), "\n") {
				word, _, _ := strings.Cut(strings.TrimSpace(one), " ") // what it stands for may follow
				got = append(got, word)
			}
			if words := strings.Join(got, " "); words != want {
				return fmt.Errorf("%q completes to %q, want %q", line, words, want)
			}
			return nil
		})
	}
}
