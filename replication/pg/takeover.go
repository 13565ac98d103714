package pg

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5/pgconn"
)

// TakeOver makes of a copy of another member's database this node's own: it gets the identity, a token that nobody else has, and
// its own residue of every sequence. Everything else in it is as it was. It is idempotent. conn must be a superuser's, and nobody
// else connected. An error wrapping ErrForeignData means that it is no copy of a member of this cluster.
//
// The slot may have had another holder, who gave out values that the donor knows nothing of. So each sequence goes on beyond
// all values that are stored in columns which take theirs from it, and beyond the value, if any, that the holder had
// reserved: beyond has that by the sequence's name, as SequencePositions gives it.
func TakeOver(ctx context.Context, conn *pgconn.PgConn, id Identity, beyond map[string]int64) error {
	var cluster string
	if err := scan(ctx, conn, `SELECT coalesce((SELECT cluster FROM quorate.identity), '')`, &cluster); err != nil {
		return fmt.Errorf("take over a copy: %w", err)
	}
	if cluster != id.Cluster {
		return fmt.Errorf("take over a copy: %w: it is of cluster %q, this node of %q", ErrForeignData, cluster, id.Cluster)
	}
	marks, err := json.Marshal(beyond)
	if err != nil {
		return fmt.Errorf("take over a copy: %w", err)
	}
	if beyond == nil {
		marks = []byte("{}")
	}
	script := fmt.Sprintf(takeOver, id.Node, id.Slot, id.MaxNodes, quoteLiteral(string(marks)))
	if _, err := conn.Exec(ctx, script).ReadAll(); err != nil {
		return fmt.Errorf("take over a copy: %w", err)
	}
	return nil
}

// takeOver first gives each sequence back the definition that the user wrote, since own_sequence takes what differs from what
// this node has set for the user's will. The slot counts as taken over when the node is in it.
const takeOver = `BEGIN READ WRITE;
SET LOCAL synchronous_commit = on;
SET LOCAL session_replication_role = replica;
SET LOCAL search_path = pg_catalog;
DO $take_over$
DECLARE
    me   quorate.identity;
    s    record;
    used record;
    high numeric;
    top  numeric;
    marks CONSTANT jsonb := %[4]s;
BEGIN
    DELETE FROM quorate.owned_sequences o WHERE NOT EXISTS (SELECT FROM pg_sequence p WHERE p.seqrelid = o.sequence);
    SELECT * INTO STRICT me FROM quorate.identity;
    IF me.node = %[1]d THEN
        RETURN;
    END IF;
    IF me.max_nodes <> %[3]d THEN
        RAISE EXCEPTION 'the copy divides its sequences by %%, this node by %[3]d', me.max_nodes;
    END IF;
    FOR s IN
        SELECT q.sequence, q.sequence::regclass AS name, (SELECT format('%%I.%%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                    WHERE c.oid = q.sequence) AS key, p.seqincrement > 0 AS ascending,
               CASE WHEN p.seqincrement = q.increment::numeric * me.max_nodes THEN q.increment ELSE p.seqincrement END AS step,
               CASE WHEN p.seqstart = q.start::numeric + me.slot * q.increment THEN q.start ELSE p.seqstart END AS first
          FROM quorate.owned_sequences q JOIN pg_sequence p ON p.seqrelid = q.sequence
         ORDER BY q.sequence
    LOOP
        EXECUTE format('ALTER SEQUENCE %%s INCREMENT BY %%s START WITH %%s', s.name, s.step, s.first);
        EXECUTE format('SELECT last_value FROM %%s', s.name) INTO top;
        high := (marks ->> s.key)::numeric;
        top := CASE WHEN s.ascending THEN greatest(top, high) ELSE least(top, high) END;
        -- Columns whose default calls nextval, identities, and columns that own the sequence.
        FOR used IN
            SELECT DISTINCT a.attrelid::regclass AS tab, quote_ident(a.attname) AS col
              FROM pg_depend d
              LEFT JOIN pg_attrdef f ON d.classid = 'pg_attrdef'::regclass AND f.oid = d.objid AND d.refobjid = s.sequence
              JOIN pg_attribute a ON CASE WHEN f.oid IS NOT NULL THEN a.attrelid = f.adrelid AND a.attnum = f.adnum
                   ELSE d.classid = 'pg_class'::regclass AND d.objid = s.sequence AND d.deptype IN ('a', 'i') AND a.attrelid = d.refobjid AND a.attnum = d.refobjsubid END
              JOIN pg_class c ON c.oid = a.attrelid AND c.relkind IN ('r', 'p')
             WHERE a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'numeric'::regtype)
               AND (f.oid IS NOT NULL OR d.objid = s.sequence)
        LOOP
            EXECUTE format('SELECT %%s(%%s) FROM %%s', CASE WHEN s.ascending THEN 'max' ELSE 'min' END, used.col, used.tab) INTO high;
            top := CASE WHEN s.ascending THEN greatest(top, high) ELSE least(top, high) END;
        END LOOP;
        PERFORM setval(s.sequence::regclass, least(greatest(top, seqmin), seqmax)::bigint) FROM pg_sequence WHERE seqrelid = s.sequence;
    END LOOP;
    UPDATE quorate.identity SET node = %[1]d, slot = %[2]d, token = gen_random_uuid(), generation = 0;
    FOR s IN SELECT sequence FROM quorate.owned_sequences ORDER BY sequence LOOP
        DELETE FROM quorate.owned_sequences WHERE sequence = s.sequence;
        BEGIN
            PERFORM quorate.own_sequence(s.sequence);
        EXCEPTION WHEN sequence_generator_limit_exceeded THEN
            -- This node has none left to give out. That is for who asks for one to hear; the node can do without.
            INSERT INTO quorate.owned_sequences SELECT seqrelid, seqstart, seqincrement FROM pg_sequence WHERE seqrelid = s.sequence;
            EXECUTE (SELECT format('ALTER SEQUENCE %%s INCREMENT BY %%s START WITH %%s NO CYCLE', seqrelid::regclass, seqincrement * %[3]d,
                     CASE WHEN seqstart::numeric + %[2]d * seqincrement BETWEEN seqmin AND seqmax THEN seqstart + %[2]d * seqincrement ELSE seqstart END)
                FROM pg_sequence WHERE seqrelid = s.sequence);
            PERFORM setval(s.sequence::regclass, CASE WHEN seqincrement > 0 THEN seqmax ELSE seqmin END) FROM pg_sequence WHERE seqrelid = s.sequence;
        END;
    END LOOP;
END $take_over$;
COMMIT`

// SequencePosition is how far this node has come with a sequence.
type SequencePosition struct {
	Name string // schema and name, quoted where needed
	Last int64  // given out last
	Step int64  // from one value of this node to its next
	Room int64  // how many more there are
}

// SequencePositions returns those of the sequences that have given out values here.
func SequencePositions(ctx context.Context, conn *pgconn.PgConn) ([]SequencePosition, error) {
	results, err := conn.Exec(ctx, `SELECT format('%I.%I', n.nspname, c.relname), v.last, p.seqincrement,
			trunc(((CASE WHEN p.seqincrement > 0 THEN p.seqmax ELSE p.seqmin END)::numeric - v.last) / p.seqincrement)
		FROM quorate.owned_sequences o JOIN pg_sequence p ON p.seqrelid = o.sequence JOIN pg_class c ON c.oid = o.sequence
			JOIN pg_namespace n ON n.oid = c.relnamespace, LATERAL (SELECT pg_sequence_last_value(o.sequence::regclass)) AS v (last)
		WHERE v.last IS NOT NULL`).ReadAll()
	if err != nil {
		return nil, fmt.Errorf("read the positions of sequences: %w", err)
	}
	positions := make([]SequencePosition, 0, len(results[0].Rows))
	for _, row := range results[0].Rows {
		p := SequencePosition{Name: string(row[0])}
		for i, to := range []*int64{&p.Last, &p.Step, &p.Room} {
			if *to, err = strconv.ParseInt(string(row[i+1]), 10, 64); err != nil {
				return nil, fmt.Errorf("read the position of sequence %s: %w", p.Name, err)
			}
		}
		positions = append(positions, p)
	}
	return positions, nil
}
