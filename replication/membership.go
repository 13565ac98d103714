package replication

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// DefaultMaxNodes is how many members of a cluster can have data at a time, unless it was founded for another number: each
// sequence is divided into as many residues when it is created.
const DefaultMaxNodes = 16

// NoSlot is the slot of a member that gives out no sequence values.
const NoSlot = -1

// Member is one node of the cluster, as the log has it.
type Member struct {
	// Member is its newest announcement. As long as Incarnation is 0 it has never started, and the addresses are those
	// that it was admitted with; a founder has none then.
	codec.Member
	Role codec.Role
	// Slot is the residue of sequences whose values this node gives out, below MaxNodes, or NoSlot.
	Slot int
	// Request is what admitted it; zero for founders.
	Request txn.UUID
}

// Membership is who belongs to the cluster, as the log has it. Zero until the log has founded the cluster: then Members
// are those that have announced themselves, without slots.
type Membership struct {
	Cluster txn.UUID
	Members []Member // by id
	Highest txn.NodeID
	// MaxNodes is how many can have data at a time. 0 before the founding.
	MaxNodes int
	// Format is the newest format of entries that every member can read, or has once been able to; at least 1.
	Format uint32
}

// Founded reports whether the log says who the members are.
func (m Membership) Founded() bool { return !m.Cluster.IsZero() }

// Find returns a member.
func (m Membership) Find(id txn.NodeID) (Member, bool) {
	at := slices.IndexFunc(m.Members, func(x Member) bool { return x.Node == id })
	if at < 0 {
		return Member{}, false
	}
	return m.Members[at], true
}

// Removed reports whether id was given to a node that is no member any more. Ids are never given twice.
func (m Membership) Removed(id txn.NodeID) bool {
	_, is := m.Find(id)
	return m.Founded() && !is && id <= m.Highest
}

// Change is what one entry did to the membership.
type Change struct {
	Index    txn.LogIndex
	Founded  bool
	Admitted txn.NodeID   // 0: nobody
	Removed  []txn.NodeID // ascending
	Reason   string       // of a removal
}

// members is the part of a Machine's state that says who belongs to the cluster. Its methods are pure: equal entries
// give equal members, slots and ids on every node.
type members struct {
	cluster txn.UUID
	all     map[txn.NodeID]*Member
	highest txn.NodeID // ever given
	used    []bool     // as many as there are slots
	freed   []int      // slots without a holder that had one, the one freed longest ago first
	// format is the newest that all members could read, at some place of the log. It never falls: from there on there may be
	// entries of it.
	format uint32
	// admitted are the latest requests that made members, oldest first, with the ids that they got: who asks again,
	// because the first answer was lost, gets the same one, also after a removal.
	admitted []admission
}

type admission struct {
	Request txn.UUID   `json:"request"`
	Node    txn.NodeID `json:"node"`
}

// keptAdmissions is how many are remembered. Requests are repeated within minutes.
const keptAdmissions = 256

func newMembers() members { return members{all: make(map[txn.NodeID]*Member), format: 1} }

func (m *members) founded() bool { return !m.cluster.IsZero() }

// is reports whether entries of a node count: everybody's do until the log has founded the cluster.
func (m *members) is(id txn.NodeID) bool { return !m.founded() || m.all[id] != nil }

// found takes the first founding, and one that follows the cluster as it is.
func (m *members) found(f codec.Found) (c Change, ok bool) {
	if m.founded() && f.Previous != m.cluster {
		return c, false
	}
	if m.used == nil {
		m.used = make([]bool, cmp.Or(int(f.MaxNodes), DefaultMaxNodes))
	}
	was := m.all
	m.cluster, m.all = f.Cluster, make(map[txn.NodeID]*Member, len(f.Founders))
	for _, x := range f.Founders {
		member := was[x.Node]
		if member == nil {
			member = &Member{Member: codec.Member{Node: x.Node}, Slot: NoSlot}
		}
		member.Role = x.Role
		if member.Slot == NoSlot && x.Role == codec.RoleData {
			member.Slot = m.takeSlot(int(x.Slot))
		}
		m.all[x.Node] = member
		m.highest = max(m.highest, x.Node)
	}
	for _, id := range slices.Sorted(maps.Keys(was)) {
		if m.all[id] == nil {
			m.free(was[id].Slot)
			m.highest = max(m.highest, id)
			c.Removed = append(c.Removed, id)
		}
	}
	c.Founded, c.Reason = true, "the cluster goes on as another one"
	return c, true
}

// takeSlot takes the wanted slot, or any if somebody has it.
func (m *members) takeSlot(wanted int) int {
	if wanted < len(m.used) && !m.used[wanted] {
		m.used[wanted] = true
		return wanted
	}
	if slot, ok := m.nextSlot(); ok {
		m.take(slot)
		return slot
	}
	return NoSlot
}

// nextSlot returns the slot for a new data node: one that nobody ever had, else the one freed longest ago, whose
// sequence values are the least likely to be on their way still.
func (m *members) nextSlot() (slot int, ok bool) {
	if never := slices.Index(m.used, false); never >= 0 {
		return never, true
	}
	if len(m.freed) > 0 {
		return m.freed[0], true
	}
	return NoSlot, false
}

func (m *members) take(slot int) {
	m.used[slot] = true
	m.freed = slices.DeleteFunc(m.freed, func(s int) bool { return s == slot })
}

func (m *members) free(slot int) {
	if slot != NoSlot {
		m.freed = append(m.freed, slot)
	}
}

// admit makes a member, unless the request has made one already or there is no room. Who asked finds out by the request.
func (m *members) admit(a codec.Admit) (c Change, ok bool) {
	if !m.founded() || m.find(a.Request) != 0 || reads(a.Format) < m.format {
		return c, false
	}
	// The node that is replaced may have been removed meanwhile: whoever did that may not want another.
	if a.Replaces != 0 && (m.all[a.Replaces] == nil || !m.dataWithout(a.Replaces)) {
		return c, false
	}
	slot := NoSlot
	if a.Role == codec.RoleData {
		var free bool
		slot, free = m.nextSlot()
		if !free && a.Replaces != 0 {
			slot = m.all[a.Replaces].Slot
		}
		if slot == NoSlot {
			return c, false
		}
	}
	if a.Replaces != 0 {
		c, _ = m.remove(codec.Remove{Node: a.Replaces, Reason: "it was replaced"})
	}
	if slot != NoSlot {
		m.take(slot)
	}
	m.highest++
	m.all[m.highest] = &Member{
		Member: codec.Member{
			Node: m.highest, RaftAddress: a.RaftAddress, GRPCAddress: a.GRPCAddress, HTTPAddress: a.HTTPAddress,
			GatewayAddress: a.GatewayAddress, Version: a.Version, Format: a.Format,
		},
		Role: a.Role, Slot: slot, Request: a.Request,
	}
	m.admitted = append(m.admitted, admission{a.Request, m.highest})
	m.admitted = m.admitted[max(0, len(m.admitted)-keptAdmissions):]
	c.Admitted = m.highest
	return c, true
}

// find returns whom a request has admitted, 0 for nobody.
func (m *members) find(request txn.UUID) txn.NodeID {
	for _, a := range m.admitted {
		if a.Request == request {
			return a.Node
		}
	}
	return 0
}

// dataWithout reports whether another member than id has data: witnesses and nodes that are still joining could not go on.
// Whoever proposes a removal has looked, but two may have looked at the same time.
func (m *members) dataWithout(id txn.NodeID) bool {
	for _, x := range m.all {
		if x.Node != id && x.Role == codec.RoleData && x.Incarnation != 0 {
			return true
		}
	}
	return false
}

// remove ends a membership. The last member with data stays.
func (m *members) remove(r codec.Remove) (c Change, ok bool) {
	member := m.all[r.Node]
	if !m.founded() || member == nil || !m.dataWithout(r.Node) {
		return c, false
	}
	delete(m.all, r.Node)
	m.free(member.Slot)
	return Change{Removed: []txn.NodeID{r.Node}, Reason: r.Reason}, true
}

// announce takes an announcement, and reports whether it counts.
func (m *members) announce(a codec.Member) bool {
	if !m.is(a.Node) {
		return false
	}
	if member := m.all[a.Node]; member != nil {
		member.Member = a
		return true
	}
	m.all[a.Node] = &Member{Member: a, Slot: NoSlot}
	return true
}

// reads returns the newest format that a member reads, by what it has said.
func reads(said uint32) uint32 { return max(1, said) }

// raiseFormat is called after each change: the format rises when the last member that could not read it is gone, or has said
// that it can.
func (m *members) raiseFormat() {
	if !m.founded() {
		return
	}
	lowest := uint32(math.MaxUint32)
	for _, x := range m.all {
		lowest = min(lowest, reads(x.Format))
	}
	m.format = max(m.format, lowest)
}

// unreadable returns an error once entries may come that this build cannot read: the node has been run with a newer one before.
// It stops here, wherever the first of them is.
func (m *members) unreadable() error {
	if m.format <= codec.Version {
		return nil
	}
	return fmt.Errorf("from here on the cluster may write entries of format %d, which all its members could read: %w", m.format, &codec.VersionError{Version: byte(m.format)})
}

func (m *members) list() []Member {
	list := make([]Member, 0, len(m.all))
	for _, id := range slices.Sorted(maps.Keys(m.all)) {
		list = append(list, *m.all[id])
	}
	return list
}

func (m *members) membership() Membership {
	return Membership{Cluster: m.cluster, Members: m.list(), Highest: m.highest, MaxNodes: len(m.used), Format: m.format}
}

// membersState is members in a snapshot. One that was written before there were memberships has announcements only.
type membersState struct {
	Cluster  txn.UUID    `json:"cluster"`
	Highest  txn.NodeID  `json:"highest"`
	Used     []int       `json:"used"`
	Freed    []int       `json:"freed"`
	Admitted []admission `json:"admitted"`
	MaxNodes int         `json:"max_nodes,omitempty"` // 0: DefaultMaxNodes
	Format   uint32      `json:"format,omitempty"`    // 0: 1
}

func (m *members) state() *membersState {
	if !m.founded() {
		return nil
	}
	s := &membersState{
		Cluster: m.cluster, Highest: m.highest, Freed: slices.Clone(m.freed), Admitted: slices.Clone(m.admitted), MaxNodes: len(m.used), Format: m.format,
	}
	for slot, used := range m.used {
		if used {
			s.Used = append(s.Used, slot)
		}
	}
	return s
}

// restore replaces everything. It reports whether the state is one that entries can have led to.
func (m *members) restore(list []Member, s *membersState) bool {
	*m = newMembers()
	for _, member := range list {
		if s == nil {
			member.Slot = NoSlot // which a snapshot without memberships does not have
		}
		m.all[member.Node] = &member
	}
	if s == nil {
		return true
	}
	if s.MaxNodes < 0 || s.MaxNodes > codec.MostNodes {
		return false
	}
	m.cluster, m.highest, m.freed, m.admitted = s.Cluster, s.Highest, s.Freed, s.Admitted
	m.used, m.format = make([]bool, cmp.Or(s.MaxNodes, DefaultMaxNodes)), reads(s.Format)
	valid := func(slot int) bool { return slot >= 0 && slot < len(m.used) }
	for _, slot := range s.Used {
		if !valid(slot) {
			return false
		}
		m.used[slot] = true
	}
	held := make(map[int]bool)
	for _, slot := range s.Freed {
		if !valid(slot) || held[slot] {
			return false
		}
		held[slot] = true
	}
	for _, member := range m.all {
		if member.Slot == NoSlot {
			continue
		}
		if !valid(member.Slot) || held[member.Slot] {
			return false
		}
		held[member.Slot] = true
	}
	return true
}
