package clone

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// Target is what is to be made.
type Target struct {
	// Dir is the data directory, which must not exist. After an error it may hold a part of a copy.
	Dir string
	// UID and GID own it; -1: whoever calls.
	UID, GID  int
	Cluster   string // its name, for messages
	ClusterID txn.UUID
	Node      txn.NodeID
	Server    Facts // the programs that will run on it
	// SpreadCheckpoint lets the donor's checkpoint take its time.
	SpreadCheckpoint bool
	// Progress is told how the copy goes, several times a second, by one goroutine at a time; it must not block. May be nil.
	Progress func(Progress)
}

// Result tells what was received.
type Result struct {
	Donor txn.NodeID
	// RestorePoint is where recovery has to end. Then the copy holds exactly the transactions up to CSN.
	RestorePoint string
	CSN          txn.CSN
}

var (
	// ErrNoSpace: the copy does not fit.
	ErrNoSpace = errors.New("not enough disk space for the clone")
	// ErrBusy: the donor makes as many clones as it can.
	ErrBusy = errors.New("the donor is busy")
	// ErrTooSlow: the donor's PostgreSQL would have to keep more WAL for this copy than its node allows.
	ErrTooSlow = errors.New("the copy is made too slowly")
)

// spareSpace is what must be free beyond the donor's files, for WAL and what recovery writes.
const spareSpace = 256 << 20

// maxChunk bounds what is taken from a donor in one message.
const maxChunk = 4 << 20

// Receive makes a copy of the donor at the other end of a connection. When it returns nil everything is on disk, and the
// server that is started on the directory has to be told to recover to the result's restore point.
func Receive(ctx context.Context, donor grpc.ClientConnInterface, t Target) (Result, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r := &receiver{Target: t, files: map[string]received{}, cancel: cancel, progress: Progress{Phase: PhaseCheckpoint, Started: time.Now()}}
	result, err := r.run(ctx, donor)
	if err == nil {
		return result, nil
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w (%w)", cause, err)
	}
	var refused interface{ GRPCStatus() *status.Status }
	if errors.As(err, &refused) {
		switch s := refused.GRPCStatus(); s.Code() {
		case codes.FailedPrecondition:
			err = fmt.Errorf("%w: %s", ErrUnfit, s.Message())
		case codes.ResourceExhausted:
			err = fmt.Errorf("%w: %s", ErrBusy, s.Message())
		case codes.Aborted:
			err = fmt.Errorf("%w: %s", ErrTooSlow, s.Message())
		}
	}
	return Result{}, fmt.Errorf("clone: %w", err)
}

// receiver is one clone, on the receiver's side.
type receiver struct {
	Target
	cancel   context.CancelCauseFunc
	begin    *pb.CloneBegin
	root     *os.Root
	files    map[string]received
	manifest []byte
	wal      *walFiles

	mu       sync.Mutex
	progress Progress
	reported time.Time
}

func (r *receiver) run(ctx context.Context, donor grpc.ClientConnInterface) (result Result, err error) {
	stream, err := pb.NewRecoveryClient(donor).Clone(ctx, &pb.CloneRequest{
		Protocol: protocol, Cluster: r.Cluster, ClusterId: r.ClusterID[:], Node: uint32(r.Node), Server: r.Server.encode(), SpreadCheckpoint: r.SpreadCheckpoint,
	}, grpc.MaxCallRecvMsgSize(maxChunk), grpc.ForceCodecV2(newCodec()))
	if err != nil {
		return result, fmt.Errorf("ask the donor: %w", err)
	}
	chunk, err := r.next(stream)
	if err != nil {
		return result, err
	}
	if r.begin = chunk.GetBegin(); r.begin == nil {
		return result, errors.New("the donor does not begin with what it is")
	}
	if err := r.prepare(); err != nil {
		return result, err
	}
	defer func() { err = errors.Join(err, r.root.Close()) }()
	end, err := r.receive(ctx, stream)
	if err != nil {
		return result, err
	}
	if err := checkManifest(r.manifest, r.begin.SystemIdentifier, r.files); err != nil {
		return result, err
	}
	r.advance(PhaseFlush, nil)
	if err := flushAll(ctx, r.Dir); err != nil {
		return result, err
	}
	return Result{Donor: txn.NodeID(r.begin.Node), RestorePoint: end.RestorePoint, CSN: txn.CSN(end.Csn)}, nil
}

// next returns the next chunk that says something. A donor that says nothing at all for long counts as lost.
func (r *receiver) next(stream grpc.ServerStreamingClient[pb.CloneChunk]) (*pb.CloneChunk, error) {
	for {
		lost := time.AfterFunc(stall, func() { r.cancel(fmt.Errorf("the donor has said nothing for %v", stall)) })
		chunk, err := stream.Recv()
		lost.Stop()
		if errors.Is(err, io.EOF) {
			return nil, errors.New("receive from the donor: the stream ended before the copy was complete")
		}
		if err != nil {
			return nil, fmt.Errorf("receive from the donor: %w", err)
		}
		if chunk.Kind != nil {
			return chunk, nil
		}
		r.advance("", nil) // whoever watches sees that something lives
	}
}

// prepare makes the directory, if the copy will fit.
func (r *receiver) prepare() error {
	b := r.begin
	donor := decodeFacts(b.Server)
	if err := r.Server.check(r.Node, txn.NodeID(b.Node), donor); err != nil {
		return err
	}
	// Powers of two, as PostgreSQL has them; what else is there would be divided by.
	if size := b.Server.WalSegmentSize; size < 1<<20 || size > 1<<30 || size&(size-1) != 0 {
		return fmt.Errorf("the donor has WAL segments of %d bytes", size)
	}
	if b.Bytes > math.MaxInt64/2 {
		return fmt.Errorf("the donor has %d bytes", b.Bytes)
	}
	free, err := freeSpace(filepath.Dir(r.Dir))
	if err != nil {
		return err
	}
	if needed := b.Bytes + spareSpace; free < needed {
		return fmt.Errorf("%w: %s has %s free, node %s has %s, and %s more are needed for WAL: make room, or move data_dir",
			ErrNoSpace, filepath.Dir(r.Dir), mib(free), txn.NodeID(b.Node), mib(b.Bytes), mib(spareSpace))
	}
	if err := os.Mkdir(r.Dir, 0o700); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	if r.root, err = os.OpenRoot(r.Dir); err != nil {
		return fmt.Errorf("open directory: %w", err)
	}
	if err := r.own("."); err != nil {
		return errors.Join(err, r.root.Close())
	}
	r.wal = &walFiles{root: r.root, own: r.own, timeline: b.Timeline, size: uint64(b.Server.WalSegmentSize)}
	r.wal.at = txn.LSN(b.StartLsn - b.StartLsn%r.wal.size)
	r.mu.Lock()
	r.progress.Donor, r.progress.Total = txn.NodeID(b.Node), b.Bytes
	r.mu.Unlock()
	r.advance(PhaseCopy, func(p *Progress) { p.Copying = time.Now() })
	return nil
}

func freeSpace(dir string) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("see how much space is free in %s: %w", dir, err)
	}
	return st.Bavail * uint64(st.Bsize), nil
}

func mib(n uint64) string { return fmt.Sprintf("%d MiB", n>>20) }

func (r *receiver) own(name string) error {
	if r.UID < 0 {
		return nil
	}
	return r.root.Lchown(name, r.UID, r.GID)
}

// receive takes everything up to the end. The archive is unpacked beside the reading of the stream, which waits for it:
// what is not yet written is at most one message.
func (r *receiver) receive(ctx context.Context, stream grpc.ServerStreamingClient[pb.CloneChunk]) (*pb.CloneEnd, error) {
	archive, in := io.Pipe()
	var unpacking errgroup.Group
	unpacking.Go(func() error {
		err := r.unpack(archive)
		archive.CloseWithError(err) // makes the other side's next write fail
		return err
	})
	end, err := r.dispatch(stream, in)
	if err != nil {
		in.CloseWithError(err)
	}
	unpacked := unpacking.Wait()
	closed := r.wal.close()
	switch {
	case unpacked != nil && (err == nil || errors.Is(err, unpacked)):
		return nil, unpacked
	case err != nil:
		return nil, err
	case closed != nil:
		return nil, closed
	case uint64(r.wal.at) < end.Lsn:
		return nil, fmt.Errorf("%w: WAL up to %s of %s arrived", errCorrupt, r.wal.at, txn.LSN(end.Lsn))
	}
	return end, nil
}

func (r *receiver) dispatch(stream grpc.ServerStreamingClient[pb.CloneChunk], archive *io.PipeWriter) (*pb.CloneEnd, error) {
	complete := false // the archive
	for {
		chunk, err := r.next(stream)
		if err != nil {
			return nil, err
		}
		switch k := chunk.Kind.(type) {
		case *pb.CloneChunk_Archive:
			if complete {
				return nil, errors.New("the donor goes on with the archive after the manifest")
			}
			if _, err := archive.Write(k.Archive); err != nil {
				return nil, err
			}
			r.advance("", func(p *Progress) { p.Bytes += uint64(len(k.Archive)) })
		case *pb.CloneChunk_Manifest:
			if !complete {
				complete = true
				if err := archive.Close(); err != nil {
					return nil, err
				}
				r.advance(PhaseLog, nil)
			}
			if len(r.manifest)+len(k.Manifest.Data) > maxManifest {
				return nil, fmt.Errorf("the donor's manifest has more than %s", mib(maxManifest))
			}
			r.manifest = append(r.manifest, k.Manifest.Data...)
		case *pb.CloneChunk_Wal:
			if err := r.wal.write(txn.LSN(k.Wal.Lsn), k.Wal.Data); err != nil {
				return nil, err
			}
			r.advance("", func(p *Progress) { p.WAL += uint64(len(k.Wal.Data)) })
		case *pb.CloneChunk_Timeline:
			if err := r.wal.history(k.Timeline.Name, k.Timeline.Content); err != nil {
				return nil, err
			}
		case *pb.CloneChunk_End:
			switch {
			case !complete:
				return nil, errors.New("the donor ends without a manifest")
			case !restorePoint.MatchString(k.End.RestorePoint):
				return nil, fmt.Errorf("the donor ends at a place that is called %q", k.End.RestorePoint)
			}
			return k.End, nil
		default:
			return nil, fmt.Errorf("the donor sends %T, which is not expected here", k)
		}
	}
}

var restorePoint = regexp.MustCompile(`^` + prefix + `[0-9a-f]{16}$`)

// reportEvery is how often progress is told.
const reportEvery = 200 * time.Millisecond

// advance changes the progress and tells it.
func (r *receiver) advance(phase Phase, change func(*Progress)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if change != nil {
		change(&r.progress)
	}
	if phase != "" {
		r.progress.Phase = phase
	}
	if now := time.Now(); r.Progress != nil && (phase != "" || now.Sub(r.reported) >= reportEvery) {
		r.reported = now
		r.Progress(r.progress)
	}
}

// left lists what of a donor's data directory is its own and not its data: settings that its node or its operator made
// for it, and what says who runs there. Lines of postgresql.conf are looked at later; see writeSettings.
var left = map[string]bool{
	"postgresql.auto.conf": true, "quorate.conf": true, markerFile: true,
	"standby.signal": true, "recovery.signal": true, "postmaster.pid": true, "postmaster.opts": true,
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// unpack writes the files of the archive into the directory. Names that lead out of it are refused, by os.Root.
func (r *receiver) unpack(in io.Reader) error {
	archive := tar.NewReader(in)
	buffer := make([]byte, 256<<10)
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			// What follows the end of the archive is padding; the writer is not to wait for ever.
			_, err := io.Copy(io.Discard, in)
			return err
		}
		if err != nil {
			return fmt.Errorf("read the archive: %w", err)
		}
		name := path.Clean(h.Name)
		if !filepath.IsLocal(name) || strings.ContainsRune(name, 0) {
			return fmt.Errorf("%w: the archive has %q", errCorrupt, h.Name)
		}
		switch h.Typeflag {
		case tar.TypeDir:
			if name == "." {
				continue
			}
			if err := r.root.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) { // WAL may have come before
				return fmt.Errorf("unpack: %w", err)
			}
			err = r.own(name)
		case tar.TypeReg:
			err = r.unpackFile(name, archive, buffer)
		default: // links are tablespaces, and the donor has none
			err = fmt.Errorf("%w: the archive has %q of type %q", errCorrupt, h.Name, h.Typeflag)
		}
		if err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
	}
}

func (r *receiver) unpackFile(name string, content io.Reader, buffer []byte) (err error) {
	if _, twice := r.files[name]; twice {
		return fmt.Errorf("%w: file %q came twice", errCorrupt, name)
	}
	out := io.Discard
	if !left[name] {
		f, openErr := r.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if openErr != nil {
			return openErr
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		if err := r.own(name); err != nil {
			return err
		}
		out = f
	}
	sum := crc32.New(castagnoli)
	n, err := io.CopyBuffer(onlyWriter{io.MultiWriter(sum, out)}, content, buffer)
	if err != nil {
		return fmt.Errorf("file %q: %w", name, err)
	}
	r.files[name] = received{size: n, crc: sum.Sum32()}
	if f, ok := out.(*os.File); ok && n >= 1<<20 {
		// Have the kernel begin to write now, so that there is little to wait for at the end. Some file systems cannot.
		_ = unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE)
	}
	return nil
}

// onlyWriter hides that a writer can read for itself, so that it is given the buffer's size at a time.
type onlyWriter struct{ io.Writer }

// walFiles writes what comes of the WAL into segments.
type walFiles struct {
	root     *os.Root
	own      func(name string) error
	timeline uint32
	size     uint64  // of a segment
	at       txn.LSN // where it goes on
	file     *os.File
}

// segment returns the name of the file that holds a position.
func (w *walFiles) segment(lsn txn.LSN) string {
	n, per := uint64(lsn)/w.size, (uint64(1)<<32)/w.size
	return fmt.Sprintf("pg_wal/%08X%08X%08X", w.timeline, n/per, n%per)
}

func (w *walFiles) write(lsn txn.LSN, data []byte) error {
	if lsn != w.at {
		return fmt.Errorf("%w: WAL goes on at %s instead of %s", errCorrupt, lsn, w.at)
	}
	for len(data) > 0 {
		offset := uint64(w.at) % w.size
		if offset == 0 || w.file == nil {
			if err := w.next(); err != nil {
				return err
			}
		}
		n := min(uint64(len(data)), w.size-offset)
		if _, err := w.file.WriteAt(data[:n], int64(offset)); err != nil {
			return fmt.Errorf("write WAL: %w", err)
		}
		data = data[n:]
		w.at += txn.LSN(n)
	}
	return nil
}

// next begins a segment. PostgreSQL expects whole ones.
func (w *walFiles) next() error {
	if err := w.close(); err != nil {
		return err
	}
	if err := w.directory(); err != nil {
		return err
	}
	name := w.segment(w.at)
	f, err := w.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("write WAL: %w", err)
	}
	w.file = f
	if err := errors.Join(f.Truncate(int64(w.size)), w.own(name)); err != nil {
		return fmt.Errorf("write WAL: %w", err)
	}
	return nil
}

// directory makes pg_wal, which WAL may be quicker for than the archive.
func (w *walFiles) directory() error {
	if err := w.root.Mkdir("pg_wal", 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return fmt.Errorf("write WAL: %w", err)
	}
	return w.own("pg_wal")
}

var historyFile = regexp.MustCompile(`^[0-9A-F]{8}\.history$`)

func (w *walFiles) history(name string, content []byte) error {
	if !historyFile.MatchString(name) {
		return fmt.Errorf("%w: timeline file %q", errCorrupt, name)
	}
	if err := w.directory(); err != nil {
		return err
	}
	name = "pg_wal/" + name
	if err := w.root.WriteFile(name, content, 0o600); err != nil {
		return fmt.Errorf("write history of a timeline: %w", err)
	}
	return w.own(name)
}

func (w *walFiles) close() error {
	if w.file == nil {
		return nil
	}
	err := w.file.Close()
	w.file = nil
	return err
}

// flushAll makes everything below a directory durable, the directory's own name excepted.
func flushAll(ctx context.Context, dir string) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(8)
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		group.Go(func() error { return flush(name) })
		return nil
	})
	if err := errors.Join(group.Wait(), err); err != nil {
		return fmt.Errorf("flush the clone: %w", err)
	}
	return nil
}

func flush(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
