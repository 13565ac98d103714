package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/test/cluster"
	"github.com/quorate/quorate/test/network"
)

// TestSeparate: nodes on a network of their own, each started by itself, are a cluster.
func TestSeparate(t *testing.T) {
	net, err := network.New(3)
	if errors.Is(err, network.ErrNotPermitted) {
		t.Skip(err)
	}
	check(t, err)
	t.Cleanup(func() { check(t, net.Close()) })
	o := options(t)
	o.Network = net
	c, ctx := private(t, o)
	create(t, ctx, c, "CREATE TABLE there (id int PRIMARY KEY)")
	for i := 1; i <= c.Nodes; i++ {
		must(t, ctx, gateway(t, ctx, c, i), "INSERT INTO there VALUES ($1)", i)
	}
	remoteLogins(t, ctx, c)
	check(t, c.Verify(ctx))
	check(t, c.Stop())
	check(t, c.Resume(ctx))
	everywhere(t, ctx, c, int64(3), "SELECT count(*) FROM there")
	check(t, c.Stop())
}

// remoteLogins: somebody on another machine gets in with the password only, even where PostgreSQL trusts the gateway; and
// is known by his address.
func remoteLogins(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	t.Helper()
	without := strings.Replace(cluster.URL(c.Gateway(1)), ":"+cluster.Password+"@", "@", 1)
	refused := func(url, code string) {
		t.Helper()
		conn, err := pgx.Connect(ctx, url)
		var e *pgconn.PgError
		if !errors.As(err, &e) || e.Code != code {
			t.Errorf("login at %s: %v, want %s", url, err, code)
		}
		if err == nil {
			check(t, conn.Close(ctx))
		}
	}
	refused(strings.Replace(without, "postgres@", "postgres:wrong@", 1), "28P01")

	direct, err := c.Direct(ctx, 1)
	check(t, err)
	defer func() { check(t, direct.Close(ctx)) }()
	must(t, ctx, direct, "SET default_transaction_read_only = off")
	must(t, ctx, direct, "CREATE TEMPORARY TABLE lines (line text)")
	read := func(setting string) (text string) {
		t.Helper()
		check(t, direct.QueryRow(ctx, "SELECT pg_read_file(current_setting($1))", setting).Scan(&text))
		return text
	}
	write := func(setting, text string) {
		t.Helper()
		must(t, ctx, direct, "TRUNCATE lines")
		must(t, ctx, direct, "INSERT INTO lines SELECT * FROM string_to_table($1, chr(10))", text)
		must(t, ctx, direct, fmt.Sprintf("DO $$ BEGIN EXECUTE format('COPY lines TO %%L', current_setting('%s')); END $$", setting))
		must(t, ctx, direct, "SELECT pg_reload_conf()")
	}
	hba := read("hba_file")
	write("ident_file", "sidecar /.* postgres")
	for _, method := range []string{"trust", "peer map=sidecar"} {
		write("hba_file", "local all all "+method+"\n"+hba)
		// Who has the sidecar's place is let in by PostgreSQL.
		unasked := strings.Replace(cluster.URL(c.Postgres(1)), ":"+cluster.Password+"@", "@", 1)
		for {
			conn, err := pgx.Connect(ctx, unasked)
			if err == nil {
				var as string
				check(t, conn.QueryRow(ctx, "SELECT coalesce(system_user, 'trust')").Scan(&as))
				check(t, conn.Close(ctx))
				if strings.HasPrefix(method, strings.SplitN(as, ":", 2)[0]) {
					break
				}
			}
			if ctx.Err() != nil {
				t.Fatalf("%s: %v", method, err)
			}
			time.Sleep(10 * time.Millisecond) // until the postmaster has read the file
		}
		refused(without, "28000")
		refused(cluster.URL(c.Gateway(1)), "28000") // a password that nobody has checked is none
	}
	write("hba_file", hba)
	for refusedYet := true; refusedYet && ctx.Err() == nil; {
		conn, err := c.Connect(ctx, 1)
		if refusedYet = err != nil; !refusedYet {
			check(t, conn.Close(ctx))
		}
	}
	conn := gateway(t, ctx, c, 1)
	var address string
	check(t, conn.QueryRow(ctx, "SELECT current_setting('quorate.client_address')").Scan(&address))
	if host, _, err := net.SplitHostPort(address); err != nil || host != clientHost(conn) {
		t.Errorf("the client is at %s, says the session: it is at %s", address, clientHost(conn))
	}
}

func clientHost(conn *pgx.Conn) string {
	return conn.PgConn().Conn().LocalAddr().(*net.TCPAddr).IP.String()
}
