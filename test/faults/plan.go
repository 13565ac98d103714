// Package faults breaks clusters: a plan, made from a seed, says what breaks when and for how long, and an Injector does
// it to real processes and to the network between them, and mends it.
package faults

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// Kind is what breaks.
type Kind string

// Faults of processes. What was killed or stopped is started again at the end of the fault.
const (
	PostgresKilled Kind = "postgres-killed" // SIGKILL of the postmaster; the sidecar starts it again
	BackendKilled  Kind = "backend-killed"  // SIGKILL of one server process, which makes PostgreSQL start all anew
	SidecarKilled  Kind = "sidecar-killed"
	SidecarStopped Kind = "sidecar-stopped" // SIGTERM, as in an upgrade; PostgreSQL goes with it
	NodeKilled     Kind = "node-killed"     // sidecar and PostgreSQL, in either order
	AllKilled      Kind = "all-killed"      // all nodes, started again in any order
	SidecarFrozen  Kind = "sidecar-frozen"  // SIGSTOP
	PostgresFrozen Kind = "postgres-frozen" // SIGSTOP of all its processes
	NodeFrozen     Kind = "node-frozen"     // both
	SessionsEnded  Kind = "sessions-ended"  // pg_terminate_backend of some sessions, again and again
)

// Faults of the network between nodes; clients go on to reach every node.
const (
	Isolated Kind = "isolated" // one node and all others do not hear each other
	Deaf     Kind = "deaf"     // one node hears nobody, and is heard
	Mute     Kind = "mute"     // one node is not heard, and hears
	Partial  Kind = "partial"  // two nodes do not hear each other, and both hear the third
	Lossy    Kind = "lossy"    // packets of one node, in and out, get lost
	Slow     Kind = "slow"     // everything to and from one node takes longer
	Severed  Kind = "severed"  // no two nodes hear each other
)

// OnProcesses and OnNetwork are all kinds.
var (
	OnProcesses = []Kind{PostgresKilled, BackendKilled, SidecarKilled, SidecarStopped, NodeKilled, AllKilled,
		SidecarFrozen, PostgresFrozen, NodeFrozen, SessionsEnded}
	OnNetwork = []Kind{Isolated, Deaf, Mute, Partial, Lossy, Slow, Severed}
)

// Role is whom a fault hits, as of when it begins.
type Role string

const (
	Leader   Role = "leader"
	Follower Role = "follower"
)

// Fault is one entry of a plan.
type Fault struct {
	Kind Kind
	Role Role          // of the node that is hit, if it is one
	At   time.Duration // when it begins, from the beginning of the plan
	For  time.Duration // until it is mended
	Seed uint64        // decides what is left open here: which follower, how slow
}

func (f Fault) String() string {
	return fmt.Sprintf("%v %s of %s for %v", f.At, f.Kind, f.Role, f.For)
}

// Times of a plan. Most faults are short, some are longer than whatever waits for a timeout; the next one may begin
// before the last one is mended.
const (
	firstFault = time.Second
	gapMean    = 1500 * time.Millisecond
	gapLeast   = 700 * time.Millisecond
	lastMean   = 2500 * time.Millisecond
	lastLeast  = 100 * time.Millisecond
	lastMost   = 15 * time.Second
)

// Plan returns the faults that begin within a time: always the same for the same arguments. Kinds are dealt like cards, so
// that none is forgotten.
func Plan(seed uint64, duration time.Duration, kinds []Kind) []Fault {
	random := rand.New(rand.NewPCG(seed, 0))
	var plan []Fault
	var deck []Kind
	for at := firstFault; at < duration; {
		if len(deck) == 0 {
			deck = slices.Clone(kinds)
			random.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		}
		f := Fault{Kind: deck[0], Role: Leader, At: at, Seed: random.Uint64()}
		deck = deck[1:]
		if random.IntN(2) == 0 {
			f.Role = Follower
		}
		f.For = min(lastLeast+exponential(random, lastMean), lastMost).Round(time.Millisecond)
		plan = append(plan, f)
		at += (gapLeast + exponential(random, gapMean)).Round(time.Millisecond)
	}
	return plan
}

// exponential draws a time with this mean; short ones are the most frequent.
func exponential(random *rand.Rand, mean time.Duration) time.Duration {
	return time.Duration(random.ExpFloat64() * float64(mean))
}
