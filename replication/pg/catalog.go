package pg

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// Class says how values of a type are compared: within one class, equal text (after the class's normalisation) means
// an equal key, and unequal text an unequal one.
type Class uint8

// The classes. ClassOpaque is for every type whose equality cannot be decided from its text outside the server.
const (
	ClassOpaque  Class = iota
	ClassText          // text, varchar, name under a deterministic collation: the bytes
	ClassNumber        // the integers and numeric: trailing zeros of the fraction dropped
	ClassBlank         // char(n): trailing blanks dropped
	ClassExact         // types with one output form for each value: boolean, uuid, date, time, timestamp, timestamptz, bytea
	ClassEnum          // an enum: its label
	classUnknown       // first invalid
)

// Relation is what the catalog says of a table, as far as certification needs it.
type Relation struct {
	OID    uint32 `json:"oid"`
	Schema string `json:"schema"`
	Name   string `json:"name"`
	// RootSchema and RootName name the topmost partitioned table that this one is a partition of, or itself.
	RootSchema string `json:"root_schema"`
	RootName   string `json:"root_name"`
	// Permanent is false for temporary and unlogged tables, of which logical decoding sees nothing.
	Permanent bool `json:"permanent"`
	// Identity is the replica identity: of an index its columns; with REPLICA IDENTITY FULL the columns of the primary
	// key, if it has one that is checked at once (the old row is then in the stream as a whole). Empty: rows cannot be
	// told apart by key.
	Identity []IndexColumn `json:"identity"`
	// Uniques are the unique indexes and exclusion constraints other than the identity's.
	Uniques []Unique `json:"uniques"`
	// References are its foreign keys.
	References []Reference `json:"references"`
	// Referenced is set when a foreign key of any table refers to it or to a table that it is a partition of.
	Referenced bool `json:"referenced"`
	// ReferencedElsewhere is set when one of these refers to other columns than those of Identity, whose old values
	// the stream does not hold.
	ReferencedElsewhere bool `json:"referenced_elsewhere"`
}

// IndexColumn is one key column of an index.
type IndexColumn struct {
	Name  string `json:"name"`
	Class Class  `json:"class"`
}

// Unique is one unique index or exclusion constraint.
type Unique struct {
	Name    string        `json:"name"`
	Columns []IndexColumn `json:"columns"`
	// Plain is false where equality of the columns' values is not what the index forbids: partial and expression
	// indexes, exclusion constraints, WITHOUT OVERLAPS. Columns is then of no use.
	Plain bool `json:"plain"`
	// NullsEqual is NULLS NOT DISTINCT.
	NullsEqual bool `json:"nulls_equal"`
	// Deferred is set for a deferrable or exclusion constraint.
	Deferred bool `json:"deferred"`
}

// Reference is one foreign key. Columns[i] refers to Parent[i].
type Reference struct {
	ParentSchema string        `json:"parent_schema"` // of the parent's root
	ParentName   string        `json:"parent_name"`
	Columns      []IndexColumn `json:"columns"`
	Parent       []IndexColumn `json:"parent"`
	// Plain is false for PERIOD foreign keys.
	Plain bool `json:"plain"`
}

// Catalog reads table definitions from pg_catalog and remembers them until Invalidate. Safe for concurrent use; one
// query runs at a time. It opens its connection when it first needs one, and again when that was lost.
type Catalog struct {
	config     *pgconn.Config
	generation atomic.Uint64
	changing   atomic.Int64

	mu        sync.Mutex // guards what follows, and is held during a query
	conn      *pgconn.PgConn
	cached    uint64 // generation to which the relations belong
	relations map[uint32]*Relation
}

// catalogTimeout bounds one look-up. Reading pg_catalog waits for no user lock, so that this is only ever reached
// when the server is.
const catalogTimeout = 10 * time.Second

// NewCatalog returns an empty catalog that will read through connections like config. config is not changed.
func NewCatalog(config *pgconn.Config) *Catalog {
	config = config.Copy()
	if config.RuntimeParams == nil {
		config.RuntimeParams = make(map[string]string)
	}
	config.RuntimeParams["search_path"] = "pg_catalog"
	config.RuntimeParams["application_name"] = "quorate catalog"
	config.RuntimeParams["statement_timeout"] = "0"
	config.RuntimeParams["default_transaction_read_only"] = "on"
	config.RuntimeParams["default_transaction_isolation"] = "read committed"
	return &Catalog{config: config, relations: make(map[uint32]*Relation)}
}

// Generation changes with every Invalidate: what was learned under an older generation must be asked again.
func (c *Catalog) Generation() uint64 { return c.generation.Load() }

// Invalidate forgets every definition. Call it when DDL has become visible.
func (c *Catalog) Invalidate() { c.generation.Add(1) }

// Changing says that DDL is about to become visible, and its result that it has (or will not). In between nothing is
// remembered: a definition read before the DDL's commit must not outlive it, nor one that is read between that commit
// and the next line of the caller be missed.
func (c *Catalog) Changing() (done func()) {
	c.changing.Add(1)
	c.generation.Add(1)
	return sync.OnceFunc(func() {
		c.generation.Add(1)
		c.changing.Add(-1)
	})
}

// Stable reports whether a definition may be remembered under the current generation.
func (c *Catalog) Stable() bool { return c.changing.Load() == 0 }

// Relation returns the committed definition of a table, or nil if no committed table has this OID. The result is
// shared: do not change it.
func (c *Catalog) Relation(ctx context.Context, oid uint32) (*Relation, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// The generation is read before the query: a change during the query leaves behind an entry that is out of date.
	generation := c.generation.Load()
	if generation != c.cached {
		clear(c.relations)
		c.cached = generation
	}
	if r, ok := c.relations[oid]; ok && c.Stable() {
		return r, nil
	}
	r, err := c.load(ctx, `c.oid = $1::oid`, fmt.Sprint(oid))
	if err != nil {
		return nil, fmt.Errorf("load definition of relation %d: %w", oid, err)
	}
	if r != nil && c.Stable() {
		// An unknown one is not remembered: it may be about to be committed by the transaction that named it.
		c.relations[oid] = r
	}
	return r, nil
}

// RelationByName is Relation for a name. Nothing is remembered.
func (c *Catalog) RelationByName(ctx context.Context, schema, name string) (*Relation, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, err := c.load(ctx, `c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = $1) AND c.relname = $2`, schema, name)
	if err != nil {
		return nil, fmt.Errorf("load definition of relation %s.%s: %w", schema, name, err)
	}
	return r, nil
}

// Close closes the connection. A later look-up would open another.
func (c *Catalog) Close(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		return nil
	}
	err := c.conn.Close(ctx)
	c.conn = nil
	return err
}

// load runs the query once more on a new connection if the one it had turns out to be dead: the query only reads.
func (c *Catalog) load(ctx context.Context, where string, args ...string) (*Relation, error) {
	ctx, cancel := context.WithTimeout(ctx, catalogTimeout)
	defer cancel()
	params := make([][]byte, len(args))
	for i, a := range args {
		params[i] = []byte(a)
	}
	for reused := c.conn != nil; ; reused = false {
		if c.conn == nil {
			conn, err := pgconn.ConnectConfig(ctx, c.config)
			if err != nil {
				return nil, err
			}
			c.conn = conn
		}
		result := c.conn.ExecParams(ctx, relationQuery(where), params, nil, nil, nil).Read()
		if result.Err == nil {
			return parseRelation(result.Rows)
		}
		if !c.conn.IsClosed() {
			return nil, result.Err
		}
		c.conn = nil
		if !reused || ctx.Err() != nil {
			return nil, result.Err
		}
	}
}

func parseRelation(rows [][][]byte) (*Relation, error) {
	if len(rows) == 0 {
		return nil, nil
	}
	r := new(Relation)
	if err := json.Unmarshal(rows[0][0], r); err != nil {
		return nil, fmt.Errorf("parse catalog row: %w", err)
	}
	return r, nil
}

// relationQuery is the one query. Only server-made operator classes count as plain equality: one that an extension
// brings may take other values for equal.
func relationQuery(where string) string {
	return `WITH RECURSIVE
target AS (
    SELECT c.*, coalesce(pg_partition_root(c.oid), c.oid) AS root
    FROM pg_class c WHERE c.relkind IN ('r', 'p') AND ` + where + `),
-- a domain is compared as what it is made of
base(id, type) AS (
    SELECT t.oid, t.oid FROM pg_type t
    WHERE t.oid IN (SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid IN (
        SELECT oid FROM target UNION SELECT f.confrelid FROM pg_constraint f JOIN target ON f.conrelid = target.oid))
    UNION ALL
    SELECT b.id, t.typbasetype FROM base b JOIN pg_type t ON t.oid = b.type WHERE t.typtype = 'd'),
class AS (
    SELECT b.id, CASE
        WHEN t.typtype = 'e' THEN 5
        WHEN t.typnamespace <> 'pg_catalog'::regnamespace THEN 0
        WHEN t.typname IN ('text', 'varchar', 'name') THEN 1
        WHEN t.typname IN ('int2', 'int4', 'int8', 'oid', 'numeric') THEN 2
        WHEN t.typname = 'bpchar' THEN 3
        WHEN t.typname IN ('bool', 'uuid', 'date', 'time', 'timestamp', 'timestamptz', 'bytea') THEN 4
        ELSE 0 END AS class,
        t.oid AS type
    FROM base b JOIN pg_type t ON t.oid = b.type WHERE t.typtype <> 'd'),
index_column AS (
    SELECT i.indexrelid, i.indrelid, k.ord, k.attnum, a.attname,
        CASE WHEN oc.opcnamespace = 'pg_catalog'::regnamespace AND coalesce(co.collisdeterministic, true) THEN coalesce(class.class, 0) ELSE 0 END AS class,
        class.type
    FROM pg_index i
    CROSS JOIN LATERAL unnest(i.indkey::int2[], i.indclass::oid[], i.indcollation::oid[]) WITH ORDINALITY AS k(attnum, opclass, coll, ord)
    LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum AND k.attnum > 0
    LEFT JOIN class ON class.id = a.atttypid
    LEFT JOIN pg_opclass oc ON oc.oid = k.opclass
    LEFT JOIN pg_collation co ON co.oid = k.coll
    WHERE k.ord <= i.indnkeyatts AND (i.indrelid IN (SELECT oid FROM target)
        OR i.indexrelid IN (SELECT f.conindid FROM pg_constraint f JOIN target ON f.conrelid = target.oid WHERE f.contype = 'f'))),
identity_index AS (
    SELECT i.indexrelid FROM pg_index i JOIN target ON i.indrelid = target.oid
    WHERE i.indisvalid AND i.indimmediate AND CASE target.relreplident
        WHEN 'd' THEN i.indisprimary WHEN 'f' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END),
identity_columns AS (
    SELECT coalesce(array_agg(attname ORDER BY attname), '{}') AS names FROM index_column WHERE indexrelid IN (SELECT indexrelid FROM identity_index)),
referring AS (
    SELECT (SELECT array_agg(a.attname ORDER BY a.attname) FROM pg_attribute a WHERE a.attrelid = f.confrelid AND a.attnum = ANY (f.confkey)) AS names
    FROM pg_constraint f, target
    WHERE f.contype = 'f' AND (f.confrelid = target.oid OR f.confrelid IN (SELECT relid FROM pg_partition_ancestors(target.oid))))
SELECT json_build_object(
    'oid', target.oid::bigint, 'schema', n.nspname, 'name', target.relname,
    'root_schema', rn.nspname, 'root_name', r.relname,
    'permanent', target.relpersistence = 'p',
    'identity', coalesce((SELECT json_agg(json_build_object('name', attname, 'class', class) ORDER BY ord)
        FROM index_column WHERE indexrelid IN (SELECT indexrelid FROM identity_index)), '[]'),
    'uniques', coalesce((SELECT json_agg(json_build_object(
            'name', ic.relname,
            'columns', (SELECT json_agg(json_build_object('name', coalesce(attname, ''), 'class', class) ORDER BY ord) FROM index_column WHERE indexrelid = i.indexrelid),
            'plain', i.indpred IS NULL AND i.indexprs IS NULL AND NOT i.indisexclusion,
            'nulls_equal', i.indnullsnotdistinct,
            'deferred', NOT i.indimmediate OR i.indisexclusion) ORDER BY ic.relname)
        FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid
        WHERE i.indrelid = target.oid AND (i.indisunique OR i.indisexclusion) AND i.indislive
          AND i.indexrelid NOT IN (SELECT indexrelid FROM identity_index)), '[]'),
    'references', coalesce((SELECT json_agg(json_build_object(
            'parent_schema', pn.nspname, 'parent_name', p.relname,
            'plain', NOT coalesce((to_jsonb(f) ->> 'conperiod')::boolean, false),
            'columns', (SELECT json_agg(json_build_object('name', a.attname, 'class', coalesce(class.class, 0)) ORDER BY k.ord)
                FROM unnest(f.conkey) WITH ORDINALITY AS k(attnum, ord)
                JOIN pg_attribute a ON a.attrelid = f.conrelid AND a.attnum = k.attnum
                LEFT JOIN class ON class.id = a.atttypid),
            'parent', (SELECT json_agg(json_build_object('name', a.attname,
                    'class', CASE WHEN child.type IS DISTINCT FROM class.type AND x.class NOT IN (1, 2) THEN 0 ELSE coalesce(x.class, 0) END) ORDER BY k.ord)
                FROM unnest(f.conkey, f.confkey) WITH ORDINALITY AS k(child, attnum, ord)
                JOIN pg_attribute a ON a.attrelid = f.confrelid AND a.attnum = k.attnum
                JOIN pg_attribute ca ON ca.attrelid = f.conrelid AND ca.attnum = k.child
                LEFT JOIN class ON class.id = a.atttypid
                LEFT JOIN class child ON child.id = ca.atttypid
                LEFT JOIN index_column x ON x.indexrelid = f.conindid AND x.attnum = k.attnum)) ORDER BY f.conname)
        FROM pg_constraint f
        JOIN pg_class p ON p.oid = coalesce(pg_partition_root(f.confrelid), f.confrelid)
        JOIN pg_namespace pn ON pn.oid = p.relnamespace
        WHERE f.conrelid = target.oid AND f.contype = 'f'), '[]'),
    'referenced', EXISTS (SELECT FROM referring),
    'referenced_elsewhere', EXISTS (SELECT FROM referring, identity_columns WHERE referring.names IS DISTINCT FROM identity_columns.names))
FROM target
JOIN pg_namespace n ON n.oid = target.relnamespace
JOIN pg_class r ON r.oid = target.root
JOIN pg_namespace rn ON rn.oid = r.relnamespace`
}
