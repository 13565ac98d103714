package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/node"
)

// doctorTimeout bounds a whole examination.
const doctorTimeout = time.Minute

func doctorCommand() *cobra.Command {
	var file, format string
	cmd := &cobra.Command{
		Use:   "doctor --config FILE [-o json]",
		Short: "Check what a node needs, before it runs or while it does",
		Long: "Check everything that init, join and run need: PostgreSQL's programs and settings, what is in the database, disk space, " +
			"ports, addresses, certificates. Nothing is changed. What is wrong comes with the command that mends it. " +
			"The exit code is 0 if there are no errors; warnings are no errors.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if file == "" {
				return usage("config", `""`, "is required")
			}
			print, ok := map[string]func(io.Writer, []node.Finding) error{"table": printFindings, "json": printFindingsJSON}[format]
			if !ok {
				return usage("output", strconv.Quote(format), "must be table or json")
			}
			cfg, err := config.Load(file)
			if err != nil {
				return err
			}
			_, running, err := sidecarOf(cfg.DataDir)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), doctorTimeout)
			defer cancel()
			findings := node.Examine(ctx, cfg, running)
			if err := print(cmd.OutOrStdout(), findings); err != nil {
				return err
			}
			wrong := 0
			for _, f := range findings {
				if f.Level == node.LevelError {
					wrong++
				}
			}
			if wrong > 0 {
				return fmt.Errorf("%d things must be mended", wrong)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration `file`")
	cmd.Flags().StringVarP(&format, "output", "o", "table", "`format`: table or json")
	return cmd
}

// printFindings writes a line for each finding, and what to do about it indented below.
func printFindings(w io.Writer, findings []node.Finding) error {
	var b strings.Builder
	for _, f := range findings {
		fmt.Fprintf(&b, "%-7s  %s: %s\n", f.Level, f.Check, strings.ReplaceAll(f.What, "\n", "\n         "))
		if f.Fix != "" {
			fmt.Fprintf(&b, "         to mend it: %s\n", f.Fix)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// finding is the JSON form. Scripts read it: fields may be added, never renamed or removed.
type finding struct {
	Check string `json:"check"`
	Level string `json:"level"` // ok, warning, error
	What  string `json:"what"`
	Fix   string `json:"fix"`
}

func printFindingsJSON(w io.Writer, findings []node.Finding) error {
	out := []finding{}
	for _, f := range findings {
		out = append(out, finding{f.Check, string(f.Level), f.What, f.Fix})
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(out)
}
