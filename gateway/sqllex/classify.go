package sqllex

// classify names the statement from its first tokens.
func (p *parser) classify(st *Statement) {
	st.Kind = Maybe
	if p.head[0].kind != tokIdent {
		return // "(SELECT …)" or an error
	}
	switch string(p.fold(p.head[0])) {
	case "select", "with", "values", "table", "fetch", "move", "declare":
	case "show":
		if !st.AsksReadOnly {
			st.Kind = Plain
		}
	case "explain":
		if p.explainsCreation() {
			st.Refusal = ExplainedCreation
		}
	case "execute": // what was prepared may call a function that traps the error by which a write shows
		st.Kind = Write
	case "insert", "update", "delete", "merge", "truncate", "call", "do":
		st.Kind = Write
	case "import", "refresh":
		st.Kind, st.Definition = Write, true
	case "copy":
		st.Kind = p.copyKind()
	case "begin", "start":
		st.Kind = Begin
		p.modes(st, 1)
	case "commit", "end":
		st.Kind = Commit
		p.ending(st)
	case "abort":
		st.Kind = Rollback
		p.ending(st)
	case "rollback":
		st.Kind = Rollback
		if p.is(1, "to") || (p.is(1, "work") || p.is(1, "transaction")) && p.is(2, "to") {
			st.Kind = Subtransact
		} else {
			p.ending(st)
		}
	case "savepoint", "release":
		st.Kind = Subtransact
	case "prepare":
		st.Kind = Plain
		if p.is(1, "transaction") && p.n > 2 && p.head[2].kind == tokString {
			st.Refusal = TwoPhase
		}
	case "set", "reset":
		st.Kind = Plain
		p.setting(st)
	case "deallocate", "discard":
		p.deallocate(st)
	case "create", "alter", "drop", "comment", "security", "grant", "revoke", "reassign":
		st.Kind = Write
		st.Definition = true
		st.Refusal = p.ddl()
	case "lock":
		st.Kind = Plain
		if p.locksCatalog() {
			st.Refusal = CatalogLock
		}
	case "vacuum", "analyze", "analyse", "cluster", "reindex", "checkpoint", "listen", "unlisten", "notify", "load", "close":
		st.Kind = Plain
	}
}

// explainsCreation reports whether EXPLAIN ANALYZE makes a table, for which no event trigger fires.
func (p *parser) explainsCreation() bool {
	s := scanner{src: p.src, pos: int(p.head[0].end), backslash: p.backslash}
	analyze, creates, insert := false, false, false
	for {
		t := s.next()
		if t.kind == tokEnd || t.kind == tokOther && t.char == ';' {
			return analyze && creates
		}
		word := s.src[t.start:t.end]
		if t.kind != tokIdent {
			word = nil
		}
		analyze = analyze || equalFold(word, "analyze") || equalFold(word, "analyse")
		creates = creates || equalFold(word, "create") || equalFold(word, "into") && !insert
		insert = equalFold(word, "insert") || equalFold(word, "merge")
	}
}

// ending reads what follows COMMIT or ROLLBACK.
func (p *parser) ending(st *Statement) {
	i := 1
	if p.is(i, "prepared") {
		st.Kind, st.Refusal = Plain, TwoPhase
		return
	}
	if p.is(i, "work") || p.is(i, "transaction") {
		i++
	}
	st.Chain = p.is(i, "and") && p.is(i+1, "chain")
}

// modes reads transaction modes from head token i on.
func (p *parser) modes(st *Statement, i int) {
	for ; i < p.n && i < headTokens; i++ {
		switch {
		case p.is(i, "read") && (p.is(i+1, "only") || p.is(i+1, "write")):
			st.AccessMode = true
		case p.is(i, "level") && p.is(i+1, "serializable"):
			st.Refusal = Serializable
		}
	}
}

// setting reads SET and RESET.
func (p *parser) setting(st *Statement) {
	reset := p.is(0, "reset")
	i := 1
	if !reset && p.is(1, "session") && p.is(2, "characteristics") {
		p.modes(st, 3)
		if j := p.find(3, "read"); j > 0 {
			st.Kind, st.Wish = SetReadOnly, WishOff
			if p.is(j+1, "only") {
				st.Wish = WishOn
			}
		}
		return
	}
	if !reset && (p.is(1, "session") || p.is(1, "local")) {
		i = 2
	}
	switch {
	case !reset && p.is(i, "transaction"):
		st.Kind = SetIsolation
		st.Snapshot = p.is(i+1, "snapshot")
		p.modes(st, i+1)
		return
	case reset && p.is(1, "all"):
		st.Kind, st.Wish, st.All = SetReadOnly, WishDefault, true
		return
	}
	serializable := p.value(i+2, "serializable")
	switch {
	case p.named(i, "default_transaction_read_only"):
		st.Kind, st.Wish = SetReadOnly, WishDefault
		if !reset && i+2 < p.n && !p.is(i+2, "default") {
			st.Wish = WishOff
			if p.truth(i + 2) {
				st.Wish = WishOn
			}
		}
	case p.named(i, "session_replication_role") && !reset:
		st.Refusal = ReplicationRole
	case !reset && (p.named(i, "quorate") && p.char(i+1, '.') || i < min(p.n, headTokens) && p.head[i].kind == tokQuoted && ownSetting(p.quotedName(p.head[i]))):
		st.Refusal = OwnSetting
	case (p.named(i, "default_transaction_isolation") || p.named(i, "transaction_isolation")) && serializable:
		st.Refusal = Serializable
	}
}

// truth reads a boolean setting's value as the server does: any unambiguous beginning of true, yes, on; or 1.
func (p *parser) truth(i int) bool {
	if i >= p.n || i >= headTokens {
		return false
	}
	t := p.head[i]
	b := p.src[t.start:t.end]
	if t.kind == tokString {
		b = p.unquote(t)
	}
	if len(b) == 0 {
		return false
	}
	if string(b) == "1" || equalFold(b, "on") {
		return true
	}
	return len(b) <= 4 && equalFold(b, "true"[:min(len(b), 4)]) || len(b) <= 3 && equalFold(b, "yes"[:min(len(b), 3)])
}

// deallocate reads DEALLOCATE [PREPARE] name | ALL and DISCARD.
func (p *parser) deallocate(st *Statement) {
	st.Kind = Plain
	if p.is(0, "discard") {
		if p.is(1, "all") {
			st.Kind, st.All = Deallocate, true
		}
		return
	}
	st.Kind = Deallocate
	i := 1
	if p.is(1, "prepare") && p.n > 2 {
		i = 2
	}
	if p.is(i, "all") {
		st.All = true
	} else if i < p.n {
		st.NameStart, st.NameEnd = int(p.head[i].start), int(p.head[i].end)
	}
}

// copyKind tells COPY … FROM, which writes, from COPY … TO and COPY (query) TO. FROM stands at depth 0 behind the
// table's name and, maybe, its columns; a query's own FROM is inside parentheses.
func (p *parser) copyKind() Kind {
	s := scanner{src: p.src, pos: int(p.head[0].end), backslash: p.backslash}
	depth := 0
	for {
		t := s.next()
		switch {
		case t.kind == tokEnd || t.kind == tokOther && t.char == ';' && depth == 0:
			return Maybe
		case t.kind == tokOther && t.char == '(':
			depth++
		case t.kind == tokOther && t.char == ')':
			depth--
		case t.kind == tokIdent && depth == 0 && equalFold(s.src[t.start:t.end], "from"):
			return Write
		case t.kind == tokIdent && depth == 0 && equalFold(s.src[t.start:t.end], "to"):
			return Maybe
		}
	}
}

// ddl returns why a definition is refused. What the event trigger sees is not judged here: only what it cannot see
// (shared objects, event triggers) or what would break the node itself.
func (p *parser) ddl() Refusal {
	switch {
	case p.is(0, "grant") || p.is(0, "revoke"):
		return p.grant()
	case p.is(0, "reassign"):
		return RoleDDL
	case p.is(0, "comment") || p.is(0, "security"):
		i := p.find(1, "on")
		switch {
		case i < 0:
		case p.is(i+1, "database"), p.is(i+1, "role"), p.is(i+1, "tablespace"), p.is(i+1, "subscription"):
			return SharedComment
		case p.is(i+1, "event") && p.is(i+2, "trigger"):
			return EventTrigger
		case p.is(i+1, "large") && p.is(i+2, "object"):
			return LargeObject
		}
		return NotRefused
	}
	i := 1
	switch {
	case p.is(i, "database"):
		return DatabaseDDL
	case p.is(i, "tablespace"):
		return TablespaceDDL
	case p.is(i, "role"), p.is(i, "group"), p.is(i, "user") && !p.is(i+1, "mapping"):
		return RoleDDL
	case p.is(i, "system"):
		return AlterSystem
	case p.is(i, "subscription"):
		return Subscription
	case p.is(i, "event") && p.is(i+1, "trigger"):
		return EventTrigger
	case p.is(i, "large") && p.is(i+1, "object"):
		return LargeObject
	case p.is(i, "publication"):
		return p.ownName(i+1, "quorate", OwnPublication)
	case p.is(i, "schema") && !p.is(0, "create"):
		return p.ownName(i+1, "quorate", OwnSchema)
	}
	if p.is(0, "create") && p.is(1, "unique") {
		i = 2
	}
	if p.is(i, "index") && p.is(i+1, "concurrently") {
		return ConcurrentIndex
	}
	// CREATE INDEX CONCURRENTLY is what comes in practice; ALTER TABLE … DETACH PARTITION … CONCURRENTLY too.
	if p.is(0, "alter") && p.is(1, "table") && p.find(3, "detach") > 0 && p.find(5, "concurrently") > 0 {
		return ConcurrentIndex
	}
	// Names in the node's own schema: ALTER TABLE quorate.x, DROP FUNCTION quorate.f().
	for j := 2; j+1 < p.n && j+1 < headTokens; j++ {
		if p.named(j, "quorate") && p.char(j+1, '.') && !p.char(j-1, '.') {
			return OwnSchema
		}
	}
	return NotRefused
}

func (p *parser) ownName(i int, name string, r Refusal) Refusal {
	for ; i < p.n && i < headTokens; i++ {
		if p.named(i, name) {
			return r
		}
	}
	return NotRefused
}

// grant tells rights on objects of this database from rights on shared ones and from membership in roles, which has
// no ON.
func (p *parser) grant() Refusal {
	s := scanner{src: p.src, pos: int(p.head[0].end), backslash: p.backslash}
	depth := 0
	for {
		t := s.next()
		switch {
		case t.kind == tokEnd, t.kind == tokOther && t.char == ';':
			return RoleDDL
		case t.kind == tokOther && t.char == '(':
			depth++
		case t.kind == tokOther && t.char == ')':
			depth--
		case t.kind == tokIdent && depth == 0 && equalFold(s.src[t.start:t.end], "on"):
			t = s.next()
			word := s.src[t.start:t.end]
			switch {
			case equalFold(word, "database"):
				return DatabaseDDL
			case equalFold(word, "tablespace"):
				return TablespaceDDL
			case equalFold(word, "parameter"):
				return AlterSystem
			case equalFold(word, "large"):
				return LargeObject
			}
			return NotRefused
		}
	}
}

// locksCatalog reports whether LOCK names something of pg_catalog.
func (p *parser) locksCatalog() bool {
	for i := 1; i < p.n && i < headTokens; i++ {
		t := p.head[i]
		b := p.src[t.start:t.end]
		if t.kind == tokQuoted && len(b) > 2 {
			b = b[1 : len(b)-1]
		}
		if (t.kind == tokIdent || t.kind == tokQuoted) && len(b) > 3 && equalFold(b[:3], "pg_") {
			return true
		}
	}
	return false
}
