package pgserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// Settings are server settings by name, values as in postgresql.conf without quotes.
type Settings map[string]string

// Sizing is what the number of connections and replication origins follows from, and the WAL that slots keep.
type Sizing struct {
	Clients int   // sessions of clients through the gateway
	Workers int   // apply workers, one session and one replication origin each
	SlotWAL int64 // bytes that a slot may keep until it is invalidated; 0: PostgreSQL's default, which is no bound
}

// ownSessions is what a node needs beside clients and workers: publisher, capture, catalog, watchdogs, and a few for
// an operator who looks for what is wrong.
const ownSessions = 24

func (z Sizing) connections() int { return z.Clients + z.Workers + ownSessions }

// origins leaves room for those of an earlier, larger configuration: an origin with progress takes a place for ever.
func (z Sizing) origins() int { return 2*z.Workers + 16 }

const slotsNeeded = 8 // capture, a clone in progress, an operator's

// rule is what a node demands of a setting, and why; the one table serves managed and attached servers.
type rule struct {
	name     string
	since    int    // first major version that has it; 0: all
	value    string // what a managed server gets, and what ALTER SYSTEM is advised to set
	atLeast  int    // the check, if not equality with value
	why      string
	optional bool // given to managed servers, not demanded of attached ones
}

func rules(z Sizing) []rule {
	slotWAL := "-1"
	if z.SlotWAL > 0 {
		slotWAL = strconv.FormatInt(z.SlotWAL>>20, 10) + "MB"
	}
	atLeast := func(name string, since, n int, why string) rule {
		return rule{name: name, since: since, value: strconv.Itoa(n), atLeast: n, why: why}
	}
	return []rule{
		{name: "wal_level", value: "logical", why: "changes are captured by logical decoding"},
		{name: "fsync", value: "on", why: "an acknowledged commit must survive a power failure"},
		{name: "full_page_writes", value: "on", why: "an acknowledged commit must survive a power failure"},
		{name: "default_transaction_isolation", value: "repeatable read", why: "snapshot isolation is what the cluster guarantees"},
		{name: "default_transaction_read_only", value: "on", why: "writes that bypass the gateway would not be replicated"},
		{name: "track_counts", value: "on", why: "what is not replicated is found by the server's counts of changed rows"},
		atLeast("max_connections", 0, z.connections(), "clients, apply workers and the node's own sessions"),
		atLeast("max_wal_senders", 0, slotsNeeded, "capture, and clones of new nodes"),
		// Until 17 this one bounds the replication origins as well.
		atLeast("max_replication_slots", 0, max(slotsNeeded, z.origins()), "capture's slot, and before PostgreSQL 18 an origin for each apply worker"),
		atLeast("max_active_replication_origins", 18, z.origins(), "an origin for each apply worker"),
		{name: "idle_replication_slot_timeout", since: 18, value: "0", why: "an invalidated slot interrupts capture, and hides commits that bypassed the gateway"},
		{name: "max_slot_wal_keep_size", value: slotWAL, optional: true},
		{name: "wal_sender_timeout", value: "60s", optional: true},
		{name: "logical_decoding_work_mem", value: "64MB", optional: true},
		{name: "max_logical_replication_workers", value: "0", optional: true}, // a subscription would write past the gateway
		{name: "shared_buffers", value: "128MB", optional: true},
		{name: "max_wal_size", value: "2GB", optional: true},
		{name: "track_commit_timestamp", value: "off", optional: true},
		{name: "summarize_wal", value: "off", optional: true},
	}
}

// NodeSettings returns what a managed server of a node runs with, apart from its addresses.
func NodeSettings(v Version, z Sizing) Settings {
	s := Settings{}
	for _, r := range rules(z) {
		if v.Major >= r.since {
			s[r.name] = r.value
		}
	}
	return s
}

// settingsFile is included at the end of postgresql.conf, so that it wins over what stands there; ALTER SYSTEM still
// wins over it.
const settingsFile = "quorate.conf"

// writeSettings brings quorate.conf up to date and returns a fingerprint of it in the form of a setting. The server is
// started with that on its command line, which it writes to postmaster.opts: so a sidecar that finds a server running
// knows whether it runs with these settings.
func (s *Server) writeSettings() (fingerprint string, err error) {
	name := filepath.Join(s.cfg.DataDir, settingsFile)
	all := maps.Clone(s.cfg.Settings)
	if all == nil {
		all = Settings{}
	}
	all["listen_addresses"] = s.cfg.Host
	all["port"] = strconv.Itoa(s.cfg.Port)
	all["unix_socket_directories"] = `"` + s.cfg.SocketDir + `"` // a list: quoted, a comma in it is no separator
	text := "# Written by quorate at every start: edit its configuration instead.\n" + all.render()
	if old, err := os.ReadFile(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("write settings: %w", err)
	} else if string(old) != text {
		if err := s.writeOwned(name, text); err != nil {
			return "", fmt.Errorf("write settings: %w", err)
		}
	}
	if err := s.includeSettings(); err != nil {
		return "", fmt.Errorf("include settings: %w", err)
	}
	return fmt.Sprintf("quorate.settings=%016x", hash(text)), nil
}

func (s *Server) includeSettings() error {
	name := filepath.Join(s.cfg.DataDir, "postgresql.conf")
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	line := []byte("include '" + settingsFile + "'\n")
	if bytes.HasSuffix(append([]byte("\n"), text...), append([]byte("\n"), line...)) { // as a line of its own
		return nil
	}
	if len(text) > 0 && text[len(text)-1] != '\n' {
		text = append(text, '\n')
	}
	return s.writeOwned(name, string(append(text, line...)))
}

// writeOwned replaces a file of the server's account in one step.
func (s *Server) writeOwned(name, text string) error {
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // there only when something below failed
	_, err = f.WriteString(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := s.cfg.Account.Own(f.Name()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

func (s Settings) render() string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(s)) {
		fmt.Fprintf(&b, "%s = %s\n", name, quoteSetting(s[name]))
	}
	return b.String()
}

func quoteSetting(v string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `''`, "\n", `\n`).Replace(v) + "'"
}

// Problem is one setting of an attached server that will not do.
type Problem struct {
	Setting string
	Have    string
	Want    string
	Why     string
	Fix     string // the command that mends it
	Restart bool   // whether it takes effect at a restart only
}

// SettingsError lists every wrong setting, so that a server has to be restarted once.
type SettingsError struct{ Problems []Problem }

// Error returns one line for each setting.
func (e *SettingsError) Error() string {
	var b strings.Builder
	restart := false
	fmt.Fprintf(&b, "PostgreSQL has %d settings that will not do:", len(e.Problems))
	for _, p := range e.Problems {
		fmt.Fprintf(&b, "\n  %s is %q, must be %s (%s): %s", p.Setting, p.Have, p.Want, p.Why, p.Fix)
		restart = restart || p.Restart
	}
	if restart {
		b.WriteString("\nthen restart PostgreSQL")
	} else {
		b.WriteString("\nthen SELECT pg_reload_conf();")
	}
	return b.String()
}

// effectiveSettings lists what a new session gets that asks for nothing. That is reset_val, defaults of role and database
// included, except where this session asked for something when it connected, as a node's own sessions do for
// default_transaction_read_only: then the defaults have to be looked up in the order in which the server does.
const effectiveSettings = `
SELECT s.name, CASE WHEN s.source <> 'client' THEN s.reset_val
	WHEN s.vartype = 'bool' THEN CASE WHEN d.value::boolean THEN 'on' ELSE 'off' END
	ELSE d.value END, s.context, s.pending_restart
FROM pg_catalog.pg_settings s, LATERAL (SELECT COALESCE(
	(SELECT pg_catalog.substr(c, pg_catalog.length(s.name) + 2)
		FROM pg_catalog.pg_db_role_setting r, pg_catalog.unnest(r.setconfig) c
		WHERE s.source = 'client' AND pg_catalog.starts_with(c, s.name || '=')
		AND r.setdatabase IN (0, (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()))
		AND r.setrole IN (0, (SELECT oid FROM pg_catalog.pg_roles WHERE rolname = session_user))
		ORDER BY r.setrole = 0, r.setdatabase = 0 LIMIT 1),
	(SELECT f.setting FROM pg_catalog.pg_file_settings f
		WHERE s.source = 'client' AND f.name = s.name AND f.error IS NULL ORDER BY f.seqno DESC LIMIT 1),
	s.boot_val)) AS d (value)
UNION ALL SELECT 'server_version_num', pg_catalog.current_setting('server_version_num'), '', false`

// CheckSettings judges the server at the other end of conn, an attached one or a managed one whose operator used ALTER
// SYSTEM. The error is a *SettingsError if the server answered and will not do.
func CheckSettings(ctx context.Context, conn *pgconn.PgConn, z Sizing) error {
	results, err := conn.Exec(ctx, effectiveSettings).ReadAll()
	if err != nil {
		return fmt.Errorf("read settings: %w", err)
	}
	type setting struct {
		value            string
		restart, pending bool
	}
	have := map[string]setting{}
	for _, row := range results[0].Rows {
		have[string(row[0])] = setting{value: string(row[1]), restart: string(row[2]) == "postmaster", pending: string(row[3]) == "t"}
	}
	num, err := strconv.Atoi(have["server_version_num"].value)
	if err != nil {
		return fmt.Errorf("read server version: %w", err)
	}
	v := FromNum(num)
	if v.Major < MinMajor {
		return &SettingsError{[]Problem{{Setting: "server_version", Have: v.String(), Want: fmt.Sprintf("at least %d", MinMajor),
			Why: "flushed logical messages", Fix: "upgrade the server", Restart: true}}}
	}
	var problems []Problem
	for _, r := range rules(z) {
		if r.optional || v.Major < r.since {
			continue
		}
		h := have[r.name]
		want := fmt.Sprintf("%q", r.value)
		ok := h.value == r.value
		if r.atLeast > 0 {
			n, err := strconv.Atoi(h.value)
			want, ok = "at least "+r.value, err == nil && n >= r.atLeast
		}
		if ok {
			continue
		}
		fix := fmt.Sprintf("ALTER SYSTEM SET %s = '%s';", r.name, r.value)
		if h.pending {
			fix = "changed already, takes effect at the next restart"
		}
		problems = append(problems, Problem{Setting: r.name, Have: h.value, Want: want, Why: r.why, Fix: fix, Restart: h.restart})
	}
	if len(problems) > 0 {
		return &SettingsError{problems}
	}
	return nil
}
