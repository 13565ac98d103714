package gateway

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
)

// Sizes in bytes. A session holds two read buffers and two write buffers.
const (
	readBuffer  = 8 << 10
	writeBuffer = 16 << 10 // written out when it holds more than this
)

// message is one protocol message, header included. Of a message that does not fit the read buffer, data is its
// beginning and rest the number of bytes that are still to be read; reader.relay or reader.whole deals with them.
// data is valid until the next call of the reader.
type message struct {
	typ  byte
	data []byte
	rest int
}

// body is what follows type and length, as far as it has been read.
func (m message) body() []byte { return m.data[5:] }

// size is the length of the whole message.
func (m message) size() int { return len(m.data) + m.rest }

// reader cuts a connection's bytes into messages, without allocation. Not safe for concurrent use.
type reader struct {
	conn io.Reader
	buf  []byte
	r, w int
	max  int // largest message accepted, header included
}

func newReader(conn io.Reader, limit int) *reader {
	return &reader{conn: conn, buf: make([]byte, readBuffer), max: limit}
}

// next returns the next message. Before it blocks it calls idle, which writes out what has been gathered: as long as
// more input is already here, nothing is written, so that a batch of messages costs one system call.
func (rd *reader) next(idle func() error) (message, error) {
	for rd.w-rd.r < 5 {
		if err := rd.fill(idle); err != nil {
			return message{}, err
		}
	}
	length := int(binary.BigEndian.Uint32(rd.buf[rd.r+1:]))
	if length < 4 || length >= rd.max {
		return message{}, &protocolError{fmt.Sprintf("message %q has invalid length %d", rd.buf[rd.r], uint32(length))}
	}
	size := length + 1
	for rd.w-rd.r < size && size <= len(rd.buf) {
		if err := rd.fill(idle); err != nil {
			return message{}, err
		}
	}
	have := min(size, rd.w-rd.r)
	m := message{typ: rd.buf[rd.r], data: rd.buf[rd.r : rd.r+have : rd.r+have], rest: size - have}
	rd.r += have
	return m, nil
}

// peek returns the type of the next message if all of it has already been read, else 0.
func (rd *reader) peek() byte {
	if rd.w-rd.r < 5 {
		return 0
	}
	if length := int(binary.BigEndian.Uint32(rd.buf[rd.r+1:])); length < 4 || rd.w-rd.r < length+1 {
		return 0
	}
	return rd.buf[rd.r]
}

// fill reads once. The unread bytes are moved to the front first, if there is no room behind them.
func (rd *reader) fill(idle func() error) error {
	if rd.r == rd.w {
		rd.r, rd.w = 0, 0
	} else if rd.w == len(rd.buf) {
		rd.w = copy(rd.buf, rd.buf[rd.r:rd.w])
		rd.r = 0
	}
	if idle != nil {
		if err := idle(); err != nil {
			return err
		}
	}
	n, err := rd.conn.Read(rd.buf[rd.w:])
	rd.w += n
	if n > 0 {
		return nil // an error comes again with the next read
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// whole returns the message complete in memory. Its data is valid as long as the caller keeps it only if the
// message did not fit the read buffer; treat it like next's.
func (rd *reader) whole(m message) (message, error) {
	if m.rest == 0 {
		return m, nil
	}
	// The length is the peer's word: grow with what really arrives.
	data := append(make([]byte, 0, min(m.size(), 1<<20)), m.data...)
	for m.rest > 0 {
		n := min(m.rest, 256<<10)
		at := len(data)
		data = append(data, make([]byte, n)...)
		if _, err := io.ReadFull(rd.conn, data[at:]); err != nil {
			return message{}, err
		}
		m.rest -= n
	}
	m.data = data
	return m, nil
}

// relayRest copies what of m has not been read to write, chunk by chunk.
func (rd *reader) relayRest(m *message, write func([]byte) error) error {
	if m.rest == 0 {
		return nil
	}
	rd.r, rd.w = 0, 0 // everything in the buffer belonged to m
	for m.rest > 0 {
		n, err := rd.conn.Read(rd.buf[:min(m.rest, len(rd.buf))])
		m.rest -= n
		if n > 0 {
			if err := write(rd.buf[:n]); err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
	}
	return nil
}

// discardRest reads and forgets the rest of m.
func (rd *reader) discardRest(m *message) error {
	return rd.relayRest(m, func([]byte) error { return nil })
}

// protocolError is a violation of the protocol by the peer; the session cannot go on.
type protocolError struct{ what string }

func (e *protocolError) Error() string { return "protocol violation: " + e.what }

// writer gathers messages for a connection. Not safe for concurrent use.
type writer struct {
	conn net.Conn
	buf  []byte
}

func (w *writer) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	n, err := w.conn.Write(w.buf)
	if err != nil {
		w.buf = append(w.buf[:0], w.buf[n:]...)
		return err
	}
	if cap(w.buf) > 4*writeBuffer {
		w.buf = nil
	} else {
		w.buf = w.buf[:0]
	}
	return nil
}

// begin appends a header whose length end fills in.
func begin(b []byte, typ byte) ([]byte, int) {
	return append(b, typ, 0, 0, 0, 0), len(b)
}

func end(b []byte, at int) []byte {
	binary.BigEndian.PutUint32(b[at+1:], uint32(len(b)-at-1))
	return b
}

func appendCString(b []byte, s string) []byte { return append(append(b, s...), 0) }

func appendQuery(b []byte, sql string) []byte {
	b, at := begin(b, 'Q')
	return end(appendCString(b, sql), at)
}

func appendParse(b []byte, name, sql string) []byte {
	b, at := begin(b, 'P')
	b = appendCString(appendCString(b, name), sql)
	return end(append(b, 0, 0), at)
}

// appendBind binds a statement with text parameters to a portal.
func appendBind(b []byte, portal, statement string, params ...string) []byte {
	b, at := begin(b, 'B')
	b = appendCString(appendCString(b, portal), statement)
	b = append(b, 0, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(len(params)))
	for _, p := range params {
		b = binary.BigEndian.AppendUint32(b, uint32(len(p)))
		b = append(b, p...)
	}
	return end(append(b, 0, 0), at)
}

func appendExecute(b []byte, portal string) []byte {
	b, at := begin(b, 'E')
	return end(append(appendCString(b, portal), 0, 0, 0, 0), at)
}

// appendClose closes a statement ('S') or portal ('P').
func appendClose(b []byte, what byte, name string) []byte {
	b, at := begin(b, 'C')
	return end(appendCString(append(b, what), name), at)
}

func appendSync(b []byte) []byte { return append(b, 'S', 0, 0, 0, 4) }

func appendReady(b []byte, status byte) []byte { return append(b, 'Z', 0, 0, 0, 5, status) }

func appendComplete(b []byte, tag string) []byte {
	b, at := begin(b, 'C')
	return end(appendCString(b, tag), at)
}

func appendParameter(b []byte, name, value string) []byte {
	b, at := begin(b, 'S')
	return end(appendCString(appendCString(b, name), value), at)
}

// cstring cuts a zero-terminated string off b; ok is false if there is no terminator.
func cstring(b []byte) (s, rest []byte, ok bool) {
	for i, c := range b {
		if c == 0 {
			return b[:i], b[i+1:], true
		}
	}
	return nil, nil, false
}

// errorField returns a field of an ErrorResponse or NoticeResponse, as far as it has been read. The code comes
// early, so the beginning of even a huge message holds it.
func errorField(body []byte, field byte) []byte {
	for len(body) > 0 && body[0] != 0 {
		value, rest, ok := cstring(body[1:])
		if !ok {
			return nil
		}
		if body[0] == field {
			return value
		}
		body = rest
	}
	return nil
}
