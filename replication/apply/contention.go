package apply

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/quorate/quorate/txn"
)

// Blockade is a process that keeps a committed transaction from being applied.
type Blockade struct {
	PID uint32
	// By is the CSN that it holds up: that of the last one if several transactions are applied as one.
	By txn.CSN
	// Seen: the process was found in the way not before. A transaction that it began later is another.
	Seen time.Time
	// Where is set the first time that Evict is called for PID and By, as far as it could be found out.
	Where Contention
}

// Contention is what a process holds and a committed transaction needs.
type Contention struct {
	Table string // with its schema; empty if not known
	Whole bool   // the lock is on the table, not on a row
	// Row is the part of the waiting transaction's write set that holds the row, and CSN whose it is. Nil and 0 if it is
	// not known which.
	Row *txn.WriteSet
	CSN txn.CSN
	// Unique: it waits for the value that its row has in a unique index, not for the row.
	Unique bool
}

// findContention tells where a statement waits. Of a row the server knows the place and not the key: while UPDATE or
// DELETE waits, it has locked the row's place (a "tuple" lock). What stands there is compared with the changes of the
// transaction. An INSERT waits without; then the key is known only if there is no choice. It has to be asked before the
// blocker lets go, and so costs the transaction that waits a round trip or two.
func (m *monitor) findContention(ctx context.Context, b blocked) (Contention, error) {
	rows, err := query(ctx, m.conn, `SELECT n.nspname, c.relname, l.locktype, '(' || l.page || ',' || l.tuple || ')', a.query
FROM (SELECT pg_stat_get_activity.query FROM pg_stat_get_activity($1::int)) a
LEFT JOIN (SELECT * FROM pg_locks WHERE pid = $1::int AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (locktype = 'tuple' OR locktype = 'relation' AND NOT granted) ORDER BY granted LIMIT 1) l ON true
LEFT JOIN pg_class c ON c.oid = l.relation LEFT JOIN pg_namespace n ON n.oid = c.relnamespace`, strconv.FormatUint(uint64(b.pid), 10))
	if err != nil || len(rows) == 0 {
		return Contention{}, err
	}
	schema, name, lock, place, statement := rows[0][0], rows[0][1], rows[0][2], rows[0][3], rows[0][4]
	var where Contention
	if name != "" {
		where.Table = schema + "." + name
	}
	if lock == "relation" {
		where.Whole = true
		return where, nil
	}
	m.p.mu.Lock()
	var items []Item
	if e := b.worker.entry; e != nil && e.last == b.csn && (e.state == stateRunning || e.state == stateCommitting) {
		items = e.items // nothing is merged into it any more
	}
	m.p.mu.Unlock()
	found := candidates(items, statement)
	if len(found) == 0 {
		return where, nil
	}
	if where.Table == "" { // a partition's lock is more exact
		where.Table = found[0].relation.schema + "." + found[0].relation.name
	}
	where.Unique = lock != "tuple"
	if !where.Unique {
		at, err := m.rowAt(ctx, schema, name, place, &found[0].relation)
		if err != nil {
			return where, err
		}
		found = slices.DeleteFunc(found, func(c candidate) bool { return !slices.Equal(c.key, at) })
	}
	// Several changes of one row, in one transaction or in several that are applied as one: it is the first that waits.
	if len(found) == 0 || where.Unique && len(found) > 1 {
		return where, nil
	}
	one := found[0]
	where.CSN, where.Row = one.item.CSN, &txn.WriteSet{GID: one.item.Set.GID, Database: one.item.Set.Database, Changes: slices.Concat(one.changes[0], one.changes[1])}
	return where, nil
}

// candidate is a row change that a statement may stand for.
type candidate struct {
	item     Item
	relation relationMessage
	key      []string  // the values that identify the row, as text; NULL is "NULL"
	changes  [2][]byte // the Relation message and the row's, with their lengths: parts of the write set
}

// maxCandidates bounds how many are looked at: beyond, the row is not known.
const maxCandidates = 10_000

// candidates returns the row changes of the table that a statement of ours changes; of a large transaction, not those that
// travelled ahead.
func candidates(items []Item, statement string) (found []candidate) {
	operation, table := changed(statement)
	var change rowChange
	for _, item := range items {
		var relations []candidate // of the table, by the OID it has here: those that differ in columns come one after another
		for rest := item.Set.Changes; len(rest) > 0; {
			framed := rest
			message, after, err := nextMessage(rest)
			if err != nil {
				return nil
			}
			framed, rest = framed[:len(framed)-len(after)], after
			switch message[0] {
			case 'R':
				m, err := parseRelation(message)
				if err != nil {
					return nil
				}
				relations = slices.DeleteFunc(relations, func(c candidate) bool { return c.relation.oid == m.oid })
				if strings.HasPrefix(table, (&relation{schema: m.schema, name: m.name}).quoted()+" ") {
					relations = append(relations, candidate{item: item, relation: m, changes: [2][]byte{framed}})
				}
			case 'I', 'U', 'D':
				if change.parse(message) != nil {
					return nil
				}
				at := slices.IndexFunc(relations, func(c candidate) bool { return c.relation.oid == change.relation })
				if at < 0 || change.operation != operation {
					continue
				}
				if len(found) == maxCandidates {
					return nil
				}
				one := relations[at]
				for i, c := range change.located() {
					if i < len(one.relation.columns) && one.relation.columns[i].key {
						value := "NULL"
						if c.kind == kindText {
							value = string(c.data)
						}
						one.key = append(one.key, value)
					}
				}
				one.changes[1] = framed
				found = append(found, one)
			}
		}
	}
	return found
}

// changed splits a statement that relation.text has made into the operation and what begins with the table's name.
func changed(statement string) (operation byte, table string) {
	for _, begin := range []struct {
		prefix    string
		operation byte
	}{
		{"INSERT INTO ", 'I'}, {"UPDATE ONLY ", 'U'}, {"DELETE FROM ONLY ", 'D'}, {"WITH old AS (DELETE FROM ONLY ", 'U'}, {"SELECT FROM ONLY ", 'U'},
	} {
		if table, ok := strings.CutPrefix(statement, begin.prefix); ok {
			return begin.operation, table
		}
	}
	if table, ok := strings.CutPrefix(statement, "MERGE INTO ONLY "); ok {
		if strings.Contains(table, asDeleted) {
			return 'D', table
		}
		return 'U', table
	}
	return 0, ""
}

// rowAt returns the identity of the row at a place, as candidates have it; nil if there is none any more. Values are
// written by their types' output functions, as the write set's were: a cast to text may be a function of a user, and this
// session is a superuser's.
func (m *monitor) rowAt(ctx context.Context, schema, name, place string, r *relationMessage) ([]string, error) {
	var columns []string
	for _, c := range r.columns {
		if c.key {
			columns = append(columns, "CASE WHEN "+quote(c.name)+" IS NULL THEN 'NULL' ELSE format('%s', "+quote(c.name)+") END")
		}
	}
	if len(columns) == 0 {
		return nil, nil
	}
	rows, err := query(ctx, m.conn, fmt.Sprintf("SELECT %s FROM ONLY %s WHERE ctid = $1::tid", strings.Join(columns, ", "),
		(&relation{schema: schema, name: name}).quoted()), place)
	if err != nil || len(rows) == 0 {
		return nil, err
	}
	return rows[0], nil
}
