package pg

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/txn"
)

//go:embed schema.sql
var schema string

// Slot and Publication are what capture streams from.
const (
	Slot        = "quorate"
	Publication = "quorate"
)

// Identity is who a node is, as its own PostgreSQL remembers it.
type Identity struct {
	Cluster  string
	Node     txn.NodeID
	Slot     int // residue of its sequences, 0 ≤ Slot < MaxNodes
	MaxNodes int // how many residues there are; fixed when the cluster is founded
	// Generation counts the starts of the node.
	Generation uint64
}

// Mark is by what a database is known again.
type Mark struct {
	SystemIdentifier string
	Generation       uint64  // of the last Install; 0: none
	Flushed          txn.LSN // how far its WAL is on disk
	// NextXID is above every transaction id whose transaction has ended.
	NextXID txn.XID
}

// ReadMark returns the database's.
func ReadMark(ctx context.Context, conn *pgconn.PgConn) (m Mark, err error) {
	var flushed, xid string
	if err := errors.Join(
		scan(ctx, conn, `SELECT system_identifier::text FROM pg_catalog.pg_control_system()`, &m.SystemIdentifier),
		scan(ctx, conn, `SELECT (pg_catalog.pg_current_wal_flush_lsn() OPERATOR(pg_catalog.-) '0/0')::text`, &flushed),
		scan(ctx, conn, `SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text`, &xid),
	); err != nil {
		return m, err
	}
	lsn, err := strconv.ParseUint(flushed, 10, 64)
	if err != nil {
		return m, fmt.Errorf("read where the WAL ends: %w", err)
	}
	m.Flushed = txn.LSN(lsn)
	next, err := strconv.ParseUint(xid, 10, 64)
	if err != nil {
		return m, fmt.Errorf("read the next transaction id: %w", err)
	}
	m.NextXID = txn.XID(next)
	var has string
	if err := scan(ctx, conn, `SELECT count(*)::text FROM pg_catalog.pg_attribute
		WHERE attrelid = to_regclass('quorate.identity') AND attname = 'generation' AND NOT attisdropped`, &has); err != nil || has == "0" {
		return m, err
	}
	var generation string
	if err := scan(ctx, conn, `SELECT coalesce((SELECT generation FROM quorate.identity), 0)::text`, &generation); err != nil {
		return m, err
	}
	if m.Generation, err = strconv.ParseUint(generation, 10, 64); err != nil {
		return m, fmt.Errorf("read the generation of the database: %w", err)
	}
	return m, nil
}

// ErrForeignData: the data directory belongs to another cluster or another node.
var ErrForeignData = errors.New("data directory belongs to another cluster or node")

// Install puts the node-local objects (schema quorate, event triggers, publication, replication slot) into the
// database, or brings them up to date. It is idempotent and never touches user data. conn must be a superuser's.
// An error wrapping ErrForeignData means that the database already has another identity; nothing was changed then.
// It returns the token by which capture knows the DDL messages of this node's own event triggers.
func Install(ctx context.Context, conn *pgconn.PgConn, id Identity) (token string, err error) {
	var installed string
	if err := scan(ctx, conn, `SELECT coalesce(to_regclass('quorate.identity')::text, '')`, &installed); err != nil {
		return "", err
	}
	if installed != "" {
		var found string
		if err := scan(ctx, conn, `SELECT coalesce((SELECT cluster || ' node ' || node FROM quorate.identity), '')`, &found); err != nil {
			return "", err
		}
		if want := fmt.Sprintf("%s node %d", id.Cluster, id.Node); found != "" && found != want {
			return "", fmt.Errorf("%w: it is %q, the configuration says %q", ErrForeignData, found, want)
		}
	}
	// The commit is flushed, whatever the settings say: with it everything that this start finds committed is on disk,
	// which is what the log may be truncated by.
	script := "BEGIN READ WRITE;\nSET LOCAL synchronous_commit = on;\nSET LOCAL session_replication_role = replica;\nSET LOCAL client_min_messages = warning;\n" + schema +
		fmt.Sprintf("\nINSERT INTO quorate.identity (cluster, node, slot, max_nodes) VALUES (%s, %d, %d, %d) ON CONFLICT DO NOTHING;\nUPDATE quorate.identity SET generation = %d;\nSELECT quorate.own_sequences();\nCOMMIT;",
			quoteLiteral(id.Cluster), id.Node, id.Slot, id.MaxNodes, id.Generation)
	if _, err := conn.Exec(ctx, script).ReadAll(); err != nil {
		return "", fmt.Errorf("install schema quorate: %w", err)
	}
	if err := ensureSlot(ctx, conn); err != nil {
		return "", err
	}
	if err := scan(ctx, conn, `SELECT token::text FROM quorate.identity`, &token); err != nil {
		return "", err
	}
	return token, nil
}

// ensureSlot makes the replication slot, also where there was one that somebody has dropped, or that the server has
// invalidated. Nothing in flight needs the old one: open transactions have ended with the sessions (Settle), and what is
// decided is in the log. Only commits past the gateway that it had not streamed yet are not noticed any more.
func ensureSlot(ctx context.Context, conn *pgconn.PgConn) error {
	var status string
	if err := scan(ctx, conn, `SELECT coalesce((SELECT coalesce(wal_status, '') FROM pg_replication_slots WHERE slot_name = '`+Slot+`'), 'none')`, &status); err != nil {
		return err
	}
	if status == "lost" {
		if _, err := conn.Exec(ctx, `SELECT pg_drop_replication_slot('`+Slot+`')`).ReadAll(); err != nil {
			return fmt.Errorf("drop invalidated replication slot %s: %w", Slot, err)
		}
		status = "none"
	}
	if status == "none" {
		if _, err := conn.Exec(ctx, `SELECT pg_create_logical_replication_slot('`+Slot+`', 'pgoutput')`).ReadAll(); err != nil {
			return fmt.Errorf("create replication slot %s: %w", Slot, err)
		}
	}
	return nil
}

// Settle ends every other client backend of the database and waits until it is gone: what an earlier incarnation of
// the sidecar left open must not hold locks, nor commit, beside this one.
func Settle(ctx context.Context, conn *pgconn.PgConn) error {
	for {
		var left string
		if err := scan(ctx, conn, `SELECT count(pg_terminate_backend(pid, 1000))::text FROM pg_stat_activity
			WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND datname = current_database()`, &left); err != nil {
			return fmt.Errorf("end leftover sessions: %w", err)
		}
		if left == "0" {
			return nil
		}
	}
}

// scan runs a query that yields one text value.
func scan(ctx context.Context, conn *pgconn.PgConn, sql string, to *string) error {
	results, err := conn.Exec(ctx, sql).ReadAll()
	if err != nil {
		return fmt.Errorf("query %q: %w", sql, err)
	}
	if len(results) != 1 || len(results[0].Rows) != 1 || len(results[0].Rows[0]) != 1 {
		return fmt.Errorf("query %q: not one value", sql)
	}
	*to = string(results[0].Rows[0][0])
	return nil
}

func quoteLiteral(s string) string {
	s = strings.ReplaceAll(s, "'", "''")
	if strings.Contains(s, `\`) {
		return ` E'` + strings.ReplaceAll(s, `\`, `\\`) + `'`
	}
	return "'" + s + "'"
}
