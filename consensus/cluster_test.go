package consensus

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
	pb "github.com/quorate/quorate/proto/quorate/consensus/v1"
	"github.com/quorate/quorate/txn"
)

// patience is how long tests wait for what must happen. It is not what they measure.
const patience = 20 * time.Second

// recorder is a Machine that remembers everything.
type recorder struct {
	mu       sync.Mutex
	entries  []Entry
	restored int // entries that came by Restore
	changed  chan struct{}
	hold     chan struct{} // if not nil, Apply waits until it is closed; set before the first entry
	needs    txn.LogIndex  // of its snapshots
}

func newRecorder() *recorder { return &recorder{changed: make(chan struct{})} }

func (r *recorder) Apply(entries []Entry) {
	if r.hold != nil {
		<-r.hold
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.entries = append(r.entries, entries...)
	r.notifyLocked()
}

func (r *recorder) notifyLocked() {
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *recorder) Snapshot() (Snapshot, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b []byte
	for _, e := range r.entries {
		b = binary.BigEndian.AppendUint64(b, uint64(e.Index))
		b = binary.BigEndian.AppendUint64(b, e.Term)
		b = binary.BigEndian.AppendUint32(b, uint32(len(e.Data)))
		b = append(b, e.Data...)
	}
	return recording{bytes.NewReader(b), r.needs}, nil
}

type recording struct {
	*bytes.Reader
	needs txn.LogIndex
}

func (recording) Release() {}

func (r recording) Needs() txn.LogIndex { return r.needs }

func (r *recorder) Restore(from io.Reader) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.entries = nil
	for {
		var header [20]byte
		if _, err := io.ReadFull(from, header[:]); errors.Is(err, io.EOF) {
			r.restored = len(r.entries)
			r.notifyLocked()
			return nil
		} else if err != nil {
			return err
		}
		e := Entry{
			Index: txn.LogIndex(binary.BigEndian.Uint64(header[:])), Term: binary.BigEndian.Uint64(header[8:]),
			Data: make([]byte, binary.BigEndian.Uint32(header[16:])),
		}
		if _, err := io.ReadFull(from, e.Data); err != nil {
			return err
		}
		r.entries = append(r.entries, e)
	}
}

// await waits until the entries satisfy ok, and returns them.
func (r *recorder) await(t testing.TB, what string, ok func([]Entry) bool) []Entry {
	t.Helper()
	deadline := time.After(patience)
	for {
		r.mu.Lock()
		entries, changed := r.entries, r.changed
		r.mu.Unlock()
		if ok(entries) {
			return entries
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("%s did not happen; %d entries are applied", what, len(entries))
		}
	}
}

func (r *recorder) awaitIndex(t testing.TB, index txn.LogIndex) []Entry {
	t.Helper()
	return r.await(t, fmt.Sprintf("apply of index %d", index), func(es []Entry) bool {
		return len(es) > 0 && es[len(es)-1].Index >= index
	})
}

func (r *recorder) awaitCount(t testing.TB, n int) []Entry {
	t.Helper()
	return r.await(t, fmt.Sprintf("apply of %d entries", n), func(es []Entry) bool { return len(es) >= n })
}

// testNode is one member: what survives a restart, and what is running.
type testNode struct {
	config  Config
	member  Member
	out     bool // not a member: it has no leader to agree on
	c       *Consensus
	machine *recorder
	server  *grpc.Server
	serving sync.WaitGroup
}

type testCluster struct {
	t     testing.TB
	nodes []*testNode // node i+1
}

// newCluster opens n nodes; change may alter each node's configuration. All is closed, and checked to be gone, at the
// end of the test.
func newCluster(t testing.TB, n int, change func(*Config)) *testCluster {
	t.Helper()
	cluster := &testCluster{t: t}
	var members []Member
	for i := range n {
		members = append(members, Member{Node: txn.NodeID(i + 1), RaftAddress: freeAddress(t), GRPCAddress: freeAddress(t)})
	}
	t.Cleanup(func() {
		cluster.stopAll()
		requireNoGoroutines(t)
	})
	for _, m := range members {
		cluster.create(m, members, change)
	}
	for i := range n {
		cluster.start(i)
	}
	return cluster
}

// create makes a node that is not started yet.
func (tc *testCluster) create(m Member, bootstrap []Member, change func(*Config)) {
	cfg := Config{
		Node: m.Node, Dir: filepath.Join(tc.t.TempDir(), "raft"), RaftAddress: m.RaftAddress, Bootstrap: bootstrap,
		// As long a lease as possible: the machine may be busy with other tests.
		HeartbeatTimeout: 800 * time.Millisecond, ElectionTimeout: 800 * time.Millisecond, LeaderLease: 800 * time.Millisecond,
		VerifyInterval: time.Hour, Logger: testLogger(tc.t, int(m.Node)),
	}
	if change != nil {
		change(&cfg)
	}
	tc.nodes = append(tc.nodes, &testNode{config: cfg, member: m})
}

// service is what a node makes of Link.
type service struct {
	pb.UnimplementedConsensusServer
	c *Consensus
}

func (s service) Link(stream grpc.BidiStreamingServer[pb.ToLeader, pb.FromLeader]) error {
	return s.c.Link(stream)
}

func (tc *testCluster) start(i int) {
	tc.t.Helper()
	n := tc.nodes[i]
	n.machine = newRecorder()
	n.config.Registerer = prometheus.NewPedanticRegistry()
	c, err := Open(n.config, n.machine)
	if err != nil {
		tc.t.Fatal(err)
	}
	n.c = c
	n.server = grpc.NewServer()
	pb.RegisterConsensusServer(n.server, service{c: c})
	l, err := net.Listen("tcp", n.member.GRPCAddress)
	if err != nil {
		tc.t.Fatal(err)
	}
	server := n.server
	n.serving.Go(func() {
		if err := server.Serve(l); err != nil {
			tc.t.Errorf("serve: %v", err)
		}
	})
}

func (tc *testCluster) stop(i int) {
	tc.t.Helper()
	n := tc.nodes[i]
	if n.c == nil {
		return
	}
	if err := n.c.Close(); err != nil {
		tc.t.Errorf("close node %d: %v", i+1, err)
	}
	n.server.Stop()
	n.serving.Wait()
	n.c = nil
}

func (tc *testCluster) stopAll() {
	for i := range tc.nodes {
		tc.stop(i)
	}
}

// leader waits until all running nodes agree on one of them, and returns its place.
func (tc *testCluster) leader() int {
	tc.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		agreed, changed := tc.agreed(ctx)
		if agreed > 0 && tc.nodes[agreed-1].c != nil {
			return int(agreed) - 1
		}
		select {
		case <-changed:
		case <-ctx.Done():
			tc.t.Fatal("no leader")
		}
	}
}

// agreed returns the leader that all running nodes name, otherwise 0 and what to wait for.
func (tc *testCluster) agreed(ctx context.Context) (txn.NodeID, <-chan struct{}) {
	var common txn.NodeID
	var first <-chan struct{}
	for _, n := range tc.nodes {
		if n.c == nil || n.out {
			continue
		}
		node, err := n.c.WaitLeader(ctx)
		if err != nil {
			tc.t.Fatal(err)
		}
		l, changed := n.c.Leadership()
		switch {
		case l.Leader != node:
			return 0, closedChannel
		case common == 0:
			common, first = l.Leader, changed
		case common != l.Leader:
			// One of the two is behind the times, and will hear of it.
			merged, cancel := context.WithCancel(ctx)
			go func(a, b <-chan struct{}) {
				defer cancel()
				select {
				case <-a:
				case <-b:
				case <-ctx.Done():
				}
			}(first, changed)
			return 0, merged.Done()
		}
	}
	return common, first
}

var closedChannel = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

func (tc *testCluster) follower() int { return (tc.leader() + 1) % len(tc.nodes) }

// propose must succeed, without ever being in doubt, once a leader is known.
func (tc *testCluster) propose(i int, data string) txn.LogIndex {
	tc.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		index, err := tc.nodes[i].c.Propose(ctx, []byte(data))
		if err == nil {
			return index
		}
		if _, waitErr := tc.nodes[i].c.WaitLeader(ctx); waitErr != nil || ctx.Err() != nil || !errors.Is(err, txn.ErrNoQuorum) {
			tc.t.Errorf("propose on node %d: %v, then %v", i+1, err, waitErr)
			return 0
		}
	}
}

// readIndex must succeed, once a leader is known.
func (tc *testCluster) readIndex(i int) txn.LogIndex {
	tc.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		index, err := tc.nodes[i].c.ReadIndex(ctx)
		if err == nil {
			return index
		}
		if _, waitErr := tc.nodes[i].c.WaitLeader(ctx); waitErr != nil || ctx.Err() != nil {
			tc.t.Errorf("read index on node %d: %v, then %v", i+1, err, waitErr)
			return 0
		}
	}
}

func freeAddress(t testing.TB) string {
	t.Helper()
	return fmt.Sprintf("127.0.0.1:%d", pgtest.FreePort(t))
}

func testLogger(t testing.TB, node int) *slog.Logger {
	level := slog.LevelError + 4
	if os.Getenv("QUORATE_TEST_LOG") != "" {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: level})).With("node", node)
}

// testLabel is the label of goroutines that has the name of their test. A goroutine has the labels of the one that started it.
const testLabel = "test"

// parallel lets a test run beside others, and tells its goroutines from theirs. Most time of these tests is waiting: for
// heartbeats that do not come, and for elections.
func parallel(t *testing.T) {
	t.Helper()
	t.Parallel()
	pprof.SetGoroutineLabels(pprof.WithLabels(t.Context(), pprof.Labels(testLabel, t.Name())))
}

// requireNoGoroutines waits until nothing of ours or of Raft's runs, but what another test has started that runs beside this one.
func requireNoGoroutines(t testing.TB) {
	t.Helper()
	name, _, _ := strings.Cut(t.Name(), "/")
	own := fmt.Sprintf("%q:%q", testLabel, name)
	var left []string
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
		left = left[:0]
		var all strings.Builder
		if err := pprof.Lookup("goroutine").WriteTo(&all, 1); err != nil {
			t.Fatal(err)
		}
		for stack := range strings.SplitSeq(all.String(), "\n\n") {
			ours := strings.Contains(stack, "quorate/consensus.") || strings.Contains(stack, "hashicorp/")
			others := strings.Contains(stack, fmt.Sprintf("%q:", testLabel)) && !strings.Contains(stack, own)
			if ours && !others && !strings.Contains(stack, "requireNoGoroutines") && !strings.Contains(stack, "testing.(") {
				left = append(left, stack)
			}
		}
		if len(left) == 0 {
			return
		}
		runtime.Gosched()
		time.Sleep(5 * time.Millisecond) // nothing announces the end of a goroutine
	}
	t.Errorf("%d goroutines are left:\n%s", len(left), strings.Join(left, "\n\n"))
}

func TestMain(m *testing.M) {
	flag.Parse()
	// More of them than processors: they wait more than they compute.
	if err := flag.Set("test.parallel", "3"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}
