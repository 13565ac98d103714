package replication

import (
	"maps"

	"github.com/quorate/quorate/txn/codec"
)

// reservations is the part of a Machine's state that says up to where the holders of slots may have given out values of
// sequences, by slot and by the sequence's name. It outlives the holder, until another one reserves.
type reservations map[int]*reserved

type reserved struct {
	Node   uint32           `json:"node"`
	Values map[string]int64 `json:"values"`
}

// maxReserved bounds the sequences of one slot. Of those beyond nothing is remembered but what is stored in rows.
const maxReserved = 100_000

func (r reservations) add(slot int, e codec.Reserve) {
	if slot == NoSlot {
		return
	}
	now := r[slot]
	if now == nil || now.Node != uint32(e.Node) || e.All {
		now = &reserved{Node: uint32(e.Node), Values: make(map[string]int64, len(e.Sequences))}
		r[slot] = now
	}
	for _, s := range e.Sequences {
		if _, known := now.Values[s.Name]; known || len(now.Values) < maxReserved {
			now.Values[s.Name] = s.Value
		}
	}
}

// Reserved returns the values, by the names of sequences, beyond which a new holder of a slot has to begin.
func (m *Machine) Reserved(slot int) map[string]int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r := m.reservations[slot]; r != nil {
		return maps.Clone(r.Values)
	}
	return nil
}
