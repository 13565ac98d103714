// Package reload keeps what was read from files up to date, without being told: whoever uses it has the files looked at.
package reload

import (
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/quorate/quorate/internal/logkey"
)

// Interval is how often files are looked at, at most.
const Interval = time.Second

// Value is what was read last. Files that cannot be used when they have changed are logged, once, and leave it as it
// was: a slip of the pen must not cut off a node that runs. Its methods may be called from any goroutine.
type Value[T any] struct {
	files []string // "" is none
	load  func() (T, error)
	log   *slog.Logger
	now   func() time.Time

	mu      sync.Mutex
	checked time.Time // when the files were last looked at
	stamps  []os.FileInfo
	current T
}

// Open reads the files for the first time. load reads them all and makes the value; its first error is returned as it is.
// now is the clock by which Interval passes, time.Now in most cases.
func Open[T any](load func() (T, error), log *slog.Logger, now func() time.Time, files ...string) (*Value[T], error) {
	v := &Value[T]{files: files, load: load, log: log, now: now, checked: now()}
	v.stamps = v.look() // before reading: what changes meanwhile is read once more
	var err error
	v.current, err = load()
	return v, err
}

// look returns what tells files that have changed from those that have not; nil is one that cannot be looked at.
func (v *Value[T]) look() []os.FileInfo {
	stamps := make([]os.FileInfo, len(v.files))
	for i, name := range v.files {
		if name == "" {
			continue
		}
		if info, err := os.Stat(name); err == nil { // otherwise load says why
			stamps[i] = info
		}
	}
	return stamps
}

func same(a, b os.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	// What was renamed into place is another file, even with the size and the time of the old one.
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size() && a.Mode() == b.Mode()
}

// Get returns the value as of now.
func (v *Value[T]) Get() T {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := v.now()
	if passed := now.Sub(v.checked); passed >= 0 && passed < Interval {
		return v.current
	}
	v.checked = now
	stamps, changed := v.look(), false
	for i := range stamps {
		changed = changed || !same(stamps[i], v.stamps[i])
	}
	if !changed {
		return v.current
	}
	v.stamps = stamps
	fresh, err := v.load()
	if err != nil {
		v.log.Error("changed files cannot be used: what was read before stays", logkey.Error, err)
		return v.current
	}
	v.current = fresh
	return fresh
}
