package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/status"

	pb "github.com/quorate/quorate/proto/quorate/v1"
)

// askMembership makes a command that calls the service. said returns what to print afterwards. It returns whom the command asks.
func askMembership(cmd *cobra.Command, timeout time.Duration, call func(context.Context, pb.MembershipClient, []string) (said string, err error)) *target {
	at := new(target)
	cmd.GroupID = groupChange
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		conn, err := at.dial()
		if err != nil {
			return err
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
		defer cancel()
		said, err := call(ctx, pb.NewMembershipClient(conn), args)
		if err != nil {
			s := status.Convert(err)
			return fmt.Errorf("ask %s: %s (%s)", at.address, s.Message(), s.Code())
		}
		_, err = fmt.Fprintln(cmd.OutOrStdout(), said)
		return err
	}
	at.flags(cmd)
	cmd.Flags().DurationVar(&timeout, "timeout", timeout, "how long to wait for an answer")
	return at
}

// completeNodes offers the members to a shell, if the node that the command would ask tells them at once.
func (t *target) completeNodes(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	const none = cobra.ShellCompDirectiveNoFileComp
	if len(args) > 0 {
		return nil, none
	}
	conn, err := t.dial()
	if err != nil {
		return nil, none // the command itself will say what is wrong
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), time.Second)
	defer cancel()
	list, err := pb.NewMembershipClient(conn).List(ctx, &pb.ListMembersRequest{})
	if err != nil {
		return nil, none
	}
	var all []cobra.Completion
	for _, m := range list.Members {
		all = append(all, cobra.CompletionWithDesc(strconv.FormatUint(uint64(m.Id), 10), m.GrpcAddress))
	}
	return all, none
}

// nodeArgument reads a node's id.
func nodeArgument(text string) (uint32, error) {
	id, err := strconv.ParseUint(text, 10, 32)
	if err != nil || id == 0 {
		return 0, fmt.Errorf("%w: %q is not the id of a node; \"quorate status\" shows them", errUsage, text)
	}
	return uint32(id), nil
}

// aboutNode makes a command about one node, which is its argument.
func aboutNode(cmd *cobra.Command, timeout time.Duration, call func(context.Context, pb.MembershipClient, uint32) (string, error)) *cobra.Command {
	cmd.Args = cobra.ExactArgs(1)
	at := askMembership(cmd, timeout, func(ctx context.Context, c pb.MembershipClient, args []string) (string, error) {
		id, err := nodeArgument(args[0])
		if err != nil {
			return "", err
		}
		return call(ctx, c, id)
	})
	cmd.ValidArgsFunction = at.completeNodes
	ask := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if _, err := nodeArgument(args[0]); err != nil {
			return err // without a connection
		}
		return ask(cmd, args)
	}
	return cmd
}

const changeTimeout = 30 * time.Second

func removeCommand() *cobra.Command {
	var force bool
	var reason string
	cmd := aboutNode(&cobra.Command{
		Use:   "remove NODE [--force]",
		Short: "Take a node out of the cluster for good, whether it runs or not",
		Long: "Take a node out of the cluster for good, whether it runs or not. Its id is never used again; it can come back as a new node only.\n" +
			"Clients that are connected to it are cut off: use \"quorate leave\" for a node that works. What would leave less than a majority\n" +
			"of the remaining voters alive, or no active node with data, is refused, unless forced.",
	}, changeTimeout, func(ctx context.Context, c pb.MembershipClient, id uint32) (string, error) {
		_, err := c.Remove(ctx, &pb.RemoveRequest{Node: id, Force: force, Reason: reason})
		return fmt.Sprintf("node %d is removed", id), err
	})
	cmd.Flags().BoolVar(&force, "force", false, "also if the cluster stands still without the node")
	cmd.Flags().StringVar(&reason, "reason", "", "`text` for the log")
	return cmd
}

func leaveCommand() *cobra.Command {
	var force bool
	var patience time.Duration
	cmd := aboutNode(&cobra.Command{
		Use:   "leave NODE [--patience 30s]",
		Short: "Drain a node, and then take it out of the cluster for good",
	}, time.Hour, func(ctx context.Context, c pb.MembershipClient, id uint32) (string, error) {
		_, err := c.Leave(ctx, &pb.LeaveRequest{Node: id, Force: force, TimeoutMs: uint64(patience.Milliseconds())})
		return fmt.Sprintf("node %d has left the cluster; stop it, and remove its data_dir when you do not need it any more", id), err
	})
	cmd.Flags().BoolVar(&force, "force", false, "also if the cluster stands still without the node")
	cmd.Flags().DurationVar(&patience, "patience", 30*time.Second, "how long transactions have to end")
	return cmd
}

func drainCommand() *cobra.Command {
	var patience time.Duration
	cmd := aboutNode(&cobra.Command{
		Use:   "drain NODE [--patience 30s]",
		Short: "Send a node's clients away and hand leadership over, for maintenance",
		Long: "Send a node's clients away and hand leadership over, for maintenance. Idle sessions end at once, the others at the end of their\n" +
			"transaction, or when --patience is over. The node goes on to vote and to apply. \"quorate resume\" lets clients in again, and so does\n" +
			"a restart of the node.",
	}, time.Hour, func(ctx context.Context, c pb.MembershipClient, id uint32) (string, error) {
		resp, err := c.Drain(ctx, &pb.DrainRequest{Node: id, TimeoutMs: uint64(patience.Milliseconds())})
		if resp.GetCutOff() {
			return fmt.Sprintf("node %d is drained; transactions that took longer than %v were cut off", id, patience), err
		}
		return fmt.Sprintf("node %d is drained", id), err
	})
	cmd.Flags().DurationVar(&patience, "patience", 30*time.Second, "how long transactions have to end")
	return cmd
}

func resumeCommand() *cobra.Command {
	return aboutNode(&cobra.Command{Use: "resume NODE", Short: "Let clients of a drained node in again"}, changeTimeout,
		func(ctx context.Context, c pb.MembershipClient, id uint32) (string, error) {
			_, err := c.Resume(ctx, &pb.ResumeRequest{Node: id})
			return fmt.Sprintf("node %d takes clients", id), err
		})
}

func promoteCommand() *cobra.Command {
	return aboutNode(&cobra.Command{Use: "promote NODE", Short: "Give a member a vote"}, changeTimeout,
		func(ctx context.Context, c pb.MembershipClient, id uint32) (string, error) {
			_, err := c.Promote(ctx, &pb.PromoteRequest{Node: id})
			return fmt.Sprintf("node %d has a vote", id), err
		})
}

func demoteCommand() *cobra.Command {
	var force bool
	cmd := aboutNode(&cobra.Command{Use: "demote NODE [--force]", Short: "Take a member's vote: it follows, and commits do not wait for it"}, changeTimeout,
		func(ctx context.Context, c pb.MembershipClient, id uint32) (string, error) {
			_, err := c.Demote(ctx, &pb.DemoteRequest{Node: id, Force: force})
			return fmt.Sprintf("node %d has no vote", id), err
		})
	cmd.Flags().BoolVar(&force, "force", false, "also if the cluster stands still without its vote")
	return cmd
}

func resyncCommand() *cobra.Command {
	return aboutNode(&cobra.Command{
		Use:   "resync NODE",
		Short: "Have a node set its data aside and copy those of another",
		Long: "Have a node set its data aside and copy those of another. It joins the cluster anew, with another id, in its own place. That is\n" +
			"what becomes of a node that has diverged, or was set back to a backup. A node that was away for too long does it by itself.",
	}, changeTimeout, func(ctx context.Context, c pb.MembershipClient, id uint32) (string, error) {
		_, err := c.Resync(ctx, &pb.ResyncRequest{Node: id})
		return fmt.Sprintf("node %d joins the cluster anew; \"quorate status\" shows how far it is", id), err
	})
}

func transferLeadershipCommand() *cobra.Command {
	var to uint32
	cmd := &cobra.Command{Use: "transfer-leadership [--to NODE]", Short: "Let another voter lead", Args: cobra.NoArgs}
	at := askMembership(cmd, changeTimeout, func(ctx context.Context, c pb.MembershipClient, _ []string) (string, error) {
		resp, err := c.TransferLeadership(ctx, &pb.TransferLeadershipRequest{To: to})
		return fmt.Sprintf("node %d leads", resp.GetLeader()), err
	})
	cmd.Flags().Uint32Var(&to, "to", 0, "the `node` that is to lead (default: whoever has most of the log)")
	_ = cmd.RegisterFlagCompletionFunc("to", at.completeNodes) // the only error is that there is no such flag
	return cmd
}
