package pgserver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Install is one set of server programs.
type Install struct {
	BinDir  string // holds postgres and initdb
	Version Version
}

// ErrNotFound: no usable server programs. The text around it says what was looked at and how to mend it.
var ErrNotFound = errors.New("no usable PostgreSQL found")

// FindOptions says where to look. The zero value looks in the usual places for any version that will do.
type FindOptions struct {
	// BinDir, when set, is the only place: what an operator configured is taken or refused, never replaced.
	BinDir string
	// Major, when set, accepts this major version only.
	Major int
	// PgConfig is the program asked for its --bindir; default "pg_config", found on PATH.
	PgConfig string
	// Pattern is a glob of directories; default "/usr/lib/postgresql/*/bin".
	Pattern string
}

// Find locates server programs: the configured directory; else what pg_config names; else the newest of Debian's
// directories. It installs nothing. The error wraps ErrNotFound.
func Find(ctx context.Context, o FindOptions) (Install, error) {
	if o.BinDir != "" {
		in, err := o.examine(ctx, o.BinDir)
		if err != nil {
			return Install{}, fmt.Errorf("%w: postgres.bin_dir %q: %w", ErrNotFound, o.BinDir, err)
		}
		return in, nil
	}
	var looked []string
	if dir, err := askPgConfig(ctx, o.PgConfig); err != nil {
		looked = append(looked, err.Error())
	} else if in, err := o.examine(ctx, dir); err != nil {
		looked = append(looked, fmt.Sprintf("pg_config --bindir: %s: %v", dir, err))
	} else {
		return in, nil
	}
	pattern := o.Pattern
	if pattern == "" {
		pattern = "/usr/lib/postgresql/*/bin"
	}
	dirs, err := filepath.Glob(pattern)
	if err != nil {
		return Install{}, fmt.Errorf("look for PostgreSQL in %q: %w", pattern, err)
	}
	if len(dirs) == 0 {
		looked = append(looked, pattern+": no such directory")
	}
	var best Install
	for _, dir := range dirs {
		in, err := o.examine(ctx, dir)
		switch {
		case err != nil:
			looked = append(looked, fmt.Sprintf("%s: %v", dir, err))
		case in.Version.Num() > best.Version.Num():
			best = in
		}
	}
	if best.BinDir != "" {
		return best, nil
	}
	return Install{}, fmt.Errorf("%w: PostgreSQL %s is needed; looked at\n  %s\n"+
		"Debian 12 itself has only PostgreSQL 15: install postgresql-18 from PostgreSQL's own Debian packages (PGDG), "+
		"or set postgres.bin_dir to the directory that holds postgres and initdb",
		ErrNotFound, o.wanted(), strings.Join(looked, "\n  "))
}

func (o FindOptions) wanted() string {
	if o.Major != 0 {
		return fmt.Sprint(o.Major)
	}
	return fmt.Sprintf("%d or newer", MinMajor)
}

// examine runs the postgres of dir for its version and checks that it will do.
func (o FindOptions) examine(ctx context.Context, dir string) (Install, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Install{}, err
	}
	for _, program := range []string{"postgres", "initdb"} {
		if _, err := exec.LookPath(filepath.Join(dir, program)); err != nil {
			return Install{}, fmt.Errorf("has no program %s", program)
		}
	}
	out, err := output(ctx, filepath.Join(dir, "postgres"), "--version")
	if err != nil {
		return Install{}, err
	}
	v, err := ParseVersion(out)
	if err != nil {
		return Install{}, err
	}
	if v.Major < MinMajor {
		return Install{}, fmt.Errorf("is PostgreSQL %s, too old: %s is needed", v, o.wanted())
	}
	if o.Major != 0 && v.Major != o.Major {
		return Install{}, fmt.Errorf("is PostgreSQL %s: %s is needed", v, o.wanted())
	}
	return Install{BinDir: dir, Version: v}, nil
}

func askPgConfig(ctx context.Context, program string) (string, error) {
	if program == "" {
		program = "pg_config"
	}
	if _, err := exec.LookPath(program); err != nil {
		return "", fmt.Errorf("%s: not installed", program)
	}
	return output(ctx, program, "--bindir")
}

// output runs a program that only reports something; one that hangs is given up.
func output(ctx context.Context, program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && len(exit.Stderr) > 0 {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
		}
		return "", fmt.Errorf("run %s: %w", program, err)
	}
	return strings.TrimSpace(string(out)), nil
}
