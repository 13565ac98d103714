package apply

import (
	"container/heap"
	"sync"
	"sync/atomic"

	"github.com/quorate/quorate/txn"
)

// deque is a queue in one slice.
type deque[T any] struct {
	elements []T
	head     int
}

func (q *deque[T]) len() int   { return len(q.elements) - q.head }
func (q *deque[T]) at(i int) T { return q.elements[q.head+i] }

func (q *deque[T]) first() (e T, ok bool) {
	if q.len() == 0 {
		return e, false
	}
	return q.elements[q.head], true
}

func (q *deque[T]) last() (e T, ok bool) {
	if q.len() == 0 {
		return e, false
	}
	return q.elements[len(q.elements)-1], true
}

func (q *deque[T]) push(e T) {
	if q.head > 0 && len(q.elements) == cap(q.elements) && q.head >= len(q.elements)/2 {
		n := copy(q.elements, q.elements[q.head:])
		clear(q.elements[n:])
		q.elements, q.head = q.elements[:n], 0
	}
	q.elements = append(q.elements, e)
}

func (q *deque[T]) pop() { q.remove(0) }

// remove takes out the i-th element; cheap for small i.
func (q *deque[T]) remove(i int) {
	var zero T
	copy(q.elements[q.head+1:q.head+i+1], q.elements[q.head:q.head+i])
	q.elements[q.head] = zero
	q.head++
	if q.head == len(q.elements) {
		q.elements, q.head = q.elements[:0], 0
	}
}

// waiters are those who wait for a CSN to become visible.
type waiters struct {
	some atomic.Int64 // how many, so that wake costs nothing when there are none
	mu   sync.Mutex
	heap waiterHeap
}

type waiter struct {
	csn   txn.CSN
	woken chan struct{}
	place int // in the heap; -1: no longer there
}

// add registers a waiter. The caller must look at the applied CSN after it, and call forget in the end.
func (s *waiters) add(csn txn.CSN) (woken <-chan struct{}, forget func()) {
	w := &waiter{csn: csn, woken: make(chan struct{})}
	s.some.Add(1)
	s.mu.Lock()
	heap.Push(&s.heap, w)
	s.mu.Unlock()
	return w.woken, func() {
		s.mu.Lock()
		if w.place >= 0 {
			heap.Remove(&s.heap, w.place)
		}
		s.mu.Unlock()
		s.some.Add(-1)
	}
}

// wake wakes who waits for csn or less.
func (s *waiters) wake(csn txn.CSN) {
	if s.some.Load() == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.heap) > 0 && s.heap[0].csn <= csn {
		close(heap.Pop(&s.heap).(*waiter).woken)
	}
}

type waiterHeap []*waiter

func (h waiterHeap) Len() int           { return len(h) }
func (h waiterHeap) Less(i, j int) bool { return h[i].csn < h[j].csn }
func (h waiterHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].place, h[j].place = i, j
}
func (h *waiterHeap) Push(x any) {
	w := x.(*waiter)
	w.place = len(*h)
	*h = append(*h, w)
}
func (h *waiterHeap) Pop() any {
	old := *h
	w := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	w.place = -1
	return w
}
