package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/status"

	pb "github.com/quorate/quorate/proto/quorate/v1"
)

func statusCommand() *cobra.Command {
	var at target
	var format string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "status --address HOST:PORT|--config FILE [-o json]",
		Short: "Show the members of a cluster and how far each is",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := at.complete(); err != nil {
				return err
			}
			print, ok := map[string]func(io.Writer, clusterStatus) error{"table": printTable, "json": printJSON}[format]
			if !ok {
				return usage("output", strconv.Quote(format), "must be table or json")
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			resp, err := askStatus(ctx, at, false)
			if err != nil {
				return fmt.Errorf("get status from %s: %w", at.address, err)
			}
			return print(cmd.OutOrStdout(), newClusterStatus(resp))
		},
	}
	at.flags(cmd)
	cmd.Flags().StringVarP(&format, "output", "o", "table", "`format`: table or json")
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "how long to wait for an answer")
	return cmd
}

// askStatus calls Cluster.Status over a connection of its own.
func askStatus(ctx context.Context, at target, local bool) (*pb.StatusResponse, error) {
	conn, err := at.dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	resp, err := pb.NewClusterClient(conn).Status(ctx, &pb.StatusRequest{Local: local})
	if err != nil {
		s := status.Convert(err)
		return nil, fmt.Errorf("%s (%s)", s.Message(), s.Code())
	}
	return resp, nil
}

// clusterStatus is the JSON form. Scripts read it: fields may be added, never renamed or removed.
type clusterStatus struct {
	Cluster     string         `json:"cluster"`
	Node        uint32         `json:"node"`   // who answered
	Leader      uint32         `json:"leader"` // 0: none known
	Term        uint64         `json:"term"`
	CommitIndex uint64         `json:"commit_index"`
	CSN         uint64         `json:"csn"`
	Members     []memberStatus `json:"members"`
}

type memberStatus struct {
	ID            uint32    `json:"id"`
	Role          string    `json:"role"` // leader, follower, candidate, unknown
	State         string    `json:"state"`
	AcceptsWrites bool      `json:"accepts_writes"`
	Reason        string    `json:"reason"`
	Term          uint64    `json:"term"`
	CommitIndex   uint64    `json:"commit_index"`
	AppliedIndex  uint64    `json:"applied_index"`
	CSN           uint64    `json:"csn"`
	AppliedCSN    uint64    `json:"applied_csn"`
	Lag           uint64    `json:"lag"`
	LastContact   *float64  `json:"last_contact_seconds"` // null: never
	Version       string    `json:"version"`
	Postgres      string    `json:"postgres_version"`
	Addresses     addresses `json:"addresses"`
}

type addresses struct {
	Gateway string `json:"gateway"`
	GRPC    string `json:"grpc"`
	HTTP    string `json:"http"`
	Raft    string `json:"raft"`
}

func newClusterStatus(r *pb.StatusResponse) clusterStatus {
	s := clusterStatus{
		Cluster: r.Cluster, Node: r.Node, Leader: r.Leader, Term: r.Term, CommitIndex: r.CommitIndex, CSN: r.Csn,
		Members: make([]memberStatus, 0, len(r.Members)),
	}
	for _, m := range r.Members {
		got := memberStatus{
			ID: m.Id, Role: roleName(m.Role), State: m.State, AcceptsWrites: m.AcceptsWrites, Reason: m.Reason, Term: m.Term,
			CommitIndex: m.CommitIndex, AppliedIndex: m.AppliedIndex, CSN: m.Csn, AppliedCSN: m.AppliedCsn, Lag: m.Lag,
			Version: m.Version, Postgres: m.PostgresVersion,
			Addresses: addresses{m.GatewayAddress, m.GrpcAddress, m.HttpAddress, m.RaftAddress},
		}
		if m.LastContactMs != nil {
			seconds := float64(*m.LastContactMs) / 1000
			got.LastContact = &seconds
		}
		s.Members = append(s.Members, got)
	}
	return s
}

func roleName(r pb.Role) string {
	if r == pb.Role_ROLE_UNSPECIFIED {
		return "unknown"
	}
	return strings.ToLower(strings.TrimPrefix(r.String(), "ROLE_"))
}

func printJSON(w io.Writer, s clusterStatus) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(s)
}

func printTable(w io.Writer, s clusterStatus) error {
	leader := "no leader known"
	if s.Leader != 0 {
		leader = fmt.Sprintf("leader %d", s.Leader)
	}
	fmt.Fprintf(w, "cluster %s, %s, term %d; asked node %d\n", s.Cluster, leader, s.Term, s.Node)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "node\trole\tstate\twrites\tterm\tapplied\tlag\tgateway\tgRPC\tHTTP\tRaft")
	for _, m := range s.Members {
		writes := "yes"
		if !m.AcceptsWrites {
			writes = "no"
		}
		// What a member that did not answer knows is not known here: no zero that looks like knowledge.
		term, applied, lag := strconv.FormatUint(m.Term, 10), strconv.FormatUint(m.AppliedIndex, 10), strconv.FormatUint(m.Lag, 10)
		if m.Role == "unknown" {
			term, applied, lag = "-", "-", "-"
		}
		fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", m.ID, m.Role, m.State, writes, term, applied, lag,
			m.Addresses.Gateway, m.Addresses.GRPC, m.Addresses.HTTP, m.Addresses.Raft)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, m := range s.Members {
		if m.Reason == "" {
			continue
		}
		heard := ""
		if m.State == "no contact" && m.LastContact != nil {
			heard = fmt.Sprintf(", last heard of %.0f s ago", *m.LastContact)
		}
		if _, err := fmt.Fprintf(w, "node %d: %s%s\n", m.ID, m.Reason, heard); err != nil {
			return err
		}
	}
	return nil
}
