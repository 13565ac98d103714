package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/quorate/quorate/txn"
)

// The states of an Identity.
const (
	// StateMember: the node belongs to the cluster.
	StateMember = "member"
	// StateApplying: it asks to be admitted, and does not know yet who it is.
	StateApplying = "applying"
	// StateJoining: it has been admitted, and is not yet a member whose data are its own.
	StateJoining = "joining"
	// StateRecovering: it is being made a cluster of its own, and must not run before it is.
	StateRecovering = "recovering"
	// StateRemoved: it belonged to the cluster and never will again. It takes no clients.
	StateRemoved = "removed"
)

// Identity is what a data directory remembers of whose it is, in its file "identity".
type Identity struct {
	Cluster   string     `yaml:"cluster"`
	ClusterID txn.UUID   `yaml:"cluster_id,omitempty"`
	Node      txn.NodeID `yaml:"node"`
	// MaxNodes is that of the configuration with which the cluster was founded. 0: it has joined, or 16.
	MaxNodes int    `yaml:"max_nodes,omitempty"`
	State    string `yaml:"state,omitempty"` // empty: StateMember
	// Previous is the cluster that the node belonged to before quorate recover --force-new-cluster; zero: it was never used.
	Previous txn.UUID `yaml:"previous,omitempty"`
	// Request is what it was admitted by, or asks by; zero: it has founded the cluster.
	Request txn.UUID `yaml:"request,omitempty"`
	// Peers and Token are those of an applying node: gRPC addresses of members to ask, and what lets a stranger in.
	Peers []string `yaml:"peers,omitempty"`
	Token string   `yaml:"token,omitempty"`
	// Rejoin is the request by which the node has asked to be admitted anew, in its own place; zero: it never has. Until it
	// hears that it was, it is what State says. An answer may be lost: it asks by the same request again.
	Rejoin txn.UUID `yaml:"rejoin,omitempty"`
	// Replaces is the member that a joining node was.
	Replaces txn.NodeID `yaml:"replaces,omitempty"`
	// Supersedes is the member that leaves when this one, which was joined to take its place, is active; 0: nobody.
	Supersedes txn.NodeID `yaml:"supersedes,omitempty"`
	// Reason is why it was removed.
	Reason string `yaml:"reason,omitempty"`
	// Started says that the node has been in the cluster: its log is worth something, and must be there.
	Started bool `yaml:"started,omitempty"`
	// LogLost is why the log is not worth anything any more: votes and entries that the node has given its word for are
	// not in it. It is not opened again. Empty: it is.
	LogLost string `yaml:"log_lost,omitempty"`
	// Members are those of the cluster, this node included, as of late: whom a node without a log can ask.
	Members []Member `yaml:"members,omitempty"`
	// Server is the PostgreSQL that the node had last.
	Server Server `yaml:"server,omitempty"`
}

// Server is how the node knows its PostgreSQL again: a server that was exchanged, or set back to an older copy, must not
// go on as if nothing had been. Both the data directory and PostgreSQL keep Generation, and raise it in every start.
type Server struct {
	SystemIdentifier string `yaml:"system_identifier,omitempty"`
	Generation       uint64 `yaml:"generation,omitempty"`
	// Next is the generation that was about to be written to PostgreSQL, which may have it or not; 0: none.
	Next uint64 `yaml:"next,omitempty"`
	// Incarnations are those of the node in which it worked with this server, since the last one that caught up with the
	// log, which is the first of them. One without an ID stands for all that were before they were written down.
	Incarnations []Incarnation `yaml:"incarnations,omitempty"`
}

// Incarnation is one life of the node with its PostgreSQL.
type Incarnation struct {
	ID uint64 `yaml:"id"` // in the GIDs of its transactions
	// XID: the server gave out this transaction id and higher ones in it, and in none before.
	XID txn.XID `yaml:"xid"`
	// Silent: it has put nothing into the log.
	Silent bool `yaml:"silent,omitempty"`
}

// IsZero reports whether the node has had no server.
func (s Server) IsZero() bool { return s.SystemIdentifier == "" && s.Generation == 0 && s.Next == 0 }

// Begin returns s with one more incarnation, a silent one. Those that never were anything else are not worth a place each, or the
// list would grow with every start that fails: of a row of them one remains, with the name of the last and the first id of all.
func (s Server) Begin(i Incarnation) Server {
	ran := slices.Clone(s.Incarnations)
	if len(ran) == 0 {
		ran = []Incarnation{{}}
	}
	if last := len(ran) - 1; last > 1 && ran[last].Silent && ran[last-1].Silent {
		ran[last-1].ID = ran[last].ID
		ran = ran[:last]
	}
	i.Silent = true
	s.Incarnations = append(ran, i)
	return s
}

// Silent reports whether the latest incarnation is.
func (s Server) Silent() bool {
	last := len(s.Incarnations) - 1
	return last >= 0 && s.Incarnations[last].Silent
}

// Speak returns s with a latest incarnation that is silent no more.
func (s Server) Speak() Server {
	if s.Silent() {
		s.Incarnations = slices.Clone(s.Incarnations)
		s.Incarnations[len(s.Incarnations)-1].Silent = false
	}
	return s
}

// CaughtUp returns s without the incarnations before the latest: what they had committed is known for good, and what comes
// of them yet did not commit here.
func (s Server) CaughtUp() Server {
	s.Incarnations = slices.Clone(s.Incarnations[max(0, len(s.Incarnations)-1):])
	return s
}

// Knows reports whether an incarnation is among those of the server.
func (s Server) Knows(incarnation uint64) bool { return s.find(incarnation) >= 0 }

// Gave reports whether the server, as it is, gave out a transaction id in an incarnation. If it did not, the transaction
// that the incarnation has proposed under it is not here: another one may have that id since.
func (s Server) Gave(incarnation uint64, xid txn.XID) bool {
	at := s.find(incarnation)
	if at < 0 || xid < s.Incarnations[at].XID {
		return false
	}
	return at+1 == len(s.Incarnations) || xid < s.Incarnations[at+1].XID
}

func (s Server) find(incarnation uint64) int {
	at := slices.IndexFunc(s.Incarnations, func(i Incarnation) bool { return i.ID == incarnation })
	if at < 0 && len(s.Incarnations) > 0 && s.Incarnations[0].ID == 0 {
		return 0
	}
	return at
}

func (i Identity) path(dir string) string { return filepath.Join(dir, "identity") }

// ReadIdentity returns what a data directory remembers. The error wraps fs.ErrNotExist if it has never been a node's.
func ReadIdentity(dir string) (Identity, error) {
	var i Identity
	name := i.path(dir)
	text, err := os.ReadFile(name)
	if err != nil {
		return i, fmt.Errorf("read identity of data directory: %w", err)
	}
	if err := yaml.Unmarshal(text, &i); err != nil || i.Cluster == "" || i.Node == 0 && i.State != StateApplying {
		return i, fmt.Errorf("read identity of data directory: %s does not hold cluster and node (%v): "+
			"it was damaged, or data_dir %q is not a node's", name, err, dir)
	}
	if i.State == "" {
		i.State = StateMember
	}
	if !slices.Contains([]string{StateMember, StateApplying, StateJoining, StateRecovering, StateRemoved}, i.State) {
		return i, fmt.Errorf("read identity of data directory: %s has the state %q, which this version of Quorate does not know", name, i.State)
	}
	return i, nil
}

// RaftDir is where the log of this node is, below the data directory dir. A node that joins anew under another id, because
// the log had left it behind, begins with another log.
func (i Identity) RaftDir(dir string) string {
	if i.Request.IsZero() {
		return filepath.Join(dir, "raft")
	}
	return filepath.Join(dir, fmt.Sprintf("raft-%s", i.Node))
}

// Save writes the identity into a data directory, which is made where it is missing, in one step.
func (i Identity) Save(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make data directory: data_dir %q: %w", dir, err)
	}
	text, err := yaml.Marshal(i)
	if err != nil {
		return fmt.Errorf("write identity of data directory: %w", err)
	}
	return writeFile(i.path(dir), text, 0o600) // it may hold a token
}

// ErrNoIdentity: a data directory belongs to no node, and the configuration does not say which one it could be.
var ErrNoIdentity = errors.New("no node")

// ClaimDataDir returns whose the data directory is, and sets Node to it. With a list of members it makes the directory
// where it is missing, and the node one of those that found the cluster; without, somebody must have made or joined a
// cluster. A directory that belongs to another node or cluster is refused and left as it is.
func (c *Config) ClaimDataDir() (Identity, error) {
	have, err := ReadIdentity(c.DataDir)
	switch {
	case errors.Is(err, fs.ErrNotExist) && len(c.Members) == 0:
		return have, fmt.Errorf("data_dir %q belongs to %w yet: make a cluster with \"quorate init --config FILE\", "+
			"or join one with \"quorate join --config FILE --peer HOST:PORT\"", c.DataDir, ErrNoIdentity)
	case errors.Is(err, fs.ErrNotExist):
		have = Identity{Cluster: c.Cluster, ClusterID: c.foundedID(), Node: c.Node, State: StateMember, MaxNodes: c.MaxNodes}
		return have, have.Save(c.DataDir)
	case err != nil:
		return have, err
	}
	if have.Cluster != c.Cluster {
		return have, fmt.Errorf("data_dir %q belongs to cluster %q: cluster is %q", c.DataDir, have.Cluster, c.Cluster)
	}
	if have.Request.IsZero() && c.Node != 0 && have.Node != c.Node { // one that has joined anew has another id than its list says
		return have, fmt.Errorf("data_dir %q belongs to node %s of cluster %q: node is %s", c.DataDir, have.Node, have.Cluster, c.Node)
	}
	if have.State == StateRecovering {
		return have, fmt.Errorf("data_dir %q is being made a new cluster: complete it with \"quorate recover --force-new-cluster --config FILE\"", c.DataDir)
	}
	if c.Node = have.Node; have.ClusterID.IsZero() && have.State != StateApplying { // from before clusters had ids
		if len(c.Members) == 0 {
			return have, fmt.Errorf("data_dir %q does not say which cluster %q it belongs to: give it once the list of members that founded it", c.DataDir, c.Cluster)
		}
		have.ClusterID = c.foundedID()
		return have, have.Save(c.DataDir)
	}
	return have, nil
}

// foundedID is the id of a cluster that is founded by a list of members. All of them have the same list.
func (c *Config) foundedID() txn.UUID {
	var b strings.Builder
	b.WriteString(c.Cluster)
	for _, m := range slices.SortedFunc(slices.Values(c.Members), func(a, b Member) int { return int(a.ID) - int(b.ID) }) {
		fmt.Fprintf(&b, "\n%d %s", m.ID, m.Raft)
	}
	if c.MaxNodes != defaultMaxNodes { // who does not agree on it founds another cluster
		fmt.Fprintf(&b, "\nmax_nodes %d", c.MaxNodes)
	}
	return txn.DeriveUUID(b.String())
}
