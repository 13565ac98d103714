package node

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/consensus"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/replication/apply"
	"github.com/quorate/quorate/replication/clone"
	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// clonePurpose is the purpose of barriers at which a clone of the donor ends.
const clonePurpose = "clone"

// donor fits the node to clone.Donor.
type donor struct{ n *Node }

func (d donor) Connect(ctx context.Context, replication bool) (*pgconn.PgConn, error) {
	c, err := d.n.parseConn("quorate clone")
	if err != nil {
		return nil, err
	}
	// A clone may take hours, most of which this session waits.
	c.RuntimeParams["idle_session_timeout"], c.RuntimeParams["statement_timeout"] = "0", "0"
	if replication {
		c.RuntimeParams["replication"] = "database"
	}
	conn, err := pgconn.ConnectConfig(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("connect to PostgreSQL: %w", err)
	}
	return conn, nil
}

func (d donor) Standing() (reason string, leader bool) {
	now := d.n.states.current()
	c := d.n.consensus.Load()
	leader = c != nil && c.Status().State == consensus.Leader
	if now.name == stateActive {
		return "", leader
	}
	return fmt.Sprintf("%s: %s", now.name, now.reason), leader
}

// holdAttempts is how often a place between two transactions is looked for. A busy disk may keep one from being reached in
// time, and somebody else may be looking for one; hours of copying are not to be lost for that.
const (
	holdAttempts = 10
	holdPause    = 500 * time.Millisecond
)

func (d donor) Hold(ctx context.Context, at func(context.Context) error) (csn txn.CSN, err error) {
	for attempt := 1; ; attempt++ {
		if csn, err = d.n.holdOnce(ctx, at); err == nil || attempt == holdAttempts {
			return csn, err
		}
		d.n.log.Info("a clone of this node must try again to find its place", logkey.Reason, err)
		pause := time.NewTimer(holdPause)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return 0, errors.Join(context.Cause(ctx), err)
		}
	}
}

// holdOnce puts a barrier into the log and calls at where it comes.
func (n *Node) holdOnce(ctx context.Context, at func(context.Context) error) (txn.CSN, error) {
	i := n.current.Load()
	if i == nil || n.states.current().name != stateActive {
		return 0, fmt.Errorf("the node is %s", n.states.current().name)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(i.ctx, func() { cancel(context.Cause(i.ctx)) })()
	var number [8]byte
	if _, err := rand.Read(number[:]); err != nil {
		return 0, fmt.Errorf("draw the id of a barrier: %w", err)
	}
	id := txn.GID{Node: n.cfg.Node, Incarnation: binary.BigEndian.Uint64(number[:])}
	reached, forget := i.barriers.await(id)
	defer forget()
	if _, err := n.consensus.Load().Propose(ctx, codec.AppendBarrier(nil, codec.Barrier{ID: id, Purpose: clonePurpose})); err != nil {
		return 0, fmt.Errorf("put a barrier into the log: %w", err)
	}
	select {
	case p := <-reached:
		if p.err != nil {
			return 0, p.err
		}
		began := time.Now()
		defer func() {
			n.log.Info("commits waited while a clone's place was found", logkey.CSN, uint64(p.csn), logkey.Duration, time.Since(began))
		}()
		return p.csn, i.snapshotAt(ctx, p, func(ctx context.Context) error {
			// The clone's progress: what it must go on from is in it.
			if err := i.pipeline.Flush(ctx, p.csn); err != nil {
				return err
			}
			return at(ctx)
		})
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// openDonor lets other nodes copy this one's PostgreSQL.
func (n *Node) openDonor() {
	clone.NewDonor(clone.Config{
		Cluster: n.cfg.Cluster, ClusterID: n.identity.get().ClusterID, Node: n.cfg.Node, Source: donor{n}, MaxWAL: uint64(n.cfg.Limits.CloneWAL), Logger: n.log.With(logkey.Component, "clone"),
	}).Register(n.grpc)
}

// Cloning returns how far the copy is that this node is being given, false if it is not.
func (n *Node) Cloning() (clone.Progress, bool) {
	p := n.cloning.Load()
	if p == nil {
		return clone.Progress{}, false
	}
	return *p, true
}

// obtain gives this node a copy of another member's PostgreSQL, from whichever can give one, unless it has been given one
// under this identity before. The node's own server is stopped; a data directory that it had is set aside, until
// forgetSetAside. Afterwards the data directory holds exactly the transactions up to apply.Progress, and nothing runs.
// An error leaves the data directory as it was, and obtain may be called again; one that wraps clone.ErrUnfit,
// clone.ErrNoSpace or clone.ErrTooSlow needs somebody to do something about it.
//
// beyond is what earlier holders of the slot had reserved of sequences: see pg.TakeOver.
func (n *Node) obtain(ctx context.Context, id pg.Identity, beyond map[string]int64) error {
	if !n.cfg.Postgres.Managed {
		return errors.New("postgres.managed is false: only a server that the node itself starts and stops can be replaced by a clone")
	}
	done, err := n.obtained(ctx, id)
	if err != nil || done {
		return err
	}
	fit, refused, err := n.donors(ctx, id.Node)
	if err != nil {
		return err
	}
	var failures []error
	for _, c := range fit {
		err := n.obtainFrom(ctx, c, id, beyond)
		if err == nil || ctx.Err() != nil {
			return err
		}
		failures = append(failures, fmt.Errorf("from node %s: %w", c.Node, err))
		if errors.Is(err, clone.ErrNoSpace) {
			break
		}
	}
	for node, err := range refused {
		failures = append(failures, fmt.Errorf("from node %s: %w", node, err))
	}
	if len(failures) == 0 {
		return errors.New("there is no other member with data to clone")
	}
	return errors.Join(failures...)
}

// donors returns the members that can give a node a copy of their data now, best first, and why the other ones cannot.
func (n *Node) donors(ctx context.Context, node txn.NodeID) (fit []clone.Candidate, refused map[txn.NodeID]error, err error) {
	var candidates []clone.Candidate
	for _, m := range n.members() {
		if m.ID == node || m.Witness {
			continue
		}
		conn, err := n.peers.Conn(m.ID)
		if err != nil {
			return nil, nil, err
		}
		candidates = append(candidates, clone.Candidate{Node: m.ID, Conn: conn})
	}
	fit, refused = clone.Order(ctx, n.identity.get().ClusterID, candidates)
	return fit, refused, nil
}

// obtained reports whether the node has been given its copy. If that was interrupted at the very end it is completed.
func (n *Node) obtained(ctx context.Context, id pg.Identity) (bool, error) {
	dataDir := n.cfg.Postgres.DataDir
	m, ok, err := clone.Read(dataDir)
	if err != nil || ok && m.Node == id.Node {
		return ok, err
	}
	_, ok, err = clone.Read(clone.Making(dataDir))
	if err != nil || !ok {
		return false, err
	}
	server, err := n.serverAt(ctx, dataDir, nil)
	if err != nil {
		return false, err
	}
	if err := server.Stop(ctx); err != nil {
		return false, err
	}
	return clone.Install(dataDir, id.Node)
}

// halfStopTimeout bounds the good end of a server whose data are thrown away.
const halfStopTimeout = 5 * time.Second

// obtainFrom makes a copy beside the data directory, has it recovered to its place there, and puts it into place when it is this
// node's own in everything.
func (n *Node) obtainFrom(ctx context.Context, from clone.Candidate, id pg.Identity, beyond map[string]int64) (err error) {
	dataDir := n.cfg.Postgres.DataDir
	making := clone.Making(dataDir)
	old, err := n.serverAt(ctx, dataDir, nil)
	if err != nil {
		return err
	}
	half, err := n.serverAt(ctx, making, nil)
	if err != nil {
		return err
	}
	if err := errors.Join(old.Stop(ctx), half.Stop(ctx), clone.Discard(dataDir)); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			// What is left only takes space; on a full disk that is what matters.
			ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), halfStopTimeout)
			defer cancel()
			err = errors.Join(err, half.Stop(ending), clone.Discard(dataDir))
		}
	}()
	c := old.Config()
	facts := clone.Facts{Version: c.Install.Version.Num(), Architecture: runtime.GOARCH}
	if facts.BlockSize, err = c.Install.Preset(ctx, "block_size"); err != nil {
		return err
	}
	if facts.WALBlockSize, err = c.Install.Preset(ctx, "wal_block_size"); err != nil {
		return err
	}
	target := clone.Target{
		Dir: making, UID: -1, GID: -1, Cluster: n.cfg.Cluster, ClusterID: n.identity.get().ClusterID, Node: id.Node, Server: facts,
		Progress: func(p clone.Progress) { n.cloning.Store(&p) },
	}
	if c.Account.UID != os.Geteuid() {
		target.UID, target.GID = c.Account.UID, c.Account.GID
	}
	if err := os.MkdirAll(filepath.Dir(dataDir), 0o755); err != nil {
		return fmt.Errorf("make the directory of the data directory: %w", err)
	}
	if err := c.Account.CanReach(making); err != nil {
		return fmt.Errorf("reach postgres.data_dir: %w", err)
	}
	if err := clone.Replaceable(dataDir); err != nil {
		return fmt.Errorf("postgres.data_dir: %w", err)
	}
	n.log.Info("this node is given a copy of another member", "donor", from.Node)
	defer n.cloning.Store(nil)
	got, err := clone.Receive(ctx, from.Conn, target)
	if err != nil {
		return err
	}
	if p, ok := n.Cloning(); ok {
		p.Phase = clone.PhaseRecover
		n.cloning.Store(&p)
	}
	if err := clone.Configure(making, dataDir, got.Donor, c.Auth, c.Account.Own); err != nil {
		return err
	}
	recovering, err := n.serverAt(ctx, making, clone.RecoverySettings(got.RestorePoint))
	if err != nil {
		return err
	}
	if err := recovering.Start(ctx); err != nil {
		return fmt.Errorf("recover the clone: %w", err)
	}
	if err := n.takeOver(ctx, recovering, id, got.CSN, beyond); err != nil {
		return err
	}
	if err := recovering.Stop(ctx); err != nil {
		return err
	}
	if err := clone.Complete(dataDir, clone.Marker{Node: id.Node, Donor: got.Donor, CSN: got.CSN, Time: time.Now()}); err != nil {
		return err
	}
	if _, err := clone.Install(dataDir, id.Node); err != nil {
		return err
	}
	n.log.Info("this node has its copy", "donor", got.Donor, logkey.CSN, uint64(got.CSN))
	return nil
}

// takeOver makes the recovered copy this node's own, if it is what it should be.
func (n *Node) takeOver(ctx context.Context, server *pgserver.Server, id pg.Identity, csn txn.CSN, beyond map[string]int64) error {
	c, err := pgconn.ParseConfig(server.ConnString(n.cfg.Postgres.Database))
	if err != nil {
		return fmt.Errorf("connect to the clone: %w", err)
	}
	c.RuntimeParams["application_name"] = "quorate clone"
	c.RuntimeParams["default_transaction_read_only"] = "off"
	conn, err := pgconn.ConnectConfig(ctx, c)
	if err != nil {
		return fmt.Errorf("connect to the clone: %w", err)
	}
	progress, err := apply.Progress(ctx, conn)
	if err == nil && progress != csn {
		err = fmt.Errorf("the clone has transactions up to %d instead of %d", progress, csn)
	}
	if err == nil {
		err = pg.TakeOver(ctx, conn, id, beyond)
	}
	return errors.Join(err, closeConn(ctx, conn))
}

// forgetSetAside removes the data directory that this node had before its clone. Call it when the clone has proved itself.
func (n *Node) forgetSetAside() {
	if !n.cfg.Postgres.Managed {
		return
	}
	switch removed, err := clone.Forget(n.cfg.Postgres.DataDir); {
	case err != nil:
		n.log.Warn("the data directory that was set aside for the clone stays", logkey.Error, err)
	case removed != "":
		n.log.Info("the data directory that was set aside for the clone is removed", logkey.Path, removed)
	}
}
