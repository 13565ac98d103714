package apply

import (
	"container/list"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/quorate/quorate/txn"
)

// statement is one prepared statement of a session.
type statement struct {
	name     string
	sql      string
	prepared bool
	place    *list.Element
}

// statementCache keeps a session's statements, least recently used first to go.
type statementCache struct {
	limit   int
	bySQL   map[string]*statement
	order   list.List // front: used last
	counter int
	evicted string // name of the statement that must be closed before the next is prepared; at most one at a time
}

// find returns the statement of this text.
func (c *statementCache) find(sql string) *statement {
	if st, ok := c.bySQL[sql]; ok {
		c.order.MoveToFront(st.place)
		return st
	}
	if c.bySQL == nil {
		c.bySQL = map[string]*statement{}
	}
	if len(c.bySQL) >= c.limit {
		oldest := c.order.Remove(c.order.Back()).(*statement)
		delete(c.bySQL, oldest.sql)
		if oldest.prepared {
			c.evicted = oldest.name
		}
	}
	c.counter++
	st := &statement{name: "q" + strconv.Itoa(c.counter), sql: sql}
	st.place = c.order.PushFront(st)
	c.bySQL[sql] = st
	return st
}

func (c *statementCache) clear() {
	clear(c.bySQL)
	c.order.Init()
	c.evicted = ""
}

// relation is a table of a write set as it is here.
type relation struct {
	oid          uint32 // at the origin of the Relation message
	schema, name string
	partitioned  bool
	columns      []relationAttribute // those of the Relation message, in its order
	identity     []int               // the columns that identify a row
	unique       bool                // identity is unique
	keyed        bool                // … and exactly what a unique index here is on, so that there are not two such rows
	ordered      bool                // it has triggers or rules here, which see the order of changes: see gather
	texts        map[string]string   // statement text by shape; bounded by maxShapes
}

// maxShapes bounds the texts remembered for a relation: a table with many TOASTed columns has many combinations.
const maxShapes = 64

type relationAttribute struct {
	name     string
	typeName string
	always   bool   // GENERATED ALWAYS AS IDENTITY: may not be assigned by UPDATE
	equality string // the operator of the key's index, as OPERATOR(…); "" if not in such an index
	exact    bool   // pg_catalog's = holds only between values that print alike
}

// lookupRelation asks for a table's columns. For the index that identifies rows, it finds the equality operator of
// its operator class: with search_path = pg_catalog a plain = may resolve to none (an extension's type) or to
// another (citext's would become text's). A type whose = may hold between values that print differently (numeric,
// float, interval, a non-deterministic collation) is not exact. Where the index has another collation than the column, and the
// column's is not deterministic, what = finds is not what is unique.
const lookupRelation = `SELECT c.relkind, coalesce(a.attname, ''), a.attidentity = 'a',
  a.atttypid = ANY ('{bool,bytea,char,name,int8,int2,int4,text,oid,varchar,date,time,timestamp,timestamptz,uuid}'::regtype[])
    AND coalesce(col.collisdeterministic, true),
  format_type(a.atttypid, a.atttypmod),
  EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = c.oid AND t.tgenabled IN ('A', 'R')) OR c.relhasrules,
  (SELECT format('OPERATOR(%I.%s)', opn.nspname, o.oprname)
   FROM unnest(i.indkey::int2[], i.indclass::oid[], i.indcollation::oid[]) AS k(attnum, opclass, coll)
   JOIN pg_opclass oc ON oc.oid = k.opclass
   JOIN pg_amop ao ON ao.amopfamily = oc.opcfamily AND ao.amopstrategy = 3 AND ao.amoplefttype = oc.opcintype AND ao.amoprighttype = oc.opcintype
   JOIN pg_am am ON am.oid = ao.amopmethod AND am.amname = 'btree'
   JOIN pg_operator o ON o.oid = ao.amopopr JOIN pg_namespace opn ON opn.oid = o.oprnamespace
   WHERE k.attnum = a.attnum AND (k.coll = a.attcollation OR coalesce(col.collisdeterministic, true))),
  coalesce(i.indnkeyatts, 0)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
LEFT JOIN pg_collation col ON col.oid = a.attcollation
LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
  AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END
WHERE n.nspname = $1 AND c.relname = $2 ORDER BY a.attnum`

// relation returns the local table for a Relation message and makes it the current one of its OID.
func (s *session) relation(message []byte) error {
	r, ok := s.relations[string(message)]
	if !ok {
		m, err := parseRelation(message)
		if err != nil {
			return err
		}
		if r, err = s.lookup(m); err != nil {
			return err
		}
		if len(s.relations) >= 4*s.statements.limit {
			clear(s.relations)
		}
		s.relations[string(message)] = r
	}
	for i, known := range s.current {
		if known.oid == r.oid {
			s.current[i] = r
			return nil
		}
	}
	s.current = append(s.current, r)
	return nil
}

func (s *session) find(oid uint32) (*relation, error) {
	for _, r := range s.current {
		if r.oid == oid {
			return r, nil
		}
	}
	return nil, fmt.Errorf("change of a relation that was not described: %w", txn.ErrCorrupt)
}

func (s *session) lookup(m relationMessage) (*relation, error) {
	rows, err := s.query(lookupRelation, m.schema, m.name)
	if err != nil {
		return nil, err
	}
	r := &relation{oid: m.oid, schema: m.schema, name: m.name, texts: map[string]string{}}
	if len(rows) == 0 {
		return nil, mismatch(r, "there is no such table here")
	}
	r.partitioned, r.ordered = rows[0][0] == "p", rows[0][5] == "t"
	local := map[string]relationAttribute{}
	for _, row := range rows {
		if row[1] != "" {
			local[row[1]] = relationAttribute{name: row[1], always: row[2] == "t", exact: row[3] == "t", typeName: row[4], equality: row[6]}
		}
	}
	indexed := 0 // columns of identity that are in the index by which rows are found
	for i, c := range m.columns {
		a, ok := local[c.name]
		if !ok {
			return nil, mismatch(r, fmt.Sprintf("column %q does not exist here", c.name))
		}
		r.columns = append(r.columns, a)
		if c.key {
			r.identity = append(r.identity, i)
			if a.equality != "" {
				indexed++
			}
		}
	}
	if len(m.columns) != len(local) {
		return nil, mismatch(r, fmt.Sprintf("has %d columns at the origin, %d here", len(m.columns), len(local)))
	}
	if m.full && indexed > 0 {
		// The whole old row is sent, but a primary key finds it by an index.
		r.identity = slices.DeleteFunc(r.identity, func(i int) bool { return r.columns[i].equality == "" })
	}
	r.unique = !m.full || indexed > 0
	r.keyed = indexed > 0 && indexed == len(r.identity) && strconv.Itoa(indexed) == rows[0][7] // a generated column is not replicated
	return r, nil
}

func mismatch(r *relation, reason string) error {
	return &Divergence{Table: r.schema + "." + r.name, Cause: errMismatch(reason)}
}

// errMismatch says how a table differs from the origin's.
type errMismatch string

func (e errMismatch) Error() string { return string(e) }

// applyRow adds a row change to the batch.
func (s *session) applyRow(csn txn.CSN, message []byte) error {
	c := &s.change
	if err := c.parse(message); err != nil {
		return err
	}
	r, err := s.find(c.relation)
	if err != nil {
		return err
	}
	if len(c.new) != len(r.columns) && c.operation != 'D' || len(c.old) != len(r.columns) && c.identity != 0 {
		return fmt.Errorf("%s of %d columns, not %d: %w", operationName(c.operation), len(c.new), len(r.columns), txn.ErrCorrupt)
	}
	checked := (s.few || c.operation == 'I') && r.checkable(c)
	s.doubtful = s.doubtful || !checked
	s.settle(r, c.operation == 'I')
	if c.operation == 'I' {
		s.gather(r, csn, message, c.new)
		return s.flushIfFull()
	}
	s.shape, s.params = r.bind(c, s.shape[:0], s.params[:0])
	if checked {
		s.shape = append(s.shape, '!')
	}
	text := r.remember(s.shape, func() string { return r.text(c, checked) })
	s.run(s.statements.find(text), s.params)
	s.expected.push(expectation{csn: csn, relation: r, message: message, rows: 1})
	return s.flushIfFull()
}

// checkable reports whether the server can be made to raise an error unless a change touches exactly one row, so that
// nobody has to see its reply before the COMMIT. What triggers and rules do is theirs.
func (r *relation) checkable(c *rowChange) bool {
	switch {
	case r.ordered, r.partitioned:
		return false
	case c.operation == 'I':
		return true
	case c.operation == 'U' && (r.replaces(c) || !r.assigns(c)):
		return false
	}
	return r.keyed
}

// assigns reports whether an UPDATE assigns anything.
func (r *relation) assigns(c *rowChange) bool {
	for i := range r.columns {
		if r.assigned(c, i) {
			return true
		}
	}
	return false
}

// remember returns the text of the statements of a shape.
func (r *relation) remember(shape []byte, text func() string) string {
	known, ok := r.texts[string(shape)]
	if !ok {
		known = text()
		if len(r.texts) >= maxShapes {
			clear(r.texts)
		}
		r.texts[string(shape)] = known
	}
	return known
}

// located returns the tuple that tells which row is meant: the old one if it was sent, else the new one, whose key is
// unchanged.
func (c *rowChange) located() []column {
	if c.identity != 0 {
		return c.old
	}
	return c.new
}

// assigned reports whether an UPDATE must assign column i: not if it was not sent, nor if it is part of a key that
// did not change, for then the row keeps its index entries.
func (r *relation) assigned(c *rowChange, i int) bool {
	if c.new[i].kind == kindUnchanged {
		return false
	}
	if c.identity == 0 {
		return !slices.Contains(r.identity, i)
	}
	// A GENERATED ALWAYS column can seldom be assigned, and seldom needs to be.
	return !r.columns[i].always || !c.sameAt(i)
}

// sameAt reports whether column i of the old row was sent and equals the new one.
func (c *rowChange) sameAt(i int) bool {
	return c.old[i].kind == c.new[i].kind && string(c.old[i].data) == string(c.new[i].data)
}

// replaces reports whether an UPDATE must be made as DELETE and INSERT: UPDATE cannot assign a GENERATED ALWAYS
// identity column, whatever the value.
func (r *relation) replaces(c *rowChange) bool {
	for i := range r.columns {
		if r.columns[i].always && r.assigned(c, i) {
			return true
		}
	}
	return false
}

// bind returns the shape of an UPDATE or DELETE, which determines its statement's text, and the parameters, in the order
// in which text numbers them.
func (r *relation) bind(c *rowChange, shape []byte, params []column) ([]byte, []column) {
	shape = append(shape, c.operation)
	if c.operation == 'U' {
		all := r.replaces(c)
		if all {
			shape = append(shape, 'R')
		}
		for i := range r.columns {
			switch {
			case all && c.new[i].kind != kindUnchanged, !all && r.assigned(c, i):
				shape = append(shape, '=')
				params = append(params, c.new[i])
			default:
				shape = append(shape, '-')
			}
		}
	}
	tuple := c.located()
	for _, i := range r.identity {
		if tuple[i].kind == kindText {
			shape = append(shape, 't')
			params = append(params, tuple[i])
		} else {
			shape = append(shape, 'n')
		}
	}
	return shape, params
}

// text returns the statement for an UPDATE or DELETE; if checked, it fails unless it touches one row. Values are parameters
// without a type, so that the server takes the column's.
func (r *relation) text(c *rowChange, checked bool) string {
	var b strings.Builder
	param := 0
	next := func() string {
		param++
		return "$" + strconv.Itoa(param)
	}
	switch {
	case c.operation == 'U' && r.replaces(c):
		values := make([]string, len(r.columns))
		for i, a := range r.columns {
			values[i] = "old." + quote(a.name)
			if c.new[i].kind != kindUnchanged {
				values[i] = next() + "::" + a.typeName
			}
		}
		fmt.Fprintf(&b, "WITH old AS (DELETE FROM ONLY %s WHERE %s RETURNING *) ", r.quoted(), r.where(c, next))
		r.insertInto(&b)
		fmt.Fprintf(&b, " SELECT %s FROM old", strings.Join(values, ", "))
	case c.operation == 'U' && !r.assigns(c): // every value that was sent is the key, and that is the same
		fmt.Fprintf(&b, "SELECT FROM ONLY %s WHERE %s FOR NO KEY UPDATE", r.quoted(), r.where(c, next))
	case c.operation == 'U':
		var set []string
		for i, a := range r.columns {
			if r.assigned(c, i) {
				set = append(set, quote(a.name)+" = "+next())
			}
		}
		if checked {
			return r.merge(asUpdated, "UPDATE SET "+strings.Join(set, ", "), r.where(c, next))
		}
		fmt.Fprintf(&b, "UPDATE ONLY %s SET %s WHERE %s", r.quoted(), strings.Join(set, ", "), r.where(c, next))
	case checked:
		return r.merge(asDeleted, "DELETE", r.where(c, next))
	default:
		fmt.Fprintf(&b, "DELETE FROM ONLY %s WHERE %s", r.quoted(), r.where(c, next))
	}
	return b.String()
}

// merge returns an UPDATE or DELETE of one row that fails where there is no such row; that there are not two is for the
// index to see to. Its plan is the plain statement's but for a join with one empty row.
//
// Nothing is ever inserted; but DO NOTHING would be left out of the plan together with its condition, and for a column that is not
// named the planner looks at its default, which may be a function that is not for this session. The table's alias, by which changed
// tells what is done, is also for tables that are called what the other side of the join is.
func (r *relation) merge(alias, action, condition string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "MERGE INTO ONLY %s%s%s WHEN MATCHED THEN %s WHEN NOT MATCHED AND quorate.no_such_row() THEN INSERT (",
		r.quoted(), alias, condition, action)
	r.names(&b)
	b.WriteString(") OVERRIDING SYSTEM VALUE VALUES (NULL" + strings.Repeat(", NULL", len(r.columns)-1) + ")")
	return b.String()
}

// What stands between table and condition in a merge.
const (
	asUpdated = " AS updated USING (SELECT) AS one ON "
	asDeleted = " AS deleted USING (SELECT) AS one ON "
)

func (r *relation) names(b *strings.Builder) {
	for i, a := range r.columns {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(quote(a.name))
	}
}

// insertText returns the statement that inserts that many rows, whose values are its parameters.
func (r *relation) insertText(rows int) string {
	if len(r.columns) == 0 {
		return "INSERT INTO " + r.quoted() + " DEFAULT VALUES"
	}
	var b strings.Builder
	r.insertInto(&b)
	for n := range rows * len(r.columns) {
		switch {
		case n == 0:
			b.WriteString(" VALUES (")
		case n%len(r.columns) == 0:
			b.WriteString("), (")
		default:
			b.WriteString(", ")
		}
		b.WriteString("$" + strconv.Itoa(n+1))
	}
	b.WriteString(")")
	return b.String()
}

func (r *relation) insertInto(b *strings.Builder) {
	fmt.Fprintf(b, "INSERT INTO %s (", r.quoted())
	r.names(b)
	b.WriteString(") OVERRIDING SYSTEM VALUE")
}

// where identifies the row. A row without a unique key may have twins: then it is any one of them, which is why the
// comparison must be exact.
func (r *relation) where(c *rowChange, next func() string) string {
	tuple := c.located()
	var terms []string
	for _, i := range r.identity {
		a := r.columns[i]
		name := quote(a.name)
		switch {
		case tuple[i].kind != kindText:
			terms = append(terms, name+" IS NULL")
		case a.equality != "":
			terms = append(terms, name+" "+a.equality+" "+next())
		case a.exact:
			terms = append(terms, name+" = "+next())
		default: // what the value prints is what was sent; the type may have no equality at all
			terms = append(terms, "format('%s', "+name+") COLLATE \"C\" = "+next()+"::text")
		}
	}
	condition := strings.Join(terms, " AND ")
	if len(terms) == 0 {
		condition = "true"
	}
	if r.unique {
		return condition
	}
	return fmt.Sprintf("ctid = (SELECT ctid FROM ONLY %s WHERE %s LIMIT 1)", r.quoted(), condition)
}

func (r *relation) quoted() string { return quote(r.schema) + "." + quote(r.name) }

func quote(identifier string) string {
	return `"` + strings.ReplaceAll(identifier, `"`, `""`) + `"`
}

// describeKey tells which row a change means, for the operator.
func (r *relation) describeKey(c *rowChange) string {
	tuple := c.located()
	var b strings.Builder
	for _, i := range r.identity {
		if i >= len(tuple) {
			break
		}
		value := "NULL"
		if tuple[i].kind == kindText {
			value = string(tuple[i].data[:min(len(tuple[i].data), 64)])
		}
		if b.Len() > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%s=%s", r.columns[i].name, value)
	}
	return b.String()
}
