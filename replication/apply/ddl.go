package apply

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/quorate/quorate/replication/pg"
	"github.com/quorate/quorate/txn"
)

// logical replays DDL; other logical messages are not for us.
func (s *session) logical(csn txn.CSN, message []byte) error {
	prefix, content, err := parseLogical(message)
	if err != nil || prefix != pg.PrefixDDL {
		return err
	}
	var m pg.DDL
	if err := json.Unmarshal(content, &m); err != nil {
		return fmt.Errorf("read DDL: %w: %w", txn.ErrCorrupt, err)
	}
	if err := s.finish(); err != nil {
		return err
	}
	if err := s.ddl(m); err != nil {
		return asDDL(csn, m.Tag, err)
	}
	s.forgetPlans() // tables may look different now
	return s.simple("DEALLOCATE ALL")
}

func asDDL(csn txn.CSN, tag string, err error) error {
	if isConnection(err) {
		return err
	}
	return &Divergence{CSN: csn, Operation: tag, Cause: err}
}

// ddl executes a statement as the role and under the settings that it had at the origin, and makes the session what
// it was.
func (s *session) ddl(m pg.DDL) error {
	settings := maps.Clone(m.Settings)
	if settings == nil {
		settings = map[string]string{}
	}
	settings["search_path"] = m.SearchPath
	names := slices.Sorted(maps.Keys(settings))
	before := map[string]string{}
	for _, name := range names {
		rows, err := s.query("SELECT current_setting($1), set_config($1, $2, true)", name, settings[name])
		if err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
		before[name] = rows[0][0]
	}
	if m.Role != "" {
		if _, err := s.query("SELECT pg_catalog.set_config('role', $1, true)", m.Role); err != nil {
			return fmt.Errorf("set role: %w", err)
		}
	}
	if err := s.simple(m.SQL); err != nil {
		return err
	}
	if err := s.simple("SET LOCAL role = none"); err != nil {
		return fmt.Errorf("reset role: %w", err)
	}
	for _, name := range names {
		if _, err := s.query("SELECT pg_catalog.set_config($1, $2, true)", name, before[name]); err != nil {
			return fmt.Errorf("reset %s: %w", name, err)
		}
	}
	if _, err := s.query("SELECT quorate.own_sequences()"); err != nil {
		return fmt.Errorf("own sequences: %w", err)
	}
	return nil
}

// truncate empties all tables of the message together, as foreign keys among them demand.
func (s *session) truncate(csn txn.CSN, message []byte) error {
	m, err := parseTruncate(message)
	if err != nil {
		return err
	}
	tables := make([]string, 0, len(m.relations))
	for _, oid := range m.relations {
		r, err := s.find(oid)
		if err != nil {
			return err
		}
		if r.partitioned { // ONLY is refused; its partitions are listed as well
			tables = append(tables, r.quoted())
		} else {
			tables = append(tables, "ONLY "+r.quoted())
		}
	}
	sql := "TRUNCATE " + strings.Join(tables, ", ")
	if m.restartIdentity {
		sql += " RESTART IDENTITY"
	}
	if err := s.simple(sql); err != nil {
		return asDDL(csn, "TRUNCATE", err)
	}
	return nil
}
