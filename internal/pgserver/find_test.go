package pgserver_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/internal/pgserver/pgtest"
)

func TestParseVersion(t *testing.T) {
	for text, want := range map[string]pgserver.Version{
		"postgres (PostgreSQL) 18.4":                            {Major: 18, Minor: 4},
		"postgres (PostgreSQL) 17.10 (Debian 17.10-1.pgdg12+1)": {Major: 17, Minor: 10},
		"PostgreSQL 15.18 (Debian 15.18-0+deb12u1)":             {Major: 15, Minor: 18},
		"19beta1": {Major: 19},
		"19devel": {Major: 19},
		"17":      {Major: 17},
		"17.2":    {Major: 17, Minor: 2},
	} {
		if got, err := pgserver.ParseVersion(text); err != nil || got != want {
			t.Errorf("%q: %v, %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "postgres", "psql (PostgreSQL) 18.4", "x17"} {
		if got, err := pgserver.ParseVersion(text); err == nil {
			t.Errorf("%q: %v, want an error", text, got)
		}
	}
	if v := pgserver.FromNum(170010); v.String() != "17.10" || v.Num() != 170010 {
		t.Errorf("170010 is %v, %d", v, v.Num())
	}
}

// script writes a program that prints a line.
func script(t *testing.T, name, prints string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, fmt.Appendf(nil, "#!/bin/sh\necho '%s'\n", prints), 0o755); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	fake := func(sub, version string) string {
		bin := filepath.Join(dir, sub, "bin")
		script(t, filepath.Join(bin, "initdb"), "")
		script(t, filepath.Join(bin, "postgres"), "postgres (PostgreSQL) "+version)
		return bin
	}
	old, seventeen, eighteen := fake("pg/15", "15.18 (Debian)"), fake("pg/17", "17.10"), fake("pg/18", "18.4")
	script(t, filepath.Join(dir, "half/bin/postgres"), "postgres (PostgreSQL) 18.4")
	pattern := filepath.Join(dir, "pg/*/bin")
	none := filepath.Join(dir, "none")
	configOld, config17 := script(t, filepath.Join(dir, "config-old"), old), script(t, filepath.Join(dir, "config-17"), seventeen)

	for name, tc := range map[string]struct {
		o    pgserver.FindOptions
		want string
	}{
		"configured":        {pgserver.FindOptions{BinDir: seventeen, PgConfig: none, Pattern: pattern}, seventeen},
		"pg_config":         {pgserver.FindOptions{PgConfig: config17, Pattern: pattern}, seventeen},
		"pg_config too old": {pgserver.FindOptions{PgConfig: configOld, Pattern: pattern}, eighteen},
		"no pg_config":      {pgserver.FindOptions{PgConfig: none, Pattern: pattern}, eighteen},
		"one version only":  {pgserver.FindOptions{PgConfig: none, Pattern: pattern, Major: 17}, seventeen},
	} {
		if in, err := pgserver.Find(t.Context(), tc.o); err != nil || in.BinDir != tc.want {
			t.Errorf("%s: found %q, %v, want %q", name, in.BinDir, err, tc.want)
		}
	}
	for name, tc := range map[string]struct {
		o    pgserver.FindOptions
		want []string
	}{
		"configured too old": {pgserver.FindOptions{BinDir: old, Pattern: pattern}, []string{"postgres.bin_dir", old, "15.18", "too old"}},
		"configured missing": {pgserver.FindOptions{BinDir: none, Pattern: pattern}, []string{"postgres.bin_dir", none, "no program postgres"}},
		"half an install":    {pgserver.FindOptions{BinDir: filepath.Join(dir, "half/bin")}, []string{"no program initdb"}},
		"only old ones": {pgserver.FindOptions{PgConfig: configOld, Pattern: filepath.Join(dir, "pg/15/bin")},
			[]string{"17 or newer", old, "15.18", "Debian 12 itself has only PostgreSQL 15", "postgres.bin_dir"}},
		"nothing": {pgserver.FindOptions{PgConfig: none, Pattern: none}, []string{"not installed", none}},
	} {
		_, err := pgserver.Find(t.Context(), tc.o)
		if !errors.Is(err, pgserver.ErrNotFound) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, part := range tc.want {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%s: the error does not say %q:\n%v", name, part, err)
			}
		}
	}
}

// Fetch really downloads, into a cache of its own, once for all who ask together.
func TestFetch(t *testing.T) {
	if os.Geteuid() == 0 {
		pgtest.Install(t, 18) // root's cache has a fixed place: asking again must only look there
	} else {
		t.Setenv("XDG_CACHE_HOME", t.TempDir())
	}
	var out strings.Builder
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			in, err := pgserver.Fetch(t.Context(), 18, writerFunc(func(b []byte) (int, error) {
				mu.Lock()
				defer mu.Unlock()
				return out.Write(b)
			}))
			if err != nil || in.Version.Major != 18 {
				t.Errorf("Fetch: %+v, %v", in, err)
			}
		})
	}
	wg.Wait()
	if n := strings.Count(out.String(), "\n"); n > 1 {
		t.Errorf("fetched more than once: %s", out.String())
	}
	if _, err := pgserver.Fetch(t.Context(), 15, io.Discard); !errors.Is(err, pgserver.ErrNotFound) {
		t.Errorf("Fetch of 15: %v", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func TestLock(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	unlock, err := pgserver.Lock(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := pgserver.Lock(ctx, name); !errors.Is(err, context.Canceled) {
		t.Errorf("second lock: %v", err)
	}
	unlock()
	unlock, err = pgserver.Lock(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	unlock()
}

func TestCanReach(t *testing.T) {
	dir := pgtest.Dir(t, false)
	other := pgserver.Account{Name: "other", UID: 54321, GID: 54321}
	open := filepath.Join(dir, "open")
	closed := filepath.Join(dir, "closed")
	for name, mode := range map[string]os.FileMode{open: 0o755, closed: 0o700, filepath.Join(closed, "in"): 0o755} {
		if err := os.MkdirAll(name, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(name, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := other.CanReach(filepath.Join(open, "not/yet/there")); err != nil {
		t.Error(err)
	}
	if err := other.CanReach(filepath.Join(closed, "in/deep")); err == nil || !strings.Contains(err.Error(), closed+" is closed to user other") {
		t.Errorf("closed directory: %v", err)
	}
}
