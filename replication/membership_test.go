package replication

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"hash/crc32"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/certify"
	"github.com/quorate/quorate/txn/codec"
)

var cluster = txn.UUID{1}

// found is the entry that founds a cluster of data nodes, slots in the order of the ids.
func found(cluster, previous txn.UUID, nodes ...txn.NodeID) []byte {
	f := &codec.Found{Cluster: cluster, Previous: previous}
	for slot, id := range nodes {
		f.Founders = append(f.Founders, codec.Founder{Node: id, Slot: uint32(slot)})
	}
	return codec.AppendFound(nil, f)
}

func request(n int) (u txn.UUID) {
	binary.BigEndian.PutUint64(u[:], uint64(n))
	return u
}

func admit(n, replaces int) []byte {
	return codec.AppendAdmit(nil, &codec.Admit{Request: request(n), Replaces: txn.NodeID(replaces), GRPCAddress: "admitted"})
}

func remove(id txn.NodeID) []byte {
	return codec.AppendRemove(nil, codec.Remove{Node: id, Reason: "test"})
}

// start has members announce themselves: from then on they have data.
func (r *recorder) start(nodes ...txn.NodeID) {
	for _, id := range nodes {
		r.entry(codec.AppendMember(nil, &codec.Member{Node: id, Incarnation: uint64(id)}))
	}
}

func TestMembership(t *testing.T) {
	r := newRecorder()
	r.entry(admit(1, 0)) // nobody is, so nobody can join
	r.entry(codec.AppendMember(nil, &codec.Member{Node: 2, Incarnation: 7, GRPCAddress: "announced"}))
	if m := r.Membership(); m.Founded() || len(m.Members) != 1 || m.Members[0].Slot != NoSlot || m.Removed(1) {
		t.Fatalf("before the founding: %+v", m)
	}
	r.entry(found(cluster, txn.UUID{}, 1, 2, 3))
	r.entry(found(txn.UUID{2}, txn.UUID{}, 9)) // a second one
	m := r.Membership()
	if !m.Founded() || m.Cluster != cluster || m.Highest != 3 || len(m.Members) != 3 || len(r.changes) != 1 || !r.changes[0].Founded {
		t.Fatalf("founded: %+v, changes %+v", m, r.changes)
	}
	if two, ok := m.Find(2); !ok || two.Slot != 1 || two.GRPCAddress != "announced" || two.Incarnation != 7 {
		t.Errorf("a founder that had announced itself: %+v", two)
	}

	r.entry(admit(5, 0))
	r.entry(admit(5, 0)) // asked twice
	if id := r.Admitted(request(5)); id != 4 || r.Admitted(request(6)) != 0 || len(r.changes) != 2 || r.changes[1].Admitted != 4 {
		t.Fatalf("request 5 admitted %s, changes %+v", id, r.changes)
	}
	four, ok := r.Membership().Find(4)
	if !ok || four.Slot != 3 || four.Incarnation != 0 || four.GRPCAddress != "admitted" || four.Request != request(5) {
		t.Errorf("the new member: %+v", four)
	}
	r.entry(codec.AppendAdmit(nil, &codec.Admit{Request: request(6), Role: codec.RoleWitness}))
	if five, _ := r.Membership().Find(5); five.Role != codec.RoleWitness || five.Slot != NoSlot {
		t.Errorf("a witness: %+v", five)
	}

	// A node is replaced: another id, and not its slot.
	r.entry(admit(7, 4))
	m = r.Membership()
	if six, ok := m.Find(6); !ok || six.Slot != 4 || !m.Removed(4) || m.Removed(6) || m.Removed(7) {
		t.Errorf("after node 4 was replaced: %+v", m)
	}
	if last := r.changes[len(r.changes)-1]; last.Admitted != 6 || !slices.Equal(last.Removed, []txn.NodeID{4}) {
		t.Errorf("told %+v", last)
	}
	r.entry(admit(8, 4))
	if r.Admitted(request(8)) != 0 {
		t.Error("a node that is gone was replaced again")
	}
	r.entry(admit(5, 0)) // an old request, repeated after its node was removed
	if r.Admitted(request(5)) != 4 || len(r.Membership().Members) != 5 {
		t.Errorf("an old request admitted a second node: %+v", r.Membership())
	}
}

func TestRemovedNode(t *testing.T) {
	r := newRecorder()
	r.entry(found(cluster, txn.UUID{}, 1, 2))
	r.start(1, 2)
	r.announced = nil
	r.entry(transactions(set(gid(2, 1), 0, 1)))
	r.entry(chunk(gid(2, 2), 0))
	r.entry(remove(2))
	r.entry(remove(2))
	if last := r.changes[len(r.changes)-1]; len(r.changes) != 2 || !slices.Equal(last.Removed, []txn.NodeID{2}) || last.Reason != "test" {
		t.Fatalf("changes %+v", r.changes)
	}
	if _, err := r.Snapshot(); err != nil {
		t.Errorf("a large transaction that will never end: %v", err)
	}
	late, large := set(gid(2, 3), 1, 2), set(gid(2, 2), 1, 3)
	large.Chunks = 1
	r.entry(chunk(gid(2, 2), 0))
	r.entry(transactions(late, large, set(gid(1, 1), 1, 4)))
	decided := r.decisions[len(r.decisions)-3:]
	if decided[0].Verdict.Reason != txn.AbortRequested || decided[1].Verdict.Reason != txn.AbortRequested || !decided[2].Verdict.Commits() {
		t.Errorf("of a removed node and of a member: %v %v %v", decided[0].Verdict, decided[1].Verdict, decided[2].Verdict)
	}
	if r.Outcome(late.GID) != Aborted || r.Outcome(gid(2, 1)) != Committed {
		t.Errorf("outcomes %v, %v", r.Outcome(late.GID), r.Outcome(gid(2, 1)))
	}
	r.entry(codec.AppendMember(nil, &codec.Member{Node: 2, Incarnation: 9}))
	if len(r.announced) != 0 || !r.Membership().Removed(2) {
		t.Errorf("a removed node announced itself: %v", r.announced)
	}
	r.entry(remove(1))
	r.entry(admit(1, 1))
	if len(r.Membership().Members) != 1 {
		t.Error("the last member was removed")
	}
}

// TestLastData: whoever goes, and whoever asks at the same time, a member with data stays.
func TestLastData(t *testing.T) {
	r := newRecorder()
	r.entry(found(cluster, txn.UUID{}, 1, 2))
	r.entry(codec.AppendAdmit(nil, &codec.Admit{Request: request(1), Role: codec.RoleWitness})) // node 3
	r.start(1, 2, 3)
	r.entry(admit(2, 1)) // node 4, without data yet
	if r.Admitted(request(2)) != 4 {
		t.Fatal("one of two nodes with data was not let join anew")
	}
	r.entry(admit(3, 2))
	r.entry(remove(2))
	if m := r.Membership(); r.Admitted(request(3)) != 0 || m.Removed(2) {
		t.Fatalf("the last data went: %+v", m)
	}
	// Who has no data may come anew and go.
	r.entry(codec.AppendAdmit(nil, &codec.Admit{Request: request(4), Role: codec.RoleWitness, Replaces: 3}))
	r.entry(admit(5, 4))
	if r.Admitted(request(4)) != 5 || r.Admitted(request(5)) != 6 {
		t.Errorf("a witness and a joining node were not let join anew: %+v", r.Membership())
	}
	r.start(6)
	r.entry(remove(2))
	if !r.Membership().Removed(2) {
		t.Error("a node was not removed although another one has data")
	}
}

func TestAnotherCluster(t *testing.T) {
	r := newRecorder()
	r.entry(found(cluster, txn.UUID{}, 1, 2, 3))
	r.entry(admit(1, 0))
	r.entry(found(txn.UUID{2}, txn.UUID{9}, 1)) // does not follow
	r.entry(found(txn.UUID{2}, cluster, 4))
	m := r.Membership()
	if m.Cluster != (txn.UUID{2}) || len(m.Members) != 1 || m.Members[0].Node != 4 || m.Members[0].Slot != 3 || m.Highest != 4 {
		t.Fatalf("the survivor: %+v", m)
	}
	if last := r.changes[len(r.changes)-1]; !slices.Equal(last.Removed, []txn.NodeID{1, 2, 3}) {
		t.Errorf("changes %+v", r.changes)
	}
	r.entry(transactions(set(gid(1, 1), 0, 1)))
	if r.last().Verdict.Commits() {
		t.Error("an entry of the cluster that was committed")
	}
}

// Whatever happens, ids are never given twice, no two members have one slot, and the slot that somebody gets is one that
// was never used, or the one that has been free for longest.
func TestSlots(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := newRecorder()
		var founders []txn.NodeID
		for id := range rapid.IntRange(1, 5).Draw(t, "founders") {
			founders = append(founders, txn.NodeID(id+1))
		}
		r.entry(found(cluster, txn.UUID{}, founders...))
		r.start(founders...)
		ever := map[txn.NodeID]bool{}
		for _, id := range founders {
			ever[id] = true
		}
		usedSlots, freed := len(founders), []int{}
		for n := range rapid.IntRange(0, 60).Draw(t, "steps") {
			m := r.Membership()
			victim := rapid.SampledFrom(m.Members).Draw(t, "victim")
			if rapid.Bool().Draw(t, "remove") && len(m.Members) > 1 {
				r.entry(remove(victim.Node))
				freed = append(freed, victim.Slot)
				continue
			}
			replaces := 0
			if rapid.Bool().Draw(t, "replace") && len(m.Members) > 1 {
				replaces = int(victim.Node)
			}
			r.entry(admit(n+1, replaces))
			id := r.Admitted(request(n + 1))
			if id == 0 {
				if usedSlots < DefaultMaxNodes || len(freed) > 0 || replaces != 0 {
					t.Fatalf("refused with %d slots used and %v free", usedSlots, freed)
				}
				continue
			}
			r.start(id)
			if ever[id] {
				t.Fatalf("id %s is given again", id)
			}
			ever[id] = true
			want := usedSlots
			if usedSlots < DefaultMaxNodes {
				usedSlots++
			} else if len(freed) > 0 {
				want, freed = freed[0], freed[1:]
			} else {
				want = victim.Slot
			}
			if replaces != 0 && want != victim.Slot {
				freed = append(freed, victim.Slot)
			}
			if got, _ := r.Membership().Find(id); got.Slot != want {
				t.Fatalf("slot %d, want %d", got.Slot, want)
			}
		}
		held := map[int]bool{}
		for _, m := range r.Membership().Members {
			if held[m.Slot] || m.Slot < 0 || m.Slot >= DefaultMaxNodes {
				t.Fatalf("slot %d is held twice, or none", m.Slot)
			}
			held[m.Slot] = true
		}
	})
}

// A snapshot that was written before there were memberships has announcements only.
func TestOldSnapshot(t *testing.T) {
	head, err := json.Marshal(map[string]any{"index": 5, "csn": 0, "members": []codec.Member{{Node: 2, Incarnation: 3, GRPCAddress: "g"}}})
	if err != nil {
		t.Fatal(err)
	}
	image := binary.BigEndian.AppendUint32(slices.Clone(magic), uint32(len(head)))
	image = binary.BigEndian.AppendUint32(append(image, head...), crc32.Checksum(head, castagnoli))
	var state bytes.Buffer
	if _, err := certify.New(certify.Config{}).Snapshot().WriteTo(&state); err != nil {
		t.Fatal(err)
	}
	r := newRecorder()
	if err := r.Restore(bytes.NewReader(append(image, state.Bytes()...))); err != nil {
		t.Fatal(err)
	}
	m := r.Membership()
	if m.Founded() || len(m.Members) != 1 || m.Members[0].GRPCAddress != "g" || m.Members[0].Slot != NoSlot {
		t.Fatalf("%+v", m)
	}
	r.index = 5
	r.entry(found(cluster, txn.UUID{}, 1, 2))
	if two, ok := r.Membership().Find(2); !ok || two.Slot != 1 || two.GRPCAddress != "g" {
		t.Errorf("%+v", r.Membership())
	}
}

func TestImpossibleMembers(t *testing.T) {
	member := func(id, slot int) Member { return Member{Member: codec.Member{Node: txn.NodeID(id)}, Slot: slot} }
	for name, c := range map[string]struct {
		list  []Member
		state membersState
	}{
		"slot out of range":       {[]Member{member(1, 16)}, membersState{Cluster: cluster}},
		"two have one slot":       {[]Member{member(1, 2), member(2, 2)}, membersState{Cluster: cluster}},
		"free and held":           {[]Member{member(1, 2)}, membersState{Cluster: cluster, Freed: []int{2}}},
		"free twice":              {nil, membersState{Cluster: cluster, Freed: []int{2, 2}}},
		"used slot out of range":  {nil, membersState{Cluster: cluster, Used: []int{-1}}},
		"freed slot out of range": {nil, membersState{Cluster: cluster, Freed: []int{99}}},
	} {
		var m members
		if m.restore(c.list, &c.state) {
			t.Errorf("%s: is accepted", name)
		}
	}
}
