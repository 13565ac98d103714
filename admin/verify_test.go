package admin_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quorate/quorate/admin"
	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// barrierLog is a log of one barrier, which reaches everybody who waits for it when it is put there.
type barrierLog struct {
	barrier chan struct{} // closed when it is there
	refuses error
}

// hasher is a node with these tables.
type hasher struct {
	source
	log    *barrierLog
	hashes admin.Hashes
	err    error
	silent bool // never gets ready
	// witness says that it has no tables.
	witness bool
}

func (h *hasher) Barrier(context.Context, txn.GID) error {
	if h.log.refuses == nil {
		close(h.log.barrier)
	}
	return h.log.refuses
}

func (h *hasher) Hash(ctx context.Context, id txn.GID, ready func()) (admin.Hashes, error) {
	if h.err != nil || id.IsZero() {
		return admin.Hashes{}, h.err
	}
	if h.silent {
		<-ctx.Done()
		return admin.Hashes{}, ctx.Err()
	}
	select {
	case <-h.log.barrier:
		return admin.Hashes{}, errors.New("the barrier came before this node was ready")
	default:
	}
	ready()
	select {
	case <-h.log.barrier:
		return h.hashes, nil
	case <-ctx.Done():
		return admin.Hashes{}, ctx.Err()
	}
}

// verify asks node 1 of a cluster of these.
func verify(t *testing.T, hashers ...*hasher) (*pb.VerifyResponse, error) {
	t.Helper()
	var members []admin.Member
	log := &barrierLog{barrier: make(chan struct{}), refuses: hashers[0].err}
	serving := make([]func(), len(hashers))
	for i, h := range hashers {
		l := listen(t)
		members = append(members, admin.Member{ID: txn.NodeID(i + 1), GRPC: l.Addr().String(), Witness: h.witness})
		h.log = log
		serving[i] = func() {
			serve(t, l, admin.Config{Cluster: "c", Node: txn.NodeID(i + 1), Version: "test", Members: list(members...), Source: h})
		}
	}
	for _, start := range serving {
		start()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	return pb.NewClusterClient(dial(t, members[0].GRPC)).Verify(ctx, &pb.VerifyRequest{})
}

func tables(names ...string) []admin.TableHash {
	var all []admin.TableHash
	for _, name := range names {
		name, hash, _ := strings.Cut(name, "=")
		all = append(all, admin.TableHash{Name: name, Rows: 1, Hash: hash})
	}
	return all
}

func TestVerify(t *testing.T) {
	at := func(index txn.LogIndex, names ...string) *hasher {
		return &hasher{hashes: admin.Hashes{Index: index, CSN: 7, Tables: tables(names...)}}
	}
	for name, c := range map[string]struct {
		hashers   []*hasher
		differing []string
		errors    [3]string
	}{
		"equal":     {hashers: []*hasher{at(9, "a=1", "b=2"), at(9, "a=1", "b=2"), at(9, "a=1", "b=2")}},
		"differ":    {hashers: []*hasher{at(9, "a=1", "b=2"), at(9, "a=1", "b=3"), at(9, "a=1", "b=2")}, differing: []string{"b"}},
		"missing":   {hashers: []*hasher{at(9, "a=1"), at(9, "a=1", "b=2"), at(9, "a=1", "b=2")}, differing: []string{"b"}},
		"failed":    {hashers: []*hasher{at(9, "a=1"), {source: source{}, err: errors.New("broken")}, at(9, "a=1")}, errors: [3]string{1: "broken"}},
		"elsewhere": {hashers: []*hasher{at(9, "a=1"), at(9, "a=1"), at(10, "a=2")}, errors: [3]string{2: "index 10"}},
	} {
		t.Run(name, func(t *testing.T) {
			resp, err := verify(t, c.hashers...)
			if err != nil {
				t.Fatal(err)
			}
			if resp.Index != 9 || resp.Csn != 7 || !slices.Equal(resp.Differing, c.differing) || len(resp.Members) != 3 {
				t.Errorf("got %v", resp)
			}
			for i, m := range resp.Members {
				if m.Id != uint32(i+1) || (c.errors[i] == "") != (m.Error == "") || !strings.Contains(m.Error, c.errors[i]) {
					t.Errorf("member %v, want error %q", m, c.errors[i])
				}
			}
		})
	}
}

// TestVerifyWithoutMember: one that does not answer costs its time limit.
func TestVerifyWithoutMember(t *testing.T) {
	resp, err := verify(t, &hasher{hashes: admin.Hashes{Index: 9, Tables: tables("a=1")}}, &hasher{silent: true})
	if err != nil || resp.Members[0].Error != "" || !strings.Contains(resp.Members[1].Error, "not ready") {
		t.Errorf("got %v, %v", resp, err)
	}
}

// TestVerifyWithWitness: who has no data is not asked, and not missed.
func TestVerifyWithWitness(t *testing.T) {
	with := &hasher{hashes: admin.Hashes{Index: 9, Tables: tables("a=1")}}
	resp, err := verify(t, with, &hasher{witness: true, err: errors.New("asked")}, with)
	if err != nil || len(resp.Members) != 2 || resp.Members[0].Error+resp.Members[1].Error != "" || len(resp.Differing) > 0 {
		t.Errorf("got %v, %v", resp, err)
	}
}

func TestVerifyWithoutLog(t *testing.T) {
	_, err := verify(t, &hasher{err: errors.New("no quorum")})
	if s := status.Convert(err); s.Code() != codes.Unavailable || !strings.Contains(s.Message(), "no quorum") {
		t.Error(fmt.Errorf("got %w", err))
	}
}
