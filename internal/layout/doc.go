// Package layout holds the rules of how this repository is laid out, as tests: which package may import which, and
// what must not appear anywhere. It has no other contents.
package layout
