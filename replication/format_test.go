package replication

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// TestMaxNodes: a cluster has as many nodes with data as it was founded for, and remembers it.
func TestMaxNodes(t *testing.T) {
	r := newRecorder()
	r.entry(codec.AppendFound(nil, &codec.Found{Cluster: cluster, Founders: []codec.Founder{{Node: 1}, {Node: 2, Slot: 7}}, MaxNodes: 3}))
	r.start(1, 2)
	for round := range 2 {
		if two, _ := r.Membership().Find(2); r.Membership().MaxNodes != 3 || two.Slot != 1 { // 7 is none
			t.Fatalf("round %d: %+v", round, r.Membership())
		}
		first := 10 * round
		r.entry(codec.AppendAdmit(nil, &codec.Admit{Request: request(first + 1), Role: codec.RoleWitness}))
		r.entry(admit(first+2, 0))
		r.entry(admit(first+3, 0))
		third := r.Admitted(request(first + 2))
		if r.Admitted(request(first+1)) == 0 || third == 0 || r.Admitted(request(first+3)) != 0 {
			t.Fatalf("round %d: %+v", round, r.Membership())
		}
		if m, _ := r.Membership().Find(third); m.Slot != 2 {
			t.Errorf("round %d: slot %d", round, m.Slot)
		}
		r.entry(remove(third)) // and its slot is there for the next one
		again := newRecorder()
		if err := again.Restore(image(t, r.Machine)); err != nil {
			t.Fatal(err)
		}
		again.index, r = r.index, again
	}
	// One that goes on by force keeps what its sequences are divided by.
	r.entry(codec.AppendFound(nil, &codec.Found{Cluster: txn.UUID{2}, Previous: cluster, Founders: []codec.Founder{{Node: 2}}, MaxNodes: 16}))
	if m := r.Membership(); m.MaxNodes != 3 || m.Cluster != (txn.UUID{2}) || len(m.Members) != 1 {
		t.Errorf("%+v", m)
	}
}

// TestFormat: the cluster writes what all members have said that they read, and never again less; who does not read it is not
// admitted, and what has been set back to a build that does not fails, from the log and from a snapshot.
func TestFormat(t *testing.T) {
	m := newMembers()
	step := func(name string, want uint32, change func() bool) {
		t.Helper()
		ok := change()
		if m.raiseFormat(); !ok || m.format != want {
			t.Fatalf("%s: %v, format %d, want %d", name, ok, m.format, want)
		}
	}
	announce := func(node txn.NodeID, format uint32) func() bool {
		return func() bool { return m.announce(codec.Member{Node: node, Incarnation: 1, Format: format}) }
	}
	admitted := func(n int, format uint32) func() bool {
		return func() bool { _, ok := m.admit(codec.Admit{Request: request(n), Format: format}); return ok }
	}
	step("before the founding", 1, announce(1, 3))
	step("founded", 1, func() bool {
		_, ok := m.found(codec.Found{Cluster: cluster, Founders: []codec.Founder{{Node: 1}, {Node: 2, Slot: 1}, {Node: 3, Slot: 2}}})
		return ok
	})
	step("one of three", 1, announce(2, 2))
	step("one says nothing", 1, announce(3, 0))
	step("the last", 2, announce(3, 2))
	step("one is set back", 2, announce(3, 1))
	step("an applicant that reads it", 2, admitted(1, 2))
	step("an older applicant", 2, func() bool { return !admitted(2, 1)() && !admitted(3, 0)() })
	step("who held it up is gone", 2, func() bool { _, ok := m.remove(codec.Remove{Node: 3}); return ok })
	step("all of them", 3, func() bool { return announce(2, 3)() && announce(4, 9)() })

	var restored members
	if !restored.restore(m.list(), m.state()) || restored.format != 3 || restored.unreadable() == nil {
		t.Errorf("restored: format %d, %v", restored.format, restored.unreadable())
	}

	for name, spoil := range map[string]func(r *recorder){
		"an entry": func(r *recorder) { r.entry(slices.Concat([]byte{codec.Version + 1}, admit(1, 0)[1:])) },
		"what may come": func(r *recorder) {
			r.entry(codec.AppendMember(nil, &codec.Member{Node: 1, Incarnation: 1, Format: codec.Version + 1}))
		},
	} {
		r := newRecorder()
		r.entry(found(cluster, txn.UUID{}, 1))
		r.start(1)
		if r.failure != nil {
			t.Fatal(r.failure)
		}
		spoil(r)
		var version *codec.VersionError
		if !errors.As(r.failure, &version) || !strings.Contains(r.failure.Error(), "upgrade this node") {
			t.Fatalf("%s: %v", name, r.failure)
		}
		r.entry(admit(2, 0))
		if r.Admitted(request(2)) != 0 {
			t.Errorf("%s: the node went on behind it", name)
		}
	}
}
