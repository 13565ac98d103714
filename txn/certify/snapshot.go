package certify

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"

	"github.com/quorate/quorate/txn"
)

// magic begins a snapshot; its last byte is the version of the format.
var magic = []byte("quorate certifier\x01")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Snapshot is a copy of a Certifier's state. It is independent of the Certifier, which may go on deciding while the
// snapshot is written.
type Snapshot struct{ c Certifier }

// Snapshot copies the state, in microseconds: the copy shares the memory, and the Certifier copies pieces of 50 KiB as
// it comes to change them, each once per Snapshot.
func (c *Certifier) Snapshot() *Snapshot {
	s := &Snapshot{*c}
	s.c.keys, s.c.outcomes, s.c.found = c.keys.clone(), c.outcomes.clone(), nil
	return s
}

// WriteTo writes the snapshot. Certifiers that have taken the same calls write the same bytes, no matter whether they
// were restored in between: only what can still influence a decision or an Outcome is written, oldest first. It may
// be called more than once.
//
// The format: magic, then as unsigned varints MaxKeys, MaxOutcomes, last, horizon, the digest (8 bytes, little
// endian as all fixed numbers) and the last use of each mode; the number of keys, and for each the 16 bytes, the set
// of its modes above the horizon (one byte) and their CSNs relative to the horizon; the number of outcomes, and for
// each the GID (incarnation as 8 bytes), the reason (one byte), before relative to the outcome before it, and if it
// is a conflict With, mode and key; last the CRC-32C of everything.
func (s *Snapshot) WriteTo(w io.Writer) (int64, error) {
	out := &writer{w: w, b: make([]byte, 0, 64<<10)}
	c := &s.c
	out.b = append(out.b, magic...)
	out.uint(uint64(c.maxKeys))
	out.uint(uint64(c.maxOutcomes))
	out.uint(uint64(c.last))
	out.uint(uint64(c.horizon))
	out.fixed(c.digest)
	for _, csn := range c.lastUse[1:] {
		out.uint(uint64(csn))
	}

	limit := c.offset(c.horizon)
	head, count := c.keys.at(0).newer, c.keys.count
	for ; head != 0 && c.keys.at(head).lastUse() <= limit; head = c.keys.at(head).newer {
		count-- // awaits pruning
	}
	out.uint(uint64(count))
	for ref := head; ref != 0; ref = c.keys.at(ref).newer {
		r := c.keys.at(ref)
		modes := byte(0)
		for mode := 1; mode < txn.NumModes; mode++ {
			if r.last[mode] > limit {
				modes |= 1 << mode
			}
		}
		out.b = append(append(out.b, r.key[:]...), modes)
		for mode := 1; mode < txn.NumModes; mode++ {
			if r.last[mode] > limit {
				out.uint(uint64(r.last[mode] - limit))
			}
		}
		out.flush(false)
	}

	first := c.outcomes.first
	for first < c.outcomes.next && c.outcomes.at(first).before < c.horizon {
		first++
	}
	out.uint(c.outcomes.next - first)
	before := c.horizon
	for sequence := first; sequence < c.outcomes.next; sequence++ {
		o := c.outcomes.at(sequence)
		out.uint(uint64(o.gid.Node))
		out.fixed(o.gid.Incarnation)
		out.uint(o.gid.Sequence)
		out.b = append(out.b, byte(o.reason))
		out.uint(uint64(o.before - before))
		before = o.before
		if o.reason == txn.AbortConflict {
			out.uint(uint64(o.with))
			out.b = append(append(out.b, byte(o.mode)), o.key[:]...)
		}
		out.flush(false)
	}
	out.flush(true)
	out.b = binary.LittleEndian.AppendUint32(out.b, out.sum)
	out.flush(true)
	if out.err != nil {
		return out.n, fmt.Errorf("write certifier snapshot: %w", out.err)
	}
	return out.n, nil
}

// writer collects bytes and their checksum; the first error sticks.
type writer struct {
	w   io.Writer
	b   []byte
	sum uint32
	n   int64
	err error
}

func (w *writer) uint(v uint64)  { w.b = binary.AppendUvarint(w.b, v) }
func (w *writer) fixed(v uint64) { w.b = binary.LittleEndian.AppendUint64(w.b, v) }

// flush passes on what has been collected, if that is much or must be.
func (w *writer) flush(must bool) {
	if !must && len(w.b) < cap(w.b)-256 {
		return
	}
	w.sum = crc32.Update(w.sum, castagnoli, w.b)
	if w.err == nil {
		n := 0
		n, w.err = w.w.Write(w.b)
		w.n += int64(n)
	}
	w.b = w.b[:0]
}

// Restore replaces the state, bounds included, by what WriteTo wrote. It may read beyond the end of the snapshot. On
// an error, which wraps txn.ErrCorrupt if the fault is in the bytes, the Certifier is as before. It takes memory only
// as it reads, and accepts nothing that WriteTo would not have written.
func (c *Certifier) Restore(from io.Reader) error {
	r := &reader{r: bufio.NewReaderSize(from, 64<<10)}
	n := r.certifier(c.window)
	sum := r.sum
	if want := r.fixed32(); r.err == nil && want != sum {
		r.fail("checksum is %08x, should be %08x", sum, want)
	}
	if r.err != nil {
		return fmt.Errorf("restore certifier: %w", r.err)
	}
	*c = *n
	return nil
}

// reader reads a snapshot; the first error sticks, and what is read after it is zero.
type reader struct {
	r   *bufio.Reader
	sum uint32
	err error
	buf [16]byte
}

func (r *reader) certifier(window txn.CSN) *Certifier {
	if head := make([]byte, len(magic)); r.full(head) && !bytes.Equal(head, magic) {
		r.fail("not a certifier snapshot of version %d", magic[len(magic)-1])
	}
	keys, outcomes := r.between(1, MaxMaxKeys), r.between(1, MaxMaxKeys)
	if r.err != nil {
		return nil
	}
	c := New(Config{MaxKeys: int(keys), MaxOutcomes: int(outcomes)})
	c.window = window
	c.last = txn.CSN(r.uint())
	c.horizon = txn.CSN(r.between(uint64(c.last-min(c.last, window)), uint64(c.last)))
	c.epoch = c.horizon
	c.digest = r.fixed64()
	for mode := 1; mode < txn.NumModes; mode++ {
		c.lastUse[mode] = txn.CSN(r.between(0, uint64(c.last)))
	}
	r.keys(c)
	r.outcomes(c)
	return c
}

func (r *reader) keys(c *Certifier) {
	latest := uint32(1)
	for n := r.between(0, uint64(c.maxKeys)); n > 0 && r.err == nil; n-- {
		var key txn.Key
		r.full(key[:])
		modes := r.byte()
		if modes == 0 || modes&1 != 0 || modes>>txn.NumModes != 0 {
			r.fail("key with modes %#x", modes)
		}
		var last [txn.NumModes]uint32
		for mode := 1; mode < txn.NumModes; mode++ {
			if modes&(1<<mode) != 0 {
				last[mode] = uint32(r.between(1, uint64(c.lastUse[mode]-min(c.lastUse[mode], c.horizon))))
				last[0] = max(last[0], last[mode])
			}
		}
		if last[0] < latest {
			r.fail("keys out of order")
		}
		latest = last[0]
		if r.err != nil {
			return
		}
		if c.keys.find(&key) != 0 {
			r.fail("key %x twice", key)
			return
		}
		c.keys.own(c.keys.findOrAdd(&key)).last = last
	}
}

func (r *reader) outcomes(c *Certifier) {
	before := c.horizon
	lowest := uint64(0) // of the next outcome, relative to this one: a commit takes a CSN
	for n := r.uint(); n > 0 && r.err == nil; n-- {
		o := outcome{gid: txn.GID{Node: txn.NodeID(r.between(0, 1<<32-1)), Incarnation: r.fixed64(), Sequence: r.uint()}}
		o.reason = txn.AbortReason(r.byte())
		before += txn.CSN(r.between(lowest, uint64(c.last-before)))
		o.before = before
		lowest = 0
		switch o.reason {
		case txn.AbortNone:
			lowest = 1
			if before == c.last {
				r.fail("commit %d of %d", before+1, c.last)
			}
		case txn.AbortConflict:
			o.with = txn.CSN(r.between(1, uint64(before)))
			o.mode = txn.Mode(r.byte())
			r.full(o.key[:])
			if !o.mode.Valid() {
				r.fail("conflict in mode %d", o.mode)
			}
		case txn.AbortHorizon, txn.AbortRequested, txn.AbortInvalid:
		default:
			r.fail("outcome with reason %d", o.reason)
		}
		if r.err == nil && (o.gid.IsZero() || c.outcomes.find(o.gid) != nil) {
			r.fail("transaction %v is no transaction or there twice", o.gid)
		}
		if r.err == nil {
			c.outcomes.add(o)
		}
	}
}

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("%w: %s", txn.ErrCorrupt, fmt.Sprintf(format, args...))
	}
}

// full fills b and reports whether it could.
func (r *reader) full(b []byte) bool {
	if r.err != nil {
		return false
	}
	if _, err := io.ReadFull(r.r, b); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			r.fail("snapshot ends early")
		} else {
			r.err = err
		}
		clear(b)
		return false
	}
	r.sum = crc32.Update(r.sum, castagnoli, b)
	return true
}

func (r *reader) byte() byte {
	r.full(r.buf[:1])
	return r.buf[0]
}

func (r *reader) fixed32() uint32 {
	r.full(r.buf[:4])
	return binary.LittleEndian.Uint32(r.buf[:])
}

func (r *reader) fixed64() uint64 {
	r.full(r.buf[:8])
	return binary.LittleEndian.Uint64(r.buf[:])
}

// uint reads a varint in its shortest form.
func (r *reader) uint() (v uint64) {
	for shift := 0; ; shift += 7 {
		b := r.byte()
		if r.err != nil {
			return 0
		}
		v |= uint64(b&0x7f) << shift
		if b < 0x80 {
			if shift > 0 && bits.Len64(v) <= shift || shift == 63 && b > 1 {
				r.fail("malformed number")
				return 0
			}
			return v
		}
		if shift == 63 {
			r.fail("malformed number")
			return 0
		}
	}
}

// between reads a varint that must be at least low and at most high.
func (r *reader) between(low, high uint64) uint64 {
	v := r.uint()
	if r.err == nil && (v < low || v > high) {
		r.fail("%d is not between %d and %d", v, low, high)
	}
	if r.err != nil {
		return 0
	}
	return v
}
