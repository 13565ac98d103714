// Package clone copies the PostgreSQL of one node to another while everybody goes on writing: the donor serves a base
// backup and the write-ahead log that belongs to it over one gRPC stream, and the receiver makes a data directory of it that
// recovers to exactly one place in the order of transactions. DESIGN.md beside this file tells how and why.
package clone

import (
	"errors"
	"fmt"
	"time"

	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// protocol is the version of the stream.
const protocol = 1

// prefix begins the names of replication slots and restore points.
const prefix = "quorate_clone_"

// Facts is what a data directory and the programs that run on it must have in common.
type Facts struct {
	Version      int    // server_version_num; the major version counts
	Architecture string // as Go names it
	// BlockSize and WALBlockSize are in bytes. Distributions leave them alone.
	BlockSize    int
	WALBlockSize int
}

// ErrUnfit: the donor's data cannot be used at the other node, however often it is tried.
var ErrUnfit = errors.New("the donor cannot be cloned here")

// check returns an error that wraps ErrUnfit and names both if a node's programs cannot run on the donor's data.
func (f Facts) check(node, donor txn.NodeID, theirs Facts) error {
	for _, c := range []struct {
		what        string
		mine, other any
		differ      bool
		hint        string
	}{
		{"PostgreSQL", major(f.Version), major(theirs.Version), f.Version/10000 != theirs.Version/10000, "a copy needs the same major version"},
		{"architecture", f.Architecture, theirs.Architecture, f.Architecture != theirs.Architecture, "a copy needs the same architecture"},
		{"block size", f.BlockSize, theirs.BlockSize, f.BlockSize != theirs.BlockSize, "a copy needs programs that were built with the same block size"},
		{"WAL block size", f.WALBlockSize, theirs.WALBlockSize, f.WALBlockSize != theirs.WALBlockSize, "a copy needs programs that were built with the same WAL block size"},
	} {
		if c.differ {
			return fmt.Errorf("%w: node %s has %s %v, the donor, node %s, has %v: %s", ErrUnfit, node, c.what, c.mine, donor, c.other, c.hint)
		}
	}
	return nil
}

func major(version int) string {
	return fmt.Sprintf("%d (%d.%d)", version/10000, version/10000, version%10000)
}

func (f Facts) encode() *pb.ServerFacts {
	return &pb.ServerFacts{
		Version: uint32(f.Version), Architecture: f.Architecture, BlockSize: uint32(f.BlockSize), WalBlockSize: uint32(f.WALBlockSize),
	}
}

func decodeFacts(f *pb.ServerFacts) Facts {
	return Facts{
		Version: int(f.GetVersion()), Architecture: f.GetArchitecture(), BlockSize: int(f.GetBlockSize()), WALBlockSize: int(f.GetWalBlockSize()),
	}
}

// Phase is what a clone is doing.
type Phase string

// The phases, in order.
const (
	PhaseCheckpoint Phase = "checkpoint" // the donor's, with which the copy begins
	PhaseCopy       Phase = "copy"
	PhaseLog        Phase = "log"     // write-ahead log up to the place where the copy will end
	PhaseFlush      Phase = "flush"   // of what was written to disk
	PhaseRecover    Phase = "recover" // PostgreSQL brings the copy to that place
)

// Progress is how far a clone is.
type Progress struct {
	Donor   txn.NodeID
	Phase   Phase
	Bytes   uint64 // of the data directory, received
	Total   uint64 // estimated when the copy began
	WAL     uint64 // bytes of write-ahead log received
	Started time.Time
	Copying time.Time // when the first byte came; zero before
}

// Rate returns bytes per second, write-ahead log included, on average so far.
func (p Progress) Rate(now time.Time) float64 {
	took := now.Sub(p.Copying).Seconds()
	if p.Copying.IsZero() || took <= 0 {
		return 0
	}
	return float64(p.Bytes+p.WAL) / took
}

// ETA returns how long copying the files will still take at the present rate, and whether that is known.
func (p Progress) ETA(now time.Time) (time.Duration, bool) {
	took := now.Sub(p.Copying)
	if p.Copying.IsZero() || p.Bytes == 0 || p.Phase != PhaseCopy {
		return 0, false
	}
	left := float64(p.Total-min(p.Total, p.Bytes)) / float64(p.Bytes)
	return time.Duration(left * float64(took)), true
}
