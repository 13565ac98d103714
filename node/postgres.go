package node

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/replication/apply"
	"github.com/quorate/quorate/replication/pg"
)

// openPostgres brings PostgreSQL to where an incarnation can build on it: running, with the right settings, our objects
// installed, and nothing left of an earlier incarnation. It reads how far it is.
func (n *Node) openPostgres(ctx context.Context, i *incarnation) error {
	if n.cfg.Postgres.Managed {
		if err := n.startServer(ctx); err != nil {
			return err
		}
	}
	conn, err := n.connect(ctx)
	if err != nil {
		return err
	}
	err = i.prepareServer(ctx, conn)
	return errors.Join(err, closeConn(ctx, conn))
}

// slotWAL is how much WAL a slot may keep. Capture's slot is behind by a bit, or by as much as was written since the oldest open
// transaction began; beyond the bound PostgreSQL ends capture, and the node comes back with another slot. A clone ends by itself at
// half of it.
func slotWAL(l config.Limits) int64 { return 2 * int64(l.CloneWAL) }

func (n *Node) sizing() pgserver.Sizing {
	return pgserver.Sizing{Clients: n.cfg.Limits.Clients, Workers: n.cfg.Apply.Workers, SlotWAL: slotWAL(n.cfg.Limits)}
}

// startServer starts the managed server, or goes on with it if it runs.
func (n *Node) startServer(ctx context.Context) error {
	if n.server == nil {
		if err := n.describeServer(ctx); err != nil {
			return err
		}
		if _, err := n.server.Init(ctx); err != nil {
			return err
		}
	}
	return n.server.Start(ctx)
}

// describeServer prepares for the managed server, which may still have to get its data.
func (n *Node) describeServer(ctx context.Context) error {
	server, err := n.serverAt(ctx, n.cfg.Postgres.DataDir, nil)
	if err != nil {
		return err
	}
	n.server = server
	n.onClose(server.Stop)
	return nil
}

// serverAt describes the managed server on a data directory, with settings that win over the configured ones.
func (n *Node) serverAt(ctx context.Context, dataDir string, more pgserver.Settings) (*pgserver.Server, error) {
	c := n.cfg.Postgres
	install, err := pgserver.Find(ctx, pgserver.FindOptions{BinDir: c.BinDir})
	if err != nil {
		return nil, err
	}
	settings := pgserver.NodeSettings(install.Version, n.sizing())
	maps.Copy(settings, c.Settings)
	maps.Copy(settings, more)
	password, err := readPassword(c.PasswordFile)
	if err != nil {
		return nil, err
	}
	return pgserver.New(pgserver.Config{
		Install: install, DataDir: dataDir, Host: c.Host, Port: c.Port, SocketDir: c.SocketDir,
		Superuser: c.Superuser, Auth: c.Auth, Password: password, Settings: settings,
		Log: n.log.With(logkey.Component, "postgres"),
	})
}

func (i *incarnation) prepareServer(ctx context.Context, conn *pgconn.PgConn) (err error) {
	n := i.n
	if i.life, err = apply.ServerLife(ctx, conn); err != nil {
		return err
	}
	if err := pgserver.CheckSettings(ctx, conn, n.sizing()); err != nil {
		return err
	}
	if i.version = conn.ParameterStatus("server_version"); i.version == "" {
		return errors.New("PostgreSQL does not say its version")
	}
	if err := pg.Settle(ctx, conn); err != nil {
		return err
	}
	id := pg.Identity{Cluster: n.cfg.Cluster, Node: n.cfg.Node, Slot: n.slot(), MaxNodes: n.maxNodes()}
	if id.Generation, err = n.nextGeneration(ctx, conn, i.id); err != nil {
		return err
	}
	if i.token, err = pg.Install(ctx, conn, id); err != nil {
		return err
	}
	if err := n.generationBegun(id.Generation); err != nil {
		return err
	}
	i.server = n.identity.get().Server
	i.start, err = apply.Progress(ctx, conn)
	return err
}

// connString is how this node itself reaches its PostgreSQL.
func (n *Node) connString() (string, error) {
	c := n.cfg.Postgres
	if n.server != nil {
		return n.server.ConnString(c.Database), nil
	}
	password, err := readPassword(c.PasswordFile)
	if err != nil {
		return "", err
	}
	quote := pgserver.QuoteKeyword
	s := fmt.Sprintf("host=%s port=%d user=%s database=%s", quote(c.Host), c.Port, quote(c.Superuser), quote(c.Database))
	if password != "" {
		s += " password=" + quote(password)
	}
	return s, nil
}

// parseConn is connString as pgconn takes it, for sessions of the node itself: they may write, and no setting of a
// role or database bends what they read.
func (n *Node) parseConn(application string) (*pgconn.Config, error) {
	s, err := n.connString()
	if err != nil {
		return nil, err
	}
	c, err := pgconn.ParseConfig(s)
	if err != nil {
		return nil, fmt.Errorf("connect to PostgreSQL: %w", err)
	}
	c.RuntimeParams["application_name"] = application
	c.RuntimeParams["default_transaction_read_only"] = "off"
	return c, nil
}

// connect opens a superuser's session on the replicated database.
func (n *Node) connect(ctx context.Context) (*pgconn.PgConn, error) {
	c, err := n.parseConn("quorate")
	if err != nil {
		return nil, err
	}
	conn, err := pgconn.ConnectConfig(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("connect to PostgreSQL: %w", err)
	}
	return conn, nil
}

// serverAddress is the network and address of PostgreSQL, for the gateway's server connections.
func (n *Node) serverAddress() (network, address string) {
	host, port := n.cfg.Postgres.Host, strconv.Itoa(n.cfg.Postgres.Port)
	if n.server != nil {
		host = n.server.Config().SocketDir
	}
	if strings.HasPrefix(host, "/") {
		return "unix", host + "/.s.PGSQL." + port
	}
	return "tcp", net.JoinHostPort(host, port)
}

func readPassword(name string) (string, error) {
	if name == "" {
		return "", nil
	}
	f, err := os.Open(name)
	if err != nil {
		return "", fmt.Errorf("read postgres.password_file: %w", err)
	}
	defer f.Close()
	line := bufio.NewScanner(f)
	if !line.Scan() {
		return "", fmt.Errorf("read postgres.password_file %q: its first line is missing: %w", name, errors.Join(line.Err(), errors.New("no password")))
	}
	return line.Text(), nil
}
