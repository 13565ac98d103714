package node

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn/codec"
)

// reserveEvery is how often sequences are looked at, and leastReserve how many values of one are reserved at least: what
// is given out between two looks should not go beyond. It costs an entry of the log each time that half is used up.
const (
	reserveEvery = 2 * time.Second
	leastReserve = 1000
)

// reserving is what of this node's sequences is in the log.
type reserving struct {
	begun bool // the log has been told of all
	known map[string]reservation
}

type reservation struct{ last, reserved int64 }

// due returns what the log has to be told of, and remembers it. A sequence that has used up half of what was reserved gets
// four times what it has given out since the last look, so that a burst does not outrun the next one.
func (r *reserving) due(positions []pg.SequencePosition) []codec.Reservation {
	var due []codec.Reservation
	known := make(map[string]reservation, len(positions))
	for _, p := range positions {
		was, ok := r.known[p.Name]
		left := (was.reserved - p.Last) / p.Step // how many values are reserved
		if ok && left >= leastReserve/2 && p.Last/p.Step <= was.reserved/p.Step {
			known[p.Name] = reservation{p.Last, was.reserved}
			continue
		}
		count := int64(leastReserve)
		if ok {
			count = max(count, min(4*((p.Last-was.last)/p.Step), p.Room))
		}
		// A short sequence is not to be used up by reserving.
		now := reservation{p.Last, p.Last + min(count, p.Room/16)*p.Step}
		if known[p.Name] = now; ok && now.reserved == was.reserved {
			continue
		}
		due = append(due, codec.Reservation{Name: p.Name, Value: now.reserved})
	}
	r.known = known
	return due
}

// reserveSequences tells the log up to where this node may have given out values of sequences, before it gets there. Whoever
// gets its slot one day begins beyond: nobody asks a node that is gone.
func (i *incarnation) reserveSequences(ctx context.Context) error {
	var r reserving
	var conn *pgconn.PgConn
	defer func() {
		if conn != nil {
			_ = conn.Close(context.WithoutCancel(ctx)) // nothing was written
		}
	}()
	ticker := time.NewTicker(reserveEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		err := func() (err error) {
			if conn == nil || conn.IsClosed() {
				if conn, err = i.n.connect(ctx); err != nil {
					return err
				}
			}
			return i.reserve(ctx, conn, &r)
		}()
		if err != nil && ctx.Err() == nil {
			i.n.log.Warn("the log has not been told how far sequences are", logkey.Error, err)
			r = reserving{} // which of it has got into the log is not known
		}
	}
}

func (i *incarnation) reserve(ctx context.Context, conn *pgconn.PgConn, r *reserving) error {
	c := i.n.consensus.Load()
	if c == nil {
		return nil // starting
	}
	if l, _ := c.Leadership(); l.Leader == 0 {
		return nil // nobody gives out values that get anywhere
	}
	positions, err := pg.SequencePositions(ctx, conn)
	if err != nil {
		return err
	}
	due := r.due(positions)
	for first := !r.begun; first && len(positions) > 0 || len(due) > 0; first = false {
		n := min(len(due), codec.MaxReservations)
		entry := codec.AppendReserve(nil, &codec.Reserve{Node: i.n.cfg.Node, All: first, Sequences: due[:n]})
		if _, err := c.Propose(ctx, entry); err != nil {
			return fmt.Errorf("reserve values of %d sequences: %w", n, err)
		}
		due, r.begun = due[n:], true
	}
	return nil
}
