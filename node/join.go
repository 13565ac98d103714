package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/admin"
	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/events"
	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/internal/pgserver"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/replication/clone"
	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// ErrReopen ends a node that goes on as another one: its data directory says as which. Open it again.
var ErrReopen = errors.New("the node joins the cluster anew")

// errRemoved fences a node for good.
var errRemoved = errors.New("this node was removed from the cluster, and can only come back by joining it anew, with an empty data_dir")

// The pauses between attempts of a node that is on its way into a cluster.
const (
	firstAttempt = 200 * time.Millisecond
	lastAttempt  = 5 * time.Second
	// Somebody has to do something first, and each attempt makes a checkpoint at the donor.
	hopelessAttempt = time.Minute
)

// askTimeout bounds one call to another member.
const askTimeout = 15 * time.Second

// apply asks the members, one after another, to admit this node, until one of them has. What they refuse ends it.
func (n *Node) apply(ctx context.Context) error {
	id := n.identity.get()
	if id.State != config.StateApplying {
		return nil
	}
	req, err := n.application(ctx, id)
	if err != nil {
		return err
	}
	for pause := firstAttempt; ; pause = min(2*pause, lastAttempt) {
		resp, err := n.askToAdd(ctx, id.Peers, req)
		if err == nil {
			n.cfg.Node = txn.NodeID(resp.Node)
			return n.admitted(resp)
		}
		if refused(err) {
			return fmt.Errorf("join cluster %s: %s", n.cfg.Cluster, status.Convert(err).Message())
		}
		n.log.Warn("no member has admitted this node yet", logkey.Error, err)
		if err := sleep(ctx, pause); err != nil {
			return fmt.Errorf("join cluster %s: %w", n.cfg.Cluster, err)
		}
	}
}

// application is what a node asks by.
func (n *Node) application(ctx context.Context, id config.Identity) (*pb.AddRequest, error) {
	postgres := ""
	if !n.cfg.Witness() {
		if !n.cfg.Postgres.Managed {
			return nil, admin.Refuse(codes.FailedPrecondition, "postgres.managed is false: a node that joins copies another's PostgreSQL, which it can do for a server only that it starts and stops itself")
		}
		install, err := pgserver.Find(ctx, pgserver.FindOptions{BinDir: n.cfg.Postgres.BinDir})
		if err != nil {
			return nil, err
		}
		postgres = install.Version.String()
	}
	self := n.cfg.Self()
	return &pb.AddRequest{
		Request: id.Request[:], Role: n.cfg.Role, Replaces: uint32(id.Replaces), Cluster: n.cfg.Cluster, ClusterId: id.ClusterID[:], Token: id.Token,
		RaftAddress: self.Raft, GrpcAddress: self.GRPC, HttpAddress: self.HTTP, GatewayAddress: self.Gateway,
		Version: n.version, PostgresVersion: postgres, LogFormat: codec.Version, Supersedes: uint32(id.Supersedes),
	}, nil
}

// refused reports whether asking again would get the same answer.
func refused(err error) bool {
	return slices.Contains([]codes.Code{codes.FailedPrecondition, codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated,
		codes.AlreadyExists, codes.NotFound, codes.ResourceExhausted, codes.Unimplemented}, status.Code(err))
}

// sleep is for waiting on others that cannot be subscribed to.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// askToAdd returns the first answer that is one.
func (n *Node) askToAdd(ctx context.Context, peers []string, req *pb.AddRequest) (resp *pb.AddResponse, err error) {
	err = errors.New("no member to ask is known")
	for _, address := range peers {
		if resp, err = n.addAt(ctx, address, req); err == nil || refused(err) {
			return resp, err
		}
		err = fmt.Errorf("%s: %w", address, err)
	}
	return nil, err
}

func (n *Node) addAt(ctx context.Context, address string, req *pb.AddRequest) (*pb.AddResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, err := n.dial(address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return pb.NewMembershipClient(conn).Add(ctx, req)
}

// admitted makes the data directory that of what the node was admitted as.
func (n *Node) admitted(resp *pb.AddResponse) error {
	if len(resp.ClusterId) != len(txn.UUID{}) || resp.Node == 0 || resp.Cluster != n.cfg.Cluster {
		return fmt.Errorf("join cluster %s: the answer is no admission: node %d of cluster %q", n.cfg.Cluster, resp.Node, resp.Cluster)
	}
	become := n.identity.handOver
	if n.identity.get().State == config.StateApplying {
		become = n.identity.change // it has been nobody yet
	}
	return become(func(id *config.Identity) {
		if id.State != config.StateApplying {
			id.Request, id.Rejoin, id.Replaces = id.Rejoin, txn.UUID{}, id.Node
		}
		id.State, id.Node, id.ClusterID = config.StateJoining, txn.NodeID(resp.Node), txn.UUID(resp.ClusterId)
		id.Peers, id.Token, id.Server, id.Started = resp.Peers, "", config.Server{}, false
		id.Previous, id.LogLost, id.Members = txn.UUID{}, "", nil
	})
}

// join gives a node that was admitted its data, and begins its first incarnation. It goes on where an earlier attempt was
// interrupted, and on until ctx ends.
func (n *Node) join(ctx context.Context, waits *patience) (*incarnation, error) {
	n.states.set(stateJoining, "the node is joining: it waits for the log")
	o := n.observer.Load()
	if err := n.awaitAdmission(ctx, o); err != nil {
		return nil, err
	}
	abort := func(gid txn.GID) error { return n.abortUnfinished(ctx, o.machine, gid) }
	if err := awaitReadable(ctx, o.machine, unreadablePatience, n.readable, abort); err != nil {
		return nil, err
	}
	in := o.machine.Membership()
	member, _ := in.Find(n.cfg.Node)
	if member.Slot == replication.NoSlot {
		return nil, fmt.Errorf("node %s was admitted as a witness, and role is %s: %w", n.cfg.Node, n.cfg.Role, errRole)
	}
	id := pg.Identity{Cluster: n.cfg.Cluster, Node: n.cfg.Node, Slot: member.Slot, MaxNodes: in.MaxNodes}
	n.states.set(stateCloning, "the node is copying another member's data")
	for pause := firstAttempt; ; pause = min(2*pause, lastAttempt) {
		err := n.obtain(ctx, id, o.machine.Reserved(member.Slot))
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		n.states.set(stateCloning, "the node has not got a copy yet: "+err.Error())
		n.log.Warn("no copy of another member's data yet", logkey.Error, err)
		wait := pause
		if errors.Is(err, clone.ErrNoSpace) || errors.Is(err, clone.ErrUnfit) || errors.Is(err, clone.ErrTooSlow) {
			wait = hopelessAttempt
		}
		if err := sleep(ctx, wait); err != nil {
			return nil, err
		}
	}
	n.states.set(stateCatchingUp, "the node has a copy, and begins to follow the log")
	return n.reopen(ctx, waits)
}

// unreadablePatience is how long a node that joins leaves large transactions to end by themselves.
const unreadablePatience = time.Minute

// awaitReadable waits until the log here holds all that is still to be decided. It begins behind the snapshot that the
// leader has sent, and so may lack the first parts of large transactions that were unfinished there. They must be decided
// before the copy is made, which then has them. What does not end within patience, because its origin is gone say, is aborted.
func awaitReadable(ctx context.Context, m *replication.Machine, patience time.Duration, readable func(txn.LogIndex) bool, abort func(txn.GID) error) error {
	waiting, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		at, first := m.Unfinished()
		maps.DeleteFunc(first, func(_ txn.GID, index txn.LogIndex) bool { return readable(index) })
		if len(first) == 0 {
			return nil
		}
		if m.WaitFor(waiting, at+1) == nil {
			continue
		}
		for gid := range first {
			if err := abort(gid); err != nil {
				return err
			}
		}
	}
}

// readable reports whether the log here has an entry.
func (n *Node) readable(index txn.LogIndex) bool {
	_, err := n.part(index)
	return err == nil
}

// abortUnfinished has the log say that nothing comes of gid. An error is ctx's.
func (n *Node) abortUnfinished(ctx context.Context, m *replication.Machine, gid txn.GID) error {
	n.log.Warn("a large transaction stays unfinished, and keeps this node from joining: it is aborted", logkey.GID, gid)
	for {
		index, err := n.consensus.Load().Propose(ctx, codec.AppendAbort(nil, codec.Abort{GID: gid, Reason: txn.AbortRequested}))
		if err == nil {
			return m.WaitFor(ctx, index)
		}
		n.log.Info("abort a large transaction", logkey.GID, gid, logkey.Error, err)
		if err := n.awaitLeader(ctx); err != nil {
			return err
		}
	}
}

// errRole: the node's configuration is not what it was admitted as.
var errRole = errors.New("remove its data_dir and join again")

// becomeMember remembers that the node is in the cluster. That ends joining: the node gets its vote, if there is room for it, and
// whom it was joined to replace leaves.
func (n *Node) becomeMember(ctx context.Context) error {
	if !n.identity.get().Started {
		if err := n.identity.change(func(id *config.Identity) { id.Started = true }); err != nil {
			return err
		}
	}
	if err := n.noteMembers(); err != nil {
		return err
	}
	if n.identity.joining() {
		if err := n.endJoining(ctx); err != nil {
			return err
		}
	}
	if id := n.identity.get(); id.Supersedes != 0 && n.superseding.CompareAndSwap(false, true) {
		n.alongside(func(ctx context.Context) error { return n.supersede(ctx, id.Supersedes) })
	}
	return nil
}

// endJoining gets the node its vote, and makes it one that has joined.
func (n *Node) endJoining(ctx context.Context) error {
	for pause := firstAttempt; ; pause = min(2*pause, lastAttempt) {
		_, err := n.askMembership().Promote(ctx, &pb.PromoteRequest{Node: uint32(n.cfg.Node)})
		if err == nil {
			break
		}
		if status.Code(err) == codes.FailedPrecondition && n.maxVotersReached() {
			n.log.Info("the node follows without a vote", logkey.Reason, status.Convert(err).Message())
			break
		}
		n.log.Info("the node has no vote yet", logkey.Error, err)
		if err := sleep(ctx, pause); err != nil {
			return err
		}
	}
	replaced := n.identity.get().Replaces
	if err := n.identity.change(func(id *config.Identity) { id.State, id.Peers, id.Replaces = config.StateMember, nil, 0 }); err != nil {
		return err
	}
	n.forgetOldLogs()
	if replaced != 0 {
		n.event(events.Info, eventMemberAdmitted, n.cfg.Node, fmt.Sprintf("node %s has taken the place of node %s", n.cfg.Node, replaced))
	}
	return nil
}

func (n *Node) maxVotersReached() bool {
	voters := 0
	for _, s := range n.servers() {
		if s.Voter {
			voters++
		}
	}
	return voters >= maxVoters
}

// askMembership is this node's own service, which hands calls on to the leader.
func (n *Node) askMembership() pb.MembershipServer { return n.admin.Load().Membership() }

// forgetOldLogs removes the logs that earlier identities of this data directory had.
func (n *Node) forgetOldLogs() {
	current := n.identity.get().RaftDir(n.cfg.DataDir)
	found, err := filepath.Glob(filepath.Join(n.cfg.DataDir, "raft*"))
	for _, dir := range found {
		if dir != current {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}
	if err != nil {
		n.log.Warn("an old log stays", logkey.Error, err)
	}
}

// Resync implements admin.Membership: the node gives up its data, and joins the cluster anew in its own place. It does so when
// the call that ctx belongs to is over: with the node its answer would end.
func (n *Node) Resync(ctx context.Context) error {
	err := n.rejoin(ctx, "an operator has asked for it")
	if err == nil {
		context.AfterFunc(ctx, func() { time.AfterFunc(answerTime, func() { n.cancel(ErrReopen) }) })
	}
	return err
}

// answerTime is for the answer to get out. gRPC does not say when it has.
const answerTime = 200 * time.Millisecond

// rejoin has the cluster admit this node anew in its own place; when it is opened again, it joins as that. Until it knows that it
// was admitted it stays what it is, on disk too: it votes yet, and of two members, one could not be replaced by the other
// without that. It asks by one request until that is answered, for whatever keeps an answer from it, it may have been admitted.
//
// An error with the code NotFound says that it is no member any more, and has not been admitted anew either.
func (n *Node) rejoin(ctx context.Context, reason string) error {
	n.rejoining.Lock()
	defer n.rejoining.Unlock()
	id := n.identity.get()
	switch {
	case id.State == config.StateRemoved:
		return admin.Refuse(codes.NotFound, "%v (%s)", errRemoved, id.Reason)
	case id.Node != n.cfg.Node:
		return nil // somebody else has just asked
	}
	var peers []string
	leader := n.status().Leader
	for _, m := range n.members() {
		switch m.ID {
		case n.cfg.Node:
		case leader:
			peers = slices.Insert(peers, 0, m.GRPC) // it is there
		default:
			peers = append(peers, m.GRPC)
		}
	}
	if len(peers) == 0 {
		return admin.Refuse(codes.FailedPrecondition, "node %s is the only member: there is nobody to copy the data from", n.cfg.Node)
	}
	request := id.Rejoin
	if request.IsZero() {
		request = txn.NewUUID()
	}
	req, err := n.application(ctx, config.Identity{Request: request, Replaces: id.Node, ClusterID: id.ClusterID})
	if err != nil {
		return err
	}
	if err := n.identity.change(func(id *config.Identity) { id.Rejoin = request }); err != nil {
		return err
	}
	resp, err := n.askToAdd(ctx, peers, req)
	if err == nil {
		err = n.admitted(resp)
	}
	if err != nil {
		return err
	}
	n.log.Warn("this node joins the cluster anew, and sets its data aside", logkey.Reason, reason)
	n.event(events.Warning, eventState, n.cfg.Node, fmt.Sprintf("node %s joins the cluster anew: %s", n.cfg.Node, reason))
	n.states.set(stateFailed, "the node joins the cluster anew: "+reason)
	return nil
}

// comeBack has the node rejoin, unattended: it asks until it is admitted anew, or told that it was removed.
func (n *Node) comeBack(reason string) {
	if !n.returning.CompareAndSwap(false, true) {
		return
	}
	n.alongside(func(ctx context.Context) error {
		for pause := firstAttempt; ; pause = min(2*pause, lastAttempt) {
			err := n.rejoin(ctx, reason)
			switch {
			case err == nil:
				if sleep(ctx, answerTime) == nil { // an operator may have asked for it as well
					n.cancel(ErrReopen)
				}
				return nil
			case status.Code(err) == codes.NotFound:
				n.staysOut("the other members say so")
				return nil
			}
			n.log.Warn("the node cannot join the cluster anew yet", logkey.Error, err)
			n.fence(fmt.Errorf("this node is no member any more, and cannot join anew yet: %w", err))
			if sleep(ctx, pause) != nil {
				return nil
			}
		}
	})
}

// wasRemoved is called when the node learns that it is no member any more, as often as it does. A node that has asked to be admitted
// anew may have been: then it was removed to make room for itself, and the answer is on its way, or lost.
func (n *Node) wasRemoved(reason string) {
	if n.identity.get().Rejoin.IsZero() {
		n.staysOut(reason)
	} else {
		n.comeBack(reason)
	}
}

// staysOut fences the node for good. A joining node may have been removed as well.
func (n *Node) staysOut(reason string) {
	err := n.identity.change(func(id *config.Identity) { id.State, id.Reason = config.StateRemoved, reason })
	if errors.Is(err, errHandedOver) {
		return // it comes back as another one
	}
	if err != nil {
		n.log.Error("that this node was removed is not on disk", logkey.Error, err)
	}
	err = fmt.Errorf("%w (%s)", errRemoved, reason)
	n.fence(err)
	n.states.set(stateRemoved, err.Error()) // it may have been fenced before, for another reason
}

// staysRemoved is what opening does for a node that was removed: it says so.
func (n *Node) staysRemoved(context.Context) error {
	n.states.set(stateRemoved, fmt.Sprintf("%v (%s)", errRemoved, n.identity.get().Reason))
	return nil
}

// The times of watchMembership.
const (
	membershipInterval = time.Second
	askRemovedAfter    = 10 * time.Second // without a majority
)

// watchMembership finishes what a leader has left undone, and asks the others, when none of them is heard of, whether this
// node was removed: a node that was away at that time is told nothing any more.
func (n *Node) watchMembership(ctx context.Context) error {
	ticker := time.NewTicker(membershipInterval)
	defer ticker.Stop()
	c := n.consensus.Load()
	asked := time.Now()
	for {
		select {
		case <-ticker.C:
		case <-c.Removed():
			n.wasRemoved("the other members have taken it out of the group")
			return nil
		case <-ctx.Done():
			return nil
		}
		n.removeLeftovers(ctx)
		if n.states.current().name == stateActive { // what is read of the log before that is of long ago
			if err := n.noteMembers(); err != nil {
				n.log.Debug("note who the members are", logkey.Error, err) // a disk that is full is noticed by whoever needs it
			}
		}
		if time.Since(c.QuorumContact()) > askRemovedAfter && time.Since(asked) > askRemovedAfter {
			asked = time.Now()
			if n.othersSayRemoved(ctx) {
				n.wasRemoved("the other members say so")
				return nil
			}
		}
	}
}

// othersSayRemoved reports whether a member of this cluster answers that this node is none any more.
func (n *Node) othersSayRemoved(ctx context.Context) bool {
	id := n.identity.get()
	for _, other := range n.others() {
		conn, err := n.peers.Conn(other)
		if err != nil {
			continue
		}
		ask, cancel := context.WithTimeout(ctx, aliveTimeout)
		resp, err := pb.NewMembershipClient(conn).List(ask, &pb.ListMembersRequest{})
		cancel()
		if err != nil || len(resp.ClusterId) != len(txn.UUID{}) || txn.UUID(resp.ClusterId) != id.ClusterID {
			continue
		}
		is := slices.ContainsFunc(resp.Members, func(m *pb.ListedMember) bool { return m.Id == uint32(n.cfg.Node) })
		if !is && resp.Highest >= uint32(n.cfg.Node) {
			return true
		}
	}
	return false
}

// behind is what becomes of a node that the log has left behind: unattended, it joins the cluster anew.
func (n *Node) behind(err error) {
	n.fence(err)
	n.comeBack(err.Error())
}

var _ consensus.Machine = (*observer)(nil)
