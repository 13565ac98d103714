// Package capture receives what the local PostgreSQL's open transactions write, while they are open, and turns it into
// write sets when their markers come. See DESIGN.md in this directory.
package capture

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
)

// Marker is what a session emits when its transaction is ready to be decided.
type Marker struct {
	txn.Seal
	XID  txn.XID
	Base txn.CSN
	Seen txn.CSN
}

// Sink takes what capture finds. Its methods are called by one goroutine, in WAL order, and must not block: the
// stream, and with it every commit of this node, waits.
type Sink interface {
	// Expecting reports whether a session waits for a marker under this seal. Capture ignores others.
	Expecting(txn.Seal) bool
	// Marked hands over the write set of a marker. set is nil without an error when the server has not sent the
	// transaction's seal: the session must nudge it and emit seal and marker again. parts, unless nil, yields the
	// earlier parts of a large write set; the receiver closes it, and may read it on another goroutine. A marker comes
	// again after a reconnection if it had not been confirmed.
	Marked(m Marker, set *txn.WriteSet, parts txn.Parts, err error)
	// Stray reports a transaction that committed changes which no write set holds: it had no seal, or it wrote after
	// its write set was handed over. xid is its lower half; changes counts rows, TRUNCATE and DDL statements.
	Stray(xid uint32, lsn txn.LSN, changes uint64)
}

// Limits bound what capture holds. The zero value of each field means its default.
type Limits struct {
	// TransactionMemory is how many bytes of one open transaction's changes stay in memory (4 MiB); what is more goes
	// to a file.
	TransactionMemory int
	// Memory bounds the same for all open transactions together (64 MiB).
	Memory int
	// PartSize is the largest part of a write set in bytes (1 MiB), except that a single change is never cut.
	PartSize int
	// KeysPerTable is how many keys a write set may have on one table (10,000) before the table's whole key stands for
	// them; four times as many on all tables.
	KeysPerTable int
	// StatusInterval is how often the server is told what has been received (1 s). The server keeps WAL until then.
	StatusInterval time.Duration
}

// Config configures a Capture. Fields without a default are required.
type Config struct {
	// Conn says how to reach the database, as a role that may replicate.
	Conn *pgconn.Config
	// Database names it in write sets and keys.
	Database string
	// Slot and Publication default to those that pg.Install makes.
	Slot, Publication string
	// Token is what a DDL message must show to be believed. Without it any client could have peers run what it likes,
	// as whom it likes. Empty believes all: only for a database that nobody else writes to.
	Token string
	// Catalog describes the tables of the same database.
	Catalog *pg.Catalog
	Sink    Sink
	// SpillDir holds spill files. It must exist and serve nothing else that is named like them.
	SpillDir string
	Limits   Limits
	// RetryFor is for how long the stream may get no further, connection after connection, before Run gives up (10 s). No
	// marker comes meanwhile, so every commit of this node waits that long.
	RetryFor   time.Duration
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Capture follows one database. New has no side effects but the registration of metrics; Run does the work.
type Capture struct {
	cfg     Config
	metrics *metrics

	mu        sync.Mutex // guards what follows
	ready     chan struct{}
	streaming bool
}

// New returns a Capture that is not running yet.
func New(cfg Config) *Capture {
	if cfg.Slot == "" {
		cfg.Slot = pg.Slot
	}
	if cfg.Publication == "" {
		cfg.Publication = pg.Publication
	}
	if cfg.RetryFor <= 0 {
		cfg.RetryFor = 10 * time.Second
	}
	cfg.Limits = cfg.Limits.withDefaults()
	return &Capture{cfg: cfg, metrics: newMetrics(cfg.Registerer), ready: make(chan struct{})}
}

func (l Limits) withDefaults() Limits {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&l.TransactionMemory, 4<<20)
	def(&l.Memory, 64<<20)
	def(&l.PartSize, 1<<20)
	def(&l.KeysPerTable, 10_000)
	if l.StatusInterval <= 0 {
		l.StatusInterval = time.Second
	}
	return l
}

// Ready returns a channel that is closed once the stream has begun. After a lost connection it returns another one.
func (c *Capture) Ready() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ready
}

func (c *Capture) setStreaming(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case on && !c.streaming:
		close(c.ready)
	case !on && c.streaming:
		c.ready = make(chan struct{})
	}
	c.streaming = on
}

const (
	// The wait after a lost connection, doubled each time until one lasts.
	firstBackoff = 100 * time.Millisecond
	lastBackoff  = 5 * time.Second
	// lasting is how long a connection lasts that was good for something even if it got no further: the server was idle.
	// A change that the server cannot decode ends a connection sooner.
	lasting = time.Minute
)

// Run receives until ctx is done, whose cause it returns. It connects again when the connection is lost, but fails when
// that does not help for RetryFor, and at once where trying again cannot help. That connections can be made is not
// enough: at a change that it cannot decode the server ends each of them, and never comes to what is behind it.
func (c *Capture) Run(ctx context.Context) error {
	if info, err := os.Stat(c.cfg.SpillDir); err != nil {
		return fmt.Errorf("open spill directory: %w", err)
	} else if !info.IsDir() {
		return fmt.Errorf("open spill directory: %s is not a directory", c.cfg.SpillDir)
	}
	if err := removeSpill(c.cfg.SpillDir); err != nil {
		return err
	}
	backoff := firstBackoff
	var reached pglogrepl.LSN
	since := time.Now() // when a connection got further than the one before
	for {
		began := time.Now()
		received, err := c.follow(ctx)
		c.setStreaming(false)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		c.metrics.reconnects.Inc()
		lasted := time.Since(began)
		if received > reached || lasted > lasting {
			reached, since = max(reached, received), time.Now()
		}
		if lasted > lastBackoff {
			backoff = firstBackoff
		}
		left := c.cfg.RetryFor - time.Since(since)
		if left <= 0 {
			return fmt.Errorf("the replication stream has got no further for %v: %w", c.cfg.RetryFor, err)
		}
		wait := min(backoff, left)
		c.cfg.Logger.Warn("replication stream lost, connecting again", logkey.Error, err, logkey.Duration, wait)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
		backoff = min(2*backoff, lastBackoff)
	}
}

// readBuffer is the size of the buffer between the socket and the messages. The server flushes every message, so
// that a burst of small ones is what there usually is to read.
const readBuffer = 256 << 10

// connConfig is Conn as a walsender. Values travel as text: the settings give each one form on every node.
func (c *Capture) connConfig() *pgconn.Config {
	cfg := c.cfg.Conn.Copy()
	if cfg.RuntimeParams == nil {
		cfg.RuntimeParams = make(map[string]string)
	}
	for name, value := range map[string]string{
		"replication":                         "database",
		"application_name":                    "quorate capture",
		"debug_logical_replication_streaming": "immediate",
		"client_encoding":                     "UTF8",
		"search_path":                         "pg_catalog",
		"timezone":                            "UTC",
		"datestyle":                           "ISO, YMD",
		"intervalstyle":                       "postgres",
		"extra_float_digits":                  "3",
		"bytea_output":                        "hex",
		"xmlbinary":                           "base64",
		"lc_monetary":                         "C",
		"statement_timeout":                   "0",
		"idle_in_transaction_session_timeout": "0",
		"idle_session_timeout":                "0",
		"transaction_timeout":                 "0",
		"lock_timeout":                        "0",
	} {
		cfg.RuntimeParams[name] = value
	}
	cfg.BuildFrontend = func(r io.Reader, w io.Writer) *pgproto3.Frontend {
		return pgproto3.NewFrontend(bufio.NewReaderSize(r, readBuffer), w)
	}
	return cfg
}

// closeTimeout bounds the farewell to a server that may be gone.
const closeTimeout = 2 * time.Second

// follow receives over one connection until that or ctx ends, and returns how far it got.
func (c *Capture) follow(ctx context.Context) (received pglogrepl.LSN, err error) {
	conn, err := pgconn.ConnectConfig(ctx, c.connConfig())
	if err != nil {
		return 0, err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		err = errors.Join(err, conn.Close(closing))
	}()
	err = pglogrepl.StartReplication(ctx, conn, c.cfg.Slot, 0, pglogrepl.StartReplicationOptions{
		Mode: pglogrepl.LogicalReplication,
		PluginArgs: []string{
			"proto_version '2'", "streaming 'on'", "messages 'true'", "origin 'none'",
			"publication_names '" + quotePublication(c.cfg.Publication) + "'",
		},
	})
	if err != nil {
		return 0, fmt.Errorf("start replication from slot %s: %w", c.cfg.Slot, err)
	}
	f := &follower{conn: conn, interval: c.cfg.Limits.StatusInterval}
	f.stream = newStream(c.cfg, c.metrics, f.alive)
	defer f.stream.close()
	c.setStreaming(true)
	err = f.run(ctx)
	return f.received, err
}

// follower is one replication connection. Everything happens on the goroutine of run.
type follower struct {
	conn     *pgconn.PgConn
	stream   *stream
	interval time.Duration
	received pglogrepl.LSN // everything before it has been dealt with
	due      time.Time     // of the next status
}

func (f *follower) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		_ = f.conn.Conn().SetReadDeadline(time.Unix(1, 0)) // fails on a closed connection, which ends run as well
	})
	defer stop()
	if err := f.report(ctx); err != nil {
		return err
	}
	for {
		message, err := f.conn.Frontend().Receive()
		if err == nil {
			err = f.take(ctx, message)
		} else if isTimeout(err) {
			err = f.report(ctx)
		} else {
			err = fmt.Errorf("receive: %w", err)
		}
		if err != nil {
			return err
		}
	}
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// report sends a status and sets the time of the next, which is when the next read that must wait gives up. It ends
// the stream when ctx is done.
func (f *follower) report(ctx context.Context) error {
	if err := f.status(); err != nil {
		return err
	}
	f.due = time.Now().Add(f.interval)
	if err := f.conn.Conn().SetReadDeadline(f.due); err != nil {
		return fmt.Errorf("set read deadline: %w", err)
	}
	// Asked last, because the deadline may just have overwritten that of the end.
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

func (f *follower) status() error {
	update := pglogrepl.StandbyStatusUpdate{WALWritePosition: f.received, WALFlushPosition: f.received, WALApplyPosition: f.received}
	if err := pglogrepl.SendStandbyStatusUpdate(context.Background(), f.conn, update); err != nil {
		return fmt.Errorf("send status: %w", err)
	}
	return nil
}

// alive keeps the server patient during long work. It does not say what it could not send: the next read will.
func (f *follower) alive() {
	if now := time.Now(); !now.Before(f.due) && f.status() == nil {
		f.due = now.Add(f.interval)
	}
}

// take handles one protocol message.
func (f *follower) take(ctx context.Context, message pgproto3.BackendMessage) error {
	switch m := message.(type) {
	case *pgproto3.CopyData:
		return f.data(ctx, m.Data)
	case *pgproto3.ErrorResponse:
		return fmt.Errorf("receive: %w", pgconn.ErrorResponseToPgError(m))
	case *pgproto3.NoticeResponse, *pgproto3.ParameterStatus:
		return nil
	default:
		return fmt.Errorf("receive: server ended the stream with %T", message)
	}
}

// postgresEpoch is 2000-01-01 in microseconds of Unix time.
const postgresEpoch = 946_684_800_000_000

func (f *follower) data(ctx context.Context, data []byte) error {
	switch {
	case len(data) >= 25 && data[0] == pglogrepl.XLogDataByteID:
		if err := f.stream.receive(ctx, data[25:], time.UnixMicro(int64(binary.BigEndian.Uint64(data[17:]))+postgresEpoch)); err != nil {
			return err
		}
		// Changes of an open transaction may be older than what was sent before.
		f.received = max(f.received, pglogrepl.LSN(binary.BigEndian.Uint64(data[1:])))
	case len(data) == 18 && data[0] == pglogrepl.PrimaryKeepaliveMessageByteID:
		f.received = max(f.received, pglogrepl.LSN(binary.BigEndian.Uint64(data[1:])))
		if data[17] != 0 {
			return f.status()
		}
	default:
		return fmt.Errorf("%w: replication data of %d bytes", txn.ErrCorrupt, len(data))
	}
	return nil
}

// quotePublication quotes a name for publication_names, an identifier list inside a string.
func quotePublication(name string) string {
	var b []byte
	b = append(b, '"')
	for i := range len(name) {
		switch name[i] {
		case '"', '\'':
			b = append(b, name[i])
		}
		b = append(b, name[i])
	}
	return string(append(b, '"'))
}
