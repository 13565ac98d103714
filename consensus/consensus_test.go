package consensus

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/hashicorp/raft-wal/verifier"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/quorate/quorate/txn"
)

func TestEveryMachineSeesOneOrder(t *testing.T) {
	parallel(t)
	for _, store := range []string{LogStoreWAL, LogStoreBoltDB} {
		t.Run(store, func(t *testing.T) {
			tc := newCluster(t, 3, func(c *Config) { c.LogStore = store })
			tc.leader()
			const each, proposers = 40, 4
			var mu sync.Mutex
			acknowledged := map[txn.LogIndex]string{}
			var group sync.WaitGroup
			for i := range tc.nodes {
				for p := range proposers {
					group.Go(func() {
						for k := range each {
							data := fmt.Sprintf("%d/%d/%d", i, p, k)
							index := tc.propose(i, data)
							mu.Lock()
							acknowledged[index] = data
							mu.Unlock()
						}
					})
				}
			}
			group.Wait()
			want := tc.nodes[0].machine.awaitCount(t, 3*each*proposers)
			if len(want) != len(acknowledged) {
				t.Fatalf("%d entries applied, %d acknowledged", len(want), len(acknowledged))
			}
			for _, e := range want {
				if acknowledged[e.Index] != string(e.Data) {
					t.Fatalf("entry %d is %q, but %q was acknowledged there", e.Index, e.Data, acknowledged[e.Index])
				}
			}
			for i, n := range tc.nodes {
				got := n.machine.awaitCount(t, len(want))
				if !slices.EqualFunc(got, want, sameEntry) {
					t.Errorf("node %d applied another order", i+1)
				}
				last := want[len(want)-1]
				if data, err := n.c.Entry(last.Index); err != nil || !bytes.Equal(data, last.Data) {
					t.Errorf("node %d: Entry(%d) = %q, %v", i+1, last.Index, data, err)
				}
				if s := n.c.Status(); s.CommitIndex < last.Index || s.LastIndex < last.Index || len(s.Members) != 3 || s.Leader == 0 {
					t.Errorf("node %d: status %+v", i+1, s)
				}
			}
		})
	}
}

func sameEntry(a, b Entry) bool {
	return a.Index == b.Index && a.Term == b.Term && bytes.Equal(a.Data, b.Data)
}

// With a commit timeout that the test does not live to see, a lone entry reaches the followers by notice or not at all.
func TestFollowersHearOfALoneCommitByNotice(t *testing.T) {
	tc := newCluster(t, 3, func(c *Config) { c.CommitTimeout = time.Minute })
	leader := tc.leader()
	for round := range 5 {
		for from := range tc.nodes {
			index := tc.propose(from, fmt.Sprintf("round %d from %d", round, from))
			for _, n := range tc.nodes {
				n.machine.awaitIndex(t, index)
			}
		}
	}
	for i, n := range tc.nodes {
		if injected := testutil.ToFloat64(n.c.metrics.notices); i != leader && injected == 0 {
			t.Errorf("node %d injected no notice", i+1)
		}
	}
	// Nor does one that comes back with everything in its log have to wait for more.
	back := (leader + 1) % 3
	last := tc.propose(leader, "last")
	tc.nodes[back].machine.awaitIndex(t, last)
	tc.stop(back)
	tc.start(back)
	tc.nodes[back].machine.awaitIndex(t, last)
}

// A new leader commits what its predecessor left, and followers apply it, without anything new being proposed.
func TestLeaderLost(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 3, func(c *Config) { c.CommitTimeout = time.Minute })
	old := tc.leader()
	first := tc.propose((old+1)%3, "before")
	tc.stop(old)
	next := tc.leader()
	if next == old {
		t.Fatal("the closed node leads")
	}
	second := tc.propose(next, "on the new leader")
	third := tc.propose(3-old-next, "on the follower")
	if first >= second || second >= third {
		t.Fatalf("indexes %d, %d, %d do not ascend", first, second, third)
	}
	tc.start(old)
	// The leader, if it has tried already to reach it, tries again with the next entry only.
	last := tc.propose(next, "for who was away")
	for i, n := range tc.nodes {
		entries := n.machine.awaitIndex(t, last)
		if len(entries) != 4 || string(entries[0].Data) != "before" || string(entries[2].Data) != "on the follower" {
			t.Errorf("node %d applied %d entries", i+1, len(entries))
		}
	}
}

func TestRestartReplays(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 3, func(c *Config) { c.TrailingLogs = 5 })
	var last txn.LogIndex
	tc.leader()
	for k := range 20 {
		last = tc.propose(k%3, fmt.Sprint(k))
	}
	for _, n := range tc.nodes {
		n.machine.awaitIndex(t, last)
	}
	// One node with a snapshot, the others without.
	if err := tc.nodes[0].c.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	if first, err := tc.nodes[0].c.stores.log.FirstIndex(); err != nil || first == 1 {
		t.Errorf("the log begins at %d after a snapshot: %v", first, err)
	}
	tc.stopAll()
	for i := range tc.nodes {
		tc.start(i)
	}
	for i, n := range tc.nodes {
		entries := n.machine.awaitCount(t, 20)
		for k, e := range entries {
			if string(e.Data) != fmt.Sprint(k) {
				t.Fatalf("node %d: entry %d is %q", i+1, k, e.Data)
			}
		}
	}
	if restored := tc.nodes[0].machine.restored; restored != 20 {
		t.Errorf("node 1 restored %d entries from its snapshot", restored)
	}
	if got := tc.nodes[0].c.Status().AppliedIndex; got != last {
		t.Errorf("node 1 has applied %d after restoring %d", got, last)
	}
	tc.leader()
	tc.propose(0, "after")
	for _, n := range tc.nodes {
		n.machine.awaitCount(t, 21)
	}
}

func TestNoMajority(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 3, nil)
	leader := tc.leader()
	tc.propose(leader, "with a majority")
	tc.stop((leader + 1) % 3)
	tc.stop((leader + 2) % 3)
	// The leader leads for the length of its lease yet.
	sawRefusal := false
	for deadline := time.Now().Add(patience); !sawRefusal && time.Now().Before(deadline); {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		began := time.Now()
		_, err := tc.nodes[leader].c.Propose(ctx, []byte("without"))
		cancel()
		switch {
		case err == nil:
			t.Fatal("committed without a majority")
		case errors.Is(err, txn.ErrNoQuorum):
			sawRefusal = true
		case !errors.Is(err, txn.ErrOutcomeUnknown):
			t.Fatalf("propose: %v", err)
		}
		if took := time.Since(began); took > patience {
			t.Fatalf("propose took %v", took)
		}
	}
	if !sawRefusal {
		t.Error("the leader never stepped down")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if _, err := tc.nodes[leader].c.ReadIndex(ctx); !errors.Is(err, txn.ErrNoQuorum) {
		t.Errorf("read index: %v", err)
	}
	tc.start((leader + 1) % 3)
	after := tc.leader()
	tc.propose(after, "again")
}

// A context that ends bounds every call, also on a follower whose leader does not answer.
func TestContextBoundsPropose(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 3, nil)
	leader := tc.leader()
	tc.propose((leader+1)%3, "works")
	tc.nodes[leader].server.Stop() // Raft goes on, links do not
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	_, err := tc.nodes[(leader+1)%3].c.Propose(ctx, []byte("nobody listens"))
	if !errors.Is(err, txn.ErrNoQuorum) && !errors.Is(err, txn.ErrOutcomeUnknown) {
		t.Errorf("propose: %v", err)
	}
}

func TestReadIndexCoversAcknowledged(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 3, nil)
	leader := tc.leader()
	var group sync.WaitGroup
	for i := range tc.nodes {
		group.Go(func() {
			for k := range 20 {
				index := tc.propose(i, fmt.Sprint(i, k))
				if read := tc.readIndex((i + 1) % 3); read < index {
					t.Errorf("read index %d after acknowledged %d", read, index)
					return
				}
			}
		})
	}
	group.Wait()
	// Also the first thing a new leader is asked.
	before := tc.propose(leader, "last of the old leader")
	tc.stop(leader)
	tc.leader()
	for i, n := range tc.nodes {
		if n.c == nil {
			continue
		}
		read := tc.readIndex(i)
		if read < before {
			t.Errorf("node %d: read index %d, acknowledged %d", i+1, read, before)
		}
		n.machine.awaitIndex(t, read)
	}
}

func TestLargeEntries(t *testing.T) {
	tc := newCluster(t, 3, nil)
	from := tc.follower()
	var group sync.WaitGroup
	for k, size := range []int{MaxData, 1<<20 + 1, 1, MaxData, 2 << 20} {
		group.Go(func() { tc.propose(from, string(bytes.Repeat([]byte{byte('a' + k)}, size))) })
	}
	group.Wait()
	want := tc.nodes[from].machine.awaitCount(t, 5)
	for _, n := range tc.nodes {
		if got := n.machine.awaitCount(t, 5); !slices.EqualFunc(got, want, sameEntry) {
			t.Error("nodes differ")
		}
		for _, e := range want {
			if data, err := n.c.Entry(e.Index); err != nil || !bytes.Equal(data, e.Data) {
				t.Errorf("Entry(%d) is not what was proposed: %v", e.Index, err)
			}
		}
	}
	for _, size := range []int{0, MaxData + 1} {
		if _, err := tc.nodes[from].c.Propose(context.Background(), make([]byte, size)); !errors.Is(err, ErrSize) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

// A machine that hangs holds up nobody else, and gets everything afterwards.
func TestSlowMachineStopsNobody(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 3, nil)
	leader := tc.leader()
	quick := (leader + 2) % 3
	for i, n := range tc.nodes {
		if i != quick {
			n.machine.hold = make(chan struct{})
		}
	}
	var last txn.LogIndex
	for k := range 10 {
		last = tc.propose(quick, fmt.Sprint(k))
	}
	want := tc.nodes[quick].machine.awaitIndex(t, last)
	if err := tc.nodes[leader].c.raft.Snapshot().Error(); err == nil {
		t.Error("a snapshot was taken of a machine that is behind")
	}
	for i, n := range tc.nodes {
		if i == quick {
			continue
		}
		if applied := n.c.Status().AppliedIndex; applied != 0 {
			t.Errorf("node %d has applied %d while Apply hangs", i+1, applied)
		}
		close(n.machine.hold)
		if got := n.machine.awaitIndex(t, last); !slices.EqualFunc(got, want, sameEntry) {
			t.Errorf("node %d got something else", i+1)
		}
	}
}

// A machine that takes another's place gets everything from the newest snapshot on, as after a restart, and the old
// one nothing more, while Raft goes on.
func TestReplacedMachineGetsEverything(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 3, func(c *Config) { c.TrailingLogs, c.LogStore = 1, LogStoreBoltDB })
	node := tc.nodes[tc.leader()]
	var proposed []string
	propose := func(n int) (last txn.LogIndex) {
		for range n {
			proposed = append(proposed, fmt.Sprint(len(proposed)))
			last = tc.propose(tc.leader(), proposed[len(proposed)-1])
		}
		return last
	}
	check := func(m *recorder, last txn.LogIndex, restored int) {
		t.Helper()
		var got []string
		for _, e := range m.awaitIndex(t, last) {
			got = append(got, string(e.Data))
		}
		if !slices.Equal(got, proposed) || m.restored != restored {
			t.Errorf("got %q, %d of them by a snapshot; want %q, %d", got, m.restored, proposed, restored)
		}
	}
	propose(10)
	first := newRecorder()
	if err := node.c.Replace(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	check(first, propose(5), 0)
	first.hold = make(chan struct{})
	if err := node.c.TakeSnapshot(); err != nil {
		t.Fatal(err)
	}
	last := propose(5) // the first of them hangs in the old machine
	second := newRecorder()
	done := make(chan error)
	go func() { done <- node.c.Replace(context.Background(), second) }()
	close(first.hold)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	check(second, last, 15)
	first.mu.Lock()
	old := len(first.entries)
	first.mu.Unlock()
	check(second, propose(3), 15)
	if len(first.entries) != old {
		t.Errorf("the old machine got %d entries after it was replaced", len(first.entries)-old)
	}
	if got := node.c.Status().AppliedIndex; got < last {
		t.Errorf("applied %d of %d", got, last)
	}

	// The snapshot that Raft is writing is waited for: after it the log may begin behind the one before.
	writing := &heldSnapshots{recorder: newRecorder(), begun: make(chan struct{}), hold: make(chan struct{})}
	if err := node.c.Replace(t.Context(), writing); err != nil {
		t.Fatal(err)
	}
	check(writing.recorder, propose(2), 15)
	go func() { done <- node.c.TakeSnapshot() }()
	<-writing.begun
	third := newRecorder()
	replaced := make(chan error)
	go func() { replaced <- node.c.Replace(context.Background(), third) }()
	last = propose(2)
	select {
	case err := <-replaced:
		t.Errorf("replaced (%v) while a snapshot was being written", err)
	case <-time.After(50 * time.Millisecond): // long enough to catch one that does not wait
	}
	close(writing.hold)
	if err := errors.Join(<-done, <-replaced); err != nil {
		t.Fatal(err)
	}
	check(third, last, 25)
}

// heldSnapshots is a recorder whose snapshots are written when hold is closed.
type heldSnapshots struct {
	*recorder
	begun, hold chan struct{}
}

func (h *heldSnapshots) Snapshot() (Snapshot, error) {
	s, err := h.recorder.Snapshot()
	return heldSnapshot{s, h}, err
}

type heldSnapshot struct {
	Snapshot
	of *heldSnapshots
}

func (s heldSnapshot) WriteTo(w io.Writer) (int64, error) {
	close(s.of.begun)
	<-s.of.hold
	return s.Snapshot.WriteTo(w)
}

// A member whose log ends before the leader's begins must not have a snapshot put over it.
func TestMemberTooFarBehindStops(t *testing.T) {
	parallel(t)
	// raft-wal goes on to serve truncated entries from a segment that it still writes to.
	tc := newCluster(t, 3, func(c *Config) { c.TrailingLogs, c.LogStore = 1, LogStoreBoltDB })
	leader := tc.leader()
	away := (leader + 1) % 3
	tc.propose(leader, "all have this")
	tc.stop(away)
	for k := range 10 {
		tc.propose(leader, fmt.Sprint(k))
	}
	for i, n := range tc.nodes {
		if i != away {
			n.machine.awaitCount(t, 11)
			if err := n.c.raft.Snapshot().Error(); err != nil {
				t.Fatal(err)
			}
		}
	}
	tc.start(away)
	select {
	case <-tc.nodes[away].c.Failed():
	case <-time.After(patience):
		t.Fatal("the member did not notice")
	}
	if err := tc.nodes[away].c.Err(); !errors.Is(err, ErrBehind) {
		t.Errorf("failed with %v", err)
	}
	if _, err := tc.nodes[away].c.Propose(context.Background(), []byte("x")); !errors.Is(err, txn.ErrNoQuorum) {
		t.Errorf("propose on a failed node: %v", err)
	}
}

// What issue 695 of hashicorp/raft would leave behind, another entry at the same index and term, is found.
func TestDivergentLogIsFound(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 3, func(c *Config) { c.LogStore = LogStoreBoltDB })
	for {
		leader := tc.leader()
		tc.readIndex(leader) // behind the barrier at the beginning of its reign
		reign, _ := tc.nodes[leader].c.Leadership()
		victim := (leader + 1) % 3
		index := tc.propose(leader, "the truth")
		last := tc.propose(leader, "more")
		tc.nodes[victim].machine.awaitIndex(t, last)
		tc.stop(victim)
		bolt, err := openBolt(filepath.Join(tc.nodes[victim].config.Dir, boltLogName))
		if err != nil {
			t.Fatal(err)
		}
		var l raft.Log
		if err := bolt.GetLog(uint64(index), &l); err != nil {
			t.Fatal(err)
		}
		l.Data = []byte("a forgery")
		if err := errors.Join(bolt.StoreLog(&l), bolt.Close()); err != nil {
			t.Fatal(err)
		}
		tc.start(victim)
		err = tc.nodes[leader].c.raft.Barrier(0).Error()
		if now, _ := tc.nodes[leader].c.Leadership(); err != nil || now != reign {
			continue // the next reign, of whoever it is, has ended the range, and such a range is not judged
		}
		select {
		case <-tc.nodes[victim].c.Failed():
		case <-time.After(patience):
			t.Fatal("the divergence was not found")
		}
		if err := tc.nodes[victim].c.Err(); !errors.Is(err, txn.ErrDiverged) {
			t.Errorf("failed with %v", err)
		}
		return
	}
}

// A range whose barrier was truncated is not judged, one whose barrier is still there is.
func TestTruncatedRangeIsNotJudged(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 1, nil)
	n := tc.nodes[tc.leader()]
	tc.propose(0, "x")
	command := n.c.raft.LastIndex()
	if err := n.c.raft.Barrier(0).Error(); err != nil {
		t.Fatal(err)
	}
	last := n.c.raft.LastIndex()
	var barrier raft.Log
	if err := n.c.stores.log.GetLog(last, &barrier); err != nil {
		t.Fatal(err)
	}
	different := func(start, end, sum uint64) verifier.VerificationReport {
		return verifier.VerificationReport{
			Range: verifier.LogRange{Start: start, End: end}, ExpectedSum: sum, Err: verifier.ErrChecksumMismatch("different"),
		}
	}
	start, sum := binary.LittleEndian.Uint64(barrier.Extensions[8:]), binary.LittleEndian.Uint64(barrier.Extensions[16:])
	for _, r := range []verifier.VerificationReport{
		different(start, command, sum), // another leader has put a command there
		different(start, last, sum+1),  // or a barrier of its own
		different(start+1, last, sum),
	} {
		if n.c.verified(r); n.c.Err() != nil {
			t.Fatalf("judged by %+v: %v", r, n.c.Err())
		}
	}
	if n.c.verified(different(start, last, sum)); !errors.Is(n.c.Err(), txn.ErrDiverged) {
		t.Errorf("failed with %v", n.c.Err())
	}
}

// Verification finds nothing where there is nothing to find: leaders change, and each begins a new range.
func TestVerificationHoldsAcrossLeaders(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 3, func(c *Config) { c.VerifyInterval = 50 * time.Millisecond })
	for k := range 3 {
		leader := tc.leader()
		for range 10 {
			tc.propose(k, "x")
		}
		equal := func(n *testNode) float64 {
			return testutil.ToFloat64(n.c.metrics.verifications.WithLabelValues("equal"))
		}
		for deadline := time.Now().Add(patience); ; {
			done := true
			for _, n := range tc.nodes {
				done = done && equal(n) > 0
			}
			if done {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("no verification took place")
			}
			tc.propose(k, "y") // each lets a range grow
			time.Sleep(10 * time.Millisecond)
		}
		tc.stop(leader)
		tc.leader()
		tc.start(leader)
	}
	for i, n := range tc.nodes {
		if err := n.c.Err(); err != nil {
			t.Errorf("node %d: %v", i+1, err)
		}
	}
}

func TestTransferLeadership(t *testing.T) {
	tc := newCluster(t, 3, nil)
	old := tc.leader()
	to := (old + 1) % 3
	if err := tc.nodes[to].c.TransferLeadership(t.Context(), 0); !errors.Is(err, ErrNotLeader) {
		t.Errorf("a follower handed over: %v", err)
	}
	if err := tc.nodes[old].c.TransferLeadership(t.Context(), txn.NodeID(old+1)); err != nil {
		t.Errorf("to who leads already: %v", err)
	}
	if err := tc.nodes[old].c.TransferLeadership(t.Context(), 9); !errors.Is(err, ErrNotMember) {
		t.Errorf("to nobody: %v", err)
	}
	if err := tc.nodes[old].c.TransferLeadership(t.Context(), txn.NodeID(to+1)); err != nil {
		t.Fatal(err)
	}
	if got := tc.leader(); got != to {
		t.Errorf("node %d leads, not %d", got+1, to+1)
	}
	tc.propose(old, "on the former leader")
}

// A member whose disk takes no more entries says so and stops, be it the leader or a follower; the others go on.
func TestFullDiskStopsOneMember(t *testing.T) {
	parallel(t)
	t.Run("leader", func(t *testing.T) { fullDisk(t, true) })
	t.Run("follower", func(t *testing.T) { fullDisk(t, false) })
}

func fullDisk(t *testing.T, leads bool) {
	tc := newCluster(t, 3, nil)
	leader := tc.leader()
	full, other := leader, (leader+1)%3
	if !leads {
		full, other = other, leader
	}
	tc.propose(other, "before")
	tc.nodes[full].c.stores.deadline.breakDisk(syscall.ENOSPC)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if leads {
		if _, err := tc.nodes[full].c.Propose(ctx, []byte("no space")); !errors.Is(err, txn.ErrOutcomeUnknown) {
			t.Errorf("propose on the leader whose disk is full: %v", err)
		}
	} else {
		tc.propose(other, "no space there")
	}
	select {
	case <-tc.nodes[full].c.Failed():
	case <-ctx.Done():
		t.Fatal("the member did not notice")
	}
	if err := tc.nodes[full].c.Err(); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("failed with %v", err)
	}
	for {
		l, changed := tc.nodes[other].c.Leadership()
		if l.Leader != 0 && l.Leader != txn.NodeID(full+1) {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatal("nobody took over")
		}
	}
	tc.nodes[3-full-other].machine.awaitIndex(t, tc.propose(other, "after"))
}

// A leader whose only other living member beats, but cannot store what it is sent, keeps its lease. It can be closed in time
// all the same, and says of what it was asked for that nobody knows.
func TestCloseBesideFullDisk(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 3, nil)
	leader := tc.leader()
	tc.propose(leader, "before")
	full, away := (leader+1)%3, (leader+2)%3
	tc.stop(away)
	tc.nodes[full].c.stores.deadline.breakDisk(syscall.ENOSPC)
	c := tc.nodes[leader].c
	const n = 3 * maxAppend // more than Raft takes at once
	results := make(chan error, n)
	for range n {
		go func() {
			_, err := c.Propose(context.Background(), []byte("nobody else can store this"))
			results <- err
		}()
	}
	<-tc.nodes[full].c.Failed()
	if s := c.Status(); s.State != Leader {
		t.Fatalf("the leader is %s before it is closed", s.State)
	}
	began := time.Now()
	tc.stop(leader)
	if took := time.Since(began); took > patience {
		t.Errorf("Close took %v", took)
	}
	unknown := 0
	for range n {
		switch err := <-results; {
		case errors.Is(err, txn.ErrOutcomeUnknown):
			unknown++
		case !errors.Is(err, txn.ErrNoQuorum):
			t.Errorf("propose: %v", err)
		}
	}
	if unknown == 0 {
		t.Error("something is known about every proposal")
	}
}

// A disk that never comes back is given up in time.
func TestCloseWithHangingDisk(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 1, func(c *Config) { c.WriteDeadline = 200 * time.Millisecond })
	tc.leader()
	hang := make(chan error)
	tc.nodes[0].c.stores.deadline.work <- appendCall{done: hang}
	if _, err := tc.nodes[0].c.Propose(t.Context(), []byte("x")); err == nil {
		t.Error("stored on a disk that hangs")
	}
	if err := tc.nodes[0].c.Close(); err == nil {
		t.Error("closed without a word")
	}
	<-hang
	tc.nodes[0].server.Stop()
	tc.nodes[0].serving.Wait()
	if err := tc.nodes[0].c.stores.files.Close(); err != nil {
		t.Error(err)
	}
	tc.nodes[0].c = nil
}

// breakDisk makes every append from here on fail, once what is on its way has been written.
func (s *deadlineStore) breakDisk(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.work)
	<-s.gone
	s.work, s.gone = make(chan appendCall), make(chan struct{})
	go func(work chan appendCall, gone chan struct{}) {
		defer close(gone)
		for w := range work {
			w.done <- err
		}
	}(s.work, s.gone)
}

// hangDisk makes the next append, of which stuck tells, hang until release is called.
func (s *deadlineStore) hangDisk() (stuck <-chan struct{}, release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	disk, hanging := s.work, make(chan appendCall)
	reached, released := make(chan struct{}), make(chan struct{})
	s.work = hanging
	go func() {
		defer close(disk)
		reach := sync.OnceFunc(func() { close(reached) })
		for w := range hanging {
			reach()
			<-released
			disk <- w
		}
	}()
	return reached, sync.OnceFunc(func() { close(released) })
}

// TestNewerTermBesideHangingLeader makes what issue 695 of hashicorp/raft is about happen in a real cluster: while a leader's main
// thread stands in the midst of an append, a heartbeat of a newer term comes. Handled at once it would raise the term under the
// leader's feet, which would go on to write entries under a term that it does not lead.
func TestNewerTermBesideHangingLeader(t *testing.T) {
	tc := newCluster(t, 3, nil)
	leader := tc.leader()
	tc.propose(leader, "before")
	c, sender := tc.nodes[leader].c, tc.nodes[(leader+1)%3].c
	term, servers := c.raft.CurrentTerm(), c.servers()
	at := slices.IndexFunc(servers, func(s raft.Server) bool { return nodeID(s.ID) == c.config.Node })
	stuck, release := c.stores.deadline.hangDisk()
	defer release()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var calls sync.WaitGroup
	calls.Go(func() { _, _ = c.Propose(ctx, []byte("hangs")) }) // what becomes of it is not known
	select {
	case <-stuck:
	case <-ctx.Done():
		t.Fatal("nothing is appended")
	}
	answered := make(chan error, 1)
	calls.Go(func() {
		var answer raft.AppendEntriesResponse
		answered <- sender.transport.AppendEntries(servers[at].ID, servers[at].Address, &raft.AppendEntriesRequest{
			RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(serverID(sender.config.Node)), Addr: []byte("a")}, Term: term + 1,
		}, &answer)
	})
	select {
	case err := <-answered:
		t.Errorf("the heartbeat is answered while the main thread hangs: %v", err)
	case <-time.After(100 * time.Millisecond): // long enough to catch one that does not wait
	}
	if now := c.raft.CurrentTerm(); now != term {
		t.Errorf("the term is %d, and was %d, while the main thread hangs", now, term)
	}
	release()
	calls.Wait()
	tc.readIndex((leader + 1) % 3) // there is a leader again
	index := tc.propose((leader+1)%3, "after")
	want := tc.nodes[(leader+1)%3].machine.awaitIndex(t, index)
	for i, n := range tc.nodes {
		if got := n.machine.awaitIndex(t, index); !slices.EqualFunc(got, want, sameEntry) {
			t.Errorf("node %d applied something else", i+1)
		}
	}
}

func TestTransferWatch(t *testing.T) {
	var stuck error
	w := &transferWatch{limit: time.Minute, stuck: func(err error) { stuck = err }}
	ago := func(d time.Duration) { w.since = w.since.Add(-d) }
	w.proposed(nil)
	w.proposed(raft.ErrLeadershipTransferInProgress)
	w.proposed(raft.ErrLeadershipTransferInProgress)
	ago(time.Hour)
	w.proposed(nil) // it did end
	w.proposed(raft.ErrLeadershipTransferInProgress)
	ago(30 * time.Second)
	w.proposed(raft.ErrLeadershipTransferInProgress)
	ago(time.Hour)
	w.begin() // that was another transfer
	w.proposed(raft.ErrLeadershipTransferInProgress)
	if stuck != nil {
		t.Fatal(stuck)
	}
	ago(2 * time.Minute)
	w.proposed(raft.ErrNotLeader) // says nothing about it
	w.proposed(raft.ErrLeadershipTransferInProgress)
	if !errors.Is(stuck, ErrTransferStuck) {
		t.Errorf("stuck = %v", stuck)
	}
}

// A leader whose disk hangs steps down, and the others go on.
func TestLeaderWithHangingDiskStepsDown(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 3, func(c *Config) { c.WriteDeadline = 300 * time.Millisecond })
	leader := tc.leader()
	tc.propose(leader, "before")
	// Occupy the one goroutine that writes to the disk, as a hanging flush does.
	deadline := tc.nodes[leader].c.stores.deadline
	hang := make(chan error)
	deadline.work <- appendCall{logs: nil, done: hang}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := tc.nodes[leader].c.Propose(ctx, []byte("hangs")); !errors.Is(err, txn.ErrOutcomeUnknown) {
		t.Errorf("propose on the hanging leader: %v", err)
	}
	other := tc.nodes[(leader+1)%3].c
	for {
		l, changed := other.Leadership()
		if l.Leader != 0 && l.Leader != txn.NodeID(leader+1) {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatal("nobody took over")
		}
	}
	index := tc.propose((leader+1)%3, "after")
	if err := <-hang; err != nil { // the disk works again
		t.Fatal(err)
	}
	entries := tc.nodes[leader].machine.awaitIndex(t, index)
	want := tc.nodes[(leader+1)%3].machine.awaitIndex(t, index)
	if !slices.EqualFunc(entries, want, sameEntry) {
		t.Error("the former leader applied something else")
	}
}

func TestMetricsLint(t *testing.T) {
	parallel(t)
	tc := newCluster(t, 1, nil)
	tc.leader()
	tc.propose(0, "x")
	problems, err := testutil.GatherAndLint(tc.nodes[0].config.Registerer.(prometheus.Gatherer))
	if err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
}

func TestOpenRefusesBadConfig(t *testing.T) {
	good := func() Config {
		return Config{Node: 1, Dir: t.TempDir(), RaftAddress: "127.0.0.1:0", Bootstrap: []Member{
			{Node: 1, RaftAddress: "127.0.0.1:7001", GRPCAddress: "127.0.0.1:7002"},
		}}
	}
	for name, spoil := range map[string]func(*Config){
		"no node":           func(c *Config) { c.Node = 0 },
		"no directory":      func(c *Config) { c.Dir = "" },
		"unknown store":     func(c *Config) { c.LogStore = "paper" },
		"bad address":       func(c *Config) { c.RaftAddress = "nowhere" },
		"not a member":      func(c *Config) { c.Node = 2 },
		"bad member":        func(c *Config) { c.Bootstrap[0].GRPCAddress = "x" },
		"member twice":      func(c *Config) { c.Bootstrap = append(c.Bootstrap, c.Bootstrap[0]) },
		"lease too long":    func(c *Config) { c.LeaderLease = time.Hour },
		"negative deadline": func(c *Config) { c.WriteDeadline = -1 },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good()
			spoil(&cfg)
			if c, err := Open(cfg, newRecorder()); err == nil {
				t.Error(errors.Join(errors.New("opened"), c.Close()))
			}
			requireNoGoroutines(t)
		})
	}
	t.Run("other log store", func(t *testing.T) {
		cfg := good()
		c, err := Open(cfg, newRecorder())
		if err != nil {
			t.Fatal(err)
		}
		cfg2 := cfg
		if _, err := Open(cfg2, newRecorder()); err == nil {
			t.Error("a second process may use the directory")
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		cfg2.LogStore = LogStoreBoltDB
		if c, err := Open(cfg2, newRecorder()); err == nil {
			t.Error(errors.Join(errors.New("opened with the other kind of store"), c.Close()))
		}
		requireNoGoroutines(t)
	})
}

func TestCloseNil(t *testing.T) {
	var c *Consensus
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
