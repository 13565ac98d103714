package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sys/unix"

	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/internal/pki"
	"github.com/quorate/quorate/replication/pg"
)

// Level says how bad a finding is.
type Level string

// The levels.
const (
	LevelOK      Level = "ok"
	LevelWarning Level = "warning" // the node will run, and its operator should know
	LevelError   Level = "error"   // the node will not run, or not well
)

// Finding is what Examine says of one thing.
type Finding struct {
	Check string
	Level Level
	What  string
	Fix   string // a command, or what to do; empty if there is nothing to do
}

// doctor collects findings.
type doctor struct {
	n        *Node
	running  bool
	where    *pgconn.Config // of a server that is not where the node will have it; nil: it is there
	findings []Finding
}

func (d *doctor) add(level Level, check, fix, format string, args ...any) {
	d.findings = append(d.findings, Finding{Check: check, Level: level, What: fmt.Sprintf(format, args...), Fix: fix})
}

func (d *doctor) ok(check, format string, args ...any) { d.add(LevelOK, check, "", format, args...) }

// Examine checks everything that a node of this configuration needs, without changing anything. running says that the
// node runs: what it has in use is not in its way. Errors of the configuration itself are config.Load's to tell.
func Examine(ctx context.Context, cfg config.Config, running bool) []Finding {
	d := &doctor{n: &Node{cfg: cfg, log: slog.New(slog.DiscardHandler)}, running: running}
	d.directories()
	d.space()
	d.ports()
	d.names(ctx)
	d.certificates()
	if !cfg.Witness() {
		d.postgres(ctx)
	}
	return d.findings
}

func (d *doctor) directories() {
	cfg := d.n.cfg
	id, err := config.ReadIdentity(cfg.DataDir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := writable(cfg.DataDir); err != nil {
			d.add(LevelError, "data directory", "give data_dir to the user who runs quorate", "data_dir: %v", err)
			return
		}
		d.ok("data directory", "%s is no node's yet", cfg.DataDir)
	case err != nil:
		d.add(LevelError, "data directory", "restore the file identity, or set data_dir to a directory of this node", "%v", err)
	case id.Cluster != cfg.Cluster:
		d.add(LevelError, "data directory", "correct cluster or data_dir in the configuration", "%s belongs to cluster %q, the configuration is of %q", cfg.DataDir, id.Cluster, cfg.Cluster)
	case cfg.Node != 0 && id.Node != cfg.Node:
		d.add(LevelError, "data directory", "correct node or data_dir in the configuration", "%s belongs to node %s, the configuration is of node %s", cfg.DataDir, id.Node, cfg.Node)
	case id.State == config.StateRemoved:
		d.add(LevelError, "data directory", "empty data_dir and join again", "%s belongs to node %s, which was removed from the cluster", cfg.DataDir, id.Node)
	default:
		d.ok("data directory", "%s belongs to node %s of cluster %q", cfg.DataDir, id.Node, id.Cluster)
	}
}

// writable looks where a directory is, or would be made.
func writable(dir string) error {
	for {
		info, err := os.Stat(dir)
		if err == nil && !info.IsDir() {
			return fmt.Errorf("%s is not a directory", dir)
		}
		if err == nil {
			if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
				return fmt.Errorf("%s cannot be written to: %w", dir, err)
			}
			return nil
		}
		if !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir) {
			return err
		}
		dir = filepath.Dir(dir)
	}
}

// Less free space than leastSpace is an error, and less than enoughSpace a warning: PostgreSQL keeps max_wal_size of WAL, 2 GiB
// unless it is told otherwise, and the cluster's log needs some too.
const (
	leastSpace  = 256 << 20
	enoughSpace = 4 << 30
)

func (d *doctor) space() {
	seen := map[[2]uint64]bool{}
	for _, dir := range []string{d.n.cfg.DataDir, d.n.cfg.Postgres.DataDir} {
		for dir != "" && dir != filepath.Dir(dir) {
			if _, err := os.Stat(dir); err == nil {
				break
			}
			dir = filepath.Dir(dir)
		}
		var st unix.Statfs_t
		if dir == "" || unix.Statfs(dir, &st) != nil {
			continue
		}
		id := [2]uint64{uint64(uint32(st.Fsid.Val[0])), uint64(uint32(st.Fsid.Val[1]))}
		if seen[id] {
			continue
		}
		seen[id] = true
		free := st.Bavail * uint64(st.Bsize)
		text := fmt.Sprintf("%d MiB are free at %s", free>>20, dir)
		switch {
		case free < leastSpace:
			d.add(LevelError, "disk space", "make room, or set data_dir to where there is", "%s: a node stops when its disk is full", text)
		case free < enoughSpace:
			d.add(LevelWarning, "disk space", "make room, or lower max_wal_size under postgres.settings", "%s: PostgreSQL's log and the cluster's may take more", text)
		default:
			d.ok("disk space", "%s", text)
		}
	}
}

func (d *doctor) ports() {
	if d.running {
		d.ok("ports", "the node runs and has them")
		return
	}
	c := d.n.cfg
	listeners := [][2]string{
		{"listen.gateway", c.Listen.Gateway}, {"listen.grpc", c.Listen.GRPC}, {"listen.http", c.Listen.HTTP}, {"listen.raft", c.Listen.Raft},
	}
	if !c.Witness() && c.Postgres.Managed && !d.serverRuns() {
		host := c.Postgres.Host
		if host == "*" {
			host = ""
		}
		listeners = append(listeners, [2]string{"postgres.port", net.JoinHostPort(host, strconv.Itoa(c.Postgres.Port))})
	}
	listeners = slices.DeleteFunc(listeners, func(l [2]string) bool { return l[1] == "" }) // a witness has no gateway
	free := 0
	for _, l := range listeners {
		listener, err := net.Listen("tcp", l[1])
		if err != nil {
			d.add(LevelError, "ports", "end what uses it (ss -ltnp shows that), or set another "+l[0], "%s: %v", l[0], err)
			continue
		}
		_ = listener.Close() // nothing came
		free++
	}
	if free == len(listeners) {
		d.ok("ports", "%d addresses to listen on are free", free)
	}
}

// serverRuns reports whether a server runs on the managed data directory.
func (d *doctor) serverRuns() bool {
	if d.n.cfg.Postgres.DataDir == "" {
		return false
	}
	_, runs, err := pgserver.Running(d.n.cfg.Postgres.DataDir)
	return err == nil && runs
}

// dialTimeout bounds how long another member is waited for.
const dialTimeout = 2 * time.Second

func (d *doctor) names(ctx context.Context) {
	reached, others := 0, 0
	members := d.n.cfg.Members
	if len(members) == 0 {
		members = []config.Member{d.n.cfg.Self()}
	}
	for _, m := range members {
		for _, a := range [][2]string{{"raft", m.Raft}, {"grpc", m.GRPC}} {
			host, _, err := net.SplitHostPort(a[1])
			if err != nil {
				continue // config.Validate has said so, or there is none
			}
			found, err := net.DefaultResolver.LookupHost(ctx, host)
			if err != nil {
				d.add(LevelError, "addresses", "correct the name, or add it to DNS or /etc/hosts", "node %s: %s: %v", m.ID, a[0], err)
				continue
			}
			if m.ID == d.n.cfg.Node {
				if own, err := ownAddress(found); err == nil && !own {
					d.add(LevelWarning, "addresses", "correct members, unless the address is translated on the way",
						"the others reach this node at %s (%s), which is none of this machine's addresses", a[1], strings.Join(found, ", "))
				}
				continue
			}
			others++
			conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", a[1])
			if err != nil {
				d.add(LevelWarning, "addresses", "start the node there, or open the port on the way", "node %s is not reached: %s: %v", m.ID, a[0], err)
				continue
			}
			_ = conn.Close() // nothing was sent
			reached++
		}
	}
	switch {
	case others == 0:
		d.ok("addresses", "the configuration names no other members")
	case reached == others:
		d.ok("addresses", "%d addresses of other members are reached", reached)
	}
}

// ownAddress reports whether one of the addresses is this machine's.
func ownAddress(addresses []string) (bool, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return false, err
	}
	for _, have := range all {
		network, ok := have.(*net.IPNet)
		for _, a := range addresses {
			if ip := net.ParseIP(a); ok && ip != nil && (network.IP.Equal(ip) || ip.IsLoopback()) {
				return true, nil
			}
		}
	}
	return false, nil
}

// soonExpired is how long a certificate should still be good.
const soonExpired = 30 * 24 * time.Hour

func (d *doctor) certificates() {
	t := d.n.cfg.TLS
	if !t.Given() {
		d.ok("certificates", "there are none: everything but the gateway listens on loopback only")
		return
	}
	credentials, err := pki.Open(pki.Files{CA: t.CA, Cert: t.Cert, Key: t.Key}, d.n.log)
	if err == nil {
		err = credentials.RequireNode()
	}
	if err != nil {
		d.add(LevelError, "certificates", "quorate cert node", "%v", err)
		return
	}
	leaf := credentials.Certificate()
	if self := d.n.cfg.Self(); self.GRPC != "" {
		for _, address := range []string{self.Raft, self.GRPC} {
			host, _, err := net.SplitHostPort(address)
			if err != nil {
				continue
			}
			if err := leaf.VerifyHostname(host); err != nil {
				d.add(LevelError, "certificates", "quorate cert node, with this host among --host", "%s: %v", t.Cert, err)
				return
			}
		}
	}
	if left := time.Until(leaf.NotAfter); left < soonExpired {
		d.add(LevelWarning, "certificates", "quorate cert node; the new files are read without a restart", "%s is good for %d more days", t.Cert, int(left.Hours()/24))
		return
	}
	d.ok("certificates", "%s is good until %s", t.Cert, leaf.NotAfter.UTC().Format(time.DateOnly))
}

func (d *doctor) postgres(ctx context.Context) {
	c := d.n.cfg.Postgres
	if c.Managed && !d.programs(ctx) {
		return
	}
	if c.Managed && !d.serverRuns() {
		if _, err := os.Stat(filepath.Join(c.DataDir, "PG_VERSION")); err == nil {
			d.add(LevelWarning, "database", "start it (pg_ctl -D "+c.DataDir+" start) and run this again", "PostgreSQL does not run on %s: what is in it was not examined", c.DataDir)
		}
		return
	}
	conn, err := d.connect(ctx)
	if err != nil {
		d.add(LevelError, "database", "start PostgreSQL, or correct host, port, superuser, password_file and database under postgres", "%v", err)
		return
	}
	defer conn.Close(ctx)
	d.ok("database", "PostgreSQL %s answers", conn.ParameterStatus("server_version"))
	d.settings(ctx, conn)
	d.walSender(ctx)
	troubles, err := pg.Survey(ctx, conn, d.n.cfg.MaxNodes)
	if err != nil {
		d.add(LevelError, "database", "let role "+c.Superuser+" be a superuser", "%v", err)
	}
	for _, t := range troubles {
		level := LevelWarning
		if t.Fatal {
			level = LevelError
		}
		d.findings = append(d.findings, Finding{Check: t.Check, Level: level, What: t.What, Fix: t.Fix})
	}
	if err == nil {
		d.ok("contents", "looked for %s", strings.Join(pg.Checks(), ", "))
	}
}

// programs looks at the server's programs and its data directory, and reports whether there is any use in going on.
func (d *doctor) programs(ctx context.Context) bool {
	c := d.n.cfg.Postgres
	install, err := pgserver.Find(ctx, pgserver.FindOptions{BinDir: c.BinDir})
	if err != nil {
		d.add(LevelError, "programs", "install PostgreSQL, or set postgres.bin_dir", "%v", err)
		return false
	}
	d.ok("programs", "PostgreSQL %s in %s", install.Version, install.BinDir)
	account, err := pgserver.ServerAccount()
	if err == nil {
		err = account.CanReach(c.DataDir)
	}
	if err != nil {
		d.add(LevelError, "programs", "let user "+account.Name+" enter the directories above postgres.data_dir", "%v", err)
		return false
	}
	if c.PasswordFile != "" {
		if _, err := readPassword(c.PasswordFile); err != nil {
			d.add(LevelError, "programs", "write the superuser's password into the file, readable for the user who runs quorate only", "%v", err)
			return false
		}
	}
	text, err := os.ReadFile(filepath.Join(c.DataDir, "PG_VERSION"))
	if errors.Is(err, fs.ErrNotExist) {
		entries, err := os.ReadDir(c.DataDir)
		if err == nil && len(entries) > 0 {
			d.add(LevelError, "programs", "set postgres.data_dir to an empty directory, or to one of PostgreSQL", "%s is neither empty nor PostgreSQL's", c.DataDir)
			return false
		}
		d.ok("database", "%s is empty: it will be made", c.DataDir)
		return true
	}
	if err != nil {
		d.add(LevelError, "programs", "run this as the user who runs quorate", "%v", err)
		return false
	}
	if major := strings.TrimSpace(string(text)); major != strconv.Itoa(install.Version.Major) {
		d.add(LevelError, "programs", "set postgres.bin_dir to the programs of PostgreSQL "+major+", or run pg_upgrade",
			"%s was made by PostgreSQL %s, the programs in %s are %s", c.DataDir, major, install.BinDir, install.Version)
		return false
	}
	return true
}

// connect reaches the server as the node would, or where an operator's own runs that is going to be adopted.
func (d *doctor) connect(ctx context.Context) (*pgconn.PgConn, error) {
	if d.n.cfg.Postgres.Managed {
		server, err := d.n.serverAt(ctx, d.n.cfg.Postgres.DataDir, nil)
		if err != nil {
			return nil, err
		}
		d.n.server = server
	}
	conn, err := d.n.connect(ctx)
	if err == nil || !d.n.cfg.Postgres.Managed {
		return conn, err
	}
	pm, _, pidErr := pgserver.Running(d.n.cfg.Postgres.DataDir)
	if pidErr != nil || pm.Port == 0 {
		return nil, err
	}
	c, parseErr := d.n.parseConn("quorate")
	if parseErr != nil {
		return nil, err
	}
	for _, host := range []string{pm.SocketDir, "127.0.0.1"} {
		if host == "" {
			continue
		}
		c.Host, c.Port = host, uint16(pm.Port)
		if conn, otherErr := pgconn.ConnectConfig(ctx, c); otherErr == nil {
			d.where = c
			return conn, nil
		}
	}
	return nil, err
}

// settings are looked at where the node does not make them itself.
func (d *doctor) settings(ctx context.Context, conn *pgconn.PgConn) {
	err := pgserver.CheckSettings(ctx, conn, d.n.sizing())
	var wrong *pgserver.SettingsError
	switch {
	case err == nil:
		d.ok("settings", "all are as a node needs them")
	case !errors.As(err, &wrong):
		d.add(LevelError, "settings", "", "%v", err)
	case d.n.cfg.Postgres.Managed && !d.running:
		var names []string
		for _, p := range wrong.Problems {
			names = append(names, p.Setting)
		}
		d.add(LevelWarning, "settings", "", "quorate will restart PostgreSQL with its own %s", strings.Join(names, ", "))
	default:
		for _, p := range wrong.Problems {
			fix := p.Fix
			if p.Restart {
				fix += " -- then restart PostgreSQL"
			} else {
				fix += " SELECT pg_reload_conf();"
			}
			d.add(LevelError, "settings", fix, "%s is %q, must be %s: %s", p.Setting, p.Have, p.Want, p.Why)
		}
	}
}

// walSender tries what capture and clones will do.
func (d *doctor) walSender(ctx context.Context) {
	c := d.where
	if c == nil {
		var err error
		if c, err = d.n.parseConn("quorate"); err != nil {
			d.add(LevelError, "replication", "", "%v", err)
			return
		}
	}
	c = c.Copy()
	c.RuntimeParams["replication"] = "database"
	conn, err := pgconn.ConnectConfig(ctx, c)
	if err == nil {
		_, err = conn.Exec(ctx, "IDENTIFY_SYSTEM").ReadAll()
		err = errors.Join(err, conn.Close(ctx))
	}
	if err != nil {
		d.add(LevelError, "replication", fmt.Sprintf("ALTER ROLE %s REPLICATION; or allow it in pg_hba.conf", d.n.cfg.Postgres.Superuser), "no WAL sender: %v", err)
		return
	}
	d.ok("replication", "WAL senders can be had")
}
