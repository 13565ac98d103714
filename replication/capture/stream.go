package capture

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
)

// maxMessage is the largest single change (bytes) that can be replicated. A larger one must not become one entry of
// the log.
const maxMessage = 32 << 20

// definitions is what a stream asks of pg.Catalog.
type definitions interface {
	Relation(ctx context.Context, oid uint32) (*pg.Relation, error)
	RelationByName(ctx context.Context, schema, name string) (*pg.Relation, error)
	Generation() uint64
	Stable() bool
	Invalidate()
}

var _ definitions = (*pg.Catalog)(nil)

// stream is what one replication connection has told so far. It does no network I/O; one goroutine uses it, and it
// ends with its connection, because on the next one the server begins every open transaction anew.
type stream struct {
	database string
	token    string
	sink     Sink
	catalog  definitions
	limits   Limits
	dir      string
	log      *slog.Logger
	metrics  *metrics

	open      map[uint32]*transaction // streamed, by top-level xid
	current   *transaction            // of the block that is being received
	streamed  bool                    // current's messages carry a (sub)transaction's xid
	committed map[uint32]*relation    // descriptions that a transaction outside a stream may rely on
	interned  map[uint32]*relation    // the latest of each relation, so that a repeated one is not parsed again
	types     []byte                  // framed Type messages that belong to the next description
	memory    int64                   // bytes of all journals outside files
	free      []*transaction
	assembler *assembler
}

// transaction is an open transaction of this server.
type transaction struct {
	xid       uint32
	journal   journal
	relations map[uint32]*relation // the latest descriptions in its stream
	// seal is the latest one if nothing came after it, else zero.
	seal txn.Seal
	ddl  bool
	// creates holds the DDL messages that go before the first row of a table, by its oid.
	creates map[uint32][]byte
	// floating: a DDL message did not say to which subtransaction it belongs.
	floating bool
	changes  uint64 // outside a stream, and after the write set was handed over: the journal is not kept then
	count    bool   // only count changes
	taken    bool   // the write set was handed over
	err      error  // why it cannot be captured; its changes were dropped
}

func newStream(cfg Config, m *metrics, alive func()) *stream {
	return &stream{
		database: cfg.Database,
		token:    cfg.Token, sink: cfg.Sink, catalog: cfg.Catalog, limits: cfg.Limits, dir: cfg.SpillDir, log: cfg.Logger,
		metrics:   m,
		open:      make(map[uint32]*transaction),
		committed: make(map[uint32]*relation),
		interned:  make(map[uint32]*relation),
		assembler: newAssembler(cfg, alive),
	}
}

// close forgets everything.
func (s *stream) close() {
	for _, tx := range s.open {
		s.end(tx)
	}
	clear(s.open)
	if s.current != nil && !s.streamed {
		s.end(s.current)
	}
	s.current = nil
}

// receive takes one pgoutput message, sent at the given time. It keeps nothing of body, but may write into it. An error means that the
// stream is not understood, and nothing after it can be.
func (s *stream) receive(ctx context.Context, body []byte, sent time.Time) error {
	if len(body) == 0 {
		return malformed(body)
	}
	c := cursor{rest: body[1:]}
	switch kind := body[0]; kind {
	case msgStreamStart:
		xid := c.uint32()
		c.byte() // first segment
		if c.short || s.current != nil || xid == 0 {
			return malformed(body)
		}
		tx := s.open[xid]
		if tx == nil {
			tx = s.begin(xid)
			s.open[xid] = tx
			s.metrics.open.Set(float64(len(s.open)))
		}
		s.current, s.streamed = tx, true
	case msgStreamStop:
		if s.current == nil || !s.streamed {
			return malformed(body)
		}
		s.current = nil
	case msgStreamAbort:
		xid, sub := c.uint32(), c.uint32()
		if c.short || s.current != nil {
			return malformed(body)
		}
		s.abort(xid, sub)
	case msgStreamCommit:
		xid := c.uint32()
		c.byte() // flags
		lsn := txn.LSN(c.uint64())
		c.take(16) // end, time
		if c.short || s.current != nil {
			return malformed(body)
		}
		if tx := s.open[xid]; tx != nil {
			delete(s.open, xid)
			s.metrics.open.Set(float64(len(s.open)))
			s.commit(tx, lsn)
		}
	case msgBegin:
		c.take(16) // LSN, time
		xid := c.uint32()
		if c.short || s.current != nil {
			return malformed(body)
		}
		s.current, s.streamed = s.begin(xid), false
		s.current.count = true
	case msgCommit:
		c.byte() // flags
		lsn := txn.LSN(c.uint64())
		if c.short || s.current == nil || s.streamed {
			return malformed(body)
		}
		tx := s.current
		s.current = nil
		s.commit(tx, lsn)
	case msgOrigin:
		if s.current == nil {
			return malformed(body)
		}
	case msgMessage:
		if s.current == nil {
			return s.message(ctx, body, sent)
		}
		return s.inTransaction(ctx, kind, body, c, sent)
	case msgRelation, msgType, msgInsert, msgUpdate, msgDelete, msgTruncate:
		if s.current == nil {
			return malformed(body)
		}
		return s.inTransaction(ctx, kind, body, c, sent)
	default:
		return malformed(body)
	}
	return nil
}

// inTransaction takes a message of the current transaction. Where a stream's message has its (sub)transaction's xid
// between kind and body, the kind is written over the last byte of that: what follows is protocol version 1.
func (s *stream) inTransaction(ctx context.Context, kind byte, body []byte, c cursor, sent time.Time) error {
	xid := s.current.xid
	if s.streamed {
		xid = c.uint32()
		if c.short || xid == 0 {
			return malformed(body)
		}
		body = body[4:]
		body[0] = kind
	}
	switch kind {
	case msgMessage:
		return s.message(ctx, body, sent)
	case msgType:
		s.types = appendFramed(s.types, body)
		return nil
	case msgRelation:
		return s.describe(body)
	case msgTruncate:
		return s.truncated(xid, body)
	default:
		return s.changed(xid, body, c)
	}
}

func (s *stream) begin(xid uint32) *transaction {
	var tx *transaction
	if n := len(s.free); n > 0 {
		tx = s.free[n-1]
		s.free = s.free[:n-1]
	} else {
		tx = &transaction{relations: make(map[uint32]*relation)}
	}
	tx.xid = xid
	return tx
}

// end gives back what a transaction holds.
func (s *stream) end(tx *transaction) {
	s.drop(tx)
	relations := tx.relations
	clear(relations)
	*tx = transaction{journal: tx.journal, relations: relations}
	if len(s.free) < 256 {
		s.free = append(s.free, tx)
	}
}

// drop gives back the transaction's changes.
func (s *stream) drop(tx *transaction) {
	s.memory -= int64(len(tx.journal.tail))
	s.metrics.memory.Set(float64(s.memory))
	if err := tx.journal.reset(); err != nil {
		// The file is unlinked and will not be read again, so that nothing depends on it.
		s.log.Warn("close spill file", logkey.Error, err)
	}
}

// fail makes a transaction one that cannot commit through the cluster; the stream goes on.
func (s *stream) fail(tx *transaction, err error) {
	s.drop(tx)
	tx.err, tx.count = err, true
}

func (s *stream) abort(xid, sub uint32) {
	tx := s.open[xid]
	if tx == nil {
		return
	}
	if sub == xid {
		delete(s.open, xid)
		s.metrics.open.Set(float64(len(s.open)))
		s.end(tx)
		return
	}
	// The seal itself may have been in there: the server gives every message the top-level xid.
	tx.seal = txn.Seal{}
	if tx.floating {
		s.fail(tx, fmt.Errorf("a savepoint was rolled back, and a message %s does not tell whether it belonged to that", pg.PrefixDDL))
		return
	}
	before := len(tx.journal.tail)
	tx.journal.abort(sub)
	s.memory += int64(len(tx.journal.tail) - before)
}

func (s *stream) commit(tx *transaction, lsn txn.LSN) {
	for oid, r := range tx.relations {
		s.committed[oid] = r
	}
	if tx.ddl {
		s.catalog.Invalidate()
	}
	changes := tx.changes + tx.journal.changes()
	if changes > 0 && (tx.taken || tx.seal.GID.IsZero()) {
		s.metrics.strays.Inc()
		s.sink.Stray(tx.xid, lsn, changes)
	}
	s.end(tx)
}

// describe takes a Relation message.
func (s *stream) describe(body []byte) error {
	oid := (&cursor{rest: body[1:]}).uint32()
	r := s.interned[oid]
	if r == nil || !bytes.Equal(r.message, body) || len(r.framed) != len(s.types)+framedLen(len(body)) || !bytes.HasPrefix(r.framed, s.types) {
		var err error
		if r, err = parseRelation(body, s.types); err != nil {
			return err
		}
		s.interned[oid] = r
	}
	s.types = s.types[:0]
	tx := s.current
	tx.relations[oid] = r
	if !r.local && !tx.count {
		before := len(tx.journal.tail)
		tx.journal.describe(r)
		s.memory += int64(len(tx.journal.tail) - before)
	}
	return nil
}

func framedLen(n int) int {
	var b [binary.MaxVarintLen64]byte
	return n + binary.PutUvarint(b[:], uint64(n))
}

// relation finds the description of a relation that a message of the current transaction names.
func (s *stream) relation(oid uint32) (*relation, error) {
	tx := s.current
	if r := tx.relations[oid]; r != nil {
		return r, nil
	}
	r := s.committed[oid]
	if r == nil {
		return nil, fmt.Errorf("%w: change of relation %d, which the stream has not described", txn.ErrCorrupt, oid)
	}
	tx.relations[oid] = r
	if !r.local && !tx.count {
		before := len(tx.journal.tail)
		tx.journal.describe(r)
		s.memory += int64(len(tx.journal.tail) - before)
	}
	return r, nil
}

// changed takes an Insert, Update or Delete.
func (s *stream) changed(xid uint32, body []byte, c cursor) error {
	oid := c.uint32()
	if c.short {
		return malformed(body)
	}
	r, err := s.relation(oid)
	if err != nil {
		return err
	}
	if !r.local {
		s.keep(xid, body)
	}
	return nil
}

// truncated takes a Truncate, without the node's own tables.
func (s *stream) truncated(xid uint32, body []byte) error {
	c := cursor{rest: body[1:]}
	n := c.uint32()
	c.byte() // options
	if c.short || uint64(n)*4 != uint64(len(c.rest)) {
		return malformed(body)
	}
	kept := body[:6]
	for range n {
		oid := c.uint32()
		r, err := s.relation(oid)
		if err != nil {
			return err
		}
		if !r.local {
			kept = binary.BigEndian.AppendUint32(kept, oid) // in place: what is kept is never ahead of what is read
		}
	}
	if left := (len(kept) - 6) / 4; left > 0 {
		binary.BigEndian.PutUint32(kept[1:], uint32(left))
		s.keep(xid, kept)
	}
	return nil
}

// keep adds a change to the current transaction.
func (s *stream) keep(xid uint32, body []byte) {
	tx := s.current
	tx.seal = txn.Seal{}
	s.metrics.changes.Inc()
	switch {
	case tx.count:
		tx.changes++
		return
	case len(body) > maxMessage:
		s.fail(tx, fmt.Errorf("change of %d bytes is larger than the %d that can be replicated", len(body), maxMessage))
		tx.changes++
		return
	}
	j := &tx.journal
	before := len(j.tail)
	j.append(xid, body)
	s.memory += int64(len(j.tail) - before)
	// A transaction that has a file already is one of the large ones: it fills that in small steps.
	limit := s.limits.TransactionMemory
	if j.file != nil {
		limit = min(limit, spillStep)
	}
	if len(j.tail) > limit {
		s.spill(tx)
	}
	if s.memory > int64(s.limits.Memory) {
		s.spillLargest()
	}
	s.metrics.memory.Set(float64(s.memory))
}

// spillStep is how much (bytes) a spilled transaction collects before it writes.
const spillStep = 256 << 10

func (s *stream) spill(tx *transaction) {
	n := len(tx.journal.tail)
	if err := tx.journal.spill(s.dir); err != nil {
		s.log.Error("spill an open transaction", logkey.XID, tx.xid, logkey.Error, err)
		s.fail(tx, err)
		return
	}
	s.memory -= int64(n)
	s.metrics.spilled.Add(float64(n))
	if cap(tx.journal.tail) > 2*spillStep {
		tx.journal.tail = nil
	}
}

func (s *stream) spillLargest() {
	largest := s.current
	for _, tx := range s.open {
		if len(tx.journal.tail) > len(largest.journal.tail) {
			largest = tx
		}
	}
	if len(largest.journal.tail) > 0 {
		s.spill(largest)
	}
}

// message takes a logical decoding message. Other programs' messages are not replicated.
func (s *stream) message(ctx context.Context, body []byte, sent time.Time) error {
	m, err := parseLogical(body)
	if err != nil {
		return err
	}
	switch {
	case !m.transactional:
		if string(m.prefix) == pg.PrefixMarker {
			s.marker(ctx, string(m.content), sent)
		}
	case s.current == nil:
		return malformed(body)
	case string(m.prefix) == pg.PrefixSeal:
		// One that is not ours is no seal, and no change either.
		if seal, err := txn.ParseSeal(string(m.content)); err == nil {
			s.current.seal = seal
		}
	case string(m.prefix) == pg.PrefixDDL:
		return s.ddl(body, m.content)
	}
	return nil
}

// ddl takes a DDL message. Unlike a row change, it comes with the top-level xid even from within a savepoint, so that
// its content must say by which subtransaction it goes if that is rolled back.
func (s *stream) ddl(body, content []byte) error {
	var d pg.DDL
	if err := json.Unmarshal(content, &d); err != nil {
		s.fail(s.current, fmt.Errorf("%w: message %s: %w", txn.ErrCorrupt, pg.PrefixDDL, err))
	}
	if s.token != "" && d.Token != s.token {
		return nil // a client's own message
	}
	xid := d.XID
	if xid == 0 {
		xid, s.current.floating = s.current.xid, true
	}
	s.keep(xid, body)
	s.current.ddl = true
	if d.Creates != 0 && !s.current.count {
		if s.current.creates == nil {
			s.current.creates = make(map[uint32][]byte)
		}
		s.current.creates[d.Creates] = bytes.Clone(body)
	}
	return nil
}

// marker takes a marker's content: seal, xid, base, seen.
func (s *stream) marker(ctx context.Context, content string, sent time.Time) {
	m, ok := parseMarker(content)
	if !ok || !s.sink.Expecting(m.Seal) {
		s.metrics.markers.ignored.Inc()
		return
	}
	tx := s.open[uint32(m.XID)]
	if tx == nil || tx.seal != m.Seal {
		s.metrics.markers.unsealed.Inc()
		s.sink.Marked(m, nil, nil, nil)
		return
	}
	if tx.err == nil && tx.taken {
		tx.err = fmt.Errorf("the write set of xid %d was handed over before", m.XID)
	}
	if tx.err != nil {
		s.metrics.markers.failed.Inc()
		s.sink.Marked(m, nil, nil, tx.err)
		return
	}
	began := time.Now()
	set, parts, err := s.assembler.assemble(ctx, m, tx)
	if err != nil {
		s.metrics.markers.failed.Inc()
		s.sink.Marked(m, nil, nil, fmt.Errorf("assemble write set of %s: %w", m.GID, err))
		return
	}
	if set.Empty() {
		s.metrics.markers.empty.Inc()
	} else {
		s.metrics.markers.complete.Inc()
	}
	now := time.Now()
	s.metrics.assemble.Observe(now.Sub(began).Seconds())
	s.metrics.delivery.Observe(max(0, now.Sub(sent).Seconds()))
	// What comes now would be missing from what was handed over: it is counted, and a stray if it commits.
	s.drop(tx)
	tx.taken, tx.count = true, true
	s.sink.Marked(m, set, parts, nil)
}

func parseMarker(content string) (m Marker, ok bool) {
	sealText, rest, ok1 := strings.Cut(content, " ")
	xidText, rest, ok2 := strings.Cut(rest, " ")
	baseText, seenText, ok3 := strings.Cut(rest, " ")
	seal, err := txn.ParseSeal(sealText)
	xid, err1 := strconv.ParseUint(xidText, 10, 64)
	base, err2 := strconv.ParseUint(baseText, 10, 64)
	seen, err3 := strconv.ParseUint(seenText, 10, 64)
	if !ok1 || !ok2 || !ok3 || err != nil || err1 != nil || err2 != nil || err3 != nil {
		return Marker{}, false
	}
	return Marker{Seal: seal, XID: txn.XID(xid), Base: txn.CSN(base), Seen: txn.CSN(seen)}, true
}
