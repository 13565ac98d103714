//go:build race

package cluster_test

// withRace: a test that looks for races wants them found in the product too.
const withRace = true
