package main

import (
	"context"
	"fmt"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/status"

	pb "github.com/quorate/quorate/proto/quorate/v1"
)

func tokenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Make, list and take back the tokens by which nodes join",
	}
	cmd.AddCommand(tokenCreateCommand(), tokenListCommand(), tokenRevokeCommand())
	return cmd
}

// askTokens makes a command that calls the service.
func askTokens(cmd *cobra.Command, check func(args []string) error, call func(context.Context, pb.TokensClient, []string) error) *cobra.Command {
	var at target
	var timeout time.Duration
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := check(args); err != nil {
			return err
		}
		conn, err := at.dial()
		if err != nil {
			return err
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
		defer cancel()
		if err := call(ctx, pb.NewTokensClient(conn), args); err != nil {
			s := status.Convert(err)
			return fmt.Errorf("ask %s: %s (%s)", at.address, s.Message(), s.Code())
		}
		return nil
	}
	at.flags(cmd)
	cmd.Flags().DurationVar(&timeout, "timeout", 10*time.Second, "how long to wait for an answer")
	return cmd
}

func nothingToCheck([]string) error { return nil }

func tokenCreateCommand() *cobra.Command {
	var ttl time.Duration
	var uses uint32
	cmd := &cobra.Command{
		Use:   "create [--ttl 1h] [--uses 1]",
		Short: "Make a token and print it: it is not shown again",
		Args:  cobra.NoArgs,
	}
	askTokens(cmd, func([]string) error {
		if ttl < time.Second {
			return usage("ttl", ttl.String(), "must be at least 1s")
		}
		return nil
	}, func(ctx context.Context, c pb.TokensClient, _ []string) error {
		resp, err := c.Create(ctx, &pb.CreateTokenRequest{TtlSeconds: uint64(ttl / time.Second), Uses: uses})
		if err != nil {
			return err
		}
		fmt.Fprintln(cmd.OutOrStdout(), resp.Secret)
		fmt.Fprintf(cmd.ErrOrStderr(), "valid until %s, for %d nodes. On the new node: quorate join --config FILE --peer HOST:PORT --token TOKEN\n",
			expiry(resp.Token), resp.Token.UsesLeft)
		return nil
	})
	cmd.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it is valid, at most 720h")
	cmd.Flags().Uint32Var(&uses, "uses", 1, "how many nodes may join by it")
	return cmd
}

func expiry(t *pb.Token) string { return time.Unix(int64(t.ExpiresUnix), 0).Format(time.RFC3339) }

func tokenListCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "list", Short: "Show the tokens there are, without what makes them valid", Args: cobra.NoArgs}
	return askTokens(cmd, nothingToCheck, func(ctx context.Context, c pb.TokensClient, _ []string) error {
		resp, err := c.List(ctx, &pb.ListTokensRequest{})
		if err != nil {
			return err
		}
		t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "id\tuses left\texpires")
		for _, token := range resp.Tokens {
			when := expiry(token)
			if time.Now().Unix() >= int64(token.ExpiresUnix) {
				when += " (expired)"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\n", token.Id, strconv.FormatUint(uint64(token.UsesLeft), 10), when)
		}
		return t.Flush()
	})
}

func tokenRevokeCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "revoke ID", Short: "Take a token back: nobody joins by it any more", Args: cobra.ExactArgs(1)}
	return askTokens(cmd, nothingToCheck, func(ctx context.Context, c pb.TokensClient, args []string) error {
		_, err := c.Revoke(ctx, &pb.RevokeTokenRequest{Id: args[0]})
		return err
	})
}
