// Package logkey names the keys of structured log records, so that one search finds a node, a transaction or an
// index through every component.
package logkey

// The keys.
const (
	Component = "component"
	Node      = "node"
	GID       = "gid"
	CSN       = "csn"
	Index     = "index"
	Term      = "term"
	LSN       = "lsn"
	XID       = "xid"
	Database  = "database"
	PID       = "pid"
	Client    = "client"
	Address   = "address"
	Path      = "path"
	Duration  = "duration"
	Reason    = "reason"
	SQLState  = "sqlstate"
	Error     = "error"
)
