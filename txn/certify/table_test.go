package certify

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/quorate/quorate/txn"
)

func numbered(n uint64) (k txn.Key) {
	binary.LittleEndian.PutUint64(k[:], n)
	return k
}

// The table against a map and a slice in order of use, through growth, shrinking, reuse and copies.
func TestTable(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	table := newTable()
	lastUse := make(map[txn.Key]uint32)
	var uses []txn.Key // by time, from 1
	oldest := 1
	at := uint32(0)
	most := 0
	for step := range 60_000 {
		// Waves, up to some thousand keys.
		if grow := step/5000%2 == 0; len(lastUse) == 0 || grow && rng.IntN(10) > 1 || !grow && rng.IntN(10) > 7 {
			k := numbered(rng.Uint64N(20_000))
			at++
			table.use(table.findOrAdd(&k), txn.Mode(1+rng.IntN(6)), at)
			lastUse[k] = at
			uses = append(uses, k)
		} else {
			for lastUse[uses[oldest-1]] != uint32(oldest) { // used again later, or gone
				oldest++
			}
			if got := table.oldestUse(); got != uint32(oldest) {
				t.Fatalf("step %d: oldest use %d, want %d", step, got, oldest)
			}
			if got := table.dropOldest(); got != uint32(oldest) {
				t.Fatalf("step %d: dropped use %d, want %d", step, got, oldest)
			}
			delete(lastUse, uses[oldest-1])
		}
		most = max(most, len(lastUse))
		if table.count != len(lastUse) {
			t.Fatalf("step %d: %d keys, want %d", step, table.count, len(lastUse))
		}
		k := numbered(rng.Uint64N(20_000))
		if ref := table.find(&k); (ref != 0) != (lastUse[k] != 0) || ref != 0 && table.at(ref).lastUse() != lastUse[k] {
			t.Fatalf("step %d: key %x has reference %d, last use %d", step, k, ref, lastUse[k])
		}
		if step%3000 == 0 {
			table.clone() // from here on pages are shared
		}
	}
	for k, want := range lastUse {
		if ref := table.find(&k); ref == 0 || table.at(ref).lastUse() != want {
			t.Fatalf("key %x has reference %d, last use %d", k, ref, want)
		}
	}
	if int(table.next) != most+1 || len(table.pages) != most/pageSize+1 {
		t.Fatalf("%d references, %d pages, for never more than %d keys", table.next, len(table.pages), most)
	}
}

// The memory of decisions against a slice, over many pages, with GIDs that come again while their old decision is
// still in the queue.
func TestMemory(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	m := newMemory()
	var queue []outcome
	latest := make(map[txn.GID]txn.CSN) // by before, which numbers them here
	for step := range txn.CSN(30_000) {
		if grow := step/3000%2 == 0; m.len() == 0 || grow && rng.IntN(10) > 1 || !grow && rng.IntN(10) > 6 {
			o := outcome{gid: txn.GID{Node: txn.NodeID(1 + rng.IntN(2)), Sequence: rng.Uint64N(4000)}, before: step}
			m.add(o)
			queue = append(queue, o)
			latest[o.gid] = step
		} else {
			if got := *m.oldest(); got != queue[0] {
				t.Fatalf("step %d: oldest is %+v, want %+v", step, got, queue[0])
			}
			m.dropOldest()
			if latest[queue[0].gid] == queue[0].before {
				delete(latest, queue[0].gid)
			}
			queue = queue[1:]
		}
		if m.len() != len(queue) {
			t.Fatalf("step %d: %d decisions, want %d", step, m.len(), len(queue))
		}
		gid := txn.GID{Node: txn.NodeID(1 + rng.IntN(2)), Sequence: rng.Uint64N(4000)}
		want, ok := latest[gid]
		if got := m.find(gid); (got != nil) != ok || ok && (got.gid != gid || got.before != want) {
			t.Fatalf("step %d: decision on %v is %+v, want %d (%v)", step, gid, got, want, ok)
		}
		if most := m.len()/outcomesPage + 2; len(m.pages) > most {
			t.Fatalf("step %d: %d pages for %d decisions", step, len(m.pages), m.len())
		}
	}
	for m.len() > 0 {
		m.dropOldest()
	}
	if len(m.names) != 0 {
		t.Fatalf("%d names are left of nothing", len(m.names))
	}
}
