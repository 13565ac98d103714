// Package cluster runs real clusters for tests and benchmarks: the quorate binary, real PostgreSQL servers, real
// processes. It knows a cluster only from outside, as its users do: the contract of "quorate demo" (ports,
// directories, the ready line, signals), the PostgreSQL wire protocol, and "quorate status". Nothing here imports
// the packages under test, so a test that passes says something about the product and not about its internals.
package cluster
