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
var nodeCommands = []string{"run", "join"}

// Exit codes: scripts tell a mistake of theirs from a failure.
const (
	exitOK      = 0
	exitFailure = 1 // what was asked for could not be done
	exitUsage   = 2 // the command line or the configuration is wrong; nothing was touched

	// Of status --check.
	exitDegraded = 3 // the cluster works, and not all members do
	exitNoQuorum = 4 // the cluster takes no writes by way of the asked node
)

// run is the whole program. The first SIGINT or SIGTERM ends the command in good order, one more than a second
// later the process.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	// Some time later a signal does what it does by default. Not at once: one wish to stop may come as several signals,
	// from the kernel too, which tells a child of the death of each thread of its parent.
	context.AfterFunc(ctx, func() { time.AfterFunc(time.Second, stop) })

	root := rootCommand()
	understood := false // whether the command line made sense
	root.PersistentPreRun = func(*cobra.Command, []string) { understood = true }
	root.SetArgs(append([]string{}, args...)) // nil would mean the arguments of the process
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(stderr, "quorate:", err)
	var wrong *config.Error
	switch {
	case errors.Is(err, errDegraded):
		return exitDegraded
	case errors.Is(err, errNoQuorum):
		return exitNoQuorum
	}
	if !understood || errors.As(err, &wrong) || errors.Is(err, errUsage) {
		return exitUsage
	}
	return exitFailure
}

// rootCommand returns the command with all commands below it.
func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "quorate",
		Short: "Synchronous multimaster for stock PostgreSQL",
		Long: "Quorate makes several stock PostgreSQL servers one synchronous multimaster cluster. Beside each server runs \"quorate run\"; clients connect " +
			"to its gateway with any PostgreSQL driver.\n\n" +
			"Commands that look at or act on a cluster ask one node, any will do. Which one, they take from --address or $QUORATE_ADDRESS (its gRPC address), " +
			"or from --config or $QUORATE_CONFIG (its configuration file).\n\n" +
			"Exit codes: 0 done; 1 it could not be done; 2 the command line or the configuration is wrong, and nothing was touched; and of \"status --check\" " +
			"3 not all members are active, 4 no quorum.",
		Example: "  quorate demo                                  # three nodes on this machine, to try things out\n" +
			"  quorate status --address 127.0.0.1:6201       # how are they?\n" +
			"  quorate watch --address 127.0.0.1:6201        # the same, live\n" +
			"  source <(quorate completion bash)             # let the shell complete commands and flags",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddGroup(&cobra.Group{ID: groupLook, Title: "Look at a cluster:"}, &cobra.Group{ID: groupChange, Title: "Change a cluster:"})
	root.AddCommand(
		initCommand(),
		joinCommand(),
		runCommand(),
		doctorCommand(),
		demoCommand(),
		statusCommand(),
		watchCommand(),
		nodesCommand(),
		heartbeatsCommand(),
		transactionsCommand(),
		conflictsCommand(),
		eventsCommand(),
		verifyCommand(),
		leaveCommand(),
		removeCommand(),
		drainCommand(),
		resumeCommand(),
		transferLeadershipCommand(),
		promoteCommand(),
		demoteCommand(),
		resyncCommand(),
		recoverCommand(),
		certCommand(),
		httpTokenCommand(),
		tokenCommand(),
		logCommand(),
		versionCommand(),
	)
	showExamples(root)
	return root
}

// The groups of commands, in the help.
const (
	groupLook   = "look"   // change nothing
	groupChange = "change" // the members
)

// errUsage marks a command line that parses but makes no sense.
var errUsage = errors.New("wrong usage")

func usage(flag, value, format string, args ...any) error {
	return fmt.Errorf("%w: --%s %s: %s", errUsage, flag, value, fmt.Sprintf(format, args...))
}
