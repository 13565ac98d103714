package check_test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/quorate/quorate/test/check"
)

var rewrite = flag.Bool("rewrite", false, "write what the checker says into the scenario files")

// TestScenarios judges the histories in testdata. A file has scenarios, each with a comment, a history in the notation
// of reports, and after "----" the report. A line "freshness: node" or "freshness: everywhere" may come first.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		for n, scenario := range strings.Split(strings.TrimSpace(string(content)), "\n\n\n") {
			given, want, _ := strings.Cut(scenario, "\n----")
			name := fmt.Sprintf("%s/%s", strings.TrimSuffix(filepath.Base(file), ".txt"), strings.TrimPrefix(strings.SplitN(given, "\n", 2)[0], "# "))
			t.Run(name, func(t *testing.T) {
				history, freshness := parse(t, given)
				report := check.Judge(history, freshness)
				if got := strings.TrimSpace(report.String()); !*rewrite && got != strings.TrimSpace(want) {
					t.Errorf("%s\ngot\n%s\nwant\n%s", given, got, strings.TrimSpace(want))
				}
				if n > 0 {
					out.WriteString("\n\n\n")
				}
				fmt.Fprintf(&out, "%s\n----\n%s", given, strings.TrimSpace(report.String()))
				roundTrip(t, history)
			})
		}
		if *rewrite {
			if err := os.WriteFile(file, []byte(out.String()+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// roundTrip checks that a history survives being kept in a file.
func roundTrip(t *testing.T, history check.History) {
	t.Helper()
	var file bytes.Buffer
	if err := check.WriteHistory(&file, history); err != nil {
		t.Fatal(err)
	}
	again, err := check.ReadHistory(&file)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(history, again) {
		t.Errorf("history\n%v\nwas read again as\n%v", history, again)
	}
}

func TestReadHistoryRefusesNonsense(t *testing.T) {
	const good = `{"start": 1, "end": 2, "isolation": "read committed", "outcome": "ok"}`
	if h, err := check.ReadHistory(strings.NewReader(good + "\n\n" + good)); err != nil || len(h) != 2 {
		t.Errorf("got %v, %v", h, err)
	}
	for _, text := range []string{
		"{", "{}", `{"nonsense": 1}`, good + "\n[]\n",
		strings.Replace(good, "1", `"now"`, 1), strings.Replace(good, "1", "3", 1),
		strings.Replace(good, "ok", "fine", 1), strings.Replace(good, "committed", "uncommitted", 1),
	} {
		if h, err := check.ReadHistory(strings.NewReader(text)); err == nil {
			t.Errorf("%q was read as %v", text, h)
		}
	}
}

var opPattern = regexp.MustCompile(`^(\d+)-(\d+) p(\d+) n(\d+)( rc)?( final)? (ok|failed|unknown): (.*)$`)

// parse reads the notation of Op.String, with times in milliseconds without a unit.
func parse(t *testing.T, text string) (check.History, check.Freshness) {
	t.Helper()
	var h check.History
	freshness := check.PerSession
	for line := range strings.SplitSeq(text, "\n") {
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
			continue
		case line == "freshness: node":
			freshness = check.PerNode
			continue
		case line == "freshness: everywhere":
			freshness = check.Everywhere
			continue
		}
		m := opPattern.FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("cannot read %q", line)
		}
		op := check.Op{
			Start: time.Duration(number(t, m[1])) * time.Millisecond, End: time.Duration(number(t, m[2])) * time.Millisecond,
			Process: int(number(t, m[3])), Node: int(number(t, m[4])), Isolation: check.RepeatableRead,
			Final: m[6] != "", Outcome: check.Outcome(m[7]),
		}
		if m[5] != "" {
			op.Isolation = check.ReadCommitted
		}
		for action := range strings.SplitSeq(m[8], ", ") {
			op.Do = append(op.Do, parseAction(t, action))
		}
		h = append(h, op)
	}
	return h, freshness
}

func parseAction(t *testing.T, text string) check.Action {
	t.Helper()
	words := strings.Fields(strings.NewReplacer("[", "", "]", "").Replace(text))
	a := check.Action{Do: check.Verb(words[0])}
	table := func() {
		a.Table, a.Refs, _ = strings.Cut(words[1], "→")
	}
	pair := func(word string) (string, string) {
		left, right, ok := strings.Cut(word, "=")
		if !ok {
			t.Fatalf("cannot read %q of %q", word, text)
		}
		return left, right
	}
	switch a.Do {
	case check.List:
		a.Key = words[1]
		for _, w := range words[2:] {
			a.List = append(a.List, number(t, w))
		}
	case check.Balances:
		a.Counts = map[string]int64{}
		for _, w := range words[1:] {
			key, value := pair(w)
			a.Counts[key] = number(t, value)
		}
	case check.Insert, check.Delete:
		table()
		id, key := pair(words[2])
		a.Row, a.Key = number(t, id), key
	case check.Scan:
		table()
		for _, w := range words[2:] {
			id, key := pair(w)
			a.Rows = append(a.Rows, check.Row{Row: number(t, id), Key: key})
		}
	case check.Append, check.Write, check.Read, check.Open, check.Add, check.Count:
		a.Key, a.Value = words[1], number(t, words[2])
	default:
		t.Fatalf("cannot read action %q", text)
	}
	if got := a.String(); got != text {
		t.Fatalf("action %q was understood as %q", text, got)
	}
	return a
}

func number(t *testing.T, text string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
