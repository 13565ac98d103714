package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/quorate/quorate/internal/authz"
	"github.com/quorate/quorate/internal/pki"
)

func httpTokenCommand() *cobra.Command {
	var name, role, file string
	cmd := &cobra.Command{
		Use:   "http-token --name NAME --role read|operate --file FILE",
		Short: "Let a person or a program look, or act, over HTTP",
		Long: "Let a person or a program look, or act, over HTTP: draw a token, add its hash to a node's file of tokens (http.tokens in the\n" +
			"configuration) and print the token, which is kept nowhere. Give all nodes the same file. They read it again when it changes; a\n" +
			"line that is taken out is a token that is not valid any more.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if file == "" {
				return usage("file", `""`, "is required: the file that http.tokens names")
			}
			r, err := pki.ParseRole(role)
			if err != nil || r == pki.Node {
				return usage("role", strconv.Quote(role), "must be read or operate")
			}
			token, line, err := authz.NewToken(r, name)
			if err != nil {
				return usage("name", strconv.Quote(name), "%v", err)
			}
			f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
			if err != nil {
				return fmt.Errorf("add token: %w", err)
			}
			_, err = f.WriteString(line)
			if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
				return fmt.Errorf("add token: %w", err)
			}
			fmt.Fprintln(cmd.OutOrStdout(), token)
			fmt.Fprintf(cmd.ErrOrStderr(), "added to %s. Use it as \"Authorization: Bearer TOKEN\", or to log in to the page; it is not shown again\n", file)
			return nil
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "whose `name` is shown in logs (required)")
	cmd.Flags().StringVar(&role, "role", "", "`role`: read or operate (required)")
	_ = cmd.RegisterFlagCompletionFunc("role", cobra.FixedCompletions([]string{"read", "operate"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.Flags().StringVar(&file, "file", "", "the `file` of tokens, made where missing (required)")
	return cmd
}
