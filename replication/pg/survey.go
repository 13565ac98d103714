package pg

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// Trouble is something in a database that will not do in a cluster, or that its operator should know of.
type Trouble struct {
	Check string // short, the same for all troubles of one kind
	Fatal bool   // the database cannot be a node's as it is
	What  string
	Fix   string // a command, or what to do
}

// maxTroubles bounds how many of one kind are listed; the rest is counted.
const maxTroubles = 20

// survey asks, for one kind of trouble, for rows of what there is and how to mend it.
type survey struct {
	check string
	fatal bool
	sql   string // in which {nodes} is how many nodes share a sequence
}

// userObject limits pg_class c and pg_namespace n to what belongs to users.
const userObject = `n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'quorate')`

var surveys = []survey{
	{"recovery", true, `SELECT 'the server is a standby: it cannot be written to', 'SELECT pg_promote();' WHERE pg_is_in_recovery()`},
	{"superuser", true, `SELECT format('role %I is no superuser', current_user), format('ALTER ROLE %I SUPERUSER;', current_user)
		FROM pg_roles WHERE rolname = current_user AND NOT rolsuper`},
	{"encoding", false, `SELECT format('the database has encoding %s: clients of other nodes may write characters that it does not have', pg_encoding_to_char(encoding)),
		'create a database with encoding UTF8 and restore a dump into it'
		FROM pg_database WHERE datname = current_database() AND pg_encoding_to_char(encoding) <> 'UTF8'`},
	{"checksums", false, `SELECT 'data checksums are off: damage on disk would go unnoticed, and into every clone', 'stop PostgreSQL and run pg_checksums --enable'
		WHERE NOT current_setting('data_checksums')::boolean`},
	{"prepared transactions", true, `SELECT format('transaction %L of database %I is prepared: nobody would finish it', gid, database), format('ROLLBACK PREPARED %L;', gid)
		FROM pg_prepared_xacts ORDER BY 1`},
	{"other schema quorate", true, `SELECT 'the schema quorate exists and is not Quorate''s', 'ALTER SCHEMA quorate RENAME TO quorate_old;'
		WHERE to_regnamespace('quorate') IS NOT NULL AND to_regclass('quorate.identity') IS NULL AND to_regclass('quorate.nudge') IS NULL`},
	{"replica identity", false, `SELECT format('table %s has no primary key: rows can be inserted, but neither updated nor deleted', c.oid::regclass),
		format('ALTER TABLE %s ADD PRIMARY KEY (…); -- or: REPLICA IDENTITY FULL', c.oid::regclass)
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND ` + userObject + ` AND CASE c.relreplident
			WHEN 'f' THEN false
			WHEN 'd' THEN NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary AND i.indimmediate)
			WHEN 'i' THEN NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident)
			ELSE true END
		ORDER BY 1`},
	{"unlogged tables", false, `SELECT format('table %s is unlogged: each node has rows of its own in it', c.oid::regclass), format('ALTER TABLE %s SET LOGGED;', c.oid::regclass)
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind = 'r' AND c.relpersistence = 'u' AND ` + userObject + ` ORDER BY 1`},
	{"large objects", false, `SELECT format('there are %s large objects: they cannot be changed through Quorate', count(*)), 'keep them in bytea columns, then: SELECT lo_unlink(oid) FROM pg_largeobject_metadata;'
		FROM pg_largeobject_metadata HAVING count(*) > 0`},
	{"sequences", true, `SELECT format('sequence %s has no room left: each of {nodes} nodes takes each {nodes}th value, and its next is near its end', p.seqrelid::regclass),
		CASE WHEN p.seqtypid = 'int8'::regtype THEN format('ALTER SEQUENCE %s NO MAXVALUE;', p.seqrelid::regclass)
			ELSE format('ALTER SEQUENCE %s AS bigint; -- and the type of the columns that use it', p.seqrelid::regclass) END
		FROM pg_sequence p JOIN pg_class c ON c.oid = p.seqrelid JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relpersistence <> 't' AND ` + userObject + ` AND (to_regclass('quorate.identity') IS NULL)
			AND CASE WHEN p.seqincrement > 0 THEN coalesce(pg_sequence_last_value(c.oid)::numeric, p.seqstart) + p.seqincrement * {nodes}::numeric > p.seqmax
				ELSE coalesce(pg_sequence_last_value(c.oid)::numeric, p.seqstart) + p.seqincrement * {nodes}::numeric < p.seqmin END
		ORDER BY 1`},
	{"cycling sequences", false, `SELECT format('sequence %s cycles: all nodes begin anew at the same value', p.seqrelid::regclass), format('ALTER SEQUENCE %s NO CYCLE;', p.seqrelid::regclass)
		FROM pg_sequence p JOIN pg_class c ON c.oid = p.seqrelid JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE p.seqcycle AND c.relpersistence <> 't' AND ` + userObject + ` ORDER BY 1`},
	{"triggers", false, `SELECT format('trigger %I on %s fires for replicated rows too, and so once on each node', g.tgname, g.tgrelid::regclass),
		format('ALTER TABLE %s ENABLE TRIGGER %I;', g.tgrelid::regclass, g.tgname)
		FROM pg_trigger g JOIN pg_class c ON c.oid = g.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE NOT g.tgisinternal AND g.tgenabled IN ('A', 'R') AND ` + userObject + ` ORDER BY 1`},
	{"rules", false, `SELECT format('rule %I on %s acts on replicated rows too, and so once on each node', w.rulename, w.ev_class::regclass),
		format('ALTER TABLE %s ENABLE RULE %I;', w.ev_class::regclass, w.rulename)
		FROM pg_rewrite w JOIN pg_class c ON c.oid = w.ev_class JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE w.ev_enabled IN ('A', 'R') AND ` + userObject + ` ORDER BY 1`},
	{"foreign tables", false, `SELECT format('table %s is a foreign table: what is written through it is written once, by one node, and is not part of the transaction', c.oid::regclass), 'nothing, if that is meant'
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'f' AND ` + userObject + ` ORDER BY 1`},
	{"subscriptions", true, `SELECT format('subscription %I writes past the gateway: what it brings would be on this node alone', subname), format('DROP SUBSCRIPTION %I;', subname)
		FROM pg_subscription WHERE subdbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND subenabled ORDER BY 1`},
	{"synchronous standbys", false, `SELECT format('synchronous_standby_names is %L: flushes wait for standbys, although a majority of nodes has the transaction', current_setting('synchronous_standby_names')),
		'ALTER SYSTEM SET synchronous_standby_names = ''''; SELECT pg_reload_conf();' WHERE current_setting('synchronous_standby_names') <> ''`},
	{"tablespaces", false, `SELECT format('there is a tablespace, %I: nodes cannot be cloned from this one', spcname), format('move what is in it to pg_default, then: DROP TABLESPACE %I;', spcname)
		FROM pg_tablespace WHERE spcname NOT IN ('pg_default', 'pg_global') ORDER BY 1`},
	{"other databases", false, `SELECT format('database %I is not replicated: one database is', datname), 'keep it elsewhere, or in a schema of the replicated one'
		FROM pg_database WHERE NOT datistemplate AND datname NOT IN (current_database(), 'postgres') ORDER BY 1`},
}

// Survey looks for what a database has that will not do in a cluster of up to maxNodes nodes. It changes nothing. conn may
// be anybody's who can read the catalogs.
func Survey(ctx context.Context, conn *pgconn.PgConn, maxNodes int) ([]Trouble, error) {
	var found []Trouble
	for _, s := range surveys {
		sql := strings.ReplaceAll(s.sql, "{nodes}", strconv.Itoa(maxNodes))
		results, err := conn.Exec(ctx, sql).ReadAll()
		if err != nil {
			return found, fmt.Errorf("survey of %s: %w", s.check, err)
		}
		rows := results[0].Rows
		for i, row := range rows {
			if i == maxTroubles {
				found = append(found, Trouble{Check: s.check, Fatal: s.fatal, What: fmt.Sprintf("… and %d more", len(rows)-i)})
				break
			}
			found = append(found, Trouble{Check: s.check, Fatal: s.fatal, What: string(row[0]), Fix: string(row[1])})
		}
	}
	return found, nil
}

// Checks lists what Survey looks for.
func Checks() []string {
	var names []string
	for _, s := range surveys {
		names = append(names, s.check)
	}
	return names
}
