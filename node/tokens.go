package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/quorate/quorate/admin"
	"github.com/quorate/quorate/replication"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// errStarting: there is no log to put anything into yet.
var errStarting = errors.New("the node is starting")

// AddToken implements admin.TokenStore.
func (n *Node) AddToken(ctx context.Context, t admin.Token) error {
	m, err := n.proposeToken(ctx, codec.Token{ID: t.ID, Hash: t.Hash, Uses: t.Uses, Expires: uint64(t.Expires.Unix()), Time: seconds()})
	if err != nil {
		return err
	}
	if err := m.CheckToken(codec.TokenUse{ID: t.ID, Hash: t.Hash, Time: seconds()}); err != nil && !errors.Is(err, replication.ErrTokenUsed) {
		return fmt.Errorf("the log has not taken it (%w): there are too many tokens that have not expired, or its time has passed", err)
	}
	return nil
}

// RevokeToken implements admin.TokenStore.
func (n *Node) RevokeToken(ctx context.Context, id txn.UUID) error {
	for _, t := range n.JoinTokens() {
		if t.ID == id {
			_, err := n.proposeToken(ctx, codec.Token{ID: id, Time: seconds()})
			return err
		}
	}
	return admin.ErrNoToken
}

// JoinTokens implements admin.TokenStore.
func (n *Node) JoinTokens() []admin.Token {
	m := n.ledger()
	if m == nil {
		return nil
	}
	var list []admin.Token
	for _, t := range m.Tokens() {
		list = append(list, admin.Token{ID: t.ID, Hash: t.Hash, Uses: t.Uses, Expires: time.Unix(int64(t.Expires), 0)})
	}
	return list
}

// proposeToken puts an entry into the log and returns the machine that has taken it.
func (n *Node) proposeToken(ctx context.Context, t codec.Token) (*replication.Machine, error) {
	c, m := n.consensus.Load(), n.ledger()
	if c == nil || m == nil {
		return nil, errStarting
	}
	index, err := c.Propose(ctx, codec.AppendToken(nil, &t))
	if err != nil {
		return nil, err
	}
	return m, m.WaitFor(ctx, index)
}

// joinToken returns what an admission by a token is to carry, and an error if it would be refused.
func joinToken(m *replication.Machine, text string) (codec.TokenUse, error) {
	id, hash, err := admin.ParseJoinToken(text)
	if err != nil {
		return codec.TokenUse{}, err
	}
	use := codec.TokenUse{ID: id, Hash: hash, Time: seconds()}
	return use, m.CheckToken(use)
}

// seconds is the time as entries of the log have it.
func seconds() uint64 { return uint64(time.Now().Unix()) }
