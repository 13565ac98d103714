-- Objects that one node keeps in its own PostgreSQL. Nothing here is replicated: every node installs its own copy,
-- in a session whose session_replication_role is replica, so that the event triggers below do not see it.
-- Idempotent: run at every start.

CREATE SCHEMA IF NOT EXISTS quorate;
GRANT USAGE ON SCHEMA quorate TO PUBLIC;

-- A row inserted here inside a savepoint that is then rolled back is "a later change" of the transaction, which is
-- what makes logical decoding give up the changes it holds back behind an unconfirmed speculative insert.
CREATE TABLE IF NOT EXISTS quorate.nudge (id bigint);
GRANT INSERT ON quorate.nudge TO PUBLIC;

-- A row inserted here shows, as its xmin, in which subtransaction it was; nothing else in SQL does.
CREATE UNLOGGED TABLE IF NOT EXISTS quorate.subtransaction (id integer);

-- One row: who this node is.
CREATE TABLE IF NOT EXISTS quorate.identity (
    only_row  boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    cluster   text    NOT NULL,
    node      integer NOT NULL,
    slot      integer NOT NULL,
    max_nodes integer NOT NULL,
    -- what a DDL message must show: any role may emit logical messages, and peers replay DDL as the role it names
    token     uuid    NOT NULL DEFAULT gen_random_uuid()
);

-- How many times the node has been started on this database. Its data directory has the same number, so that either is found
-- out when it was set back.
ALTER TABLE quorate.identity ADD COLUMN IF NOT EXISTS generation bigint NOT NULL DEFAULT 0;

-- The sequences that have been given this node's residue, with their definition as the user wrote it.
DO $$
BEGIN
    IF (SELECT relkind FROM pg_catalog.pg_class WHERE oid = to_regclass('quorate.sequences')) = 'r' THEN
        ALTER TABLE quorate.sequences RENAME TO owned_sequences; -- of an earlier release
    END IF;
END $$;
CREATE TABLE IF NOT EXISTS quorate.owned_sequences (
    sequence  oid PRIMARY KEY,
    start     bigint NOT NULL,
    increment bigint NOT NULL
);
GRANT SELECT (cluster, node, slot, max_nodes) ON quorate.identity TO PUBLIC;
GRANT SELECT ON quorate.owned_sequences TO PUBLIC;

-- What every node gives out of each sequence: start + slot * increment, and from there each max_nodes-th value.
-- last_value is the last one that this node gave out, null before the first and for who may not read the sequence.
CREATE OR REPLACE VIEW quorate.sequences AS
    SELECT n.nspname AS schema, c.relname AS name, o.start, o.increment, me.node, me.slot, me.max_nodes,
           o.start::numeric + me.slot * o.increment AS node_start, p.seqincrement AS node_increment,
           CASE WHEN has_sequence_privilege(o.sequence, 'SELECT, USAGE') THEN pg_sequence_last_value(o.sequence::regclass) END AS last_value
      FROM quorate.owned_sequences o
      JOIN pg_class c ON c.oid = o.sequence
      JOIN pg_namespace n ON n.oid = c.relnamespace
      JOIN pg_sequence p ON p.seqrelid = o.sequence
     CROSS JOIN (SELECT node, slot, max_nodes FROM quorate.identity) me;
GRANT SELECT ON quorate.sequences TO PUBLIC;

-- own_sequence gives this node every max_nodes-th value of a sequence: increment times max_nodes, beginning with the
-- node's slot. Calling it again, or after ALTER SEQUENCE, only moves the next value up into the node's residue.
CREATE OR REPLACE FUNCTION quorate.own_sequence(s oid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET session_replication_role = replica
AS $$
DECLARE
    me      quorate.identity;
    now_    pg_sequence;
    before  quorate.owned_sequences;
    wide    bigint;
    start0  bigint;
    step    bigint;
    next_   numeric;
    offset_ numeric;
BEGIN
    SELECT * INTO STRICT me FROM quorate.identity;
    SELECT * INTO now_ FROM pg_sequence WHERE seqrelid = s;
    IF NOT FOUND THEN RETURN; END IF;
    SELECT * INTO before FROM quorate.owned_sequences WHERE sequence = s;
    -- what differs from what was set here last, the user has set since
    step := now_.seqincrement;
    start0 := now_.seqstart;
    IF before.sequence IS NOT NULL THEN
        IF now_.seqincrement = before.increment * me.max_nodes THEN
            step := before.increment;
        END IF;
        IF now_.seqstart = before.start + me.slot * before.increment THEN
            start0 := before.start;
        END IF;
    END IF;
    wide := step * me.max_nodes;
    EXECUTE format('SELECT CASE WHEN is_called THEN last_value::numeric + %s ELSE last_value END FROM %s', step, s::regclass) INTO next_;
    -- the smallest value at or past next_ (in the sequence's direction) that is start0 + slot*step modulo wide
    offset_ := (start0::numeric + me.slot::numeric * step - next_) % wide;
    IF offset_ * sign(wide) < 0 THEN offset_ := offset_ + wide; END IF;
    next_ := next_ + offset_;
    IF next_ > now_.seqmax OR next_ < now_.seqmin THEN
        RAISE EXCEPTION USING ERRCODE = '2200H',
            MESSAGE = format('sequence %s has no room for %s nodes', s::regclass, me.max_nodes),
            HINT = 'Widen MINVALUE or MAXVALUE, or use a wider type: every node takes each ' || me.max_nodes || 'th value.';
    END IF;
    EXECUTE format('ALTER SEQUENCE %s INCREMENT BY %s START WITH %s RESTART WITH %s',
        s::regclass, wide,
        CASE WHEN start0::numeric + me.slot::numeric * step BETWEEN now_.seqmin AND now_.seqmax THEN start0 + me.slot * step ELSE start0 END,
        next_);
    INSERT INTO quorate.owned_sequences VALUES (s, start0, step)
    ON CONFLICT (sequence) DO UPDATE SET start = excluded.start, increment = excluded.increment;
END $$;

-- own_sequences owns every sequence that is not yet, after DDL was replayed here.
CREATE OR REPLACE FUNCTION quorate.own_sequences() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET session_replication_role = replica
AS $$
DECLARE
    s oid;
BEGIN
    DELETE FROM quorate.owned_sequences q WHERE NOT EXISTS (SELECT FROM pg_sequence p WHERE p.seqrelid = q.sequence);
    FOR s IN
        SELECT p.seqrelid FROM pg_sequence p JOIN pg_class c ON c.oid = p.seqrelid
        CROSS JOIN quorate.identity me LEFT JOIN quorate.owned_sequences q ON q.sequence = p.seqrelid
        WHERE c.relpersistence <> 't'
          AND (q.sequence IS NULL OR p.seqincrement <> q.increment * me.max_nodes OR p.seqstart <> CASE
              WHEN q.start::numeric + me.slot * q.increment BETWEEN p.seqmin AND p.seqmax THEN q.start + me.slot * q.increment ELSE q.start END)
        ORDER BY p.seqrelid
    LOOP
        PERFORM quorate.own_sequence(s);
    END LOOP;
END $$;

-- ddl_text finds the text of the DDL statement for which an event trigger runs, from that trigger's PG_CONTEXT: the
-- innermost 'SQL statement "…"' where it runs inside PL/pgSQL, otherwise what the client sent (the gateway sends
-- statements that hold DDL one at a time).
CREATE OR REPLACE FUNCTION quorate.ddl_text(context text) RETURNS text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    rest text := substr(context, strpos(context, E'\n') + 1); -- the first line is the trigger itself
    sql  text;
BEGIN
    IF strpos(context, E'\n') = 0 THEN
        sql := current_query();
    ELSIF rest LIKE 'SQL statement "%' THEN
        sql := substring(rest FROM '^SQL statement "(.*?)"\n(?:PL/pgSQL function|SQL function|SQL statement|SQL expression|PL/pgSQL)');
        IF sql IS NULL THEN
            sql := substring(rest FROM '^SQL statement "(.*)"$');
        END IF;
    END IF;
    IF sql IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = '0A000',
            MESSAGE = 'this DDL statement cannot be replicated: its text is not available',
            DETAIL = rest,
            HINT = 'Run it directly, or from PL/pgSQL, instead of from a function in another language.';
    END IF;
    IF strpos(context, E'\n') > 0
       AND regexp_replace(regexp_replace(sql, '\$([A-Za-z_]*)\$.*?\$\1\$', '', 'g'), '''(?:[^'']|'''')*''|"[^"]*"|--[^\n]*', '', 'g') ~ ';\s*\S'
       AND sql !~* '\mbegin\s+atomic\M' THEN
        RAISE EXCEPTION USING ERRCODE = '0A000',
            MESSAGE = 'several statements in one EXECUTE cannot be replicated when one of them is DDL',
            HINT = 'EXECUTE them one at a time.';
    END IF;
    RETURN sql;
END $$;

-- emit_ddl writes the message by which peers replay a statement at its place in the transaction. Decoding reports
-- every logical message under the top-level transaction, so the message itself says in which subtransaction the
-- statement ran: with that one it is undone. Only the triggers below may call it: peers run what it says. Nor must they
-- replay as a role that the session's user could not assume; no role is for what the triggers have written themselves.
CREATE OR REPLACE FUNCTION quorate.emit_ddl(sql text, tag text, path text, tables jsonb, runs_as name, creates oid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    xid bigint;
BEGIN
    IF runs_as IS NOT NULL AND NOT pg_has_role(session_user, runs_as, 'MEMBER') THEN
        RAISE EXCEPTION USING ERRCODE = '0A000',
            MESSAGE = format('DDL as role %I cannot be replicated for a session of %I, who is no member of it', runs_as, session_user),
            HINT = 'Run it as that role instead of from a SECURITY DEFINER function.';
    END IF;
    INSERT INTO quorate.subtransaction VALUES (1) RETURNING xmin::text::bigint INTO xid;
    DELETE FROM quorate.subtransaction WHERE xmin::text::bigint = xid;
    PERFORM pg_logical_emit_message(true, 'quorate.ddl', jsonb_build_object(
        'xid', xid, 'sql', sql, 'tag', tag, 'search_path', path, 'role', runs_as, 'tables', tables, 'creates', creates::bigint,
        'token', (SELECT token FROM quorate.identity),
        'settings', jsonb_build_object(
            'default_table_access_method', current_setting('default_table_access_method'),
            'default_toast_compression', current_setting('default_toast_compression'),
            'standard_conforming_strings', current_setting('standard_conforming_strings'),
            'DateStyle', current_setting('DateStyle'),
            'IntervalStyle', current_setting('IntervalStyle'),
            'TimeZone', current_setting('TimeZone')))::text);
END $$;
REVOKE ALL ON FUNCTION quorate.emit_ddl FROM PUBLIC;

-- extension_script is what the setting of this name is while the script of an extension runs. No user can guess it.
CREATE OR REPLACE FUNCTION quorate.extension_script() RETURNS text
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$ SELECT md5(token::text || pg_current_xact_id()::text) FROM quorate.identity $$;
REVOKE ALL ON FUNCTION quorate.extension_script FROM PUBLIC;

-- in_extension_script gives no transaction an id: DDL that does nothing has none.
CREATE OR REPLACE FUNCTION quorate.in_extension_script() RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    running text := current_setting('quorate.extension_script', true);
BEGIN
    IF coalesce(running, '') = '' THEN
        RETURN false;
    END IF;
    RETURN running = quorate.extension_script();
END $$;
REVOKE ALL ON FUNCTION quorate.in_extension_script FROM PUBLIC;

-- on_ddl comes before each of the next two, by the names of the triggers, and notes what only a function that runs as the
-- user can see. They run as the owner; whatever the user had put into the setting is gone.
CREATE OR REPLACE FUNCTION quorate.on_ddl() RETURNS event_trigger
LANGUAGE plpgsql
AS $$
DECLARE
    path    text := pg_catalog.current_setting('search_path');
    context text;
BEGIN
    GET DIAGNOSTICS context = PG_CONTEXT;
    PERFORM pg_catalog.set_config('quorate.ddl', pg_catalog.jsonb_build_object('path', path, 'context', context, 'role', current_user)::text, true);
END $$;

-- affected_tables lists the tables that the objects of a ddl_command_end belong to, and the parents of their foreign
-- keys: a new foreign key must not pass a concurrent delete of its parent. NULL means any table: the statement changes
-- what names or values mean (a table's old name cannot be found any more; rows on their way may hold a label of an
-- enum under its old name), or is not known to be harmless.
CREATE OR REPLACE FUNCTION quorate.affected_tables(tag text, sql text, classes oid[], objects oid[]) RETURNS jsonb
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE
    WHEN tag IN ('COMMENT', 'GRANT', 'REVOKE', 'SECURITY LABEL', 'ALTER DEFAULT PRIVILEGES') THEN '[]'::jsonb
    WHEN tag LIKE '%EXTENSION' THEN NULL
    WHEN tag LIKE 'ALTER %' AND tag NOT IN ('ALTER TABLE', 'ALTER FUNCTION', 'ALTER PROCEDURE', 'ALTER ROUTINE', 'ALTER VIEW',
        'ALTER MATERIALIZED VIEW', 'ALTER SEQUENCE', 'ALTER INDEX', 'ALTER TRIGGER', 'ALTER POLICY', 'ALTER STATISTICS') THEN NULL
    WHEN tag = 'ALTER TABLE' AND sql ~* '\mrename\M|\mset\s+schema\M' THEN NULL
    ELSE (WITH object AS (SELECT * FROM unnest(classes, objects) AS o(class, id)),
    relation AS (
        SELECT id FROM object WHERE class = 'pg_class'::regclass
        UNION SELECT t.tgrelid FROM object JOIN pg_trigger t ON class = 'pg_trigger'::regclass AND t.oid = id
        UNION SELECT p.polrelid FROM object JOIN pg_policy p ON class = 'pg_policy'::regclass AND p.oid = id
        UNION SELECT r.ev_class FROM object JOIN pg_rewrite r ON class = 'pg_rewrite'::regclass AND r.oid = id
        UNION SELECT c.conrelid FROM object JOIN pg_constraint c ON class = 'pg_constraint'::regclass AND c.oid = id
        UNION SELECT d.adrelid FROM object JOIN pg_attrdef d ON class = 'pg_attrdef'::regclass AND d.oid = id),
    tables AS (
        SELECT id FROM relation
        UNION SELECT i.indrelid FROM relation JOIN pg_index i ON i.indexrelid = id),
    related AS (
        SELECT id FROM tables
        UNION SELECT f.confrelid FROM tables JOIN pg_constraint f ON f.conrelid = id AND f.contype = 'f'
        UNION SELECT h.inhparent FROM tables JOIN pg_inherits h ON h.inhrelid = id)
    SELECT coalesce(jsonb_agg(DISTINCT jsonb_build_array(n.nspname, c.relname)), '[]')
    FROM related JOIN pg_class c ON c.oid = related.id AND c.relkind IN ('r', 'p')
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relpersistence <> 't') END
$$;

-- table_text makes the statement that creates a table like one that CREATE TABLE AS, or SELECT INTO, has made. Their own text
-- may name what only this session has: temporary tables, parameters, prepared statements, variables of PL/pgSQL.
CREATE OR REPLACE FUNCTION quorate.table_text(made oid) RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT format('CREATE %sTABLE %I.%I (%s) USING %I%s%s',
        CASE c.relpersistence WHEN 'u' THEN 'UNLOGGED ' ELSE '' END, n.nspname, c.relname,
        (SELECT string_agg(format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod)) ||
                CASE WHEN a.attcollation <> t.typcollation THEN format(' COLLATE %I.%I', kn.nspname, k.collname) ELSE '' END, ', ' ORDER BY a.attnum)
           FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
           LEFT JOIN pg_collation k ON k.oid = a.attcollation LEFT JOIN pg_namespace kn ON kn.oid = k.collnamespace
          WHERE a.attrelid = c.oid AND a.attnum > 0),
        m.amname,
        (SELECT ' WITH (' || string_agg(format('%s%I = %L', prefix, split_part(o, '=', 1), substr(o, strpos(o, '=') + 1)), ', ') || ')'
           FROM (SELECT '' AS prefix, unnest(c.reloptions) AS o UNION ALL SELECT 'toast.', unnest(h.reloptions)) AS options),
        ' TABLESPACE ' || quote_ident(s.spcname))
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_am m ON m.oid = c.relam
    LEFT JOIN pg_class h ON h.oid = c.reltoastrelid LEFT JOIN pg_tablespace s ON s.oid = c.reltablespace
    WHERE c.oid = made
$$;

-- computed lists the columns that the ALTER TABLE in progress has added and that are computed: by a default, or as an identity. differs
-- says whether each node that runs the statement would find another value, for the time or the user say; NULL where a constant
-- may have been written 'now'. missing is the value that the rows have which were there before, if it is kept with the column's
-- definition instead of in each row.
CREATE OR REPLACE FUNCTION quorate.computed(OUT of_table oid, OUT name name, OUT missing text, OUT differs boolean) RETURNS SETOF record
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT a.attrelid, a.attname, (a.attmissingval::text::text[])[1],
           a.attidentity <> '' OR d.adbin IS NULL OR d.adbin::text ~ 'SQLVALUEFUNCTION|COERCEVIAIO'
           OR EXISTS (SELECT FROM regexp_matches(d.adbin::text, ':(?:funcid|opfuncid) (\d+)', 'g') AS f(id) JOIN pg_proc p ON p.oid = f.id[1]::oid
                       WHERE p.provolatile <> 'i')
           OR CASE t.typcategory WHEN 'D' THEN NULL ELSE false END
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid AND c.relpersistence = 'p' AND c.relkind IN ('r', 'p') JOIN pg_type t ON t.oid = a.atttypid
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE NOT a.attisdropped AND (a.atthasmissing OR a.atthasdef OR a.attidentity <> '')
      -- The row is of this transaction: others' columns may come meanwhile.
      AND age(a.xmin) <= age((pg_current_xact_id_if_assigned()::text::bigint & 4294967295)::text::xid)
      AND a.attnum > coalesce(substring(current_setting('quorate.columns', true) FROM ',' || a.attrelid || '\.(\d+),')::integer, 0)
$$;

-- What the script of an extension does is replayed by the statement that ran the script. For ALTER TABLE it is noted how many
-- columns each table has: what comes behind them the statement has added.
CREATE OR REPLACE FUNCTION quorate.on_ddl_start() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF tg_tag LIKE '%EXTENSION' THEN
        PERFORM set_config('quorate.extension_script', quorate.extension_script(), true);
    ELSIF tg_tag = 'ALTER TABLE' THEN
        PERFORM set_config('quorate.columns', coalesce((SELECT ',' || string_agg(oid || '.' || relnatts, ',,') || ',' FROM pg_class
            WHERE relkind IN ('r', 'p') AND relpersistence = 'p' AND oid >= 16384), ''), true);
    END IF;
END $$;

CREATE OR REPLACE FUNCTION quorate.on_ddl_end() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    ddl     jsonb := current_setting('quorate.ddl');
    context text := ddl ->> 'context';
    sql     text;
    classes oid[];
    objects oid[];
    n_temp  bigint;
    n_all   bigint;
    n_ours  bigint;
    tables  jsonb;
    made    oid;
    s       oid;
    added   record;
BEGIN
    IF tg_tag = 'REINDEX' THEN
        RETURN; -- it changes nothing that others have
    END IF;
    IF tg_tag LIKE '%EXTENSION' THEN
        PERFORM set_config('quorate.extension_script', '', true);
        PERFORM quorate.own_sequences();
    ELSIF quorate.in_extension_script() THEN
        RETURN;
    END IF;
    SELECT array_agg(c.classid), array_agg(c.objid),
           count(*) FILTER (WHERE c.schema_name = 'pg_temp'), count(*),
           count(*) FILTER (WHERE c.schema_name = 'quorate' OR c.object_identity = 'quorate' AND c.object_type = 'schema')
      INTO classes, objects, n_temp, n_all, n_ours
      FROM pg_event_trigger_ddl_commands() c WHERE NOT c.in_extension;
    IF n_all = 0 THEN
        RETURN; -- nothing was done (IF NOT EXISTS), or the sql_drop trigger has spoken
    END IF;
    IF n_ours > 0 THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'the schema quorate belongs to the cluster';
    END IF;
    IF n_temp = n_all THEN
        RETURN;
    END IF;
    FOR s IN
        SELECT q.seqrelid FROM pg_sequence q JOIN pg_class c ON c.oid = q.seqrelid
        WHERE c.relpersistence <> 't' AND
          (q.seqrelid = ANY (objects) OR EXISTS (SELECT FROM pg_depend d
             WHERE d.classid = 'pg_class'::regclass AND d.objid = q.seqrelid AND d.refobjid = ANY (objects) AND d.deptype IN ('a', 'i')))
    LOOP
        PERFORM quorate.own_sequence(s);
    END LOOP;
    IF tg_tag IN ('CREATE TABLE AS', 'SELECT INTO') THEN
        -- The table's rows stand before this in the stream; capture puts it before them.
        made := objects[1];
        PERFORM quorate.emit_ddl(quorate.table_text(made), tg_tag, 'pg_catalog', quorate.affected_tables(tg_tag, '', classes, objects), (ddl ->> 'role')::name, made);
        RETURN;
    END IF;
    sql := quorate.ddl_text(context);
    IF tg_tag = 'CREATE TABLE' AND EXISTS (SELECT FROM regexp_matches(sql, '\mlike\s+((?:pg_temp\s*\.\s*)?(?:"[^"]+"|[[:alpha:]_][\w$]*))', 'gi') AS m(name)
           JOIN pg_class c ON c.oid = to_regclass(m.name[1]) WHERE c.relnamespace = pg_my_temp_schema()) THEN
        RAISE EXCEPTION USING ERRCODE = '0A000',
            MESSAGE = 'a table cannot be made LIKE a temporary one',
            DETAIL = 'Other nodes do not have that.';
    END IF;
    tables := quorate.affected_tables(tg_tag, sql, classes, objects);
    PERFORM quorate.emit_ddl(sql, tg_tag, ddl ->> 'path', tables, (ddl ->> 'role')::name, 0);
    IF tg_tag <> 'ALTER TABLE' THEN
        RETURN;
    END IF;
    FOR added IN
        SELECT m.*, c.relreplident = 'f' OR c.relreplident <> 'n' AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indimmediate AND i.indisvalid
                   AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END) AS identified
        FROM quorate.computed() m JOIN pg_class c ON c.oid = m.of_table
        WHERE m.missing IS NOT NULL AND pg_relation_size(m.of_table) > 0
          AND coalesce(m.differs, sql ~* '''[^'']*\m(now|today|tomorrow|yesterday)\M[^'']*''')
    LOOP
        IF added.differs IS NULL THEN
            RAISE EXCEPTION USING ERRCODE = '0A000',
                MESSAGE = format('column %I has a constant for its default that each node would read as another time', added.name),
                HINT = 'Write now() or CURRENT_DATE instead.';
        END IF;
        IF NOT added.identified THEN
            RAISE EXCEPTION USING ERRCODE = '0A000',
                MESSAGE = format('column %I has a default that would give the existing rows other values on each node', added.name),
                DETAIL = format('Table %s has no primary key by which other nodes could set them right.', added.of_table::regclass),
                HINT = 'Give the table a primary key, or set its REPLICA IDENTITY to FULL, before.';
        END IF;
        PERFORM quorate.emit_ddl(format('UPDATE ONLY %s SET %I = %L', added.of_table::regclass, added.name, added.missing), tg_tag, 'pg_catalog', tables, NULL, 0);
    END LOOP;
END $$;

CREATE OR REPLACE FUNCTION quorate.on_drop() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    ddl     jsonb := current_setting('quorate.ddl');
    context text := ddl ->> 'context';
    n_temp  bigint;
    n_all   bigint;
    n_ours  bigint;
    tables  jsonb;
BEGIN
    IF quorate.in_extension_script() THEN
        RETURN;
    END IF;
    SELECT count(*) FILTER (WHERE d.is_temporary AND d.original), count(*) FILTER (WHERE d.original),
           count(*) FILTER (WHERE d.schema_name = 'quorate' OR d.object_type = 'schema' AND d.object_name = 'quorate'
             OR d.object_type IN ('event trigger', 'publication') AND d.object_name LIKE 'quorate%'),
           coalesce(jsonb_agg(DISTINCT jsonb_build_array(d.schema_name, d.object_name)) FILTER (WHERE d.object_type = 'table' AND NOT d.is_temporary), '[]')
           || coalesce(jsonb_agg(DISTINCT jsonb_build_array(d.address_names[1], d.address_names[2]))
                FILTER (WHERE d.object_type IN ('trigger', 'policy', 'rule', 'table constraint', 'table column') AND NOT d.is_temporary), '[]')
      INTO n_temp, n_all, n_ours, tables
      FROM pg_event_trigger_dropped_objects() d;
    IF n_ours > 0 THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'the schema quorate belongs to the cluster';
    END IF;
    IF tg_tag NOT LIKE 'DROP%' OR n_all = 0 OR n_temp = n_all THEN
        RETURN; -- ddl_command_end speaks for ALTER … DROP
    END IF;
    IF n_temp > 0 THEN
        RAISE EXCEPTION USING ERRCODE = '0A000',
            MESSAGE = 'temporary and permanent objects cannot be dropped in one statement',
            HINT = 'Drop the temporary ones, which other nodes do not have, separately.';
    END IF;
    IF tg_tag IN ('DROP EXTENSION', 'DROP OWNED') THEN
        tables := NULL;
    END IF;
    PERFORM quorate.emit_ddl(quorate.ddl_text(context), tg_tag, ddl ->> 'path', tables, (ddl ->> 'role')::name, 0);
END $$;

-- What is computed for each row that is rewritten, and differs each time or on each node, would give every node other rows.
CREATE OR REPLACE FUNCTION quorate.on_rewrite() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    id      oid := pg_event_trigger_table_rewrite_oid();
    context text;
    sql     text;
    col     text;
BEGIN
    IF (SELECT relpersistence <> 'p' FROM pg_class WHERE oid = id) OR quorate.in_extension_script() OR pg_relation_size(id) = 0 THEN
        RETURN;
    END IF;
    SELECT c.name INTO col FROM quorate.computed() c WHERE c.of_table = id AND c.differs LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING ERRCODE = '0A000',
            MESSAGE = format('column %I would get other values in the existing rows on each node: they are computed for each row', col),
            HINT = 'Add the column in a statement of its own and without that, UPDATE the rows, then set the default or ADD GENERATED … AS IDENTITY.';
    END IF;
    IF pg_event_trigger_table_rewrite_reason() & 4 <> 0 THEN -- a column's type was changed; the expression of USING is kept nowhere but in the text
        GET DIAGNOSTICS context = PG_CONTEXT;
        sql := lower(regexp_replace(quorate.ddl_text(context), '''(?:[^'']|'''')*''|--[^\n]*', '', 'g'));
        SELECT f.name[1] INTO col
          FROM regexp_matches(sql, '([a-z_][a-z_0-9$]*)"?\s*\(', 'g') AS f(name)
         WHERE EXISTS (SELECT FROM pg_proc p WHERE p.proname = f.name[1] AND (p.provolatile = 'v' OR p.proname IN ('now', 'transaction_timestamp', 'statement_timestamp')))
         LIMIT 1;
        col := coalesce(col, substring(sql FROM '\musing\M.*\m(current_timestamp|current_date|current_time|localtimestamp|localtime|current_user|session_user)\M'));
        IF col IS NOT NULL THEN
            RAISE EXCEPTION USING ERRCODE = '0A000',
                MESSAGE = format('a column cannot be given another type by way of %s, which would give the rows other values on each node', col),
                HINT = 'Add another column, UPDATE the rows, and exchange the columns'' names.';
        END IF;
    END IF;
END $$;

-- no_such_row makes a statement of apply's fail that does not find the row which it is to change.
CREATE OR REPLACE FUNCTION quorate.no_such_row() RETURNS boolean
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = 'QR001', MESSAGE = 'a row to be changed is not there';
END $$;

-- current_gid returns the GID under which the transaction in progress will be committed. The gateway, which sees the name in
-- a statement's text, has put it where it is found here.
CREATE OR REPLACE FUNCTION quorate.current_gid() RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    gid text := current_setting('quorate.gid', true);
BEGIN
    IF coalesce(gid, '') = '' THEN
        RAISE EXCEPTION USING ERRCODE = '0A000',
            MESSAGE = 'quorate.current_gid() cannot be answered here',
            HINT = 'Call it through the gateway, between BEGIN and COMMIT, in the text of a statement and not in a function or DO.';
    END IF;
    RETURN gid;
END $$;

-- transaction_status returns what became of a transaction, in the same way.
CREATE OR REPLACE FUNCTION quorate.transaction_status(gid text) RETURNS text
LANGUAGE plpgsql VOLATILE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    status text;
BEGIN
    IF gid !~ '^[1-9][0-9]*-[0-9a-f]+-[1-9][0-9]*$' THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = format('%L is not a global transaction id', gid),
            HINT = 'One looks like 2-9f86d081884c7d65-42.';
    END IF;
    SELECT split_part(o, '=', 2) INTO status
      FROM unnest(string_to_array(current_setting('quorate.outcomes', true), ',')) o WHERE split_part(o, '=', 1) = gid;
    IF status IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = '0A000',
            MESSAGE = 'quorate.transaction_status() cannot be answered here',
            HINT = 'Call it through the gateway, in the text of a statement and not in a function or DO, with a constant or a parameter.';
    END IF;
    RETURN status;
END $$;

-- seen returns the rows of one of the views below. They are the sidecar's: the gateway, which sees the view's name in a
-- statement's text, puts them into a setting of the session before the statement. So they are as of now, no table is
-- written for them, and nobody pays for them but who looks.
CREATE OR REPLACE FUNCTION quorate.seen(what text) RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    rows text := current_setting('quorate.seen_' || what, true);
BEGIN
    IF coalesce(rows, '') = '' THEN
        RAISE EXCEPTION USING ERRCODE = '0A000',
            MESSAGE = format('quorate.%s cannot be read here', what),
            HINT = 'Read it through the gateway, by its name with the schema, in the text of a statement and not in a function or view.';
    END IF;
    RETURN rows;
END $$;

CREATE OR REPLACE VIEW quorate.nodes AS
SELECT * FROM jsonb_to_recordset(quorate.seen('nodes')) AS r (
    node integer, state text, role text, accepts_writes boolean, reason text, heard boolean, report_age_seconds float8, lag bigint,
    applied_csn bigint, queue_transactions bigint, commits_per_second float8, aborts_per_second float8, sessions integer,
    postgres_up boolean, postgres_version text, connections integer, max_connections integer, oldest_transaction_seconds float8,
    wal_kept_bytes bigint, version text, uptime_seconds float8, disk_free_bytes bigint, disk_total_bytes bigint,
    gateway text, grpc text, http text, refreshed_at timestamptz, slot_lag_bytes bigint);

CREATE OR REPLACE VIEW quorate.heartbeats AS
SELECT * FROM jsonb_to_recordset(quorate.seen('heartbeats')) AS r (
    hearer integer, heard integer, age_seconds float8, round_trip_seconds float8, loss float8, jitter_seconds float8, refreshed_at timestamptz);

CREATE OR REPLACE VIEW quorate.status AS
SELECT * FROM jsonb_to_recordset(quorate.seen('status')) AS r (
    cluster text, node integer, state text, accepts_writes boolean, quorum boolean, leader integer, term bigint, csn bigint, applied_csn bigint,
    lag bigint, voters integer, voters_heard integer, refreshed_at timestamptz);

CREATE OR REPLACE VIEW quorate.transactions AS
SELECT * FROM jsonb_to_recordset(quorate.seen('transactions')) AS r (
    gid text, node integer, stage text, age_seconds float8, csn bigint, pid integer, refreshed_at timestamptz);

CREATE OR REPLACE VIEW quorate.conflicts AS
SELECT * FROM jsonb_to_recordset(quorate.seen('conflicts')) AS r (
    at timestamptz, kind text, gid text, node integer, winner_csn bigint, winner_gid text, winner_node integer, "table" text, key text, mode text,
    refreshed_at timestamptz);

CREATE OR REPLACE VIEW quorate.events AS
SELECT * FROM jsonb_to_recordset(quorate.seen('events')) AS r (
    at timestamptz, node integer, number bigint, severity text, kind text, about integer, text text, fields jsonb, refreshed_at timestamptz);

GRANT SELECT ON quorate.nodes, quorate.heartbeats, quorate.status, quorate.transactions, quorate.conflicts, quorate.events TO PUBLIC;

DO $$
BEGIN
    -- they fire in the order of their names
    IF NOT EXISTS (SELECT FROM pg_event_trigger WHERE evtname = 'quorate_before_ddl_end') THEN
        CREATE EVENT TRIGGER quorate_before_ddl_end ON ddl_command_end EXECUTE FUNCTION quorate.on_ddl();
        CREATE EVENT TRIGGER quorate_before_drop ON sql_drop EXECUTE FUNCTION quorate.on_ddl();
    END IF;
    IF NOT EXISTS (SELECT FROM pg_event_trigger WHERE evtname = 'quorate_ddl_start') THEN
        CREATE EVENT TRIGGER quorate_ddl_start ON ddl_command_start
            WHEN TAG IN ('ALTER TABLE', 'CREATE EXTENSION', 'ALTER EXTENSION') EXECUTE FUNCTION quorate.on_ddl_start();
    END IF;
    IF NOT EXISTS (SELECT FROM pg_event_trigger WHERE evtname = 'quorate_ddl_end') THEN
        CREATE EVENT TRIGGER quorate_ddl_end ON ddl_command_end EXECUTE FUNCTION quorate.on_ddl_end();
    END IF;
    IF NOT EXISTS (SELECT FROM pg_event_trigger WHERE evtname = 'quorate_drop') THEN
        CREATE EVENT TRIGGER quorate_drop ON sql_drop EXECUTE FUNCTION quorate.on_drop();
    END IF;
    IF NOT EXISTS (SELECT FROM pg_event_trigger WHERE evtname = 'quorate_rewrite') THEN
        CREATE EVENT TRIGGER quorate_rewrite ON table_rewrite EXECUTE FUNCTION quorate.on_rewrite();
    END IF;
    IF NOT EXISTS (SELECT FROM pg_publication WHERE pubname = 'quorate') THEN
        CREATE PUBLICATION quorate FOR ALL TABLES;
    END IF;
END $$;
