package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// child is a node of the demo: this same program with "run".
type child struct {
	node int
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended; err is set then
	err  error
}

// startChild starts the node of a directory. When it ends it is sent to died as well, which must have room for it.
func startChild(node int, dir string, died chan<- *child) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	c := &child{node: node, log: filepath.Join(dir, "quorate.log"), done: make(chan struct{})}
	out, err := os.OpenFile(c.log, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close() // the child has its own
	c.cmd = exec.Command(self, "run", "--config", filepath.Join(dir, "quorate.yaml"))
	c.cmd.Stdout, c.cmd.Stderr = out, out
	c.cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid:   true,            // the terminal's Ctrl-C is for the demo, which then stops the nodes
		Pdeathsig: syscall.SIGTERM, // a demo that is killed takes its nodes with it, and they their servers
	}
	started := make(chan error)
	go func() {
		// The kernel takes the death of the thread that forked for the parent's: keep it for as long as the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := c.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		c.err = c.cmd.Wait()
		if c.err == nil {
			c.err = errors.New("exit status 0")
		}
		close(c.done)
		died <- c
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return c, nil
}

// terminate asks the node to stop.
func (c *child) terminate() error {
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop node %d: %w", c.node, err)
	}
	return nil
}

// await returns when the node has ended. If that takes too long it is killed.
func (c *child) await(ctx context.Context) error {
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
	}
	err := c.cmd.Process.Kill()
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	<-c.done
	return errors.Join(fmt.Errorf("stop node %d: it had to be killed, its log is %s: %w", c.node, c.log, ctx.Err()), err)
}

// logTail returns the last lines of the node's log.
func (c *child) logTail() string {
	const limit = 3000
	f, err := os.Open(c.log)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err.Error()
	}
	text := make([]byte, min(end, limit))
	if _, err := f.ReadAt(text, end-int64(len(text))); err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(text))
}
