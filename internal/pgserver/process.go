package pgserver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Postmaster is what postmaster.pid says of a running server.
type Postmaster struct {
	PID       int
	Port      int
	SocketDir string // the first one; empty: none
	Status    string // "starting", "stopping", "ready", "standby"; empty in the first moments
}

// Running reads the postmaster.pid of a data directory. It returns false if there is none, or if it is stale: the
// process is gone, or its number was given to a program that does not live in this directory.
func Running(dataDir string) (Postmaster, bool, error) {
	name := filepath.Join(dataDir, "postmaster.pid")
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return Postmaster{}, false, nil
	}
	if err != nil {
		return Postmaster{}, false, fmt.Errorf("read postmaster.pid: %w", err)
	}
	pm, err := parsePostmaster(string(text))
	if err != nil {
		return Postmaster{}, false, fmt.Errorf("read %s: %w", name, err)
	}
	if pm.PID == 0 {
		return pm, false, nil
	}
	here, err := livesIn(pm.PID, dataDir)
	if err != nil {
		return Postmaster{}, false, fmt.Errorf("examine process %d of %s: %w", pm.PID, name, err)
	}
	return pm, here, nil
}

// parsePostmaster reads the lines pid, data directory, start time, port, socket directory, listen address, shared
// memory key, status. A server that has just started has not written all of them yet; a negative pid is a
// single-user server's.
func parsePostmaster(text string) (Postmaster, error) {
	var pm Postmaster
	line := bufio.NewScanner(strings.NewReader(text))
	for n := 1; line.Scan(); n++ {
		s := strings.TrimSpace(line.Text())
		var number int64
		var err error
		if s != "" && (n == 1 || n == 4) {
			if number, err = strconv.ParseInt(s, 10, 64); err != nil {
				return Postmaster{}, fmt.Errorf("line %d: %w", n, err)
			}
		}
		switch n {
		case 1:
			pm.PID = int(max(number, -number))
		case 4:
			pm.Port = int(number)
		case 5:
			pm.SocketDir = s
		case 8:
			pm.Status = s
		}
	}
	return pm, line.Err()
}

// livesIn reports whether a process exists, is a postgres, and has dir as its working directory, as every process of
// a server of that data directory has.
func livesIn(pid int, dir string) (bool, error) {
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	comm, err := os.ReadFile(filepath.Join(proc, "comm"))
	if gone(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if strings.TrimSpace(string(comm)) != "postgres" {
		return false, nil
	}
	cwd, err := os.Stat(filepath.Join(proc, "cwd"))
	if gone(err) {
		return false, nil // or a zombie, which has no directory any more
	}
	if err != nil {
		return false, err
	}
	home, err := os.Stat(dir)
	if err != nil {
		return false, err
	}
	return os.SameFile(cwd, home), nil
}

func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) }

// processesOf lists the server processes that live in a data directory.
func processesOf(dataDir string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		here, err := livesIn(pid, dataDir)
		if errors.Is(err, fs.ErrPermission) {
			continue // another user's server cannot be ours
		}
		if err != nil {
			return nil, fmt.Errorf("examine process %d: %w", pid, err)
		}
		if here {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// awaitReaped waits until a postmaster that was killed is no process any more. One that is dying, or whose parent has
// not asked for its status yet, holds nothing, but a new server would take its number for that of a living one.
func awaitReaped(ctx context.Context, dataDir string, grace time.Duration) error {
	pm, running, err := Running(dataDir)
	if err != nil || running || pm.PID == 0 {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	ticker := time.NewTicker(2 * time.Millisecond) // nothing tells when a process is reaped
	defer ticker.Stop()
	for {
		comm, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pm.PID), "comm"))
		if gone(err) || err == nil && strings.TrimSpace(string(comm)) != "postgres" {
			return nil
		}
		if here, err := livesIn(pm.PID, dataDir); err != nil || here {
			return err
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil // the server will say what it thinks of it
		}
	}
}

// endOrphans waits until the backends of a postmaster that died are gone. They notice by themselves, except those
// that wait for a client that does not read; after grace these are killed, which is safe, as the server has to go
// through crash recovery anyway, and necessary, as no new server starts beside them.
func endOrphans(ctx context.Context, dataDir string, grace time.Duration) error {
	patience, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	for _, limit := range []context.Context{patience, ctx} {
		pids, err := processesOf(dataDir)
		if err != nil {
			return err
		}
		for _, pid := range pids {
			p, err := openProcess(pid)
			if err != nil {
				return err
			}
			if limit == ctx {
				err = p.signal(unix.SIGKILL)
			}
			if err == nil {
				err = p.await(limit)
			}
			p.close()
			if err != nil && (limit == ctx || ctx.Err() != nil) {
				return fmt.Errorf("end orphaned server process %d: %w", pid, err)
			}
		}
	}
	return nil
}

// process is a pidfd: a name for one process that, unlike its number, is never given to another.
type process struct{ file *os.File } // nil: it was gone when opened

func openProcess(pid int) (process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return process{}, nil
	}
	if err != nil {
		return process{}, fmt.Errorf("open process %d: %w", pid, err)
	}
	// Non-blocking, so that the runtime's poller watches it and waiting costs no thread.
	return process{os.NewFile(uintptr(fd), "pidfd")}, nil
}

func (p process) close() {
	if p.file != nil {
		_ = p.file.Close() // nothing was written
	}
}

// signal does nothing to a process that has ended.
func (p process) signal(s unix.Signal) error {
	if p.file == nil {
		return nil
	}
	conn, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	if err := conn.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), s, nil, 0) }); err != nil {
		return err
	}
	if errors.Is(sent, unix.ESRCH) {
		return nil
	}
	return sent
}

// await returns when the process has ended, or with the error of ctx. Not for two goroutines at once.
func (p process) await(ctx context.Context) error {
	if p.file == nil {
		return nil
	}
	if err := p.file.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = p.file.SetReadDeadline(time.Unix(1, 0)) }) // wakes the Read below
	defer stop()
	conn, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	err = conn.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err == nil && n == 1
	})
	if ctx.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		return ctx.Err()
	}
	return err
}
