package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/status"

	pb "github.com/quorate/quorate/proto/quorate/v1"
)

func verifyCommand() *cobra.Command {
	var at target
	var format string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "verify --address HOST:PORT|--config FILE [-o json]",
		Short: "Compare the rows of all tables on all members",
		Long: "Compare the rows of all replicated tables on all members, as of one place in the log, while clients go on. " +
			"It reads every table once, on every member. The exit code is 0 only if all members took part and have the same rows.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := at.complete(); err != nil {
				return err
			}
			print, ok := map[string]func(io.Writer, verification) error{"table": printVerification, "json": printVerificationJSON}[format]
			if !ok {
				return usage("output", strconv.Quote(format), "must be table or json")
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			resp, err := askVerify(ctx, at)
			if err != nil {
				return fmt.Errorf("verify by way of %s: %w", at.address, err)
			}
			v := newVerification(resp)
			return errors.Join(print(cmd.OutOrStdout(), v), v.err())
		},
	}
	at.flags(cmd)
	cmd.Flags().StringVarP(&format, "output", "o", "table", "`format`: table or json")
	cmd.Flags().DurationVar(&timeout, "timeout", time.Hour, "how long reading all tables may take")
	return cmd
}

// askVerify calls Cluster.Verify over a connection of its own.
func askVerify(ctx context.Context, at target) (*pb.VerifyResponse, error) {
	conn, err := at.dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	resp, err := pb.NewClusterClient(conn).Verify(ctx, &pb.VerifyRequest{})
	if err != nil {
		s := status.Convert(err)
		return nil, fmt.Errorf("%s (%s)", s.Message(), s.Code())
	}
	return resp, nil
}

// verification is the JSON form. Scripts read it: fields may be added, never renamed or removed.
type verification struct {
	Index     uint64           `json:"index"` // the place in the log
	CSN       uint64           `json:"csn"`
	Differing []string         `json:"differing"` // tables
	Members   []verifiedMember `json:"members"`
}

type verifiedMember struct {
	ID     uint32          `json:"id"`
	Error  string          `json:"error"` // why it did not take part
	Tables []verifiedTable `json:"tables"`
}

type verifiedTable struct {
	Name string `json:"name"`
	Rows uint64 `json:"rows"`
	Hash string `json:"hash"`
}

func newVerification(r *pb.VerifyResponse) verification {
	v := verification{Index: r.Index, CSN: r.Csn, Differing: append([]string{}, r.Differing...), Members: []verifiedMember{}}
	for _, m := range r.Members {
		got := verifiedMember{ID: m.Id, Error: m.Error, Tables: []verifiedTable{}}
		for _, t := range m.Tables {
			got.Tables = append(got.Tables, verifiedTable{t.Name, t.Rows, t.Hash})
		}
		v.Members = append(v.Members, got)
	}
	return v
}

// err says what is not as it should be.
func (v verification) err() error {
	var errs []error
	if len(v.Differing) > 0 {
		errs = append(errs, fmt.Errorf("members differ in %s", strings.Join(v.Differing, ", ")))
	}
	for _, m := range v.Members {
		if m.Error != "" {
			errs = append(errs, fmt.Errorf("node %d did not take part: %s", m.ID, m.Error))
		}
	}
	return errors.Join(errs...)
}

func printVerificationJSON(w io.Writer, v verification) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// printVerification shows the tables that differ, as each member has them.
func printVerification(w io.Writer, v verification) error {
	tables, rows, members := 0, uint64(0), 0
	for _, m := range v.Members {
		if m.Error != "" {
			continue
		}
		members++
		tables = max(tables, len(m.Tables))
		sum := uint64(0)
		for _, t := range m.Tables {
			sum += t.Rows
		}
		rows = max(rows, sum)
	}
	if _, err := fmt.Fprintf(w, "log index %d, CSN %d: %d members, %d tables, %d rows, %d tables differ\n",
		v.Index, v.CSN, members, tables, rows, len(v.Differing)); err != nil || len(v.Differing) == 0 {
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "TABLE\tNODE\tROWS\tHASH")
	for _, name := range v.Differing {
		for _, m := range v.Members {
			if m.Error != "" {
				continue
			}
			shown := verifiedTable{Hash: "missing"}
			if at := slices.IndexFunc(m.Tables, func(t verifiedTable) bool { return t.Name == name }); at >= 0 {
				shown = m.Tables[at]
			}
			fmt.Fprintf(t, "%s\t%d\t%d\t%s\n", name, m.ID, shown.Rows, shown.Hash)
		}
	}
	return t.Flush()
}
