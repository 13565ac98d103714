package node

import (
	"sync"

	"github.com/quorate/quorate/internal/config"
)

// identity is what the data directory remembers, kept in step with what becomes of the node.
type identity struct {
	dir string

	changing sync.Mutex
	mu       sync.Mutex // never held while something is written: who only reads must not wait for a disk
	now      config.Identity
}

// get returns what the caller must not change where it is shared: the elements of slices.
func (i *identity) get() config.Identity {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.now
}

// change is on disk before anybody sees it.
func (i *identity) change(f func(*config.Identity)) error {
	i.changing.Lock()
	defer i.changing.Unlock()
	next := i.get()
	f(&next)
	if err := next.Save(i.dir); err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.now = next
	return nil
}

func (i *identity) joining() bool { return i.get().State == config.StateJoining }
