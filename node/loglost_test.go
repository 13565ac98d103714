package node

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/pgserver/pgtest"
	pb "github.com/quorate/quorate/proto/quorate/v1"
)

// TestRecall: a node that starts compares its log with what it has told the others of, and does not open one that was set back.
func TestRecall(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	o := &other{}
	n := withOther(t, o, config.StateMember)
	machine, err := n.newObserver(false)
	if err != nil {
		t.Fatal(err)
	}
	dir := n.identity.get().RaftDir(n.cfg.DataDir)
	address := fmt.Sprintf("127.0.0.1:%d", pgtest.FreePort(t))
	self := consensus.Member{Node: 1, RaftAddress: address, GRPCAddress: address}
	c, err := consensus.Open(consensus.Config{Node: 1, Dir: dir, RaftAddress: address, Bootstrap: []consensus.Member{self}}, machine)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.WaitLeader(ctx)
	was := c.Status().Term
	if err := errors.Join(err, c.Close()); err != nil {
		t.Fatal(err)
	}
	term, last, err := consensus.Promised(dir)
	if err != nil || term != was || last == 0 {
		t.Fatalf("promised are term %d, which was %d, and entry %d: %v", term, was, last, err)
	}
	for _, said := range []*pb.Health{nil, {}, {Term: term, CommitIndex: uint64(last)}} {
		if o.said = said; n.checkLog(ctx) != nil || n.fenced.Err() != nil {
			t.Fatalf("%v: the log is lost: %v", said, context.Cause(n.fenced))
		}
	}
	for _, said := range []*pb.Health{{Term: term + 1, CommitIndex: uint64(last)}, {Term: term, CommitIndex: uint64(last) + 1}} {
		n := withOther(t, &other{said: said}, config.StateMember)
		n.cfg.DataDir = filepath.Dir(dir)
		n.identity.dir = n.cfg.DataDir
		if err := n.checkLog(ctx); err != nil {
			t.Fatal(err)
		}
		if cause := context.Cause(n.fenced); !errors.Is(cause, errSetBack) || !strings.Contains(cause.Error(), "the log was set back") {
			t.Errorf("%v: fenced by %v", said, cause)
		}
		if onDisk(t, n).LogLost == "" {
			t.Errorf("%v: the next start opens the log", said)
		}
	}
}

// TestLossThatCannotBeNoted: a node that votes, and learns that its log is lost, does not go on when it cannot write that down.
func TestLossThatCannotBeNoted(t *testing.T) {
	for _, full := range []bool{false, true} {
		n := withOther(t, &other{}, config.StateMember)
		n.consensus.Store(new(consensus.Consensus))
		if full {
			n.identity.dir = filepath.Join(n.cfg.DataDir, "missing\x00")
		}
		n.liveWithout(logLost("it is away"))
		if err := context.Cause(n.ctx); err == nil || full == errors.Is(err, ErrReopen) {
			t.Errorf("noted %v: it ends with %v", !full, err)
		}
	}
}

// TestRecallWithoutLog: a founder whose data directory was emptied is told that it is not new.
func TestRecallWithoutLog(t *testing.T) {
	for term, lost := range map[uint64]bool{0: false, 1: true} {
		n := withOther(t, &other{said: &pb.Health{Term: term}}, config.StateMember)
		n.identity.now.Started = false
		if err := n.checkLog(t.Context()); err != nil || lost != (n.fenced.Err() != nil) {
			t.Errorf("term %d: %v, fenced by %v", term, err, context.Cause(n.fenced))
		}
	}
}
