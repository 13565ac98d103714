package pgserver

import (
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// Account is the operating system's user that runs the server.
type Account struct {
	Name     string
	UID, GID int
}

// ServerAccount returns the current user or, for root, whom PostgreSQL refuses, the user postgres, else nobody.
func ServerAccount() (Account, error) {
	if os.Geteuid() != 0 {
		u, err := user.Current()
		if err != nil {
			return Account{}, fmt.Errorf("find current user: %w", err)
		}
		return Account{Name: u.Username, UID: os.Geteuid(), GID: os.Getegid()}, nil
	}
	var last error
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			last = err
			continue
		}
		uid, err := strconv.Atoi(u.Uid)
		if err != nil {
			return Account{}, fmt.Errorf("find user %s: %w", name, err)
		}
		gid, err := strconv.Atoi(u.Gid)
		if err != nil {
			return Account{}, fmt.Errorf("find user %s: %w", name, err)
		}
		if uid != 0 {
			return Account{Name: name, UID: uid, GID: gid}, nil
		}
	}
	return Account{}, fmt.Errorf("find an unprivileged user for PostgreSQL, which refuses root: neither postgres nor nobody will do: %w", last)
}

// other reports whether a process must change its user to become a.
func (a Account) other() bool { return a.UID != os.Geteuid() }

// attributes returns how to start a process as a, in a process group of its own, so that the terminal's Ctrl-C
// reaches the sidecar only, which then stops the server in its own order.
func (a Account) attributes() *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Setpgid: true}
	if a.other() {
		attr.Credential = &syscall.Credential{Uid: uint32(a.UID), Gid: uint32(a.GID)}
	}
	return attr
}

// Own gives a file or directory to a.
func (a Account) Own(name string) error {
	if !a.other() {
		return nil
	}
	return os.Lchown(name, a.UID, a.GID)
}

// MakeDir makes a directory, its parents where needed, that belongs to a and is closed to others.
func (a Account) MakeDir(name string) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(name, 0o700); err != nil && !os.IsExist(err) {
		return err
	}
	info, err := os.Lstat(name)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a directory", name)
	}
	// In a world-writable parent the name may be someone else's: never chown what root or a did not make.
	if st := info.Sys().(*syscall.Stat_t); int(st.Uid) != os.Geteuid() && int(st.Uid) != a.UID {
		return fmt.Errorf("%s belongs to user id %d, not to %s", name, st.Uid, a.Name)
	}
	return a.Own(name)
}

// CanReach returns nil if a may enter dir or, where that does not exist yet, the nearest parent that does; the error
// names the directory that is closed. It judges by owner, group and mode.
func (a Account) CanReach(dir string) error {
	if a.UID == 0 {
		return nil
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	for {
		real, err := filepath.EvalSymlinks(dir)
		if err == nil {
			dir = real
			break
		}
		if !os.IsNotExist(err) || dir == "/" {
			return err
		}
		dir = filepath.Dir(dir)
	}
	for ; ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			return err
		}
		if !a.mayEnter(info) {
			return fmt.Errorf("%s is closed to user %s (mode %04o)", dir, a.Name, info.Mode().Perm())
		}
		if dir == "/" {
			return nil
		}
	}
}

func (a Account) mayEnter(info fs.FileInfo) bool {
	st := info.Sys().(*syscall.Stat_t)
	bit := fs.FileMode(0o001)
	switch {
	case int(st.Uid) == a.UID:
		bit = 0o100
	case int(st.Gid) == a.GID:
		bit = 0o010
	}
	return info.Mode().Perm()&bit != 0
}
