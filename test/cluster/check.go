package cluster

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// fenceTable holds one row for each time that Settle passed through a node.
const fenceTable = "public.cluster_fence"

// IsConflict reports whether an error is a serialization failure or a deadlock: run the transaction again.
func IsConflict(err error) bool { state := SQLState(err); return state == "40001" || state == "40P01" }

// SQLState returns the SQLSTATE of an error that a server sent, "" for any other.
func SQLState(err error) string {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.Code
	}
	return ""
}

// Settle returns when every node shows everything that was acknowledged on any node before the call. It commits
// one row on each node and waits until all nodes show all of them: nodes make transactions visible in one order,
// so whatever was committed before such a row is visible where the row is.
func (c *Cluster) Settle(ctx context.Context) error {
	if err := c.ensureFenceTable(ctx); err != nil {
		return fmt.Errorf("settle: %w", err)
	}
	var fences []string
	for i := 1; i <= c.Nodes; i++ {
		fence := fmt.Sprintf("%d-%s", i, rand.Text())
		if err := c.fence(ctx, i, fence); err != nil {
			return fmt.Errorf("settle: %w", err)
		}
		fences = append(fences, fence)
	}
	for i := 1; i <= c.Nodes; i++ {
		if err := c.await(ctx, i, fences); err != nil {
			return fmt.Errorf("settle: %w", err)
		}
	}
	return nil
}

// ensureFenceTable makes the table, once for each cluster, and waits until all nodes have it.
func (c *Cluster) ensureFenceTable(ctx context.Context) error {
	c.fenceMu.Lock()
	defer c.fenceMu.Unlock()
	if c.fenceMade {
		return nil
	}
	conn, err := c.Connect(ctx, 1)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if _, err := conn.Exec(ctx, "CREATE TABLE IF NOT EXISTS "+fenceTable+" (id text PRIMARY KEY)"); err != nil {
		return fmt.Errorf("create fence table: %w", err)
	}
	for i := 1; i <= c.Nodes; i++ {
		if err := c.awaitFenceTable(ctx, i); err != nil {
			return err
		}
	}
	c.fenceMade = true
	return nil
}

func (c *Cluster) awaitFenceTable(ctx context.Context, i int) error {
	conn, err := c.Direct(ctx, i)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	return poll(ctx, func() error {
		var there bool
		err := conn.QueryRow(ctx, "SELECT to_regclass('"+fenceTable+"') IS NOT NULL").Scan(&there)
		if err == nil && !there {
			err = fmt.Errorf("await fence table on node %d: it is not there", i)
		}
		return err
	})
}

func (c *Cluster) fence(ctx context.Context, i int, fence string) error {
	conn, err := c.Connect(ctx, i)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	for {
		_, err := conn.Exec(ctx, "INSERT INTO "+fenceTable+" VALUES ($1)", fence)
		if err == nil {
			return nil
		}
		if !IsConflict(err) || ctx.Err() != nil {
			return fmt.Errorf("write fence on node %d: %w", i, err)
		}
	}
}

func (c *Cluster) await(ctx context.Context, i int, fences []string) error {
	conn, err := c.Direct(ctx, i)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	return poll(ctx, func() error {
		var n int
		err := conn.QueryRow(ctx, "SELECT count(*) FROM "+fenceTable+" WHERE id = ANY ($1)", fences).Scan(&n)
		if err != nil {
			return fmt.Errorf("await fences on node %d: %w", i, err)
		}
		if n < len(fences) {
			return fmt.Errorf("await fences on node %d: it shows %d of %d", i, n, len(fences))
		}
		return nil
	})
}

// TableDigest is the content of one table, as far as two nodes must agree on it.
type TableDigest struct {
	Rows int64
	Hash string // of all rows, in any order
}

// Digest is what must be equal on all nodes: the definitions of all objects of users, and the rows of all their
// logged tables. Unlogged and temporary tables, and values of sequences, are a node's own.
type Digest struct {
	Schema []string // one line for each object, sorted
	Tables map[string]TableDigest
}

// userSchema is true of the schemas whose objects belong to users.
const userSchema = `n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'quorate')`

// schemaQuery describes objects by names and definitions, never by ids, which differ between nodes.
const schemaQuery = `
SELECT format('schema %I', n.nspname) FROM pg_namespace n WHERE ` + userSchema + `
UNION ALL SELECT format('relation %I.%I kind %s persistence %s options %s', n.nspname, c.relname, c.relkind, c.relpersistence, c.reloptions)
	FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE ` + userSchema + `
UNION ALL SELECT format('column %I.%I.%I %s %s not null %s default %s identity %s', n.nspname, c.relname, a.attname,
		row_number() OVER (PARTITION BY c.oid ORDER BY a.attnum), format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid), a.attidentity)
	FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
	LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
	WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p', 'v', 'm', 'c') AND ` + userSchema + `
UNION ALL SELECT format('index %s valid %s', pg_get_indexdef(i.indexrelid), i.indisvalid)
	FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE ` + userSchema + `
UNION ALL SELECT format('constraint %I.%I on %s: %s', n.nspname, k.conname, k.conrelid::regclass, pg_get_constraintdef(k.oid))
	FROM pg_constraint k JOIN pg_namespace n ON n.oid = k.connamespace WHERE ` + userSchema + `
UNION ALL SELECT format('function %s', pg_get_functiondef(p.oid))
	FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE p.prokind IN ('f', 'p') AND ` + userSchema + `
UNION ALL SELECT format('view %I.%I %s', n.nspname, c.relname, pg_get_viewdef(c.oid))
	FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('v', 'm') AND ` + userSchema + `
UNION ALL SELECT format('type %I.%I kind %s labels %s', n.nspname, t.typname, t.typtype,
		(SELECT string_agg(e.enumlabel, ',' ORDER BY e.enumsortorder) FROM pg_enum e WHERE e.enumtypid = t.oid))
	FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE t.typtype <> 'c' AND t.typelem = 0 AND ` + userSchema + `
UNION ALL SELECT format('trigger %s enabled %s', pg_get_triggerdef(g.oid), g.tgenabled)
	FROM pg_trigger g JOIN pg_class c ON c.oid = g.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
	WHERE NOT g.tgisinternal AND ` + userSchema + `
ORDER BY 1`

// Digest reads the digest of one node from one snapshot of its PostgreSQL.
func (c *Cluster) Digest(ctx context.Context, i int) (Digest, error) {
	conn, err := c.Direct(ctx, i)
	if err != nil {
		return Digest{}, err
	}
	defer closeConn(conn)
	d := Digest{Tables: map[string]TableDigest{}}
	read := func(tx pgx.Tx) error {
		// A regclass is printed without its schema when the search path has it: leave it nothing.
		if _, err := tx.Exec(ctx, "SET LOCAL search_path = pg_catalog"); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, schemaQuery)
		if err != nil {
			return err
		}
		if d.Schema, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			return err
		}
		if c.options.PGBins != nil { // PostgreSQL 17 has these as properties of columns only, which are compared too
			d.Schema = slices.DeleteFunc(d.Schema, func(line string) bool {
				return strings.HasPrefix(line, "constraint ") && strings.Contains(line, ": NOT NULL ")
			})
		}
		rows, err = tx.Query(ctx, `SELECT format('%I.%I', n.nspname, c.relname)
			FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
			WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND `+userSchema)
		if err != nil {
			return err
		}
		tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		for _, table := range tables {
			var t TableDigest
			// A sum does not depend on the order of rows, and sorting them would take most of the time.
			err := tx.QueryRow(ctx, `SELECT count(*), coalesce(sum(hashtextextended(row, 0)::numeric), 0)::text || ' ' ||
				coalesce(sum(hashtextextended(row, 1)::numeric), 0)
				FROM (SELECT (t.*)::text AS row FROM ONLY `+table+` t) AS rows`).Scan(&t.Rows, &t.Hash)
			if err != nil {
				return fmt.Errorf("table %s: %w", table, err)
			}
			d.Tables[table] = t
		}
		return nil
	}
	options := pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}
	if err := pgx.BeginTxFunc(ctx, conn, options, read); err != nil {
		return Digest{}, fmt.Errorf("digest of node %d: %w", i, err)
	}
	return d, nil
}

// CheckEqual compares all nodes with node 1. Call Settle first, with no writer left. The error names every
// object that differs, and some of the rows.
func (c *Cluster) CheckEqual(ctx context.Context) error {
	first, err := c.Digest(ctx, 1)
	if err != nil {
		return err
	}
	var differences []error
	for i := 2; i <= c.Nodes; i++ {
		other, err := c.Digest(ctx, i)
		if err != nil {
			return err
		}
		for _, line := range missing(first.Schema, other.Schema) {
			differences = append(differences, fmt.Errorf("only node 1, not node %d, has %s", i, line))
		}
		for _, line := range missing(other.Schema, first.Schema) {
			differences = append(differences, fmt.Errorf("only node %d, not node 1, has %s", i, line))
		}
		for table, want := range first.Tables {
			if got, ok := other.Tables[table]; ok && got != want {
				rows, err := c.sampleDifference(ctx, table, i)
				differences = append(differences, err,
					fmt.Errorf("table %s: %d rows on node 1, %d on node %d; %s", table, want.Rows, got.Rows, i, rows))
			}
		}
	}
	if err := errors.Join(differences...); err != nil {
		return fmt.Errorf("nodes differ: %w", err)
	}
	return nil
}

// missing returns what is in a and not in b.
func missing(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) })
}

// sampleDifference shows a few rows of a table that only node 1 or only node i has.
func (c *Cluster) sampleDifference(ctx context.Context, table string, i int) (string, error) {
	const maxRows, sample = 50_000, 5
	read := func(node int) ([]string, error) {
		conn, err := c.Direct(ctx, node)
		if err != nil {
			return nil, err
		}
		defer closeConn(conn)
		rows, err := conn.Query(ctx, fmt.Sprintf(`SELECT (t.*)::text FROM ONLY %s t ORDER BY (t.*)::text COLLATE "C" LIMIT %d`, table, maxRows))
		if err != nil {
			return nil, err
		}
		return pgx.CollectRows(rows, pgx.RowTo[string])
	}
	a, err1 := read(1)
	b, err2 := read(i)
	if err := errors.Join(err1, err2); err != nil {
		return "", fmt.Errorf("compare table %s: %w", table, err)
	}
	inB, inA := map[string]int{}, map[string]int{}
	for _, row := range a {
		inA[row]++
	}
	for _, row := range b {
		inB[row]++
	}
	var lines []string
	for row, n := range inA {
		if inB[row] < n && len(lines) < sample {
			lines = append(lines, fmt.Sprintf("node 1 has %s %d times, node %d %d times", row, n, i, inB[row]))
		}
	}
	for row, n := range inB {
		if inA[row] < n && len(lines) < 2*sample {
			lines = append(lines, fmt.Sprintf("node %d has %s %d times, node 1 %d times", i, row, n, inA[row]))
		}
	}
	return strings.Join(lines, "; "), nil
}

// CheckLeftovers returns an error while a node holds a prepared transaction, a session that sits in a transaction or in a statement, or a
// replication slot that is not capture's, although nobody works any more. What is about to end is waited for.
func (c *Cluster) CheckLeftovers(ctx context.Context) error {
	var errs []error
	for i := 1; i <= c.Nodes; i++ {
		errs = append(errs, c.checkLeftovers(ctx, i))
	}
	return errors.Join(errs...)
}

func (c *Cluster) checkLeftovers(ctx context.Context, i int) error {
	conn, err := c.Direct(ctx, i)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	return poll(ctx, func() error {
		rows, err := conn.Query(ctx, `
			SELECT format('prepared transaction %s', gid) FROM pg_prepared_xacts
			UNION ALL SELECT format('session %s (%s) is %s since %s, last query: %s', pid, application_name, state, state_change, query)
			FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'
				OR state <> 'idle' AND backend_type = 'client backend' AND state_change < clock_timestamp() - interval '1 second' AND pid <> pg_backend_pid()
			UNION ALL SELECT format('replication slot %s, of %s, invalidated: %s', slot_name, active_pid, invalidation_reason)
			FROM pg_replication_slots WHERE slot_name <> 'quorate' OR invalidation_reason IS NOT NULL
			UNION ALL SELECT 'no replication slot for capture' WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = 'quorate' AND active)`)
		if err != nil {
			return fmt.Errorf("leftovers of node %d: %w", i, err)
		}
		left, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return fmt.Errorf("leftovers of node %d: %w", i, err)
		}
		if len(left) > 0 {
			return fmt.Errorf("leftovers of node %d: %s", i, strings.Join(left, "; "))
		}
		return nil
	})
}

// Activity tells what the sessions of every node are doing, and whom they wait for: for the log of a test that failed.
func (c *Cluster) Activity(ctx context.Context) string {
	var b strings.Builder
	for i := 1; i <= c.Nodes; i++ {
		fmt.Fprintf(&b, "---- sessions of node %d\n", i)
		conn, err := c.Direct(ctx, i)
		if err != nil {
			fmt.Fprintln(&b, err)
			continue
		}
		rows, err := conn.Query(ctx, `
			SELECT format('%s %s %s for %s, waits for %s/%s, behind %s: %s', pid, application_name, state, clock_timestamp() - state_change,
				wait_event_type, wait_event, pg_blocking_pids(pid), left(query, 200))
			FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND state <> 'idle' AND backend_type = 'client backend' ORDER BY pid`)
		if err == nil {
			var lines []string
			lines, err = pgx.CollectRows(rows, pgx.RowTo[string])
			b.WriteString(strings.Join(lines, "\n") + "\n")
		}
		if err != nil {
			fmt.Fprintln(&b, err)
		}
		closeConn(conn)
	}
	return b.String()
}

// Verify is what must hold after every workload: all nodes settle, are equal and hold nothing back.
func (c *Cluster) Verify(ctx context.Context) error {
	if err := c.Settle(ctx); err != nil {
		return err
	}
	return errors.Join(c.CheckEqual(ctx), c.CheckLeftovers(ctx))
}
