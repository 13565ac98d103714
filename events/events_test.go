package events_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quorate/quorate/events"
)

func open(t *testing.T, dir string) *events.Log {
	t.Helper()
	l, err := events.Open(dir, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func closeLog(t *testing.T, l *events.Log) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func texts(all []events.Event) (s []string) {
	for _, e := range all {
		s = append(s, fmt.Sprintf("%d %s", e.Number, e.Text))
	}
	return s
}

func same(t *testing.T, got []events.Event, want ...string) {
	t.Helper()
	if g := texts(got); strings.Join(g, "|") != strings.Join(want, "|") {
		t.Errorf("events are %q, want %q", g, want)
	}
}

func TestRestart(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	began := time.Now()
	if n := l.Append(events.Event{Severity: events.Info, Kind: "leader", Node: 2, Text: "node 2 leads", Fields: map[string]string{"term": "7"}}); n != 1 {
		t.Fatalf("number %d", n)
	}
	l.Append(events.Event{Severity: events.Error, Kind: "quorum_lost", Node: 1, Text: "no quorum"})
	closeLog(t, l)
	if l.Append(events.Event{Kind: "late", Text: "late"}) != 0 {
		t.Error("an event was noted after Close")
	}

	l = open(t, dir)
	defer closeLog(t, l)
	got := l.Find(events.Query{})
	same(t, got, "2 no quorum", "1 node 2 leads")
	first := got[1]
	if first.Severity != events.Info || first.Kind != "leader" || first.Node != 2 || first.Fields["term"] != "7" ||
		first.Time.Before(began.Round(0)) || time.Since(first.Time) > time.Minute {
		t.Errorf("read back: %+v", first)
	}
	if n := l.Append(events.Event{Severity: events.Warning, Kind: "leader", Node: 3, Text: "next"}); n != 3 {
		t.Errorf("numbers go on with %d", n)
	}
	same(t, l.Find(events.Query{Limit: 1}), "3 next")
	same(t, l.Find(events.Query{After: 1}), "3 next", "2 no quorum")
	same(t, l.Find(events.Query{AtLeast: events.Error}), "2 no quorum")
	same(t, l.Find(events.Query{Kind: "leader", AtLeast: events.Warning}), "3 next")
	same(t, l.Find(events.Query{Since: time.Now().Add(time.Hour)}))
}

// Whatever a crash leaves of the last line, or a disk of any, costs no other event.
func TestDamage(t *testing.T) {
	whole := t.TempDir()
	l := open(t, whole)
	for i := 1; i <= 3; i++ {
		l.Append(events.Event{Severity: events.Info, Kind: "k", Text: fmt.Sprintf("event %d", i)})
	}
	closeLog(t, l)
	text, err := os.ReadFile(filepath.Join(whole, "events"))
	if err != nil {
		t.Fatal(err)
	}
	last := bytes.LastIndexByte(text[:len(text)-1], '\n') + 1
	for cut := last; cut <= len(text); cut++ {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "events"), text[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		l := open(t, dir)
		want := "3 after"
		if cut >= len(text)-1 {
			want = "4 after"
		}
		l.Append(events.Event{Severity: events.Info, Kind: "k", Text: "after"})
		closeLog(t, l)
		l = open(t, dir)
		if got := texts(l.Find(events.Query{Limit: 1})); len(got) != 1 || got[0] != want {
			t.Errorf("cut at %d: %q, want %q", cut, got, want)
		}
		if got := l.Find(events.Query{}); len(got) < 3 || got[len(got)-1].Text != "event 1" || got[len(got)-2].Text != "event 2" {
			t.Errorf("cut at %d: left are %q", cut, texts(got))
		}
		closeLog(t, l)
	}
	for at := 0; at < len(text); at += 5 {
		dir := t.TempDir()
		damaged := bytes.Clone(text)
		damaged[at] ^= 0x10
		if err := os.WriteFile(filepath.Join(dir, "events"), damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		l := open(t, dir)
		got := l.Find(events.Query{})
		closeLog(t, l)
		lost := 1
		if text[at] == '\n' {
			lost = 2 // the next one too, unless it is the last
		}
		if len(got) < 3-lost {
			t.Errorf("damaged at %d: left are %q", at, texts(got))
		}
		for _, e := range got {
			if e.Text != fmt.Sprintf("event %d", e.Number) {
				t.Errorf("damaged at %d: %+v", at, e)
			}
		}
	}
}

func TestRotation(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	long := strings.Repeat("x", 900)
	const count = 2500
	for i := 1; i <= count; i++ {
		if n := l.Append(events.Event{Severity: events.Info, Kind: "k", Text: fmt.Sprint(i, long)}); n != uint64(i) {
			t.Fatalf("event %d has number %d", i, n)
		}
	}
	closeLog(t, l)
	for _, name := range []string{"events", "events.old"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Size() > 5<<20 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	l = open(t, dir)
	got := l.Find(events.Query{})
	if len(got) < 100 || got[0].Number != count {
		t.Errorf("%d events are left, the newest is %d", len(got), got[0].Number)
	}
	// A second life writes few at a time: the files stay within their bounds.
	for i := 1; i <= 1500; i++ {
		l.Append(events.Event{Severity: events.Info, Kind: "k", Text: fmt.Sprint("again", i, long)})
		if i%300 == 0 {
			closeLog(t, l)
			l = open(t, dir)
		}
	}
	closeLog(t, l)
	for _, name := range []string{"events", "events.old"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Size() > 1<<20+200<<10 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
}

func TestRepetitions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := open(t, t.TempDir())
		flapping := events.Event{Severity: events.Warning, Kind: "peer_lost", Node: 2, Text: "node 2 is lost"}
		for range 50 {
			l.Append(flapping)
		}
		l.Append(events.Event{Severity: events.Warning, Kind: "peer_lost", Node: 3, Text: "node 3 is lost"})
		time.Sleep(11 * time.Second)
		l.Append(flapping)
		got := l.Find(events.Query{})
		same(t, got, "7 node 2 is lost", "6 node 3 is lost", "5 node 2 is lost", "4 node 2 is lost", "3 node 2 is lost", "2 node 2 is lost", "1 node 2 is lost")
		if got[0].Fields["repetitions"] != "45" {
			t.Errorf("fields are %v", got[0].Fields)
		}
		closeLog(t, l)
	})
}

func TestConcurrentUse(t *testing.T) {
	l := open(t, t.TempDir())
	_, changed := l.Last()
	var group sync.WaitGroup
	for writer := range 4 {
		group.Go(func() {
			for i := range 200 {
				l.Append(events.Event{Severity: events.Info, Kind: "k", Text: fmt.Sprint(writer, i)})
				l.Find(events.Query{Limit: 3})
			}
		})
	}
	<-changed
	group.Wait()
	if last, _ := l.Last(); last != 800 {
		t.Errorf("the last number is %d", last)
	}
	for i, e := range l.Find(events.Query{}) {
		if e.Number != uint64(800-i) {
			t.Fatalf("event %d has number %d", i, e.Number)
		}
	}
	closeLog(t, l)
	closeLog(t, l)
}

// What a user's text holds is stored and bounded as text.
func TestLongAndOddTexts(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	l.Append(events.Event{Severity: events.Info, Kind: "k", Text: "a\nb\"\x00ü" + strings.Repeat("ü", 5000), Fields: map[string]string{"x": strings.Repeat("y", 100000)}})
	closeLog(t, l)
	l = open(t, dir)
	defer closeLog(t, l)
	got := l.Find(events.Query{})
	if len(got) != 1 || !strings.HasPrefix(got[0].Text, "a\nb\"\x00ü") || len(got[0].Text) > 2000 || len(got[0].Fields["x"]) > 2000 {
		t.Errorf("read back %+v", got)
	}
}

// Whoever follows gets each event once, also over a restart, and over one that has cost the log its last events.
func TestFollow(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	began := time.Now()
	found, at, changed := l.Follow(events.Cursor{Time: began.Add(-time.Minute)}, events.Query{})
	same(t, found)
	for _, text := range []string{"a", "b", "c"} {
		l.Append(events.Event{Severity: events.Info, Kind: text, Text: text})
	}
	<-changed
	found, at, _ = l.Follow(at, events.Query{})
	same(t, found, "1 a", "2 b", "3 c")
	all, _, _ := l.Follow(events.Cursor{}, events.Query{})
	same(t, all, "1 a", "2 b", "3 c")
	later, _, _ := l.Follow(events.Cursor{Time: found[2].Time.Add(time.Millisecond)}, events.Query{})
	same(t, later)
	closeLog(t, l)

	file := filepath.Join(dir, "events")
	older, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	l = open(t, dir)
	l.Append(events.Event{Severity: events.Info, Kind: "d", Text: "d"})
	l.Append(events.Event{Severity: events.Error, Kind: "e", Text: "e"})
	found, end, _ := l.Follow(at, events.Query{AtLeast: events.Error})
	same(t, found, "5 e")
	if none, _, _ := l.Follow(end, events.Query{}); len(none) != 0 || end.Number != 5 {
		t.Errorf("behind the end, which is %d, there are %v", end.Number, none)
	}
	closeLog(t, l)

	// The machine crashes, and what was behind 3 is lost.
	if err := os.WriteFile(file, older, 0o600); err != nil {
		t.Fatal(err)
	}
	l = open(t, dir)
	time.Sleep(2 * time.Millisecond) // another millisecond
	l.Append(events.Event{Severity: events.Info, Kind: "f", Text: "f"})
	found, _, _ = l.Follow(end, events.Query{})
	same(t, found, "4 f")
	l.Append(events.Event{Severity: events.Info, Kind: "g", Text: "g"})
	found, end, _ = l.Follow(end, events.Query{})
	same(t, found, "4 f", "5 g")
	closeLog(t, l)

	// What is too old to be kept is left out.
	l = open(t, dir)
	defer closeLog(t, l)
	for i := range 10_000 {
		l.Append(events.Event{Severity: events.Info, Kind: "many", Text: fmt.Sprint(i)})
	}
	if found, _, _ = l.Follow(end, events.Query{}); len(found) == 0 || found[len(found)-1].Number != 10_005 || found[0].Number <= end.Number+1 {
		t.Errorf("%d events of 10000, the first of them %v", len(found), found[:min(len(found), 1)])
	}
}

// TestNews: what the cluster's log says is news once, however often it is read, also after events have been dropped.
func TestNews(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	if !l.News(7) || l.News(7) || l.News(3) || !l.News(9) {
		t.Error("not each entry once")
	}
	long := strings.Repeat("x", 900)
	for i := range 2200 {
		l.Append(events.Event{Severity: events.Info, Kind: "k", Text: fmt.Sprint(i, long)})
		if i%550 == 549 {
			closeLog(t, l)
			l = open(t, dir)
		}
	}
	defer closeLog(t, l)
	if kept := l.Find(events.Query{}); kept[len(kept)-1].Number == 1 {
		t.Fatal("nothing has been dropped")
	}
	if l.News(9) || !l.News(10) {
		t.Error("the log is read again, and is news again")
	}
}

// TestRotationGoesOn: a rotation of which only the first half went well, because no file could be opened, is made up for.
func TestRotationGoesOn(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	defer closeLog(t, l)
	current, old := filepath.Join(dir, "events"), filepath.Join(dir, "events.old")
	long := strings.Repeat("x", 900)
	fill := func(name string, least int64) {
		t.Helper()
		for i := range 600 {
			l.Append(events.Event{Severity: events.Info, Kind: "k", Text: fmt.Sprint(name, i, long)})
		}
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
			if info, err := os.Stat(name); err == nil && info.Size() >= least {
				return
			} else if time.Now().After(end) {
				t.Fatalf("%s is not written: %v", name, err)
			}
		}
	}
	if err := os.Rename(current, old); err != nil {
		t.Fatal(err)
	}
	fill(old, 500<<10)
	fill(current, 1) // the old one is full in between
}
