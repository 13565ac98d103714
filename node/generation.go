package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
)

// A node's state is in two places, its data directory and its PostgreSQL, and each is worth nothing with another state of
// the other: a server that was set back to a backup has lost transactions of which the log is forgotten, and would give
// out transaction ids again by which the node recognises its own; a data directory that was set back has lost votes and
// acknowledged entries. Both keep a generation, raised in every start, and a start compares them.

// errSetBack: one of the two is not what it was.
var errSetBack = fmt.Errorf("the node must get its data anew: \"quorate resync\" does that: %w", txn.ErrDiverged)

// compareServer refuses a server that is not the one this node had, as it had it.
func compareServer(known config.Server, found pg.Mark) error {
	switch {
	case known.IsZero():
		if found.Generation != 0 {
			return fmt.Errorf("PostgreSQL was a node's already, %d times started, and the data directory knows nothing of it: %w", found.Generation, errSetBack)
		}
	case found.SystemIdentifier != known.SystemIdentifier:
		return fmt.Errorf("this is not the PostgreSQL that the node had: its system identifier is %s, and was %s: %w", found.SystemIdentifier, known.SystemIdentifier, errSetBack)
	case found.Generation == known.Generation, known.Next != 0 && found.Generation == known.Next:
	case found.Generation < known.Generation:
		return fmt.Errorf("PostgreSQL was set back: it has been started %d times, as far as it knows, and %d times as far as the data directory does: %w", found.Generation, known.Generation, errSetBack)
	default:
		return fmt.Errorf("the data directory was set back: PostgreSQL has been started %d times, as far as it knows, and %d times as far as the data directory does: %w", found.Generation, known.Generation, errSetBack)
	}
	return nil
}

// nextGeneration compares data directory and PostgreSQL, and says which generation begins. It stands in the data directory
// before PostgreSQL can have it.
func (n *Node) nextGeneration(ctx context.Context, conn *pgconn.PgConn) (uint64, error) {
	found, err := pg.ReadMark(ctx, conn)
	if err != nil {
		return 0, err
	}
	known := n.identity.get().Server
	if err := compareServer(known, found); err != nil {
		return 0, err
	}
	next := max(found.Generation, known.Generation) + 1
	return next, n.identity.change(func(id *config.Identity) {
		id.Server = config.Server{SystemIdentifier: found.SystemIdentifier, Generation: found.Generation, Next: next}
	})
}

// generationBegun notes that PostgreSQL has it.
func (n *Node) generationBegun(generation uint64) error {
	return n.identity.change(func(id *config.Identity) { id.Server.Generation, id.Server.Next = generation, 0 })
}

// checkLog refuses to go on without the log: a node that voted could vote again, and one that was alone would found its
// cluster anew.
func (n *Node) checkLog() error {
	id := n.identity.get()
	if !id.Started {
		return nil
	}
	dir := id.RaftDir(n.cfg.DataDir)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the log of this node, %s, is missing: %w", dir, errSetBack)
	}
	return nil
}
