package sim

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/replication/apply"
	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
	"github.com/quorate/quorate/txn/coord"
)

// node is one server and, one after the other, the incarnations of its sidecar.
type node struct {
	id  txn.NodeID
	run *run
	db  *database

	mu            sync.Mutex
	current       *incarnation
	newest        *incarnation // current, or one that is beginning
	incarnations  uint64
	snapshot      []byte // of the machine, at snapshotIndex
	snapshotIndex txn.LogIndex
	snapshotCSN   txn.CSN
	snapshotNeeds txn.LogIndex // the log is kept from here on, or from behind the snapshot
}

// forgotten is the CSN up to which the node's log is truncated.
func (n *node) forgotten() txn.CSN {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.snapshotCSN
}

func (n *node) incarnation() *incarnation {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.current
}

// crash hits the sidecar, the server, or both, or breaks what connects them. The server is away for a while.
func (n *node) crash(k kind, away time.Duration) {
	n.mu.Lock()
	i := n.newest
	n.mu.Unlock()
	switch k {
	case sidecarCrash, nodeCrash:
		i.kill()
	case broken:
		i.cut()
	}
	if k == postgresCrash || k == nodeCrash {
		n.db.crash()
		n.run.group.Go(func() {
			time.Sleep(away)
			n.db.restart()
		})
	}
}

// check looks at a commit of this node's server, which has n transactions already: it must be what the log has next.
func (n *node) check(have int, r record) {
	for _, mark := range r.marks() {
		have++
		if want := n.run.reference.mark(have); mark != want {
			n.run.fail("node %d commits %s as number %d, which is %s in the log", n.id, mark, have, want)
		}
	}
}

// live brings up one incarnation after the other.
func (n *node) live(ctx context.Context) {
	for ctx.Err() == nil {
		i, err := n.begin(ctx)
		if err != nil {
			n.run.trace(n.id, "cannot begin: %v", err)
			time.Sleep(20 * time.Millisecond)
			continue
		}
		<-i.ctx.Done()
		n.run.trace(n.id, "incarnation %d ends: %v", i.id, context.Cause(i.ctx))
		if cause := context.Cause(i.ctx); !errors.Is(cause, errKilled) && !errors.Is(cause, apply.ErrServerLost) && !errors.Is(cause, errOver) {
			n.run.fail("node %d: %v", n.id, cause)
		}
		i.end()
	}
}

// incarnation does what the one of package node does.
type incarnation struct {
	n        *node
	id       uint64
	life     string
	start    txn.CSN
	machine  *replication.Machine
	pipeline *apply.Pipeline
	coord    *coord.Coordinator

	ctx     context.Context
	cancel  context.CancelCauseFunc
	told    context.Context // for who works until each client has an answer
	tell    context.CancelCauseFunc
	running sync.WaitGroup
	clients sync.WaitGroup
	telling sync.WaitGroup

	mu     sync.Mutex
	dead   bool
	closed bool // no client begins anything
	conns  []*conn
}

var (
	errKilled = errors.New("the sidecar was killed")
	errOver   = errors.New("the run is over")
)

// kill is kill -9: nothing that this incarnation does has an effect any more. What it has sent may arrive.
func (i *incarnation) kill() {
	i.mu.Lock()
	i.dead, i.closed = true, true
	i.mu.Unlock()
	i.cut()
	i.n.db.orphan()
	i.cancel(errKilled)
	i.tell(errKilled)
}

// cut breaks the connections to the server. It may still get what was written.
func (i *incarnation) cut() {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, c := range i.conns {
		c.out.end(i.n.run.draw(2, "cut", i.n.id) == 0)
		c.in.end(true)
	}
	i.conns = nil
}

func (i *incarnation) killed() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.dead
}

func (i *incarnation) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	c, err := i.n.db.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.dead {
		_ = c.Close()
		return nil, errKilled
	}
	i.conns = append(i.conns, c.(*conn))
	return c, nil
}

func (i *incarnation) connect(ctx context.Context) (*pgconn.PgConn, error) {
	cfg := i.n.run.conn.Copy()
	cfg.DialFunc = i.dial
	return pgconn.ConnectConfig(ctx, cfg)
}

func (n *node) begin(ctx context.Context) (*incarnation, error) {
	n.mu.Lock()
	n.incarnations++
	i := &incarnation{n: n, id: n.incarnations}
	i.ctx, i.cancel = context.WithCancelCause(ctx)
	i.told, i.tell = context.WithCancelCause(ctx)
	n.newest = i
	snapshot, index := n.snapshot, n.snapshotIndex
	n.mu.Unlock()
	if err := i.prepareServer(ctx); err != nil {
		i.cancel(err)
		i.tell(err)
		return nil, err
	}
	registry, logger := prometheus.NewRegistry(), slog.New(tracer{n.run, n.id})
	i.machine = replication.New(replication.Config{
		Deliver:   i.deliver,
		Processed: func(index txn.LogIndex) { i.pipeline.Skip(index) },
		Durable:   func(csn txn.CSN) error { return i.flush(csn) },
		Member:    func(codec.Member) {},
		Changed:   func(replication.Change) {},
		Fail:      func(err error) { n.run.fail("node %d: %v", n.id, err) },
	})
	if snapshot != nil {
		if err := i.machine.Restore(bytes.NewReader(snapshot)); err != nil {
			n.run.fail("node %d: restore: %v", n.id, err)
		}
		if i.machine.LastCSN() > i.start {
			n.run.fail("node %d starts at %d, the log only after %d", n.id, i.start, i.machine.LastCSN())
			return nil, errOver
		}
	}
	i.pipeline = apply.New(apply.Config{
		Connect: i.connect, Part: i.part, Evict: i.evict, Start: i.start, Life: i.life, Workers: 3, GroupItems: 4, LocalTimeout: time.Second,
		Logger: logger, Registerer: registry,
	})
	i.coord = coord.New(coord.Config{
		Node: n.id, Incarnation: i.id, Database: "sim", Order: order{i}, Visibility: i.pipeline, CommitTimeout: commitTimeout,
		Logger: logger, Registerer: registry,
	})
	n.mu.Lock()
	n.current = i
	n.mu.Unlock()
	n.run.trace(n.id, "incarnation %d begins after %d", i.id, i.start)
	i.running.Go(func() { i.cancel(i.pipeline.Run(i.ctx)) })
	i.telling.Go(func() {
		if err := i.coord.Run(i.told); err != nil {
			n.run.fail("node %d: coordinator: %v", n.id, err)
		}
	})
	i.telling.Go(func() { i.follow(index) })
	i.telling.Go(i.announce)
	for k := range n.run.options.clients {
		i.clients.Go(func() { i.client(k) })
	}
	return i, nil
}

// announce says in the log that this incarnation lives, and no earlier one.
func (i *incarnation) announce() {
	entry := codec.AppendMember(nil, &codec.Member{Node: i.n.id, Incarnation: i.id})
	for {
		i.n.run.pause(2*time.Millisecond, "announce", i.n.id)
		if _, err := (order{i}).Propose(i.told, entry); err == nil || i.killed() {
			return
		}
		if i.n.run.log.awaitLeader(i.told) != nil {
			return
		}
	}
}

// part reads a part of a large transaction from the log, as far as that is kept.
func (i *incarnation) part(index txn.LogIndex) ([]byte, error) {
	i.n.run.reach(i.n, "a worker reads a part")
	i.n.mu.Lock()
	kept := index > i.n.snapshotIndex || i.n.snapshotNeeds > 0 && index >= i.n.snapshotNeeds
	i.n.mu.Unlock()
	if !kept {
		i.n.run.fail("node %d: the log does not have part %d any more", i.n.id, index)
	}
	data, err := i.n.run.log.read(i.ctx, index)
	if err != nil {
		return nil, err
	}
	entry, err := codec.Decode(data)
	if err != nil {
		return nil, err
	}
	return entry.Chunk.Data, nil
}

// prepareServer is what package node does before an incarnation begins.
func (i *incarnation) prepareServer(ctx context.Context) error {
	c, err := i.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close(context.WithoutCancel(ctx)) //nolint:errcheck // it has done its work, or has failed before
	if i.life, err = apply.ServerLife(ctx, c); err != nil {
		return err
	}
	i.n.run.reach(i.n, "recovery: connected")
	if err := pg.Settle(ctx, c); err != nil {
		return err
	}
	i.n.run.reach(i.n, "recovery: settled")
	if _, err := c.Exec(ctx, install).ReadAll(); err != nil {
		return err
	}
	i.n.run.reach(i.n, "recovery: installed")
	if i.start, err = apply.Progress(ctx, c); err != nil {
		return err
	}
	i.n.run.reach(i.n, "recovery: progress read")
	return context.Cause(i.ctx)
}

func (i *incarnation) flush(csn txn.CSN) error {
	if i.n.run.options.unflushed {
		return i.pipeline.WaitFor(i.ctx, csn)
	}
	return i.pipeline.Flush(i.ctx, csn)
}

// end is the orderly end after the server was lost: clients are told what the log says.
func (i *incarnation) end() {
	i.running.Wait()
	if !i.killed() {
		i.coord.Detach()
		i.mu.Lock()
		i.closed = true
		i.mu.Unlock()
		i.n.db.endClients()
	}
	i.clients.Wait()
	i.tell(errOver)
	i.telling.Wait()
}

// follow gives the log to the machine, and takes snapshots.
func (i *incarnation) follow(index txn.LogIndex) {
	var snapshots sync.WaitGroup
	defer snapshots.Wait()
	rng := i.n.run.source("follow", uint64(i.n.id), i.id)
	for {
		index++
		data, err := i.n.run.log.read(i.told, index)
		if err != nil {
			return
		}
		time.Sleep(time.Duration(rng.IntN(int(300 * time.Microsecond))))
		i.n.run.reach(i.n, "an entry arrives")
		i.machine.Apply(index, data)
		if rng.IntN(100) >= 5 || i.ctx.Err() != nil {
			continue
		}
		s, err := i.machine.Snapshot()
		if err != nil {
			i.n.run.fail("node %d: snapshot: %v", i.n.id, err)
			return
		}
		at, csn, needs := index, i.machine.LastCSN(), s.Needs()
		if i.n.run.options.shortened {
			needs = 0
		}
		snapshots.Go(func() {
			var b bytes.Buffer
			if _, err := s.WriteTo(&b); err != nil {
				return // the server was lost
			}
			i.n.run.reach(i.n, "a snapshot is written")
			i.n.keep(i, at, csn, needs, b.Bytes())
		})
	}
}

func (n *node) keep(i *incarnation, index txn.LogIndex, csn txn.CSN, needs txn.LogIndex, snapshot []byte) {
	if i.killed() {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if index > n.snapshotIndex {
		n.snapshot, n.snapshotIndex, n.snapshotCSN, n.snapshotNeeds = snapshot, index, csn, needs
		n.run.count("snapshots")
	}
}

func (i *incarnation) deliver(decisions []replication.Decision) {
	var items []apply.Item
	for _, d := range decisions {
		gid := d.Set.GID
		own := gid.Node == i.n.id
		var held *coord.Transaction
		if own && gid.Incarnation == i.id {
			held = i.coord.Decided(gid, d.Verdict)
			i.n.run.reach(i.n, "the verdict is known")
		}
		if !d.Verdict.Commits() {
			continue
		}
		item := apply.Item{CSN: d.Verdict.CSN, Index: d.Index, Set: d.Set, Chunks: d.Chunks}
		switch {
		case held != nil:
			item.Local = held
		case own && gid.Incarnation != i.id && !i.n.run.options.forgetful:
			item.Local = earlier{}
		}
		items = append(items, item)
	}
	if i.ctx.Err() != nil {
		return
	}
	if err := i.pipeline.Enqueue(i.ctx, items...); err != nil {
		i.cancel(err)
	}
}

type earlier struct{}

func (earlier) Release(ended func(committed bool)) { ended(false) }
func (earlier) PID() uint32                        { return 0 }
func (earlier) Visible(txn.CSN)                    {}

type order struct{ *incarnation }

func (o order) Propose(ctx context.Context, data []byte) (txn.LogIndex, error) {
	if o.killed() {
		return 0, txn.ErrOutcomeUnknown
	}
	return o.n.run.log.propose(ctx, o.n, data)
}

func (o order) Admit(context.Context) error { return nil }

func (o order) AwaitLeader(ctx context.Context) error { return o.n.run.log.awaitLeader(ctx) }

func (o order) AwaitDecided(ctx context.Context, index txn.LogIndex) error {
	return o.machine.WaitFor(ctx, index)
}

func (i *incarnation) evict(b apply.Blockade) bool {
	if i.killed() {
		return true
	}
	i.n.run.count("evictions")
	return i.n.db.evict(b.PID) // the client notices
}

// client makes transactions as a gateway session does.
func (i *incarnation) client(k int) {
	rng := i.n.run.source("client", uint64(i.n.id), i.id, uint64(k))
	for i.ctx.Err() == nil && i.n.run.another() {
		time.Sleep(time.Duration(rng.IntN(int(3 * time.Millisecond))))
		i.transaction(rng)
	}
}

// session is a new one for a client, or nil.
func (i *incarnation) session() *session {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return nil
	}
	return i.n.db.connect()
}

func (i *incarnation) transaction(rng *rand.Rand) {
	r := i.n.run
	base := i.coord.Applied()
	s := i.session()
	if s == nil {
		return
	}
	defer func() {
		if !i.killed() { // a killed sidecar ends no session
			s.end()
		}
	}()
	if s.begin() != nil {
		return
	}
	a := attempt{mark: fmt.Sprintf("%s%d", markPrefix, r.nextMark()), before: map[string]string{}}
	a.value = "by " + a.mark
	repeatable := rng.IntN(2) == 0
	rows := rng.Perm(r.options.rows)[:1+rng.IntN(2)]
	slices.Sort(rows)
	for _, row := range rows {
		before, n, err := s.update(rowName(row), a.value, repeatable)
		if err != nil || n != 1 || i.killed() {
			return
		}
		a.before[rowName(row)] = before
		time.Sleep(time.Duration(rng.IntN(int(time.Millisecond))))
	}
	if s.insert(a.mark, "") != nil {
		return
	}
	t, err := i.coord.Begin(i.ctx, base, s.pid)
	if err != nil || i.killed() {
		return
	}
	defer t.Close()
	s.called(a.mark)
	r.reference.begin(t.GID(), a)
	if r.options.hasty {
		r.tell(t.GID(), acknowledged)
	}
	answer := make(chan error, 1)
	letThrough := sync.OnceFunc(func() {
		r.reach(i.n, "COMMIT is let through")
		if i.killed() {
			return
		}
		r.group.Go(func() { // the server goes on when the sidecar is dead
			s.pause(300 * time.Microsecond)
			r.reach(i.n, "COMMIT arrives")
			err := s.commit(true)
			r.reach(i.n, "COMMIT is done")
			answer <- err
		})
	})
	if rng.IntN(2) == 0 { // or the session does it when it hears of it
		t.OnRelease(func(txn.GID) { letThrough() })
	}
	r.reach(i.n, "COMMIT is held back")
	if xid := s.mark(); xid == 0 {
		t.Lost()
	} else if s.life == i.life || r.options.anyLife { // capture has checked which life it reads
		messages := changes(a, rows)
		parts := new(parts)
		if rng.IntN(4) == 0 { // a large one
			for len(messages) > 1 && len(*parts) < 2 {
				n := 1 + rng.IntN(len(messages)-1)
				*parts = append(*parts, slices.Concat(messages[:n]...))
				messages = messages[n:]
			}
		}
		set := writeSet(xid, a, rows)
		set.Changes, set.Chunks = slices.Concat(messages...), uint32(len(*parts))
		if r.options.blind {
			set.Keys = set.Keys[len(set.Keys)-1:] // its mark's
		}
		after := time.Duration(rng.IntN(int(500 * time.Microsecond)))
		i.clients.Go(func() { i.capture(t.Seal(), set, parts, after) })
	}
	end := make(chan struct{})
	defer close(end)
	i.clients.Go(func() {
		select {
		case <-s.done:
			if !i.killed() {
				t.Lost()
			}
		case <-end:
		}
	})
	switch rng.IntN(40) {
	case 0: // the session dies
		i.clients.Go(func() {
			s.pause(3 * time.Millisecond)
			s.end()
		})
	case 1: // the client vanishes
		time.Sleep(time.Duration(rng.IntN(int(2 * time.Millisecond))))
		return
	}
	for {
		ev, err := t.Next(i.told)
		if err != nil || i.killed() {
			r.tell(t.GID(), unknown)
			return
		}
		switch ev.Step {
		case txn.StepAbort:
			r.tell(t.GID(), aborted)
			return
		case txn.StepVisible:
			r.tell(t.GID(), acknowledged)
			return
		case txn.StepUnknown:
			r.tell(t.GID(), unknown)
			return
		case txn.StepRelease:
			letThrough()
			if i.killed() {
				return
			}
			err := <-answer
			if i.killed() {
				r.tell(t.GID(), unknown)
				return
			}
			if err != nil || rng.IntN(30) == 0 { // the answer may get lost
				t.Lost()
				continue
			}
			t.Committed()
			r.tell(t.GID(), acknowledged)
			r.reach(i.n, "the client is answered")
			return
		}
	}
}

// capture decodes what is in the WAL of this incarnation's life of the server.
func (i *incarnation) capture(seal txn.Seal, set *txn.WriteSet, earlier *parts, after time.Duration) {
	time.Sleep(after)
	if !i.coord.Expecting(seal) || i.ctx.Err() != nil {
		return
	}
	i.n.run.reach(i.n, "the marker is captured")
	switch {
	case i.killed():
	case len(*earlier) > 0:
		i.n.run.count("large")
		i.coord.Marked(seal.GID, set, earlier, nil)
	default:
		i.coord.Marked(seal.GID, set, nil, nil)
	}
}

// parts are those of a large transaction, but for the last.
type parts [][]byte

func (p *parts) Next() ([]byte, error) {
	if len(*p) == 0 {
		return nil, io.EOF
	}
	next := (*p)[0]
	*p = (*p)[1:]
	return next, nil
}

func (*parts) Close() error { return nil }

// writeSet makes what an attempt is certified by.
func writeSet(xid uint64, a attempt, rows []int) *txn.WriteSet {
	set := &txn.WriteSet{XID: txn.XID(xid), Rows: uint64(len(rows) + 1)}
	for _, row := range append(rowNames(rows), a.mark) {
		h := txn.NewHasher()
		h.String(row)
		set.Keys = append(set.Keys, txn.KeyUse{Key: h.Key(), Mode: txn.ModeWrite})
	}
	return set
}

// changes makes the pgoutput messages of an attempt.
func changes(a attempt, rows []int) (messages [][]byte) {
	add := func(message []byte) {
		messages = append(messages, append(binary.AppendUvarint(nil, uint64(len(message))), message...))
	}
	relation := append([]byte("R\x00\x00\x00\x01public\x00t\x00d\x00\x02"), "\x01id\x00\x00\x00\x00\x19\xff\xff\xff\xff"...)
	add(append(relation, "\x00v\x00\x00\x00\x00\x19\xff\xff\xff\xff"...))
	tuple := func(kind byte, row, value string) {
		m := []byte{kind, 0, 0, 0, 1, 'N', 0, 2}
		for _, column := range []string{row, value} {
			m = binary.BigEndian.AppendUint32(append(m, 't'), uint32(len(column)))
			m = append(m, column...)
		}
		add(m)
	}
	for _, row := range rowNames(rows) {
		tuple('U', row, a.value)
	}
	tuple('I', a.mark, "")
	return messages
}
