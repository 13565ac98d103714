//go:build race

package sim

// raceEnabled: the race detector makes the scheduler choose at random.
const raceEnabled = true
