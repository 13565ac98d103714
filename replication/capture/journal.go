package capture

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/quorate/quorate/txn"
)

// spillPattern names spill files. They are unlinked as soon as they are open, so that one is left behind only when
// the process dies in between.
const spillPattern = "quorate-capture-*.spill"

// removeSpill removes what an earlier process left in dir.
func removeSpill(dir string) error {
	names, err := filepath.Glob(filepath.Join(dir, spillPattern))
	if err != nil {
		return fmt.Errorf("list spill files: %w", err)
	}
	for _, name := range names {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove old spill file: %w", err)
		}
	}
	return nil
}

func createSpill(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, spillPattern)
	if err != nil {
		return nil, fmt.Errorf("create spill file: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(fmt.Errorf("unlink spill file: %w", err), f.Close())
	}
	return f, nil
}

// journal keeps the changes of one open transaction in the order of their arrival: first in memory, the older part in
// a file once there are many. It is a sequence of records, each behind its length (uvarint):
//
//	a pgoutput message, protocol version 1   a change
//	0, index (uvarint)                       from here on versions[index] describes its relation
//
// Segments say to which subtransaction each stretch belongs, because a subtransaction may be rolled back at any time
// and then takes its stretches with it. Descriptions of relations are kept even then: the server sends one only once.
type journal struct {
	segments []segment
	aborted  map[uint32]struct{}
	versions []*relation
	tail     []byte // the bytes from offset flushed on
	flushed  int64
	file     *os.File
}

// segment is a stretch of the journal up to the start of the next segment.
type segment struct {
	start int64
	count uint64 // of changes
	xid   uint32 // 0: descriptions, which survive
}

// end is the offset behind the last record.
func (j *journal) end() int64 { return j.flushed + int64(len(j.tail)) }

// extend makes the last segment one of subtransaction xid, and longer by some changes.
func (j *journal) extend(xid uint32, changes uint64) {
	if n := len(j.segments); n > 0 && j.segments[n-1].xid == xid {
		j.segments[n-1].count += changes
		return
	}
	j.segments = append(j.segments, segment{start: j.end(), count: changes, xid: xid})
}

// append adds a change of subtransaction xid.
func (j *journal) append(xid uint32, message []byte) {
	j.extend(xid, 1)
	j.tail = appendFramed(j.tail, message)
}

// describe adds a description.
func (j *journal) describe(r *relation) {
	j.extend(0, 0)
	var record [1 + binary.MaxVarintLen64]byte
	n := 1 + binary.PutUvarint(record[1:], uint64(len(j.versions)))
	j.versions = append(j.versions, r)
	j.tail = appendFramed(j.tail, record[:n])
}

// abort drops the changes of subtransaction xid. What is at the end, the usual case, frees its room at once.
func (j *journal) abort(xid uint32) {
	n := len(j.segments)
	if n == 0 {
		return
	}
	if j.aborted == nil {
		j.aborted = make(map[uint32]struct{})
	}
	j.aborted[xid] = struct{}{}
	for n > 0 && j.dropped(j.segments[n-1].xid) {
		n--
		start := j.segments[n].start
		if start >= j.flushed {
			j.tail = j.tail[:start-j.flushed]
		} else {
			j.tail, j.flushed = j.tail[:0], start
		}
	}
	j.segments = j.segments[:n]
}

func (j *journal) dropped(xid uint32) bool {
	_, ok := j.aborted[xid]
	return ok
}

// changes counts the surviving ones.
func (j *journal) changes() (n uint64) {
	for _, s := range j.segments {
		if !j.dropped(s.xid) {
			n += s.count
		}
	}
	return n
}

// spill moves what is in memory to the file.
func (j *journal) spill(dir string) error {
	if j.file == nil {
		f, err := createSpill(dir)
		if err != nil {
			return err
		}
		j.file = f
	}
	if _, err := j.file.WriteAt(j.tail, j.flushed); err != nil {
		return fmt.Errorf("write spill file: %w", err)
	}
	j.flushed += int64(len(j.tail))
	j.tail = j.tail[:0]
	return nil
}

// reset empties the journal and gives its file back to the system.
func (j *journal) reset() error {
	var err error
	if j.file != nil {
		err = j.file.Close()
	}
	clear(j.aborted)
	clear(j.versions)
	*j = journal{segments: j.segments[:0], aborted: j.aborted, versions: j.versions[:0], tail: j.tail[:0]}
	if cap(j.tail) > maxPooled {
		j.tail = nil
	}
	if cap(j.segments) > maxPooled/24 {
		j.segments = nil
	}
	return err
}

// maxPooled is the most memory (bytes) that an ended transaction keeps for the next one.
const maxPooled = 64 << 10

// records calls visit with each surviving record. The record is valid during the call only.
func (j *journal) records(visit func(record []byte) error) error {
	for i := 0; i < len(j.segments); {
		if j.dropped(j.segments[i].xid) {
			i++
			continue
		}
		from := j.segments[i].start
		for i < len(j.segments) && !j.dropped(j.segments[i].xid) {
			i++
		}
		to := j.end()
		if i < len(j.segments) {
			to = j.segments[i].start
		}
		if err := j.stretch(from, to, visit); err != nil {
			return err
		}
	}
	return nil
}

// stretch visits the records between two offsets, both of which are borders of records.
func (j *journal) stretch(from, to int64, visit func([]byte) error) error {
	if from < j.flushed {
		border := min(to, j.flushed)
		if err := readRecords(io.NewSectionReader(j.file, from, border-from), visit); err != nil {
			return err
		}
		if to <= j.flushed {
			return nil
		}
		from = border
	}
	for rest := j.tail[from-j.flushed : to-j.flushed]; len(rest) > 0; {
		size, n := binary.Uvarint(rest)
		if n <= 0 || size > uint64(len(rest)-n) {
			return errJournal
		}
		if err := visit(rest[n : n+int(size)]); err != nil {
			return err
		}
		rest = rest[n+int(size):]
	}
	return nil
}

// readRecords visits the records of a file; every spill ends at a border of records.
func readRecords(from io.Reader, visit func([]byte) error) error {
	r := bufio.NewReaderSize(from, 256<<10)
	var record []byte
	for {
		size, err := binary.ReadUvarint(r)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read spill file: %w", err)
		}
		if size > maxMessage {
			return fmt.Errorf("%w: spilled record of %d bytes", txn.ErrCorrupt, size)
		}
		if uint64(cap(record)) < size {
			record = make([]byte, size)
		}
		record = record[:size]
		if _, err := io.ReadFull(r, record); err != nil {
			return fmt.Errorf("read spill file: %w", err)
		}
		if err := visit(record); err != nil {
			return err
		}
	}
}

// output collects the messages of a write set: up to limit bytes in memory, then part by part in a file.
type output struct {
	dir   string
	limit int
	part  []byte
	file  *os.File
	ends  []int64 // of the parts in the file
}

// write adds framed messages, which stay together.
func (o *output) write(framed []byte) error {
	if err := o.room(len(framed)); err != nil {
		return err
	}
	o.part = append(o.part, framed...)
	return nil
}

// message adds one message.
func (o *output) message(message []byte) error {
	if err := o.room(len(message) + binary.MaxVarintLen32); err != nil {
		return err
	}
	o.part = appendFramed(o.part, message)
	return nil
}

func (o *output) room(n int) error {
	if len(o.part)+n <= o.limit || len(o.part) == 0 {
		return nil
	}
	if o.file == nil {
		f, err := createSpill(o.dir)
		if err != nil {
			return err
		}
		o.file = f
	}
	if _, err := o.file.Write(o.part); err != nil {
		return fmt.Errorf("write spill file: %w", err)
	}
	end := int64(len(o.part))
	if n := len(o.ends); n > 0 {
		end += o.ends[n-1]
	}
	o.ends = append(o.ends, end)
	o.part = o.part[:0]
	return nil
}

// finish returns the last part and the earlier ones, nil when there are none. The output must not be used afterwards.
func (o *output) finish() ([]byte, txn.Parts) {
	last := o.part
	if cap(last) > 2*len(last)+1024 {
		last = bytes.Clone(last)
	}
	if o.file == nil {
		return last, nil
	}
	return last, &parts{file: o.file, ends: o.ends}
}

// discard gives the file back after an error.
func (o *output) discard() error {
	if o.file == nil {
		return nil
	}
	return o.file.Close()
}

// parts implements txn.Parts.
type parts struct {
	file *os.File
	ends []int64
	next int
}

var _ txn.Parts = (*parts)(nil)

func (p *parts) Next() ([]byte, error) {
	if p.next == len(p.ends) {
		return nil, io.EOF
	}
	var start int64
	if p.next > 0 {
		start = p.ends[p.next-1]
	}
	b := make([]byte, p.ends[p.next]-start)
	if _, err := p.file.ReadAt(b, start); err != nil {
		return nil, fmt.Errorf("read part %d of a write set: %w", p.next, err)
	}
	p.next++
	return b, nil
}

func (p *parts) Close() error { return p.file.Close() }
