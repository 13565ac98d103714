package pg

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
)

// TestSurvey: each kind of trouble is found where there is one, and what is said to mend it does.
func TestSurvey(t *testing.T) {
	server := pgtest.Start(t, pgtest.Options{Tmpfs: true, Settings: map[string]string{"max_prepared_transactions": "5"}})
	conn := pgtest.Connect(t, server, "postgres")
	survey := func(conn *pgx.Conn) map[string][]Trouble {
		t.Helper()
		troubles, err := Survey(t.Context(), conn.PgConn(), 16)
		if err != nil {
			t.Fatal(err)
		}
		found := map[string][]Trouble{}
		for _, x := range troubles {
			found[x.Check] = append(found[x.Check], x)
		}
		return found
	}
	if found := survey(conn); len(found) > 0 {
		t.Errorf("an empty server has troubles: %v", found)
	}
	for _, sql := range []string{
		`CREATE TABLE fine (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY)`,
		`CREATE TABLE "No Key" (id int)`, `CREATE TABLE whole (id int)`, `ALTER TABLE whole REPLICA IDENTITY FULL`,
		`CREATE TABLE late (id int PRIMARY KEY DEFERRABLE)`,
		`CREATE UNLOGGED TABLE cache (id int PRIMARY KEY)`,
		`SELECT lo_create(0)`,
		`CREATE SEQUENCE small MAXVALUE 10`, `CREATE SEQUENCE down INCREMENT -1 MINVALUE -5 MAXVALUE 10`, `CREATE SEQUENCE around CYCLE`,
		`CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'`,
		`CREATE TRIGGER always AFTER INSERT ON fine FOR EACH ROW EXECUTE FUNCTION f()`, `ALTER TABLE fine ENABLE ALWAYS TRIGGER always`,
		`CREATE TRIGGER usual AFTER INSERT ON fine FOR EACH ROW EXECUTE FUNCTION f()`,
		`CREATE RULE r AS ON UPDATE TO fine DO ALSO NOTIFY x`, `ALTER TABLE fine ENABLE REPLICA RULE r`,
		`CREATE DATABASE more`,
		`CREATE SCHEMA quorate`,
		`BEGIN; CREATE TABLE prepared (id int PRIMARY KEY); PREPARE TRANSACTION 'it''s'`,
	} {
		run(t, conn, sql)
	}
	found := survey(conn)
	for check, want := range map[string][]string{
		"replica identity": {`"No Key"`, "late"}, "unlogged tables": {"cache"}, "large objects": {"1 large objects"}, "sequences": {"down", "small"},
		"cycling sequences": {"around"}, "triggers": {"always"}, "rules": {" r on fine"}, "other databases": {"more"}, "other schema quorate": {"not Quorate's"},
		"prepared transactions": {"it''s"},
	} {
		got := found[check]
		if len(got) != len(want) {
			t.Errorf("%s: %+v, want %q", check, got, want)
			continue
		}
		for i, w := range want {
			if !strings.Contains(got[i].What, w) {
				t.Errorf("%s: %+v, want %q", check, got, want)
			}
		}
		delete(found, check)
	}
	if len(found) > 0 {
		t.Errorf("and also %+v", found)
	}
	for _, check := range []string{"unlogged tables", "triggers", "rules", "cycling sequences", "other schema quorate", "prepared transactions"} {
		for _, x := range survey(conn)[check] {
			run(t, conn, x.Fix)
		}
		if left := survey(conn)[check]; len(left) > 0 {
			t.Errorf("%s: still there after its fix: %+v", check, left)
		}
	}
}
