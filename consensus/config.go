package consensus

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/quorate/quorate/txn"
)

// The log stores that can be chosen.
const (
	LogStoreWAL    = "wal"    // raft-wal: one flush per append, segments of 64 MiB
	LogStoreBoltDB = "boltdb" // raft-boltdb: two flushes per append, older and plainer
)

// Limits.
const (
	// MaxData bounds one entry. It is what fits a gRPC message of the default size limit, with room for the framing.
	MaxData = 4<<20 - 64<<10
	// maxInFlight bounds the bytes of entries that this node has proposed and that are not decided yet. Beyond it
	// Propose waits.
	maxInFlight = 32 << 20
	// maxAppend bounds, in entries, one group commit and one AppendEntries message. More than 64, Raft's default,
	// helps a member that catches up; much more would let one message of large entries crowd out memory.
	maxAppend = 128
)

// Config is what Open needs. Node, Dir and RaftAddress are mandatory.
type Config struct {
	// Node is this node's identity, for the life of the cluster. A node that lost its Dir must come back under a new one.
	Node txn.NodeID
	// Dir is where log, vote and snapshots live. It is created if missing, and belongs to one process at a time.
	Dir string
	// ClusterID tells this group from every other: its members turn away whoever names another one.
	ClusterID [16]byte
	// RaftAddress is the host:port to listen on for Raft. Where other members reach this node is for the group's
	// configuration to say.
	RaftAddress string
	// Bootstrap founds a group. It lists the voters, this node included, becomes the first configuration if the log is
	// empty, and must then be the same on all of them. Empty: the node waits until a leader adds it. It is not looked at
	// if the log holds entries: who the members are is known by the log.
	Bootstrap []Member
	// LogStore is LogStoreWAL (default) or LogStoreBoltDB. It cannot be changed once the log holds entries.
	LogStore string

	// HeartbeatTimeout is how long a follower hears nothing, at least, before it asks for an election; half as long again
	// at most. Default 700 ms: a dead leader should cost less than 2 s, and a busy one not be replaced needlessly, for
	// which a majority must have heard nothing of four heartbeats at least.
	HeartbeatTimeout time.Duration
	// ElectionTimeout is how long a candidate waits for votes. At least HeartbeatTimeout, default 700 ms.
	ElectionTimeout time.Duration
	// LeaderLease is how long a leader goes on without hearing from a majority. At most HeartbeatTimeout, default 700 ms:
	// nothing is read by it, reads ask a majority; a shorter one only makes a busy leader step down for nothing.
	LeaderLease time.Duration
	// CommitTimeout is after what time without new entries a leader repeats the commit index to followers (up to twice
	// it). It is only the fallback for a lost commit notice. Default 500 ms, at least 1 ms.
	CommitTimeout time.Duration
	// WriteDeadline is how long one append to the log may take before it counts as failed, which makes a leader step
	// down. Default 5 s: longer than a loaded disk's worst flush, short enough not to hang on a dead one.
	WriteDeadline time.Duration
	// VerifyInterval is how often a leader has the members compare checksums of the log, if it grew. Default 10 s.
	VerifyInterval time.Duration

	// SnapshotInterval is how often (up to twice it) Raft looks whether SnapshotThreshold new entries have come since
	// the last snapshot, and if so takes one. Defaults 60 s and 16384.
	SnapshotInterval  time.Duration
	SnapshotThreshold uint64
	// TrailingLogs is how many entries stay in the log behind a snapshot, so that a member that was away can follow.
	// One that is further behind must be cloned. Default 1048576: bytes are what bounds it.
	TrailingLogs uint64
	// SnapshotBytes and TrailingBytes bound the same in bytes of entries: a snapshot is taken when so many have come since
	// the last one, and behind one no more than so many stay, even if they are fewer entries than TrailingLogs. Defaults
	// 256 MiB and 512 MiB. On disk it is up to a file more, 64 MiB with LogStoreWAL. What the machine has not taken yet,
	// and what a snapshot needs, always stays.
	SnapshotBytes uint64
	TrailingBytes uint64

	// ServerTLS and ClientTLS are used on Raft connections, which come in and go out; nil: no encryption, for loopback and
	// trusted networks only. ClientTLS is asked for every connection, and given the host that is dialled as ServerName
	// unless it has one. Both sides should demand a certificate of the other.
	ServerTLS *tls.Config
	ClientTLS func() *tls.Config
	// VerifyPeer may refuse the other side of such a connection, on either end, for what its certificate says; nil: nobody.
	VerifyPeer func(tls.ConnectionState) error

	walSegment int // bytes of a file of raft-wal's, which truncation deletes as a whole; 0: its default

	// DialOptions are used towards other members' gRPC servers. Empty means without encryption, for loopback only.
	DialOptions []grpc.DialOption
	// Logger receives Raft's messages too. Default: discard.
	Logger *slog.Logger
	// Registerer receives the metrics until Close; nil: none.
	Registerer prometheus.Registerer
}

func (c *Config) setDefaults() {
	c.LogStore = orDefault(c.LogStore, LogStoreWAL)
	c.HeartbeatTimeout = orDefault(c.HeartbeatTimeout, 700*time.Millisecond)
	c.ElectionTimeout = orDefault(c.ElectionTimeout, 700*time.Millisecond)
	c.LeaderLease = orDefault(c.LeaderLease, 700*time.Millisecond)
	c.CommitTimeout = orDefault(c.CommitTimeout, 500*time.Millisecond)
	c.WriteDeadline = orDefault(c.WriteDeadline, 5*time.Second)
	c.VerifyInterval = orDefault(c.VerifyInterval, 10*time.Second)
	c.SnapshotInterval = orDefault(c.SnapshotInterval, time.Minute)
	c.SnapshotThreshold = orDefault(c.SnapshotThreshold, 16384)
	c.TrailingLogs = orDefault(c.TrailingLogs, 1<<20)
	c.SnapshotBytes = orDefault(c.SnapshotBytes, 256<<20)
	c.TrailingBytes = orDefault(c.TrailingBytes, 512<<20)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

func orDefault[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}

func (c *Config) validate() error {
	if c.Node == 0 {
		return fmt.Errorf("node: must not be 0")
	}
	if c.Dir == "" {
		return fmt.Errorf("dir: must not be empty")
	}
	if c.LogStore != LogStoreWAL && c.LogStore != LogStoreBoltDB {
		return fmt.Errorf("log store: %q is neither %q nor %q", c.LogStore, LogStoreWAL, LogStoreBoltDB)
	}
	if _, _, err := net.SplitHostPort(c.RaftAddress); err != nil {
		return fmt.Errorf("raft address: %w", err)
	}
	if (c.ServerTLS == nil) != (c.ClientTLS == nil) {
		return errors.New("TLS: configured for one direction only")
	}
	if c.WriteDeadline < 0 || c.VerifyInterval < 0 {
		return fmt.Errorf("write deadline and verify interval: must not be negative")
	}
	seen := make(map[txn.NodeID]bool)
	for _, m := range c.Bootstrap {
		if err := m.validate(); err != nil {
			return fmt.Errorf("bootstrap: %w", err)
		}
		if seen[m.Node] {
			return fmt.Errorf("bootstrap: node %s is listed twice", m.Node)
		}
		seen[m.Node] = true
	}
	if len(seen) > 0 && !seen[c.Node] {
		return fmt.Errorf("bootstrap: node %s itself is not listed", c.Node)
	}
	return nil
}

func (c *Config) raftConfig() *raft.Config {
	r := raft.DefaultConfig()
	r.LocalID = serverID(c.Node)
	r.HeartbeatTimeout = c.HeartbeatTimeout
	r.ElectionTimeout = c.ElectionTimeout
	r.LeaderLeaseTimeout = c.LeaderLease
	r.CommitTimeout = c.CommitTimeout
	r.SnapshotInterval = c.SnapshotInterval
	r.SnapshotThreshold = c.SnapshotThreshold
	r.TrailingLogs = c.TrailingLogs
	r.MaxAppendEntries = maxAppend
	// Entries come from few goroutines, one per link: without a buffer each would be a group of its own.
	r.BatchApplyCh = true
	// Close must find Raft running, to wait for its futures (see Close).
	r.ShutdownOnRemove = false
	r.NoLegacyTelemetry = true
	r.Logger = newHCLog(c.Logger)
	return r
}

// bootstrap returns the first configuration, the same bytes on every member.
func (c *Config) bootstrap() raft.Configuration {
	members := slices.SortedFunc(slices.Values(c.Bootstrap), func(a, b Member) int { return int(a.Node) - int(b.Node) })
	var configuration raft.Configuration
	for _, m := range members {
		configuration.Servers = append(configuration.Servers, raft.Server{
			Suffrage: raft.Voter, ID: serverID(m.Node), Address: serverAddress(m),
		})
	}
	return configuration
}

func serverID(n txn.NodeID) raft.ServerID { return raft.ServerID(n.String()) }

// nodeID is the inverse of serverID; 0 if id is none of ours.
func nodeID(id raft.ServerID) txn.NodeID {
	n, err := strconv.ParseUint(string(id), 10, 32)
	if err != nil {
		return 0
	}
	return txn.NodeID(n)
}
