package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/admin"
	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/logkey"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// maxVoters bounds the members whose flush of the log counts: beyond it every commit waits for ever more disks, and no
// fault needs it. Members above that number follow without a vote.
const maxVoters = 9

// aliveTimeout is how long a member may take to say that it is alive before it counts as dead.
const aliveTimeout = time.Second

// Members implements admin.Membership.
func (n *Node) Members() admin.Members { return n.list(n.membership()) }

// list returns the members by the log. One who has to judge by what the log says now passes what a machine says that has been
// waited for: a new incarnation knows nothing yet.
func (n *Node) list(in replication.Membership) admin.Members {
	list := admin.Members{ClusterID: in.Cluster, Highest: in.Highest}
	servers := n.servers()
	for _, m := range n.membersIn(in) {
		logged, _ := in.Find(m.ID)
		listed := admin.ListedMember{
			Member: m, Role: logged.Role.String(), Slot: logged.Slot, Started: logged.Incarnation != 0,
			Version: logged.Version, Postgres: logged.PostgresVersion,
		}
		if !in.Founded() {
			listed.Slot = replication.NoSlot
		}
		listed.Voter = slices.ContainsFunc(servers, func(s consensus.Member) bool { return s.Node == m.ID && s.Voter })
		list.Members = append(list.Members, listed)
	}
	return list
}

// AwaitLeader implements admin.Membership.
func (n *Node) AwaitLeader(ctx context.Context) error {
	if n.consensus.Load() == nil {
		return errStarting
	}
	return n.awaitLeader(ctx)
}

// awaitLeader is called after something was refused. The leader that did may not know yet that it leads no more, so a
// known leader is given a moment to change before it is asked again.
func (n *Node) awaitLeader(ctx context.Context) error {
	c := n.consensus.Load()
	if l, changed := c.Leadership(); l.Leader != 0 {
		moment := time.NewTimer(leaderRetry)
		defer moment.Stop()
		select {
		case <-changed:
		case <-moment.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	_, err := c.WaitLeader(ctx)
	return err
}

// leaderRetry is well below an election's time and well above a round trip's.
const leaderRetry = 20 * time.Millisecond

// lead returns the log and the members as of now, if this node leads.
func (n *Node) lead(ctx context.Context) (*consensus.Consensus, *replication.Machine, error) {
	c, m := n.consensus.Load(), n.ledger()
	if c == nil || m == nil || c.Status().Leader != n.cfg.Node {
		return nil, nil, admin.ErrNotLeader
	}
	index, err := c.ReadIndex(ctx)
	if err == nil {
		err = m.WaitFor(ctx, index)
	}
	if err != nil {
		return nil, nil, err
	}
	if !m.Membership().Founded() {
		return nil, nil, errors.New("the log has not founded the cluster yet")
	}
	return c, m, nil
}

// propose puts an entry into the log and returns when this node has read it there.
func propose(ctx context.Context, c *consensus.Consensus, m *replication.Machine, entry []byte) error {
	index, err := c.Propose(ctx, entry)
	if err != nil {
		return err
	}
	return m.WaitFor(ctx, index)
}

// changed says in terms of admin what came of a change of the Raft group.
func changed(err error) error {
	switch {
	case errors.Is(err, consensus.ErrNotLeader):
		return fmt.Errorf("%w: %w", admin.ErrNotLeader, err)
	case errors.Is(err, consensus.ErrLastVoter):
		return admin.Refuse(codes.FailedPrecondition, "%v; promote another member first", err)
	}
	return err
}

// Add implements admin.Membership.
func (n *Node) Add(ctx context.Context, a admin.Applicant) (none admin.Admission, err error) {
	c, m, err := n.lead(ctx)
	if err != nil {
		return none, err
	}
	if err := n.checkCluster(m.Membership(), a); err != nil {
		return none, err
	}
	id := m.Admitted(a.Request)
	if id == 0 {
		if id, err = n.admit(ctx, c, m, a); err != nil {
			return none, err
		}
	}
	in := m.Membership()
	member, is := in.Find(id)
	if !is {
		return none, admin.Refuse(codes.NotFound, "the node was admitted as %s, and removed since; remove its data_dir and join again", id)
	}
	if a.Replaces != 0 {
		if err := c.Remove(ctx, a.Replaces); err != nil {
			return none, changed(err)
		}
	}
	if err := c.AddNonvoter(ctx, consensus.Member{Node: id, RaftAddress: member.RaftAddress, GRPCAddress: member.GRPCAddress}); err != nil {
		return none, changed(err)
	}
	got := admin.Admission{ClusterID: in.Cluster, Node: id}
	for _, x := range n.membersIn(in) {
		if x.ID != id {
			got.Peers = append(got.Peers, x.GRPC)
		}
	}
	return got, nil
}

// admit has the log give an applicant its id.
func (n *Node) admit(ctx context.Context, c *consensus.Consensus, m *replication.Machine, a admin.Applicant) (txn.NodeID, error) {
	in := m.Membership()
	if a.Replaces != 0 {
		// First of all: a node that was removed takes this, and nothing else, for the last word.
		if err := n.list(in).Known(a.Replaces); err != nil {
			return 0, err
		}
	}
	if a.Supersedes != 0 {
		if err := n.list(in).Known(a.Supersedes); err != nil {
			return 0, err
		}
	}
	entry := &codec.Admit{
		Request: a.Request, Replaces: a.Replaces, RaftAddress: a.Raft, GRPCAddress: a.GRPC, HTTPAddress: a.HTTP, GatewayAddress: a.Gateway, Version: a.Version, Format: a.Format,
	}
	if err := n.checkApplicant(in, a); err != nil {
		return 0, err
	}
	switch a.Role {
	case config.RoleWitness:
		entry.Role = codec.RoleWitness
	case "", config.RoleData:
	default:
		return 0, admin.Refuse(codes.InvalidArgument, "role %q: must be data or witness", a.Role)
	}
	// Whoever replaces a member has shown by its certificate that it may be one.
	if a.Token != "" || n.certificates != nil && a.Replaces == 0 {
		use, err := joinToken(m, a.Token)
		if err != nil {
			return 0, admin.Refuse(codes.PermissionDenied, "%v; \"quorate token create\" on a member makes another", err)
		}
		entry.Token = use
	}
	if a.Replaces != 0 {
		if err := n.dispensable(ctx, in, a.Replaces); err != nil {
			return 0, err
		}
		if a.Replaces == n.cfg.Node {
			return 0, n.handOver(ctx, c)
		}
	}
	if err := propose(ctx, c, m, codec.AppendAdmit(nil, entry)); err != nil {
		return 0, err
	}
	id := m.Admitted(a.Request)
	if id == 0 {
		return 0, admin.Refuse(codes.FailedPrecondition,
			"the log has not admitted the node: somebody else was quicker to use the token, to take the last place of %d for nodes with data, to replace the node, or to take away the data that it would copy", in.MaxNodes)
	}
	return id, nil
}

// checkCluster refuses a node that means another cluster.
func (n *Node) checkCluster(in replication.Membership, a admin.Applicant) error {
	if a.Cluster != n.cfg.Cluster {
		return admin.Refuse(codes.FailedPrecondition, "this is cluster %q, and the node is configured for cluster %q", n.cfg.Cluster, a.Cluster)
	}
	if !a.ClusterID.IsZero() && a.ClusterID != in.Cluster {
		// Its own may be there too, and others know it: whom the new one has left behind it does not have the last word about.
		return admin.Refuse(codes.Aborted, "node %s belongs to cluster %s, and this is cluster %s, of the same name", a.Replaces, a.ClusterID, in.Cluster)
	}
	return nil
}

// checkApplicant refuses what cannot work, before it is in the log.
func (n *Node) checkApplicant(in replication.Membership, a admin.Applicant) error {
	for _, address := range []struct{ name, value string }{{"raft", a.Raft}, {"grpc", a.GRPC}} {
		if _, _, err := net.SplitHostPort(address.value); err != nil || strings.ContainsAny(address.value, " \t\n") {
			return admin.Refuse(codes.InvalidArgument, "advertise.%s: %q: must be host:port", address.name, address.value)
		}
	}
	for _, m := range n.membersIn(in) {
		if m.ID != a.Replaces && (m.Raft == a.Raft || m.GRPC == a.GRPC) {
			return admin.Refuse(codes.AlreadyExists, "node %s has the address %s; remove it first, if it is gone", m.ID, a.Raft)
		}
	}
	if max(1, a.Format) < in.Format {
		return admin.Refuse(codes.FailedPrecondition, "the node runs Quorate %s, which reads the log up to format %d, and the cluster writes format %d: run the release of the other members on it",
			a.Version, max(1, a.Format), in.Format)
	}
	if a.Role == config.RoleWitness {
		return nil
	}
	if err := roomFor(in, a.Replaces); err != nil {
		return err
	}
	// PostgreSQL's files can be used by the same major version only.
	for _, m := range in.Members {
		if have, want := major(m.PostgresVersion), major(a.Postgres); m.Node != a.Replaces && have != "" && want != "" && have == want {
			return nil
		}
	}
	for _, m := range in.Members {
		if have, want := major(m.PostgresVersion), major(a.Postgres); m.Node != a.Replaces && have != "" && want != "" {
			return admin.Refuse(codes.FailedPrecondition, "the node has PostgreSQL %s, node %s has %s: a copy can be used by the same major version only", a.Postgres, m.Node, m.PostgresVersion)
		}
	}
	return nil
}

// roomFor refuses a node with data where the cluster has as many as it was founded for. In the place of one there is room.
func roomFor(in replication.Membership, replaces txn.NodeID) error {
	data := 0
	for _, m := range in.Members {
		if m.Slot != replication.NoSlot && m.Node != replaces {
			data++
		}
	}
	if data < in.MaxNodes {
		return nil
	}
	return admin.Refuse(codes.FailedPrecondition, "the cluster has %d nodes with data, and was founded for at most %d (max_nodes), among which sequences are divided: remove one first", data, in.MaxNodes)
}

// major is what stands before the first dot.
func major(version string) string {
	before, _, _ := strings.Cut(version, ".")
	return before
}

// handOver lets another voter lead and returns admin.ErrNotLeader, for the caller to turn to that one.
func (n *Node) handOver(ctx context.Context, c *consensus.Consensus) error {
	if err := c.TransferLeadership(ctx, 0); err != nil && !errors.Is(err, consensus.ErrNotLeader) {
		return fmt.Errorf("hand leadership over: %w", err)
	}
	return admin.ErrNotLeader
}

// dispensable returns a Refusal if the cluster would stand still without a member, or be without data.
func (n *Node) dispensable(ctx context.Context, in replication.Membership, id txn.NodeID) error {
	if err := n.enoughWithout(ctx, id); err != nil {
		return err
	}
	return n.dataWithout(ctx, in, id)
}

// dataWithout returns a Refusal if a member has data and no other one can give a copy of its own now: one that has diverged,
// or does not answer, may have none that can be used.
func (n *Node) dataWithout(ctx context.Context, in replication.Membership, id txn.NodeID) error {
	if m, _ := in.Find(id); m.Role != codec.RoleData || m.Incarnation == 0 {
		return nil
	}
	fit, refused, err := n.donors(ctx, id)
	if err != nil || len(fit) > 0 {
		return err
	}
	if len(refused) == 0 {
		return admin.Refuse(codes.FailedPrecondition, "node %s is the only member with data; join another one first", id)
	}
	var reasons []string
	for _, other := range slices.Sorted(maps.Keys(refused)) {
		reasons = append(reasons, fmt.Sprintf("node %s: %s", other, refused[other]))
	}
	return admin.Refuse(codes.FailedPrecondition, "node %s may be the last one with data that can be used: none of the others gives a copy (%s); mend one of them first",
		id, strings.Join(reasons, "; "))
}

// enoughWithout returns a Refusal if less than a majority of the other voters is alive.
func (n *Node) enoughWithout(ctx context.Context, id txn.NodeID) error {
	var others []txn.NodeID
	voted := false
	for _, s := range n.servers() {
		if s.Node == id {
			voted = s.Voter
		} else if s.Voter {
			others = append(others, s.Node)
		}
	}
	if !voted {
		return nil
	}
	if len(others) == 0 {
		return admin.Refuse(codes.FailedPrecondition, "node %s is the only voter; promote another member first", id)
	}
	dead := n.dead(ctx, others)
	if alive := len(others) - len(dead); alive >= len(others)/2+1 {
		return nil
	}
	var reasons []string
	for _, id := range others {
		if err := dead[id]; err != nil {
			reasons = append(reasons, fmt.Sprintf("node %s: %s", id, status.Convert(err).Message()))
		}
	}
	return admin.Refuse(codes.FailedPrecondition,
		"without node %s the cluster would stand still: of the voters that remain, %v, too few answer (%s); bring them back or remove them first, or use --force",
		id, others, strings.Join(reasons, "; "))
}

// dead asks members, at once, and returns those that do not answer, not as members, or store nothing any more: a vote of theirs is
// worth nothing.
func (n *Node) dead(ctx context.Context, ids []txn.NodeID) map[txn.NodeID]error {
	ctx, cancel := context.WithTimeout(ctx, aliveTimeout)
	defer cancel()
	dead := make(map[txn.NodeID]error)
	var mu sync.Mutex
	var asking sync.WaitGroup
	for _, id := range ids {
		if id == n.cfg.Node {
			continue
		}
		asking.Go(func() {
			conn, err := n.peers.Conn(id)
			var resp *pb.StatusResponse
			if err == nil {
				resp, err = pb.NewClusterClient(conn).Status(ctx, &pb.StatusRequest{Local: true})
			}
			for _, m := range resp.GetMembers() {
				if m.LogFailure != "" {
					err = fmt.Errorf("it stores nothing: %s", m.LogFailure)
				}
			}
			if cluster := n.identity.get().ClusterID; err == nil && !bytes.Equal(resp.ClusterId, cluster[:]) {
				err = fmt.Errorf("it went on as another cluster, %x", resp.ClusterId)
			}
			if err != nil {
				mu.Lock()
				defer mu.Unlock()
				dead[id] = err
			}
		})
	}
	asking.Wait()
	return dead
}

// Remove implements admin.Membership.
func (n *Node) Remove(ctx context.Context, id txn.NodeID, force bool, reason string) error {
	c, m, err := n.lead(ctx)
	if err != nil {
		return err
	}
	in := m.Membership()
	if !in.Removed(id) {
		if err := n.list(in).Known(id); err != nil {
			return err
		}
		holdsData := func(m replication.Member) bool { return m.Node != id && m.Role == codec.RoleData && m.Incarnation != 0 }
		if !slices.ContainsFunc(in.Members, holdsData) {
			return admin.Refuse(codes.FailedPrecondition, "node %s is the only member with data; join another one first", id)
		}
		if !force {
			if err := n.dispensable(ctx, in, id); err != nil {
				return err
			}
		}
		if id == n.cfg.Node {
			return n.handOver(ctx, c)
		}
		if reason == "" {
			reason = "an operator has removed it"
		}
		// First the log: the node reads there that it is removed, while it is still sent the log.
		if err := propose(ctx, c, m, codec.AppendRemove(nil, codec.Remove{Node: id, Reason: reason})); err != nil {
			return err
		}
		if !m.Membership().Removed(id) {
			return admin.Refuse(codes.FailedPrecondition, "the log has not removed node %s: it is the only member with data, since another one was removed at the same time", id)
		}
	}
	return changed(c.Remove(ctx, id))
}

// Promote implements admin.Membership.
func (n *Node) Promote(ctx context.Context, id txn.NodeID) error {
	c, m, err := n.lead(ctx)
	if err != nil {
		return err
	}
	if err := n.list(m.Membership()).Known(id); err != nil {
		return err
	}
	voters := 0
	for _, s := range n.servers() {
		if s.Voter && s.Node == id {
			return nil
		}
		if s.Voter {
			voters++
		}
	}
	if voters >= maxVoters {
		return admin.Refuse(codes.FailedPrecondition, "there are %d voters, and more would only slow commits down; demote one first", voters)
	}
	if member, _ := m.Membership().Find(id); member.Incarnation == 0 {
		return admin.Refuse(codes.FailedPrecondition, "node %s has not copied the data yet; it gets its vote when it has", id)
	}
	if err := n.dead(ctx, []txn.NodeID{id})[id]; err != nil {
		return admin.Refuse(codes.FailedPrecondition, "node %s does not answer (%s): as a voter it would be one more that is missing", id, status.Convert(err).Message())
	}
	return changed(c.Promote(ctx, id))
}

// Demote implements admin.Membership.
func (n *Node) Demote(ctx context.Context, id txn.NodeID, force bool) error {
	c, m, err := n.lead(ctx)
	if err != nil {
		return err
	}
	if err := n.list(m.Membership()).Known(id); err != nil {
		return err
	}
	if !force {
		if err := n.enoughWithout(ctx, id); err != nil {
			return err
		}
	}
	if id == n.cfg.Node {
		return n.handOver(ctx, c)
	}
	return changed(c.Demote(ctx, id))
}

// TransferLeadership implements admin.Membership.
func (n *Node) TransferLeadership(ctx context.Context, to txn.NodeID) error {
	c, m, err := n.lead(ctx)
	if err != nil {
		return err
	}
	if to == n.cfg.Node {
		return nil
	}
	if to != 0 {
		if err := n.list(m.Membership()).Known(to); err != nil {
			return err
		}
		if !slices.ContainsFunc(n.servers(), func(s consensus.Member) bool { return s.Node == to && s.Voter }) {
			return admin.Refuse(codes.FailedPrecondition, "node %s has no vote; promote it first", to)
		}
		if err := n.dead(ctx, []txn.NodeID{to})[to]; err != nil {
			return admin.Refuse(codes.FailedPrecondition, "node %s does not answer: %s", to, status.Convert(err).Message())
		}
	} else if len(n.servers()) == 1 {
		return admin.Refuse(codes.FailedPrecondition, "node %s is the only member", n.cfg.Node)
	}
	return changed(c.TransferLeadership(ctx, to))
}

// Drain implements admin.Membership.
func (n *Node) Drain(ctx context.Context, patience time.Duration) (cutOff bool, err error) {
	g := n.gateway.Load()
	if g == nil {
		return false, n.giveUpLeadership(ctx) // it has no clients
	}
	if s := n.states.current(); s.name != stateActive && s.name != stateDraining {
		return false, admin.Refuse(codes.FailedPrecondition, "node %s is %s: %s", n.cfg.Node, s.name, s.reason)
	}
	n.drained.Store(true)
	n.operational()
	waiting, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := g.Quiesce(waiting); err != nil {
		if ctx.Err() != nil {
			return false, err
		}
		n.log.Info("transactions are cut off", logkey.Reason, err)
		cutOff = true
		if err := n.endSessions(n.cfg.CommitTimeout + tellTimeout); err != nil {
			return true, err
		}
	}
	return cutOff, n.giveUpLeadership(ctx)
}

// giveUpLeadership lets another voter lead, if this node does and there is one.
func (n *Node) giveUpLeadership(ctx context.Context) error {
	c := n.consensus.Load()
	if c == nil || c.Status().Leader != n.cfg.Node || len(n.servers()) == 1 {
		return nil
	}
	if err := c.TransferLeadership(ctx, 0); err != nil && !errors.Is(err, consensus.ErrNotLeader) {
		// Whoever stops the node now costs the cluster an election, and nothing else.
		n.log.Warn("leadership is not handed over", logkey.Error, err)
	}
	return nil
}

// Resume implements admin.Membership.
func (n *Node) Resume(context.Context) error {
	n.drained.Store(false)
	if n.states.current().name == stateDraining {
		n.operational()
	}
	return nil
}

// operational makes the node active, unless it is drained.
func (n *Node) operational() {
	if n.drained.Load() {
		n.states.set(stateDraining, "the node is drained; \"quorate resume\" lets clients in again")
		return
	}
	n.states.set(stateActive, "")
}

// removeLeftovers takes out of the Raft group who the log has removed: whoever removed it may have died in between. Only
// a leader does.
func (n *Node) removeLeftovers(ctx context.Context) {
	c := n.consensus.Load()
	if c == nil || c.Status().Leader != n.cfg.Node {
		return
	}
	in := n.membership()
	for _, s := range n.servers() {
		if !in.Removed(s.Node) {
			continue
		}
		if err := c.Remove(ctx, s.Node); err != nil && ctx.Err() == nil {
			n.log.Info("a node that the log has removed is still sent it", "member", s.Node, logkey.Error, err)
		}
	}
}
