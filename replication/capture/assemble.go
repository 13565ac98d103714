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
	ctx      context.Context
	set      *txn.WriteSet
	versions []*relation
	out      output
	silent   int // bytes since alive was called
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
	}
}

// assemble makes the write set of a complete transaction.
func (a *assembler) assemble(ctx context.Context, m Marker, j *journal) (*txn.WriteSet, txn.Parts, error) {
	size := j.end()
	for _, r := range j.versions {
		size += int64(len(r.framed))
	}
	a.ctx, a.versions, a.silent = ctx, j.versions, 0
	a.set = &txn.WriteSet{GID: m.GID, XID: m.XID, Database: a.database, Base: m.Base, Seen: m.Seen}
	a.out = output{dir: a.dir, limit: a.partSize, part: make([]byte, 0, min(size, int64(a.partSize)))}
	a.keys.reset()
	clear(a.asOf)
	clear(a.shown)
	clear(a.alone)
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
		if n <= 0 || i >= uint64(len(a.versions)) {
			return errJournal
		}
		a.asOf[a.versions[i].oid] = a.versions[i]
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
		if err := a.ddl(record); err != nil {
			return err
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

// relation sees to it that the output describes a relation as of this point, and returns its plan.
func (a *assembler) relation(oid uint32) (*plan, error) {
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

// plan returns how to make the keys of a relation. One that the catalog does not know, the transaction has made
// itself: nobody else can see it.
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
	if m == nil {
		p := tableOnly(a.database, r)
		a.alone[r] = p
		return p, nil
	}
	r.plan, r.generation = newPlan(a.database, r, m), generation
	return r.plan, nil
}

// ddl adds the keys of a DDL message.
func (a *assembler) ddl(record []byte) error {
	m, err := parseLogical(record)
	if err != nil {
		return err
	}
	var d pg.DDL
	if err := json.Unmarshal(m.content, &d); err != nil {
		return fmt.Errorf("%w: message %s: %w", txn.ErrCorrupt, pg.PrefixDDL, err)
	}
	if d.Tables == nil {
		a.keys.ddlAnywhere()
		return nil
	}
	a.keys.ddl()
	for _, t := range *d.Tables {
		// The committed definition, if there is one, says of which table this is a partition.
		schema, name := t[0], t[1]
		r, err := a.catalog.RelationByName(a.ctx, schema, name)
		if err != nil {
			return err
		}
		if r != nil {
			schema, name = r.RootSchema, r.RootName
		}
		a.keys.takeTable(TableKey(a.database, schema, name))
	}
	return nil
}

var errJournal = fmt.Errorf("%w: journal of a transaction", txn.ErrCorrupt)
