package main

import (
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// timerSlack is how late the kernel may wake up a thread that sleeps. Go's scheduler has a thread that sleeps 20 µs at a
// time while anything runs, and a node, which mostly waits for others, has it run without end: with Linux's 50 µs of slack
// it and the switches that it causes are half of the sidecar's processor time. No timer of ours minds a millisecond.
const timerSlack = time.Millisecond

// relaxTimers gives every thread of this process timerSlack. A thread inherits it from the one that starts it, and Go has
// started threads before main runs; so the process begins once more, as the same process, now with what a thread keeps across
// execve. Children inherit it too; those that should not are given their own. See prctl(2), PR_SET_TIMERSLACK.
func relaxTimers() error {
	runtime.LockOSThread() // the slack is this thread's
	defer runtime.UnlockOSThread()
	now, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil {
		return fmt.Errorf("read timer slack: %w", err)
	}
	if time.Duration(now) >= timerSlack {
		return nil // we have begun once more, or somebody wants it so
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(timerSlack), 0, 0, 0); err != nil {
		return fmt.Errorf("set timer slack: %w", err)
	}
	return fmt.Errorf("begin once more with more timer slack: %w", unix.Exec(self, os.Args, os.Environ()))
}
