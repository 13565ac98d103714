package consensus

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/quorate/quorate/txn"
)

// handshakeTimeout bounds what precedes the first message on a connection. It is also how long a stranger can keep
// one open without saying anything.
const handshakeTimeout = rpcTimeout

// maxUnknown bounds the connections whose other side has not said yet who it is.
const maxUnknown = 128

// streamConfig is who this node is on the network, and whom it lets in.
type streamConfig struct {
	node      txn.NodeID
	cluster   [16]byte
	serverTLS *tls.Config        // nil: no encryption
	clientTLS func() *tls.Config // nil: no encryption
	// verifyPeer looks at the other side's certificate; nil: the configurations have done so.
	verifyPeer func(tls.ConnectionState) error
	refused    func(reason string, err error) // hears of connections that came in and were turned away
}

// streamLayer is TCP that knows its connections, which Raft's own does not: it leaves those that came in open until
// the other side closes them. And nobody gets past it who has not shown to be a member of this cluster, on either side.
type streamLayer struct {
	net.Listener
	streamConfig
	ctx    context.Context // of dialling
	cancel context.CancelFunc

	mu      sync.Mutex
	open    map[*trackedConn]bool
	unknown int // of those, accepted ones before the end of their handshake
	alone   bool
	shut    bool
	serve   sync.WaitGroup // accepted connections that are not closed yet
}

func listenStream(address string, conf streamConfig) (*streamLayer, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen for Raft: %w", err)
	}
	s := &streamLayer{Listener: l, streamConfig: conf, open: make(map[*trackedConn]bool)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// target is what Dial is given: whom to reach, and where.
func target(id raft.ServerID, at raft.ServerAddress) raft.ServerAddress {
	return raft.ServerAddress(id) + " " + at
}

// Dial implements raft.StreamLayer. It returns when the other side has shown to be who is meant.
func (s *streamLayer) Dial(to raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	id, at, _ := strings.Cut(string(to), " ")
	address, _, _ := strings.Cut(at, " ") // see serverAddress
	ctx, cancel := context.WithTimeout(s.ctx, timeout)
	defer cancel()
	dialed, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	c, err := s.track(dialed, false)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	if err := s.greet(c, nodeID(raft.ServerID(id)), address, deadline); err != nil {
		return nil, errors.Join(fmt.Errorf("greet node %s at %s: %w", id, address, err), c.Close())
	}
	return c, nil
}

// Accept implements net.Listener. The handshake comes with the first Read, so that nobody holds up the next.
func (s *streamLayer) Accept() (net.Conn, error) {
	for {
		conn, err := s.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c, err := s.track(conn, true)
		if !errors.Is(err, errCrowded) {
			return c, err
		}
		s.refused(refusedCrowded, err)
	}
}

func (s *streamLayer) track(conn net.Conn, accepted bool) (*trackedConn, error) {
	c := &trackedConn{Conn: conn, raw: conn, in: s, accepted: accepted}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.shut, s.alone && !accepted:
		return nil, fmt.Errorf("raft connection: %w", txnClosed(conn.Close()))
	case accepted && s.unknown >= maxUnknown:
		return nil, errors.Join(errCrowded, conn.Close())
	case accepted:
		s.unknown++
		s.serve.Add(1)
	}
	s.open[c] = true
	return c, nil
}

var errCrowded = fmt.Errorf("more than %d connections have not said who they are", maxUnknown)

// hangUp cuts every connection to others, and lets no new one be made. A leader then loses its lease.
func (s *streamLayer) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.alone = true
	for c := range s.open {
		if !c.accepted {
			_ = c.raw.Close() // whoever uses it hears of it
		}
	}
}

// Close stops listening and cuts every connection.
func (s *streamLayer) Close() error {
	s.cancel()
	err := s.Listener.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shut = true
	for c := range s.open {
		if cutErr := c.raw.Close(); err == nil {
			err = cutErr
		}
	}
	return err
}

// wait waits until the handler of every accepted connection is done with it.
func (s *streamLayer) wait() { s.serve.Wait() }

// trackedConn is one connection, from its first byte on.
type trackedConn struct {
	net.Conn // raw, or TLS on top of it from the handshake on, before which nobody else uses it
	raw      net.Conn
	in       *streamLayer
	accepted bool
	meet     sync.Once // the handshake of one that was accepted
	refusal  error     // what it ended with
	once     sync.Once
}

// Read implements net.Conn. What was turned away ends like what was hung up: Raft need not say anything about it.
func (c *trackedConn) Read(b []byte) (int, error) {
	if c.accepted {
		c.meet.Do(c.receive)
		if c.refusal != nil {
			return 0, io.EOF
		}
	}
	return c.Conn.Read(b)
}

// receive is the accepting side's part of the handshake.
func (c *trackedConn) receive() {
	defer c.in.met()
	reason, err := c.in.receive(c)
	if err == nil {
		return
	}
	c.refusal = err
	c.in.refused(reason, err)
}

// met notes that another connection is not unknown any more.
func (s *streamLayer) met() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unknown--
}

// Close is what a handler does last.
func (c *trackedConn) Close() error {
	err := c.raw.Close()
	c.once.Do(func() {
		if c.accepted {
			c.meet.Do(c.in.met) // it was never read from
		}
		c.in.mu.Lock()
		delete(c.in.open, c)
		c.in.mu.Unlock()
		if c.accepted {
			c.in.serve.Done()
		}
	})
	return err
}

// txnClosed is txn.ErrClosed, with err if closing failed as well.
func txnClosed(err error) error {
	if err != nil {
		return fmt.Errorf("%w: %w", txn.ErrClosed, err)
	}
	return txn.ErrClosed
}
