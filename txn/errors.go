package txn

import "errors"

// The sentinels that cross package borders. Each is defined here and nowhere else; wrap them with verb and object.
var (
	// ErrBadGID: the text is not a GID.
	ErrBadGID = errors.New("malformed global transaction id")
	// ErrNoQuorum: no majority can be reached, so nothing can be ordered. Nothing was changed.
	ErrNoQuorum = errors.New("no quorum")
	// ErrOutcomeUnknown: the proposal was sent, and whether it is in the log is not known yet. Only the log decides.
	ErrOutcomeUnknown = errors.New("outcome unknown")
	// ErrDiverged: this node's data contradict the log. The node must stop, never skip.
	ErrDiverged = errors.New("node has diverged from the log")
	// ErrCorrupt: bytes that should have been written by Quorate were not, or were damaged.
	ErrCorrupt = errors.New("corrupt data")
	// ErrClosed: the component is shutting down.
	ErrClosed = errors.New("closed")
)
