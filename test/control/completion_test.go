package control

import (
	"path/filepath"
	"strings"
	"testing"
)

// bashCompletion completes a line as bash does when somebody presses Tab. The one function that the script takes from the package
// bash-completion, which machines may lack, stands here.
const bashCompletion = `
_get_comp_words_by_ref() { words=("${COMP_WORDS[@]}"); cword=$COMP_CWORD; cur=${words[cword]}; prev=${words[cword-1]}; }
source <(quorate completion bash)
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9
__start_quorate
printf '%s\n' "${COMPREPLY[@]}"
`

func TestCompletion(t *testing.T) {
	c, ctx := start(t)
	env := []string{"PATH=" + filepath.Dir(fixture.binary) + ":/usr/bin:/bin", "QUORATE_ADDRESS=" + c.GRPC(2)}
	for line, want := range map[string]string{
		"quorate transf":                    "transfer-leadership",
		"quorate status --che":              "--check",
		"quorate events --severity w":       "warning",
		"quorate nodes -o ":                 "json table yaml",
		"quorate drain ":                    "1 2 3",
		"quorate transfer-leadership --to ": "1 2 3",
		"quorate drain 1 ":                  "",
	} {
		args := append([]string{"--noprofile", "--norc", "-c", bashCompletion, "bash"}, strings.Split(line, " ")...)
		var got []string
		for _, one := range strings.Split(strings.TrimSpace(execute(t, ctx, env, "bash", args...)), "\n") {
			word, _, _ := strings.Cut(strings.TrimSpace(one), " ") // what it stands for may follow
			got = append(got, word)
		}
		if words := strings.Join(got, " "); words != want {
			t.Errorf("%q completes to %q, want %q", line, words, want)
		}
	}
}
