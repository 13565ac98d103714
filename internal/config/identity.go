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
	State     string     `yaml:"state,omitempty"` // empty: StateMember
	// Previous is the cluster that this one goes on from, after quorate recover --force-new-cluster.
	Previous txn.UUID `yaml:"previous,omitempty"`
	// Request is what it was admitted by, or asks by; zero: it has founded the cluster.
	Request txn.UUID `yaml:"request,omitempty"`
	// Peers, Token and Replaces are those of an applying node: gRPC addresses of members to ask, what lets a stranger in,
	// and the member that it was.
	Peers    []string   `yaml:"peers,omitempty"`
	Token    string     `yaml:"token,omitempty"`
	Replaces txn.NodeID `yaml:"replaces,omitempty"`
	// Reason is why it was removed.
	Reason string `yaml:"reason,omitempty"`
	// Started says that the node has been in the cluster: its log is worth something, and must be there.
	Started bool `yaml:"started,omitempty"`
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
}

// IsZero reports whether the node has had no server.
func (s Server) IsZero() bool { return s == Server{} }

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
		have = Identity{Cluster: c.Cluster, ClusterID: c.foundedID(), Node: c.Node, State: StateMember}
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
	return txn.DeriveUUID(b.String())
}
