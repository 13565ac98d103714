// Package events keeps what has happened to a node: elections, members that are lost and come back, quorum lost and
// regained, divergence, recoveries. It is a log in two small files, which survives a crash of the process at any moment
// and, but for the last instants, one of the machine. What is damaged is left out when it is read, the rest is kept.
//
// Events are few. A fault that repeats itself without end must not drown the others: the same event, by kind, node and
// text, is noted five times in ten seconds and no more; the next one that is says how many were left out.
package events

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/quorate/quorate/txn"
)

// Severity says whether somebody has to look.
type Severity uint8

// The severities. Their numbers are those of quorate.v1.Severity, and are in files: never renumber.
const (
	Info    Severity = 1
	Warning Severity = 2
	Error   Severity = 3
)

var severityNames = [...]string{"", "info", "warning", "error"}

// String returns the name.
func (s Severity) String() string {
	if int(s) < len(severityNames) && s != 0 {
		return severityNames[s]
	}
	return "unknown"
}

// ParseSeverity reads what String writes.
func ParseSeverity(name string) (Severity, bool) {
	i := slices.Index(severityNames[1:], name)
	return Severity(i + 1), i >= 0
}

// Event is something that has happened.
type Event struct {
	Number   uint64            `json:"number"` // ascending, from 1; given by Append
	Time     time.Time         `json:"time"`   // likewise
	Severity Severity          `json:"severity"`
	Kind     string            `json:"kind"` // for programs: "leader", "quorum_lost" …
	Node     txn.NodeID        `json:"node"` // whom it is about
	Text     string            `json:"text"` // for people: a short sentence without a stop
	Fields   map[string]string `json:"fields,omitempty"`
	Log      uint64            `json:"log,omitempty"` // see News; given by Append
}

// Bounds. The two files together hold some five thousand events, and as many are kept in memory as maxKept.
const (
	maxFile  = 1 << 20
	maxKept  = 4096
	maxEvent = 8 << 10
	quiet    = 10 * time.Second
	burst    = 5
	maxTold  = 256 // of which repetitions are left out
)

// Log is safe for concurrent use. Append never waits for the disk.
type Log struct {
	dir     string
	failed  func(error)
	flushed sync.WaitGroup
	due     chan struct{} // has room for one: something is to be written

	mu      sync.Mutex
	kept    []Event // ascending
	next    uint64
	mark    uint64  // the highest log index that was news
	pending []Event // not written yet
	told    map[string]*repetition
	changed chan struct{} // closed at the next Append
	closed  bool

	// Of the writer.
	file *os.File
	size int64
	torn bool // the last write may have ended within a line
}

// repetition is what was told of one event since at, and what was not.
type repetition struct {
	at            time.Time
	told, omitted int
}

// Open reads the events in the files "events" and "events.old" of a directory and goes on from there. failed takes what
// keeps events from being written, which ends nothing else; it must not block.
func Open(dir string, failed func(error)) (*Log, error) {
	l := &Log{dir: dir, failed: failed, next: 1, due: make(chan struct{}, 1), changed: make(chan struct{}), told: make(map[string]*repetition)}
	for _, name := range []string{l.old(), l.current()} {
		if err := l.read(name); err != nil {
			return nil, err
		}
	}
	if err := l.open(); err != nil {
		return nil, err
	}
	l.flushed.Go(l.write)
	return l, nil
}

func (l *Log) current() string { return filepath.Join(l.dir, "events") }
func (l *Log) old() string     { return filepath.Join(l.dir, "events.old") }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A line is the CRC-32C of the JSON behind it, in eight hexadecimal digits, a blank, the JSON, and a newline.
func appendLine(b []byte, e Event) ([]byte, error) {
	text, err := json.Marshal(e)
	if err != nil {
		return b, err
	}
	b = fmt.Appendf(b, "%08x ", crc32.Checksum(text, castagnoli))
	return append(append(b, text...), '\n'), nil
}

// parseLine reports whether the line is whole.
func parseLine(line []byte) (e Event, ok bool) {
	if len(line) < 10 || line[8] != ' ' {
		return e, false
	}
	sum, err := strconv.ParseUint(string(line[:8]), 16, 32)
	if err != nil || uint32(sum) != crc32.Checksum(line[9:], castagnoli) {
		return e, false
	}
	return e, json.Unmarshal(line[9:], &e) == nil
}

// read takes the events of a file. What is torn or damaged is left out.
func (l *Log) read(name string) error {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	defer f.Close()
	lines := bufio.NewReaderSize(f, 64<<10)
	for {
		line, err := lines.ReadSlice('\n')
		if e, ok := parseLine(bytes.TrimSuffix(line, []byte{'\n'})); ok && e.Number >= l.next {
			l.keep(e)
			l.next, l.mark = e.Number+1, max(l.mark, e.Log)
		}
		switch {
		case err == nil:
		case errors.Is(err, bufio.ErrBufferFull): // no event is that long; its rest will not be whole either
		case errors.Is(err, io.EOF):
			return nil
		default:
			return fmt.Errorf("read events: %w", err)
		}
	}
}

// keep is called with mu held, or before anybody else knows l.
func (l *Log) keep(e Event) {
	if len(l.kept) >= 2*maxKept {
		l.kept = slices.Clone(l.kept[maxKept:])
	}
	l.kept = append(l.kept, e)
}

// open opens the current file for writing. A last line that is torn is ended, so that the next one is whole.
func (l *Log) open() error {
	f, err := os.OpenFile(l.current(), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open events: %w", err)
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err == nil && size > 0 {
		last := make([]byte, 1)
		if _, err = f.ReadAt(last, size-1); err == nil && last[0] != '\n' {
			_, err = f.Write([]byte{'\n'})
			size++
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("open events: %w", err), f.Close())
	}
	l.file, l.size = f, size
	return nil
}

// News reports whether what the cluster's log says at an index is news, which must be asked in the order of the log: each
// entry once, however often the log is read again. Each event carries the highest such index, so it is on disk when the
// events are that are noted behind it, and as long as any event is.
func (l *Log) News(index uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if index <= l.mark {
		return false
	}
	l.mark = index
	return true
}

// Append notes an event, as of now, and returns its number; 0 if it was left out as a repetition, or after Close.
func (l *Log) Append(e Event) uint64 {
	now := time.Now()
	e.Text = cut(e.Text)
	e.Fields = maps.Clone(e.Fields)
	for name, value := range e.Fields {
		e.Fields[name] = cut(value)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || !l.worthNoting(&e, now) {
		return 0
	}
	e.Number, e.Time, e.Log = l.next, now.Round(0), l.mark
	l.next++
	l.keep(e)
	if len(l.pending) < maxKept { // beyond, the disk does not take them
		l.pending = append(l.pending, e)
	}
	close(l.changed)
	l.changed = make(chan struct{})
	select {
	case l.due <- struct{}{}:
	default:
	}
	return e.Number
}

// cut bounds a text, at a character.
func cut(s string) string {
	const most = maxEvent / 8
	if len(s) <= most {
		return s
	}
	return string(bytes.ToValidUTF8([]byte(s[:most]), nil)) + "…"
}

// worthNoting tells repetitions from news. Called with mu held.
func (l *Log) worthNoting(e *Event, now time.Time) bool {
	name := fmt.Sprintf("%s %d %s", e.Kind, e.Node, e.Text)
	r := l.told[name]
	if r != nil && now.Sub(r.at) < quiet {
		if r.told < burst {
			r.told++
			return true
		}
		r.omitted++
		return false
	}
	if r != nil && r.omitted > 0 {
		if e.Fields == nil {
			e.Fields = make(map[string]string)
		}
		e.Fields["repetitions"] = strconv.Itoa(r.omitted)
	}
	if len(l.told) >= maxTold {
		maps.DeleteFunc(l.told, func(_ string, r *repetition) bool { return now.Sub(r.at) >= quiet })
	}
	if len(l.told) < maxTold {
		l.told[name] = &repetition{at: now, told: 1}
	}
	return true
}

// write writes what is pending, and flushes it, until Close.
func (l *Log) write() {
	for range l.due {
		l.mu.Lock()
		batch := l.pending
		l.pending = nil
		l.mu.Unlock()
		if err := l.writeBatch(batch); err != nil {
			l.failed(fmt.Errorf("write events: %w", err))
		}
	}
}

func (l *Log) writeBatch(batch []Event) error {
	if len(batch) == 0 {
		return nil
	}
	var b []byte
	if l.torn {
		b = append(b, '\n')
	}
	var errs []error
	for _, e := range batch {
		var err error
		b, err = appendLine(b, e)
		errs = append(errs, err)
	}
	if l.size > 0 && l.size+int64(len(b)) > maxFile {
		errs = append(errs, l.rotate())
	}
	n, err := l.file.Write(b)
	l.size += int64(n)
	l.torn = err != nil
	return errors.Join(append(errs, err, l.file.Sync())...)
}

// rotate makes the current file the old one. If that fails the current one grows on.
func (l *Log) rotate() error {
	full := l.file
	// It is there already if the last attempt came no further.
	if err := os.Rename(l.current(), l.old()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := l.open(); err != nil {
		return err // full is still open, and written to
	}
	return full.Close()
}

// Close writes what is pending. Nothing is noted afterwards. Closing twice, or nil, does nothing more.
func (l *Log) Close() error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	l.mu.Unlock()
	close(l.due) // Append does not send any more
	l.flushed.Wait()
	if err := l.file.Close(); err != nil {
		return fmt.Errorf("close events: %w", err)
	}
	return nil
}

// Query selects events. The zero value selects all.
type Query struct {
	After   uint64 // only higher numbers
	Since   time.Time
	AtLeast Severity
	Kind    string
	Limit   int // 0: no limit
}

// Find returns the events that a query selects, the newest first.
func (l *Log) Find(q Query) []Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	var found []Event
	for _, e := range slices.Backward(l.kept) {
		if e.Number <= q.After || q.Limit > 0 && len(found) == q.Limit {
			break
		}
		if q.selects(&e) {
			found = append(found, e)
		}
	}
	return found
}

func (q *Query) selects(e *Event) bool {
	return !e.Time.Before(q.Since) && e.Severity >= q.AtLeast && (q.Kind == "" || e.Kind == q.Kind)
}

// Last returns the number of the newest event, 0 if there is none, and a channel that is closed when there is a newer.
func (l *Log) Last() (uint64, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.next - 1, l.changed
}

// Cursor is a place in a log: behind the event with this Number. With Number 0 it is before the first event at or after
// Time. Time is the event's, to the millisecond, and tells whether the log still is the one in which it had that number:
// the last events before a machine crashed may be lost, and their numbers given again.
type Cursor struct {
	Number uint64
	Time   time.Time
}

// Follow returns the events behind a cursor that a query selects, the oldest first; the cursor behind all of them, those
// that are not selected included; and a channel that is closed when there are more. Of the query, After and Limit do not
// count. What the log does not hold any more is left out.
func (l *Log) Follow(from Cursor, q Query) (found []Event, to Cursor, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	rest := l.kept
	at, known := slices.BinarySearchFunc(rest, from.Number, func(e Event, number uint64) int { return cmp.Compare(e.Number, number) })
	switch {
	case from.Number == 0:
		rest = slices.DeleteFunc(slices.Clone(rest), func(e Event) bool { return e.Time.Before(from.Time) })
	case known && rest[at].Time.UnixMilli() == from.Time.UnixMilli():
		rest = rest[at+1:]
	case known || at == len(rest): // another event has the number, or none has it yet: this is another log, or was
		rest = slices.DeleteFunc(slices.Clone(rest), func(e Event) bool { return !e.Time.After(from.Time) })
	default: // it is not kept any more
		rest = rest[at:]
	}
	for _, e := range rest {
		if q.selects(&e) {
			found = append(found, e)
		}
	}
	if n := len(l.kept); n > 0 {
		from = Cursor{l.kept[n-1].Number, l.kept[n-1].Time}
	}
	return found, from, l.changed
}
