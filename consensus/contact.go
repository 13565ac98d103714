package consensus

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/quorate/quorate/txn"
)

// Contact is what a node knows of a majority. All is zero if it has never heard from one.
type Contact struct {
	// At is the latest instant at which, for all this node knows, a majority was there and followed the leader that it
	// follows too. It only moves forward.
	At time.Time
	// Index is such that who has applied it has seen everything that was committed at At.
	Index txn.LogIndex
	// Since is when the contact began that lasts until At without a gap of more than QuorumTimeout. Being in contact is not
	// knowing what went on before: until it has applied the Index of a contact that is not older than Since, this node
	// shows what it had before the gap.
	Since time.Time
}

// contact holds the newest one. Every proof of it is a round trip that began here, and what counts is when it began: an
// answer that has lain in a buffer while the process was frozen proves nothing about the time since.
type contact struct {
	gap    time.Duration // more than this between two of them is one
	latest atomic.Pointer[Contact]
}

// heard takes a round trip that began at an instant and told the index of something that was committed after it.
func (c *contact) heard(at time.Time, index txn.LogIndex) {
	for {
		latest, next := c.latest.Load(), &Contact{At: at, Index: index, Since: at}
		if latest != nil {
			if !at.After(latest.At) {
				return
			}
			if at.Sub(latest.At) <= c.gap {
				next.Since = latest.Since
			}
		}
		if c.latest.CompareAndSwap(latest, next) {
			return
		}
	}
}

func (c *contact) read() Contact {
	if latest := c.latest.Load(); latest != nil {
		return *latest
	}
	return Contact{}
}

// quorumHeartbeats is the age of the contact, in heartbeat timeouts, from which on a node is without quorum. Followers
// notice within one and a half that their leader is gone; what a new one mends in three is no loss of quorum.
const quorumHeartbeats = 3

// QuorumTimeout is how long a node may be without contact to a majority before it should count as cut off.
func (c *Consensus) QuorumTimeout() time.Duration {
	return c.config.quorumTimeout()
}

func (c *Config) quorumTimeout() time.Duration { return quorumHeartbeats * c.HeartbeatTimeout }

// Contact returns what this node knows of a majority. While there is one in reach, Contact.At is seldom older than a third
// of the heartbeat timeout. It costs one atomic read, and the monotonic reading is that of this process, so a process that
// has been frozen sees its contact old.
func (c *Consensus) Contact() Contact { return c.contact.read() }

// QuorumContact returns Contact.At.
func (c *Consensus) QuorumContact() time.Time { return c.contact.read().At }

// runContact asks for a majority when nothing else has lately, until closing.
func (c *Consensus) runContact() {
	every := c.config.HeartbeatTimeout / 4
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-c.closing.Done():
			return
		}
		if time.Since(c.contact.read().At) < every {
			continue
		}
		ctx, cancel := context.WithTimeout(c.closing, c.config.HeartbeatTimeout)
		_, _ = c.ReadIndex(ctx) // that there is no answer is what the contact's age tells
		cancel()
	}
}

// answers knows for each other member when the newest message was sent, by this node as leader of a term, that the
// member has answered in the same term. It had not voted for anybody else's later term then.
type answers struct {
	mu   sync.Mutex
	term uint64
	sent map[raft.ServerID]time.Time
	more chan struct{} // closed by the next answer; nil: nobody waits
}

func (a *answers) note(from raft.ServerID, term uint64, sent time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if term > a.term {
		a.term, a.sent = term, make(map[raft.ServerID]time.Time)
	}
	if term == a.term && sent.After(a.sent[from]) {
		a.sent[from] = sent
		if a.more != nil {
			close(a.more)
			a.more = nil
		}
	}
}

// since reports whether a majority of voters, self among them or not, has answered messages of term that were sent after
// began. If not, more is closed with the next answer.
func (a *answers) since(began time.Time, term uint64, voters []raft.ServerID, self raft.ServerID) (ok bool, more <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	count := 0
	for _, id := range voters {
		if id == self || term == a.term && a.sent[id].After(began) {
			count++
		}
	}
	if count > len(voters)/2 {
		return true, nil
	}
	if a.more == nil {
		a.more = make(chan struct{})
	}
	return false, a.more
}

// AppendEntries implements raft.Transport. Heartbeats come this way, so what is pipelined need not be looked at.
func (t *transport) AppendEntries(id raft.ServerID, at raft.ServerAddress, m *raft.AppendEntriesRequest, answer *raft.AppendEntriesResponse) error {
	sent := time.Now()
	if err := t.NetworkTransport.AppendEntries(id, target(id, at), m, answer); err != nil {
		return err
	}
	if answer.Term == m.Term {
		t.answers.note(id, m.Term, sent)
	}
	return nil
}
