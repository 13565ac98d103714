package consensus

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/quorate/quorate/internal/invariant"
	"github.com/quorate/quorate/txn"
)

// The bounds of what is kept in memory for a machine that is behind. The rest waits in the log.
const (
	feedEntries = 4096
	feedBytes   = 16 << 20
)

// snapshotPatience is how long a snapshot waits for the machine to reach the index that it is to be taken at. Raft's
// FSM goroutine stands still meanwhile, so it is short.
const snapshotPatience = time.Second

var errBehind = errors.New("machine is behind the log")

// feed stands between Raft and the machine. Raft never waits for it: a machine that is slow would otherwise stop
// Raft's main thread, and on a leader with it everybody. Entries that do not fit in memory are read from the log
// again when their turn comes.
type feed struct {
	machine Machine                                 // changed by the apply goroutine only
	read    func(index uint64, out *raft.Log) error // the log
	fail    func(error)                             // the node must stop
	// committed is told each batch's last entry before anything else happens to the batch.
	committed func(term uint64, index txn.LogIndex)
	// configured is told each committed configuration, restored where to find the one that a restored snapshot has.
	configured func(index uint64, servers []raft.Server)
	restored   func() (index uint64, servers []raft.Server, err error)
	// written is told the index of each snapshot that is written, and what it needs of the log before it, before Raft
	// truncates the log behind it.
	written func(index, needs uint64)
	// latest opens the newest snapshot and tells its index; nil if there is none.
	latest func() (uint64, io.ReadCloser, error)

	// handed is the last command that Raft has handed over. Written by Raft's FSM goroutine only.
	handed atomic.Uint64
	// applied is the last command that Machine.Apply has returned for.
	applied atomic.Uint64

	wake chan struct{} // capacity 1
	stop chan struct{} // closed by halt
	once sync.Once

	// snapshotting holds something from the capture of a snapshot until it is released, which Raft does when it has
	// truncated the log.
	snapshotting chan struct{}
	replacements chan *replacement

	mu    sync.Mutex
	queue []Entry // in order, the next to apply
	bytes int
	// spilled says that there are commands in (taken, handed] beyond the queue, which only the log holds.
	spilled bool
	taken   uint64 // the last entry that the apply goroutine took
	base    uint64 // the last command that the restored snapshot covers
	// snapshot, if not nil, waits for the machine to have applied all that was handed.
	snapshot *snapshotRequest
}

// newFeed returns a feed that lacks only its functions.
func newFeed(m Machine) *feed {
	return &feed{
		machine: m, wake: make(chan struct{}, 1), stop: make(chan struct{}),
		snapshotting: make(chan struct{}, 1), replacements: make(chan *replacement),
	}
}

// replacement is a machine that is to take the other's place.
type replacement struct {
	machine Machine
	answer  chan error // capacity 1
}

type snapshotRequest struct {
	at     uint64
	answer chan snapshotAnswer // capacity 1
}

type snapshotAnswer struct {
	snapshot Snapshot
	err      error
}

var _ raft.BatchingFSM = (*feed)(nil)

// Apply implements raft.FSM.
func (f *feed) Apply(l *raft.Log) any { return f.ApplyBatch([]*raft.Log{l})[0] }

// ApplyBatch implements raft.BatchingFSM. Beside commands it gets configurations, which are not the machine's affair.
func (f *feed) ApplyBatch(logs []*raft.Log) []any {
	last := logs[len(logs)-1]
	// First of all the notice: followers have a whole apply to do that need not wait for ours.
	f.committed(last.Term, txn.LogIndex(last.Index))
	f.mu.Lock()
	for _, l := range logs {
		if l.Type == raft.LogCommand && l.Index > f.handed.Load() {
			f.pushLocked(l)
		}
	}
	f.mu.Unlock()
	f.signal()
	for _, l := range logs {
		if l.Type == raft.LogConfiguration {
			f.configured(l.Index, raft.DecodeConfiguration(l.Data).Servers)
		}
	}
	return make([]any, len(logs))
}

func (f *feed) pushLocked(l *raft.Log) {
	f.handed.Store(l.Index)
	if f.spilled || len(f.queue) >= feedEntries || f.bytes+len(l.Data) > feedBytes && len(f.queue) > 0 {
		f.spilled = true
		return
	}
	f.queue = append(f.queue, entryOf(l))
	f.bytes += len(l.Data)
}

func entryOf(l *raft.Log) Entry {
	return Entry{Index: txn.LogIndex(l.Index), Term: l.Term, Data: l.Data}
}

func (f *feed) signal() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// halt lets run end after the batch that it is at. It does not wait.
func (f *feed) halt() { f.once.Do(func() { close(f.stop) }) }

// run applies until halt.
func (f *feed) run() {
	var batch []Entry
	for {
		var err error
		if batch, err = f.next(batch[:0]); err != nil {
			f.fail(err)
			return
		}
		if len(batch) > 0 {
			f.machine.Apply(batch)
			f.applied.Store(uint64(batch[len(batch)-1].Index))
		}
		f.serveSnapshot()
		select {
		case <-f.stop:
			return
		case r := <-f.replacements:
			r.answer <- f.replace(r.machine)
		default:
		}
		if len(batch) > 0 {
			clear(batch) // do not keep the data alive
			continue
		}
		select {
		case <-f.wake:
		case r := <-f.replacements:
			r.answer <- f.replace(r.machine)
		case <-f.stop:
			return
		}
	}
}

// replace gives the entries to m from here on, beginning behind the newest snapshot, which m is restored from: what
// follows is in the log, and taken from there as if it had not fitted into memory.
func (f *feed) replace(m Machine) error {
	// While Raft finishes a snapshot it truncates the log, perhaps past the one before, which would be opened here.
	select {
	case f.snapshotting <- struct{}{}:
		defer func() { <-f.snapshotting }()
	case <-f.stop:
		return fmt.Errorf("replace machine: %w", txn.ErrClosed)
	}
	index, from, err := f.latest()
	if err != nil {
		return fmt.Errorf("replace machine: %w", err)
	}
	if from != nil {
		_, err := restore(m, from)
		if err = errors.Join(err, from.Close()); err != nil {
			return fmt.Errorf("replace machine: %w", err)
		}
	}
	f.machine = m
	f.mu.Lock()
	defer f.mu.Unlock()
	f.queue, f.bytes = nil, 0
	f.taken, f.base = index, index
	f.spilled = index < f.handed.Load()
	f.applied.Store(min(index, f.handed.Load()))
	f.signal()
	return nil
}

// next returns the entries whose turn it is, none if there are none. It reuses batch.
func (f *feed) next(batch []Entry) ([]Entry, error) {
	f.mu.Lock()
	if len(f.queue) > 0 {
		batch, f.queue = f.queue, batch
		f.bytes = 0
		f.taken = uint64(batch[len(batch)-1].Index)
		f.mu.Unlock()
		return batch, nil
	}
	if !f.spilled {
		f.mu.Unlock()
		return batch, nil
	}
	taken, handed := f.taken, f.handed.Load()
	f.mu.Unlock()

	for bytes := 0; taken < handed && len(batch) < feedEntries && bytes < feedBytes; {
		var l raft.Log
		if err := f.read(taken+1, &l); err != nil {
			return batch, fmt.Errorf("read entry %d to apply it: %w", taken+1, err)
		}
		taken++
		if l.Type == raft.LogCommand {
			batch = append(batch, entryOf(&l))
			bytes += len(l.Data)
		}
	}
	f.mu.Lock()
	f.taken = taken
	f.spilled = taken < f.handed.Load()
	f.mu.Unlock()
	return batch, nil
}

// Snapshot implements raft.FSM. Raft takes it to cover all that it has handed over, so it waits for the machine to be
// there, or gives up and leaves it for next time.
func (f *feed) Snapshot() (raft.FSMSnapshot, error) {
	request := &snapshotRequest{at: f.handed.Load(), answer: make(chan snapshotAnswer, 1)}
	f.mu.Lock()
	if f.spilled {
		f.mu.Unlock()
		return nil, fmt.Errorf("%w: applied %d of %d", errBehind, f.applied.Load(), request.at)
	}
	f.snapshot = request
	f.mu.Unlock()
	f.signal()

	timer := time.NewTimer(snapshotPatience)
	defer timer.Stop()
	var answer snapshotAnswer
	select {
	case answer = <-request.answer:
	case <-timer.C:
		if f.withdraw(request) {
			return nil, fmt.Errorf("%w: applied %d of %d", errBehind, f.applied.Load(), request.at)
		}
		answer = <-request.answer
	case <-f.stop:
		if f.withdraw(request) {
			return nil, fmt.Errorf("take snapshot: %w", txn.ErrClosed)
		}
		answer = <-request.answer
	}
	if answer.err != nil {
		return nil, answer.err
	}
	return &persisted{of: answer.snapshot, index: request.at, written: f.written, released: func() { <-f.snapshotting }}, nil
}

// withdraw takes a request back, unless the apply goroutine has it already.
func (f *feed) withdraw(r *snapshotRequest) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.snapshot != r {
		return false
	}
	f.snapshot = nil
	return true
}

func (f *feed) serveSnapshot() {
	f.mu.Lock()
	r := f.snapshot
	if r == nil || f.applied.Load() < r.at {
		f.mu.Unlock()
		return
	}
	f.snapshot = nil
	f.mu.Unlock()
	// Raft hands over nothing while it waits for a snapshot.
	invariant.Check(f.applied.Load() == r.at, "snapshot at %d, but %d is applied", r.at, f.applied.Load())
	f.snapshotting <- struct{}{} // has room: Raft takes one at a time
	s, err := f.machine.Snapshot()
	if err != nil {
		<-f.snapshotting
		err = fmt.Errorf("take snapshot at %d: %w", r.at, err)
	}
	r.answer <- snapshotAnswer{s, err}
}

// snapshotMagic begins every snapshot, followed by the index of the last command that it covers, big endian. Raft
// knows an index too, but it may be that of a later entry which is no command, and it does not tell the FSM.
var snapshotMagic = [8]byte{'Q', 'R', 'S', 'N', 'A', 'P', 0, 1}

const snapshotHeader = 16

// persisted is a machine's snapshot with our header.
type persisted struct {
	of       Snapshot
	index    uint64
	written  func(index, needs uint64)
	released func()
}

// Persist implements raft.FSMSnapshot. On error Raft cancels the sink.
func (p *persisted) Persist(sink raft.SnapshotSink) error {
	if _, err := sink.Write(binary.BigEndian.AppendUint64(snapshotMagic[:len(snapshotMagic):len(snapshotMagic)], p.index)); err != nil {
		return fmt.Errorf("write snapshot header: %w", err)
	}
	if _, err := p.of.WriteTo(sink); err != nil {
		return fmt.Errorf("write snapshot at %d: %w", p.index, err)
	}
	p.written(p.index, uint64(p.of.Needs()))
	return nil
}

// Release implements raft.FSMSnapshot.
func (p *persisted) Release() {
	p.of.Release()
	p.released()
}

// Restore implements raft.FSM. The transport sees to it that none comes after the first entry.
func (f *feed) Restore(from io.ReadCloser) error {
	invariant.Check(f.handed.Load() == f.applied.Load(), "restore while the machine is at %d of %d", f.applied.Load(), f.handed.Load())
	index, err := restore(f.machine, from)
	if err != nil {
		return err
	}
	at, servers, err := f.restored()
	if err != nil {
		return err
	}
	f.configured(at, servers)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.taken, f.base = index, index
	f.handed.Store(index)
	f.applied.Store(index)
	return nil
}

// restore brings m to what a snapshot holds, and returns the last command that it covers.
func restore(m Machine, from io.Reader) (index uint64, err error) {
	return readSnapshot(from, m.Restore)
}

// readSnapshot gives body what a machine wrote into a snapshot, and returns the last command that it covers.
func readSnapshot(from io.Reader, body func(io.Reader) error) (index uint64, err error) {
	var header [snapshotHeader]byte
	if _, err := io.ReadFull(from, header[:]); err != nil {
		return 0, fmt.Errorf("read snapshot header: %w", err)
	}
	if !bytes.Equal(header[:8], snapshotMagic[:]) {
		return 0, fmt.Errorf("read snapshot header: %w: no magic", txn.ErrCorrupt)
	}
	index = binary.BigEndian.Uint64(header[8:])
	if err := body(from); err != nil {
		return 0, fmt.Errorf("restore snapshot at %d: %w", index, err)
	}
	return index, nil
}

// pristine reports whether the machine has not been given any entry yet, so that a snapshot may still be restored.
func (f *feed) pristine() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.handed.Load() == f.base
}
