package sqllex

// Kind says how a gateway must treat a statement. The zero Kind is not a statement's.
type Kind uint8

// The kinds.
const (
	// Maybe: reads, as far as its text shows; whether it also writes, only the server can tell.
	Maybe Kind = iota + 1
	// Write: writes, or calls a function that might.
	Write
	// Plain: neither takes part in transactions nor writes what is replicated: SET, SHOW, LISTEN, VACUUM, …
	Plain
	Begin        // BEGIN, START TRANSACTION
	Commit       // COMMIT, END
	Rollback     // ROLLBACK, ABORT, of the whole transaction
	Subtransact  // SAVEPOINT, RELEASE, ROLLBACK TO
	Deallocate   // DEALLOCATE, DISCARD: prepared statements go away
	SetReadOnly  // SET, RESET of default_transaction_read_only by whatever name
	SetIsolation // SET TRANSACTION …: must come before the first snapshot
)

// Refusal says why a statement is refused; the gateway has the text for each.
type Refusal uint8

// The refusals.
const (
	NotRefused Refusal = iota
	Serializable
	TwoPhase
	ConcurrentIndex
	DatabaseDDL
	TablespaceDDL
	RoleDDL
	SharedComment
	AlterSystem
	Subscription
	OwnPublication
	EventTrigger
	LargeObject
	CatalogLock
	ReplicationRole
	OwnSchema
	ExplainedCreation
	OwnSetting
)

// ReadOnlyWish is what a statement of kind SetReadOnly asks for.
type ReadOnlyWish uint8

// The wishes.
const (
	WishDefault ReadOnlyWish = iota
	WishOn
	WishOff
)

// Statement is one statement of a text.
type Statement struct {
	Start, End int // its bytes, without blanks around it and without the semicolon
	Kind       Kind
	Refusal    Refusal
	// Fingerprint is a hash of the text in which all constants are alike and case and spacing do not count.
	Fingerprint uint64
	// Definition: DDL, which peers replay by its text. It must reach the server alone: what the event trigger sees
	// is the text of the whole Query.
	Definition bool
	// Chain: COMMIT or ROLLBACK has AND CHAIN.
	Chain bool
	// AccessMode: BEGIN says READ ONLY or READ WRITE itself.
	AccessMode bool
	// Snapshot: SET TRANSACTION SNAPSHOT, so that the snapshot may be older than the transaction.
	Snapshot bool
	// All: DEALLOCATE ALL, DISCARD ALL, RESET ALL.
	All bool
	// AsksReadOnly: mentions (default_)transaction_read_only, so that the answer depends on where it runs.
	AsksReadOnly bool
	// AsksGID and AsksStatus: mentions current_gid, transaction_status.
	AsksGID, AsksStatus bool
	// Opaque: runs code that its text does not show: a function that is not a built-in known to change nothing, DO, CALL, EXECUTE.
	Opaque bool
	// Views of schema quorate that are mentioned with the schema's name.
	Views Views
	// Wish of SetReadOnly.
	Wish ReadOnlyWish
	// NameStart and NameEnd, of DEALLOCATE name: the name as written.
	NameStart, NameEnd int
}

// Views is a set of the views of schema quorate, whose content the gateway provides.
type Views uint8

// ViewNames are the names of the views; the bit 1<<i of Views stands for the i-th.
var ViewNames = [...]string{"nodes", "heartbeats", "status", "transactions", "conflicts", "events"}

// viewBehind returns the view that a name behind a token and its word stands for, if it is one of schema quorate.
func viewBehind(last token, lastWord wordClass, name []byte) Views {
	if last.kind != tokOther || last.char != '.' || lastWord != wordQuorate {
		return 0
	}
	for i, view := range ViewNames {
		if string(name) == view {
			return 1 << i
		}
	}
	return 0
}

// Control reports whether the statement begins, ends or structures a transaction.
func (s *Statement) Control() bool {
	return s.Kind == Begin || s.Kind == Commit || s.Kind == Rollback || s.Kind == Subtransact
}

// Alone reports whether the statement must not share a Query with others: it controls the transaction, or is DDL.
func (s *Statement) Alone() bool { return s.Control() || s.Definition }

const headTokens = 14

// parser classifies statements while it scans them. It keeps the first tokens of a statement, which name it, and
// flags for what may come anywhere.
type parser struct {
	scanner
	head  [headTokens]token
	n     int
	lower [64]byte // the current identifier in lower case
}

// Split appends the statements of sql to dst. Empty statements are left out, as the server does. Nothing is
// allocated but what dst needs.
func Split(sql []byte, opt Options, dst []Statement) []Statement {
	p := parser{scanner: scanner{src: sql, backslash: opt.BackslashQuotes}}
	for {
		st, more := p.statement()
		if p.n > 0 {
			dst = append(dst, st)
		}
		if !more {
			return dst
		}
	}
}

const (
	fnvOffset = 14695981039346656037
	fnvPrime  = 1099511628211
)

// statement scans up to the next semicolon that ends a statement: not one within parentheses (CREATE RULE … DO
// (a; b)) nor in the body of BEGIN ATOMIC … END.
func (p *parser) statement() (st Statement, more bool) {
	var (
		hash       uint64 = fnvOffset
		parens     int
		bodies     int  // open BEGIN ATOMIC and CASE
		atomic     bool // the statement is CREATE FUNCTION or PROCEDURE
		callWrites bool
		modifies   bool
		largeObj   bool
		last       token
		lastWord   wordClass
		set        setConfig
	)
	p.n = 0
	for {
		t := p.next()
		if t.kind == tokEnd {
			break
		}
		if t.kind == tokOther {
			if t.char == ';' && parens == 0 && bodies == 0 {
				more = true
				break
			}
			switch t.char {
			case '(', '[':
				parens++
			case ')', ']':
				if parens > 0 {
					parens--
				}
			}
		}
		if p.n == 0 {
			st.Start = int(t.start)
		}
		if p.n < headTokens {
			p.head[p.n] = t
		}
		p.n++
		st.End = int(t.end)
		var word wordClass
		switch t.kind {
		case tokIdent:
			text := p.fold(t)
			for _, c := range text {
				hash = (hash ^ uint64(c)) * fnvPrime
			}
			word = classifyWord(text)
			switch word {
			case wordFunction:
				atomic = atomic || p.n <= 4 && p.is(0, "create")
			case wordBegin:
				if atomic {
					bodies++
				}
			case wordCase:
				if bodies > 0 {
					bodies++
				}
			case wordEnd:
				if bodies > 0 {
					bodies--
				}
			case wordModify:
				modifies = true
			case wordReadOnly:
				st.AsksReadOnly = true
			case wordCurrentGID:
				st.AsksGID = true
			case wordStatus:
				st.AsksStatus = true
			}
			st.Views |= viewBehind(last, lastWord, text)
			if lastWord != wordExecute && p.callFollows() { // EXECUTE name (…) calls nothing by that name
				known, large := p.builtin(text, last)
				callWrites = callWrites || !known
				largeObj = largeObj || large
			}
		case tokQuoted:
			for _, c := range p.src[t.start:t.end] {
				hash = (hash ^ uint64(c)) * fnvPrime
			}
			name := p.quotedName(t)
			switch w := classifyWord(name); w {
			case wordQuorate:
				word = w
			case wordCurrentGID:
				st.AsksGID = true
			case wordStatus:
				st.AsksStatus = true
			}
			st.Views |= viewBehind(last, lastWord, name)
			if p.callFollows() {
				callWrites = true
			}
		case tokString:
			hash = (hash ^ '?') * fnvPrime
			if n := t.end - t.start; n >= 23 && n <= 31 && p.hasFold(t, "transaction_read_only") {
				st.AsksReadOnly = true
			}
			if last.kind == tokOther && last.char == '(' && lastWord == wordSetConfig {
				set.name = t
			} else if set.name.kind == tokString && set.value.kind == tokEnd {
				set.value = t
			}
		case tokNumber, tokParam:
			hash = (hash ^ '?') * fnvPrime
		case tokOther:
			hash = (hash ^ uint64(t.char)) * fnvPrime
			if t.char == '(' || t.char == '.' && lastWord == wordQuorate {
				word = lastWord // so that a name before it is still known behind it
			}
		}
		hash = (hash ^ ' ') * fnvPrime
		last, lastWord = t, word
	}
	st.Fingerprint = hash
	if p.n > 0 {
		p.classify(&st)
		st.Opaque = callWrites || p.is(0, "do") || p.is(0, "call") || p.is(0, "execute")
		if st.Kind == Maybe && (callWrites || modifies && !p.is(0, "explain")) {
			st.Kind = Write
		}
		if largeObj && st.Refusal == NotRefused && (st.Kind == Maybe || st.Kind == Write) {
			st.Refusal = LargeObject
		}
		if st.Refusal == NotRefused && set.name.kind == tokString {
			st.Refusal = p.setConfigRefusal(set)
		}
	}
	return st, more
}

type wordClass uint8

const (
	wordOther wordClass = iota
	wordFunction
	wordBegin
	wordCase
	wordEnd
	wordModify
	wordReadOnly
	wordCurrentGID
	wordStatus
	wordQuorate
	wordSetConfig
	wordExecute
)

// setConfig is a call of set_config with constants.
type setConfig struct{ name, value token }

func classifyWord(lower []byte) wordClass {
	switch string(lower) {
	case "function", "procedure":
		return wordFunction
	case "begin":
		return wordBegin
	case "case":
		return wordCase
	case "end":
		return wordEnd
	case "insert", "delete", "merge":
		return wordModify
	case "transaction_read_only", "default_transaction_read_only":
		return wordReadOnly
	case "current_gid":
		return wordCurrentGID
	case "transaction_status":
		return wordStatus
	case "quorate":
		return wordQuorate
	case "execute":
		return wordExecute
	case "set_config":
		return wordSetConfig
	}
	return wordOther
}

// fold returns the identifier in lower case, cut to 64 bytes (PostgreSQL cuts at 63). Valid until the next call.
func (p *parser) fold(t token) []byte {
	src := p.src[t.start:t.end]
	n := min(len(src), len(p.lower))
	for i := range n {
		c := src[i]
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		p.lower[i] = c
	}
	return p.lower[:n]
}

// callFollows reports whether the next token is an opening parenthesis, without moving.
func (p *parser) callFollows() bool {
	if p.pos >= len(p.src) {
		return false
	}
	if c := p.src[p.pos]; c == '(' {
		return true
	} else if isIdent(c) || c == ',' || c == '.' {
		return false
	}
	save := p.pos
	p.skipBlank()
	follows := p.at(p.pos) == '('
	p.pos = save
	return follows
}

// builtin reports whether a name before a parenthesis is known to change nothing, and whether it is a function on
// large objects. A name in a schema other than pg_catalog is anybody's.
func (p *parser) builtin(lower []byte, last token) (known, large bool) {
	if len(lower) > 3 && string(lower[:3]) == "lo_" || string(lower) == "lowrite" || string(lower) == "loread" {
		return false, true
	}
	if last.kind == tokOther && last.char == '.' {
		// The schema's name is the token before; p.n counts the current one.
		if i := p.n - 3; i < 0 || !p.before(last, "pg_catalog") {
			return false, false
		}
	}
	_, known = builtins[string(lower)]
	return known, false
}

// before reports whether the text just before the token is the word.
func (p *parser) before(t token, word string) bool {
	end := int(t.start)
	for end > 0 && isSpace(p.src[end-1]) {
		end--
	}
	start := end - len(word)
	return start >= 0 && equalFold(p.src[start:end], word) && (start == 0 || !isIdent(p.src[start-1]) && p.src[start-1] != '"')
}

func equalFold(b []byte, lower string) bool {
	if len(b) != len(lower) {
		return false
	}
	for i, c := range b {
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != lower[i] {
			return false
		}
	}
	return true
}

// hasFold reports whether the string constant is the word, with or without the prefix default_.
func (p *parser) hasFold(t token, lower string) bool {
	b := p.unquote(t)
	if len(b) == len(lower)+len("default_") && equalFold(b[:8], "default_") {
		b = b[8:]
	}
	return equalFold(b, lower)
}

// unquote returns what is between the first and last quote of a string constant; escapes stay as they are.
func (p *parser) unquote(t token) []byte {
	b := p.src[t.start:t.end]
	for len(b) > 0 && b[0] != '\'' {
		b = b[1:]
	}
	if len(b) < 2 {
		return nil
	}
	return b[1 : len(b)-1]
}

// is reports whether head token i is the unquoted word.
func (p *parser) is(i int, word string) bool {
	if i >= p.n || i >= headTokens {
		return false
	}
	t := p.head[i]
	return t.kind == tokIdent && equalFold(p.src[t.start:t.end], word)
}

// named reports whether head token i is the name, quoted or not.
func (p *parser) named(i int, name string) bool {
	if i >= p.n || i >= headTokens {
		return false
	}
	t := p.head[i]
	switch t.kind {
	case tokIdent:
		return equalFold(p.src[t.start:t.end], name)
	case tokQuoted:
		return string(p.quotedName(t)) == name
	}
	return false
}

// quotedName returns what stands between the quotes: a name as it is, and never a keyword. Names with quotes or escapes in
// them are not ours, and stay as they are written.
func (p *parser) quotedName(t token) []byte {
	if t.end-t.start < 2 {
		return nil // the text ends with the quote
	}
	return p.src[t.start+1 : t.end-1]
}

// value reports whether head token i is the word, as identifier or constant.
func (p *parser) value(i int, word string) bool {
	if i >= p.n || i >= headTokens {
		return false
	}
	t := p.head[i]
	return p.named(i, word) || t.kind == tokString && equalFold(p.unquote(t), word)
}

// find returns the first head token from i on that is the word, or -1.
func (p *parser) find(i int, word string) int {
	for ; i < p.n && i < headTokens; i++ {
		if p.is(i, word) {
			return i
		}
	}
	return -1
}

func (p *parser) char(i int, c byte) bool {
	return i < p.n && i < headTokens && p.head[i].kind == tokOther && p.head[i].char == c
}

// ownSetting reports whether a setting is one of the node's own, which tell clients about it.
func ownSetting(name []byte) bool {
	const prefix = "quorate."
	return len(name) > len(prefix) && equalFold(name[:len(prefix)], prefix)
}

func (p *parser) setConfigRefusal(s setConfig) Refusal {
	name := p.unquote(s.name)
	switch {
	case equalFold(name, "session_replication_role"):
		return ReplicationRole
	case ownSetting(name):
		return OwnSetting
	case (equalFold(name, "default_transaction_isolation") || equalFold(name, "transaction_isolation")) &&
		s.value.kind == tokString && equalFold(p.unquote(s.value), "serializable"):
		return Serializable
	}
	return NotRefused
}
