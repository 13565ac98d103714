package consensus

import (
	"bytes"
	"errors"
	"io"
	"runtime"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"pgregory.net/rapid"
)

func newZeros(n int) io.Reader { return bytes.NewReader(make([]byte, n)) }

// hangingStore is a real in-memory log store whose appends can be made to wait.
type hangingStore struct {
	*raft.InmemStore
	hang chan struct{} // if not nil, StoreLogs waits until it is closed
	fail error
}

func (s *hangingStore) StoreLogs(logs []*raft.Log) error {
	if s.hang != nil {
		<-s.hang
	}
	if s.fail != nil {
		return s.fail
	}
	// InmemStore, unlike the real ones, takes anything.
	if last, err := s.LastIndex(); err != nil || last > 0 && logs[0].Index != last+1 {
		return errors.New("not in sequence")
	}
	return s.InmemStore.StoreLogs(logs)
}

func (s *hangingStore) Close() error { return nil }

func logsFrom(index, term uint64, n int) []*raft.Log {
	var logs []*raft.Log
	for i := range n {
		logs = append(logs, &raft.Log{Index: index + uint64(i), Term: term, Data: []byte{byte(i)}})
	}
	return logs
}

func closeLater(t *testing.T, s io.Closer) {
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		requireNoGoroutines(t)
	})
}

// What a late append stored is gone before the next one, which Raft places at the same indexes.
func TestDeadlineStoreRemovesLateAppend(t *testing.T) {
	inner := &hangingStore{InmemStore: raft.NewInmemStore()}
	s := newDeadlineStore(inner, 50*time.Millisecond)
	closeLater(t, s)
	if err := s.StoreLogs(logsFrom(1, 1, 3)); err != nil {
		t.Fatal(err)
	}
	hang := make(chan struct{})
	inner.hang = hang
	if err := s.StoreLogs(logsFrom(4, 1, 3)); !errors.Is(err, errWriteDeadline) {
		t.Fatalf("hanging append: %v", err)
	}
	if err := s.StoreLogs(logsFrom(4, 2, 1)); !errors.Is(err, errWriteDeadline) {
		t.Fatalf("append behind a hanging one: %v", err)
	}
	if err := s.DeleteRange(3, 3); !errors.Is(err, errWriteDeadline) {
		t.Fatalf("truncation behind a hanging append: %v", err)
	}
	close(hang) // the late one lands: 4, 5, 6
	var l raft.Log
	for err := inner.GetLog(4, &l); err != nil; err = inner.GetLog(4, &l) {
		runtime.Gosched()
	}
	// To find it would be to believe that what comes next may follow it.
	if err := s.GetLog(4, &l); !errors.Is(err, raft.ErrLogNotFound) {
		t.Errorf("entry 4, whose append has failed: %v", err)
	}
	if err := s.GetLog(3, &l); err != nil {
		t.Errorf("entry 3: %v", err)
	}
	if err := s.StoreLogs(logsFrom(4, 2, 1)); err != nil {
		t.Fatal(err)
	}
	if last, err := s.LastIndex(); err != nil || last != 4 {
		t.Errorf("last index %d, %v", last, err)
	}
	if err := s.GetLog(4, &l); err != nil || l.Term != 2 {
		t.Errorf("entry 4 is of term %d: %v", l.Term, err)
	}
}

func TestDeadlineStoreLateFailure(t *testing.T) {
	inner := &hangingStore{InmemStore: raft.NewInmemStore()}
	s := newDeadlineStore(inner, 50*time.Millisecond)
	closeLater(t, s)
	hang := make(chan struct{})
	inner.hang, inner.fail = hang, errors.New("disk is gone")
	if err := s.StoreLogs(logsFrom(1, 1, 2)); !errors.Is(err, errWriteDeadline) {
		t.Fatalf("hanging append: %v", err)
	}
	close(hang)
	if err := s.StoreLogs(logsFrom(1, 2, 1)); !errors.Is(err, inner.fail) {
		t.Errorf("append to a broken disk: %v", err)
	}
}

// A compaction that hangs must not take the deadline away from appends.
func TestDeadlineStoreBesideHangingCompaction(t *testing.T) {
	inner := &lockedStore{hangingStore: hangingStore{InmemStore: raft.NewInmemStore()}, held: make(chan struct{}), release: make(chan struct{})}
	s := newDeadlineStore(inner, 50*time.Millisecond)
	closeLater(t, s)
	if err := s.StoreLogs(logsFrom(1, 1, 3)); err != nil {
		t.Fatal(err)
	}
	compacted := make(chan error, 1)
	go func() { compacted <- s.DeleteRange(1, 2) }()
	<-inner.held
	inner.hang = inner.release
	if err := s.StoreLogs(logsFrom(4, 1, 1)); !errors.Is(err, errWriteDeadline) {
		t.Errorf("append: %v", err)
	}
	close(inner.release)
	if err := <-compacted; err != nil {
		t.Error(err)
	}
}

type lockedStore struct {
	hangingStore
	held, release chan struct{}
}

func (s *lockedStore) DeleteRange(min, max uint64) error {
	if min == 1 {
		close(s.held)
		<-s.release
	}
	return s.InmemStore.DeleteRange(min, max)
}

// The cache never answers otherwise than the store behind it.
func TestLogCacheAgreesWithStore(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		inner := raft.NewInmemStore()
		var told uint64
		c := newLogCache(inner, func(index, _ uint64) { told = index })
		next, term := uint64(1), uint64(1)
		t.Repeat(map[string]func(*rapid.T){
			"append": func(t *rapid.T) {
				n := rapid.IntRange(1, 3*cacheEntries/2).Draw(t, "n")
				size := rapid.SampledFrom([]int{1, 100, cacheBytes / 64}).Draw(t, "size")
				if size > 100 {
					n = min(n, 100)
				}
				data := make([]byte, size) // shared: only its length matters here
				var logs []*raft.Log
				for range n {
					logs = append(logs, &raft.Log{Index: next, Term: term, Data: data})
					next++
				}
				if err := c.StoreLogs(logs); err != nil || told != next-1 {
					t.Fatal(err, told)
				}
			},
			"truncate suffix": func(t *rapid.T) {
				from := rapid.Uint64Range(1, next).Draw(t, "from")
				if from < next {
					if err := c.DeleteRange(from, next-1); err != nil {
						t.Fatal(err)
					}
				}
				next = from
				term++
			},
			"": func(t *rapid.T) {
				for _, index := range []uint64{1, next / 2, next - min(next, 1), next, next + cacheEntries, rapid.Uint64Range(0, next+1).Draw(t, "probe")} {
					var cached, stored raft.Log
					errCached, errStored := c.GetLog(index, &cached), inner.GetLog(index, &stored)
					if errCached != errStored || errStored == nil && (cached.Index != stored.Index || cached.Term != stored.Term) {
						t.Fatalf("index %d: cache has %d of term %d (%v), store %d of term %d (%v)", index,
							cached.Index, cached.Term, errCached, stored.Index, stored.Term, errStored)
					}
				}
				if c.bytes > cacheBytes || c.bytes < 0 {
					t.Fatalf("cache holds %d bytes", c.bytes)
				}
			},
		})
	})
}
