// Package sqllex reads SQL text only as far as a gateway must: where statements begin and end, and what kind each
// is. It follows PostgreSQL's own scanner (src/backend/parser/scan.l and, for finding statement ends, psqlscan.l),
// so that no string, comment or dollar quote can make it see a statement end where the server sees none, or the
// reverse. It never fails: text that the server will refuse gets some kind, and the server's own error follows.
package sqllex

// Options are the session's settings that change what a text means.
type Options struct {
	// BackslashQuotes is set when standard_conforming_strings is off: a backslash in '…' escapes.
	BackslashQuotes bool
}

type tokenKind uint8

const (
	tokEnd    tokenKind = iota
	tokIdent            // unquoted identifier or keyword
	tokQuoted           // "identifier"
	tokString           // any string constant
	tokNumber
	tokParam // $1
	tokOther // one byte of operator or punctuation
)

// token is a part of the text; [start,end) are byte offsets.
type token struct {
	kind       tokenKind
	char       byte // of tokOther
	start, end int32
}

type scanner struct {
	src       []byte
	pos       int
	backslash bool
}

func isSpace(c byte) bool {
	return c == ' ' || c == '\n' || c == '\t' || c == '\r' || c == '\f' || c == '\v'
}

func isIdentStart(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '_' || c >= 0x80
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func isIdent(c byte) bool { return isIdentStart(c) || isDigit(c) || c == '$' }

func (s *scanner) at(i int) byte {
	if i < len(s.src) {
		return s.src[i]
	}
	return 0
}

// skipBlank moves past white space and comments.
func (s *scanner) skipBlank() {
	for s.pos < len(s.src) {
		switch c := s.src[s.pos]; {
		case isSpace(c):
			s.pos++
		case c == '-' && s.at(s.pos+1) == '-':
			for s.pos < len(s.src) && s.src[s.pos] != '\n' && s.src[s.pos] != '\r' {
				s.pos++
			}
		case c == '/' && s.at(s.pos+1) == '*':
			depth := 1
			for s.pos += 2; s.pos < len(s.src) && depth > 0; {
				switch {
				case s.src[s.pos] == '*' && s.at(s.pos+1) == '/':
					depth--
					s.pos += 2
				case s.src[s.pos] == '/' && s.at(s.pos+1) == '*': // they nest, other than in C
					depth++
					s.pos += 2
				default:
					s.pos++
				}
			}
		default:
			return
		}
	}
}

// next returns the next token; tokEnd at the end of the text.
func (s *scanner) next() token {
	s.skipBlank()
	start := s.pos
	if start >= len(s.src) {
		return token{kind: tokEnd, start: int32(len(s.src)), end: int32(len(s.src))}
	}
	kind := tokOther
	c := s.src[start]
	switch {
	case isIdentStart(c):
		kind = s.word(c)
	case c == '\'':
		s.pos++
		s.quoted(s.backslash)
		kind = tokString
	case c == '"':
		s.pos++
		s.identifier()
		kind = tokQuoted
	case isDigit(c) || c == '.' && isDigit(s.at(start+1)):
		s.number()
		kind = tokNumber
	case c == '$':
		kind = s.dollar()
	default:
		s.pos++
	}
	return token{kind: kind, char: c, start: int32(start), end: int32(s.pos)}
}

// word reads an identifier, or a string constant that begins with letters: E”, B”, X”, N”, U&” and U&"".
func (s *scanner) word(c byte) tokenKind {
	next := s.at(s.pos + 1)
	switch {
	case next == '\'' && (c == 'e' || c == 'E'):
		s.pos += 2
		s.quoted(true)
		return tokString
	case next == '\'' && (c == 'b' || c == 'B' || c == 'x' || c == 'X'):
		s.pos += 2
		s.quoted(false)
		return tokString
	case next == '\'' && (c == 'n' || c == 'N'):
		s.pos += 2
		s.quoted(s.backslash)
		return tokString
	case next == '&' && (c == 'u' || c == 'U') && s.at(s.pos+2) == '\'':
		s.pos += 3
		s.quoted(false) // the server refuses U&'' where backslashes would quote
		return tokString
	case next == '&' && (c == 'u' || c == 'U') && s.at(s.pos+2) == '"':
		s.pos += 3
		s.identifier()
		return tokQuoted
	}
	for s.pos < len(s.src) && isIdent(s.src[s.pos]) {
		s.pos++
	}
	return tokIdent
}

// quoted reads to the end of a string constant whose opening quote has been read. A constant goes on after white
// space that contains a line end (comments count as white space), and then keeps its way of quoting: missing that
// would let E'a' ⏎ '\'; …' hide or invent a statement.
func (s *scanner) quoted(backslash bool) {
	for {
		for {
			if s.pos >= len(s.src) {
				return
			}
			c := s.src[s.pos]
			s.pos++
			if c == '\\' && backslash && s.pos < len(s.src) {
				s.pos++
				continue
			}
			if c == '\'' {
				if s.at(s.pos) != '\'' {
					break
				}
				s.pos++
			}
		}
		next, newline := s.pos, false
		for next < len(s.src) {
			c := s.src[next]
			if isSpace(c) {
				newline = newline || c == '\n' || c == '\r'
				next++
			} else if c == '-' && s.at(next+1) == '-' {
				for next < len(s.src) && s.src[next] != '\n' && s.src[next] != '\r' {
					next++
				}
			} else {
				break
			}
		}
		if !newline || s.at(next) != '\'' {
			return
		}
		s.pos = next + 1
	}
}

func (s *scanner) identifier() {
	for s.pos < len(s.src) {
		c := s.src[s.pos]
		s.pos++
		if c == '"' {
			if s.at(s.pos) != '"' {
				return
			}
			s.pos++
		}
	}
}

// number reads digits, letters and points. Where exactly a malformed number ends does not matter here.
func (s *scanner) number() {
	for s.pos < len(s.src) {
		c := s.src[s.pos]
		if c == '.' && s.at(s.pos+1) == '.' { // 1..10 in PL/pgSQL
			return
		}
		if !isDigit(c) && c != '.' && c != '_' && !(c >= 'a' && c <= 'z') && !(c >= 'A' && c <= 'Z') {
			return
		}
		s.pos++
	}
}

// dollar reads $1, $$…$$ or $tag$…$tag$, or a lone dollar sign.
func (s *scanner) dollar() tokenKind {
	start := s.pos
	if isDigit(s.at(start + 1)) {
		for s.pos++; s.pos < len(s.src) && isDigit(s.src[s.pos]); {
			s.pos++
		}
		return tokParam
	}
	tagEnd := start + 1
	if isIdentStart(s.at(tagEnd)) {
		for tagEnd < len(s.src) && (isIdentStart(s.src[tagEnd]) || isDigit(s.src[tagEnd])) {
			tagEnd++
		}
	}
	if s.at(tagEnd) != '$' {
		s.pos++
		return tokOther
	}
	tag := s.src[start : tagEnd+1]
	for s.pos = tagEnd + 1; s.pos < len(s.src); s.pos++ {
		if s.src[s.pos] == '$' && hasPrefix(s.src[s.pos:], tag) {
			s.pos += len(tag)
			return tokString
		}
	}
	return tokString
}

func hasPrefix(b, prefix []byte) bool {
	return len(b) >= len(prefix) && string(b[:len(prefix)]) == string(prefix)
}
