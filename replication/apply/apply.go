// Package apply makes committed transactions visible in the local PostgreSQL, strictly in the order of their CSN,
// while it executes them in parallel. It alone finishes a transaction, be it the origin's own, whose COMMIT the
// gateway holds back, or a remote one, whose changes a worker executes and whose COMMIT that worker holds back just
// the same. DESIGN.md beside this file tells how and why.
package apply

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/quorate/quorate/txn"
)

// ErrServerLost: PostgreSQL is away, or it crashed or was restarted, and since commits are asynchronous it may have lost
// what had become visible; or Config.Start is not where the server is. Nothing is wrong with the node: determine the
// applied CSN as after a crash of the sidecar, and start a new Pipeline there.
var ErrServerLost = errors.New("server stopped or restarted, its applied position must be determined anew")

// Item is one transaction that the certifier lets commit. The Pipeline keeps references to all of it until it is
// visible.
type Item struct {
	CSN   txn.CSN
	Index txn.LogIndex // its log entry; several items may have the same
	Set   *txn.WriteSet
	// Chunks are the log indexes of its Chunk entries, in order; empty unless the transaction is large.
	Chunks []txn.LogIndex
	// Local is the origin's own transaction, still open; nil if it is another node's, or if the session is gone and
	// is known not to have committed, so that it is to be applied from the log.
	Local Local
}

// Local is a transaction of a client of this node, open in the client's server session, its COMMIT held back. Its
// methods may be called from any goroutine and must not block.
type Local interface {
	// Release lets the COMMIT through: everything before it is visible. It is called once. ended is called when the session's
	// transaction has ended in any way, which may have been before. With true, the server has confirmed the COMMIT: it sends
	// the next one on its way, so it comes first of all, and without locks held. With false: lost, failed or not known.
	Release(ended func(committed bool))
	// PID is the session's server process; 0 if that is of an earlier life of the server or the node.
	PID() uint32
	// Visible tells that the session's transaction, which did not report Committed, is visible: it was applied from the
	// log, or the server turned out to have committed it.
	Visible(csn txn.CSN)
}

// Config says how and where to apply. Connect, Part, Evict and Changed are called concurrently.
type Config struct {
	// Connect opens a connection as superuser to the database. Required.
	Connect func(ctx context.Context) (*pgconn.PgConn, error)
	// Part returns the data of a Chunk entry of the log. Required if large transactions occur.
	Part func(index txn.LogIndex) ([]byte, error)
	// Evict asks the gateway to abort the transaction of the session with a server process, because it blocks a committed
	// one. It returns at once, may be called again while the blockade lasts, and returns false if that is no session of
	// the gateway. Nil: the gateway has none.
	Evict func(Blockade) bool
	// Changed is called after DDL was applied and before it is booked as applied, to drop cached catalog contents.
	// May be nil.
	Changed func()
	// Visible is called when a remote transaction has become visible, with when it was queued. It must not block. May be
	// nil.
	Visible func(gid txn.GID, csn txn.CSN, queued time.Time)

	// Start: everything up to this CSN is committed here already.
	Start txn.CSN
	// Life is the life of the server in which Start was read, as ServerLife told it. Empty: that of the first session.
	Life string
	// Database is the name of the database, for log records.
	Database string
	// Workers is how many transactions are executed at once, each on a connection and with a replication origin
	// (limit: the server's max_active_replication_origins or, before 18, max_replication_slots) of its own; one
	// more is used when a local transaction is lost. Default 4.
	Workers int
	// MaxItems and MaxBytes bound what is queued or being applied; Enqueue waits beyond. A single larger transaction
	// is let in when it is alone. Defaults 4096, at most 16384, and 64 MiB.
	MaxItems int
	MaxBytes int
	// GroupItems, GroupRows and GroupBytes bound how much is merged into one transaction when the workers cannot
	// keep up. Defaults 32, 1000 and 256 KiB.
	GroupItems int
	GroupRows  int
	GroupBytes int
	// Statements bounds the prepared statements of each connection. Default 500.
	Statements int
	// LocalTimeout is how long a released local COMMIT may take before its server process is terminated and the
	// transaction, if it did not commit, applied from the log. Default 10 s.
	LocalTimeout time.Duration
	// BlockedAfter is how long a statement runs before it is asked what blocks it. Default 5 ms.
	BlockedAfter time.Duration
	// TerminateAfter is how long a blocker that is no session of the gateway has, once its statement was cancelled,
	// before its server process is terminated. Sessions of the gateway get ten times as long. Default 1 s.
	TerminateAfter time.Duration
	// RetryFor bounds how long an entry whose turn it is may keep failing for lack of resources (disk, memory), and how
	// long a worker may fail to connect. Default 30 s.
	RetryFor time.Duration
	// FlushEvery is how often what is visible is made durable, if it has moved: how much there is to do again after a
	// crash. Default 1 s.
	FlushEvery time.Duration

	Logger     *slog.Logger          // nil: discarded
	Registerer prometheus.Registerer // nil: metrics are not exported
}

func (c Config) withDefaults() Config {
	setDefault(&c.Workers, 4)
	setDefault(&c.MaxItems, 4096)
	c.MaxItems = min(c.MaxItems, maxItems)
	setDefault(&c.MaxBytes, 64<<20)
	setDefault(&c.GroupItems, 32)
	setDefault(&c.GroupRows, 1000)
	setDefault(&c.GroupBytes, 256<<10)
	setDefault(&c.Statements, 500)
	setDefault(&c.LocalTimeout, 10*time.Second)
	setDefault(&c.BlockedAfter, 5*time.Millisecond)
	setDefault(&c.TerminateAfter, time.Second)
	setDefault(&c.RetryFor, 30*time.Second)
	setDefault(&c.FlushEvery, time.Second)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

func setDefault[T int | time.Duration](value *T, standard T) {
	if *value <= 0 {
		*value = standard
	}
}

// Divergence says which change of the log contradicts this node's data. It wraps txn.ErrDiverged and, where the
// server gave a reason, that.
type Divergence struct {
	CSN       txn.CSN
	Operation string // INSERT, UPDATE, DELETE, TRUNCATE, DDL; empty if it was none of the row's
	Table     string // schema.table, or empty
	Key       string // name=value of the columns that identify the row, or empty
	Expected  int64  // rows
	Actual    int64  // rows; meaningful if Cause is nil
	Cause     error  // the server's error, or nil
}

func (d *Divergence) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "apply transaction %d", d.CSN)
	for _, s := range []string{d.Operation, d.Table} {
		if s != "" {
			b.WriteString(" " + s)
		}
	}
	if d.Key != "" {
		fmt.Fprintf(&b, " (%s)", d.Key)
	}
	if d.Cause != nil {
		fmt.Fprintf(&b, ": %v", d.Cause)
	} else {
		fmt.Fprintf(&b, ": touched %d rows, not %d", d.Actual, d.Expected)
	}
	return b.String() + ": " + txn.ErrDiverged.Error()
}

// Unwrap makes errors.Is find txn.ErrDiverged and errors.As the server's error.
func (d *Divergence) Unwrap() []error {
	if d.Cause == nil {
		return []error{txn.ErrDiverged}
	}
	return []error{txn.ErrDiverged, d.Cause}
}
