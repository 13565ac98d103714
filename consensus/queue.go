package consensus

import (
	"context"
	"fmt"
	"sync"

	"github.com/quorate/quorate/txn"
)

// messageBytes bounds the data in one message to the leader, so that it fits gRPC's default limit together with the
// one entry that is always taken.
const messageBytes = MaxData

// request is one proposal or read barrier on its way to the leader, which may be this node.
type request struct {
	data []byte      // nil: a read barrier
	done chan result // capacity 1; gets exactly one result unless the request was cancelled while queued
	// queued is true until the request is handed to a link. From then on its outcome is not ours to decide.
	queued bool
}

type result struct {
	index txn.LogIndex
	err   error
}

func newRequest(data []byte) *request {
	return &request{data: data, done: make(chan result, 1), queued: true}
}

func (r *request) finish(index txn.LogIndex, err error) { r.done <- result{index, err} }

// requestQueue holds requests until the link takes them, all that have gathered at once. It refuses them while no
// leader is known: a caller that wants to wait for one awaits Leadership.
type requestQueue struct {
	ready chan struct{} // capacity 1: there may be something to take

	mu      sync.Mutex
	waiting []*request
	refusal error // why nothing can be queued; nil: it can
}

func newRequestQueue() *requestQueue {
	return &requestQueue{ready: make(chan struct{}, 1), refusal: errNoLeader}
}

var errNoLeader = fmt.Errorf("%w: no leader is known", txn.ErrNoQuorum)

func (q *requestQueue) push(r *request) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.refusal != nil {
		return q.refusal
	}
	q.waiting = append(q.waiting, r)
	q.signal()
	return nil
}

func (q *requestQueue) signal() {
	select {
	case q.ready <- struct{}{}:
	default:
	}
}

// admit lets requests in, or with a refusal turns away those that wait and those that will come.
func (q *requestQueue) admit(refusal error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.refusal = refusal
	if refusal == nil {
		return
	}
	for _, r := range q.waiting {
		r.finish(0, refusal)
	}
	clear(q.waiting)
	q.waiting = q.waiting[:0]
}

// take moves what waits, at most a message full, to the end of to.
func (q *requestQueue) take(to []*request) []*request {
	q.mu.Lock()
	defer q.mu.Unlock()
	n, bytes := 0, 0
	for ; n < len(q.waiting); n++ {
		r := q.waiting[n]
		bytes += len(r.data) + 16
		if n > 0 && bytes > messageBytes {
			break
		}
		r.queued = false
		to = append(to, r)
	}
	rest := copy(q.waiting, q.waiting[n:])
	clear(q.waiting[rest:])
	q.waiting = q.waiting[:rest]
	if rest > 0 {
		q.signal()
	}
	return to
}

// cancel takes a request back, and reports whether that was possible: no link had taken it.
func (q *requestQueue) cancel(r *request) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !r.queued {
		return false
	}
	for i, w := range q.waiting {
		if w == r {
			q.waiting = append(q.waiting[:i], q.waiting[i+1:]...)
			return true
		}
	}
	return false // refused meanwhile; its result is there
}

// do sends a request and waits for its result, not longer than ctx.
func (q *requestQueue) do(ctx context.Context, r *request) (txn.LogIndex, error) {
	if err := q.push(r); err != nil {
		return 0, err
	}
	select {
	case res := <-r.done:
		return res.index, res.err
	case <-ctx.Done():
	}
	if q.cancel(r) {
		return 0, fmt.Errorf("%w: not sent: %w", txn.ErrNoQuorum, ctx.Err())
	}
	select {
	case res := <-r.done: // it came together with the end of ctx
		return res.index, res.err
	default:
		return 0, fmt.Errorf("%w: %w", txn.ErrOutcomeUnknown, ctx.Err())
	}
}
