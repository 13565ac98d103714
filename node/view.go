package node

import (
	"context"
	"errors"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/admin"
	"github.com/quorate/quorate/events"
	"github.com/quorate/quorate/gateway"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/replication/capture"
	"github.com/quorate/quorate/txn"
)

// View returns the cluster as this node sees it now. It asks nobody.
func (n *Node) View() *pb.View {
	own := n.health()
	v := &pb.View{
		TimeMs: time.Now().UnixMilli(), Cluster: n.cfg.Cluster, Node: uint32(n.cfg.Node), Quorum: own.Quorum,
		Leader: own.Leader, Term: own.Term,
		HeartbeatIntervalSeconds: n.seen.beats.Interval().Seconds(), HeartbeatTimeoutSeconds: n.seen.beats.Timeout().Seconds(),
	}
	v.LastEvent, _ = n.seen.events.Last()
	reports := make(map[uint32]*pb.Report)
	for _, r := range n.seen.beats.Reports(own) {
		reports[r.Node] = r
		v.Csn = max(v.Csn, r.Health.GetCsn())
	}
	voters := n.voters()
	members := n.members()
	if !slices.ContainsFunc(members, func(m admin.Member) bool { return m.ID == n.cfg.Node }) {
		members = append(members, admin.Member{ID: n.cfg.Node}) // it was removed, or has not read yet that it is one
	}
	for _, m := range members {
		node := &pb.NodeView{
			Id: uint32(m.ID), RaftAddress: m.Raft, GrpcAddress: m.GRPC, HttpAddress: m.HTTP, GatewayAddress: m.Gateway,
			Heard: m.ID == n.cfg.Node || n.seen.beats.Hears(m.ID), Voter: slices.Contains(voters, m.ID),
		}
		if r := reports[node.Id]; r != nil {
			node.ReportAgeSeconds, node.Health, node.Hears = &r.AgeSeconds, r.Health, r.Heard
			node.Lag = admin.Lag(v.Csn, r.Health.AppliedCsn)
		}
		if node.Voter {
			v.Voters++
			if node.Heard {
				v.VotersHeard++
			}
		}
		v.Nodes = append(v.Nodes, node)
	}
	return v
}

// probe says how this node is, for load balancers.
func (n *Node) probe() admin.Probe {
	h := n.health()
	p := admin.Probe{
		Node: n.cfg.Node, State: h.State, Role: h.Role, Writes: h.AcceptsWrites, Server: h.State == stateActive && h.GetPostgresUp(),
		Alive: time.Since(n.seen.began)-time.Duration(n.seen.ticked.Load()) < stuckAfter,
	}
	p.Reads = p.State == stateActive && n.admitting() == nil
	newest := h.Csn
	for _, r := range n.seen.beats.Reports(h) {
		newest = max(newest, r.Health.GetCsn())
	}
	p.Lag = newest - min(newest, h.GetAppliedCsn())
	return p
}

// voters are the members whose word counts for a majority.
func (n *Node) voters() (ids []txn.NodeID) {
	for _, m := range n.servers() {
		if m.Voter {
			ids = append(ids, m.Node)
		}
	}
	return ids
}

// InFlight returns transactions that are on their way at this node: its own since their COMMIT, then those of others
// that are decided and not visible yet; of each the oldest first, at most so many.
func (n *Node) InFlight(most int) []*pb.TransactionInFlight {
	i := n.current.Load()
	if i == nil {
		return nil
	}
	var all []*pb.TransactionInFlight
	now := time.Now()
	for _, f := range i.coord.InFlight() {
		all = append(all, &pb.TransactionInFlight{
			Gid: f.GID.String(), Node: uint32(n.cfg.Node), Stage: f.Stage, AgeSeconds: now.Sub(f.Begun).Seconds(), Csn: uint64(f.CSN), Pid: f.PID,
		})
	}
	all = all[:min(len(all), most)]
	for _, f := range i.pipeline.InFlight(most - len(all)) {
		all = append(all, &pb.TransactionInFlight{
			Gid: f.GID.String(), Node: uint32(n.cfg.Node), Stage: f.Stage, AgeSeconds: now.Sub(f.Since).Seconds(), Csn: uint64(f.CSN),
		})
	}
	return all
}

// Lookup tells what the log, as far as this node has it, says of a transaction. Unlike the question of a client it settles
// nothing: to look must not abort.
func (n *Node) Lookup(ctx context.Context, gid txn.GID) (*pb.LookupResponse, error) {
	ledger := n.ledger()
	if ledger == nil {
		return nil, status.Error(codes.Unavailable, "the node is starting")
	}
	found := &pb.LookupResponse{Status: gateway.StatusInDoubt}
	switch ledger.Outcome(gid) {
	case replication.Committed:
		found.Status = gateway.StatusCommitted
	case replication.Aborted:
		found.Status = gateway.StatusAborted
	case replication.Forgotten:
		found.Status = gateway.StatusUnknown
	}
	name := gid.String()
	for _, f := range n.InFlight(admin.MaxPage) {
		if f.Gid == name {
			found.InFlight = f
		}
	}
	for _, c := range n.Conflicts(ctx, "", keptConflicts) {
		if c.Gid == name {
			found.Conflict = c
		}
	}
	return found, nil
}

// Conflicts returns the latest transactions that lost to others, all or those of a kind, as this node knows them, the newest
// first.
func (n *Node) Conflicts(ctx context.Context, kind string, most int) []*pb.Conflict {
	var all []*pb.Conflict
	for _, c := range n.seen.conflicts.list(ctx, kind, most, n.locate) {
		one := &pb.Conflict{
			TimeMs: c.at.UnixMilli(), Kind: c.kind, Node: uint32(c.node), WinnerCsn: uint64(c.winner), WinnerNode: uint32(c.gid.Node),
			Table: c.place.Table, Key: c.place.Key,
		}
		if !c.loser.IsZero() {
			one.Gid = c.loser.String()
		}
		if !c.gid.IsZero() {
			one.WinnerGid = c.gid.String()
		}
		if c.mode.Valid() {
			one.Mode = c.mode.String()
		}
		all = append(all, one)
	}
	return all
}

// Happened returns this node's events that a request selects, the newest first.
func (n *Node) Happened(req *pb.EventsRequest) []*pb.Event {
	q := events.Query{After: req.GetAfter(), AtLeast: events.Severity(req.GetAtLeast()), Kind: req.GetKind(), Limit: int(req.GetLimit())}
	if req.GetSinceMs() > 0 {
		q.Since = time.UnixMilli(req.GetSinceMs())
	}
	return n.told(n.seen.events.Find(q))
}

// Follow returns this node's events behind a place that a request selects, the oldest first; the place behind all of
// them; and a channel that is closed when there are more.
func (n *Node) Follow(after *pb.EventCursor, req *pb.FollowRequest) ([]*pb.Event, *pb.EventCursor, <-chan struct{}) {
	found, to, more := n.seen.events.Follow(events.Cursor{Number: after.GetNumber(), Time: time.UnixMilli(after.GetTimeMs())},
		events.Query{AtLeast: events.Severity(req.GetAtLeast()), Kind: req.GetKind()})
	return n.told(found), &pb.EventCursor{Node: uint32(n.cfg.Node), Number: to.Number, TimeMs: to.Time.UnixMilli()}, more
}

// told are this node's events as the API has them.
func (n *Node) told(found []events.Event) (all []*pb.Event) {
	for _, e := range found {
		all = append(all, &pb.Event{
			Node: uint32(n.cfg.Node), Number: e.Number, TimeMs: e.Time.UnixMilli(), Severity: pb.Severity(e.Severity), Kind: e.Kind,
			Text: e.Text, Fields: e.Fields, About: uint32(e.Node),
		})
	}
	return all
}

// errAway: what only PostgreSQL knows is asked again later.
var errAway = errors.New("PostgreSQL is not there")

// locate finds out where a conflict was, by the tables that this node's PostgreSQL has.
func (n *Node) locate(ctx context.Context, c *conflict) (capture.Place, bool, error) {
	i := n.current.Load()
	switch {
	case i == nil:
		return capture.Place{}, false, errAway
	case c.kind == conflictEvicted:
		return capture.LocateRow(ctx, i.catalog, c.set, c.unique)
	}
	return capture.Locate(ctx, i.catalog, c.set, c.key)
}
