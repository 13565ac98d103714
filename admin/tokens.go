package admin

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// Token lets nodes join.
type Token struct {
	ID      txn.UUID
	Hash    [sha256.Size]byte // of its secret
	Uses    uint32            // left
	Expires time.Time
}

// TokenStore is where the cluster keeps its tokens. It is safe for concurrent use.
type TokenStore interface {
	// AddToken puts a token into the log and returns when it is valid here.
	AddToken(ctx context.Context, t Token) error
	// RevokeToken takes it back; ErrNoToken if there is none.
	RevokeToken(ctx context.Context, id txn.UUID) error
	// JoinTokens returns all that have not been forgotten.
	JoinTokens() []Token
}

// ErrNoToken: there is no token of that id.
var ErrNoToken = errors.New("no such token")

// Limits on tokens: what lets strangers in should not lie around.
const (
	maxTokenTTL  = 30 * 24 * time.Hour
	maxTokenUses = 100
)

// Tokens implements the service.
type Tokens struct {
	pb.UnimplementedTokensServer
	store TokenStore
	now   func() time.Time
}

// RegisterTokens adds the service to a gRPC server.
func RegisterTokens(on *grpc.Server, store TokenStore) {
	pb.RegisterTokensServer(on, &Tokens{store: store, now: time.Now})
}

// ParseJoinToken takes apart what Create has returned as secret: the id of the token and the hash of what only its
// owner knows.
func ParseJoinToken(text string) (id txn.UUID, hash [sha256.Size]byte, err error) {
	front, secret, _ := strings.Cut(strings.TrimSpace(text), ".")
	id, err = txn.ParseUUID(front)
	if err != nil || len(secret) != len(rand.Text()) {
		// Not the text itself: errors are logged.
		return txn.UUID{}, hash, errors.New("this is not a token as \"quorate token create\" prints it")
	}
	return id, sha256.Sum256([]byte(secret)), nil
}

// Create implements the RPC.
func (s *Tokens) Create(ctx context.Context, req *pb.CreateTokenRequest) (*pb.CreateTokenResponse, error) {
	limit := uint64(maxTokenTTL / time.Second)
	if req.TtlSeconds < 1 || req.TtlSeconds > limit {
		return nil, status.Errorf(codes.InvalidArgument, "ttl_seconds %d: must be from 1 to %d", req.TtlSeconds, limit)
	}
	if req.Uses < 1 || req.Uses > maxTokenUses {
		return nil, status.Errorf(codes.InvalidArgument, "uses %d: must be from 1 to %d", req.Uses, maxTokenUses)
	}
	secret := rand.Text()
	t := Token{
		ID: txn.NewUUID(), Hash: sha256.Sum256([]byte(secret)), Uses: req.Uses,
		Expires: s.now().Add(time.Duration(req.TtlSeconds) * time.Second).Truncate(time.Second),
	}
	if err := s.store.AddToken(ctx, t); err != nil {
		return nil, tokenError("create token", err)
	}
	return &pb.CreateTokenResponse{Token: t.message(), Secret: t.ID.String() + "." + secret}, nil
}

// List implements the RPC.
func (s *Tokens) List(context.Context, *pb.ListTokensRequest) (*pb.ListTokensResponse, error) {
	list := s.store.JoinTokens()
	slices.SortFunc(list, func(a, b Token) int {
		return cmp.Or(a.Expires.Compare(b.Expires), strings.Compare(a.ID.String(), b.ID.String()))
	})
	resp := &pb.ListTokensResponse{}
	for _, t := range list {
		resp.Tokens = append(resp.Tokens, t.message())
	}
	return resp, nil
}

// Revoke implements the RPC.
func (s *Tokens) Revoke(ctx context.Context, req *pb.RevokeTokenRequest) (*pb.RevokeTokenResponse, error) {
	id, err := txn.ParseUUID(req.Id)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "id: %v", err)
	}
	if err := s.store.RevokeToken(ctx, id); err != nil {
		return nil, tokenError("revoke token "+req.Id, err)
	}
	return &pb.RevokeTokenResponse{}, nil
}

func (t Token) message() *pb.Token {
	return &pb.Token{Id: t.ID.String(), UsesLeft: t.Uses, ExpiresUnix: uint64(t.Expires.Unix())}
}

func tokenError(what string, err error) error {
	code := codes.Internal
	switch {
	case errors.Is(err, ErrNoToken):
		code = codes.NotFound
	case errors.Is(err, txn.ErrNoQuorum), errors.Is(err, txn.ErrOutcomeUnknown):
		code = codes.Unavailable
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	}
	return status.Error(code, fmt.Sprintf("%s: %v", what, err))
}
