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
	l := locator{database: set.Database, hasher: txn.NewHasher(), key: key, relations: make(map[uint32]located)}
	var row rowChange
	for rest := set.Changes; len(rest) > 0; {
		size, n := binary.Uvarint(rest)
		if n <= 0 || size == 0 || size > uint64(len(rest)-n) {
			return Place{}, false, nil // not what capture writes, so nothing is known of it
		}
		message := rest[n : n+int(size)]
		rest = rest[n+int(size):]
		switch message[0] {
		case msgRelation:
			r, err := parseRelation(message, nil)
			if err != nil {
				return Place{}, false, nil
			}
			m, err := catalog.RelationByName(ctx, r.schema, r.name)
			if err != nil {
				return Place{}, false, fmt.Errorf("look up table %s.%s: %w", r.schema, r.name, err)
			}
			if m == nil {
				l.relations[r.oid] = located{r, tableOnly(set.Database, r), &pg.Relation{RootSchema: r.schema, RootName: r.name}}
			} else {
				l.relations[r.oid] = located{r, newPlan(set.Database, r, m), m}
			}
			if place, ok := l.table(l.relations[r.oid]); ok {
				return place, true, nil
			}
		case msgInsert, msgUpdate, msgDelete:
			if row.parse(message) != nil {
				return Place{}, false, nil
			}
			if in, known := l.relations[row.oid]; known {
				if place, ok := l.row(in, &row); ok {
					return place, true, nil
				}
			}
		case msgMessage:
			if place, ok := l.ddl(message); ok {
				return place, true, nil
			}
		}
	}
	return Place{}, false, nil
}

type located struct {
	*relation
	plan *plan
	*pg.Relation
}

type locator struct {
	database  string
	hasher    *txn.Hasher
	key       txn.Key
	relations map[uint32]located
}

// table compares the keys that stand for many rows.
func (l *locator) table(in located) (Place, bool) {
	name := in.RootSchema + "." + in.RootName
	switch l.key {
	case in.plan.table:
		return Place{name, "whole table"}, true
	case in.plan.references:
		return Place{name, "references to the table"}, true
	}
	for _, f := range in.References {
		if l.key == TableKey(l.database, f.ParentSchema, f.ParentName) || l.key == referencesKey(l.database, f.ParentSchema, f.ParentName) {
			return Place{name, "any parent in " + f.ParentSchema + "." + f.ParentName}, true
		}
	}
	return Place{}, false
}

// ddl compares the tables that a DDL message names. A partition's key is its topmost table's, which is not looked up here.
func (l *locator) ddl(message []byte) (Place, bool) {
	var d pg.DDL
	if m, err := parseLogical(message); err != nil || json.Unmarshal(m.content, &d) != nil || d.Tables == nil {
		return Place{}, false
	}
	for _, t := range *d.Tables {
		if l.key == TableKey(l.database, t[0], t[1]) {
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
