package gateway

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
)

// set changes what the node lets clients do, until the end of the test at most.
func (f *fixture) set(t *testing.T, a Access) {
	f.access.Store(uint32(a))
	t.Cleanup(func() { f.access.Store(uint32(ReadWrite)) })
}

func testNoQuorum(t *testing.T, f *fixture) {
	wrote, open := f.connect(t), f.connect(t)
	expect(t, wrote, "BEGIN; INSERT INTO t VALUES (1)", "BEGIN INSERT 0 1 T")
	expect(t, open, "BEGIN; SELECT count(*) FROM t", "BEGIN (0) SELECT 1 T")
	c, bystander := f.connect(t), f.connect(t)
	before, _ := f.coord.counts()
	f.set(t, ReadOnly)

	// outside a block
	expect(t, c, "SELECT count(*) FROM t", "(0) SELECT 1 I")
	expect(t, c, "INSERT INTO t VALUES (2)", "!25006 I")
	expect(t, c, "WITH x AS (INSERT INTO t VALUES (2) RETURNING id) SELECT * FROM x", "!25006 I")
	expect(t, c, "INSERT INTO t VALUES (2); SELECT 1", "!25006 I")
	expect(t, c, "CREATE TABLE made (id int)", "!25006 I")
	expect(t, c, "SHOW transaction_read_only", "(on) SHOW I")
	expect(t, c, "SHOW default_transaction_read_only", "(on) SHOW I")
	expect(t, c, "SET default_transaction_read_only = off", "SET I")
	expect(t, c, "DELETE FROM t", "!25006 I")
	// in a block, however it begins
	for _, begin := range []string{"BEGIN", "BEGIN READ WRITE", "START TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE"} {
		tag, _, _ := strings.Cut(begin, " READ WRITE")
		if strings.HasPrefix(tag, "START") {
			tag = "START TRANSACTION"
		}
		expect(t, c, begin, tag+" T")
		expect(t, c, "SELECT count(*) FROM t", "(0) SELECT 1 T")
		expect(t, c, "INSERT INTO t VALUES (3)", "!25006 E")
		expect(t, c, "COMMIT", "ROLLBACK I")
	}
	expect(t, c, "BEGIN; SELECT 1; COMMIT", "BEGIN (1) SELECT 1 COMMIT I")
	expect(t, c, "BEGIN; INSERT INTO t VALUES (3); COMMIT", "BEGIN !25006 E")
	expect(t, c, "ROLLBACK", "ROLLBACK I")
	expect(t, c, "SELECT 1; BEGIN; INSERT INTO t VALUES (3); COMMIT", "(1) SELECT 1 BEGIN !25006 E")
	expect(t, c, "ROLLBACK", "ROLLBACK I")
	expect(t, c, "BEGIN; COMMIT AND CHAIN", "BEGIN COMMIT T")
	f.access.Store(uint32(ReadWrite))
	expect(t, c, "INSERT INTO t VALUES (3)", "!25006 E") // begun without
	expect(t, c, "ROLLBACK", "ROLLBACK I")
	f.access.Store(uint32(ReadOnly))

	_, err := c.Exec(timeout(t), "INSERT INTO t VALUES (2)").ReadAll()
	var e *pgconn.PgError
	if !errors.As(err, &e) || e.Message != "cannot execute INSERT in a read-only transaction: no quorum" || e.Hint == "" {
		t.Errorf("what the client is told: %+v", e)
	}

	// blocks from before
	if _, err := wrote.Exec(timeout(t), "COMMIT").ReadAll(); !errors.As(err, &e) || e.Code != "25006" || e.Message != "cannot commit: no quorum" {
		t.Errorf("COMMIT of a block that has written: %v", err)
	}
	expect(t, wrote, "SELECT count(*) FROM t", "(0) SELECT 1 I")
	expect(t, open, "COMMIT", "COMMIT I")

	// extended protocol
	w := f.wire(t, nil)
	for _, x := range []struct {
		what string
		m    []pgproto3.FrontendMessage
		want string
	}{
		{"write", join(all("INSERT INTO t VALUES ($1)", "4"), syncMessage), "1 2 n !25006 I"},
		{"read", join(all("SELECT count(*) FROM t"), syncMessage), "1 2 T (0) SELECT_1 I"},
		{"read and write", join(all("SELECT 1"), all("DELETE FROM t"), syncMessage), "1 2 T (1) SELECT_1 1 2 n !25006 I"},
		{"flushed", join(all("DELETE FROM t"), flush, syncMessage), "1 2 n !25006 I"},
		{"block", join(all("BEGIN READ WRITE"), all("INSERT INTO t VALUES (4)"), all("COMMIT"), syncMessage), "1 2 n BEGIN 1 2 n !25006 E"},
		{"ROLLBACK", join(all("ROLLBACK"), syncMessage), "1 2 n ROLLBACK I"},
		{"block that reads", join(all("BEGIN"), all("SELECT 1"), all("COMMIT"), syncMessage), "1 2 n BEGIN 1 2 T (1) SELECT_1 1 2 n COMMIT I"},
	} {
		w.send(x.m...)
		if got := w.until(1); got != x.want {
			t.Errorf("%s\n got %s\nwant %s", x.what, got, x.want)
		}
	}

	// what drivers go by
	config, err := pgconn.ParseConfig(f.url("postgres") + "&target_session_attrs=read-write")
	if err != nil {
		t.Fatal(err)
	}
	if found, err := pgconn.ConnectConfig(timeout(t), config); err == nil {
		t.Error("a client that wants to write is content")
		_ = found.Close(context.Background())
	}
	if got := f.connect(t).ParameterStatus("default_transaction_read_only"); got != "on" {
		t.Errorf("who connects is told default_transaction_read_only = %q", got)
	}
	if got := bystander.ParameterStatus("default_transaction_read_only"); got != "off" {
		t.Errorf("who says nothing is told default_transaction_read_only = %q", got)
	}
	expect(t, bystander, "SELECT 1", "(1) SELECT 1 I")
	if got := bystander.ParameterStatus("default_transaction_read_only"); got != "on" {
		t.Errorf("who reads is told default_transaction_read_only = %q", got)
	}

	if after, _ := f.coord.counts(); after != before {
		t.Errorf("%d commits were ordered without quorum", after-before)
	}
	f.access.Store(uint32(ReadWrite))
	expect(t, bystander, "BEGIN; SELECT 1", "BEGIN (1) SELECT 1 T")
	if got := bystander.ParameterStatus("default_transaction_read_only"); got != "off" {
		t.Errorf("when the quorum is back, default_transaction_read_only = %q", got)
	}
	expect(t, bystander, "INSERT INTO t VALUES (5); COMMIT", "INSERT 0 1 COMMIT I")
	found, err := pgconn.ConnectConfig(timeout(t), config)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, found, "SELECT count(*) FROM t", "(1) SELECT 1 I")
	_ = found.Close(context.Background())
}

// testCutOff: nothing is read any more, but what was begun can be ended.
func testCutOff(t *testing.T, f *fixture) {
	for _, x := range []struct {
		what   string
		before string
		m      []pgproto3.FrontendMessage
	}{
		{"simple", "SELECT 1", join(query("SELECT 1"))},
		{"several", "SELECT 1", join(query("SELECT 1; SELECT 2"))},
		{"pieces", "SELECT 1", join(query("SELECT 1; BEGIN; SELECT 2"))},
		{"write", "SELECT 1", join(query("INSERT INTO t VALUES (1)"))},
		{"in a block", "BEGIN; INSERT INTO t VALUES (1)", join(query("SELECT 1"))},
		{"cursor", "BEGIN; DECLARE c CURSOR FOR SELECT generate_series(1, 9); FETCH c", join(query("FETCH c"))},
		{"extended", "SELECT 1", join(all("SELECT 1"), syncMessage)},
		{"flushed", "SELECT 1", join(all("SELECT 1"), flush)},
		{"extended in a block", "BEGIN; SELECT 1", join(all("SELECT 1"), syncMessage)},
	} {
		w := f.wire(t, nil)
		w.send(query(x.before))
		w.until(1)
		f.set(t, NoAccess)
		w.send(x.m...)
		var said []string
		for {
			m, err := w.f.Receive()
			if err != nil {
				break
			}
			if e, ok := m.(*pgproto3.ErrorResponse); ok && e.Severity == "FATAL" && e.Hint != "" {
				said = append(said, e.Code)
			} else if s := render(m); s != "1" && s != "2" && s != "T" { // of what is parsed in a block
				said = append(said, s)
			}
		}
		if got := strings.Join(said, " "); got != "57P03" {
			t.Errorf("%s: %s", x.what, got)
		}
		f.access.Store(uint32(ReadWrite))
	}
	read, wrote := f.connect(t), f.connect(t)
	expect(t, read, "BEGIN; SELECT 1", "BEGIN (1) SELECT 1 T")
	expect(t, wrote, "BEGIN; INSERT INTO t VALUES (1)", "BEGIN INSERT 0 1 T")
	f.set(t, NoAccess)
	expect(t, read, "COMMIT", "COMMIT I")
	expect(t, wrote, "COMMIT", "!25006 I")
	f.access.Store(uint32(ReadWrite))
	expect(t, wrote, "SELECT count(*) FROM t", "(0) SELECT 1 I")
}
