package node

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/quorate/quorate/admin"
	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// verifyPurpose is the purpose of barriers at which tables are hashed.
const verifyPurpose = "verify"

// snapshotTimeout bounds how long clients wait for a snapshot to be taken.
const snapshotTimeout = 2 * time.Second

// barriers are those that somebody waits for. What comes to nobody, in a log that is read again for one, is ignored.
type barriers struct {
	mu      sync.Mutex
	waiting map[txn.GID]chan<- place
}

// place is where a barrier stands, with everything behind it held back until release is called.
type place struct {
	index   txn.LogIndex
	csn     txn.CSN
	release func()
	err     error // nothing is held
}

// await returns a channel on which the barrier's place comes, and a function to call when it is not awaited any more.
func (b *barriers) await(id txn.GID) (<-chan place, func()) {
	reached := make(chan place, 1)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.waiting == nil {
		b.waiting = map[txn.GID]chan<- place{}
	}
	b.waiting[id] = reached
	return reached, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.waiting, id)
		select {
		case p := <-reached: // too late
			if p.err == nil {
				p.release()
			}
		default:
		}
	}
}

// barrier takes one from the log, between two entries.
func (i *incarnation) barrier(b codec.Barrier, index txn.LogIndex) {
	i.barriers.mu.Lock()
	defer i.barriers.mu.Unlock()
	reached := i.barriers.waiting[b.ID]
	if reached == nil {
		return
	}
	delete(i.barriers.waiting, b.ID)
	p := place{index: index}
	p.csn, p.release, p.err = i.pipeline.Hold()
	if p.err == nil && p.csn != i.machine.LastCSN() {
		p.release()
		p.err = fmt.Errorf("the node's PostgreSQL is ahead, at CSN %d: it is reading the log again", p.csn)
	}
	reached <- p
}

// Barrier puts a barrier into the log.
func (n *Node) Barrier(ctx context.Context, id txn.GID) error {
	c := n.consensus.Load()
	if c == nil {
		return errors.New("the node is starting")
	}
	_, err := c.Propose(ctx, codec.AppendBarrier(nil, codec.Barrier{ID: id, Purpose: verifyPurpose}))
	return err
}

// Hash hashes all replicated tables as of a barrier that is still to come. Clients go on meanwhile: they wait for the
// moment that it takes to fix a snapshot in a session that is open by then.
func (n *Node) Hash(ctx context.Context, barrier txn.GID, ready func()) (hashes admin.Hashes, err error) {
	i := n.current.Load()
	if i == nil || n.states.current().name != stateActive {
		return hashes, fmt.Errorf("the node is %s", n.states.current().name)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(i.ctx, func() { cancel(context.Cause(i.ctx)) })()
	conn, err := n.connect(ctx)
	if err != nil {
		return hashes, err
	}
	defer func() { err = errors.Join(err, closeConn(context.WithoutCancel(ctx), conn)) }()
	if err := pg.BeginHash(ctx, conn); err != nil {
		return hashes, err
	}
	reached, forget := i.barriers.await(barrier)
	defer forget()
	ready()
	select {
	case p := <-reached:
		if p.err != nil {
			return hashes, p.err
		}
		if err := i.snapshotAt(ctx, p, func(ctx context.Context) error { return pg.TakeSnapshot(ctx, conn) }); err != nil {
			return hashes, err
		}
		hashes.Index, hashes.CSN = p.index, p.csn
	case <-ctx.Done():
		return hashes, context.Cause(ctx)
	}
	tables, err := pg.HashTables(ctx, conn)
	for _, t := range tables {
		hashes.Tables = append(hashes.Tables, admin.TableHash(t))
	}
	return hashes, err
}

// snapshotAt calls take at the moment when exactly what comes before the place is visible.
func (i *incarnation) snapshotAt(ctx context.Context, p place, take func(context.Context) error) error {
	defer p.release()
	if err := i.pipeline.WaitFor(ctx, p.csn); err != nil {
		return fmt.Errorf("wait for CSN %d: %w", p.csn, err)
	}
	ctx, cancel := context.WithTimeout(ctx, snapshotTimeout)
	defer cancel()
	return take(ctx)
}
