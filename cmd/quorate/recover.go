package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/node"
)

func recoverCommand() *cobra.Command {
	var file string
	var force bool
	cmd := &cobra.Command{
		Use:   "recover --force-new-cluster --config FILE",
		Short: "Make a new cluster of one survivor, when the majority is gone for good",
		Long: "Make a new cluster of one survivor, when the majority is gone for good. The node must not run.\n\n" +
			"As long as a majority can come back, let it: nothing is lost then. This goes on with what the survivor's log holds. Transactions\n" +
			"that were acknowledged, and that only the others had, are lost; of several survivors take the one whose log is longest\n" +
			"(\"quorate log\"). The other members can never come back into the new cluster: join new nodes with empty directories.",
		GroupID: groupChange,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if file == "" {
				return usage("config", `""`, "is required")
			}
			if !force {
				return usage("force-new-cluster", "false", "must be given: transactions that only the other members have are lost by it, and those members can never come back")
			}
			cfg, err := config.Load(file)
			if err != nil {
				return err
			}
			pid, err := lockPIDFile(filepath.Join(cfg.DataDir, pidFileName))
			if err != nil {
				return fmt.Errorf("recover: stop the node first: %w", err)
			}
			defer func() { err = errors.Join(err, pid.release()) }()
			last, err := node.ForceNewCluster(cfg, newLogger(cfg.Log, cmd.ErrOrStderr()))
			if err != nil {
				return fmt.Errorf("recover with data_dir %q: %w", cfg.DataDir, err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "a new cluster of this node alone goes on behind log index %d; what others had beyond that is lost.\n"+
				"Start it with: quorate run --config %s\nThe earlier members stay out of it: join new nodes with empty directories.\n", last, file)
			return err
		},
	}
	cmd.Flags().StringVar(&file, "config", os.Getenv("QUORATE_CONFIG"), "configuration `file` of the survivor ($QUORATE_CONFIG)")
	cmd.Flags().BoolVar(&force, "force-new-cluster", false, "really do it")
	return cmd
}
