package main

import (
	"cmp"
	"time"

	pb "github.com/quorate/quorate/proto/quorate/v1"
)

// The JSON forms of what a node sees. Scripts read them: fields may be added, never renamed or removed. null is what is
// not known.

type healthForm struct {
	State                    string  `json:"state"`
	Reason                   string  `json:"reason"`
	AcceptsWrites            bool    `json:"accepts_writes"`
	Quorum                   bool    `json:"quorum"`
	Role                     string  `json:"role"`
	Leader                   uint32  `json:"leader"`
	Term                     uint64  `json:"term"`
	CommitIndex              uint64  `json:"commit_index"`
	AppliedIndex             uint64  `json:"applied_index"`
	CSN                      uint64  `json:"csn"`
	AppliedCSN               *uint64 `json:"applied_csn"`
	QueueTransactions        uint64  `json:"queue_transactions"`
	QueueSeconds             float64 `json:"queue_seconds"`
	CommitsPerSecond         float64 `json:"commits_per_second"`
	AbortsPerSecond          float64 `json:"aborts_per_second"`
	Sessions                 uint32  `json:"sessions"`
	PostgresUp               *bool   `json:"postgres_up"`
	PostgresVersion          string  `json:"postgres_version"`
	Connections              uint32  `json:"connections"`
	MaxConnections           uint32  `json:"max_connections"`
	OldestTransactionSeconds float64 `json:"oldest_transaction_seconds"`
	WALKeptBytes             uint64  `json:"wal_kept_bytes"`
	SlotLagBytes             uint64  `json:"slot_lag_bytes"`
	Version                  string  `json:"version"`
	UptimeSeconds            float64 `json:"uptime_seconds"`
	DiskFreeBytes            uint64  `json:"disk_free_bytes"`
	DiskTotalBytes           uint64  `json:"disk_total_bytes"`
}

func newHealthForm(h *pb.Health) *healthForm {
	if h == nil {
		return nil
	}
	return &healthForm{
		h.State, h.Reason, h.AcceptsWrites, h.Quorum, cmp.Or(h.Role, "unknown"), h.Leader, h.Term, h.CommitIndex, h.AppliedIndex, h.Csn, h.AppliedCsn,
		h.QueueTransactions, h.QueueSeconds, h.CommitsPerSecond, h.AbortsPerSecond, h.Sessions, h.PostgresUp, h.PostgresVersion,
		h.Connections, h.MaxConnections, h.OldestTransactionSeconds, h.WalKeptBytes, h.SlotLagBytes, h.Version, h.UptimeSeconds, h.DiskFreeBytes, h.DiskTotalBytes,
	}
}

type viewForm struct {
	Time                     time.Time  `json:"time"`
	Cluster                  string     `json:"cluster"`
	Node                     uint32     `json:"node"` // who answered
	Quorum                   bool       `json:"quorum"`
	Leader                   uint32     `json:"leader"` // 0: none known
	Term                     uint64     `json:"term"`
	CSN                      uint64     `json:"csn"`
	Voters                   uint32     `json:"voters"`
	VotersHeard              uint32     `json:"voters_heard"`
	HeartbeatTimeoutSeconds  float64    `json:"heartbeat_timeout_seconds"`
	HeartbeatIntervalSeconds float64    `json:"heartbeat_interval_seconds"`
	Nodes                    []nodeForm `json:"nodes"`
}

type nodeForm struct {
	ID               uint32      `json:"id"`
	Heard            bool        `json:"heard"`
	Voter            bool        `json:"voter"`
	Lag              *uint64     `json:"lag"`
	ReportAgeSeconds *float64    `json:"report_age_seconds"`
	Health           *healthForm `json:"health"`
	Hears            []heardForm `json:"hears"`
	Addresses        addresses   `json:"addresses"`
}

type heardForm struct {
	Node             uint32   `json:"node"`
	AgeSeconds       *float64 `json:"age_seconds"`
	RoundTripSeconds *float64 `json:"round_trip_seconds"`
	Loss             float64  `json:"loss"`
	JitterSeconds    float64  `json:"jitter_seconds"`
}

func newHeardForms(all []*pb.Heard) []heardForm {
	forms := []heardForm{}
	for _, h := range all {
		forms = append(forms, heardForm{h.Node, h.AgeSeconds, h.RoundTripSeconds, h.Loss, h.JitterSeconds})
	}
	return forms
}

func newViewForm(v *pb.View) viewForm {
	f := viewForm{
		Time: time.UnixMilli(v.TimeMs).UTC(), Cluster: v.Cluster, Node: v.Node, Quorum: v.Quorum, Leader: v.Leader, Term: v.Term, CSN: v.Csn,
		Voters: v.Voters, VotersHeard: v.VotersHeard, Nodes: []nodeForm{},
		HeartbeatTimeoutSeconds: v.HeartbeatTimeoutSeconds, HeartbeatIntervalSeconds: v.HeartbeatIntervalSeconds,
	}
	for _, n := range v.Nodes {
		f.Nodes = append(f.Nodes, nodeForm{
			ID: n.Id, Heard: n.Heard, Voter: n.Voter, Lag: n.Lag, ReportAgeSeconds: n.ReportAgeSeconds,
			Health: newHealthForm(n.Health), Hears: newHeardForms(n.Hears),
			Addresses: addresses{n.GatewayAddress, n.GrpcAddress, n.HttpAddress, n.RaftAddress},
		})
	}
	return f
}

type silentForm struct {
	Node   uint32 `json:"node"`
	Reason string `json:"reason"`
}

func newSilentForms(all []*pb.Unreachable) []silentForm {
	forms := []silentForm{}
	for _, u := range all {
		forms = append(forms, silentForm{u.Node, u.Reason})
	}
	return forms
}

type eventsForm struct {
	Events      []eventForm  `json:"events"`
	Unreachable []silentForm `json:"unreachable"`
}

type eventForm struct {
	Time     time.Time         `json:"time"`
	Node     uint32            `json:"node"`
	Number   uint64            `json:"number"`
	Severity string            `json:"severity"`
	Kind     string            `json:"kind"`
	About    uint32            `json:"about"`
	Text     string            `json:"text"`
	Fields   map[string]string `json:"fields"`
}

func newEventForm(e *pb.Event) eventForm {
	fields := e.Fields
	if fields == nil {
		fields = map[string]string{}
	}
	return eventForm{time.UnixMilli(e.TimeMs).UTC(), e.Node, e.Number, severities[e.Severity], e.Kind, e.About, e.Text, fields}
}

var severities = map[pb.Severity]string{pb.Severity_SEVERITY_INFO: "info", pb.Severity_SEVERITY_WARNING: "warning", pb.Severity_SEVERITY_ERROR: "error"}

type conflictsForm struct {
	Conflicts   []conflictForm `json:"conflicts"`
	Unreachable []silentForm   `json:"unreachable"`
}

type conflictForm struct {
	Time       time.Time `json:"time"`
	Kind       string    `json:"kind"`
	GID        string    `json:"gid"`
	Node       uint32    `json:"node"`
	WinnerCSN  uint64    `json:"winner_csn"`
	WinnerGID  string    `json:"winner_gid"`
	WinnerNode uint32    `json:"winner_node"`
	Table      string    `json:"table"`
	Key        string    `json:"key"`
	Mode       string    `json:"mode"`
}

func newConflictForm(c *pb.Conflict) conflictForm {
	return conflictForm{time.UnixMilli(c.TimeMs).UTC(), c.Kind, c.Gid, c.Node, c.WinnerCsn, c.WinnerGid, c.WinnerNode, c.Table, c.Key, c.Mode}
}

type transactionsForm struct {
	Transactions []transactionForm `json:"transactions"`
	Unreachable  []silentForm      `json:"unreachable"`
}

type transactionForm struct {
	GID        string  `json:"gid"`
	Node       uint32  `json:"node"`
	Stage      string  `json:"stage"`
	AgeSeconds float64 `json:"age_seconds"`
	CSN        uint64  `json:"csn"` // 0: not decided
	PID        uint32  `json:"pid"` // 0: not at its origin
}

func newTransactionForm(t *pb.TransactionInFlight) transactionForm {
	return transactionForm{t.Gid, t.Node, t.Stage, t.AgeSeconds, t.Csn, t.Pid}
}

type lookupForm struct {
	GID      string           `json:"gid"`
	Status   string           `json:"status"`
	InFlight *transactionForm `json:"in_flight"`
	Conflict *conflictForm    `json:"conflict"`
}
