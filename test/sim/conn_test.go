package sim

import (
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// stream is one direction of a connection. Its buffer has no bound, like a socket's that is large enough.
type stream struct {
	mu      sync.Mutex
	changed *sync.Cond
	data    []byte
	ended   bool // no more is written
	expired bool // reads end
}

func newStream() *stream {
	s := &stream{}
	s.changed = sync.NewCond(&s.mu)
	return s
}

func (s *stream) end(discard bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	if discard {
		s.data = nil
	}
	s.changed.Broadcast()
}

// conn is one end of a connection.
type conn struct{ in, out *stream }

func newConn() (client, server *conn) {
	up, down := newStream(), newStream()
	return &conn{in: down, out: up}, &conn{in: up, out: down}
}

func (c *conn) Read(b []byte) (int, error) {
	s := c.in
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.data) == 0 && !s.ended && !s.expired {
		s.changed.Wait()
	}
	switch {
	case s.expired:
		return 0, os.ErrDeadlineExceeded
	case len(s.data) == 0:
		return 0, io.EOF
	}
	n := copy(b, s.data)
	s.data = s.data[n:]
	return n, nil
}

func (c *conn) Write(b []byte) (int, error) {
	s := c.out
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return 0, net.ErrClosed
	}
	s.data = append(s.data, b...)
	s.changed.Broadcast()
	return len(b), nil
}

// Close ends both directions; what was written can still be read.
func (c *conn) Close() error {
	c.in.end(true)
	c.out.end(false)
	return nil
}

// SetReadDeadline knows only deadlines that are over, by which pgconn interrupts a read, and none at all.
func (c *conn) SetReadDeadline(t time.Time) error {
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	c.in.expired = !t.IsZero() && !t.After(time.Now())
	c.in.changed.Broadcast()
	return nil
}

func (c *conn) SetDeadline(t time.Time) error    { return c.SetReadDeadline(t) }
func (c *conn) SetWriteDeadline(time.Time) error { return nil }
func (c *conn) LocalAddr() net.Addr              { return address{} }
func (c *conn) RemoteAddr() net.Addr             { return address{} }

type address struct{}

func (address) Network() string { return "sim" }
func (address) String() string  { return "sim" }
