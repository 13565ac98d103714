package capture

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
)

// assembler turns journals into write sets, one at a time. It is kept for its buffers.
type assembler struct {
	database string
	catalog  definitions
	dir      string
	partSize int
	alive    func() // called now and then during long work, so that the server does not give up on us

	keys  *keySet
	asOf  map[uint32]*relation // the description of each relation at this point of the journal
	shown map[uint32]*relation // the description that the output holds
	alone map[*relation]*plan  // plans of relations without a committed definition
	row   rowChange

	// of the write set that is being made
	ctx    context.Context
	tx     *transaction
	set    *txn.WriteSet
	made   map[uint32]bool // the output creates that one of tx.creates
	out    output
	silent int // bytes since alive was called
}

// aliveStep is how many bytes are assembled between two calls of alive.
const aliveStep = 1 << 20

func newAssembler(cfg Config, alive func()) *assembler {
	return &assembler{
		database: cfg.Database, catalog: cfg.Catalog, dir: cfg.SpillDir, partSize: cfg.Limits.PartSize, alive: alive,
		keys:  newKeySet(cfg.Database, cfg.Limits.KeysPerTable),
		asOf:  make(map[uint32]*relation),
		shown: make(map[uint32]*relation),
		alone: make(map[*relation]*plan),
		made:  make(map[uint32]bool),
	}
}

// assemble makes the write set of a complete transaction.
func (a *assembler) assemble(ctx context.Context, m Marker, tx *transaction) (*txn.WriteSet, txn.Parts, error) {
	j := &tx.journal
	size := j.end()
	for _, r := range j.versions {
		size += int64(len(r.framed))
	}
	a.ctx, a.tx, a.silent = ctx, tx, 0
	a.set = &txn.WriteSet{GID: m.GID, XID: m.XID, Database: a.database, Base: m.Base, Seen: m.Seen}
	a.out = output{dir: a.dir, limit: a.partSize, part: make([]byte, 0, min(size, int64(a.partSize)))}
	a.keys.reset()
	clear(a.asOf)
	clear(a.shown)
	clear(a.alone)
	clear(a.made)
	if err := j.records(a.record); err != nil {
		return nil, nil, errors.Join(err, a.out.discard())
	}
	set := a.set
	set.Keys = a.keys.finish()
	set.Chunks = uint32(len(a.out.ends))
	var parts txn.Parts
	set.Changes, parts = a.out.finish()
	return set, parts, nil
}

// record takes one record of the journal.
func (a *assembler) record(record []byte) error {
	if a.silent += len(record); a.silent > aliveStep {
		a.silent = 0
		a.alive()
	}
	if len(record) == 0 {
		return errJournal
	}
	switch record[0] {
	case 0:
		i, n := binary.Uvarint(record[1:])
		if n <= 0 || i >= uint64(len(a.tx.journal.versions)) {
			return errJournal
		}
		a.asOf[a.tx.journal.versions[i].oid] = a.tx.journal.versions[i]
		return nil
	case msgTruncate:
		a.set.Barrier = true
		for c := (cursor{rest: record[6:]}); len(c.rest) > 0; {
			p, err := a.relation(c.uint32())
			if err != nil {
				return err
			}
			a.keys.truncate(p)
		}
	case msgMessage:
		a.set.Barrier = true
		creates, err := a.ddl(record)
		if err != nil || a.made[creates] {
			return err
		}
		if creates != 0 {
			a.made[creates] = true
		}
	default:
		a.set.Rows++
		if err := a.row.parse(record); err != nil {
			return err
		}
		p, err := a.relation(a.row.oid)
		if err != nil {
			return err
		}
		a.keys.change(p, &a.row)
	}
	return a.out.message(record)
}

// relation sees to it that the output creates a relation, if the transaction has, and describes it as of this point, and returns
// its plan.
func (a *assembler) relation(oid uint32) (*plan, error) {
	if create, ok := a.tx.creates[oid]; ok && !a.made[oid] {
		a.made[oid] = true
		if err := a.out.message(create); err != nil {
			return nil, err
		}
	}
	r := a.asOf[oid]
	if r == nil {
		return nil, errJournal
	}
	if shown := a.shown[oid]; shown != r {
		a.shown[oid] = r
		if shown == nil || !bytes.Equal(shown.framed, r.framed) {
			if err := a.out.write(r.framed); err != nil {
				return nil, err
			}
		}
	}
	return a.plan(r)
}

// plan returns how to make the keys of a relation. One that the catalog does not know, the transaction has made itself: nobody
// else can see it. If it has done so behind our back (by EXPLAIN ANALYZE CREATE TABLE AS, in a function), the other nodes will not
// have it.
func (a *assembler) plan(r *relation) (*plan, error) {
	if p := a.alone[r]; p != nil {
		return p, nil
	}
	generation := a.catalog.Generation()
	if r.plan != nil && r.generation == generation && a.catalog.Stable() {
		return r.plan, nil
	}
	m, err := a.catalog.Relation(a.ctx, r.oid)
	if err != nil {
		return nil, err
	}
	if m == nil && !a.tx.ddl {
		return nil, fmt.Errorf("no event trigger has seen the statement that made table %s.%s", r.schema, r.name)
	}
	if m == nil {
		p := tableOnly(a.database, r)
		a.alone[r] = p
		return p, nil
	}
	r.plan, r.generation = newPlan(a.database, r, m), generation
	return r.plan, nil
}

// ddl adds the keys of a DDL message, and returns which table it creates if there may be rows of that before.
func (a *assembler) ddl(record []byte) (creates uint32, err error) {
	m, err := parseLogical(record)
	if err != nil {
		return 0, err
	}
	var d pg.DDL
	if err := json.Unmarshal(m.content, &d); err != nil {
		return 0, fmt.Errorf("%w: message %s: %w", txn.ErrCorrupt, pg.PrefixDDL, err)
	}
	if d.Tables == nil {
		a.keys.ddlAnywhere()
		return d.Creates, nil
	}
	a.keys.ddl()
	for _, t := range *d.Tables {
		// The committed definition, if there is one, says of which table this is a partition.
		schema, name := t[0], t[1]
		r, err := a.catalog.RelationByName(a.ctx, schema, name)
		if err != nil {
			return 0, err
		}
		if r != nil {
			schema, name = r.RootSchema, r.RootName
		}
		a.keys.takeTable(TableKey(a.database, schema, name))
	}
	return d.Creates, nil
}

var errJournal = fmt.Errorf("%w: journal of a transaction", txn.ErrCorrupt)
