package dashboard

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/quorate/quorate/txn"
)

// View is what a node can show at one moment. Lists are in the order in which they are shown. A pointer that is nil
// stands for a value that the node does not know.
type View struct {
	Cluster      Cluster
	Nodes        []Node // in the order of their ids
	Links        []Link
	Transactions []Transaction // of all nodes, the oldest first
	Conflicts    []Conflict    // of all nodes, the newest last
	Events       []Event       // of all nodes, the newest last
	Silent       []Silent      // whose transactions, conflicts and events are missing
}

// Cluster is what the node that is asked holds true of all of them.
type Cluster struct {
	Name    string     `json:"name"`
	Node    txn.NodeID `json:"node"` // who tells
	Version string     `json:"version"`
	Leader  txn.NodeID `json:"leader"` // 0: nobody it knows of
	Term    uint64     `json:"term"`
	// CommitIndex is how far the log is committed, CSN the newest transaction known to commit.
	CommitIndex txn.LogIndex `json:"commitIndex"`
	CSN         txn.CSN      `json:"csn"`
	// Quorum: the node has heard from a majority within the time after which it refuses writes. QuorumAge is how long
	// ago that was, nil for never, or while there is a quorum.
	Quorum    bool    `json:"quorum"`
	QuorumAge *Millis `json:"quorumAge"`
	// Access is what clients of this node may do: "read-write", "read-only" or "none"; Reason says why not everything.
	Access string `json:"access"`
	Reason string `json:"reason"`
	// Late is the age from which on a heartbeat is late, though nobody is lost yet.
	Late Millis `json:"late"`
}

// Node is one member, as the node that is asked knows it.
type Node struct {
	ID      txn.NodeID `json:"id"`
	State   string     `json:"state"`
	Reason  string     `json:"reason"`
	Role    string     `json:"role"` // "leader", "follower", "candidate"; empty while unknown
	Voter   bool       `json:"voter"`
	Witness bool       `json:"witness"`
	// Reachable: it was heard from lately. Contact is how long ago.
	Reachable bool    `json:"reachable"`
	Contact   *Millis `json:"contact"`
	Writes    bool    `json:"writes"` // clients can commit there
	// Gateway and HTTP are its addresses, host:port.
	Gateway  string `json:"gateway"`
	HTTP     string `json:"http"`
	Version  string `json:"version"`
	Postgres string `json:"postgres"` // version of the server

	Term         *uint64       `json:"term"`
	CommitIndex  *txn.LogIndex `json:"commitIndex"`
	AppliedIndex *txn.LogIndex `json:"appliedIndex"`
	Lag          *uint64       `json:"lag"` // transactions that are decided and not visible there

	TPS               *float64 `json:"tps"`    // commits of its own clients, per second
	Aborts            *float64 `json:"aborts"` // per second
	Connections       *uint64  `json:"connections"`
	MaxConnections    *uint64  `json:"maxConnections"`
	DiskFree          *uint64  `json:"diskFree"` // bytes
	DiskTotal         *uint64  `json:"diskTotal"`
	WAL               *uint64  `json:"wal"`     // bytes that PostgreSQL keeps
	SlotLag           *uint64  `json:"slotLag"` // bytes of it that are not confirmed by who reads it
	OldestTransaction *Millis  `json:"oldestTransaction"`
	Uptime            *Millis  `json:"uptime"`

	// Actions are those that make sense for it now; see Action.
	Actions []string `json:"actions"`
}

// Link is what one node hears of another: To hears From.
type Link struct {
	From txn.NodeID `json:"from"`
	To   txn.NodeID `json:"to"`
	// Known is false when nobody can tell, because the node that would hear is not heard itself.
	Known bool `json:"known"`
	// Lost: nothing has come for so long that To takes From to be gone. Age is how long, nil for never.
	Lost   bool    `json:"lost"`
	Age    *Millis `json:"age"`
	RTT    *Millis `json:"rtt"`
	Jitter *Millis `json:"jitter"`
	Loss   float64 `json:"loss"` // the share of heartbeats that did not come, 0 to 1
}

// Transaction is one that waits, on its way from COMMIT to being visible.
type Transaction struct {
	GID   string     `json:"gid"`
	Node  txn.NodeID `json:"node"` // where it waits
	Stage string     `json:"stage"`
	Age   Millis     `json:"age"` // since its COMMIT; on another node than its own, since that has it
	// Doubt: its client was told that the outcome is unknown.
	Doubt bool `json:"doubt"`
}

// Conflict is one transaction that had to give way to another.
type Conflict struct {
	ID     string     `json:"id"`
	At     time.Time  `json:"at"`
	Node   txn.NodeID `json:"node"` // where the loser ran
	Loser  string     `json:"loser"`
	Winner string     `json:"winner"` // GID or CSN, as far as it is known
	Table  string     `json:"table"`
	Key    string     `json:"key"`
	Reason string     `json:"reason"`
}

// Event is something that happened to the cluster.
type Event struct {
	ID       string     `json:"id"`
	At       time.Time  `json:"at"`       // by the clock of the node that has noted it
	Severity string     `json:"severity"` // "info", "warning" or "error"
	Node     txn.NodeID `json:"node"`     // who has noted it
	Kind     string     `json:"kind"`
	Text     string     `json:"text"`
}

// Silent is a node that did not answer when it was last asked.
type Silent struct {
	Node   txn.NodeID `json:"node"`
	Reason string     `json:"reason"`
}

// Millis is a duration that is shown in milliseconds, with as many digits as are worth reading.
type Millis time.Duration

// MarshalJSON writes milliseconds.
func (m Millis) MarshalJSON() ([]byte, error) {
	return strconv.AppendFloat(nil, float64(m)/float64(time.Millisecond), 'g', 4, 64), nil
}

// Ago returns the duration as the fields of View want it.
func Ago(d time.Duration) *Millis { m := Millis(d); return &m }

// The levels of a verdict.
const (
	Healthy  = "healthy"
	Degraded = "degraded"
	NoQuorum = "no-quorum"
)

// verdict is the one look that must be enough.
type verdict struct {
	Level string `json:"level"`
	Title string `json:"title"`
	Text  string `json:"text"`
	// Voters of which Reachable answer, and how many more of these may fail before writes stop.
	Voters    int `json:"voters"`
	Reachable int `json:"reachable"`
	Majority  int `json:"majority"`
	MayFail   int `json:"mayFail"`
	// Troubles are one sentence each, the worst first.
	Troubles []string `json:"troubles"`
}

func assess(v *View) verdict {
	d := verdict{Level: Healthy, Troubles: []string{}}
	var gone []string // nodes that are not reached
	for _, n := range v.Nodes {
		name := "node " + n.ID.String()
		if n.Voter {
			d.Voters++
			if n.Reachable {
				d.Reachable++
			}
		}
		switch {
		case !n.Reachable:
			gone = append(gone, name)
			d.Troubles = append(d.Troubles, sentence(name+" is not reached", n.Reason))
		case n.State != "active":
			d.Troubles = append(d.Troubles, sentence(name+" is "+n.State, n.Reason))
		case !n.Writes && !n.Witness && (v.Cluster.Quorum || n.ID != v.Cluster.Node): // else that is what all of this is about
			d.Troubles = append(d.Troubles, sentence(name+" takes no writes", n.Reason))
		}
	}
	for _, l := range v.Links {
		deaf := func(id txn.NodeID) bool {
			return slices.ContainsFunc(v.Nodes, func(n Node) bool { return n.ID == id && !n.Reachable })
		}
		// That nobody hears a node which is gone has been said.
		if l.Known && l.Lost && !deaf(l.From) && !deaf(l.To) {
			d.Troubles = append(d.Troubles, fmt.Sprintf("node %s does not hear node %s.", l.To, l.From))
		}
	}
	d.Majority = d.Voters/2 + 1
	d.MayFail = max(0, d.Reachable-d.Majority)
	switch {
	case !v.Cluster.Quorum:
		d.Level = NoQuorum
		d.Title = "No quorum"
		d.Text = fmt.Sprintf("This node reaches %d of %s, and %s needed: nothing can be committed here.", d.Reachable, count(d.Voters, "voter"), are(d.Majority))
		if len(gone) > 0 {
			d.Text += " Bring back " + strings.Join(gone, " or ") + "."
		}
	case d.Reachable < d.Majority:
		// Raft gives a leader longer than heartbeats give a member. Until it has given up, this is the truth already.
		d.Level = NoQuorum
		d.Title = "Cut off"
		d.Text = fmt.Sprintf("This node hears %d of %s, and %s needed: commits wait here, and are refused soon if this lasts.", d.Reachable, count(d.Voters, "voter"), are(d.Majority))
	case v.Cluster.Leader == 0:
		d.Level = Degraded
		d.Title = "Electing"
		d.Text = "There is no leader; commits wait until one is elected."
	default:
		if len(d.Troubles) > 0 {
			d.Level = Degraded
		}
		d.Title = map[string]string{Healthy: "Healthy", Degraded: "Degraded"}[d.Level]
		switch d.MayFail {
		case 0:
			d.Text = "No node may fail now: commits would stop."
		case 1:
			d.Text = "One more node may fail."
		default:
			d.Text = fmt.Sprintf("%d more nodes may fail.", d.MayFail)
		}
	}
	return d
}

// sentence joins what is and why.
func sentence(what, why string) string {
	if why == "" || strings.HasSuffix(what, why) {
		return what + "."
	}
	return what + ": " + strings.TrimSuffix(why, ".") + "."
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func are(n int) string {
	if n == 1 {
		return "1 is"
	}
	return fmt.Sprintf("%d are", n)
}
