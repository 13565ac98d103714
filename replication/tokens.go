package replication

import (
	"bytes"
	"crypto/subtle"
	"errors"
	"maps"
	"slices"

	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// The reasons why a token does not admit. Who does not have the secret learns only the first.
var (
	ErrTokenUnknown = errors.New("the token is not known to this cluster")
	ErrTokenUsed    = errors.New("the token was used as often as it may be, or taken back")
	ErrTokenExpired = errors.New("the token has expired")
)

// maxTokens bounds how many there are at a time, those included that are used up and have not expired yet.
const maxTokens = 1000

// tokens is the part of a Machine's state that says what lets nodes join. A token stays until it expires, also one without
// uses left: an entry that makes it and comes a second time must not revive it.
type tokens map[txn.UUID]codec.Token

// add takes a token, or takes it back.
func (t tokens) add(e codec.Token) {
	maps.DeleteFunc(t, func(_ txn.UUID, old codec.Token) bool { return old.Expires <= e.Time })
	old, known := t[e.ID]
	switch {
	case known && e.Uses == 0:
		old.Uses = 0
		t[e.ID] = old
	case !known && e.Uses > 0 && e.Expires > e.Time && len(t) < maxTokens:
		t[e.ID] = e
	}
}

// check returns why a use is refused.
func (t tokens) check(u codec.TokenUse) error {
	token, ok := t[u.ID]
	if subtle.ConstantTimeCompare(token.Hash[:], u.Hash[:]) != 1 || !ok {
		return ErrTokenUnknown
	}
	if u.Time >= token.Expires {
		return ErrTokenExpired
	}
	if token.Uses == 0 {
		return ErrTokenUsed
	}
	return nil
}

// use uses a token once.
func (t tokens) use(id txn.UUID) {
	token := t[id]
	token.Uses--
	t[id] = token
}

func (t tokens) list() []codec.Token {
	return slices.SortedFunc(maps.Values(t), func(a, b codec.Token) int { return bytes.Compare(a.ID[:], b.ID[:]) })
}

// Tokens returns the tokens that have not been forgotten, by id. Some may have expired, or have no uses left.
func (m *Machine) Tokens() []codec.Token {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.tokens.list()
}

// CheckToken returns why an admission that rests on the token would be refused, as far as this node has the log: an error
// that wraps one of the above. A request that has admitted somebody already needs no token any more; see Admitted.
func (m *Machine) CheckToken(u codec.TokenUse) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.tokens.check(u)
}
