package admin

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// Hashes are the contents of a node's replicated tables at one place in the log.
type Hashes struct {
	Index  txn.LogIndex
	CSN    txn.CSN // the last transaction before it
	Tables []TableHash
}

// TableHash is the content of one table.
type TableHash struct {
	Name string // with its schema
	Rows uint64
	Hash string
}

// prepareTimeout bounds how long Verify waits for members to be ready, before it goes on without those that are not.
const prepareTimeout = 5 * time.Second

// member is what one member has answered so far.
type member struct {
	id     txn.NodeID
	ready  chan struct{} // closed when it waits for the barrier, or has failed
	done   chan struct{} // closed when hashes and err are set
	hashes Hashes
	err    error
}

// Verify implements the RPC. Every member with data gets ready to hash; then the barrier goes into the log; and each hashes what it
// has when the barrier comes.
func (a *Admin) Verify(ctx context.Context, _ *pb.VerifyRequest) (*pb.VerifyResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var number [8]byte
	if _, err := rand.Read(number[:]); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	barrier := txn.GID{Node: a.cfg.Node, Incarnation: binary.BigEndian.Uint64(number[:])}
	var members []*member
	for _, m := range a.cfg.Members() {
		if !m.Witness {
			members = append(members, a.startHash(ctx, m.ID, barrier))
		}
	}
	slices.SortFunc(members, func(x, y *member) int { return int(x.id) - int(y.id) })
	prepared, stop := context.WithTimeout(ctx, prepareTimeout)
	defer stop()
	for _, m := range members {
		select {
		case <-m.ready:
		case <-prepared.Done():
		}
	}
	if err := a.cfg.Source.Barrier(ctx, barrier); err != nil {
		return nil, status.Errorf(codes.Unavailable, "put a barrier into the log: %v", err)
	}
	resp := &pb.VerifyResponse{}
	for _, m := range members {
		got := &pb.MemberHashes{Id: uint32(m.id)}
		resp.Members = append(resp.Members, got)
		select {
		case <-m.ready:
		default:
			got.Error = fmt.Sprintf("it was not ready within %v", prepareTimeout)
			continue
		}
		<-m.done
		switch {
		case m.err != nil:
			got.Error = status.Convert(m.err).Message()
		case resp.Index != 0 && (uint64(m.hashes.Index) != resp.Index || uint64(m.hashes.CSN) != resp.Csn):
			got.Error = fmt.Sprintf("it hashed at index %d, CSN %d, others at %d, %d", m.hashes.Index, m.hashes.CSN, resp.Index, resp.Csn)
		default:
			resp.Index, resp.Csn, got.Tables = uint64(m.hashes.Index), uint64(m.hashes.CSN), encode(m.hashes.Tables)
		}
	}
	resp.Differing = differing(resp.Members)
	if err := ctx.Err(); err != nil {
		return nil, status.FromContextError(err).Err()
	}
	return resp, nil
}

// differing returns the tables that are not alike on all members that have hashed.
func differing(members []*pb.MemberHashes) []string {
	type content struct {
		rows uint64
		hash string
	}
	first, copies, differ, hashed := map[string]content{}, map[string]int{}, map[string]bool{}, 0
	for _, m := range members {
		if m.Error != "" {
			continue
		}
		hashed++
		for _, t := range m.Tables {
			c := content{t.Rows, t.Hash}
			if copies[t.Name]++; copies[t.Name] == 1 {
				first[t.Name] = c
			}
			differ[t.Name] = differ[t.Name] || first[t.Name] != c
		}
	}
	for name, n := range copies {
		differ[name] = differ[name] || n < hashed
	}
	maps.DeleteFunc(differ, func(_ string, d bool) bool { return !d })
	return slices.Sorted(maps.Keys(differ))
}

// startHash asks a member, this node included, to hash.
func (a *Admin) startHash(ctx context.Context, id txn.NodeID, barrier txn.GID) *member {
	m := &member{id: id, ready: make(chan struct{}), done: make(chan struct{})}
	var once sync.Once
	ready := func() { once.Do(func() { close(m.ready) }) }
	go func() {
		if id == a.cfg.Node {
			m.hashes, m.err = a.cfg.Source.Hash(ctx, barrier, ready)
		} else {
			m.hashes, m.err = a.askHash(ctx, id, barrier, ready)
		}
		close(m.done)
		ready()
	}()
	return m
}

func (a *Admin) askHash(ctx context.Context, id txn.NodeID, barrier txn.GID, ready func()) (Hashes, error) {
	conn, err := a.cfg.Peers.Conn(id)
	if err != nil {
		return Hashes{}, err
	}
	stream, err := pb.NewClusterClient(conn).Hash(ctx, &pb.HashRequest{
		Node: uint32(barrier.Node), Incarnation: barrier.Incarnation, Sequence: barrier.Sequence,
	})
	if err != nil {
		return Hashes{}, err
	}
	if _, err := stream.Recv(); err != nil {
		return Hashes{}, err
	}
	ready()
	resp, err := stream.Recv()
	if errors.Is(err, io.EOF) {
		err = errors.New("it said nothing of its tables")
	}
	if err != nil {
		return Hashes{}, err
	}
	h := Hashes{Index: txn.LogIndex(resp.Index), CSN: txn.CSN(resp.Csn)}
	for _, t := range resp.Tables {
		h.Tables = append(h.Tables, TableHash{Name: t.Name, Rows: t.Rows, Hash: t.Hash})
	}
	return h, nil
}

// Hash implements the RPC.
func (a *Admin) Hash(req *pb.HashRequest, stream grpc.ServerStreamingServer[pb.HashResponse]) error {
	barrier := txn.GID{Node: txn.NodeID(req.Node), Incarnation: req.Incarnation, Sequence: req.Sequence}
	var sending error
	hashes, err := a.cfg.Source.Hash(stream.Context(), barrier, func() { sending = stream.Send(&pb.HashResponse{}) })
	if err == nil {
		err = sending
	}
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	return stream.Send(&pb.HashResponse{Index: uint64(hashes.Index), Csn: uint64(hashes.CSN), Tables: encode(hashes.Tables)})
}

func encode(tables []TableHash) []*pb.TableHash {
	var encoded []*pb.TableHash
	for _, t := range tables {
		encoded = append(encoded, &pb.TableHash{Name: t.Name, Rows: t.Rows, Hash: t.Hash})
	}
	return encoded
}
