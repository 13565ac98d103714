package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"

	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/internal/pki"
	"github.com/quorate/quorate/replication/apply"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// evict asks the gateway to abort the transaction of one of its sessions.
func (n *Node) evict(b apply.Blockade) bool {
	g := n.gateway.Load()
	if g == nil || !g.Evict(b.PID, b.By, b.Seen) {
		return false
	}
	n.noteEviction(b)
	return true
}

// part reads a chunk of a large transaction from the log.
func (n *Node) part(index txn.LogIndex) ([]byte, error) {
	data, err := n.consensus.Load().Entry(index)
	if err != nil {
		return nil, err
	}
	entry, err := codec.Decode(data)
	if err != nil {
		return nil, err
	}
	if entry.Kind != codec.KindChunk {
		return nil, fmt.Errorf("log entry %d is no chunk but %s: %w", index, entry.Kind, txn.ErrCorrupt)
	}
	return entry.Chunk.Data, nil
}

// openIncarnation begins the first incarnation. What keeps the first one of all from beginning is most likely a mistake
// that somebody who is just starting the node wants to hear of. A node that has been in the cluster votes meanwhile.
func (n *Node) openIncarnation(ctx context.Context) error {
	if n.fenced.Err() != nil { // the log is lost
		if n.cfg.Postgres.Managed {
			return n.describeServer(ctx)
		}
		return nil
	}
	i, err := n.begin(ctx)
	var lost logLost
	described := n.server != nil || !n.cfg.Postgres.Managed // the gateway must know where the server will be
	switch {
	case err == nil:
	case errors.As(err, &lost):
		return n.loseLog(lost)
	case errors.Is(err, errSetBack):
		// Somebody has to do something about the data. The node votes on, and says so.
		n.fence(err)
		return n.openObserver(ctx)
	case n.identity.get().Started && described && !hopeless(err) && ctx.Err() == nil:
		n.states.set(stateRecovering, awayBecause(err))
		n.log.Warn("PostgreSQL cannot be taken up yet", logkey.Error, err)
		return n.openObserver(ctx)
	default:
		return err
	}
	n.current.Store(i)
	n.onClose(func(context.Context) error {
		if n.lived != nil {
			return nil // whoever accompanied it has ended it
		}
		return i.end()
	})
	return nil
}

// accompanyAll begins to look after incarnations. The last one ends before consensus does, which may be waiting for it.
func (n *Node) accompanyAll(context.Context) error {
	n.lived = make(chan struct{})
	go func() {
		defer close(n.lived)
		switch i := n.current.Load(); {
		case i != nil: // also if the node was fenced since it began: it has to be ended
			n.live(n.fenced, i)
		case n.fenced.Err() != nil:
			n.liveWithout(context.Cause(n.fenced))
		case n.cfg.Witness():
			n.liveWithout(n.attend(n.fenced))
		default:
			n.live(n.fenced, nil)
		}
	}()
	n.onClose(func(context.Context) error {
		n.fence(errClosed)
		<-n.lived
		return nil
	})
	return nil
}

func (n *Node) openConsensus(context.Context) error {
	id := n.identity.get()
	if id.LogLost != "" {
		return nil
	}
	var follower consensus.Machine = n.observer.Load()
	if i := n.current.Load(); i != nil {
		follower = machine{i}
	}
	cfg := consensus.Config{
		Node:        n.cfg.Node,
		Dir:         id.RaftDir(n.cfg.DataDir),
		ClusterID:   id.ClusterID,
		RaftAddress: n.cfg.Listen.Raft,
		Bootstrap:   n.founders(id),

		SnapshotBytes: uint64(n.cfg.Limits.Log) / 2,
		TrailingBytes: uint64(n.cfg.Limits.Log),

		DialOptions: n.dialOptions(),
		Logger:      n.log.With(logkey.Component, "consensus"),
		Registerer:  n.metrics,
	}
	if n.certificates != nil {
		cfg.ServerTLS, cfg.VerifyPeer = n.certificates.Server(), pki.VerifyNode
		cfg.ClientTLS = func() *tls.Config { return n.certificates.Client() }
	}
	c, err := consensus.Open(cfg, follower)
	if err != nil {
		if i := n.current.Load(); i != nil {
			err = errors.Join(context.Cause(i.ctx), err)
		}
		return err
	}
	n.consensus.Store(c)
	n.onClose(func(context.Context) error { return c.Close() })
	n.alongside(n.watchMembership)
	n.group.Go(func() error {
		select {
		case <-c.Failed():
			n.consensusFailed(c.Err())
		case <-n.ctx.Done():
		}
		return nil
	})
	return nil
}

// consensusFailed ends the process where a new start is all that is needed. Otherwise the node is fenced.
func (n *Node) consensusFailed(err error) {
	if err = fmt.Errorf("consensus: %w", err); errors.Is(err, consensus.ErrTransferStuck) {
		n.fail(err)
		return
	}
	if errors.Is(err, consensus.ErrBehind) {
		n.behind(err)
		return
	}
	n.fence(err)
}

// founders are the first members of the Raft group, for the one who is among them: nobody for a node that joins.
func (n *Node) founders(id config.Identity) (first []consensus.Member) {
	if !id.Request.IsZero() {
		return nil
	}
	for _, m := range n.cfg.Members {
		first = append(first, consensus.Member{Node: m.ID, RaftAddress: m.Raft, GRPCAddress: m.GRPC})
	}
	if len(first) == 0 {
		self := n.cfg.Self()
		first = []consensus.Member{{Node: id.Node, RaftAddress: self.Raft, GRPCAddress: self.GRPC}}
	}
	return first
}
