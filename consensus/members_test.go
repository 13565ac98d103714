package consensus

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	pb "github.com/quorate/quorate/proto/quorate/consensus/v1"
	"github.com/quorate/quorate/txn"
)

// launch starts a node that waits to be added, and returns its place.
func (tc *testCluster) launch(change func(*Config)) int {
	tc.t.Helper()
	i := len(tc.nodes)
	tc.create(Member{Node: txn.NodeID(i + 1), RaftAddress: freeAddress(tc.t), GRPCAddress: freeAddress(tc.t)}, nil, change)
	tc.nodes[i].out = true
	tc.start(i)
	return i
}

// onLeader has the leader do something, again if leadership is lost meanwhile.
func (tc *testCluster) onLeader(what string, do func(context.Context, *Consensus) error) {
	tc.t.Helper()
	ctx, cancel := context.WithTimeout(tc.t.Context(), 2*patience)
	defer cancel()
	for {
		err := do(ctx, tc.nodes[tc.leader()].c)
		if err == nil {
			return
		}
		if ctx.Err() != nil || !errors.Is(err, ErrNotLeader) && !errors.Is(err, txn.ErrOutcomeUnknown) {
			tc.t.Fatalf("%s: %v", what, err)
		}
	}
}

func (tc *testCluster) add(i int) {
	tc.t.Helper()
	tc.onLeader("add", func(ctx context.Context, c *Consensus) error { return c.AddNonvoter(ctx, tc.nodes[i].member) })
	tc.nodes[i].out = false
}

func (tc *testCluster) promote(i int) {
	tc.t.Helper()
	tc.onLeader("promote", func(ctx context.Context, c *Consensus) error { return c.Promote(ctx, tc.nodes[i].member.Node) })
}

func (tc *testCluster) demote(i int) {
	tc.t.Helper()
	tc.onLeader("demote", func(ctx context.Context, c *Consensus) error { return c.Demote(ctx, tc.nodes[i].member.Node) })
}

func (tc *testCluster) remove(i int) {
	tc.t.Helper()
	tc.onLeader("remove", func(ctx context.Context, c *Consensus) error {
		tc.nodes[i].out = true // it may be the leader, and will agree to no other
		return c.Remove(ctx, tc.nodes[i].member.Node)
	})
}

// load proposes on nodes until stop, and knows what has become of it.
type load struct {
	mu           sync.Mutex
	acknowledged map[txn.LogIndex]string
	group        sync.WaitGroup
	stopping     chan struct{}
}

func newLoad() *load {
	return &load{acknowledged: make(map[txn.LogIndex]string), stopping: make(chan struct{})}
}

// on begins to propose on a node.
func (l *load) on(c *Consensus, name string) {
	l.group.Go(func() {
		for k := 0; ; k++ {
			select {
			case <-l.stopping:
				return
			default:
			}
			data := fmt.Sprintf("%s/%d", name, k)
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			index, err := c.Propose(ctx, []byte(data))
			if err == nil {
				l.mu.Lock()
				l.acknowledged[index] = data
				l.mu.Unlock()
			} else if _, err := c.WaitLeader(ctx); errors.Is(err, txn.ErrClosed) {
				cancel()
				return
			}
			cancel()
		}
	})
}

func (l *load) stop() {
	close(l.stopping)
	l.group.Wait()
}

// await waits until so many more proposals are acknowledged.
func (l *load) await(t *testing.T, more int) {
	t.Helper()
	count := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.acknowledged)
	}
	want := count() + more
	for deadline := time.Now().Add(patience); count() < want; {
		if time.Now().After(deadline) {
			t.Fatal("nothing is committed any more")
		}
		time.Sleep(5 * time.Millisecond) // proposals are not worth an event each
	}
}

// check says whether all members have applied the same, with everything that was acknowledged in it, and nothing twice.
func (l *load) check(tc *testCluster) {
	t := tc.t
	t.Helper()
	last := tc.propose(tc.leader(), "the last one")
	var want []Entry
	for i, n := range tc.nodes {
		if n.out || n.c == nil {
			continue
		}
		got := n.machine.awaitIndex(t, last)
		if want == nil {
			want = got
		}
		if !slices.EqualFunc(got, want, sameEntry) {
			t.Errorf("node %d has applied something else", i+1)
		}
	}
	at := make(map[txn.LogIndex]string)
	indexes := make(map[string]txn.LogIndex)
	for _, e := range want {
		if first, ok := indexes[string(e.Data)]; ok {
			t.Errorf("%q is at %d and at %d", e.Data, first, e.Index)
		}
		at[e.Index], indexes[string(e.Data)] = string(e.Data), e.Index
	}
	for index, data := range l.acknowledged {
		if at[index] != data {
			t.Errorf("%q was acknowledged at %d, where there is %q", data, index, at[index])
		}
	}
}

func (tc *testCluster) requireMembers(on int, voters, others []int) {
	tc.t.Helper()
	var want []Member
	for i, n := range tc.nodes {
		if m := n.member; slices.Contains(voters, i) {
			m.Voter = true
			want = append(want, m)
		} else if slices.Contains(others, i) {
			want = append(want, m)
		}
	}
	if got := tc.nodes[on].c.Members(); !slices.Equal(got, want) {
		tc.t.Errorf("node %d takes for members %v, not %v", on+1, got, want)
	}
}

// A node on its own becomes three, five, three again, its first leader removed, while everybody proposes.
func TestGrowAndShrink(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 1, nil)
	l := newLoad()
	l.on(tc.nodes[0].c, "node 1")
	for i := 1; i < 5; i++ {
		tc.launch(nil)
		l.on(tc.nodes[i].c, fmt.Sprintf("node %d", i+1))
		tc.add(i)
		tc.requireMembers(tc.leader(), seq(i), []int{i})
		l.await(t, 20)
		tc.promote(i)
		tc.requireMembers(tc.leader(), seq(i+1), nil)
		l.await(t, 20)
	}
	leader := tc.leader()
	tc.remove(leader)
	select {
	case <-tc.nodes[leader].c.Removed():
	case <-time.After(patience):
		t.Error("the leader does not know that it is removed")
	}
	l.await(t, 20)
	other := (tc.leader() + 1) % 5
	if other == leader {
		other = (other + 1) % 5
	}
	tc.remove(other)
	select {
	case <-tc.nodes[other].c.Removed():
	case <-time.After(patience):
		t.Error("the follower does not know that it is removed")
	}
	l.await(t, 20)
	l.stop()
	l.check(tc)
	rest := slices.DeleteFunc(seq(5), func(i int) bool { return i == leader || i == other })
	for _, i := range rest {
		tc.requireMembers(i, rest, nil)
	}
}

func seq(n int) []int {
	s := make([]int, n)
	for i := range s {
		s[i] = i
	}
	return s
}

// A node that waits to be added takes no part, does not stand for election, and says so.
func TestNodeWaitsToBeAdded(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 1, nil)
	i := tc.launch(nil)
	c := tc.nodes[i].c
	if _, err := c.Propose(t.Context(), []byte("x")); !errors.Is(err, txn.ErrNoQuorum) {
		t.Errorf("propose: %v", err)
	}
	if m := c.Members(); len(m) != 0 {
		t.Errorf("members: %v", m)
	}
	time.Sleep(3 * tc.nodes[i].config.HeartbeatTimeout) // what is tested is that nothing happens
	if s := c.Status(); s.Term != 0 || s.State != Follower {
		t.Errorf("status: %+v", s)
	}
	if err := c.AddNonvoter(t.Context(), tc.nodes[i].member); !errors.Is(err, ErrNotLeader) {
		t.Errorf("it added itself: %v", err)
	}
	// It does not forget to wait, and once it has been added it is known, by what is in its log, across restarts.
	tc.stop(i)
	tc.start(i)
	tc.add(i)
	index := tc.propose(i, "forwarded")
	if read := tc.readIndex(i); read < index {
		t.Errorf("read index %d after %d", read, index)
	}
	tc.nodes[i].machine.awaitIndex(t, index)
	tc.stop(i)
	tc.start(i)
	tc.requireMembers(i, []int{0}, []int{i})
	tc.nodes[i].machine.awaitIndex(t, tc.propose(i, "forwarded again"))
}

// A joiner of a group whose log does not reach back to the beginning gets a snapshot, and what follows it.
func TestJoinerGetsSnapshot(t *testing.T) {
	parallel(t)
	for _, store := range []string{LogStoreWAL, LogStoreBoltDB} {
		t.Run(store, func(t *testing.T) {
			change := func(c *Config) { c.TrailingLogs, c.LogStore, c.walSegment = 1, store, 4096 }
			tc := newCluster(t, 3, change)
			leader := tc.leader()
			for k := range 20 {
				tc.propose(leader, fmt.Sprint(k)+string(make([]byte, 1000)))
			}
			last := tc.propose(leader, "last")
			tc.nodes[leader].machine.awaitIndex(t, last)
			if err := tc.nodes[leader].c.TakeSnapshot(); err != nil {
				t.Fatal(err)
			}
			joiner := tc.launch(change)
			tc.add(joiner)
			index := tc.propose(joiner, "of the joiner")
			want := tc.nodes[leader].machine.awaitIndex(t, index)
			got := tc.nodes[joiner].machine.awaitIndex(t, index)
			if !slices.EqualFunc(got, want, sameEntry) || tc.nodes[joiner].machine.restored != 21 {
				t.Errorf("the joiner has %d entries, %d of them by a snapshot; the leader %d", len(got), tc.nodes[joiner].machine.restored, len(want))
			}
			// What it knows of the members rests on the snapshot alone after a restart.
			tc.promote(joiner)
			tc.nodes[joiner].machine.awaitIndex(t, tc.propose(leader, "behind the promotion"))
			if err := tc.nodes[joiner].c.TakeSnapshot(); err != nil {
				t.Fatal(err)
			}
			tc.stop(joiner)
			tc.start(joiner)
			tc.requireMembers(joiner, seq(4), nil)
			// And it can go on from there as a leader: Raft refuses a change upon any other configuration than its latest.
			tc.onLeader("transfer", func(ctx context.Context, c *Consensus) error {
				return c.TransferLeadership(ctx, tc.nodes[joiner].member.Node)
			})
			tc.remove((joiner + 1) % 4)
		})
	}
}

func TestPromoteAndDemote(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 3, nil)
	leader := tc.leader()
	c, ctx := tc.nodes[leader].c, t.Context()
	other, third := txn.NodeID((leader+1)%3+1), txn.NodeID((leader+2)%3+1)
	for _, err := range []error{c.Demote(ctx, other), c.Demote(ctx, other), c.Demote(ctx, third)} {
		if err != nil {
			t.Error(err)
		}
	}
	tc.requireMembers(leader, []int{leader}, []int{int(other) - 1, int(third) - 1})
	if err := c.Demote(ctx, txn.NodeID(leader+1)); !errors.Is(err, ErrLastVoter) {
		t.Errorf("demoted the last voter: %v", err)
	}
	if err := c.Remove(ctx, txn.NodeID(leader+1)); !errors.Is(err, ErrLastVoter) {
		t.Errorf("removed the last voter: %v", err)
	}
	if err := c.TransferLeadership(ctx, other); err == nil {
		t.Error("handed over to a member without a vote")
	}
	// One voter decides alone, whoever else there is: nobody's answer but its own counts.
	tc.stop(int(other) - 1)
	tc.stop(int(third) - 1)
	tc.propose(leader, "alone")
	tc.readIndex(leader)
	tc.start(int(other) - 1)
	tc.start(int(third) - 1)

	if err := errors.Join(c.Promote(ctx, other), c.Promote(ctx, other), c.Promote(ctx, third)); err != nil {
		t.Error(err)
	}
	for _, err := range []error{c.Promote(ctx, 9), c.Demote(ctx, 9)} {
		if !errors.Is(err, ErrNotMember) {
			t.Errorf("change of nobody: %v", err)
		}
	}
	if err := c.Remove(ctx, 9); err != nil {
		t.Errorf("nobody is not gone: %v", err)
	}
	for _, err := range []error{
		tc.nodes[other-1].c.Promote(ctx, third), tc.nodes[other-1].c.Remove(ctx, third), tc.nodes[other-1].c.AddNonvoter(ctx, Member{9, "a:1", "a:2", false}),
	} {
		if !errors.Is(err, ErrNotLeader) {
			t.Errorf("change by a follower: %v", err)
		}
	}
	for _, m := range []Member{{0, "a:1", "a:2", false}, {9, "a", "a:2", false}, {9, "a:1", "a b:2", false}, {9, tc.nodes[0].member.RaftAddress, "a:2", false}} {
		if err := c.AddNonvoter(ctx, m); err == nil || errors.Is(err, ErrNotLeader) {
			t.Errorf("added %+v: %v", m, err)
		}
	}
	if err := tc.nodes[tc.leader()].c.Demote(ctx, txn.NodeID(leader+1)); err != nil {
		t.Errorf("demote the leader: %v", err)
	}
	if next := tc.leader(); next == leader {
		t.Error("a member without a vote leads")
	}
	index := tc.propose(leader, "of a member without a vote")
	if read := tc.readIndex(leader); read < index {
		t.Errorf("read index %d after %d", read, index)
	}
}

// Two of three voters gone, two members without a vote there: nobody decides anything.
func TestOnlyVotersCount(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 3, nil)
	leader := tc.leader()
	for range 2 {
		tc.add(tc.launch(nil))
	}
	index := tc.propose(3, "with a majority")
	tc.nodes[4].machine.awaitIndex(t, index)
	c := tc.nodes[leader].c
	tc.stop((leader + 1) % 3)
	tc.stop((leader + 2) % 3)
	stopped := time.Now()
	for time.Since(stopped) < c.QuorumTimeout() {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if _, err := c.ReadIndex(ctx); err == nil {
			t.Fatal("a read barrier was given")
		}
		if _, err := tc.nodes[3].c.Propose(ctx, []byte("x")); err == nil {
			t.Fatal("an entry was committed")
		}
		cancel()
		time.Sleep(10 * time.Millisecond)
	}
	for _, i := range []int{leader, 3, 4} {
		if at := tc.nodes[i].c.QuorumContact(); at.After(stopped) {
			t.Errorf("node %d has heard from a majority %v after there was none", i+1, at.Sub(stopped))
		}
	}
	tc.start((leader + 1) % 3)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for { // who leads may change a few times until all is calm
		_, err := tc.nodes[4].c.Propose(ctx, []byte("again"))
		if err == nil {
			break
		}
		if _, waitErr := tc.nodes[4].c.WaitLeader(ctx); waitErr != nil || ctx.Err() != nil {
			t.Fatalf("propose with a majority: %v", err)
		}
	}
}

// A node that was away when it was removed stands for elections that nobody takes notice of.
func TestRemovedDisturbsNobody(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 3, nil)
	leader := tc.leader()
	gone := (leader + 1) % 3
	tc.stop(gone)
	tc.remove(gone)
	before := tc.nodes[leader].c.Status()
	tc.start(gone)
	for deadline := time.Now().Add(patience); testutil.ToFloat64(tc.nodes[gone].c.metrics.elections) == 0; {
		if len(tc.nodes[gone].c.Members()) == 2 {
			break // the leader was still about to send it that
		}
		if time.Now().After(deadline) {
			t.Fatal("the removed node is content with having no leader")
		}
		time.Sleep(10 * time.Millisecond) // counters tell nobody
	}
	time.Sleep(2 * tc.nodes[gone].config.ElectionTimeout) // what is tested is that nothing happens
	if after := tc.nodes[leader].c.Status(); after.Term != before.Term || after.State != Leader {
		t.Errorf("term %d has become %d", before.Term, after.Term)
	}
	tc.propose(leader, "undisturbed")
}

// A member that has moved is found again.
func TestMemberMoves(t *testing.T) {
	tc := newCluster(t, 3, nil)
	leader := tc.leader()
	moved := (leader + 1) % 3
	tc.propose(moved, "before")
	tc.stop(moved)
	n := tc.nodes[moved]
	n.member.RaftAddress, n.member.GRPCAddress = freeAddress(t), freeAddress(t)
	n.config.RaftAddress = n.member.RaftAddress
	tc.add(moved)
	tc.requireMembers(leader, seq(3), nil)
	tc.start(moved)
	n.machine.awaitIndex(t, tc.propose(moved, "after"))
	// The others reach it as well.
	tc.onLeader("transfer", func(ctx context.Context, c *Consensus) error { return c.TransferLeadership(ctx, n.member.Node) })
	tc.propose(leader, "to the member that has moved")
}

// Changes that are asked for at once happen one after another, and all of them.
func TestConcurrentChanges(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 1, nil)
	tc.leader()
	for range 4 {
		tc.launch(nil)
	}
	var group sync.WaitGroup
	for _, n := range tc.nodes[1:] {
		for range 2 {
			group.Go(func() {
				if err := tc.nodes[0].c.AddNonvoter(t.Context(), n.member); err != nil {
					t.Error(err)
				}
			})
		}
	}
	group.Wait()
	tc.requireMembers(0, []int{0}, []int{1, 2, 3, 4})
	index := txn.LogIndex(tc.nodes[0].c.raft.LastIndex())
	if first, _ := tc.nodes[0].c.stores.log.FirstIndex(); index-txn.LogIndex(first) > 8 {
		t.Errorf("the log goes to %d: changes were made twice", index)
	}
}

// A leader without a majority cannot change the members, and does not pretend to know that it did not.
func TestChangeWithoutMajority(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 3, nil)
	leader := tc.leader()
	tc.propose(leader, "works")
	tc.stop((leader + 1) % 3)
	tc.stop((leader + 2) % 3)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := tc.nodes[leader].c.AddNonvoter(ctx, Member{9, "127.0.0.1:1", "127.0.0.1:2", false})
	if !errors.Is(err, txn.ErrOutcomeUnknown) && !errors.Is(err, ErrNotLeader) {
		t.Errorf("add: %v", err)
	}
}

// Only members may follow, and only whom they mean.
func TestLinkRefusesStrangers(t *testing.T) {
	parallel(t)
	cluster := [16]byte{1, 2, 3}
	tc := newCluster(t, 1, func(c *Config) { c.ClusterID = cluster })
	tc.leader()
	conn, err := grpc.NewClient(tc.nodes[0].member.GRPCAddress, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for name, try := range map[string]struct {
		first *pb.ToLeader
		want  codes.Code
	}{
		"no greeting":     {&pb.ToLeader{Requests: []*pb.Request{{Id: 1, Body: &pb.Request_Propose{Propose: []byte("x")}}}}, codes.PermissionDenied},
		"another cluster": {&pb.ToLeader{Hello: &pb.Hello{Cluster: make([]byte, 16), From: 1, To: 1}}, codes.PermissionDenied},
		"not a member":    {&pb.ToLeader{Hello: &pb.Hello{Cluster: cluster[:], From: 2, To: 1}}, codes.PermissionDenied},
		"another node":    {&pb.ToLeader{Hello: &pb.Hello{Cluster: cluster[:], From: 1, To: 2}}, codes.FailedPrecondition},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		stream, err := pb.NewConsensusClient(conn).Link(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(try.first); err != nil {
			t.Fatal(err)
		}
		if m, err := stream.Recv(); status.Code(err) != try.want {
			t.Errorf("%s: got %v, %v", name, m, err)
		}
		cancel()
	}
	if last := tc.propose(0, "x"); len(tc.nodes[0].machine.awaitIndex(t, last)) != 1 {
		t.Error("a stranger's proposal is in the log")
	}
}

// Members come, go, get and lose votes, crash and come back at random while everybody proposes.
func TestRandomMembership(t *testing.T) {
	parallel(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	tc := newCluster(t, 3, func(c *Config) { c.TrailingLogs = 50 })
	l := newLoad()
	names := 0
	begin := func(i int) {
		names++
		l.on(tc.nodes[i].c, fmt.Sprintf("node %d, %d", i+1, names))
	}
	for i := range tc.nodes {
		begin(i)
	}
	pick := func(from []int) int { return from[random.IntN(len(from))] }
	for range 14 {
		leader := tc.leader()
		var with, without []int
		for i, n := range tc.nodes {
			if m, ok := tc.nodes[leader].c.member(n.member.Node); ok && m.Voter {
				with = append(with, i)
			} else if ok {
				without = append(without, i)
			}
		}
		switch step := random.IntN(6); {
		case step == 0 && len(with)+len(without) < 6:
			i := tc.launch(func(c *Config) { c.TrailingLogs = 50 })
			begin(i)
			tc.add(i)
		case step == 1 && len(without) > 0:
			tc.promote(pick(without))
		case step == 2 && len(with) > 3:
			tc.demote(pick(with))
		case step == 3 && len(with) > 3:
			i := pick(append(with, without...))
			tc.remove(i)
			if random.IntN(2) == 0 {
				tc.stop(i)
			}
		case step == 4:
			i := pick(append(with, without...))
			if err := tc.nodes[i].c.TakeSnapshot(); err != nil && !errors.Is(err, errBehind) {
				t.Logf("node %d: %v", i+1, err) // it may be too busy
			}
			tc.stop(i)
			tc.start(i)
			begin(i)
		case step == 5:
			to := pick(with)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			if err := tc.nodes[leader].c.TransferLeadership(ctx, txn.NodeID(to+1)); err != nil {
				t.Logf("transfer to node %d: %v", to+1, err) // it may not be caught up
			}
			cancel()
		}
		l.await(t, 10)
	}
	l.stop()
	l.check(tc)
}
