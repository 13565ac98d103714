package clone

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quorate/quorate/txn"
)

// markerFile, inside a data directory, says that it is a complete clone, and of what. Without it a directory in the making
// is worth nothing.
const markerFile = "quorate.clone"

// Marker is the content of a complete clone's marker.
type Marker struct {
	Node  txn.NodeID `json:"node"` // for whom it was made. IDs are never given out twice, so this tells one clone from another
	Donor txn.NodeID `json:"donor"`
	CSN   txn.CSN    `json:"csn"`
	// SetAside is where the data directory is that was there before, until the clone has proved itself; empty: none was.
	SetAside string    `json:"set_aside,omitempty"`
	Time     time.Time `json:"time"`
}

// Making returns the directory in which a clone for a data directory is made.
func Making(dataDir string) string { return dataDir + ".clone" }

// Read returns the marker of a data directory, false if there is none.
func Read(dir string) (m Marker, ok bool, err error) {
	text, err := os.ReadFile(filepath.Join(dir, markerFile))
	if errors.Is(err, fs.ErrNotExist) {
		return m, false, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &m)
	}
	if err != nil {
		return m, false, fmt.Errorf("read the marker of clone %s: %w", dir, err)
	}
	return m, true, nil
}

// Complete declares the directory in the making, whose server has been stopped, a complete clone.
func Complete(dataDir string, m Marker) error {
	if _, err := os.Lstat(dataDir); err == nil {
		m.SetAside = dataDir + ".set-aside-" + m.Time.UTC().Format("20060102T150405Z")
	}
	return write(Making(dataDir), m)
}

func write(dir string, m Marker) error {
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("write the marker of clone %s: %w", dir, err)
	}
	name := filepath.Join(dir, markerFile)
	if err := os.WriteFile(name+".new", append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("write the marker of clone %s: %w", dir, err)
	}
	if err := errors.Join(flush(name+".new"), os.Rename(name+".new", name), flush(dir)); err != nil {
		return fmt.Errorf("write the marker of clone %s: %w", dir, err)
	}
	return nil
}

// Install puts the complete clone in the place of the data directory, which is set aside. It reports false if there is no
// complete clone for this node. It can be interrupted anywhere and called again.
func Install(dataDir string, node txn.NodeID) (installed bool, err error) {
	making := Making(dataDir)
	m, ok, err := Read(making)
	if err != nil || !ok || m.Node != node {
		return false, err
	}
	if m.SetAside != "" {
		if err := os.Rename(dataDir, m.SetAside); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("set the old data directory aside: %w", err)
		}
	}
	if err := os.Rename(making, dataDir); err != nil {
		return false, fmt.Errorf("put the clone in its place: %w", err)
	}
	if err := flush(filepath.Dir(dataDir)); err != nil {
		return false, fmt.Errorf("put the clone in its place: %w", err)
	}
	return true, nil
}

// Replaceable returns an error if a data directory could not be exchanged for a clone: better before hours of copying.
func Replaceable(dataDir string) error {
	var own, above unix.Stat_t
	if err := unix.Stat(dataDir, &own); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("examine %s: %w", dataDir, err)
	}
	if err := unix.Stat(filepath.Dir(dataDir), &above); err != nil {
		return fmt.Errorf("examine %s: %w", filepath.Dir(dataDir), err)
	}
	if own.Dev != above.Dev {
		return fmt.Errorf("%w: %s is where a file system is mounted, so that a clone cannot be put in its place: configure a directory below it", ErrUnfit, dataDir)
	}
	return nil
}

// Discard removes what is there of a clone in the making. Nothing may run in it.
func Discard(dataDir string) error {
	if err := os.RemoveAll(Making(dataDir)); err != nil {
		return fmt.Errorf("remove an unfinished clone: %w", err)
	}
	return nil
}

// Forget removes the data directory that was set aside for the clone, which has proved itself. It returns its name, or
// nothing if there was none.
func Forget(dataDir string) (removed string, err error) {
	m, ok, err := Read(dataDir)
	if err != nil || !ok || m.SetAside == "" {
		return "", err
	}
	// The marker is a file in a directory that belongs to PostgreSQL's user: it names nothing else to be removed.
	if !setAside.MatchString(strings.TrimPrefix(m.SetAside, dataDir)) {
		return "", fmt.Errorf("remove the data directory that was set aside: %q is not the name of one", m.SetAside)
	}
	if err := os.RemoveAll(m.SetAside); err != nil {
		return "", fmt.Errorf("remove the data directory that was set aside: %w", err)
	}
	removed, m.SetAside = m.SetAside, ""
	return removed, write(dataDir, m)
}

var setAside = regexp.MustCompile(`^\.set-aside-\d{8}T\d{6}Z$`)
