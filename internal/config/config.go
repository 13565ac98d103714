// Package config reads the configuration of a node. It is strict: what is misspelt or impossible is refused, all of
// it at once, by field and value, before anything is touched.
package config

import (
	"log/slog"
	"time"

	"github.com/quorate/quorate/txn"
)

// Config is one node's configuration file. Paths that are not absolute are taken from the file's own directory;
// addresses are host:port, with an IP address or a name for host.
type Config struct {
	// Cluster is the name that all members share: 1 to 63 of a-z, 0-9, "-" and "_". A data directory remembers it and
	// is refused under another. Required.
	Cluster string `yaml:"cluster"`
	// Node is the ID of this node among Members, at least 1. It never changes, and after a node lost its data directory it
	// must not be used again. Given with Members only: a node of a cluster that was made by quorate init or join gets its
	// ID from the cluster.
	Node txn.NodeID `yaml:"node,omitempty"`
	// Role is data (default), or witness: a node without PostgreSQL and clients, which votes and stores the log, so that
	// of two data nodes either can be lost.
	Role string `yaml:"role,omitempty"`
	// DataDir holds the sidecar's log and pid file and, for a managed server, PostgreSQL's data. Required.
	DataDir string `yaml:"data_dir"`

	// Postgres is not used by a witness.
	Postgres Postgres `yaml:"postgres,omitempty"`
	Listen   Listen   `yaml:"listen"`
	// Advertise has the addresses by which others reach this node. Default: its entry in Members, else those of Listen,
	// as far as they name a host.
	Advertise Advertise `yaml:"advertise,omitempty"`
	// Members founds a cluster by a list of all nodes, this one included, alike on all of them. Afterwards the log knows
	// the members, and this list is not looked at any more, except for this node's own addresses.
	Members []Member `yaml:"members,omitempty"`
	// MaxNodes is how many nodes with data the cluster can have at a time, if this node founds it: it divides each sequence
	// among as many. It counts when the cluster is founded, by quorate init or by Members (on all of them alike), and for good; nodes
	// that join learn it. Default 16, at least 1, at most 64.
	MaxNodes int `yaml:"max_nodes,omitempty"`

	TLS     TLS     `yaml:"tls,omitempty"`
	Gateway Gateway `yaml:"gateway,omitempty"`
	HTTP    HTTP    `yaml:"http,omitempty"`

	Apply  Apply  `yaml:"apply,omitempty"`
	Limits Limits `yaml:"limits,omitempty"`
	// CommitTimeout bounds how long a COMMIT waits to be ordered. Then the client gets an error, and where the outcome
	// cannot be known 08007. Default 10s, at least 100ms. Shorter than an election (about 2s), and every change of
	// leader fails commits.
	CommitTimeout time.Duration `yaml:"commit_timeout,omitempty"`
	// ReadsWithoutQuorum says whether a node that is cut off from the majority goes on to answer reads: allow (default),
	// until they may be older than MaxStaleness, or refuse. Writes are always refused then.
	ReadsWithoutQuorum string `yaml:"reads_without_quorum,omitempty"`
	// MaxStaleness is how long after it last heard from a majority a node still answers reads. Then sessions end with
	// 57P03, and new ones are refused, until it has heard again and applied what was committed then. Default 10s, at least 1s. Up to about 3s, and a change of leader ends sessions.
	MaxStaleness time.Duration `yaml:"max_staleness,omitempty"`
	Heartbeat    Heartbeat     `yaml:"heartbeat,omitempty"`
	Log          Log           `yaml:"log,omitempty"`
	// Tracing is off unless it has an endpoint.
	Tracing Tracing `yaml:"tracing,omitempty"`
	// Pprof serves Go's profiles under /debug/pprof/ on the HTTP address. They show memory contents: off by default.
	Pprof bool `yaml:"pprof,omitempty"`
}

// Postgres says which server belongs to the node.
type Postgres struct {
	// Managed servers are initialised, configured, started and stopped by the node. Otherwise it attaches to one that
	// runs, and refuses to start when a setting of it will not do.
	Managed bool `yaml:"managed"`
	// BinDir holds postgres and initdb of version 17 or newer. Default: what pg_config names, else the newest under
	// /usr/lib/postgresql. Managed only.
	BinDir string `yaml:"bin_dir,omitempty"`
	// DataDir is PostgreSQL's data directory. Default "pgdata" in the node's data directory. Managed only.
	DataDir string `yaml:"data_dir,omitempty"`
	// Host is the IP address of TCP connections that a managed server listens on (default 127.0.0.1), or where an
	// attached one is: address, name or, with a leading slash, socket directory (required then).
	Host string `yaml:"host,omitempty"`
	// Port of TCP and of the Unix socket's name. Default 5432.
	Port int `yaml:"port,omitempty"`
	// SocketDir is where a managed server has its Unix socket, through which the node connects. At most 92 bytes.
	// Default "run" beside PostgreSQL's data directory or, where that is too long, a directory under /tmp. Managed only.
	SocketDir string `yaml:"socket_dir,omitempty"`
	// Superuser is the role the node itself uses. Default "postgres".
	Superuser string `yaml:"superuser,omitempty"`
	// PasswordFile holds the superuser's password in its first line. Required for a managed server unless Auth is trust.
	PasswordFile string `yaml:"password_file,omitempty"`
	// Auth is how a managed server authenticates local and loopback connections: scram-sha-256 (default) or trust. With
	// trust everybody on this machine is superuser: for demonstrations.
	Auth string `yaml:"auth,omitempty"`
	// Database is the one that is replicated. Default "postgres".
	Database string `yaml:"database,omitempty"`
	// Settings are written to a managed server's configuration and win over the node's own choice, which is
	// dangerous for those that replication rests on. Managed only.
	Settings map[string]string `yaml:"settings,omitempty"`
}

// The values of Config.Role.
const (
	RoleData    = "data"
	RoleWitness = "witness"
)

// Listen has the addresses this node listens on. All are required and differ. Without TLS all but the gateway's must be
// loopback addresses.
type Listen struct {
	// Gateway is where clients of PostgreSQL connect. A witness has none.
	Gateway string `yaml:"gateway,omitempty"`
	// GRPC serves the command line, and the other members' proposals.
	GRPC string `yaml:"grpc"`
	// HTTP serves metrics.
	HTTP string `yaml:"http"`
	// Raft serves the other members' log.
	Raft string `yaml:"raft"`
}

// Advertise has addresses like those of a Member.
type Advertise struct {
	Gateway string `yaml:"gateway,omitempty"` // shown only
	GRPC    string `yaml:"grpc,omitempty"`
	HTTP    string `yaml:"http,omitempty"` // shown only
	Raft    string `yaml:"raft,omitempty"`
}

// Member has the addresses by which the other members, and people, reach a node: hosts that mean it everywhere, not
// 0.0.0.0.
type Member struct {
	ID      txn.NodeID `yaml:"id"`
	Raft    string     `yaml:"raft"`
	GRPC    string     `yaml:"grpc"`
	HTTP    string     `yaml:"http,omitempty"`    // shown only
	Gateway string     `yaml:"gateway,omitempty"` // shown only
	Role    string     `yaml:"role,omitempty"`    // as Config.Role; empty: data
}

// Witness is Config.Witness of another node.
func (m Member) Witness() bool { return m.Role == RoleWitness }

// Apply configures how other nodes' transactions are applied here.
type Apply struct {
	// Workers is how many are applied at once, each on its own connection to PostgreSQL. Default 8, at most 256.
	Workers int `yaml:"workers,omitempty"`
}

// Limits bound what the node takes on. Where one is reached the node makes others wait, or refuses; it never drops.
type Limits struct {
	// Clients is how many sessions the gateway holds at once; more are refused with 53300. Default 100, at most 10000.
	// A managed server's max_connections follows from it.
	Clients int `yaml:"clients,omitempty"`
	// Message is the largest protocol message a client may send. Default 64MiB, at least 64KiB, at most 1GiB.
	Message Size `yaml:"message,omitempty"`
	// CaptureMemory is how much of open transactions' changes is kept in memory; what is more goes to files under the
	// data directory. Default 64MiB, at least 1MiB.
	CaptureMemory Size `yaml:"capture_memory,omitempty"`
	// ApplyTransactions and ApplyMemory bound what is ordered but not yet applied here; beyond, reading the log waits.
	// Defaults 4096 and 64MiB; at least 1 and 1MiB.
	ApplyTransactions int  `yaml:"apply_transactions,omitempty"`
	ApplyMemory       Size `yaml:"apply_memory,omitempty"`
	// Log is how much of the Raft log is kept, beyond what is needed here, for members that are away. One that has been away
	// for more than this is cloned. Default 512MiB, at least 1MiB. On disk it may be a file more, 64 MiB, and as much as has
	// come since the last snapshot, which is taken when that is half of it. A large transaction that is being ordered stays
	// whole, and if its end does not come, 256 MiB of what others write behind its latest part.
	Log Size `yaml:"log,omitempty"`
	// CloneWAL is how much WAL the node's PostgreSQL keeps for each clone of it (two at most are made at once) that takes the
	// copy slower than WAL is written. Beyond, the clone ends. Default 16GiB, at least 1GiB, and
	// to be more than max_wal_size, which PostgreSQL may keep anyhow. Twice as much is what a managed server keeps for any slot
	// (max_slot_wal_keep_size), also for capture's while a transaction stays open; beyond, capture and all sessions begin anew.
	CloneWAL Size `yaml:"clone_wal,omitempty"`
	// Lag is how many transactions an active member may be behind before commits on this node are slowed, by up to a quarter
	// of a second each; at twice as many they wait. Default 8192, at least 16.
	Lag int `yaml:"lag,omitempty"`
	// LagPatience is how long this node may be behind as far as that, while a majority keeps up, until it gives up being
	// active so that the others need not wait for it. It is active again when it has caught up. Default 5s, at least 1s.
	// From commit_timeout on, and commits elsewhere fail before.
	LagPatience time.Duration `yaml:"lag_patience,omitempty"`
}

// Log configures the log written to standard error.
type Log struct {
	// Level is debug, info (default), warn or error.
	Level string `yaml:"level,omitempty"`
	// Format is text (default) or json.
	Format string `yaml:"format,omitempty"`
}

// SlogLevel returns Level in slog's terms.
func (l Log) SlogLevel() slog.Level { return levels[l.Level] }

var levels = map[string]slog.Level{
	"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
}

// Self returns how others reach this node. ID is 0 as long as nobody has said which one it is.
func (c *Config) Self() Member {
	return Member{
		ID: c.Node, Raft: c.Advertise.Raft, GRPC: c.Advertise.GRPC, HTTP: c.Advertise.HTTP, Gateway: c.Advertise.Gateway, Role: c.Role,
	}
}

// Witness reports whether the node has no PostgreSQL.
func (c *Config) Witness() bool { return c.Role == RoleWitness }

// listed returns this node's entry of Members.
func (c *Config) listed() (Member, bool) {
	for _, m := range c.Members {
		if m.ID == c.Node {
			return m, true
		}
	}
	return Member{}, false
}
