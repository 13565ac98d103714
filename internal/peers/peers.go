// Package peers keeps one gRPC connection to each other member of the cluster, for everything that asks members
// something: the API, heartbeats, membership, cloning. Proposals have connections of their own (see consensus).
package peers

import (
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/quorate/quorate/txn"
)

// The errors of Conn.
var (
	ErrUnknown = errors.New("no such member")
	ErrClosed  = errors.New("connections to members are closed")
)

// Pool connects to members when they are first asked for. It is safe for concurrent use.
type Pool struct {
	lookup  func(txn.NodeID) (address string, ok bool)
	options []grpc.DialOption

	mu     sync.Mutex
	conns  map[txn.NodeID]conn
	closed bool
}

type conn struct {
	*grpc.ClientConn
	address string
}

// reconnect bounds the pause before a member is dialled again. gRPC's own grows to two minutes: a member that came back
// would look dead.
var reconnect = backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second}

// alive ends a connection on which nothing comes through any more: in a partition TCP would go on to try, ever more
// seldom, and still be trying long after the network has healed. gRPC passes Timeout on to TCP (TCP_USER_TIMEOUT), which
// is what counts as long as something is being sent.
var alive = keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}

// minPing is the least time between keepalive pings of a pool that a server allows.
const minPing = 5 * time.Second

// window is how much may be under way on a connection, and on each of its streams, before its receiver has taken any: enough for
// 80 MiB/s at a round trip of 50 ms. Left to itself gRPC finds out what is enough, and for that has a window update, a ping and
// its answer follow every message: more packets than a small one takes, and nearly all are small.
const window = 4 << 20

// DialOptions are for connections to a node's gRPC server.
func DialOptions() []grpc.DialOption {
	return []grpc.DialOption{grpc.WithNoProxy(), grpc.WithStaticStreamWindowSize(window), grpc.WithStaticConnWindowSize(window)}
}

// ServerOptions are for a node's gRPC server.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.StaticStreamWindowSize(window), grpc.StaticConnWindowSize(window),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing}),
	}
}

// New returns a pool without connections. lookup tells the host:port of a member's gRPC server as of now; it is called
// for each Conn and must not block or call the pool. options win over the pool's own; without credentials among them
// nothing is encrypted.
func New(lookup func(txn.NodeID) (address string, ok bool), options ...grpc.DialOption) *Pool {
	own := append(DialOptions(),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithKeepaliveParams(alive),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: reconnect, MinConnectTimeout: time.Second}))
	return &Pool{lookup: lookup, options: append(own, options...), conns: make(map[txn.NodeID]conn)}
}

// Conn returns the connection to a member. It may not be established, or lost; gRPC sees to it when it is used. It stays
// the pool's: callers never close it. When the member's address has changed, calls over the earlier connection end with
// codes.Canceled; so they do when the pool is closed. The error wraps ErrUnknown or ErrClosed, or says what is wrong with
// the address.
func (p *Pool) Conn(id txn.NodeID) (*grpc.ClientConn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, fmt.Errorf("connect to node %s: %w", id, ErrClosed)
	}
	address, ok := p.lookup(id)
	had, have := p.conns[id]
	if ok && have && had.address == address {
		return had.ClientConn, nil
	}
	if have {
		delete(p.conns, id)
		_ = had.Close() // fails only if it was closed before, which nobody else does
	}
	if !ok {
		return nil, fmt.Errorf("connect to node %s: %w", id, ErrUnknown)
	}
	made, err := grpc.NewClient("passthrough:///"+address, p.options...)
	if err != nil {
		return nil, fmt.Errorf("connect to node %s at %s: %w", id, address, err)
	}
	p.conns[id] = conn{made, address}
	return made, nil
}

// Close closes all connections, and with them what is under way over them. Closing twice does nothing more.
func (p *Pool) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	var errs []error
	for c := range maps.Values(p.conns) {
		errs = append(errs, c.Close())
	}
	clear(p.conns)
	return errors.Join(errs...)
}
