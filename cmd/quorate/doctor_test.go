package main

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/quorate/quorate/internal/config"
	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/internal/pgserver/pgtest"
)

// doctor runs "quorate doctor" and returns its findings.
func doctor(t *testing.T, file string, wantCode int) []finding {
	t.Helper()
	code, stdout, stderr := do(t, "doctor", "--config", file, "-o", "json")
	var found []finding
	if err := json.Unmarshal([]byte(stdout), &found); err != nil {
		t.Fatalf("%v: %s%s", err, stdout, stderr)
	}
	if code != wantCode {
		t.Errorf("exit code %d, want %d: %s%s", code, wantCode, stdout, stderr)
	}
	return found
}

func expect(t *testing.T, found []finding, check, level, what, fix string) {
	t.Helper()
	for _, f := range found {
		if f.Check == check && f.Level == level && strings.Contains(f.What, what) && strings.Contains(f.Fix, fix) {
			return
		}
	}
	t.Errorf("no %s of %s that says %q and %q: %+v", level, check, what, fix, found)
}

// TestDoctor: what a node needs is checked before it runs: of an empty directory, of a server that somebody runs and
// wants adopted, and of one that the node is to be attached to; and everything that is wrong comes with what mends it.
func TestDoctor(t *testing.T) {
	dir := pgtest.Dir(t, false)
	file := nodeConfig(t, dir)
	before, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	found := doctor(t, file, exitOK)
	for check, what := range map[string]string{
		"data directory": "no node's yet", "programs": "PostgreSQL 18", "ports": "5 addresses", "database": "will be made", "certificates": "loopback",
	} {
		expect(t, found, check, "ok", what, "")
	}
	if after, err := os.ReadDir(dir); err != nil || len(after) != len(before) {
		t.Errorf("it has changed something: %v, %v", after, err)
	}
	code, stdout, _ := do(t, "doctor", "--config", file)
	if code != exitOK || !strings.Contains(stdout, "ok       programs: PostgreSQL 18") {
		t.Errorf("exit code %d, says\n%s", code, stdout)
	}

	c, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	taken, err := net.Listen("tcp", c.Listen.HTTP)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, doctor(t, file, exitFailure), "ports", "error", "listen.http", "ss -ltnp")
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(filepath.Join(dir, "identity"), []byte("cluster: other\nnode: 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	expect(t, doctor(t, file, exitFailure), "data directory", "error", `belongs to cluster "other"`, "correct")
	if err := os.Remove(filepath.Join(dir, "identity")); err != nil {
		t.Fatal(err)
	}
	expect(t, doctor(t, nodeConfig(t, dir, "bin_dir: =>bin_dir: /nowhere"), exitFailure), "programs", "error", "/nowhere", "bin_dir")
}

// TestDoctorOfServer looks into servers that run.
func TestDoctorOfServer(t *testing.T) {
	server := pgtest.Start(t, pgtest.Options{Tmpfs: true, Sizing: pgserver.Sizing{Clients: 100, Workers: 8},
		Settings: map[string]string{"fsync": "on", "wal_level": "replica", "default_transaction_isolation": "read committed"}})
	conn := pgtest.Connect(t, server, "postgres")
	for _, sql := range []string{"CREATE TABLE no_key (id int)", "CREATE SEQUENCE small MAXVALUE 9"} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	s := server.Config()
	adopted := nodeConfig(t, pgtest.Dir(t, false), "postgres: {=>postgres: {data_dir: "+s.DataDir+", ")
	found := doctor(t, adopted, exitFailure)
	expect(t, found, "database", "ok", "PostgreSQL 18", "")
	expect(t, found, "settings", "warning", "wal_level", "")
	expect(t, found, "replica identity", "warning", "no_key", "ALTER TABLE no_key ADD PRIMARY KEY")
	expect(t, found, "sequences", "error", "small", "ALTER SEQUENCE small NO MAXVALUE")
	expect(t, found, "replication", "ok", "", "")

	attached := nodeConfig(t, pgtest.Dir(t, false), "managed: true=>managed: false, host: 127.0.0.1", "auth: trust, =>", "bin_dir: "+s.Install.BinDir+"=>superuser: postgres")
	text, err := os.ReadFile(attached)
	if err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(attached)
	if err != nil {
		t.Fatal(err)
	}
	text = []byte(strings.Replace(string(text), "port: "+strconv.Itoa(c.Postgres.Port), "port: "+strconv.Itoa(s.Port), 1))
	if err := os.WriteFile(attached, text, 0o644); err != nil {
		t.Fatal(err)
	}
	found = doctor(t, attached, exitFailure)
	expect(t, found, "settings", "error", `wal_level is "replica"`, "ALTER SYSTEM SET wal_level = 'logical'; -- then restart PostgreSQL")
	expect(t, found, "settings", "error", "default_transaction_isolation", "pg_reload_conf")

	for _, sql := range []string{"ALTER TABLE no_key ADD PRIMARY KEY (id)", "ALTER SEQUENCE small NO MAXVALUE", "ALTER SYSTEM SET wal_level = 'logical'",
		"ALTER SYSTEM SET default_transaction_isolation = 'repeatable read'"} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{adopted, attached} {
		for _, f := range doctor(t, file, exitOK) {
			if f.Level == "error" || f.Check == "replica identity" || f.Check == "sequences" {
				t.Errorf("after mending: %+v", f)
			}
		}
	}
}
