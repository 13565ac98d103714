package node

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/admin"
	"github.com/quorate/quorate/dashboard"
	"github.com/quorate/quorate/gateway"
	"github.com/quorate/quorate/internal/authz"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/internal/pki"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// openDashboard serves the page to those whom guard lets look.
func (n *Node) openDashboard(mux *http.ServeMux, guard *authz.HTTP) error {
	source := &shown{n: n, gatherer: newGatherer(n)}
	c := dashboard.Config{
		Source: source, Logger: n.log.With(logkey.Component, "dashboard"),
		Role: func(r *http.Request) dashboard.Role {
			switch role := guard.Caller(r).Role; {
			case role >= pki.Operate:
				return dashboard.Operator
			case role >= pki.Read:
				return dashboard.Reader
			}
			return dashboard.Nobody
		},
		Name: func(r *http.Request) string { return guard.Caller(r).Name },
	}
	if guard.Tokens() {
		c.Login, c.Logout = guard.Login, guard.Logout
	}
	d, err := dashboard.New(c)
	if err != nil {
		return err
	}
	mux.Handle("/{$}", d)
	mux.Handle("/dashboard/", d)
	n.alongside(d.Run)
	n.alongside(source.gatherer.run)
	return nil
}

// shown is the node as the dashboard shows it.
type shown struct {
	n        *Node
	gatherer *gatherer
}

// View implements dashboard.Source. It asks nobody.
func (s *shown) View() dashboard.View {
	n := s.n
	gathered := s.gatherer.look()
	seen := n.View()
	v := dashboard.View{Cluster: s.cluster(seen)}
	witnesses := make(map[txn.NodeID]bool)
	for _, m := range n.members() {
		witnesses[m.ID] = m.Witness
	}
	for _, node := range seen.Nodes {
		is := shownNode(seen, node)
		is.Witness = witnesses[is.ID]
		is.Actions = actions(is, len(seen.Nodes))
		v.Nodes = append(v.Nodes, is)
		v.Links = append(v.Links, links(seen, node)...)
	}
	for _, t := range n.InFlight(shownTransactions) {
		v.Transactions = append(v.Transactions, shownTransaction(t))
	}
	v.Transactions = append(v.Transactions, gathered.transactions...)
	slices.SortStableFunc(v.Transactions, func(a, b dashboard.Transaction) int { return cmp.Compare(b.Age, a.Age) })
	v.Conflicts, v.Events, v.Silent = gathered.conflicts, gathered.events, gathered.silent
	return v
}

func (s *shown) cluster(seen *pb.View) dashboard.Cluster {
	n := s.n
	own := n.status()
	c := dashboard.Cluster{
		Name: seen.Cluster, Node: n.cfg.Node, Version: n.version, Leader: own.Leader, Term: own.Term,
		CommitIndex: own.CommitIndex, CSN: max(own.CSN, txn.CSN(seen.Csn)), Quorum: seen.Quorum, Access: "none", Reason: own.Reason,
		Late: dashboard.Millis(n.seen.beats.Interval() * 14 / 5),
	}
	if log := n.consensus.Load(); log != nil {
		if at := log.QuorumContact(); !c.Quorum && !at.IsZero() {
			c.QuorumAge = dashboard.Ago(time.Since(at))
		}
		if n.accepting() == nil {
			c.Access = map[gateway.Access]string{gateway.ReadWrite: "read-write", gateway.ReadOnly: "read-only", gateway.NoAccess: "none"}[n.access()]
		}
	}
	return c
}

// shownNode is a member as this node sees it.
func shownNode(seen *pb.View, from *pb.NodeView) dashboard.Node {
	self := from.Id == seen.Node
	is := dashboard.Node{
		ID: txn.NodeID(from.Id), Voter: from.Voter, Reachable: from.Heard,
		Gateway: from.GatewayAddress, HTTP: from.HttpAddress, State: "unknown",
	}
	if self {
		is.Contact = dashboard.Ago(0)
	} else if at := slices.IndexFunc(seen.Nodes, func(v *pb.NodeView) bool { return v.Id == seen.Node }); at >= 0 {
		for _, cell := range seen.Nodes[at].Hears {
			if cell.Node == from.Id && cell.AgeSeconds != nil {
				is.Contact = ptr(millis(*cell.AgeSeconds))
			}
		}
	}
	if h := from.Health; h != nil {
		is.State, is.Reason, is.Role, is.Writes = h.State, h.Reason, h.Role, h.AcceptsWrites
		is.Version, is.Postgres = h.Version, h.PostgresVersion
		is.Term, is.CommitIndex = &h.Term, ptr(txn.LogIndex(h.CommitIndex))
		is.Lag, is.TPS, is.Aborts, is.Uptime = from.Lag, &h.CommitsPerSecond, &h.AbortsPerSecond, ptr(millis(h.UptimeSeconds))
		if h.AppliedCsn != nil {
			is.AppliedIndex = ptr(txn.LogIndex(h.AppliedIndex))
		}
		if h.GetPostgresUp() {
			is.Connections, is.MaxConnections = ptr(uint64(h.Connections)), ptr(uint64(h.MaxConnections))
			is.WAL, is.SlotLag, is.OldestTransaction = &h.WalKeptBytes, &h.SlotLagBytes, ptr(millis(h.OldestTransactionSeconds))
		}
		if h.DiskTotalBytes > 0 {
			is.DiskFree, is.DiskTotal = &h.DiskFreeBytes, &h.DiskTotalBytes
		}
	}
	if !is.Reachable {
		is.Reason = unheard(seen, from.Id)
	}
	return is
}

// unheard says who hears a node that this one does not.
func unheard(seen *pb.View, id uint32) string {
	var hear, deaf []string
	for _, to := range seen.Nodes {
		for _, l := range links(seen, to) {
			switch name := fmt.Sprintf("node %d", to.Id); {
			case l.From != txn.NodeID(id) || !l.Known:
			case l.Lost:
				deaf = append(deaf, name)
			default:
				hear = append(hear, name)
			}
		}
	}
	says := fmt.Sprintf("node %d does not hear it", seen.Node)
	switch {
	case len(hear) > 1:
		says += ", " + strings.Join(hear, ", ") + " do"
	case len(hear) == 1:
		says += ", " + hear[0] + " does"
	case len(deaf) > 1:
		says = strings.Join(deaf, " and ") + " do not hear it"
	}
	return says
}

// links is one row of the matrix of heartbeats.
func links(seen *pb.View, to *pb.NodeView) (all []dashboard.Link) {
	known := to.ReportAgeSeconds != nil && *to.ReportAgeSeconds <= seen.HeartbeatTimeoutSeconds
	for _, from := range seen.Nodes {
		if from.Id == to.Id {
			continue
		}
		l := dashboard.Link{From: txn.NodeID(from.Id), To: txn.NodeID(to.Id), Known: known, Lost: true}
		for _, cell := range to.Hears {
			if cell.Node != from.Id {
				continue
			}
			if cell.AgeSeconds != nil {
				l.Age, l.Lost = ptr(millis(*cell.AgeSeconds)), *cell.AgeSeconds > seen.HeartbeatTimeoutSeconds
			}
			if cell.RoundTripSeconds != nil {
				l.RTT = ptr(millis(*cell.RoundTripSeconds))
			}
			l.Jitter, l.Loss = ptr(millis(cell.JitterSeconds)), cell.Loss
		}
		all = append(all, l)
	}
	return all
}

// The metrics that charts are made of.
var stageMetrics = []struct{ metric, stage string }{
	{"quorate_coord_capture_seconds", "capture"},
	{"quorate_coord_order_seconds", "order"},
	{"quorate_apply_publish_seconds", "publish"},
	{"quorate_coord_commit_seconds", "whole commit"},
}

const (
	commitsMetric = "quorate_log_transactions_total"
	abortsMetric  = "quorate_gateway_aborts_total"
)

// Counters implements dashboard.Source.
func (s *shown) Counters() dashboard.Counters {
	n := s.n
	c := dashboard.Counters{
		Own: n.seen.commits.Load(), Aborts: map[string]uint64{}, Lag: map[txn.NodeID]uint64{}, Queue: map[string]uint64{},
	}
	for _, node := range n.View().Nodes {
		if node.Heard && node.Lag != nil {
			c.Lag[txn.NodeID(node.Id)] = *node.Lag
		}
	}
	i := n.current.Load()
	if i == nil {
		return c
	}
	queue, _ := i.pipeline.Queue()
	c.Queue["in flight here"], c.Queue["to be applied"] = uint64(len(i.coord.InFlight())), uint64(queue)
	families, err := n.gather()
	if err != nil {
		n.log.Debug("gather metrics for the dashboard", logkey.Error, err) // charts have a gap
	}
	c.Stages = make([]dashboard.Stage, len(stageMetrics))
	for at, of := range stageMetrics {
		c.Stages[at].Name = of.stage
	}
	for _, family := range families {
		switch name := family.GetName(); name {
		case commitsMetric:
			for _, m := range family.GetMetric() {
				if label(m, "reason") == txn.AbortNone.String() {
					c.Commits = uint64(m.GetCounter().GetValue())
				}
			}
		case abortsMetric:
			for _, m := range family.GetMetric() {
				c.Aborts[label(m, "reason")] = uint64(m.GetCounter().GetValue())
			}
		default:
			for at, of := range stageMetrics {
				if of.metric == name && len(family.GetMetric()) == 1 {
					c.Stages[at].Durations = histogram(family.GetMetric()[0].GetHistogram())
				}
			}
		}
	}
	return c
}

func label(m *dto.Metric, name string) string {
	for _, l := range m.GetLabel() {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}

func histogram(from *dto.Histogram) (h dashboard.Histogram) {
	for _, b := range from.GetBucket() {
		h.Bounds = append(h.Bounds, b.GetUpperBound())
		h.Counts = append(h.Counts, b.GetCumulativeCount())
	}
	h.Total = from.GetSampleCount()
	return h
}

// actions are those that make sense for a node as it is. Whether they can be done is found out when they are.
func actions(is dashboard.Node, members int) []string {
	var can []string
	if is.Reachable && !is.Witness {
		switch is.State {
		case stateActive:
			can = append(can, dashboard.Drain)
		case stateDraining:
			can = append(can, dashboard.Resume)
		}
	}
	if is.Reachable && is.Voter && is.Role != admin.Leader.String() {
		can = append(can, dashboard.Transfer)
	}
	if members == 1 {
		return can // it has nobody to copy from, and nobody to leave to
	}
	if is.Reachable && !is.Witness {
		can = append(can, dashboard.Resync)
	}
	return append(can, dashboard.Remove)
}

// Act implements dashboard.Source.
func (s *shown) Act(ctx context.Context, a dashboard.Action) (string, error) {
	if s.n.states.current().name == stateStarting {
		return "", status.Error(codes.Unavailable, errStarting.Error())
	}
	service, id := s.n.admin.Load().Membership(), uint32(a.Node)
	switch a.Name {
	case dashboard.Drain:
		resp, err := service.Drain(ctx, &pb.DrainRequest{Node: id})
		if resp.GetCutOff() {
			return fmt.Sprintf("Node %d is drained; transactions that did not end in time were cut off.", id), err
		}
		return fmt.Sprintf("Node %d is drained.", id), err
	case dashboard.Resume:
		_, err := service.Resume(ctx, &pb.ResumeRequest{Node: id})
		return fmt.Sprintf("Node %d takes clients again.", id), err
	case dashboard.Transfer:
		resp, err := service.TransferLeadership(ctx, &pb.TransferLeadershipRequest{To: id})
		return fmt.Sprintf("Node %d leads.", resp.GetLeader()), err
	case dashboard.Resync:
		_, err := service.Resync(ctx, &pb.ResyncRequest{Node: id})
		return fmt.Sprintf("Node %d sets its data aside and copies those of another.", id), err
	case dashboard.Remove:
		_, err := service.Remove(ctx, &pb.RemoveRequest{Node: id, Reason: "an operator has removed it on the dashboard"})
		return fmt.Sprintf("Node %d is removed.", id), err
	}
	return "", status.Errorf(codes.InvalidArgument, "action %q is not known", a.Name)
}

// millis is for seconds as the API has them.
func millis(s float64) dashboard.Millis { return dashboard.Millis(s * float64(time.Second)) }

func ptr[T any](v T) *T { return &v }
