// Package replication turns the ordered log into decisions: it decodes entries, certifies transactions, keeps the
// pieces of large ones together, and hands each decision on. It is deterministic: equal logs give equal decisions on
// every node.
package replication

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"slices"
	"sync"

	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/certify"
	"github.com/quorate/quorate/txn/codec"
)

// Decision is what the log says of one transaction.
type Decision struct {
	Index   txn.LogIndex
	Set     *txn.WriteSet
	Chunks  []txn.LogIndex // the log indexes of its Chunk entries, in order
	Verdict txn.Verdict
}

// Config configures a Machine. All fields are required.
type Config struct {
	// Deliver takes the decisions of one entry, in log order. It may block: that is the back-pressure on the log.
	Deliver func([]Decision)
	// Processed says that every decision of the entries up to index has been delivered.
	Processed func(index txn.LogIndex)
	// Durable returns when the local PostgreSQL will not forget the transactions up to csn, not even in a crash.
	Durable func(csn txn.CSN) error
	// Member takes a member's announcement.
	Member func(codec.Member)
	// Changed takes what an entry has done to the membership, after it is done.
	Changed func(Change)
	// Barrier takes a barrier, when every decision before it has been delivered and none behind it.
	Barrier func(barrier codec.Barrier, index txn.LogIndex)
	// Fail stops the node: the log cannot be read, and skipping an entry would be divergence. Nothing is delivered
	// after it.
	Fail func(error)
}

// A large transaction may stay unfinished for so many entries, and bytes of entries, after its latest chunk. Then its
// chunks are forgotten, and if its end comes all the same it aborts: the log must not be kept for ever for an origin that
// died or was cut off. Both are far more than others write in the time that an origin has for its next part.
const (
	chunkLifetime      txn.LogIndex = 1 << 16
	chunkLifetimeBytes              = 256 << 20
)

// Machine is the state that the log determines. Apply, Snapshot and Restore are called by one goroutine; the other
// methods are safe for concurrent use.
type Machine struct {
	cfg    Config
	failed bool

	mu           sync.Mutex // guards what follows, against readers
	certifier    *certify.Certifier
	index        txn.LogIndex
	chunks       map[txn.GID]*chunkList
	members      members
	tokens       tokens
	reservations reservations
	outcomes     outcomes
	advanced     chan struct{} // closed when index has grown, if somebody waits for that
}

// chunkList is where the parts of an unfinished transaction are. Only the log has what is in them, so it is kept from the
// first part on: see Snapshot.Needs.
type chunkList struct {
	Indexes []txn.LogIndex `json:"indexes"` // of parts 0, 1, 2 …; at least one
	Waited  uint64         `json:"waited"`  // bytes of the entries since the latest part
}

func (l *chunkList) latest() txn.LogIndex { return l.Indexes[len(l.Indexes)-1] }

// New returns an empty machine.
func New(cfg Config) *Machine {
	return &Machine{
		cfg: cfg, certifier: certify.New(certify.Config{}), chunks: make(map[txn.GID]*chunkList),
		members: newMembers(), tokens: make(tokens), reservations: make(reservations), outcomes: newOutcomes(keptOutcomes),
	}
}

// Apply takes one entry of the log.
func (m *Machine) Apply(index txn.LogIndex, data []byte) {
	if m.failed {
		return
	}
	entry, err := codec.Decode(data)
	if err != nil {
		m.failed = true
		m.cfg.Fail(fmt.Errorf("decode log entry %d: %w", index, err))
		return
	}
	m.mu.Lock()
	m.expireChunks(index, uint64(len(data)))
	decisions := m.decide(index, entry)
	change, changed := m.change(entry)
	announced := entry.Member != nil && m.members.is(entry.Member.Node)
	unreadable := m.members.unreadable()
	m.mu.Unlock()
	if unreadable != nil {
		m.failed = true
		m.cfg.Fail(fmt.Errorf("log entry %d: %w", index, unreadable))
		return
	}
	if len(decisions) > 0 {
		m.cfg.Deliver(decisions)
	}
	if changed {
		change.Index = index
		m.cfg.Changed(change)
	}
	if announced {
		m.cfg.Member(*entry.Member)
	}
	if entry.Barrier != nil {
		m.cfg.Barrier(*entry.Barrier, index)
	}
	m.cfg.Processed(index)
}

// decide changes the state by one entry. Called with mu held.
func (m *Machine) decide(index txn.LogIndex, entry codec.Entry) []Decision {
	m.setIndex(index)
	switch entry.Kind {
	case codec.KindTransactions:
		decisions := make([]Decision, 0, len(entry.Transactions))
		for _, set := range entry.Transactions {
			decisions = append(decisions, m.decideOne(index, set))
		}
		return decisions
	case codec.KindChunk:
		m.addChunk(index, *entry.Chunk)
	case codec.KindAbort:
		m.abort(entry.Abort.GID)
	case codec.KindMember:
		m.addMember(*entry.Member)
	case codec.KindHorizon:
		m.certifier.Advance(entry.Horizon)
	case codec.KindToken:
		m.tokens.add(*entry.Token)
	case codec.KindReserve:
		if member := m.members.all[entry.Reserve.Node]; member != nil {
			m.reservations.add(member.Slot, *entry.Reserve)
		}
	}
	return nil
}

// change changes the membership by one entry. Called with mu held.
func (m *Machine) change(entry codec.Entry) (c Change, ok bool) {
	switch entry.Kind {
	case codec.KindFound:
		c, ok = m.members.found(*entry.Found)
	case codec.KindAdmit:
		byToken := !entry.Admit.Token.ID.IsZero()
		if byToken && m.tokens.check(entry.Admit.Token) != nil {
			break
		}
		if c, ok = m.members.admit(*entry.Admit); ok && byToken {
			m.tokens.use(entry.Admit.Token.ID)
		}
	case codec.KindRemove:
		c, ok = m.members.remove(*entry.Remove)
	}
	for _, id := range c.Removed {
		// Nothing of it is decided from here on.
		maps.DeleteFunc(m.chunks, func(gid txn.GID, _ *chunkList) bool { return gid.Node == id })
		m.outcomes.bury(id, 0)
	}
	m.members.raiseFormat()
	return c, ok
}

func (m *Machine) decideOne(index txn.LogIndex, set *txn.WriteSet) Decision {
	d := Decision{Index: index, Set: set}
	if m.outcomes.find(set.GID) == Aborted || m.outcomes.tooOld(set.GID) {
		// Somebody has been told that it is aborted, or may have been: the certifier forgets sooner. A GID can be given
		// out, and asked about, long before its COMMIT.
		m.abortUndecided(set.GID)
	}
	if !m.members.is(set.GID.Node) {
		m.abortUndecided(set.GID) // its origin was removed, and has fenced itself or will
	}
	if set.Chunks > 0 {
		list := m.chunks[set.GID]
		if list == nil || uint32(len(list.Indexes)) != set.Chunks {
			m.abortUndecided(set.GID) // its chunks were given up: every node says so
		} else {
			d.Chunks = list.Indexes
		}
		delete(m.chunks, set.GID)
	}
	d.Verdict = m.certifier.Decide(set)
	m.outcomes.add(set.GID, d.Verdict.Commits())
	return d
}

// abort takes an Abort. Anybody may ask for one, of any GID, as long as its origin may propose it still.
func (m *Machine) abort(gid txn.GID) {
	origin := m.members.all[gid.Node]
	switch {
	case m.chunks[gid] != nil || origin == nil || origin.Incarnation != gid.Incarnation:
		m.outcomes.add(gid, false)
	case !m.outcomes.ask(gid):
		return // it stays undecided, and whoever asks is told so
	}
	m.certifier.Abort(gid)
	delete(m.chunks, gid)
}

func (m *Machine) abortUndecided(gid txn.GID) {
	if _, decided := m.certifier.Outcome(gid); !decided {
		m.certifier.Abort(gid)
	}
}

// setIndex is called with mu held.
func (m *Machine) setIndex(index txn.LogIndex) {
	m.index = index
	if m.advanced != nil {
		close(m.advanced)
		m.advanced = nil
	}
}

// Outcome is what the log, as far as this node has it, says of gid.
func (m *Machine) Outcome(gid txn.GID) Outcome {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.outcomes.find(gid)
}

// WaitFor returns when the entries up to index are decided. An error is ctx's.
func (m *Machine) WaitFor(ctx context.Context, index txn.LogIndex) error {
	for {
		m.mu.Lock()
		if m.index >= index {
			m.mu.Unlock()
			return nil
		}
		if m.advanced == nil {
			m.advanced = make(chan struct{})
		}
		advanced := m.advanced
		m.mu.Unlock()
		select {
		case <-advanced:
		case <-ctx.Done():
			return fmt.Errorf("wait for log index %d: %w", index, context.Cause(ctx))
		}
	}
}

// addChunk appends a part. A part that comes twice (a proposal sent again) is ignored; a gap cannot arise, since the
// origin sends a part only when the one before is in the log, but would make the transaction abort.
func (m *Machine) addChunk(index txn.LogIndex, chunk codec.Chunk) {
	if _, decided := m.certifier.Outcome(chunk.GID); decided || !m.members.is(chunk.GID.Node) {
		return
	}
	list := m.chunks[chunk.GID]
	if list == nil {
		list = &chunkList{}
	}
	if chunk.Part == uint32(len(list.Indexes)) {
		list.Indexes, list.Waited = append(list.Indexes, index), 0
		m.chunks[chunk.GID] = list
	}
}

// expireChunks forgets what has been unfinished for too long, when an entry of so many bytes comes. Called with mu held.
func (m *Machine) expireChunks(index txn.LogIndex, size uint64) {
	maps.DeleteFunc(m.chunks, func(_ txn.GID, l *chunkList) bool {
		l.Waited += size
		return index-l.latest() > chunkLifetime || l.Waited > chunkLifetimeBytes
	})
}

// Unfinished returns the large transactions whose chunks are in the log and whose end is not, each with the index of its
// first chunk, and the index up to which that is so.
func (m *Machine) Unfinished() (at txn.LogIndex, first map[txn.GID]txn.LogIndex) {
	m.mu.Lock()
	defer m.mu.Unlock()
	first = make(map[txn.GID]txn.LogIndex, len(m.chunks))
	for gid, l := range m.chunks {
		first[gid] = l.Indexes[0]
	}
	return m.index, first
}

// addMember records an announcement. The member's earlier incarnations are dead: what they left unfinished is dropped.
func (m *Machine) addMember(member codec.Member) {
	if !m.members.announce(member) {
		return
	}
	m.outcomes.begin(member.Node, member.Incarnation)
	m.outcomes.bury(member.Node, member.Incarnation)
	maps.DeleteFunc(m.chunks, func(gid txn.GID, _ *chunkList) bool {
		return gid.Node == member.Node && gid.Incarnation != member.Incarnation
	})
}

// LastCSN is the number of transactions that the log has let commit so far, whether applied here or not.
func (m *Machine) LastCSN() txn.CSN {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.certifier.LastCSN()
}

// Horizon is the lowest CSN that the certifier can judge from.
func (m *Machine) Horizon() txn.CSN {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.certifier.Horizon()
}

// Digest is a rolling hash of all verdicts so far and the CSN up to which it reaches: equal on all nodes.
func (m *Machine) Digest() (txn.CSN, uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.certifier.LastCSN(), m.certifier.Digest()
}

// Membership is who belongs to the cluster, as far as this node has the log.
func (m *Machine) Membership() Membership {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.members.membership()
}

// Admitted returns the id that a request has got, 0 if it has got none.
func (m *Machine) Admitted(request txn.UUID) txn.NodeID {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.members.find(request)
}

// Snapshot is a consistent copy of a Machine's state.
type Snapshot struct {
	durable func(txn.CSN) error
	csn     txn.CSN
	needs   txn.LogIndex
	header  []byte
	state   io.WriterTo
}

// Needs is the lowest index of an entry that the snapshot covers and that is needed beside it, 0 if there is none: the
// first chunk of the large transactions that are unfinished.
func (s *Snapshot) Needs() txn.LogIndex { return s.needs }

type header struct {
	Index   txn.LogIndex `json:"index"`
	CSN     txn.CSN      `json:"csn"`
	Members []Member     `json:"members"`
	// Outcomes came later: a snapshot without begins to remember.
	Outcomes []byte `json:"outcomes,omitempty"`
	// Asked is what of them is not in Outcomes.
	Asked []txn.GID `json:"asked,omitempty"`
	// Membership came later: a snapshot without is of a log that has not founded the cluster yet.
	Membership *membersState `json:"membership,omitempty"`
	Tokens     []codec.Token `json:"tokens,omitempty"`
	// Reserved came with members that take the place of others.
	Reserved reservations `json:"reserved,omitempty"`
	// Unfinished is in the order of the log. Earlier, no snapshot was taken while there were any.
	Unfinished []unfinished `json:"unfinished,omitempty"`
}

type unfinished struct {
	GID txn.GID `json:"gid"`
	chunkList
}

// magic begins a snapshot; its last byte is the version.
var magic = []byte("quorate snapshot\x01")

// Snapshot copies the state.
func (m *Machine) Snapshot() (*Snapshot, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	open := make([]unfinished, 0, len(m.chunks))
	for gid, l := range m.chunks {
		open = append(open, unfinished{gid, *l})
	}
	slices.SortFunc(open, func(a, b unfinished) int { return cmp.Compare(a.Indexes[0], b.Indexes[0]) })
	var needs txn.LogIndex
	if len(open) > 0 {
		needs = open[0].Indexes[0]
	}
	h, err := json.Marshal(header{
		Index: m.index, CSN: m.certifier.LastCSN(), Members: m.members.list(), Membership: m.members.state(), Outcomes: m.outcomes.encode(),
		Asked: m.outcomes.asked(), Tokens: m.tokens.list(), Reserved: m.reservations, Unfinished: open,
	})
	if err == nil && len(h) > maxHeader {
		err = fmt.Errorf("%d bytes are more than can be read again", len(h))
	}
	if err != nil {
		return nil, fmt.Errorf("encode snapshot header: %w", err)
	}
	return &Snapshot{durable: m.cfg.Durable, csn: m.certifier.LastCSN(), needs: needs, header: h, state: m.certifier.Snapshot()}, nil
}

// WriteTo waits until PostgreSQL holds durably what the snapshot covers (the log up to it, or to what it Needs, may be
// truncated afterwards), then writes the snapshot.
func (s *Snapshot) WriteTo(w io.Writer) (int64, error) {
	if err := s.durable(s.csn); err != nil {
		return 0, fmt.Errorf("make CSN %d durable: %w", s.csn, err)
	}
	head := slices.Clone(magic)
	head = binary.BigEndian.AppendUint32(head, uint32(len(s.header)))
	head = append(head, s.header...)
	head = binary.BigEndian.AppendUint32(head, crc32.Checksum(s.header, castagnoli))
	n, err := w.Write(head)
	if err != nil {
		return int64(n), fmt.Errorf("write snapshot: %w", err)
	}
	more, err := s.state.WriteTo(w)
	if err != nil {
		err = fmt.Errorf("write snapshot: %w", err)
	}
	return int64(n) + more, err
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// maxHeader leaves room for a page of outcomes, 27 bytes in most cases, for each of keptOutcomes, and for maxAsked GIDs, 75
// bytes, of each node.
const maxHeader = 64 << 20

// Restore replaces the state. An error leaves the machine unusable.
func (m *Machine) Restore(r io.Reader) error {
	prefix := make([]byte, len(magic)+4)
	if _, err := io.ReadFull(r, prefix); err != nil {
		return fmt.Errorf("read snapshot: %w", err)
	}
	length := binary.BigEndian.Uint32(prefix[len(magic):])
	if !bytes.HasPrefix(prefix, magic) || length > maxHeader {
		return fmt.Errorf("read snapshot: %w: not a snapshot of this version", txn.ErrCorrupt)
	}
	body := make([]byte, length+4)
	if _, err := io.ReadFull(r, body); err != nil {
		return fmt.Errorf("read snapshot: %w", err)
	}
	if crc32.Checksum(body[:length], castagnoli) != binary.BigEndian.Uint32(body[length:]) {
		return fmt.Errorf("read snapshot header: %w: checksum", txn.ErrCorrupt)
	}
	var h header
	if err := json.Unmarshal(body[:length], &h); err != nil {
		return fmt.Errorf("read snapshot header: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.certifier.Restore(r); err != nil {
		return fmt.Errorf("restore certifier: %w", err)
	}
	if err := m.outcomes.decode(h.Outcomes, h.Asked); err != nil {
		return err
	}
	m.setIndex(h.Index)
	m.chunks = make(map[txn.GID]*chunkList)
	for _, u := range h.Unfinished {
		if m.chunks[u.GID] != nil || len(u.Indexes) == 0 || !slices.IsSorted(u.Indexes) || u.latest() > h.Index {
			return fmt.Errorf("read unfinished transactions: %w", txn.ErrCorrupt)
		}
		m.chunks[u.GID] = &u.chunkList
	}
	if !m.members.restore(h.Members, h.Membership) {
		return fmt.Errorf("read members: %w", txn.ErrCorrupt)
	}
	if err := m.members.unreadable(); err != nil {
		return fmt.Errorf("read snapshot: %w", err)
	}
	m.reservations = make(reservations)
	for slot, r := range h.Reserved {
		if r == nil || slot < 0 || slot >= len(m.members.used) {
			return fmt.Errorf("read reservations: %w", txn.ErrCorrupt)
		}
		if r.Values == nil {
			r.Values = make(map[string]int64)
		}
		m.reservations[slot] = r
	}
	m.tokens = make(tokens)
	for _, t := range h.Tokens {
		m.tokens[t.ID] = t
	}
	return nil
}
