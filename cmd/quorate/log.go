package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/quorate/quorate/node"
)

func logCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "log --data-dir DIR",
		Short: "Print the transactions in the log of a node that is stopped",
		Long: "Print the transactions in the log of a node that is stopped, in the order of the cluster, as one line of JSON each: " +
			"place in the log, global transaction ID, what it was based on, and the verdict that every node reaches. " +
			"Where the beginning of the log was truncated, it begins behind a snapshot. The last entries may not have been committed.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if dir == "" {
				return usage("data-dir", `""`, "is required: data_dir of the node's configuration")
			}
			if pid, running, err := sidecarOf(dir); err != nil || running {
				return errors.Join(err, fmt.Errorf("read the log of %s: process %d runs there: stop the node first", dir, pid))
			}
			dir, err := filepath.Abs(dir)
			if err != nil {
				return err
			}
			out := bufio.NewWriter(cmd.OutOrStdout())
			defer func() { err = errors.Join(err, out.Flush()) }()
			encoder := json.NewEncoder(out)
			return node.ReadLog(dir, func(r node.LogRecord) error { return encoder.Encode(r) })
		},
	}
	cmd.Flags().StringVar(&dir, "data-dir", "", "data `directory` of the node")
	return cmd
}
