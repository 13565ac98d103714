package clone

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/internal/logkey"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// maxClones is how many nodes one donor serves at once. Each takes two of the server's WAL senders and a replication slot.
const maxClones = 2

const (
	// beat is how often a donor says that it is still there, when it has nothing else to say.
	beat = 5 * time.Second
	// stall is how long the other side may neither take nor give anything before it counts as lost. A receiver that flushes to
	// a slow disk reads nothing meanwhile.
	stall = 2 * time.Minute
	// lookAtWAL is how often the donor looks how much WAL its PostgreSQL keeps for a clone.
	lookAtWAL = time.Second
	// chunkSize is how much goes into one message.
	chunkSize = 256 << 10
)

// Source is what a donor's node does for its clones.
type Source interface {
	// Connect opens a superuser's session on the replicated database; as a WAL sender, which takes SQL too, if replication is set.
	Connect(ctx context.Context, replication bool) (*pgconn.PgConn, error)
	// Hold calls at when exactly the transactions up to csn are visible, and on disk together with the node's progress,
	// which says csn. No transaction commits before at returns, nor does its record come into the WAL; so at must not take long.
	Hold(ctx context.Context, at func(ctx context.Context) error) (csn txn.CSN, err error)
	// Standing says how the node is: reason is why it is not active, or empty.
	Standing() (reason string, leader bool)
}

// Config configures a Donor.
type Config struct {
	Cluster   string // its name, for messages
	ClusterID txn.UUID
	Node      txn.NodeID
	Source    Source
	// MaxWAL bounds the WAL that PostgreSQL keeps for one clone, in bytes.
	MaxWAL uint64
	Logger *slog.Logger // nil: discarded
}

// Donor serves copies of its node's PostgreSQL. It is safe for concurrent use.
type Donor struct {
	pb.UnimplementedRecoveryServer
	cfg   Config
	log   *slog.Logger
	under atomic.Int32 // clones under way

	buffers buffers
}

// NewDonor returns a Donor, to be registered.
func NewDonor(c Config) *Donor {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return &Donor{cfg: c, log: c.Logger}
}

// Register adds the service to a gRPC server.
func (d *Donor) Register(on *grpc.Server) { pb.RegisterRecoveryServer(on, d) }

// Offer implements the RPC.
func (d *Donor) Offer(context.Context, *pb.OfferRequest) (*pb.OfferResponse, error) {
	reason, leader := d.cfg.Source.Standing()
	return &pb.OfferResponse{
		Cluster: d.cfg.Cluster, ClusterId: d.cfg.ClusterID[:], Node: uint32(d.cfg.Node), Active: reason == "", Reason: reason, Leader: leader,
		Clones: uint32(d.under.Load()), MaxClones: maxClones,
	}, nil
}

// Clone implements the RPC.
func (d *Donor) Clone(req *pb.CloneRequest, stream grpc.ServerStreamingServer[pb.CloneChunk]) error {
	node := txn.NodeID(req.Node)
	switch {
	case req.Protocol != protocol:
		return status.Errorf(codes.FailedPrecondition, "clone: node %s speaks version %d of the protocol, the donor, node %s, %d: run the same release of quorate on both",
			node, req.Protocol, d.cfg.Node, protocol)
	case !bytes.Equal(req.ClusterId, d.cfg.ClusterID[:]):
		return status.Errorf(codes.FailedPrecondition, "clone: node %s is of cluster %q (%x), the donor of %q (%s)", node, req.Cluster, req.ClusterId, d.cfg.Cluster, d.cfg.ClusterID)
	}
	if reason, _ := d.cfg.Source.Standing(); reason != "" {
		return status.Errorf(codes.Unavailable, "clone: the donor, node %s, is not active: %s", d.cfg.Node, reason)
	}
	if d.under.Add(1) > maxClones {
		d.under.Add(-1)
		return status.Errorf(codes.ResourceExhausted, "clone: the donor, node %s, makes %d clones already: try again later, or another donor", d.cfg.Node, maxClones)
	}
	defer d.under.Add(-1)
	began := time.Now()
	log := d.log.With("receiver", node)
	log.Info("a clone of this node begins")
	t := &transfer{donor: d, req: req}
	err := t.run(stream)
	if err == nil {
		log.Info("a clone of this node is through", logkey.CSN, uint64(t.csn), "bytes", t.sent.Load(), logkey.Duration, time.Since(began))
		return nil
	}
	log.Warn("a clone of this node has failed", logkey.Error, err, "bytes", t.sent.Load(), logkey.Duration, time.Since(began))
	code := codes.Unavailable
	switch {
	case errors.Is(err, ErrUnfit), errors.Is(err, errUnsupported):
		code = codes.FailedPrecondition
	case errors.Is(err, errKept):
		code = codes.Aborted
	}
	return status.Errorf(code, "clone of node %s: %v", d.cfg.Node, err)
}

// errUnsupported: the donor has something that cannot be copied.
var errUnsupported = errors.New("not supported")

// errKept: PostgreSQL would have to keep too much WAL.
var errKept = errors.New("the receiver is too slow")

// transfer is one clone, on the donor's side.
type transfer struct {
	donor  *Donor
	req    *pb.CloneRequest
	server serverFacts
	csn    txn.CSN
	sent   atomic.Uint64 // bytes
	start  backupStart
	slot   string // that keeps WAL for it

	mu     sync.Mutex // of stream.Send
	stream grpc.ServerStreamingServer[pb.CloneChunk]
	moved  atomic.Int64 // when a Send last returned, in Unix nanoseconds

	target chan txn.LSN // up to where WAL is sent
}

// run sends everything. A Send that blocks ends only when the call does, so that the work is done beside the handler, and
// the handler returns when the receiver does not read.
func (t *transfer) run(stream grpc.ServerStreamingServer[pb.CloneChunk]) error {
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	t.stream, t.target = stream, make(chan txn.LSN, 1)
	t.moved.Store(time.Now().UnixNano())
	var err error
	if t.slot, err = newName(); err != nil {
		return err
	}
	done, kept := make(chan error, 1), make(chan error, 1)
	go func() { done <- t.send(ctx) }()
	var bounding sync.WaitGroup
	bounding.Go(func() {
		if err := t.boundWAL(ctx); ctx.Err() == nil {
			kept <- err
		}
	})
	ticker := time.NewTicker(beat)
	defer ticker.Stop()
	for {
		select {
		case err := <-done:
			if cause := context.Cause(ctx); err != nil && cause != nil {
				err = errors.Join(cause, err)
			}
			cancel(nil)
			bounding.Wait()
			return err
		case err := <-kept:
			return err // send ends when the call has, as below
		case <-ticker.C:
		}
		if quiet := time.Since(time.Unix(0, t.moved.Load())); t.mu.TryLock() {
			err := error(nil)
			if quiet >= beat {
				err = t.sendLocked(&pb.CloneChunk{})
			}
			t.mu.Unlock()
			if err != nil {
				cancel(err)
			}
		} else if quiet > stall {
			// The goroutine of send ends when the call has: its Send fails then.
			return fmt.Errorf("the receiver has not read anything for %v", stall)
		}
	}
}

// boundWAL returns when PostgreSQL keeps more WAL for the clone than it may, when it cannot see how much, or when ctx ends. A
// receiver that takes less than is written, but never stands still, would in the end fill the disk.
func (t *transfer) boundWAL(ctx context.Context) (err error) {
	conn, err := t.donor.cfg.Source.Connect(ctx, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeConn(ctx, conn)) }()
	ticker := time.NewTicker(lookAtWAL)
	defer ticker.Stop()
	for {
		rows, err := query(ctx, conn, "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) FROM pg_replication_slots WHERE slot_name = '"+t.slot+"' AND restart_lsn IS NOT NULL")
		if err != nil {
			return fmt.Errorf("see how much WAL is kept: %w", err)
		}
		if len(rows) > 0 { // there is a slot
			kept, err := strconv.ParseInt(rows[0][0], 10, 64)
			if err != nil {
				return fmt.Errorf("see how much WAL is kept: %w", err)
			}
			if most := t.donor.cfg.MaxWAL; kept > 0 && uint64(kept) > most {
				return fmt.Errorf("%w: PostgreSQL keeps %s of WAL for its copy, and limits.clone_wal of the donor allows %s: join when less is written, or allow more",
					errKept, mib(uint64(kept)), mib(most))
			}
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// put sends a CloneChunk, or an archive.
func (t *transfer) put(m any) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.sendLocked(m)
}

func (t *transfer) sendLocked(m any) error {
	if err := t.stream.SendMsg(m); err != nil {
		return fmt.Errorf("send to the receiver: %w", err)
	}
	t.moved.Store(time.Now().UnixNano())
	return nil
}

// serverFacts is what a donor's server tells of itself.
type serverFacts struct {
	Facts
	segmentSize uint64
	systemID    uint64
}

func (t *transfer) send(ctx context.Context) (err error) {
	d := t.donor
	conn, err := d.cfg.Source.Connect(ctx, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeConn(ctx, conn)) }()
	if t.server, err = examine(ctx, conn); err != nil {
		return err
	}
	if err := decodeFacts(t.req.Server).check(txn.NodeID(t.req.Node), d.cfg.Node, t.server.Facts); err != nil {
		return err
	}
	if err := refuseTablespaces(ctx, conn); err != nil {
		return err
	}
	wal, err := d.cfg.Source.Connect(ctx, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeConn(ctx, wal)) }()
	// The slot, which ends with its connection, keeps what the backup will need from its first moment.
	if err := execute(ctx, wal, "CREATE_REPLICATION_SLOT "+t.slot+" TEMPORARY PHYSICAL (RESERVE_WAL)"); err != nil {
		return fmt.Errorf("reserve WAL: %w", err)
	}
	files, err := d.cfg.Source.Connect(ctx, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeConn(ctx, files)) }()
	backup := &backup{conn: files}
	if t.start, err = backup.begin(ctx, t.req.SpreadCheckpoint); err != nil {
		return err
	}
	facts := t.server.encode()
	facts.WalSegmentSize = uint32(t.server.segmentSize)
	if err := t.put(&pb.CloneChunk{Kind: &pb.CloneChunk_Begin{Begin: &pb.CloneBegin{
		Node: uint32(d.cfg.Node), Server: facts, SystemIdentifier: t.server.systemID,
		StartLsn: uint64(t.start.lsn), Timeline: t.start.timeline, Bytes: t.start.bytes,
	}}}); err != nil {
		return err
	}
	group, inner := errgroup.WithContext(ctx)
	group.Go(func() error { return t.sendWAL(inner, wal) })
	var end *pb.CloneEnd
	group.Go(func() error {
		if err := t.sendFiles(inner, backup); err != nil {
			return err
		}
		var err error
		end, err = t.place(inner, conn)
		return err
	})
	if err := group.Wait(); err != nil {
		return err
	}
	return t.put(&pb.CloneChunk{Kind: &pb.CloneChunk_End{End: end}})
}

// place decides where the copy ends: behind the transactions up to a CSN, before all others.
func (t *transfer) place(ctx context.Context, conn *pgconn.PgConn) (*pb.CloneEnd, error) {
	end := &pb.CloneEnd{}
	csn, err := t.donor.cfg.Source.Hold(ctx, func(ctx context.Context) (err error) {
		// Of an attempt that failed there may be one in the WAL, in any place.
		if end.RestorePoint, err = newName(); err != nil {
			return err
		}
		lsn, err := queryLSN(ctx, conn, "SELECT pg_create_restore_point('"+end.RestorePoint+"')")
		end.Lsn = uint64(lsn)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("find a place between two transactions: %w", err)
	}
	t.csn, end.Csn = csn, uint64(csn)
	t.target <- txn.LSN(end.Lsn)
	// The restore point needs flushing, and whoever streams WAL something that comes after the target was set.
	if _, err := queryLSN(ctx, conn, "SELECT pg_logical_emit_message(false, 'quorate.clone', '', true)"); err != nil {
		return nil, fmt.Errorf("flush the restore point: %w", err)
	}
	return end, nil
}

func newName() (string, error) {
	var id [8]byte
	if _, err := rand.Read(id[:]); err != nil {
		return "", fmt.Errorf("draw a name: %w", err)
	}
	return prefix + hex.EncodeToString(id[:]), nil
}

func examine(ctx context.Context, conn *pgconn.PgConn) (f serverFacts, err error) {
	rows, err := query(ctx, conn, `SELECT current_setting('server_version_num'), current_setting('block_size'), current_setting('wal_block_size'),
		(SELECT setting FROM pg_settings WHERE name = 'wal_segment_size'), (SELECT system_identifier FROM pg_control_system())`)
	if err != nil {
		return f, fmt.Errorf("examine PostgreSQL: %w", err)
	}
	var numbers [5]uint64
	for i := range numbers {
		if numbers[i], err = strconv.ParseUint(rows[0][i], 10, 64); err != nil {
			return f, fmt.Errorf("examine PostgreSQL: %w", err)
		}
	}
	f.Facts = Facts{Version: int(numbers[0]), Architecture: runtime.GOARCH, BlockSize: int(numbers[1]), WALBlockSize: int(numbers[2])}
	f.segmentSize, f.systemID = numbers[3], numbers[4]
	return f, nil
}

// refuseTablespaces: they lie where only the donor's operator knows to make room.
func refuseTablespaces(ctx context.Context, conn *pgconn.PgConn) error {
	rows, err := query(ctx, conn, `SELECT quote_ident(spcname), pg_tablespace_location(oid) FROM pg_tablespace
		WHERE spcname NOT IN ('pg_default', 'pg_global') ORDER BY 1`)
	if err != nil {
		return fmt.Errorf("list tablespaces: %w", err)
	}
	if len(rows) > 0 {
		return fmt.Errorf("%w: the donor has a tablespace, %s in %s, and only data directories are copied: move what is in it to pg_default and drop it",
			errUnsupported, rows[0][0], rows[0][1])
	}
	return nil
}

func queryLSN(ctx context.Context, conn *pgconn.PgConn, sql string) (txn.LSN, error) {
	rows, err := query(ctx, conn, sql)
	if err != nil {
		return 0, err
	}
	return parseLSN(rows[0][0])
}

func parseLSN(s string) (txn.LSN, error) {
	var high, low uint32
	if n, err := fmt.Sscanf(s, "%X/%X", &high, &low); err != nil || n != 2 {
		return 0, fmt.Errorf("parse LSN %q: %w", s, err)
	}
	return txn.LSN(uint64(high)<<32 | uint64(low)), nil
}

// query runs one statement, which yields rows of text.
func query(ctx context.Context, conn *pgconn.PgConn, sql string) ([][]string, error) {
	results, err := conn.Exec(ctx, sql).ReadAll()
	if err != nil {
		return nil, err
	}
	var rows [][]string
	for _, row := range results[0].Rows {
		values := make([]string, len(row))
		for i, v := range row {
			values[i] = string(v)
		}
		rows = append(rows, values)
	}
	return rows, nil
}

func execute(ctx context.Context, conn *pgconn.PgConn, sql string) error {
	_, err := conn.Exec(ctx, sql).ReadAll()
	return err
}

// closeConn closes a connection, in whatever state it is: a backup or a stream that was broken off may not answer any more.
func closeConn(ctx context.Context, conn *pgconn.PgConn) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if err := conn.Close(ctx); err != nil {
		return fmt.Errorf("close connection to PostgreSQL: %w", err)
	}
	return nil
}
