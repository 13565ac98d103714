package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	pb "github.com/quorate/quorate/proto/quorate/v1"
)

func statusCommand() *cobra.Command {
	var a asking
	var check bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show on one screen how the cluster is",
		Long: "Ask a node, and by way of it all members, how they are. A member that does not answer within a second is shown as such.\n\n" +
			"With --check the exit code is 0 if all members are active, 3 if some are not, and 4 if the asked node cannot take writes for lack of a quorum.",
		GroupID: groupLook,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var s clusterStatus
			err := a.ask(cmd.Context(), "get status", func(ctx context.Context, conn *grpc.ClientConn) error {
				resp, err := pb.NewClusterClient(conn).Status(ctx, &pb.StatusRequest{})
				if err != nil {
					return err
				}
				s = newClusterStatus(resp)
				if s.view, err = firstView(ctx, conn); err != nil {
					return err
				}
				return a.write(cmd.OutOrStdout(), s, s.show)
			})
			if err == nil && check {
				return s.check()
			}
			return err
		},
	}
	a.flags(cmd)
	cmd.Flags().BoolVar(&check, "check", false, "let the exit code tell whether all is well")
	return cmd
}

// errDegraded and errNoQuorum have exit codes of their own.
var (
	errDegraded = errors.New("not all members are active")
	errNoQuorum = errors.New("no quorum")
)

// check says what is not as it should be.
func (s clusterStatus) check() error {
	if !s.quorum() {
		return errNoQuorum
	}
	for _, m := range s.Members {
		if m.State != "active" {
			return fmt.Errorf("%w: node %d is %s", errDegraded, m.ID, m.State)
		}
	}
	return nil
}

// quorum reports whether the asked node is in contact with a majority.
func (s clusterStatus) quorum() bool {
	for _, m := range s.Members {
		if m.ID == s.Node {
			return m.Health != nil && m.Health.Quorum
		}
	}
	return false
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
	MaxNodes    uint32         `json:"max_nodes"` // with data, at a time; 0: not known yet
	Members     []memberStatus `json:"members"`

	view *pb.View // who votes, and is heard
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
	AppliedCSN    *uint64   `json:"applied_csn"` // null, and lag too: it holds no data, or did not answer
	Lag           *uint64   `json:"lag"`
	LastContact   *float64  `json:"last_contact_seconds"` // null: never
	Version       string    `json:"version"`
	Postgres      string    `json:"postgres_version"`
	Addresses     addresses `json:"addresses"`
	// null if it did not answer
	Health *healthForm `json:"health"`
	Hears  []heardForm `json:"hears"`
}

type addresses struct {
	Gateway string `json:"gateway"`
	GRPC    string `json:"grpc"`
	HTTP    string `json:"http"`
	Raft    string `json:"raft"`
}

func newClusterStatus(r *pb.StatusResponse) clusterStatus {
	s := clusterStatus{
		Cluster: r.Cluster, Node: r.Node, Leader: r.Leader, Term: r.Term, CommitIndex: r.CommitIndex, CSN: r.Csn, MaxNodes: r.MaxNodes,
		Members: make([]memberStatus, 0, len(r.Members)),
	}
	for _, m := range r.Members {
		got := memberStatus{
			ID: m.Id, Role: roleName(m.Role), State: m.State, AcceptsWrites: m.AcceptsWrites, Reason: m.Reason, Term: m.Term,
			CommitIndex: m.CommitIndex, AppliedIndex: m.AppliedIndex, CSN: m.Csn, AppliedCSN: m.AppliedCsn, Lag: m.Lag,
			Version: m.Version, Postgres: m.PostgresVersion,
			Addresses: addresses{m.GatewayAddress, m.GrpcAddress, m.HttpAddress, m.RaftAddress},
			Health:    newHealthForm(m.Health), Hears: newHeardForms(m.Hears),
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

// show puts it on one screen.
func (s clusterStatus) show(to *screen) {
	to.line(cell{text: "cluster " + s.Cluster, style: bold}, text(", "), quorumCell(s.quorum(), int(s.view.GetVotersHeard()), int(s.view.GetVoters())), text(", "), leaderCell(s.Leader),
		text(fmt.Sprintf(", term %d; asked node %d", s.Term, s.Node)))
	var rows [][]cell
	for _, m := range s.Members {
		row := []cell{number(m.ID), text(m.Role), {text: m.State, style: stateStyle(m.State)}, yesNo(m.AcceptsWrites)}
		if m.Role == "unknown" { // what a member that did not answer knows is not known here
			row = append(row, unknown(), unknown(), unknown(), unknown())
		} else {
			commits := unknown()
			if m.Health != nil {
				commits = rate(m.Health.CommitsPerSecond)
			}
			appliedIndex := &m.AppliedIndex
			if m.AppliedCSN == nil {
				appliedIndex = nil
			}
			row = append(row, number(m.Term), maybe(appliedIndex), maybe(m.Lag), commits)
		}
		rows = append(rows, append(row, text(dash(m.Postgres)), text(dash(m.Addresses.Gateway)), text(dash(m.Addresses.HTTP))))
	}
	to.table([]string{"node", "role", "state", "writes", "term", "applied", "lag", "commits/s", "server", "gateway", "HTTP"}, rows)
	for _, m := range s.Members {
		if m.Reason == "" {
			continue
		}
		heard := ""
		if m.State == "no contact" && m.LastContact != nil {
			heard = fmt.Sprintf(", last heard of %.0f s ago", *m.LastContact)
		}
		to.printf("node %d: %s%s", m.ID, m.Reason, heard)
	}
}
