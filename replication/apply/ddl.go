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
	if m.SQL == "" { // it only named tables
		return nil
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
	sql := m.SQL
	if m.Tag == "CREATE TABLE AS" {
		sql = withNoData(sql) // the rows follow as changes of their own
	}
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
	if err := s.simple(sql); err != nil {
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

// withNoData makes a CREATE TABLE … AS create the table only.
func withNoData(sql string) string {
	tokens := lex(sql)
	for len(tokens) > 0 && tokens[len(tokens)-1].is(sql, ";") {
		tokens = tokens[:len(tokens)-1]
	}
	n := len(tokens)
	switch {
	case n >= 3 && tokens[n-1].is(sql, "DATA") && tokens[n-2].is(sql, "NO") && tokens[n-3].is(sql, "WITH"):
		return sql
	case n >= 2 && tokens[n-1].is(sql, "DATA") && tokens[n-2].is(sql, "WITH"):
		return sql[:tokens[n-1].start] + "NO DATA"
	case n == 0:
		return sql
	}
	return sql[:tokens[n-1].end] + " WITH NO DATA"
}

// token is a word, number, quoted thing or single other character of SQL text, sql[start:end]; comments are none.
type token struct{ start, end int }

// is reports whether a token is that keyword or character.
func (t token) is(sql, word string) bool { return strings.EqualFold(sql[t.start:t.end], word) }

// lex cuts SQL text into tokens by PostgreSQL's rules, with standard_conforming_strings on.
func lex(sql string) []token {
	var tokens []token
	for i := 0; i < len(sql); {
		start := i
		switch c := sql[i]; {
		case c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f' || c == '\v':
			i++
			continue
		case strings.HasPrefix(sql[i:], "--"):
			i = endOf(sql, i, "\n")
			continue
		case strings.HasPrefix(sql[i:], "/*"):
			i = endOfComment(sql, i)
			continue
		case (c == 'e' || c == 'E') && i+1 < len(sql) && sql[i+1] == '\'':
			i = endOfString(sql, i+2, true)
		case c == '\'':
			i = endOfString(sql, i+1, false)
		case c == '"':
			i = endOf(sql, i+1, `"`) // "" within is two adjacent tokens, which is all the same here
		case c == '$' && dollarTag(sql[i:]) != "":
			tag := dollarTag(sql[i:])
			i = endOf(sql, i+len(tag), tag)
		case isWordByte(c):
			for i < len(sql) && (isWordByte(sql[i]) || sql[i] == '$') {
				i++
			}
		default:
			i++
		}
		tokens = append(tokens, token{start, i})
	}
	return tokens
}

func isWordByte(c byte) bool {
	return c == '_' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= 0x80
}

// endOf returns the place after the next end at or after i, or that of the text.
func endOf(sql string, i int, end string) int {
	if n := strings.Index(sql[i:], end); n >= 0 {
		return i + n + len(end)
	}
	return len(sql)
}

func endOfComment(sql string, i int) int {
	depth := 0
	for i < len(sql) {
		switch {
		case strings.HasPrefix(sql[i:], "/*"):
			depth++
			i += 2
		case strings.HasPrefix(sql[i:], "*/"):
			depth--
			i += 2
			if depth == 0 {
				return i
			}
		default:
			i++
		}
	}
	return i
}

func endOfString(sql string, i int, escapes bool) int {
	for ; i < len(sql); i++ {
		switch {
		case escapes && sql[i] == '\\':
			i++
		case sql[i] == '\'' && i+1 < len(sql) && sql[i+1] == '\'':
			i++
		case sql[i] == '\'':
			return i + 1
		}
	}
	return len(sql)
}

// dollarTag returns the opening quote $tag$ at the beginning of sql, or "".
func dollarTag(sql string) string {
	for i := 1; i < len(sql); i++ {
		switch {
		case sql[i] == '$':
			return sql[:i+1]
		case !isWordByte(sql[i]) || i == 1 && sql[i] >= '0' && sql[i] <= '9':
			return ""
		}
	}
	return ""
}
