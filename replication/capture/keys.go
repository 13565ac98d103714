package capture

import (
	"bytes"
	"slices"
	"strings"

	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
)

// The kinds of keys: what the first part of each hash says.
const (
	kindDatabase   = "database"
	kindDDL        = "ddl"
	kindTable      = "table"
	kindReferences = "references"
	kindRow        = "row"
	kindIndex      = "index"
)

// DatabaseKey is used by every transaction that writes rows (IX) and by DDL of which it is not known what tables it
// concerns (X).
func DatabaseKey(database string) txn.Key { return keyOf(kindDatabase, database) }

// DDLKey is used in mode X by all DDL of a database, so that no two such transactions pass each other.
func DDLKey(database string) txn.Key { return keyOf(kindDDL, database) }

// TableKey is a table's whole-table key. A partition is named by its topmost table.
func TableKey(database, schema, name string) txn.Key {
	return keyOf(kindTable, database, schema, name)
}

// referencesKey stands for "some parent row of this table that a foreign key may refer to". A transaction that takes
// such rows away uses it in mode R, and one whose new child rows cannot name their parents by key uses it in mode X:
// so these two meet, judged from the base as a foreign key must be, while takers do not meet each other.
func referencesKey(database, schema, name string) txn.Key {
	return keyOf(kindReferences, database, schema, name)
}

func keyOf(parts ...string) txn.Key {
	h := txn.NewHasher()
	for _, p := range parts {
		h.String(p)
	}
	return h.Key()
}

// plan says how to make the keys of a table's rows; it joins the stream's description with the catalog's.
type plan struct {
	table      txn.Key // whole-table key
	references txn.Key // referencesKey
	// whole: nothing is known of the table, or it is being changed: its rows have no keys of their own.
	whole bool
	// identity is nil if rows cannot be told apart by key.
	identity   *keyPlan
	uniques    []keyPlan
	parents    []parentPlan
	deferred   bool // one of uniques is
	referenced bool
	// elsewhere: foreign keys refer to columns whose old values the stream does not hold.
	elsewhere bool

	serial uint64 // of the write set in which slot is the plan's place
	slot   int
}

// keyPlan makes the keys of one index.
type keyPlan struct {
	prefix  txn.Key     // hash of the index's name, or its table and columns
	coarse  bool        // values cannot be compared here: prefix is the key of all rows
	columns []columnRef // in the order of the columns' names
	nulls   bool        // NULL equals NULL
	mode    txn.Mode
}

type columnRef struct {
	at    int // in the stream's tuple
	class pg.Class
}

// parentPlan makes the keys by which new rows refer to a parent.
type parentPlan struct {
	table, references txn.Key
	rows              keyPlan
}

// tableOnly is the plan of a table that no one else can see yet.
func tableOnly(database string, r *relation) *plan {
	return &plan{table: TableKey(database, r.schema, r.name), references: referencesKey(database, r.schema, r.name), whole: true}
}

// newPlan joins r and m. A column that the stream does not hold (a generated one) cannot be compared.
func newPlan(database string, r *relation, m *pg.Relation) *plan {
	p := &plan{
		table:      TableKey(database, m.RootSchema, m.RootName),
		references: referencesKey(database, m.RootSchema, m.RootName),
		referenced: m.Referenced,
		elsewhere:  m.ReferencedElsewhere,
	}
	if len(m.Identity) > 0 {
		k := rowPlan(database, m.RootSchema, m.RootName, r, m.Identity, m.Identity)
		p.identity = &k
	}
	for _, u := range m.Uniques {
		k := keyPlan{prefix: keyOf(kindIndex, database, m.RootSchema, m.RootName, u.Name), coarse: true}
		if u.Plain {
			k = rowPlan(database, m.RootSchema, m.RootName, r, u.Columns, u.Columns)
		}
		k.nulls = u.NullsEqual
		k.mode = txn.ModeUnique
		if u.Deferred {
			k.mode = txn.ModeUniqueDeferred
			p.deferred = true
		}
		p.uniques = append(p.uniques, k)
	}
	for _, f := range m.References {
		pp := parentPlan{
			table:      TableKey(database, f.ParentSchema, f.ParentName),
			references: referencesKey(database, f.ParentSchema, f.ParentName),
			rows:       rowPlan(database, f.ParentSchema, f.ParentName, r, f.Columns, f.Parent),
		}
		pp.rows.coarse = pp.rows.coarse || !f.Plain
		if !slices.ContainsFunc(p.parents, func(q parentPlan) bool {
			return q.table == pp.table && q.rows.prefix == pp.rows.prefix && slices.Equal(q.rows.columns, pp.rows.columns)
		}) {
			p.parents = append(p.parents, pp) // the partitions of a parent each have a copy of the constraint
		}
	}
	return p
}

// rowPlan makes the plan of the key over columns of the table schema.name, whose values are in r's columns from:
// the same columns for the table's own indexes, the child's for a foreign key. Sorting by name gives a foreign key
// and its parent's index the same key.
func rowPlan(database, schema, name string, r *relation, from, columns []pg.IndexColumn) keyPlan {
	order := make([]int, len(columns))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return strings.Compare(columns[a].Name, columns[b].Name) })
	var k keyPlan
	parts := []string{kindRow, database, schema, name}
	for _, i := range order {
		at := slices.Index(r.columns, from[i].Name)
		class := columns[i].Class
		if at < 0 || class == pg.ClassOpaque || class != from[i].Class {
			k.coarse = true
		}
		k.columns = append(k.columns, columnRef{at, class})
		parts = append(parts, columns[i].Name)
	}
	k.prefix = keyOf(parts...)
	return k
}

// outcome says what became of a key's values.
type outcome uint8

const (
	known     outcome = iota
	null              // a NULL, which equals nothing
	unchanged         // the update left all of the columns as they were, and out of the stream
	partly            // some, so that the key cannot be made
)

// key hashes the values of a row, taking what an update left out from the old row where that was sent.
func (k *keyPlan) key(h *txn.Hasher, row, old []column) (txn.Key, outcome) {
	if k.coarse {
		return k.prefix, known
	}
	h.Reset()
	h.Bytes(k.prefix[:])
	missing, isNull := 0, false
	for _, ref := range k.columns {
		if ref.at >= len(row) {
			missing++
			continue
		}
		c := row[ref.at]
		if c.kind == columnUnchanged && ref.at < len(old) && old[ref.at].kind == columnText {
			c = old[ref.at]
		}
		switch c.kind {
		case columnText:
			h.Bytes(normalise(ref.class, c.value))
		case columnNull:
			isNull = true
			h.Null()
		default:
			missing++
		}
	}
	switch {
	case isNull && !k.nulls:
		return txn.Key{}, null
	case missing == len(k.columns):
		return txn.Key{}, unchanged
	case missing > 0:
		return txn.Key{}, partly
	}
	return h.Key(), known
}

// normalise returns the part of a value's text by which the server compares it.
func normalise(class pg.Class, value []byte) []byte {
	switch class {
	case pg.ClassNumber:
		if bytes.IndexByte(value, '.') >= 0 {
			value = bytes.TrimRight(value, "0")
			value = bytes.TrimSuffix(value, []byte("."))
		}
		if string(value) == "-0" {
			value = value[1:]
		}
	case pg.ClassBlank:
		value = bytes.TrimRight(value, " ")
	}
	return value
}

// set is a slice without repetition. A small one is searched, a large one has a map beside it.
type set[K comparable] struct {
	items []K
	index map[K]struct{}
}

// linear is how many items are searched one by one.
const linear = 24

func (s *set[K]) has(k K) bool {
	if len(s.items) <= linear {
		return slices.Contains(s.items, k)
	}
	_, ok := s.index[k]
	return ok
}

// add reports whether k is new.
func (s *set[K]) add(k K) bool {
	if s.has(k) {
		return false
	}
	s.items = append(s.items, k)
	switch n := len(s.items); {
	case n > linear+1:
		s.index[k] = struct{}{}
	case n == linear+1:
		s.reindex()
	}
	return true
}

func (s *set[K]) reindex() {
	if s.index == nil {
		s.index = make(map[K]struct{})
	}
	clear(s.index)
	for _, k := range s.items {
		s.index[k] = struct{}{}
	}
}

func (s *set[K]) remove(match func(K) bool) {
	s.items = slices.DeleteFunc(s.items, match)
	if len(s.items) > linear {
		s.reindex()
	}
}

func (s *set[K]) reset() { s.items = s.items[:0] }

// keySet collects the keys of one write set. It is used again for the next, so that a small set allocates only its
// result.
type keySet struct {
	database, ddlKey txn.Key
	perTable, total  int // bounds on row keys

	hasher   *txn.Hasher
	serial   uint64 // of this write set
	tables   map[txn.Key]*tableState
	plans    []planState
	fixed    set[txn.KeyUse] // keys of whole tables: they are few and never given up
	rows     set[rowKey]
	merged   set[txn.KeyUse] // rows without their tables, in finish
	allWhole bool
}

type tableState struct {
	key   txn.Key
	rows  int
	whole bool // X on key stands for all its rows
}

type planState struct {
	plan    *plan
	table   *tableState
	written bool // the keys of its parents' tables are there
	whole   bool // the keys that stand for its rows' parents are there
	taken   bool // so is the one for rows that were referred to
}

type rowKey struct {
	txn.KeyUse
	table *tableState
}

func newKeySet(database string, perTable int) *keySet {
	return &keySet{database: DatabaseKey(database), ddlKey: DDLKey(database), perTable: perTable, total: 4 * perTable,
		hasher: txn.NewHasher(), tables: make(map[txn.Key]*tableState)}
}

func (k *keySet) reset() {
	k.serial++
	clear(k.tables)
	k.plans = k.plans[:0]
	k.fixed.reset()
	k.rows.reset()
	k.allWhole = false
}

func (k *keySet) fix(key txn.Key, mode txn.Mode) { k.fixed.add(txn.KeyUse{Key: key, Mode: mode}) }

func (k *keySet) table(key txn.Key) *tableState {
	t := k.tables[key]
	if t == nil {
		t = &tableState{key: key}
		k.tables[key] = t
	}
	return t
}

// use finds or makes the state of a plan.
func (k *keySet) use(p *plan) *planState {
	if p.serial == k.serial {
		return &k.plans[p.slot]
	}
	p.serial, p.slot = k.serial, len(k.plans)
	k.fix(k.database, txn.ModeIntent)
	k.fix(p.table, txn.ModeIntent)
	k.plans = append(k.plans, planState{plan: p, table: k.table(p.table)})
	if p.whole || k.allWhole {
		k.takeTable(p.table)
	}
	return &k.plans[p.slot]
}

func (k *keySet) add(t *tableState, key txn.Key, mode txn.Mode) {
	if t.whole || !k.rows.add(rowKey{txn.KeyUse{Key: key, Mode: mode}, t}) {
		return
	}
	t.rows++
	if t.rows > k.perTable {
		k.takeTable(t.key)
	} else if len(k.rows.items) > k.total {
		largest := t
		for _, other := range k.tables {
			if other.rows > largest.rows {
				largest = other
			}
		}
		k.takeTable(largest.key)
	}
}

// takeTable replaces the row keys of a table, those made and those to come, by X on the table. What its rows refer
// to is then not named either.
func (k *keySet) takeTable(key txn.Key) {
	t := k.table(key)
	if !t.whole {
		t.whole = true
		k.fix(key, txn.ModeExclusive)
		if t.rows > 0 {
			t.rows = 0
			k.rows.remove(func(r rowKey) bool { return r.table == t })
		}
	}
	for i := range k.plans {
		if k.plans[i].table == t && k.plans[i].written {
			k.takeParents(&k.plans[i])
		}
	}
}

func (k *keySet) takeParents(s *planState) {
	if s.whole {
		return
	}
	s.whole = true
	for i := range s.plan.parents {
		k.fix(s.plan.parents[i].references, txn.ModeExclusive)
	}
}

// takeReferred says that a row is gone which others may refer to.
func (k *keySet) takeReferred(s *planState) {
	if s.plan.referenced && !s.taken {
		s.taken = true
		k.fix(s.plan.references, txn.ModeReference)
	}
}

// change adds the keys of a row change.
func (k *keySet) change(p *plan, rc *rowChange) {
	s := k.use(p)
	gone := rc.kind == msgDelete || rc.old != nil // the old identity, or perhaps not: see below
	if rc.kind != msgDelete && !s.written {
		s.written = true
		for i := range p.parents {
			// Whoever takes the parents' whole table must meet the children too.
			k.fix(p.parents[i].table, txn.ModeReference)
		}
		if p.deferred {
			k.fix(p.table, txn.ModeReference) // judged from the base against X of the table
		}
		if s.table.whole {
			k.takeParents(s)
		}
	}
	if s.table.whole {
		if gone {
			k.takeReferred(s)
		}
		return
	}
	switch {
	case p.identity == nil:
		if rc.kind != msgInsert {
			k.takeTable(p.table)
		}
	case rc.kind == msgDelete:
		k.identity(s, rc.old, nil, txn.ModeExclusive)
	default:
		k.identity(s, rc.new, rc.old, txn.ModeWrite)
		if rc.old != nil {
			gone = p.identity.moved(rc)
			if gone {
				k.identity(s, rc.old, nil, txn.ModeExclusive)
			}
		}
	}
	if gone {
		k.takeReferred(s)
	}
	if p.elsewhere && rc.kind != msgInsert {
		k.takeTable(p.table)
	}
	if rc.kind == msgDelete {
		return
	}
	for i := range p.uniques {
		switch key, o := p.uniques[i].key(k.hasher, rc.new, rc.old); o {
		case known:
			k.add(s.table, key, p.uniques[i].mode)
		case partly:
			k.takeTable(p.table)
		}
	}
	for i := range p.parents {
		parent := &p.parents[i]
		if parent.rows.anyNull(rc.new) {
			continue
		}
		switch key, o := parent.rows.key(k.hasher, rc.new, rc.old); {
		case parent.rows.coarse, o == partly:
			k.fix(parent.references, txn.ModeExclusive)
		case o == known:
			k.add(s.table, key, txn.ModeReference)
		}
	}
}

// identity adds the key of a row. Its columns are never NULL, and the server sends the old ones whenever the new ones
// are left out; a stream that breaks this gets the coarsest key.
func (k *keySet) identity(s *planState, row, old []column, mode txn.Mode) {
	key, o := s.plan.identity.key(k.hasher, row, old)
	if o != known {
		k.takeTable(s.plan.table)
		return
	}
	k.add(s.table, key, mode)
}

// moved reports whether an update changed the key. Values that differ in their text only count as changed.
func (k *keyPlan) moved(rc *rowChange) bool {
	for _, ref := range k.columns {
		if ref.at < 0 || ref.at >= len(rc.old) || ref.at >= len(rc.new) {
			return true
		}
		o, n := rc.old[ref.at], rc.new[ref.at]
		if n.kind != columnUnchanged && (o.kind != n.kind || !bytes.Equal(normalise(ref.class, o.value), normalise(ref.class, n.value))) {
			return true
		}
	}
	return false
}

// anyNull reports whether one of the columns is NULL, so that a foreign key does not bind the row.
func (k *keyPlan) anyNull(row []column) bool {
	for _, ref := range k.columns {
		if ref.at >= 0 && ref.at < len(row) && row[ref.at].kind == columnNull {
			return true
		}
	}
	return false
}

// truncate adds the keys of one truncated table.
func (k *keySet) truncate(p *plan) {
	k.fix(k.database, txn.ModeIntent)
	k.fix(p.table, txn.ModeExclusive)
}

// ddl adds the key of every DDL statement.
func (k *keySet) ddl() { k.fix(k.ddlKey, txn.ModeExclusive) }

// ddlAnywhere adds the keys of DDL that may concern any table.
func (k *keySet) ddlAnywhere() {
	k.ddl()
	k.fix(k.database, txn.ModeExclusive)
	if k.allWhole {
		return
	}
	k.allWhole = true
	for i := range k.plans {
		k.takeTable(k.plans[i].plan.table)
	}
}

// finish returns the keys: none twice, no IX beside X.
func (k *keySet) finish() []txn.KeyUse {
	uses := make([]txn.KeyUse, 0, len(k.fixed.items)+len(k.rows.items))
	for _, u := range k.fixed.items {
		if u.Mode != txn.ModeIntent || !k.fixed.has(txn.KeyUse{Key: u.Key, Mode: txn.ModeExclusive}) {
			uses = append(uses, u)
		}
	}
	// Two tables may have the same row key (two children of one parent).
	k.merged.reset()
	for _, r := range k.rows.items {
		if len(k.tables) == 1 || k.merged.add(r.KeyUse) {
			uses = append(uses, r.KeyUse)
		}
	}
	return uses
}
