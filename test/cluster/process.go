package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Process is one entry of /proc, read once.
type Process struct {
	PID     int
	Parent  int
	Command string        // the arguments, separated by blanks
	CPU     time.Duration // user and system time so far
	Reaped  time.Duration // the same of its children that have ended, and of theirs
	Zombie  bool
}

// clockTick is the unit of the times in /proc/<pid>/stat: USER_HZ, which is 100 on every Linux that Go runs on.
const clockTick = 10 * time.Millisecond

// ReadProcess reads the process with this id. The error wraps os.ErrNotExist when there is none.
func ReadProcess(pid int) (Process, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if errors.Is(err, syscall.ESRCH) { // it died between open and read
		err = os.ErrNotExist
	}
	if err != nil {
		return Process{}, fmt.Errorf("read process %d: %w", pid, err)
	}
	// The name, in parentheses, may itself hold blanks and parentheses: the fields begin behind the last one.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 15 {
		return Process{}, fmt.Errorf("read process %d: short stat line %q", pid, stat)
	}
	p := Process{PID: pid, Zombie: fields[0] == "Z"}
	parent, err1 := strconv.Atoi(fields[1])
	var ticks [4]int64 // user, system; of reaped children: user, system
	errs := []error{err1}
	for i := range ticks {
		ticks[i], err = strconv.ParseInt(fields[11+i], 10, 64)
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return Process{}, fmt.Errorf("read process %d: %w", pid, err)
	}
	p.Parent = parent
	p.CPU, p.Reaped = time.Duration(ticks[0]+ticks[1])*clockTick, time.Duration(ticks[2]+ticks[3])*clockTick
	command, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err == nil {
		p.Command = strings.TrimSpace(strings.ReplaceAll(string(command), "\x00", " "))
	}
	return p, nil
}

// sharedMemory returns the files of dynamic shared memory that a PostgreSQL process has. One that is gone has none.
func (p Process) sharedMemory() (files []string) {
	maps, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.PID), "maps"))
	for line := range strings.Lines(string(maps)) {
		if at := strings.Index(line, "/dev/shm/PostgreSQL."); at >= 0 && !strings.HasSuffix(line, "(deleted)\n") {
			files = append(files, strings.TrimSpace(line[at:]))
		}
	}
	return files
}

// Processes reads all processes of the machine. Those that end meanwhile are left out.
func Processes() ([]Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var all []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		p, err := ReadProcess(pid)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

// Tree returns root and all its descendants, root first. It is empty when root does not run.
func Tree(root int) ([]Process, error) {
	all, err := Processes()
	if err != nil {
		return nil, err
	}
	var tree []Process
	members := map[int]bool{}
	for _, p := range all {
		if p.PID == root {
			tree, members[root] = append(tree, p), true
		}
	}
	for grown := true; grown; {
		grown = false
		for _, p := range all {
			if members[p.Parent] && !members[p.PID] {
				tree, members[p.PID], grown = append(tree, p), true, true
			}
		}
	}
	return tree, nil
}

// ProcessesUnder returns the processes that belong to a directory: those that work in it or were started with it
// in their arguments. That finds also the ones whose parent is gone. Zombies are left out: they run no more, and
// reaping them is their parent's business.
func ProcessesUnder(dir string) ([]Process, error) {
	all, err := Processes()
	if err != nil {
		return nil, err
	}
	var found []Process
	for _, p := range all {
		if p.Zombie || p.PID == os.Getpid() {
			continue
		}
		// Unreadable (another user's, or gone): then it is none that we started.
		cwd, _ := os.Readlink(filepath.Join("/proc", strconv.Itoa(p.PID), "cwd"))
		if cwd == dir || strings.HasPrefix(cwd, dir+"/") || strings.Contains(p.Command+" ", dir+"/") || strings.Contains(p.Command+" ", dir+" ") {
			found = append(found, p)
		}
	}
	return found, nil
}

// ReadPIDFile returns the process id in the first line of a file such as quorate.pid or postmaster.pid.
func ReadPIDFile(path string) (int, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("read pid file: %w", err)
	}
	line, _, _ := strings.Cut(string(content), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("read pid file %s: %q is no process id", path, line)
	}
	return pid, nil
}

// PeakRSS returns the most resident memory a process ever had, in bytes.
func PeakRSS(pid int) (int64, error) {
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0, fmt.Errorf("read memory of process %d: %w", pid, err)
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("read memory of process %d: %w", pid, err)
			}
			return kib << 10, nil
		}
	}
	return 0, fmt.Errorf("read memory of process %d: no VmHWM line", pid)
}
