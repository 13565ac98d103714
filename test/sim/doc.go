// Package sim runs the commit protocol of several nodes in one process and in simulated time (testing/synctest).
//
// Real are the coordinator, the certifier, the log's machine with its snapshots, and all of apply: its pipeline, workers,
// sessions, monitor and recovery, which talk to a fake PostgreSQL over the wire protocol. That server knows rows and
// their locks, transaction ids and their status, a WAL that a crash takes back to any point after the last flush, and the
// statements that a node sends. The log is a list; proposals to it are refused, lost, late or doubled, and sometimes
// nobody leads. A part of the transactions is large: their changes come in parts. What gateway, capture and package node do
// is imitated in a few lines each, DDL is left out, and Raft is not here at all: test/cluster and test/chaos have all of that.
//
// Sidecar, server, both, or the connections between them crash at named steps of a commit and of recovery. Each commit in
// each database must be what the log has next at that moment; in the end the rows of all nodes must be what the log says,
// and every answer to a client true. What the log says comes from a reference that compares every transaction with all
// others, and checks that each replaced the very values that its session saw.
//
// A run is drawn from a seed. A failing one prints it with its trace:
//
//	go test ./test/sim -run TestSeeds -seed 42
//	make sim SIM=10m
//
// Goroutines that are awake at the same moment of simulated time run in an order that Go chooses, so once in a while a run
// must be repeated to be the same.
package sim
