package gateway

import (
	"context"
	"encoding/binary"
	"strings"
	"time"

	"github.com/quorate/quorate/gateway/sqllex"
	"github.com/quorate/quorate/txn"
)

// What quorate.transaction_status says.
const (
	StatusCommitted = "committed"
	StatusAborted   = "aborted"
	StatusInDoubt   = "in doubt" // this node cannot know now
	StatusUnknown   = "unknown"  // decided too long ago, or nobody's
)

// The functions of schema quorate are the server's, so that types, formats and whatever SQL stands around a call are its
// business. What they return is the gateway's: it sees their names in a statement's text and, before the statement,
// puts the values into settings of the session, where the functions find them. The views are made of such functions.

const (
	statusTimeout = 5 * time.Second // of a question about the outcome
	maxAsked      = 16              // GIDs in one statement
)

// asked says what a statement wants to know.
type asked struct {
	gid      bool      // of the transaction in progress
	outcomes []txn.GID // of others
	views    sqllex.Views
}

// asks returns what statements with this text want to know.
func asks(stmts []sqllex.Statement, sql []byte) (a asked) {
	for i := range stmts {
		st := &stmts[i]
		a.gid = a.gid || st.AsksGID
		a.views |= st.Views
		if st.AsksStatus {
			a.outcomes = appendGIDs(a.outcomes, sql[st.Start:st.End])
		}
	}
	return a
}

// appendGIDs appends what looks like a GID in a text.
func appendGIDs(to []txn.GID, text []byte) []txn.GID {
	for i := 0; i < len(text); {
		n := i
		for n < len(text) && (text[n] >= '0' && text[n] <= '9' || text[n] >= 'a' && text[n] <= 'f' || text[n] == '-') {
			n++
		}
		if gid, err := txn.ParseGID(string(text[i:n])); err == nil && len(to) < maxAsked {
			to = append(to, gid)
		}
		i = n + 1
	}
	return to
}

// bindValues calls f with each parameter's value in the body of a Bind behind the names. Text looks alike in both formats.
func bindValues(b []byte, f func([]byte)) {
	if len(b) < 2 {
		return
	}
	formats := 2 + 2*int(binary.BigEndian.Uint16(b))
	if len(b) < formats+2 {
		return
	}
	b = b[formats:]
	count := int(binary.BigEndian.Uint16(b))
	for b = b[2:]; count > 0 && len(b) >= 4; count-- {
		size := int(int32(binary.BigEndian.Uint32(b)))
		if b = b[4:]; size < 0 {
			continue
		}
		if size > len(b) {
			return
		}
		f(b[:size])
		b = b[size:]
	}
}

// inform tells the server what the statement that follows wants to know. Only the client loop calls it, when nothing of
// a batch is outstanding.
func (s *session) inform(a asked) error {
	a.gid = a.gid && s.mode == modeBlock // outside, it would be gone with the statement that asks for it
	if s.g.cfg.View == nil {
		a.views = 0
	}
	if !a.gid && len(a.outcomes) == 0 && a.views == 0 {
		return nil
	}
	if err := s.settle(); err != nil {
		return err
	}
	status := s.statusNow()
	if status == 'E' {
		return nil // the server refuses the statement
	}
	set := "SET "
	if status == 'T' {
		set = "SET LOCAL "
	}
	var b []byte
	var names []string
	if a.gid {
		if s.gid.IsZero() {
			s.gid = s.g.cfg.Coordinator.Reserve()
		}
		b = appendHidden(b, set+"quorate.gid = '"+s.gid.String()+"'")
	}
	if len(a.outcomes) > 0 {
		ctx, cancel := context.WithTimeout(s.ctx, statusTimeout)
		defer cancel()
		var all []string
		for _, gid := range a.outcomes {
			all = append(all, gid.String()+"="+s.g.cfg.Coordinator.TransactionStatus(ctx, gid))
		}
		b = appendHidden(b, set+outcomesSetting+" = '"+strings.Join(all, ",")+"'")
		names = append(names, outcomesSetting)
	}
	for i, name := range sqllex.ViewNames {
		if a.views&(1<<i) == 0 {
			continue
		}
		rows := s.g.cfg.View(s.ctx, name)
		for _, what := range rows.Missing {
			s.emit((&sqlError{severity: "WARNING", code: codeWarning, message: "quorate." + name + " is not complete: " + what}).appendAs(nil, 'N'))
		}
		local := "false"
		if status == 'T' {
			local = "true"
		}
		// As parameters: other sessions of the role may see the text of a statement.
		b = appendHidden(b, seenSQL, seenSetting+name, rows.Full, rows.Public, local)
		names = append(names, seenSetting+name)
	}
	if status != 'T' {
		s.informed = append(s.informed, names...)
	}
	s.push(reply{until: untilSync, hidden: true})
	return s.send(appendSync(b))
}

// Settings in which functions of schema quorate find what they return; see replication/pg/schema.sql.
const (
	outcomesSetting = "quorate.outcomes"
	seenSetting     = "quorate.seen_" // and the view's name
)

// forget takes back what a statement outside a block was told, before the next one, which may read the same without its
// being seen: by EXECUTE, or in a function. In a block the end of the transaction does that. The client loop calls it
// outside a block, when nothing is outstanding.
func (s *session) forget() error {
	if len(s.informed) == 0 {
		return nil
	}
	var b []byte
	for _, name := range s.informed {
		b = appendHidden(b, "RESET "+name)
	}
	s.informed = s.informed[:0]
	s.push(reply{until: untilSync, hidden: true})
	return s.send(appendSync(b))
}

// seenSQL gives a session the content of a view. What the users' rows hold is for those only who may see everybody's
// statements in PostgreSQL, too.
const seenSQL = `SELECT pg_catalog.set_config($1, CASE WHEN $2 OPERATOR(pg_catalog.=) $3 OR pg_catalog.pg_has_role('pg_monitor', 'USAGE') THEN $2 ELSE $3 END, $4::pg_catalog.bool)`
