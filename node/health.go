package node

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/quorate/quorate/internal/logkey"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// healthInterval is how often PostgreSQL and the disk are looked at, and healthTimeout how long PostgreSQL may take to
// answer before it counts as down.
const (
	healthInterval = 2 * time.Second
	healthTimeout  = 5 * time.Second
)

// serverHealth is what PostgreSQL said of itself.
type serverHealth struct {
	at                          time.Time
	version                     string
	connections, maxConnections uint32
	oldest                      float64 // seconds
	walKept, slotLag            uint64
	walLimit                    int64 // negative: none
}

// healthSQL is one row of text. It takes no lock and looks at shared memory only.
const healthSQL = `SELECT current_setting('server_version'), count(*), current_setting('max_connections'),
 coalesce(greatest(0, extract(epoch FROM clock_timestamp() - min(xact_start))), 0),
 (SELECT coalesce(greatest(0, max(pg_wal_lsn_diff(pg_current_wal_insert_lsn(), restart_lsn))), 0)::bigint FROM pg_replication_slots),
 (SELECT coalesce(greatest(0, max(pg_wal_lsn_diff(pg_current_wal_insert_lsn(), confirmed_flush_lsn))), 0)::bigint FROM pg_replication_slots),
 pg_current_wal_flush_lsn() - '0/0', pg_size_bytes(current_setting('max_slot_wal_keep_size'))
 FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()`

// watchHealth asks PostgreSQL how it is, until ctx ends. That it does not answer is for others to act on.
func (i *incarnation) watchHealth(ctx context.Context) {
	n := i.n
	var conn *pgconn.PgConn
	disconnect := func() {
		if conn != nil {
			_ = closeConn(context.WithoutCancel(ctx), conn) // it has failed, or the incarnation has
			conn = nil
		}
	}
	defer disconnect()
	defer n.seen.server.Store(nil)
	ticker := time.NewTicker(healthInterval)
	defer ticker.Stop()
	for {
		if err := i.askHealth(ctx, &conn); err != nil {
			disconnect()
			if ctx.Err() == nil {
				n.log.Debug("ask PostgreSQL how it is", logkey.Error, err)
			}
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

func (i *incarnation) askHealth(ctx context.Context, conn **pgconn.PgConn) (err error) {
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	if *conn == nil {
		if *conn, err = i.n.connect(ctx); err != nil {
			return err
		}
	}
	results, err := (*conn).Exec(ctx, healthSQL).ReadAll()
	if err != nil {
		return fmt.Errorf("query health: %w", err)
	}
	if len(results) != 1 || len(results[0].Rows) != 1 || len(results[0].Rows[0]) != 8 {
		return errors.New("query health: not one row of eight values")
	}
	row := results[0].Rows[0]
	connections, err1 := strconv.ParseUint(string(row[1]), 10, 32)
	most, err2 := strconv.ParseUint(string(row[2]), 10, 32)
	oldest, err3 := strconv.ParseFloat(string(row[3]), 64)
	kept, err4 := strconv.ParseUint(string(row[4]), 10, 64)
	unconfirmed, err5 := strconv.ParseUint(string(row[5]), 10, 64)
	flushed, err6 := strconv.ParseUint(string(row[6]), 10, 64)
	limit, err7 := strconv.ParseInt(string(row[7]), 10, 64)
	if err := errors.Join(err1, err2, err3, err4, err5, err6, err7); err != nil {
		return fmt.Errorf("query health: %w", err)
	}
	i.n.noteFlushed(txn.LSN(flushed))
	i.n.seen.server.Store(&serverHealth{
		at: time.Now(), version: string(row[0]), connections: uint32(connections), maxConnections: uint32(most),
		oldest: oldest, walKept: kept, slotLag: unconfirmed, walLimit: limit,
	})
	return nil
}

// disk is the room in the file system of the data directory.
type disk struct{ free, total uint64 }

// lookAtDisk notes it. An error leaves what was known: a file system that cannot be asked is noticed by whoever writes.
func (n *Node) lookAtDisk() {
	var fs unix.Statfs_t
	if unix.Statfs(n.cfg.DataDir, &fs) == nil {
		n.seen.disk.Store(&disk{free: fs.Bavail * uint64(fs.Bsize), total: fs.Blocks * uint64(fs.Bsize)})
	}
}

// hasQuorum reports whether this node is in contact with a majority; what clients may do is for access to say.
func (n *Node) hasQuorum() bool {
	c := n.consensus.Load()
	return c != nil && time.Since(c.QuorumContact()) <= c.QuorumTimeout()
}

// expectsServer reports whether this node's PostgreSQL should answer: not where there is none, nor none with the data yet,
// nor where nobody asks it any more.
func (n *Node) expectsServer() bool {
	switch n.states.current().name {
	case stateJoining, stateCloning, stateFailed, stateRemoved, stateStopping:
		return false
	}
	return !n.cfg.Witness()
}

// health says how this node is. It asks nobody.
func (n *Node) health() *pb.Health {
	s := n.status()
	h := &pb.Health{
		State: s.State, Reason: s.Reason, AcceptsWrites: s.Writes, Quorum: n.hasQuorum(), Role: s.Role.String(),
		Leader: uint32(s.Leader), Term: s.Term, CommitIndex: uint64(s.CommitIndex), AppliedIndex: uint64(s.AppliedIndex),
		Csn: uint64(s.CSN), AppliedCsn: (*uint64)(s.Applied), Version: n.version, UptimeSeconds: time.Since(n.seen.began).Seconds(),
	}
	if i := n.current.Load(); i != nil {
		queue, age := i.pipeline.Queue()
		h.QueueTransactions, h.QueueSeconds = uint64(queue), age.Seconds()
	}
	if g := n.gateway.Load(); g != nil {
		h.Sessions = uint32(g.Sessions())
	}
	if r := n.seen.rates.Load(); r != nil {
		h.CommitsPerSecond, h.AbortsPerSecond = r.commits, r.aborts
	}
	p := n.seen.server.Load()
	if n.expectsServer() {
		h.PostgresUp = ptr(p != nil && time.Since(p.at) < healthTimeout)
	}
	if p != nil {
		h.PostgresVersion, h.Connections, h.MaxConnections = p.version, p.connections, p.maxConnections
		h.OldestTransactionSeconds, h.WalKeptBytes, h.SlotLagBytes = p.oldest, p.walKept, p.slotLag
	}
	if d := n.seen.disk.Load(); d != nil {
		h.DiskFreeBytes, h.DiskTotalBytes = d.free, d.total
	}
	return h
}

// healthCollector makes metrics of what health says.
type healthCollector struct{ n *Node }

func nodeDesc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("quorate_"+name, help, nil, nil)
}

var (
	quorumDesc         = nodeDesc("node_quorum", "1 while this node is in contact with a majority, else 0.")
	writesDesc         = nodeDesc("node_accepts_writes", "1 while clients can commit writes here, else 0.")
	membersDesc        = nodeDesc("node_members", "Members of the cluster, as far as this node knows.")
	membersHeardDesc   = nodeDesc("node_members_heard", "Members that this node hears, itself included.")
	votersDesc         = nodeDesc("node_voters", "Members whose word counts for a majority, as far as this node knows.")
	votersHeardDesc    = nodeDesc("node_voters_heard", "Voters that this node hears, itself included.")
	diskFreeDesc       = nodeDesc("node_disk_free_bytes", "Room left where the data directory is.")
	diskSizeDesc       = nodeDesc("node_disk_size_bytes", "Size of the file system where the data directory is.")
	postgresUpDesc     = nodeDesc("postgres_up", "1 while the node's PostgreSQL answers, else 0. Absent where none should: on a witness, while a node is given its data, once it is fenced or removed.")
	connectionsDesc    = nodeDesc("postgres_connections", "Client backends of PostgreSQL, the node's own included.")
	maxConnectionsDesc = nodeDesc("postgres_max_connections", "PostgreSQL's setting max_connections.")
	oldestDesc         = nodeDesc("postgres_oldest_transaction_seconds", "Age of the oldest transaction in PostgreSQL.")
	walKeptDesc        = nodeDesc("postgres_wal_kept_bytes", "WAL that PostgreSQL keeps for its replication slots.")
	walLimitDesc       = nodeDesc("postgres_wal_kept_limit_bytes", "WAL that a replication slot may keep until PostgreSQL gives the slot up. Absent where that is not bounded.")
	slotLagDesc        = nodeDesc("postgres_slot_lag_bytes", "WAL that has been written, and that the slowest reader of a logical replication slot has not confirmed.")
	buildDesc          = prometheus.NewDesc("quorate_build_info", "1, with the versions as labels.", []string{"version", "postgres"}, nil)
)

// Describe implements prometheus.Collector.
func (c healthCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{quorumDesc, writesDesc, membersDesc, membersHeardDesc, votersDesc, votersHeardDesc, diskFreeDesc, diskSizeDesc, postgresUpDesc,
		connectionsDesc, maxConnectionsDesc, oldestDesc, walKeptDesc, walLimitDesc, slotLagDesc, buildDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector. What PostgreSQL does not say now has no value.
func (c healthCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	truth := map[bool]float64{true: 1}
	h := c.n.health()
	gauge(quorumDesc, truth[h.Quorum])
	gauge(writesDesc, truth[h.AcceptsWrites])
	hears := func(ids []txn.NodeID) (heard float64) {
		for _, id := range ids {
			if b := c.n.seen.beats; id == c.n.cfg.Node || b != nil && b.Hears(id) {
				heard++
			}
		}
		return heard
	}
	members, voters := append(c.n.others(), c.n.cfg.Node), c.n.voters()
	gauge(membersDesc, float64(len(members)))
	gauge(membersHeardDesc, hears(members))
	gauge(votersDesc, float64(len(voters)))
	gauge(votersHeardDesc, hears(voters))
	gauge(diskFreeDesc, float64(h.DiskFreeBytes))
	gauge(diskSizeDesc, float64(h.DiskTotalBytes))
	gauge(buildDesc, 1, h.Version, h.PostgresVersion)
	if h.PostgresUp != nil {
		gauge(postgresUpDesc, truth[h.GetPostgresUp()])
	}
	if h.GetPostgresUp() {
		gauge(connectionsDesc, float64(h.Connections))
		gauge(maxConnectionsDesc, float64(h.MaxConnections))
		gauge(oldestDesc, h.OldestTransactionSeconds)
		gauge(walKeptDesc, float64(h.WalKeptBytes))
		if p := c.n.seen.server.Load(); p != nil && p.walLimit >= 0 {
			gauge(walLimitDesc, float64(p.walLimit))
		}
		gauge(slotLagDesc, float64(h.SlotLagBytes))
	}
}
