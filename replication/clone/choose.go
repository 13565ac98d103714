package clone

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// Candidate is a member that may be asked for a copy.
type Candidate struct {
	Node txn.NodeID
	Conn grpc.ClientConnInterface
}

// offerTimeout bounds how long members are waited for.
const offerTimeout = 2 * time.Second

// Order asks the candidates and returns those that are active, best first: rather one that does not lead, since the leader
// has more to do, and rather one that makes no clone yet. refused says, for each of the others, why it is none of them.
func Order(ctx context.Context, cluster txn.UUID, candidates []Candidate) (fit []Candidate, refused map[txn.NodeID]error) {
	ctx, cancel := context.WithTimeout(ctx, offerTimeout)
	defer cancel()
	offers := make([]*pb.OfferResponse, len(candidates))
	errs := make([]error, len(candidates))
	var asked sync.WaitGroup
	for i, c := range candidates {
		asked.Go(func() { offers[i], errs[i] = pb.NewRecoveryClient(c.Conn).Offer(ctx, &pb.OfferRequest{}) })
	}
	asked.Wait()
	refused = map[txn.NodeID]error{}
	var good []int
	for i, c := range candidates {
		switch o := offers[i]; {
		case errs[i] != nil:
			refused[c.Node] = fmt.Errorf("it does not answer: %s", status.Convert(errs[i]).Message())
		case !bytes.Equal(o.ClusterId, cluster[:]) || txn.NodeID(o.Node) != c.Node:
			refused[c.Node] = fmt.Errorf("who answers is node %d of cluster %q (%x)", o.Node, o.Cluster, o.ClusterId)
		case !o.Active:
			refused[c.Node] = fmt.Errorf("it is not active: %s", o.Reason)
		default:
			good = append(good, i)
		}
	}
	weight := func(o *pb.OfferResponse) int {
		w := 2 * int(o.Clones)
		if o.Clones >= o.MaxClones {
			w += 1000 // only if nobody else will do; by then it may be free
		}
		if o.Leader {
			w++
		}
		return w
	}
	slices.SortStableFunc(good, func(a, b int) int { return cmp.Compare(weight(offers[a]), weight(offers[b])) })
	for _, i := range good {
		fit = append(fit, candidates[i])
	}
	return fit, refused
}
