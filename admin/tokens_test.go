package admin_test

import (
	"context"
	"crypto/sha256"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/admin"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// tokens is a store in memory, or one that fails.
type tokens struct {
	mu   sync.Mutex
	list []admin.Token
	err  error
}

func (s *tokens) AddToken(_ context.Context, t admin.Token) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = append(s.list, t)
	return s.err
}

func (s *tokens) RevokeToken(_ context.Context, id txn.UUID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.list {
		if s.list[i].ID == id {
			s.list[i].Uses = 0
			return s.err
		}
	}
	return admin.ErrNoToken
}

func (s *tokens) JoinTokens() []admin.Token {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]admin.Token(nil), s.list...)
}

func TestTokens(t *testing.T) {
	store := &tokens{}
	server := grpc.NewServer()
	admin.RegisterTokens(server, store)
	l := listen(t)
	done := make(chan error, 1)
	go func(l net.Listener) { done <- server.Serve(l) }(l)
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	c := pb.NewTokensClient(dial(t, l.Addr().String()))
	ctx := t.Context()
	created, err := c.Create(ctx, &pb.CreateTokenRequest{TtlSeconds: 3600, Uses: 2})
	if err != nil {
		t.Fatal(err)
	}
	id, hash, err := admin.ParseJoinToken(" " + created.Secret + "\n")
	if kept := store.list[0]; err != nil || id != kept.ID || hash != kept.Hash || kept.Uses != 2 ||
		time.Until(kept.Expires) < 59*time.Minute || time.Until(kept.Expires) > time.Hour {
		t.Errorf("created %v, kept %+v, %v", created, kept, err)
	}
	if _, err := c.Create(ctx, &pb.CreateTokenRequest{TtlSeconds: 60, Uses: 1}); err != nil {
		t.Fatal(err)
	}
	list, err := c.List(ctx, &pb.ListTokensRequest{})
	if err != nil || len(list.Tokens) != 2 || list.Tokens[1].Id != created.Token.Id || list.Tokens[1].UsesLeft != 2 {
		t.Errorf("list: %v, %v", list, err)
	}
	_, secret, _ := strings.Cut(created.Secret, ".")
	if strings.Contains(list.String(), secret) {
		t.Error("the list gives a secret away")
	}
	if _, err := c.Revoke(ctx, &pb.RevokeTokenRequest{Id: created.Token.Id}); err != nil || store.list[0].Uses != 0 {
		t.Errorf("revoke: %v, %+v", err, store.list[0])
	}
	codeOf := func(_ any, err error) codes.Code { return status.Code(err) }
	for name, got := range map[string]struct{ got, want codes.Code }{
		"no time":       {codeOf(c.Create(ctx, &pb.CreateTokenRequest{Uses: 1})), codes.InvalidArgument},
		"for ever":      {codeOf(c.Create(ctx, &pb.CreateTokenRequest{TtlSeconds: 1 << 62, Uses: 1})), codes.InvalidArgument},
		"no uses":       {codeOf(c.Create(ctx, &pb.CreateTokenRequest{TtlSeconds: 60})), codes.InvalidArgument},
		"many uses":     {codeOf(c.Create(ctx, &pb.CreateTokenRequest{TtlSeconds: 60, Uses: 101})), codes.InvalidArgument},
		"no id":         {codeOf(c.Revoke(ctx, &pb.RevokeTokenRequest{Id: "x"})), codes.InvalidArgument},
		"not a token's": {codeOf(c.Revoke(ctx, &pb.RevokeTokenRequest{Id: txn.NewUUID().String()})), codes.NotFound},
	} {
		if got.got != got.want {
			t.Errorf("%s: %s, want %s", name, got.got, got.want)
		}
	}
	store.mu.Lock()
	store.err = txn.ErrNoQuorum
	store.mu.Unlock()
	if _, err := c.Create(ctx, &pb.CreateTokenRequest{TtlSeconds: 60, Uses: 1}); status.Code(err) != codes.Unavailable {
		t.Errorf("without quorum: %v", err)
	}
}

func TestParseJoinToken(t *testing.T) {
	good := txn.NewUUID().String() + "." + strings.Repeat("A", 26)
	if _, hash, err := admin.ParseJoinToken(good); err != nil || hash != sha256.Sum256([]byte(strings.Repeat("A", 26))) {
		t.Errorf("%v", err)
	}
	for _, bad := range []string{"", ".", good[:36], good[:37], good + "A", good[1:], "x" + good} {
		if _, _, err := admin.ParseJoinToken(bad); err == nil || bad != "" && strings.Contains(err.Error(), bad) && bad != "." {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
