package node

import (
	"errors"
	"sync"

	"github.com/quorate/quorate/internal/config"
)

// identity is what the data directory remembers, kept in step with what becomes of the node.
type identity struct {
	dir string

	changing sync.Mutex
	handed   bool       // over, to the node that this one goes on as; guarded by changing
	mu       sync.Mutex // never held while something is written: who only reads must not wait for a disk
	now      config.Identity
}

// get returns what the caller must not change where it is shared: the elements of slices.
func (i *identity) get() config.Identity {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.now
}

// errHandedOver: what the data directory remembers is another node's by now.
var errHandedOver = errors.New("the data directory belongs to the node that this one goes on as")

// change is on disk before anybody sees it. Once the identity was handed over an error is all that comes of it.
func (i *identity) change(f func(*config.Identity)) error {
	i.changing.Lock()
	defer i.changing.Unlock()
	return i.write(f)
}

// handOver is the last change: from then on the identity is that of the node that this one goes on as when it is opened
// again. What this one still does until then, to its PostgreSQL or with its log, is not that node's.
func (i *identity) handOver(f func(*config.Identity)) error {
	i.changing.Lock()
	defer i.changing.Unlock()
	err := i.write(f)
	i.handed = i.handed || err == nil
	return err
}

// write is called with changing held.
func (i *identity) write(f func(*config.Identity)) error {
	if i.handed {
		return errHandedOver
	}
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
