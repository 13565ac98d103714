package cluster_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/test/cluster"
)

// The tests of this file are about one session: what PostgreSQL does for it must not change because a gateway is in
// between.

func TestCopy(t *testing.T) {
	c, ctx := shared(t)
	create(t, ctx, c, "DROP TABLE IF EXISTS freight", "CREATE TABLE freight (id int PRIMARY KEY, v text)")
	conn := gateway(t, ctx, c, 1)
	var data bytes.Buffer
	const rows = 5000
	for i := range rows {
		fmt.Fprintf(&data, "%d\tline \\t %d \\\\ %s\n", i, i, strings.Repeat("ä", i%30))
	}
	tag, err := conn.PgConn().CopyFrom(ctx, bytes.NewReader(data.Bytes()), "COPY freight FROM STDIN")
	check(t, err)
	if tag.RowsAffected() != rows {
		t.Fatalf("COPY in: %d rows, want %d", tag.RowsAffected(), rows)
	}
	check(t, c.Settle(ctx))
	for i := 1; i <= c.Nodes; i++ {
		var out bytes.Buffer
		_, err := gateway(t, ctx, c, i).PgConn().CopyTo(ctx, &out, "COPY (SELECT * FROM freight ORDER BY id) TO STDOUT")
		check(t, err)
		if !bytes.Equal(out.Bytes(), data.Bytes()) {
			t.Errorf("COPY out on node %d returned %d bytes that are not the %d of COPY in", i, out.Len(), data.Len())
		}
	}

	// Inside a block, in binary, and rolled back.
	must(t, ctx, conn, "BEGIN")
	_, err = conn.CopyFrom(ctx, pgx.Identifier{"freight"}, []string{"id", "v"}, pgx.CopyFromRows([][]any{{rows, "a"}, {rows + 1, nil}}))
	check(t, err)
	must(t, ctx, conn, "UPDATE freight SET v = 'b' WHERE id = $1", rows)
	must(t, ctx, conn, "COMMIT")
	must(t, ctx, conn, "BEGIN")
	_, err = conn.CopyFrom(ctx, pgx.Identifier{"freight"}, []string{"id"}, pgx.CopyFromRows([][]any{{-1}}))
	check(t, err)
	must(t, ctx, conn, "ROLLBACK")

	// Bad data, a client that gives up, and a unique violation leave nothing and a usable session.
	for state, text := range map[string]string{"22P02": "-2\ta\nnonsense\tb\n", "23505": "-3\ta\n7\tb\n"} {
		_, err = conn.PgConn().CopyFrom(ctx, strings.NewReader(text), "COPY freight FROM STDIN")
		if cluster.SQLState(err) != state {
			t.Errorf("COPY of %q: got %v, want SQLSTATE %s", text, err, state)
		}
	}
	reader, feed := newFeed()
	close(feed)
	if _, err = conn.PgConn().CopyFrom(ctx, reader, "COPY freight FROM STDIN"); cluster.SQLState(err) != "57014" {
		t.Errorf("COPY that the client ends with CopyFail: got %v, want SQLSTATE 57014", err)
	}
	everywhere(t, ctx, c, int64(rows+2), "SELECT count(*) FROM freight WHERE id >= 0")
	everywhere(t, ctx, c, int64(0), "SELECT count(*) FROM freight WHERE id < 0")

	// Several COPYs and statements in one Query.
	must(t, ctx, conn, "DROP TABLE freight")
}

func TestMultiStatementQuery(t *testing.T) {
	c, ctx := shared(t)
	create(t, ctx, c, "DROP TABLE IF EXISTS bundle", "CREATE TABLE bundle (id int PRIMARY KEY)")
	conn := gateway(t, ctx, c, 3)
	query := func(sql string) ([]string, error) {
		results, err := conn.PgConn().Exec(ctx, sql).ReadAll()
		var tags []string
		for _, r := range results {
			tags = append(tags, r.CommandTag.String())
		}
		return tags, err
	}
	for _, test := range []struct {
		sql   string
		tags  string
		state string
		ids   string // afterwards
	}{
		{"INSERT INTO bundle VALUES (1); INSERT INTO bundle VALUES (2); SELECT count(*) FROM bundle", "INSERT 0 1,INSERT 0 1,SELECT 1", "", "1,2"},
		{"INSERT INTO bundle VALUES (3); SELECT 1/0; INSERT INTO bundle VALUES (4)", "", "22012", "1,2"},
		{"INSERT INTO bundle VALUES (5); COMMIT; INSERT INTO bundle VALUES (6)", "INSERT 0 1,COMMIT,INSERT 0 1", "", "1,2,5,6"},
		{"INSERT INTO bundle VALUES (7); ROLLBACK; INSERT INTO bundle VALUES (8)", "INSERT 0 1,ROLLBACK,INSERT 0 1", "", "1,2,5,6,8"},
		{"BEGIN; INSERT INTO bundle VALUES (9); COMMIT; BEGIN; INSERT INTO bundle VALUES (10); ROLLBACK", "BEGIN,INSERT 0 1,COMMIT,BEGIN,INSERT 0 1,ROLLBACK", "", "1,2,5,6,8,9"},
		{"SELECT 'a;b' /* ; COMMIT; */; -- ; ROLLBACK\nDELETE FROM bundle WHERE id = 9;;", "SELECT 1,DELETE 1", "", "1,2,5,6,8"},
		{"BEGIN; SAVEPOINT s; DELETE FROM bundle WHERE id = 8; ROLLBACK TO s; DELETE FROM bundle WHERE id = 6; END", "BEGIN,SAVEPOINT,DELETE 1,ROLLBACK,DELETE 1,COMMIT", "", "1,2,5,8"},
		{"INSERT INTO bundle VALUES (11); BEGIN; INSERT INTO bundle VALUES (12); COMMIT", "INSERT 0 1,BEGIN,INSERT 0 1,COMMIT", "", "1,11,12,2,5,8"},
		{"SELECT 1; SELECT 2", "SELECT 1,SELECT 1", "", "1,11,12,2,5,8"},
		{"", "", "", "1,11,12,2,5,8"},
		{"CREATE TABLE bundle2 (id int PRIMARY KEY); INSERT INTO bundle2 VALUES (1); DROP TABLE bundle2", "CREATE TABLE,INSERT 0 1,DROP TABLE", "", "1,11,12,2,5,8"},
	} {
		tags, err := query(test.sql)
		if got := cluster.SQLState(err); got != test.state || (err != nil) != (test.state != "") {
			t.Errorf("%s: got error %v, want SQLSTATE %q", test.sql, err, test.state)
		}
		if got := strings.Join(tags, ","); test.state == "" && got != test.tags {
			t.Errorf("%s: got tags %s, want %s", test.sql, got, test.tags)
		}
		if status := conn.PgConn().TxStatus(); status != 'I' {
			t.Fatalf("%s: transaction status %c afterwards", test.sql, status)
		}
		everywhere(t, ctx, c, test.ids, "SELECT string_agg(id::text, ',' ORDER BY id::text) FROM bundle")
	}
}

func TestPipeline(t *testing.T) {
	c, ctx := shared(t)
	create(t, ctx, c, "DROP TABLE IF EXISTS queue", "CREATE TABLE queue (id int PRIMARY KEY, v text)")
	conn := gateway(t, ctx, c, 2)
	all := func() string {
		return "SELECT coalesce(string_agg(id::text, ',' ORDER BY id), '') FROM queue"
	}
	send := func(statements ...string) error {
		batch := &pgx.Batch{}
		for _, sql := range statements {
			batch.Queue(sql)
		}
		return conn.SendBatch(ctx, batch).Close()
	}

	// A batch up to its Sync is one transaction.
	check(t, send("INSERT INTO queue VALUES (1, 'a')", "INSERT INTO queue VALUES (2, 'b')", "UPDATE queue SET v = 'c' WHERE id = 1"))
	if err := send("INSERT INTO queue VALUES (3, 'a')", "INSERT INTO queue VALUES (1, 'b')", "INSERT INTO queue VALUES (4, 'b')"); cluster.SQLState(err) != "23505" {
		t.Errorf("batch with a failing statement: got %v, want 23505", err)
	}
	everywhere(t, ctx, c, "1,2", all())
	check(t, send("SELECT 1", "SELECT count(*) FROM queue"))
	check(t, send("BEGIN", "INSERT INTO queue VALUES (5, 'x')", "COMMIT"))
	check(t, send("BEGIN", "INSERT INTO queue VALUES (6, 'x')", "ROLLBACK"))
	everywhere(t, ctx, c, "1,2,5", all())

	// Several Syncs in flight: each is a transaction of its own, and one that fails does not touch the others.
	pipeline := conn.PgConn().StartPipeline(ctx)
	for _, sql := range []string{
		"INSERT INTO queue VALUES (10, 'x')", "INSERT INTO queue VALUES (1, 'duplicate')", "INSERT INTO queue VALUES (11, 'x')",
		"SELECT count(*) FROM queue", "DELETE FROM queue WHERE id = 5",
	} {
		pipeline.SendQueryParams(sql, nil, nil, nil, nil)
		check(t, pipeline.Sync())
	}
	failures, syncs := 0, 0
	for syncs < 5 {
		result, err := pipeline.GetResults()
		if cluster.SQLState(err) == "23505" {
			failures++
			continue
		}
		check(t, err)
		switch r := result.(type) {
		case *pgconn.ResultReader:
			if _, err := r.Close(); cluster.SQLState(err) == "23505" {
				failures++
			} else {
				check(t, err)
			}
		case *pgconn.PipelineSync:
			syncs++
		case nil:
			t.Fatalf("the pipeline ended after %d of 5 Syncs", syncs)
		}
	}
	check(t, pipeline.Close())
	if failures != 1 {
		t.Errorf("%d statements of the pipeline failed, want 1", failures)
	}
	everywhere(t, ctx, c, "1,2,10,11", all())

	// Prepared statements outlive transactions; portals within one are read in parts.
	_, err := conn.Prepare(ctx, "put", "INSERT INTO queue VALUES ($1, $2)")
	check(t, err)
	for i := 20; i < 25; i++ {
		must(t, ctx, conn, "put", i, "p")
	}
	must(t, ctx, conn, "PREPARE plain AS DELETE FROM queue WHERE id = $1")
	must(t, ctx, conn, "EXECUTE plain(20)")
	everywhere(t, ctx, c, "1,2,10,11,21,22,23,24", all())
}

// TestExecModes runs reads and writes in each way in which pgx can send them.
func TestExecModes(t *testing.T) {
	c, ctx := shared(t)
	create(t, ctx, c, "DROP TABLE IF EXISTS modes", "CREATE TABLE modes (id int PRIMARY KEY, v numeric, at timestamptz)")
	conn := gateway(t, ctx, c, 1)
	for n, mode := range []pgx.QueryExecMode{
		pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec,
		pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol,
	} {
		for round := range 2 {
			id := n*10 + round
			at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
			must(t, ctx, conn, "INSERT INTO modes VALUES ($1, $2, $3)", mode, id, "1.50", at)
			equals(t, ctx, conn, "1.50", "SELECT v::text FROM modes WHERE id = $1", mode, id)
			equals(t, ctx, conn, int32(id), "UPDATE modes SET v = v + 1 WHERE id = $1 RETURNING id", mode, id)
			equals(t, ctx, conn, int32(id), "WITH d AS (DELETE FROM modes WHERE id = $1 RETURNING id) SELECT id FROM d", mode, id)
			must(t, ctx, conn, "INSERT INTO modes VALUES ($1, NULL, NULL)", mode, id)
		}
	}
	everywhere(t, ctx, c, int64(10), "SELECT count(*) FROM modes WHERE v IS NULL")
}

// TestWritesHiddenInReads: statements that look like reads and write.
func TestWritesHiddenInReads(t *testing.T) {
	c, ctx := shared(t)
	create(t, ctx, c, "DROP TABLE IF EXISTS diary",
		"CREATE TABLE diary (id int PRIMARY KEY)",
		"CREATE OR REPLACE FUNCTION note(i int) RETURNS int LANGUAGE sql AS 'INSERT INTO diary VALUES (i) RETURNING id'",
		`CREATE OR REPLACE FUNCTION note_if_possible(i int) RETURNS boolean LANGUAGE plpgsql AS $$
		BEGIN
			INSERT INTO diary VALUES (i);
			RETURN true;
		EXCEPTION WHEN read_only_sql_transaction THEN
			RETURN false;
		END $$`,
		`CREATE OR REPLACE PROCEDURE note_all(a int, b int) LANGUAGE plpgsql AS $$
		BEGIN
			INSERT INTO diary VALUES (a);
			INSERT INTO diary VALUES (b);
		END $$`)
	conn := gateway(t, ctx, c, 1)
	must(t, ctx, conn, "SELECT note(1)")
	must(t, ctx, conn, "WITH w AS (INSERT INTO diary VALUES (2) RETURNING id) SELECT * FROM w")
	equals(t, ctx, conn, true, "SELECT note_if_possible(3)")
	must(t, ctx, conn, "CALL note_all(4, 5)")
	must(t, ctx, conn, "DO $$ BEGIN INSERT INTO diary VALUES (6); END $$")
	must(t, ctx, conn, "EXPLAIN ANALYZE INSERT INTO diary VALUES (7)")
	must(t, ctx, conn, "PREPARE w AS INSERT INTO diary VALUES ($1)")
	must(t, ctx, conn, "EXECUTE w(8)")
	must(t, ctx, conn, "EXPLAIN INSERT INTO diary VALUES (100)")
	must(t, ctx, conn, "BEGIN READ WRITE")
	must(t, ctx, conn, "DECLARE reader CURSOR FOR SELECT note(9)")
	must(t, ctx, conn, "FETCH ALL FROM reader")
	must(t, ctx, conn, "COMMIT")
	everywhere(t, ctx, c, "1,2,3,4,5,6,7,8,9", "SELECT string_agg(id::text, ',' ORDER BY id) FROM diary")

	must(t, ctx, conn, "BEGIN READ ONLY")
	refused(t, ctx, conn, "25006", "INSERT INTO diary VALUES (101)")
	must(t, ctx, conn, "ROLLBACK")
	// What keeps strays out is not shown to clients.
	equals(t, ctx, conn, "off", "SHOW transaction_read_only")
	equals(t, ctx, conn, "off", "SHOW default_transaction_read_only")
	must(t, ctx, conn, "SET default_transaction_read_only = on")
	refused(t, ctx, conn, "25006", "INSERT INTO diary VALUES (102)")
	must(t, ctx, conn, "SET default_transaction_read_only = off")
	must(t, ctx, conn, "INSERT INTO diary VALUES (10)")
	everywhere(t, ctx, c, int64(10), "SELECT count(*) FROM diary")
}

func TestDeferredConstraints(t *testing.T) {
	c, ctx := shared(t)
	create(t, ctx, c, "DROP TABLE IF EXISTS leaf, trunk, place",
		"CREATE TABLE trunk (id int PRIMARY KEY)",
		"CREATE TABLE leaf (id int PRIMARY KEY, trunk int REFERENCES trunk DEFERRABLE INITIALLY DEFERRED)",
		"CREATE TABLE place (id int PRIMARY KEY, pos int NOT NULL, CONSTRAINT pos_once UNIQUE (pos) DEFERRABLE INITIALLY DEFERRED)",
		"INSERT INTO place VALUES (1, 1), (2, 2), (3, 3)")
	a, b := gateway(t, ctx, c, 1), gateway(t, ctx, c, 2)

	must(t, ctx, a, "BEGIN")
	must(t, ctx, a, "INSERT INTO leaf VALUES (1, 1)") // before its trunk
	must(t, ctx, a, "INSERT INTO trunk VALUES (1)")
	must(t, ctx, a, "COMMIT")
	must(t, ctx, a, "BEGIN")
	must(t, ctx, a, "INSERT INTO leaf VALUES (2, 99)")
	refused(t, ctx, a, "23503", "COMMIT")
	equals(t, ctx, a, int32(1), "SELECT 1")
	refused(t, ctx, a, "23503", "INSERT INTO leaf VALUES (3, 99)")

	must(t, ctx, b, "BEGIN")
	must(t, ctx, b, "UPDATE place SET pos = 2 WHERE id = 1") // for a moment twice
	must(t, ctx, b, "UPDATE place SET pos = 1 WHERE id = 2")
	must(t, ctx, b, "COMMIT")
	everywhere(t, ctx, c, "2,1,3", "SELECT string_agg(pos::text, ',' ORDER BY id) FROM place")
	everywhere(t, ctx, c, int64(1), "SELECT count(*) FROM leaf")

	// The same new value on two nodes: one commits.
	if c.Gateway(1) == c.Gateway(2) {
		return // one server would make the second wait for the first
	}
	must(t, ctx, a, "BEGIN")
	must(t, ctx, a, "INSERT INTO place VALUES (10, 10)")
	must(t, ctx, b, "BEGIN")
	must(t, ctx, b, "INSERT INTO place VALUES (11, 10)")
	race(t, []int{1, 2}, func(i int) error {
		_, err := map[int]*pgx.Conn{1: a, 2: b}[i].Exec(ctx, "COMMIT")
		if cluster.SQLState(err) == "23505" { // as good: it saw the other one in time
			err = &pgconn.PgError{Code: "40001"}
		}
		return err
	})
	must(t, ctx, a, "ROLLBACK")
	must(t, ctx, b, "ROLLBACK")
	everywhere(t, ctx, c, int64(1), "SELECT count(*) FROM place WHERE pos = 10")
}

func TestCancel(t *testing.T) {
	c, ctx := shared(t)
	create(t, ctx, c, "DROP TABLE IF EXISTS patience", "CREATE TABLE patience (id int PRIMARY KEY, v int)", "INSERT INTO patience VALUES (1, 0)")
	conn, holder, watcher := gateway(t, ctx, c, 2), gateway(t, ctx, c, 2), direct(t, ctx, c, 2)
	backend := one[int32](t, ctx, conn, "SELECT pg_backend_pid()")
	cancelled := func(waiting, sql string) {
		t.Helper()
		result := make(chan error, 1)
		go func() {
			_, err := conn.Exec(ctx, sql)
			result <- err
		}()
		awaitQuery(t, ctx, watcher, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND state = 'active' AND wait_event_type = $2)", backend, waiting)
		check(t, conn.PgConn().CancelRequest(ctx))
		if err := <-result; cluster.SQLState(err) != "57014" {
			t.Errorf("%s: got %v, want SQLSTATE 57014", sql, err)
		}
	}
	cancelled("Timeout", "SELECT pg_sleep(50)")
	cancelled("Timeout", "INSERT INTO patience SELECT 2, 0 FROM pg_sleep(50)")

	must(t, ctx, holder, "BEGIN")
	must(t, ctx, holder, "UPDATE patience SET v = 1 WHERE id = 1")
	cancelled("Lock", "UPDATE patience SET v = 2 WHERE id = 1")
	must(t, ctx, conn, "BEGIN")
	must(t, ctx, conn, "INSERT INTO patience VALUES (3, 0)")
	cancelled("Lock", "UPDATE patience SET v = 2 WHERE id = 1")
	refused(t, ctx, conn, "25P02", "SELECT 1")
	must(t, ctx, conn, "ROLLBACK")
	must(t, ctx, holder, "COMMIT")
	must(t, ctx, conn, "UPDATE patience SET v = v + 2 WHERE id = 1")
	everywhere(t, ctx, c, "1:3", "SELECT string_agg(id || ':' || v, ',') FROM patience")
}

// TestVanishingClient: a client that is gone leaves no transaction behind, wherever it was.
func TestVanishingClient(t *testing.T) {
	c, ctx := shared(t)
	create(t, ctx, c, "DROP TABLE IF EXISTS traces", "CREATE TABLE traces (id int PRIMARY KEY)")
	watcher := direct(t, ctx, c, 3)
	for n := range 5 {
		conn, err := c.Connect(ctx, 3)
		check(t, err)
		must(t, ctx, conn, "BEGIN")
		must(t, ctx, conn, "INSERT INTO traces VALUES ($1)", n)
		backend := one[int32](t, ctx, conn, "SELECT pg_backend_pid()")
		if n%2 == 0 {
			// In the middle of a statement.
			frontend := conn.PgConn().Frontend()
			frontend.Send(query("SELECT pg_sleep(0.2)"))
			check(t, frontend.Flush())
		}
		check(t, conn.PgConn().Conn().Close())
		awaitQuery(t, ctx, watcher, "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", backend)
	}
	everywhere(t, ctx, c, int64(0), "SELECT count(*) FROM traces")
}

func TestReadCommittedSeesEachStatement(t *testing.T) {
	c, ctx := shared(t)
	create(t, ctx, c, "DROP TABLE IF EXISTS moving", "CREATE TABLE moving (id int PRIMARY KEY, n int)", "INSERT INTO moving VALUES (1, 0)")
	reader, writer, watcher := gateway(t, ctx, c, 1), gateway(t, ctx, c, 2), direct(t, ctx, c, 1)
	for _, test := range []struct {
		isolation string
		after     int32
	}{{"READ COMMITTED", 1}, {"REPEATABLE READ", 0}} {
		must(t, ctx, writer, "UPDATE moving SET n = 0")
		awaitQuery(t, ctx, watcher, "SELECT n = 0 FROM moving")
		must(t, ctx, reader, "BEGIN ISOLATION LEVEL "+test.isolation)
		equals(t, ctx, reader, int32(0), "SELECT n FROM moving")
		must(t, ctx, writer, "UPDATE moving SET n = 1")
		awaitQuery(t, ctx, watcher, "SELECT n = 1 FROM moving")
		equals(t, ctx, reader, test.after, "SELECT n FROM moving")
		if test.isolation == "READ COMMITTED" {
			must(t, ctx, reader, "UPDATE moving SET n = n + 10")
		} else {
			refused(t, ctx, reader, "40001", "UPDATE moving SET n = n + 10")
		}
		must(t, ctx, reader, "COMMIT")
		check(t, c.Settle(ctx)) // the writer's node must have it before the writer writes again
	}
	must(t, ctx, writer, "BEGIN")
	equals(t, ctx, writer, "repeatable read", "SHOW transaction_isolation")
	must(t, ctx, writer, "COMMIT")
}

// TestRefused: what is not supported is said to be so, and never done halfway.
func TestRefused(t *testing.T) {
	c, ctx := shared(t)
	create(t, ctx, c, "DROP TABLE IF EXISTS strict", "CREATE TABLE strict (id int PRIMARY KEY)")
	const notSupported = "0A000"
	conn := gateway(t, ctx, c, 1)
	refused(t, ctx, conn, notSupported, "BEGIN ISOLATION LEVEL SERIALIZABLE")
	refused(t, ctx, conn, notSupported, "START TRANSACTION READ WRITE, ISOLATION LEVEL SERIALIZABLE")
	refused(t, ctx, conn, notSupported, "SET default_transaction_isolation = 'serializable'")
	refused(t, ctx, conn, notSupported, "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE")
	must(t, ctx, conn, "BEGIN")
	refused(t, ctx, conn, notSupported, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
	must(t, ctx, conn, "ROLLBACK")
	must(t, ctx, conn, "BEGIN")
	must(t, ctx, conn, "INSERT INTO strict VALUES (1)")
	refused(t, ctx, conn, notSupported, "PREPARE TRANSACTION 'mine'")
	must(t, ctx, conn, "ROLLBACK")
	refused(t, ctx, conn, notSupported, "COMMIT PREPARED 'mine'")
	refused(t, ctx, conn, notSupported, "ROLLBACK PREPARED 'mine'")

	// By way of a function the level cannot be refused when it is set; then the commit of a write must be.
	must(t, ctx, conn, "BEGIN")
	_, err1 := conn.Exec(ctx, "SELECT set_config('transaction_isolation', 'serializable', true)")
	_, err2 := conn.Exec(ctx, "INSERT INTO strict VALUES (2)")
	_, err3 := conn.Exec(ctx, "COMMIT")
	if err := errors.Join(err1, err2, err3); err == nil {
		t.Error("a transaction made serializable with set_config has written and committed")
	}
	must(t, ctx, conn, "ROLLBACK")

	must(t, ctx, conn, "INSERT INTO strict VALUES (3)")
	everywhere(t, ctx, c, int64(1), "SELECT count(*) FROM strict")
}

// TestOtherDatabase: only one database is replicated, so the gateway lets nobody into another.
func TestOtherDatabase(t *testing.T) {
	c, ctx := shared(t)
	conn, err := pgx.Connect(ctx, strings.Replace(cluster.URL(c.Gateway(1)), "/postgres?", "/template1?", 1))
	if err == nil {
		closeAtEnd(t, conn)
	}
	if cluster.SQLState(err) != "0A000" {
		t.Errorf("connecting to template1: got %v, want SQLSTATE 0A000", err)
	}
}

// TestAroundTheGateway: a write that would not be replicated is not possible by accident.
func TestAroundTheGateway(t *testing.T) {
	c, ctx := shared(t)
	create(t, ctx, c, "DROP TABLE IF EXISTS side", "CREATE TABLE side (id int PRIMARY KEY)")
	for i := 1; i <= c.Nodes; i++ {
		conn := direct(t, ctx, c, i)
		refused(t, ctx, conn, "25006", "INSERT INTO side VALUES (1)")
		refused(t, ctx, conn, "25006", "CREATE TABLE side2 (id int)")
	}
}

// TestReadsAreNotOrdered: what wrote nothing does not reach the log.
func TestReadsAreNotOrdered(t *testing.T) {
	c, ctx := shared(t)
	if c.Attached() {
		t.Skip("an attached cluster has no address for its status")
	}
	create(t, ctx, c, "DROP TABLE IF EXISTS still", "CREATE TABLE still (id int PRIMARY KEY)", "INSERT INTO still VALUES (1)")
	conn := gateway(t, ctx, c, 2)
	before := position(t, ctx, c)
	for range 20 {
		equals(t, ctx, conn, int32(1), "SELECT id FROM still")
		must(t, ctx, conn, "BEGIN")
		equals(t, ctx, conn, int32(1), "SELECT id FROM still")
		must(t, ctx, conn, "SELECT id FROM still FOR UPDATE")
		must(t, ctx, conn, "COMMIT")
		must(t, ctx, conn, "UPDATE still SET id = 2 WHERE false")
		must(t, ctx, conn, "BEGIN")
		must(t, ctx, conn, "DELETE FROM still")
		must(t, ctx, conn, "ROLLBACK")
		must(t, ctx, conn, "CREATE TEMP TABLE IF NOT EXISTS own (id int)")
		must(t, ctx, conn, "INSERT INTO own VALUES (1)")
	}
	if after := position(t, ctx, c); after != before {
		t.Errorf("200 statements that replicate nothing moved the position of node 1 from %d to %d", before, after)
	}
	must(t, ctx, conn, "UPDATE still SET id = 2")
	check(t, c.Settle(ctx))
	if after := position(t, ctx, c); after <= before {
		t.Errorf("writes left the position of node 1 at %d", after)
	}
}
