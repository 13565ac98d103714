// Command quorate runs a node of a cluster, starts a cluster to try things out, and shows how a cluster is.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/quorate/quorate/internal/config"
)

func main() {
	if len(os.Args) > 1 && slices.Contains(nodeCommands, os.Args[1]) {
		if err := relaxTimers(); err != nil {
			fmt.Fprintln(os.Stderr, "quorate: timers stay as they are:", err) // slower, and nothing else
		}
	}
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

// nodeCommands become a node and stay one.
var nodeCommands = []string{"run"}

// Exit codes: scripts tell a mistake of theirs from a failure.
const (
	exitOK      = 0
	exitFailure = 1 // what was asked for could not be done
	exitUsage   = 2 // the command line or the configuration is wrong; nothing was touched
)

// run is the whole program. The first SIGINT or SIGTERM ends the command in good order, one more than a second
// later the process.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	// Some time later a signal does what it does by default. Not at once: one wish to stop may come as several signals,
	// from the kernel too, which tells a child of the death of each thread of its parent.
	context.AfterFunc(ctx, func() { time.AfterFunc(time.Second, stop) })

	understood := false // whether the command line made sense
	root := &cobra.Command{
		Use:               "quorate",
		Short:             "Synchronous multimaster for stock PostgreSQL",
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		PersistentPreRun:  func(*cobra.Command, []string) { understood = true },
	}
	root.SetArgs(append([]string{}, args...)) // nil would mean the arguments of the process
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.AddCommand(runCommand(), demoCommand(), statusCommand(), verifyCommand(), certCommand(), httpTokenCommand(), tokenCommand(), versionCommand())
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(stderr, "quorate:", err)
	var wrong *config.Error
	if !understood || errors.As(err, &wrong) || errors.Is(err, errUsage) {
		return exitUsage
	}
	return exitFailure
}

// errUsage marks a command line that parses but makes no sense.
var errUsage = errors.New("wrong usage")

func usage(flag, value, format string, args ...any) error {
	return fmt.Errorf("%w: --%s %s: %s", errUsage, flag, value, fmt.Sprintf(format, args...))
}
