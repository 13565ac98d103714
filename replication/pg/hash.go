package pg

import (
	"context"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5/pgconn"
)

// TableHash is the content of one table: equal rows, in whatever order, have an equal hash.
type TableHash struct {
	Name string // with its schema, quoted where needed
	Rows uint64
	Hash string
}

// hashSettings make values look alike on all nodes.
const hashSettings = `SET search_path = pg_catalog; SET datestyle = 'ISO, MDY'; SET intervalstyle = postgres; SET timezone = 'UTC';
	SET extra_float_digits = 1; SET bytea_output = hex; SET lc_monetary = 'C'; SET xmlbinary = base64; SET row_security = off;
	SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0; SET transaction_timeout = 0`

// replicatedTables are those whose rows are in the log: what has rows, is logged, and belongs to users.
const replicatedTables = `SELECT format('%I.%I', n.nspname, c.relname)
	FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
	WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'quorate')
	ORDER BY 1`

// The sum of the rows' hashes does not depend on their order, and needs no sorting. t alone would be a column of that name,
// if there is one; t.* is always the whole row.
const tableHash = `SELECT count(*), md5(concat(sum(('x' || left(h, 16))::bit(64)::bigint), ':', sum(('x' || right(h, 16))::bit(64)::bigint)))
	FROM (SELECT md5((t.*)::text) AS h FROM ONLY %s AS t) AS hashes`

// BeginHash opens a transaction on a connection, which should be used for nothing else afterwards. It has no snapshot yet.
func BeginHash(ctx context.Context, conn *pgconn.PgConn) error {
	if _, err := conn.Exec(ctx, hashSettings+"; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").ReadAll(); err != nil {
		return fmt.Errorf("begin hashing: %w", err)
	}
	return nil
}

// TakeSnapshot fixes what the transaction of BeginHash sees.
func TakeSnapshot(ctx context.Context, conn *pgconn.PgConn) error {
	if _, err := conn.Exec(ctx, "SELECT").ReadAll(); err != nil {
		return fmt.Errorf("take a snapshot: %w", err)
	}
	return nil
}

// HashTables hashes all replicated tables as of the snapshot.
func HashTables(ctx context.Context, conn *pgconn.PgConn) ([]TableHash, error) {
	names := conn.ExecParams(ctx, replicatedTables, nil, nil, nil, nil).Read()
	if names.Err != nil {
		return nil, fmt.Errorf("list tables: %w", names.Err)
	}
	var tables []TableHash
	for _, row := range names.Rows {
		t := TableHash{Name: string(row[0])}
		got := conn.ExecParams(ctx, fmt.Sprintf(tableHash, t.Name), nil, nil, nil, nil).Read()
		if got.Err != nil {
			return nil, fmt.Errorf("hash table %s: %w", t.Name, got.Err)
		}
		var err error
		if t.Rows, err = strconv.ParseUint(string(got.Rows[0][0]), 10, 64); err != nil {
			return nil, fmt.Errorf("hash table %s: %w", t.Name, err)
		}
		t.Hash = string(got.Rows[0][1])
		tables = append(tables, t)
	}
	return tables, nil
}
