package node

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/events"
	"github.com/quorate/quorate/gateway"
	"github.com/quorate/quorate/internal/logkey"
	pb "github.com/quorate/quorate/proto/quorate/v1"
)

// row is one of a view of schema quorate, by column; see replication/pg/schema.sql.
type row map[string]any

// sqlRows bounds a view that is a list.
const sqlRows = 200

// sqlTimeout bounds how long a statement waits for what the other members and the catalog have to say.
const sqlTimeout = 3 * time.Second

// sqlView returns the content of a view.
func (n *Node) sqlView(ctx context.Context, name string) gateway.Rows {
	ctx, cancel := context.WithTimeout(ctx, sqlTimeout)
	defer cancel()
	rows, secret, silent, err := n.sqlRows(ctx, name)
	var missing []string
	for _, u := range silent {
		missing = append(missing, fmt.Sprintf("node %d does not answer: %s", u.Node, u.Reason))
	}
	if err != nil {
		missing = append(missing, status.Convert(err).Message())
	}
	full := n.encodeRows(rows)
	if secret == "" {
		return gateway.Rows{Full: full, Public: full, Missing: missing}
	}
	for _, r := range rows {
		r[secret] = nil
	}
	return gateway.Rows{Full: full, Public: n.encodeRows(rows), Missing: missing}
}

func (n *Node) encodeRows(rows []row) string {
	if rows == nil {
		rows = []row{} // no rows, but known
	}
	now := time.Now()
	for _, r := range rows {
		r["refreshed_at"] = now
	}
	text, err := json.Marshal(rows)
	if err != nil {
		n.log.Error("encode the rows of a view", logkey.Error, err) // a number that JSON has no form for
		return "[]"
	}
	return string(text)
}

// sqlRows returns the rows of a view, the column, if there is one, that is not for everybody, and whose rows are missing.
func (n *Node) sqlRows(ctx context.Context, name string) (rows []row, secret string, silent []*pb.Unreachable, err error) {
	switch name {
	case "nodes":
		return nodeRows(n.View()), "", nil, nil
	case "heartbeats":
		return heartbeatRows(n.View()), "", nil, nil
	case "status":
		return statusRows(n.View()), "", nil, nil
	case "transactions":
		r, err := n.observe.Transactions(ctx, &pb.TransactionsRequest{Limit: sqlRows})
		for _, t := range r.GetTransactions() {
			rows = append(rows, row{
				"gid": t.Gid, "node": t.Node, "stage": t.Stage, "age_seconds": t.AgeSeconds, "csn": known(t.Csn), "pid": known(uint64(t.Pid)),
			})
		}
		return rows[:min(len(rows), sqlRows)], "", r.GetUnreachable(), err
	case "conflicts":
		r, err := n.observe.Conflicts(ctx, &pb.ConflictsRequest{Limit: sqlRows})
		for _, c := range r.GetConflicts() {
			rows = append(rows, row{
				"at": time.UnixMilli(c.TimeMs), "kind": c.Kind, "gid": named(c.Gid), "node": c.Node, "winner_csn": c.WinnerCsn, "winner_gid": named(c.WinnerGid),
				"winner_node": known(uint64(c.WinnerNode)), "table": named(c.Table), "key": named(c.Key), "mode": named(c.Mode),
			})
		}
		return rows, "key", r.GetUnreachable(), err // it has values of rows, which not everybody may be allowed to read
	case "events":
		r, err := n.observe.Events(ctx, &pb.EventsRequest{Limit: sqlRows})
		for _, e := range r.GetEvents() {
			rows = append(rows, row{
				"at": time.UnixMilli(e.TimeMs), "node": e.Node, "number": e.Number, "severity": events.Severity(e.Severity).String(), "kind": e.Kind,
				"about": e.About, "text": e.Text, "fields": e.Fields,
			})
		}
		return rows, "", r.GetUnreachable(), err
	}
	return nil, "", nil, nil
}

func nodeRows(v *pb.View) (rows []row) {
	for _, m := range v.Nodes {
		r := row{"node": m.Id, "heard": m.Heard, "report_age_seconds": m.ReportAgeSeconds, "gateway": m.GatewayAddress, "grpc": m.GrpcAddress, "http": m.HttpAddress}
		if h := m.Health; h != nil {
			for name, value := range map[string]any{
				"state": h.State, "role": named(h.Role), "accepts_writes": h.AcceptsWrites, "reason": named(h.Reason), "lag": m.Lag, "applied_csn": h.AppliedCsn,
				"queue_transactions": h.QueueTransactions, "commits_per_second": h.CommitsPerSecond, "aborts_per_second": h.AbortsPerSecond,
				"sessions": h.Sessions, "postgres_up": h.PostgresUp, "postgres_version": named(h.PostgresVersion), "connections": h.Connections,
				"max_connections": h.MaxConnections, "oldest_transaction_seconds": h.OldestTransactionSeconds, "wal_kept_bytes": h.WalKeptBytes, "slot_lag_bytes": h.SlotLagBytes,
				"version": h.Version, "uptime_seconds": h.UptimeSeconds, "disk_free_bytes": h.DiskFreeBytes, "disk_total_bytes": h.DiskTotalBytes,
			} {
				r[name] = value
			}
		}
		rows = append(rows, r)
	}
	return rows
}

func heartbeatRows(v *pb.View) (rows []row) {
	for _, m := range v.Nodes {
		for _, h := range m.Hears {
			rows = append(rows, row{
				"hearer": m.Id, "heard": h.Node, "age_seconds": h.AgeSeconds, "round_trip_seconds": h.RoundTripSeconds, "loss": h.Loss, "jitter_seconds": h.JitterSeconds,
			})
		}
	}
	return rows
}

func statusRows(v *pb.View) []row {
	r := row{
		"cluster": v.Cluster, "node": v.Node, "quorum": v.Quorum, "leader": known(uint64(v.Leader)), "term": v.Term, "csn": v.Csn,
		"voters": v.Voters, "voters_heard": v.VotersHeard,
	}
	for _, m := range v.Nodes {
		if m.Id == v.Node && m.Health != nil {
			r["state"], r["accepts_writes"], r["applied_csn"], r["lag"] = m.Health.State, m.Health.AcceptsWrites, m.Health.AppliedCsn, m.Lag
		}
	}
	return []row{r}
}

// known and named make NULL of what is not known.
func known(n uint64) any {
	if n == 0 {
		return nil
	}
	return n
}

func named(s string) any {
	if s == "" {
		return nil
	}
	return s
}
