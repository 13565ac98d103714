package node

import (
	"sync"

	"github.com/quorate/quorate/internal/config"
)

// identity is what the data directory remembers, kept in step with what becomes of the node.
type identity struct {
	dir string

	mu  sync.Mutex
	now config.Identity
}

func (i *identity) get() config.Identity {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.now
}

// change is on disk before anybody sees it.
func (i *identity) change(f func(*config.Identity)) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	next := i.now
	f(&next)
	if err := next.Save(i.dir); err != nil {
		return err
	}
	i.now = next
	return nil
}

func (i *identity) joining() bool { return i.get().State == config.StateJoining }
