package pki

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// checkSecret refuses a key that others can read, by the rule that PostgreSQL has for its own: nobody but the owner,
// or a group as well where root is the owner.
func checkSecret(name string) error {
	info, err := os.Stat(name)
	if err != nil {
		return err
	}
	allowed := fs.FileMode(0o600)
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && owner.Uid == 0 {
		allowed = 0o640
	}
	if others := info.Mode().Perm() &^ allowed; others&0o077 != 0 {
		return fmt.Errorf("%s has mode %04o, so that others can read or change it: chmod 600 %s", name, info.Mode().Perm(), name)
	}
	return nil
}

// WriteSecret writes a file that only its owner can read, in one step. An existing one is an error that wraps
// fs.ErrExist unless it may be replaced.
func WriteSecret(name string, text []byte, replace bool) (err error) {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*") // mode 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	defer os.Remove(f.Name()) // there unless it was renamed
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		if replace {
			err = os.Rename(f.Name(), name)
		} else {
			err = os.Link(f.Name(), name) // unlike a rename it fails when the name is taken
		}
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}
