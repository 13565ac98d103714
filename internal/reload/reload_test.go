package reload

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestValue(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(name+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(name+".new", name); err != nil {
			t.Fatal(err)
		}
	}
	loads := 0
	load := func() (string, error) {
		loads++
		text, err := os.ReadFile(name)
		if strings.Contains(string(text), "bad") {
			err = errors.New("it is bad")
		}
		return string(text), err
	}
	var log bytes.Buffer
	now := time.Now()
	clock := func() time.Time { return now }
	if _, err := Open(load, slog.New(slog.DiscardHandler), clock, name); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is missing: %v", err)
	}
	write("one")
	loads = 0
	v, err := Open(load, slog.New(slog.NewTextHandler(&log, nil)), clock, name, "")
	if err != nil || v.Get() != "one" {
		t.Fatalf("%q, %v", v.Get(), err)
	}
	write("two")
	if v.Get() != "one" {
		t.Error("read again before the interval has passed")
	}
	now = now.Add(Interval)
	if v.Get() != "two" {
		t.Errorf("%q after a change", v.Get())
	}
	for range 5 {
		now = now.Add(Interval)
		v.Get()
	}
	if loads != 2 {
		t.Errorf("read %d times, want 2", loads)
	}
	write("bad")
	for range 3 {
		now = now.Add(Interval)
		if v.Get() != "two" {
			t.Errorf("%q after a bad change", v.Get())
		}
	}
	if n := strings.Count(log.String(), "it is bad"); n != 1 {
		t.Errorf("told of %d times:\n%s", n, log.String())
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	now = now.Add(Interval)
	if v.Get() != "two" {
		t.Error("forgotten with the file")
	}
	write("three")
	now = now.Add(-time.Hour) // a clock that is set back must not keep the old one for an hour
	if v.Get() != "three" {
		t.Errorf("%q after it was mended", v.Get())
	}
}
