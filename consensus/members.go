package consensus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/quorate/quorate/txn"
)

// Member is one node of the group.
type Member struct {
	Node        txn.NodeID
	RaftAddress string // host:port
	GRPCAddress string // host:port of the server that serves Link
	// Voter says that the member's vote and its copy of the log count. It is the group's to say: in Config.Bootstrap, whose
	// members all are voters, and in AddNonvoter it is ignored.
	Voter bool
}

// The errors of changes of the members.
var (
	// ErrNotLeader: only the leader changes who the members are.
	ErrNotLeader = errors.New("this node does not lead")
	// ErrNotMember: there is no such member.
	ErrNotMember = errors.New("not a member")
	// ErrLastVoter: without this member nobody could decide anything any more.
	ErrLastVoter = errors.New("the only voter")
)

// serverAddress is what Raft's configuration holds of a member: both addresses, a space between them. Whoever knows
// the configuration can thereby reach everybody in every way.
func serverAddress(m Member) raft.ServerAddress {
	return raft.ServerAddress(m.RaftAddress + " " + m.GRPCAddress)
}

func memberOf(s raft.Server) Member {
	of, grpcAddress, _ := strings.Cut(string(s.Address), " ")
	return Member{Node: nodeID(s.ID), RaftAddress: of, GRPCAddress: grpcAddress, Voter: s.Suffrage == raft.Voter}
}

func (m Member) validate() error {
	if m.Node == 0 {
		return errors.New("node: must not be 0")
	}
	for _, address := range []string{m.RaftAddress, m.GRPCAddress} {
		if _, _, err := net.SplitHostPort(address); err != nil || strings.ContainsRune(address, ' ') {
			return fmt.Errorf("address of node %s: %q is not host:port", m.Node, address)
		}
	}
	return nil
}

// Members returns who belongs to the group, ascending, by the latest configuration in this node's log, committed or
// not: Raft itself goes by that. It is empty on a node that waits to be added.
func (c *Consensus) Members() []Member {
	servers := c.servers()
	members := make([]Member, len(servers))
	for i, s := range servers {
		members[i] = memberOf(s)
	}
	slices.SortFunc(members, func(a, b Member) int { return cmp.Compare(a.Node, b.Node) })
	return members
}

// servers is Raft's latest configuration. Raft only copies what it holds, so nothing is kept here that could be out
// of date.
func (c *Consensus) servers() []raft.Server { return c.raft.GetConfiguration().Configuration().Servers }

func (c *Consensus) member(n txn.NodeID) (Member, bool) {
	for _, s := range c.servers() {
		if s.ID == serverID(n) {
			return memberOf(s), true
		}
	}
	return Member{}, false
}

// voters returns those who decide.
func voters(servers []raft.Server) []raft.ServerID {
	var ids []raft.ServerID
	for _, s := range servers {
		if s.Suffrage == raft.Voter {
			ids = append(ids, s.ID)
		}
	}
	return ids
}

// Removed returns a channel that is closed when this node learns that the group has removed it. The leader tells it, and
// so may the log; but a node that was away while it was removed hears from nobody any more. Then Members may tell, or
// another member.
func (c *Consensus) Removed() <-chan struct{} { return c.configured.removed }

// configured is the newest committed configuration that Raft's FSM goroutine has met. Unlike Raft's own accessors it
// knows the index, without which a change could undo what another leader has done meanwhile.
type configured struct {
	self    raft.ServerID
	removed chan struct{}
	gone    func() // closes removed

	mu      sync.Mutex
	index   uint64
	servers []raft.Server
	held    bool // some configuration held this node, which a new one reads earlier ones before
	changed chan struct{}
}

func newConfigured(self txn.NodeID) *configured {
	c := &configured{self: serverID(self), removed: make(chan struct{}), changed: make(chan struct{})}
	c.gone = sync.OnceFunc(func() { close(c.removed) })
	return c
}

func (c *configured) set(index uint64, servers []raft.Server) {
	c.mu.Lock()
	defer c.mu.Unlock()
	holds := slices.ContainsFunc(servers, func(s raft.Server) bool { return s.ID == c.self })
	if c.held && !holds {
		c.gone()
	}
	c.index, c.servers, c.held = index, servers, holds
	close(c.changed)
	c.changed = make(chan struct{})
}

// read also returns a channel that is closed when something else is to be read.
func (c *configured) read() (servers []raft.Server, index uint64, changed <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.servers, c.index, c.changed
}

func (c *configured) holds(n txn.NodeID) bool {
	servers, _, _ := c.read()
	_, err := find(servers, n)
	return err == nil
}

// AddNonvoter has the leader send the log to a node, which becomes a member without a vote if it was none. A member's
// addresses are changed by the same call; a voter stays one.
//
// What AddNonvoter, Promote, Demote and Remove have in common: they work on the leader, elsewhere the error wraps
// ErrNotLeader. They return when the new configuration is committed, or is so already; calling them again is
// harmless. The error wraps txn.ErrOutcomeUnknown if the change may yet come, for instance because ctx has ended or
// leadership was lost in the midst of it. They are carried out one after another.
func (c *Consensus) AddNonvoter(ctx context.Context, m Member) error {
	err := m.validate()
	if err == nil {
		err = c.change(ctx, func(servers []raft.Server) (question, error) { return planAdd(servers, m) })
	}
	if err != nil {
		return fmt.Errorf("add node %s: %w", m.Node, err)
	}
	return nil
}

// Promote gives a member a vote. Its log should have caught up: until then it is one more voter that is missing. See
// AddNonvoter; the error wraps ErrNotMember if there is no such member.
func (c *Consensus) Promote(ctx context.Context, n txn.NodeID) error {
	if err := c.change(ctx, func(servers []raft.Server) (question, error) { return planPromote(servers, n) }); err != nil {
		return fmt.Errorf("promote node %s: %w", n, err)
	}
	return nil
}

// Demote takes a member's vote. A leader that is demoted leads no longer when Demote returns. See AddNonvoter; the error wraps
// ErrNotMember or ErrLastVoter where it applies.
func (c *Consensus) Demote(ctx context.Context, n txn.NodeID) error {
	if err := c.change(ctx, func(servers []raft.Server) (question, error) { return planDemote(servers, n) }); err != nil {
		return fmt.Errorf("demote node %s: %w", n, err)
	}
	return nil
}

// Remove takes a node out of the group for good: it can only come back under a new identity. It need not be running.
// A leader can remove itself; the others then elect one when they miss it, so handing over first is quicker. See
// AddNonvoter; the error wraps ErrLastVoter where it applies. That the node is no member is no error.
func (c *Consensus) Remove(ctx context.Context, n txn.NodeID) error {
	if err := c.change(ctx, func(servers []raft.Server) (question, error) { return planRemove(servers, n) }); err != nil {
		return fmt.Errorf("remove node %s: %w", n, err)
	}
	return nil
}

// question puts a change to Raft, which refuses it unless the latest configuration is the one at index. patience is how
// long Raft may take to consider it; 0: for ever.
type question func(to *raft.Raft, index uint64, patience time.Duration) raft.IndexFuture

// plan returns what to ask for so that servers become as wanted; nil: they are.
type plan func(servers []raft.Server) (question, error)

func planAdd(servers []raft.Server, m Member) (question, error) {
	for _, s := range servers {
		has := memberOf(s)
		switch {
		case has.Node == m.Node:
			if s.Address == serverAddress(m) {
				return nil, nil
			}
		case has.RaftAddress == m.RaftAddress || has.GRPCAddress == m.GRPCAddress:
			return nil, fmt.Errorf("node %s is already at %s", has.Node, s.Address)
		}
	}
	return func(to *raft.Raft, index uint64, patience time.Duration) raft.IndexFuture {
		return to.AddNonvoter(serverID(m.Node), serverAddress(m), index, patience)
	}, nil
}

func planPromote(servers []raft.Server, n txn.NodeID) (question, error) {
	s, err := find(servers, n)
	if err != nil || s.Suffrage == raft.Voter {
		return nil, err
	}
	return func(to *raft.Raft, index uint64, patience time.Duration) raft.IndexFuture {
		return to.AddVoter(s.ID, s.Address, index, patience)
	}, nil
}

func planDemote(servers []raft.Server, n txn.NodeID) (question, error) {
	s, err := find(servers, n)
	if err != nil || s.Suffrage != raft.Voter {
		return nil, err
	}
	if len(voters(servers)) == 1 {
		return nil, ErrLastVoter
	}
	return func(to *raft.Raft, index uint64, patience time.Duration) raft.IndexFuture {
		return to.DemoteVoter(s.ID, index, patience)
	}, nil
}

func planRemove(servers []raft.Server, n txn.NodeID) (question, error) {
	s, err := find(servers, n)
	if err != nil {
		return nil, nil //nolint:nilerr // gone is what it should be
	}
	if s.Suffrage == raft.Voter && len(voters(servers)) == 1 {
		return nil, ErrLastVoter
	}
	return func(to *raft.Raft, index uint64, patience time.Duration) raft.IndexFuture {
		return to.RemoveServer(s.ID, index, patience)
	}, nil
}

func find(servers []raft.Server, n txn.NodeID) (raft.Server, error) {
	for _, s := range servers {
		if s.ID == serverID(n) {
			return s, nil
		}
	}
	return raft.Server{}, ErrNotMember
}

// change brings the committed configuration to what is planned for, by one step of Raft's.
func (c *Consensus) change(ctx context.Context, plan plan) error {
	if !c.calls.enter() {
		return fmt.Errorf("%w: %w", ErrNotLeader, txn.ErrClosed)
	}
	defer c.calls.leave()
	select {
	case c.changing <- struct{}{}:
		defer func() { <-c.changing }()
	case <-ctx.Done():
		return fmt.Errorf("another change is under way: %w", context.Cause(ctx))
	}
	r := c.leading.current()
	if r.Leader != c.config.Node {
		return errNotLeader(r.Leadership)
	}
	var maybe error // what an attempt ended with that may have had an effect
	// Once the reign is primed, the FSM goroutine has met everything that earlier leaders have committed.
	for wait := (<-chan struct{})(r.primed); ; {
		select {
		case <-wait:
		case <-r.ctx.Done():
			return outcome(maybe, errNotLeader(c.leading.current().Leadership))
		case <-c.closing.Done():
			return outcome(maybe, fmt.Errorf("%w: %w", ErrNotLeader, txn.ErrClosed))
		case <-ctx.Done():
			return outcome(maybe, fmt.Errorf("the latest change is not committed: %w", context.Cause(ctx)))
		}
		servers, index, changed := c.configured.read()
		wait = changed
		if !slices.Equal(servers, c.servers()) {
			continue // Raft, too, takes one at a time
		}
		ask, err := plan(servers)
		if ask == nil || err != nil {
			return err
		}
		done, err := c.ask(ctx, ask, index)
		if done && err == nil && !slices.Contains(voters(c.servers()), serverID(c.config.Node)) {
			select {
			case <-r.ctx.Done(): // which it is about to be
			case <-ctx.Done():
			}
		}
		if done {
			return err
		}
		// Raft has refused it because there is a newer configuration, or the disk has refused it, which ends the reign.
		maybe = err
	}
}

// outcome is why a change was given up, given what became of it before.
func outcome(maybe, why error) error {
	if maybe != nil {
		return fmt.Errorf("%w: %w; %w", txn.ErrOutcomeUnknown, why, maybe)
	}
	return why
}

// ask puts a change to Raft and waits for what comes of it. If that leaves open whether it could still succeed, it is
// not done.
func (c *Consensus) ask(ctx context.Context, ask question, index uint64) (done bool, err error) {
	var patience time.Duration
	if deadline, ok := ctx.Deadline(); ok {
		patience = max(time.Until(deadline), time.Millisecond) // 0 would be for ever
	}
	answer := make(chan error, 1)
	c.futures.Go(func() { answer <- ask(c.raft, index, patience).Error() })
	select {
	case err = <-answer:
	case <-ctx.Done():
		return true, fmt.Errorf("%w: %w", txn.ErrOutcomeUnknown, context.Cause(ctx))
	}
	c.transfers.proposed(err)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return true, fmt.Errorf("%w: %w", ErrNotLeader, err)
	case errors.Is(err, raft.ErrEnqueueTimeout):
		return true, fmt.Errorf("the latest change is not committed: %w", err)
	case errors.Is(err, raft.ErrLeadershipLost), errors.Is(err, raft.ErrRaftShutdown):
		return true, fmt.Errorf("%w: %w", txn.ErrOutcomeUnknown, err)
	}
	return false, err
}

func errNotLeader(l Leadership) error {
	if l.Leader == 0 {
		return fmt.Errorf("%w: no leader is known", ErrNotLeader)
	}
	return fmt.Errorf("%w: node %s does", ErrNotLeader, l.Leader)
}
