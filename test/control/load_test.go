package control

import (
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"
)

// TestStressStarved: nobody is called lost because the machine has ten times the work that it can do.
func TestStressStarved(t *testing.T) {
	length, err := time.ParseDuration(os.Getenv("QUORATE_STRESS"))
	if err != nil {
		t.Skip("it takes the whole machine; make stress runs it")
	}
	c, ctx := start(t)
	began := time.Now()
	for range 10 * runtime.NumCPU() {
		cmd := exec.CommandContext(ctx, "sh", "-c", "while :; do :; done")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait() // that it was killed is no surprise
		})
	}
	select {
	case <-time.After(min(length, 3*time.Minute)):
	case <-ctx.Done():
		t.Fatal(ctx.Err())
	}
	for _, kind := range []string{"peer_lost", "frozen", "quorum_lost"} {
		var happened struct{ Events []event }
		ask(t, ctx, c, 1, &happened, "events", "--kind", kind, "--since", time.Since(began).String())
		if len(happened.Events) > 0 {
			t.Errorf("under load: %v", happened.Events)
		}
	}
	load, err := os.ReadFile("/proc/loadavg")
	t.Logf("the load was %s %v", load, err)
}
