package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/replication/apply"
	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
)

// A node's state is in two places, its data directory and its PostgreSQL, and each is worth nothing with another state of
// the other: a server that was set back to a backup has lost transactions of which the log is forgotten, and would give
// out transaction ids again by which the node recognises its own; a data directory that was set back has lost votes and
// acknowledged entries. Both keep a generation, raised in every start, and a start compares them. And the data directory
// knows how far PostgreSQL's WAL was on disk two seconds ago: what ends before that was set back within a generation.

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
		return logLost(fmt.Sprintf("the data directory was set back: PostgreSQL has been started %d times, as far as it knows, and %d times as far as the data directory does", found.Generation, known.Generation))
	}
	return nil
}

// nextGeneration compares data directory and PostgreSQL, and says which generation begins, and with it an incarnation. Both stand in
// the data directory before PostgreSQL can have anything of them. No session of an earlier incarnation may be left.
func (n *Node) nextGeneration(ctx context.Context, conn *pgconn.PgConn, incarnation uint64) (uint64, error) {
	found, err := pg.ReadMark(ctx, conn)
	if err != nil {
		return 0, err
	}
	known := n.identity.get().Server
	if err := compareServer(known, found); err != nil {
		return 0, err
	}
	if err := n.compareFlushed(known, found); err != nil {
		return 0, err
	}
	next := max(found.Generation, known.Generation) + 1
	return next, n.identity.change(func(id *config.Identity) {
		id.Server.SystemIdentifier, id.Server.Generation, id.Server.Next = found.SystemIdentifier, found.Generation, next
		id.Server = id.Server.Begin(config.Incarnation{ID: incarnation, XID: found.NextXID})
	})
}

// generationBegun notes that PostgreSQL has it.
func (n *Node) generationBegun(generation uint64) error {
	return n.identity.change(func(id *config.Identity) { id.Server.Generation, id.Server.Next = generation, 0 })
}

// If both places were set back together, to a snapshot of the whole machine say, they agree. Only the others know then what
// the node has been, and the log tells: of an incarnation that is not here, or of transactions of one that is, under ids
// that PostgreSQL had not given out in it.

// checkAnnounced refuses to announce an incarnation behind one that the node does not know to have been its own. A
// witness does not know any.
func (n *Node) checkAnnounced(m *replication.Machine) error {
	last, _ := m.Membership().Find(n.cfg.Node)
	if n.cfg.Witness() || last.Incarnation == 0 || n.identity.get().Server.Knows(last.Incarnation) {
		return nil
	}
	return fmt.Errorf("the node was set back: by the log it has been started since, as incarnation %x, and nothing here knows of that: %w", last.Incarnation, errSetBack)
}

// speak notes that the log may know of this incarnation from now on. It is called when all that was in the log before is
// delivered, and nothing of it, as ctx tells, contradicts what is here.
func (n *Node) speak(ctx context.Context) error {
	if ctx.Err() != nil || !n.identity.get().Server.Silent() {
		return context.Cause(ctx)
	}
	return n.identity.change(func(id *config.Identity) { id.Server = id.Server.Speak() })
}

// earlier says how a transaction that an earlier incarnation of this node had proposed is to be applied. Its session is
// gone. If it ran on this server as it is, it may have committed: apply asks for the status of its xid, as for any session
// that was lost. Of an incarnation that is not known it was decided too late to commit here, or it ran on what this server
// was before it was set back; either way it is not here.
func (i *incarnation) earlier(d replication.Decision) (apply.Local, error) {
	gid, xid := d.Set.GID, d.Set.XID
	switch {
	case i.server.Gave(gid.Incarnation, xid):
		return earlier{}, nil
	case i.server.Knows(gid.Incarnation):
		return nil, fmt.Errorf("PostgreSQL was set back: it has not given out the id %d of transaction %s, which it had run: %w", xid, gid, errSetBack)
	}
	return nil, nil
}

// flushedFile says how far the WAL of PostgreSQL was on disk when that was last looked at. It is not flushed itself: an
// older value, or none, finds less, and nothing that is not so.
const flushedFile = "flushed_lsn"

func (n *Node) compareFlushed(known config.Server, found pg.Mark) error {
	name := filepath.Join(n.cfg.DataDir, flushedFile)
	if known.IsZero() { // it is another server's
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("forget how far the WAL was: %w", err)
		}
		return nil
	}
	text, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read how far the WAL was: %w", err)
	}
	if was, err := strconv.ParseUint(string(text), 16, 64); err == nil && uint64(found.Flushed) < was {
		return fmt.Errorf("PostgreSQL was set back: its WAL ends at %s, and was on disk up to %s: %w", found.Flushed, txn.LSN(was), errSetBack)
	}
	return nil
}

// noteFlushed is called every few seconds. A failure costs no more than what the file is for, and a disk that is full is
// noticed by whoever needs it.
func (n *Node) noteFlushed(lsn txn.LSN) {
	name := filepath.Join(n.cfg.DataDir, flushedFile)
	err := os.WriteFile(name+".new", strconv.AppendUint(nil, uint64(lsn), 16), 0o600)
	if err == nil {
		err = os.Rename(name+".new", name)
	}
	if err != nil {
		n.log.Debug("note how far the WAL is", logkey.Error, err)
	}
}
