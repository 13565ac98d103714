package sim

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/quorate/quorate/txn"
)

// serve speaks the wire protocol for one connection. It understands the statements that a node sends; another one is
// an error of the simulation, and fails the run.
func (s *session) serve() {
	defer s.end()
	b := pgproto3.NewBackend(s.conn, s.conn)
	if _, err := b.ReceiveStartupMessage(); err != nil {
		return
	}
	b.Send(&pgproto3.AuthenticationOk{})
	b.Send(&pgproto3.BackendKeyData{ProcessID: s.pid, SecretKey: []byte{0, 0, 0, 0}})
	b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
	if b.Flush() != nil {
		return
	}
	prepared := map[string]string{}
	var query string
	var params []string
	skipping, committed := false, false
	for {
		message, err := b.Receive()
		if err != nil {
			return
		}
		switch m := message.(type) {
		case *pgproto3.Parse:
			if !skipping {
				prepared[m.Name] = m.Query
				b.Send(&pgproto3.ParseComplete{})
			}
		case *pgproto3.Bind:
			if !skipping {
				query, params = prepared[m.PreparedStatement], []string{}
				for _, p := range m.Parameters {
					params = append(params, string(p))
				}
				b.Send(&pgproto3.BindComplete{})
			}
		case *pgproto3.Describe:
			if !skipping {
				b.Send(description)
			}
		case *pgproto3.Execute:
			if !skipping {
				skipping = s.answer(b, query, params) != nil
				committed = query == "COMMIT" && !skipping
			}
		case *pgproto3.Sync:
			skipping = false
			s.pause(200 * time.Microsecond)
			b.Send(&pgproto3.ReadyForQuery{TxStatus: s.state()})
			if s.state() == 'T' && s.progressed() {
				s.db.run.reach(s.db.node, "a worker holds its COMMIT")
			}
			if b.Flush() != nil {
				return
			}
			if committed {
				committed = false
				s.db.run.reach(s.db.node, "a worker's COMMIT is answered")
			}
		case *pgproto3.Query:
			s.pause(200 * time.Microsecond)
			for statement := range strings.SplitSeq(m.String, ";") {
				if statement = strings.TrimSpace(statement); statement != "" && s.answer(b, statement, nil) != nil {
					break
				}
			}
			b.Send(&pgproto3.ReadyForQuery{TxStatus: s.state()})
			if b.Flush() != nil {
				return
			}
			if m.String == "COMMIT" {
				s.db.run.reach(s.db.node, "a worker's COMMIT is answered")
			}
		case *pgproto3.Close, *pgproto3.Flush:
		default: // Terminate
			return
		}
	}
}

// description is that of any result: nobody looks at more than that there is one.
var description = &pgproto3.RowDescription{Fields: []pgproto3.FieldDescription{{Name: []byte("column")}}}

func (s *session) state() byte {
	s.db.mu.Lock()
	defer s.db.mu.Unlock()
	if s.open {
		return 'T'
	}
	return 'I'
}

func (s *session) progressed() bool {
	s.db.mu.Lock()
	defer s.db.mu.Unlock()
	return s.progress > 0
}

func (s *session) answer(b *pgproto3.Backend, sql string, params []string) error {
	rows, tag, err := s.execute(sql, params)
	var refused *pgconn.PgError
	switch {
	case errors.As(err, &refused):
		b.Send(&pgproto3.ErrorResponse{Severity: refused.Severity, SeverityUnlocalized: refused.SeverityUnlocalized, Code: refused.Code, Message: refused.Message})
	case err == nil:
		if params == nil && len(rows) > 0 { // the simple protocol
			b.Send(description)
		}
		for _, row := range rows {
			var values [][]byte
			for _, v := range row {
				values = append(values, []byte(v))
			}
			b.Send(&pgproto3.DataRow{Values: values})
		}
		b.Send(&pgproto3.CommandComplete{CommandTag: []byte(tag)})
	}
	return err
}

var (
	updateSQL = regexp.MustCompile(`^UPDATE ONLY "public"\."t" SET "v" = \$1 WHERE "id" OPERATOR\(pg_catalog\.=\) \$2$`)
	mergeSQL  = regexp.MustCompile(`^MERGE INTO ONLY "public"\."t" AS updated USING \(SELECT\) AS one ON "id" OPERATOR\(pg_catalog\.=\) \$2 WHEN MATCHED THEN UPDATE SET "v" = \$1 WHEN NOT MATCHED AND quorate\.no_such_row\(\) THEN INSERT \("id", "v"\) OVERRIDING SYSTEM VALUE VALUES \(NULL, NULL\)$`)
	insertSQL = regexp.MustCompile(`^INSERT INTO "public"\."t" \("id", "v"\) OVERRIDING SYSTEM VALUE VALUES \(\$1, \$2\)(, \(\$\d+, \$\d+\))*$`)
	nameSQL   = regexp.MustCompile(`^SET application_name = '(.*)'$`)
)

// install is what stands for pg.Install: its commit is synchronous.
const install = "INSTALL"

func (s *session) execute(sql string, params []string) (rows [][]string, tag string, err error) {
	d := s.db
	one := func(values ...string) ([][]string, string, error) { return [][]string{values}, "SELECT 1", nil }
	switch {
	case updateSQL.MatchString(sql):
		_, n, err := s.update(params[1], params[0], false)
		return nil, fmt.Sprintf("UPDATE %d", n), err
	case mergeSQL.MatchString(sql):
		_, n, err := s.update(params[1], params[0], false)
		if err == nil && n == 0 {
			err = failure("QR001", "a row to be changed is not there")
		}
		return nil, fmt.Sprintf("MERGE %d", n), err
	case insertSQL.MatchString(sql):
		for row := range slices.Chunk(params, 2) {
			if err := s.insert(row[0], row[1]); err != nil { // the transaction has failed, and with it the rows before
				return nil, "", err
			}
		}
		return nil, fmt.Sprintf("INSERT 0 %d", len(params)/2), nil
	case sql == "BEGIN":
		d.run.reach(d.node, "a worker begins")
		return nil, "BEGIN", s.begin()
	case sql == "COMMIT":
		d.run.reach(d.node, "a worker's COMMIT arrives")
		if err := s.commit(false); err != nil {
			return nil, "", err
		}
		d.run.reach(d.node, "a worker has committed")
		return nil, "COMMIT", nil
	case sql == "ROLLBACK":
		s.abort()
		return nil, "ROLLBACK", nil
	case sql == install:
		s.mark()
		return nil, "COMMIT", nil
	case strings.HasPrefix(sql, "INSERT INTO quorate.applied_"):
		return s.insertProgress(txn.CSN(atoi[uint64](params[0])))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if s.gone {
		return nil, "", errGone
	}
	switch {
	case strings.HasPrefix(sql, "SET application_name"):
		s.app = nameSQL.FindStringSubmatch(sql)[1]
		return nil, "SET", nil
	case strings.HasPrefix(sql, "SET synchronous_commit = "):
		s.sync = strings.HasSuffix(sql, "on")
		return nil, "SET", nil
	case strings.HasPrefix(sql, "SET "), sql == "DEALLOCATE ALL", strings.HasPrefix(sql, "-- ping"):
		return nil, "SET", nil
	case strings.HasPrefix(sql, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity\nWHERE application_name LIKE"):
		return d.terminate(func(other *session) bool { return other != s && like(other.app, params[0]) })
	case strings.HasPrefix(sql, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity\nWHERE pid ="):
		return d.terminate(func(other *session) bool {
			return other.pid == atoi[uint32](params[0]) && other.xid == atoi[uint64](params[1])
		})
	case strings.HasPrefix(sql, "SELECT count(pg_terminate_backend(pid, 1000))"):
		killed, _, _ := d.terminate(func(other *session) bool { return other != s })
		return one(strconv.Itoa(len(killed)))
	case strings.HasPrefix(sql, "SELECT to_regclass('quorate.applied_even')"):
		return one("t")
	case strings.HasPrefix(sql, "SELECT pid || ' ' || backend_start"):
		return one(d.identity())
	case strings.HasPrefix(sql, "SELECT (SELECT coalesce(max(csn), 0)"):
		return one(strconv.FormatUint(uint64(d.lastProgress()), 10))
	case strings.HasPrefix(sql, "SELECT pg_catalog.pg_replication_origin_"):
		return nil, "SELECT 1", nil
	case strings.HasPrefix(sql, "SELECT coalesce(pg_xact_status"):
		return one(d.status(atoi[uint64](params[0])))
	case strings.HasPrefix(sql, "SELECT DISTINCT w.pid, b.pid"):
		for pid := range strings.SplitSeq(strings.Trim(params[0], "{}"), ",") {
			for _, by := range d.blocking(atoi[uint32](pid)) {
				rows = append(rows, []string{pid, strconv.Itoa(int(by))})
			}
		}
		return rows, "SELECT 1", nil
	case strings.HasPrefix(sql, "SELECT n.nspname, c.relname, l.locktype"): // where a worker waits: for those who look
		return nil, "SELECT 0", nil
	case strings.HasPrefix(sql, "SELECT pg_cancel_backend"), strings.HasPrefix(sql, "SELECT pg_terminate_backend($1"):
		if other := d.sessions[atoi[uint32](params[0])]; other != nil && strings.Contains(sql, "cancel") {
			other.cancelled = other.waits != ""
			d.changed.Broadcast()
		} else if other != nil {
			d.kill(other)
		}
		return one("t")
	case strings.HasPrefix(sql, "SELECT c.relkind"):
		return [][]string{{"r", "id", "f", "t", "text", "f", "OPERATOR(pg_catalog.=)", "1"}, {"r", "v", "f", "t", "text", "f", "", "1"}}, "SELECT 2", nil
	}
	d.run.fail("the fake server does not know %q", sql)
	return nil, "", failure("42601", "unknown statement")
}

// insertProgress is part of a transaction, or one by itself.
func (s *session) insertProgress(csn txn.CSN) ([][]string, string, error) {
	s.db.mu.Lock()
	s.assignXID()
	s.progress = csn
	alone := !s.open
	s.db.mu.Unlock()
	if !alone {
		return nil, "INSERT 0 1", nil
	}
	s.db.run.reach(s.db.node, "before a flush")
	err := s.commit(false)
	s.db.run.reach(s.db.node, "after a flush")
	return nil, "INSERT 0 1", err
}

func (d *database) terminate(which func(*session) bool) (rows [][]string, tag string, err error) {
	var pids []uint32
	for pid, s := range d.sessions {
		if which(s) {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	for _, pid := range pids {
		d.kill(d.sessions[pid])
		rows = append(rows, []string{"t"})
	}
	return rows, "SELECT " + strconv.Itoa(len(rows)), nil
}

// like knows patterns that end with %.
func like(s, pattern string) bool {
	pattern = strings.ReplaceAll(pattern, `\_`, "_")
	if prefix, ok := strings.CutSuffix(pattern, "%"); ok {
		return strings.HasPrefix(s, prefix)
	}
	return s == pattern
}
