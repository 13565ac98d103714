package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"
)

const pidFileName = "quorate.pid"

// errRunning: another process has the data directory.
var errRunning = errors.New("another process is running there")

// pidFile holds this process's number and is locked as long as it lives: the lock says whether somebody is there, the
// number only who. So a file left behind by a crash misleads nobody.
type pidFile struct{ file *os.File }

// lockPIDFile makes the file. The error wraps errRunning if a living process has it.
func lockPIDFile(name string) (*pidFile, error) {
	for {
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			return nil, fmt.Errorf("open pid file: %w", err)
		}
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			if errors.Is(err, syscall.EWOULDBLOCK) {
				pid, readErr := readPID(name)
				err = fmt.Errorf("%w: process %d", errRunning, pid)
				err = errors.Join(err, readErr)
			}
			return nil, errors.Join(fmt.Errorf("lock pid file %s: %w", name, err), f.Close())
		}
		// Its last owner may have removed it after we opened it: then what we have locked is no file any more.
		if current, err := sameFile(f, name); err != nil {
			return nil, errors.Join(fmt.Errorf("lock pid file %s: %w", name, err), f.Close())
		} else if !current {
			if err := f.Close(); err != nil {
				return nil, fmt.Errorf("lock pid file %s: %w", name, err)
			}
			continue
		}
		err = f.Truncate(0)
		if err == nil {
			_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("write pid file: %w", err), f.Close())
		}
		return &pidFile{f}, nil
	}
}

func sameFile(f *os.File, name string) (bool, error) {
	have, err := f.Stat()
	if err != nil {
		return false, err
	}
	there, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return os.SameFile(have, there), nil
}

// release removes the file while it is still locked, then the lock.
func (p *pidFile) release() error {
	return errors.Join(os.Remove(p.file.Name()), p.file.Close())
}

// readPID returns the number in a pid file, 0 if there is no file or no number in it yet.
func readPID(name string) (int, error) {
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read pid file: %w", err)
	}
	s := strings.TrimSpace(string(text))
	if s == "" {
		return 0, nil
	}
	pid, err := strconv.Atoi(s)
	if err != nil || pid < 1 {
		return 0, fmt.Errorf("read pid file %s: %q is no process number", name, s)
	}
	return pid, nil
}
