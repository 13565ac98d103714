package replication

import (
	"maps"
	"testing"

	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// TestReservations: what a node has reserved is known of its slot, also after it was removed and from a snapshot, until
// another holder of the slot reserves; who is no member reserves nothing.
func TestReservations(t *testing.T) {
	m := newRecorder().Machine
	index := txn.LogIndex(0)
	apply := func(m *Machine, data []byte) { index++; m.Apply(index, data) }
	reserve := func(node txn.NodeID, all bool, sequences ...codec.Reservation) []byte {
		return codec.AppendReserve(nil, &codec.Reserve{Node: node, All: all, Sequences: sequences})
	}
	apply(m, codec.AppendFound(nil, &codec.Found{Cluster: txn.UUID{1}, Founders: []codec.Founder{{Node: 1, Slot: 0}, {Node: 2, Slot: 1}}}))
	apply(m, codec.AppendMember(nil, &codec.Member{Node: 1, Incarnation: 1})) // it has data, so that the other one can be removed
	apply(m, reserve(2, true, codec.Reservation{Name: "public.a", Value: 500}, codec.Reservation{Name: "public.b", Value: -7}))
	apply(m, reserve(2, false, codec.Reservation{Name: "public.a", Value: 900}))
	apply(m, reserve(9, true, codec.Reservation{Name: "public.a", Value: 1}))
	apply(m, codec.AppendRemove(nil, codec.Remove{Node: 2}))
	apply(m, reserve(2, true))
	want := map[string]int64{"public.a": 900, "public.b": -7}
	again := newRecorder().Machine
	if err := again.Restore(image(t, m)); err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string]*Machine{"the log": m, "a snapshot": again} {
		if got := m.Reserved(1); !maps.Equal(got, want) {
			t.Errorf("from %s: %v, want %v", name, got, want)
		}
		if got := m.Reserved(0); len(got) > 0 {
			t.Errorf("from %s: slot 0 has %v", name, got)
		}
	}
	// Another takes the slot, when no other is left.
	for n := range DefaultMaxNodes - 1 {
		apply(again, codec.AppendAdmit(nil, &codec.Admit{Request: txn.UUID{2, byte(n)}}))
	}
	holder := txn.NodeID(2 + DefaultMaxNodes - 1)
	if x, ok := again.Membership().Find(holder); !ok || x.Slot != 1 {
		t.Fatalf("node %d: %+v, %v", holder, x, ok)
	}
	if got := again.Reserved(1); !maps.Equal(got, want) {
		t.Errorf("before its new holder has reserved: %v, want %v", got, want)
	}
	apply(again, reserve(holder, false, codec.Reservation{Name: "public.a", Value: 1900}))
	if got := again.Reserved(1); !maps.Equal(got, map[string]int64{"public.a": 1900}) {
		t.Errorf("after its new holder has reserved: %v", got)
	}
}
