package certify_test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/certify"
)

var rewrite = flag.Bool("rewrite", false, "write what the certifier says into the scenario files")

// TestScenarios runs the files of testdata. A file is a sequence of blocks: commands, a line "----", the complete
// expected output, an empty line. Lines that begin with # are comments. The commands:
//
//	new [max_keys=N] [max_outcomes=N]           start anew
//	decide NAME [base=N] [seen=N] [MODE:KEY …]  seen is the last CSN by default, base is seen
//	abort NAME
//	advance N
//	outcome NAME
//	state
//	restart                                     go on with what a snapshot brings back
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("scenario files: %v, error %v", files, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := play(t, string(want))
			if got == string(want) {
				return
			}
			if !*rewrite {
				t.Fatalf("%s differs; the certifier says:\n%s", file, got)
			}
			if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// play runs a scenario and returns it with the output there is.
func play(t *testing.T, text string) string {
	s := scenario{t: t, c: certify.New(certify.Config{}), names: make(map[txn.Key]string)}
	var out strings.Builder
	inOutput := false
	var said []string
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		switch {
		case inOutput && line == "":
			inOutput = false
			out.WriteString("\n")
		case inOutput:
		case line == "----":
			out.WriteString("----\n")
			for _, l := range said {
				out.WriteString(l + "\n")
			}
			said = nil
			inOutput = true
		default:
			out.WriteString(line + "\n")
			if line != "" && line[0] != '#' {
				said = append(said, s.run(strings.Fields(line)))
			}
		}
	}
	if len(said) > 0 {
		t.Fatal("commands without ----")
	}
	return out.String()
}

type scenario struct {
	t     *testing.T
	c     *certify.Certifier
	gids  []string
	names map[txn.Key]string
}

func (s *scenario) run(words []string) string {
	verb, args := words[0], words[1:]
	switch verb {
	case "new":
		cfg := certify.Config{}
		for _, a := range args {
			switch name, value, _ := strings.Cut(a, "="); name {
			case "max_keys":
				cfg.MaxKeys = int(s.number(value))
			case "max_outcomes":
				cfg.MaxOutcomes = int(s.number(value))
			default:
				s.t.Fatalf("unknown argument %q", a)
			}
		}
		s.c = certify.New(cfg)
		return "ok"
	case "decide":
		w := &txn.WriteSet{GID: s.gid(args[0]), Seen: s.c.LastCSN(), Base: 1<<64 - 1}
		for _, a := range args[1:] {
			if value, ok := strings.CutPrefix(a, "base="); ok {
				w.Base = txn.CSN(s.number(value))
			} else if value, ok := strings.CutPrefix(a, "seen="); ok {
				w.Seen = txn.CSN(s.number(value))
			} else {
				w.Keys = append(w.Keys, s.key(a))
			}
		}
		if w.Base == 1<<64-1 {
			w.Base = w.Seen
		}
		return args[0] + ": " + s.verdict(s.c.Decide(w))
	case "abort":
		return args[0] + ": " + s.verdict(s.c.Abort(s.gid(args[0])))
	case "advance":
		s.c.Advance(txn.CSN(s.number(args[0])))
		return fmt.Sprintf("horizon %d", s.c.Horizon())
	case "outcome":
		v, known := s.c.Outcome(s.gid(args[0]))
		if !known {
			return args[0] + ": forgotten"
		}
		return args[0] + ": " + s.verdict(v)
	case "state":
		return fmt.Sprintf("last %d, horizon %d, digest %016x", s.c.LastCSN(), s.c.Horizon(), s.c.Digest())
	case "restart":
		b := snapshot(s.t, s.c)
		c := certify.New(certify.Config{})
		if err := c.Restore(bytes.NewReader(b)); err != nil {
			s.t.Fatal(err)
		}
		s.c = c
		return fmt.Sprintf("%d keys", c.Keys())
	}
	s.t.Fatalf("unknown command %q", verb)
	return ""
}

func (s *scenario) number(text string) uint64 {
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

// gid numbers names in the order in which they come.
func (s *scenario) gid(name string) txn.GID {
	i := slices.Index(s.gids, name)
	if i < 0 {
		i = len(s.gids)
		s.gids = append(s.gids, name)
	}
	return gid(i + 1)
}

func (s *scenario) key(text string) txn.KeyUse {
	mode, name, ok := strings.Cut(text, ":")
	for m := txn.ModeWrite; m.Valid() && ok; m++ {
		if m.String() == mode {
			k := use(m, name)
			s.names[k.Key] = name
			return k
		}
	}
	s.t.Fatalf("%q is no MODE:KEY", text)
	return txn.KeyUse{}
}

func (s *scenario) verdict(v txn.Verdict) string {
	switch {
	case v.Commits():
		return fmt.Sprintf("commit %d", v.CSN)
	case v.Reason == txn.AbortConflict:
		return fmt.Sprintf("abort, %v with %d by %v:%s", v.Reason, v.With, v.Mode, s.names[v.Key])
	}
	return fmt.Sprintf("abort, %v", v.Reason)
}
