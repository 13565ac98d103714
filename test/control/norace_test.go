//go:build !race

package control

const withRace = false
