// Package gateway is what clients connect to: a listener that speaks the PostgreSQL protocol, gives each client a
// connection of its own to the node's PostgreSQL server and relays what they say to each other. It steps in where
// one server would decide alone and a cluster must not: it holds back every COMMIT of a transaction that wrote until
// the coordinator says that its turn in the order has come, puts statements that write outside a block into one, and
// refuses what cannot be replicated. DESIGN.md in this directory has the mechanism.
package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
)

// Coordinator orders transactions. Its methods may be called from any goroutine.
type Coordinator interface {
	// Applied is the CSN up to which everything is visible in this node's server. Called before every transaction's
	// first snapshot, so it must be cheap.
	Applied() txn.CSN
	// Reserve returns a GID for a transaction whose client wants to know it before COMMIT.
	Reserve() txn.GID
	// Begin registers an attempt to commit the transaction that runs in backend pid and took its first snapshot no
	// earlier than base, under a GID from Reserve or, if gid is zero, a new one. An error means that nothing was
	// registered; txn.ErrNoQuorum has its own SQLSTATE.
	Begin(ctx context.Context, gid txn.GID, base txn.CSN, pid uint32) (Commit, error)
	// TransactionStatus says what became of a transaction: StatusCommitted and so on. It may settle one that is not
	// decided yet.
	TransactionStatus(ctx context.Context, gid txn.GID) string
}

// Commit is one attempt to commit. Lost may be called while Next blocks; otherwise one goroutine uses it.
type Commit interface {
	GID() txn.GID
	// Seal is what the transaction is sealed and marked with. The client must not see it.
	Seal() txn.Seal
	// Seen is what was visible here before the marker.
	Seen() txn.CSN
	// Next blocks for the next step; see txn.Step.
	Next(ctx context.Context) (txn.Event, error)
	// OnRelease has through called when the transaction is released, before Next yields StepRelease, on the goroutine of whoever
	// was before it in the order.
	OnRelease(through func(txn.GID))
	// Committed, after StepRelease: the server said COMMIT.
	Committed()
	// Lost: the local transaction is gone or must go. Next then yields StepAbort, StepVisible or StepUnknown.
	Lost()
	// Close ends the attempt. Before the marker was sent it forgets the GID.
	Close()
}

// Rows is the content of a view of schema quorate.
type Rows struct {
	// Full and Public are the rows as a JSON array: for members of pg_monitor, and as everybody may see them.
	Full, Public string
	// Missing has a phrase for each part that should be there and is not. Clients get a warning for each.
	Missing []string
}

// Config configures a Gateway.
type Config struct {
	// Listen is the address to listen on, "host:port".
	Listen string
	// ServerNetwork and ServerAddress are the node's PostgreSQL server as net.Dial takes them: "unix" with the path of
	// the socket, or "tcp" with host:port. PostgreSQL authenticates the client by what its pg_hba.conf says of *this*
	// connection, so it must not be one that is trusted more than the gateway's clients are.
	ServerNetwork, ServerAddress string
	// Database is the one database that is served.
	Database string
	// Coordinator orders transactions.
	Coordinator Coordinator
	// Accepting says whether the node takes clients; its error's text is told to them (57P03). nil accepts always.
	Accepting func() error
	// Access says what those that are connected may do. It is asked before every statement, so it must be cheap. nil lets
	// them do everything.
	Access func() Access
	// View returns the content of a view of schema quorate. It is called before each statement that names the view, which
	// waits for it. nil: there are no views.
	View func(ctx context.Context, name string) Rows
	// Settings are what sessions begin with, so that clients can SHOW them, by name.
	Settings map[string]string
	// Terminate ends a server backend that does not let go of its transaction (pg_terminate_backend on a connection of
	// the node's own). The gateway closes its connection in any case, but a backend that is stuck in a computation
	// notices that late. nil does no more than that.
	Terminate func(ctx context.Context, pid uint32) error
	// TLS, if set, is offered to clients; nil answers that TLS is not available.
	TLS *tls.Config
	// RequireTLS refuses clients without.
	RequireTLS bool
	// Rules are for client addresses: the first that covers one decides, and one that none covers is refused. No rules
	// allow everybody.
	Rules []Rule
	// TrustLoopback lets clients from this machine in without a password if the server does not ask for one. It must not
	// be set where the server asks who is at the other end of the connection: that is the gateway.
	TrustLoopback bool
	// MaxConnections is the number of clients at a time; 0 means 100.
	MaxConnections int
	// MaxMessage is the largest protocol message relayed, in bytes; 0 means 1 GiB, as in PostgreSQL. Large messages are
	// streamed, not held in memory, except statements.
	MaxMessage int
	// MaxStatement is the longest statement text, in bytes; 0 means 64 MiB. It is held in memory to be read.
	MaxStatement int
	// StartupTimeout bounds the time from connecting to being ready; 0 means 60 s.
	StartupTimeout time.Duration
	// EvictTimeout is how long a session may take to let go of a transaction that must make way before its backend is
	// terminated; 0 means 2 s.
	EvictTimeout time.Duration
	// Registerer takes the metrics; nil registers none.
	Registerer prometheus.Registerer
	// Logger; nil discards.
	Logger *slog.Logger
}

func (c *Config) setDefaults() {
	if c.MaxConnections == 0 {
		c.MaxConnections = 100
	}
	if c.MaxMessage == 0 {
		c.MaxMessage = 1 << 30
	}
	if c.MaxStatement == 0 {
		c.MaxStatement = 64 << 20
	}
	if c.StartupTimeout == 0 {
		c.StartupTimeout = 60 * time.Second
	}
	if c.EvictTimeout == 0 {
		c.EvictTimeout = 2 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Gateway accepts clients. Its methods may be called from any goroutine.
type Gateway struct {
	cfg      Config
	log      *slog.Logger
	metrics  *metrics
	writing  statementSet
	listener net.Listener
	ctx      context.Context
	cancel   context.CancelCauseFunc
	wg       sync.WaitGroup
	draining atomic.Bool
	clients  atomic.Int64 // admitted: counted against MaxConnections

	mu       sync.Mutex
	conns    map[net.Conn]struct{} // every client connection, so that Close can end those still starting up
	sessions map[uint32]*session   // by the process id of the server backend
	idle     chan struct{}         // closed when sessions is empty, if not nil
	life     uint64                // of the server: how often EndSessions was called
}

// New returns a Gateway that does nothing until Open.
func New(cfg Config) *Gateway {
	cfg.setDefaults()
	g := &Gateway{
		cfg:      cfg,
		log:      cfg.Logger.With(logkey.Component, "gateway"),
		metrics:  newMetrics(),
		conns:    make(map[net.Conn]struct{}),
		sessions: make(map[uint32]*session),
	}
	g.ctx, g.cancel = context.WithCancelCause(context.Background())
	return g
}

// Open listens and begins to accept. The Gateway runs until Close.
func (g *Gateway) Open() error {
	if g.cfg.Coordinator == nil {
		return errors.New("open gateway: no coordinator")
	}
	if err := g.metrics.register(g.cfg.Registerer); err != nil {
		return fmt.Errorf("register gateway metrics: %w", err)
	}
	l, err := net.Listen("tcp", g.cfg.Listen)
	if err != nil {
		return fmt.Errorf("open gateway: %w", err)
	}
	g.listener = l
	g.wg.Add(1)
	go g.accept()
	g.log.Info("gateway listens", logkey.Address, l.Addr().String())
	return nil
}

// Addr is the address clients connect to; nil before Open.
func (g *Gateway) Addr() net.Addr {
	if g.listener == nil {
		return nil
	}
	return g.listener.Addr()
}

// spareConnections is how many connections, beyond twice MaxConnections, may be there at once: those of who has not said
// yet what it wants, and requests to cancel.
const spareConnections = 50

func (g *Gateway) accept() {
	defer g.wg.Done()
	for {
		conn, err := g.listener.Accept()
		if err != nil {
			if g.ctx.Err() != nil || g.draining.Load() || errors.Is(err, net.ErrClosed) {
				return
			}
			// Out of file descriptors, most likely: others may end. Waiting is all one can do.
			g.log.Warn("accept client", logkey.Error, err)
			select {
			case <-time.After(50 * time.Millisecond):
			case <-g.ctx.Done():
				return
			}
			continue
		}
		g.mu.Lock()
		if g.ctx.Err() != nil {
			g.mu.Unlock()
			_ = conn.Close() // refused by closing
			return
		}
		if len(g.conns) >= 2*g.cfg.MaxConnections+spareConnections {
			g.mu.Unlock()
			g.fail(conn, errTooMany)
			_ = conn.Close() // refused by closing
			continue
		}
		g.conns[conn] = struct{}{}
		g.wg.Add(1)
		g.mu.Unlock()
		go func() {
			defer g.wg.Done()
			g.serve(conn)
			g.mu.Lock()
			delete(g.conns, conn)
			g.mu.Unlock()
			_ = conn.Close() // closed twice in most cases
		}()
	}
}

// Drain stops accepting and waits until every session has ended. Sessions that are idle outside a transaction are
// ended at once, the others when their transaction ends. When ctx ends first it returns the reason; call Close then.
func (g *Gateway) Drain(ctx context.Context) error {
	g.draining.Store(true)
	if g.listener != nil {
		_ = g.listener.Close() // the only error is that it is closed
	}
	if err := g.endSessions(ctx, (*session).drain); err != nil {
		return fmt.Errorf("drain gateway: %w", err)
	}
	return nil
}

// Quiesce is Drain, except that the gateway goes on listening: whether clients can connect later is for
// Config.Accepting to say, which must refuse them by now.
func (g *Gateway) Quiesce(ctx context.Context) error {
	g.mu.Lock()
	g.life++ // who is connecting has been admitted before
	g.mu.Unlock()
	if err := g.endSessions(ctx, (*session).drain); err != nil {
		return fmt.Errorf("quiesce gateway: %w", err)
	}
	return nil
}

// EndSessions ends every session as the end of its server connection would, because the server is gone or must not be
// used any more, and waits until they have ended. Who is connecting is turned away. A commit that waits for the log's
// word still gets it, and its client hears it. When ctx ends first it returns the reason.
func (g *Gateway) EndSessions(ctx context.Context) error {
	g.mu.Lock()
	g.life++
	g.mu.Unlock()
	if err := g.endSessions(ctx, (*session).loseServer); err != nil {
		return fmt.Errorf("end sessions: %w", err)
	}
	return nil
}

func (g *Gateway) endSessions(ctx context.Context, end func(*session)) error {
	g.mu.Lock()
	if g.idle == nil {
		g.idle = make(chan struct{})
	}
	idle := g.idle
	for _, s := range g.sessions {
		end(s)
	}
	g.tellIdleLocked()
	g.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (g *Gateway) tellIdleLocked() {
	if len(g.sessions) == 0 && g.idle != nil {
		close(g.idle)
		g.idle = nil
	}
}

// Close ends everything and waits for it. A commit whose outcome is not known yet is reported as such (08007).
func (g *Gateway) Close() error {
	if g == nil {
		return nil
	}
	g.cancel(txn.ErrClosed)
	if g.listener != nil {
		_ = g.listener.Close() // the only error is that it is closed
	}
	g.mu.Lock()
	for conn := range g.conns {
		// Not Close: a session may have one last thing to say. Reads end at once, writes soon.
		_ = conn.SetReadDeadline(time.Unix(1, 0))
		_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
	}
	for _, s := range g.sessions {
		s.stop()
	}
	g.mu.Unlock()
	g.wg.Wait()
	g.metrics.unregister(g.cfg.Registerer)
	return nil
}

// Sessions returns how many clients are connected.
func (g *Gateway) Sessions() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.sessions)
}

// Evict makes the transaction that runs in backend pid let go of its locks, because log entry by needs them. Its caller
// found the backend in the way not before seen: a transaction whose predecessor in the session ended after that may be
// another than the one in the way, and is spared. Evict returns at once; false means that pid is no session of this
// gateway. The client gets 40001 and keeps its session.
func (g *Gateway) Evict(pid uint32, by txn.CSN, seen time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.sessions[pid]
	if s == nil {
		return false
	}
	if s.beginEvict(by, seen) {
		g.wg.Add(1)
		go func() {
			defer g.wg.Done()
			s.evict()
		}()
	}
	return true
}

// serverLife is what register wants to know of the time before the server was connected to.
func (g *Gateway) serverLife() uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.life
}

func (g *Gateway) register(s *session, life uint64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ctx.Err() != nil || g.draining.Load() {
		return errShutdown
	}
	if life != g.life {
		return errServerLost
	}
	g.sessions[s.pid] = s
	g.metrics.sessions.Inc()
	return nil
}

func (g *Gateway) unregister(s *session) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.sessions[s.pid] != s {
		return
	}
	delete(g.sessions, s.pid)
	g.metrics.sessions.Dec()
	g.tellIdleLocked()
}

// statementSet remembers by fingerprint which statements write although their text does not show it. Reading takes
// no lock: the map is replaced, never changed.
type statementSet struct {
	mu  sync.Mutex // serialises writers
	set atomic.Pointer[map[uint64]struct{}]
}

const maxRemembered = 4096

func (s *statementSet) has(fingerprint uint64) bool {
	m := s.set.Load()
	if m == nil {
		return false
	}
	_, ok := (*m)[fingerprint]
	return ok
}

func (s *statementSet) add(fingerprint uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.set.Load()
	fresh := make(map[uint64]struct{})
	if old != nil && len(*old) < maxRemembered { // when full, begin anew: what still writes will be back
		for f := range *old {
			fresh[f] = struct{}{}
		}
	}
	fresh[fingerprint] = struct{}{}
	s.set.Store(&fresh)
}
