package capture

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
)

// Place is what a certification key stands for, for people.
type Place struct {
	Table string // with its schema; empty for the whole database
	Key   string // "(id)=(7)", "unique users_email_key (email)=(a@b)", "parent public.accounts (id)=(7)", "whole table" …
}

// byName is what Locate needs of a catalog.
type byName interface {
	RelationByName(ctx context.Context, schema, name string) (*pg.Relation, error)
}

// Locate finds out what a key of a write set stands for, of whatever node: a key is a hash, so its changes are hashed
// again until one has it. ok is false if none has: the row travelled ahead in a chunk, or the table has been
// changed since. The write set may come from anywhere; only an error is the catalog's. It is slow, and not for every
// transaction.
func Locate(ctx context.Context, catalog byName, set *txn.WriteSet, key txn.Key) (place Place, ok bool, err error) {
	switch key {
	case DatabaseKey(set.Database):
		return Place{Key: "whole database"}, true, nil
	case DDLKey(set.Database):
		return Place{Key: "DDL"}, true, nil
	}
	l := locator{hasher: txn.NewHasher(), key: key}
	err = walk(ctx, catalog, set, func(in located) (done bool) {
		place, ok = l.table(set.Database, in)
		return ok
	}, func(in located, row *rowChange) (done bool) {
		place, ok = l.row(in, row)
		return ok
	}, func(message []byte) (done bool) {
		place, ok = l.ddl(set.Database, message)
		return ok
	})
	if err != nil {
		return Place{}, false, err
	}
	return place, ok, nil
}

// LocateRow tells of the first row of a write set which it is. unique: what matters is a value that it has in a unique
// index; if there are several it is not known which. ok is false if there is none, or if its table has no key.
func LocateRow(ctx context.Context, catalog byName, set *txn.WriteSet, unique bool) (place Place, ok bool, err error) {
	err = walk(ctx, catalog, set, nil, func(in located, row *rowChange) (done bool) {
		place.Table = in.RootSchema + "." + in.RootName
		if in.plan.identity == nil {
			return true
		}
		tuple := row.old // its key is what the row had before
		if tuple == nil {
			tuple = row.new
		}
		place.Key, ok = in.plan.identity.words(in.relation, tuple, nil), true
		if unique && len(in.plan.uniques) > 0 {
			place.Key = "a unique value of " + place.Key
		}
		return true
	}, nil)
	if err != nil {
		return Place{}, false, err
	}
	return place, ok, nil
}

// walk goes through the tables, rows and DDL messages of a write set, in their order, until one function, each of which
// may be nil, reports that it is done, or until something is not what capture writes. An error is the catalog's.
func walk(ctx context.Context, catalog byName, set *txn.WriteSet,
	onTable func(located) bool, onRow func(located, *rowChange) bool, onMessage func([]byte) bool) error {
	relations := make(map[uint32]located)
	var row rowChange
	for rest := set.Changes; len(rest) > 0; {
		size, n := binary.Uvarint(rest)
		if n <= 0 || size == 0 || size > uint64(len(rest)-n) {
			return nil
		}
		message := rest[n : n+int(size)]
		rest = rest[n+int(size):]
		switch message[0] {
		case msgRelation:
			r, err := parseRelation(message, nil)
			if err != nil {
				return nil
			}
			m, err := catalog.RelationByName(ctx, r.schema, r.name)
			if err != nil {
				return fmt.Errorf("look up table %s.%s: %w", r.schema, r.name, err)
			}
			if m == nil {
				relations[r.oid] = located{r, tableOnly(set.Database, r), &pg.Relation{RootSchema: r.schema, RootName: r.name}}
			} else {
				relations[r.oid] = located{r, newPlan(set.Database, r, m), m}
			}
			if onTable != nil && onTable(relations[r.oid]) {
				return nil
			}
		case msgInsert, msgUpdate, msgDelete:
			if row.parse(message) != nil {
				return nil
			}
			if in, known := relations[row.oid]; known && onRow != nil && onRow(in, &row) {
				return nil
			}
		case msgMessage:
			if onMessage != nil && onMessage(message) {
				return nil
			}
		}
	}
	return nil
}

type located struct {
	*relation
	plan *plan
	*pg.Relation
}

type locator struct {
	hasher *txn.Hasher
	key    txn.Key
}

// table compares the keys that stand for many rows.
func (l *locator) table(database string, in located) (Place, bool) {
	name := in.RootSchema + "." + in.RootName
	switch l.key {
	case in.plan.table:
		return Place{name, "whole table"}, true
	case in.plan.references:
		return Place{name, "references to the table"}, true
	}
	for _, f := range in.References {
		if l.key == TableKey(database, f.ParentSchema, f.ParentName) || l.key == referencesKey(database, f.ParentSchema, f.ParentName) {
			return Place{name, "any parent in " + f.ParentSchema + "." + f.ParentName}, true
		}
	}
	return Place{}, false
}

// ddl compares the tables that a DDL message names. A partition's key is its topmost table's, which is not looked up here.
func (l *locator) ddl(database string, message []byte) (Place, bool) {
	var d pg.DDL
	if m, err := parseLogical(message); err != nil || json.Unmarshal(m.content, &d) != nil || d.Tables == nil {
		return Place{}, false
	}
	for _, t := range *d.Tables {
		if l.key == TableKey(database, t[0], t[1]) {
			return Place{t[0] + "." + t[1], "whole table"}, true
		}
	}
	return Place{}, false
}

// row compares the keys of one row.
func (l *locator) row(in located, rc *rowChange) (Place, bool) {
	name := in.RootSchema + "." + in.RootName
	try := func(k *keyPlan, what string) (Place, bool) {
		for _, version := range [][2][]column{{rc.new, rc.old}, {rc.old, nil}} {
			if version[0] == nil {
				continue
			}
			if key, o := k.key(l.hasher, version[0], version[1]); o == known && key == l.key {
				return Place{name, what + k.words(in.relation, version[0], version[1])}, true
			}
		}
		return Place{}, false
	}
	if in.plan.identity != nil {
		if place, ok := try(in.plan.identity, ""); ok {
			return place, true
		}
	}
	for i := range in.plan.uniques {
		if place, ok := try(&in.plan.uniques[i], "unique "+in.Uniques[i].Name+" "); ok {
			return place, true
		}
	}
	for i := range in.plan.parents {
		if place, ok := try(&in.plan.parents[i].rows, "parent of "); ok {
			return place, true
		}
	}
	return Place{}, false
}

// maxShown is how much of a value is shown.
const maxShown = 64

// words writes a key as PostgreSQL's own messages do: "(a, b)=(1, 2)".
func (k *keyPlan) words(r *relation, row, old []column) string {
	if k.coarse {
		return "(any value)"
	}
	var names, values []string
	for _, ref := range k.columns {
		c := row[ref.at]
		if c.kind == columnUnchanged && ref.at < len(old) {
			c = old[ref.at]
		}
		value := "null"
		if c.kind == columnText {
			value = string(c.value)
			if len(value) > maxShown {
				value = strings.ToValidUTF8(value[:maxShown], "") + "…"
			}
		}
		names, values = append(names, r.columns[ref.at]), append(values, value)
	}
	return "(" + strings.Join(names, ", ") + ")=(" + strings.Join(values, ", ") + ")"
}
