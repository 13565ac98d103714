package pg

// The prefixes of Quorate's own logical messages.
const (
	// PrefixSeal: transactional, a txn.Seal; the last change of a transaction that is to be committed.
	PrefixSeal = "quorate.seal"
	// PrefixMarker: not transactional, flushed, "<seal> <xid> <base> <seen>"; that transaction is ready to be decided.
	PrefixMarker = "quorate.marker"
	// PrefixDDL: transactional, a DDL in JSON.
	PrefixDDL = "quorate.ddl"
)

// DDL is the content of a PrefixDDL message, which function quorate.emit_ddl writes: a statement that peers repeat at
// its place in the transaction.
type DDL struct {
	// XID is the subtransaction, or transaction, in which the statement ran: messages are decoded under the top-level
	// transaction, and with that one it is undone. 0 means that it is not known.
	XID uint32 `json:"xid"`
	// Token proves that the message is the event trigger's; see Install.
	Token string `json:"token"`
	// SQL is what to run.
	SQL        string            `json:"sql"`
	Tag        string            `json:"tag"` // PostgreSQL's command tag
	SearchPath string            `json:"search_path"`
	Role       string            `json:"role"`
	Settings   map[string]string `json:"settings"`
	// Tables are the tables that the statement concerns, as schema and name; nil if that may be any.
	Tables *[][2]string `json:"tables"`
	// Creates is the oid (at the origin) of the table that SQL creates, if rows of it may come before this message: CREATE TABLE
	// AS has an event trigger only at its end. SQL goes before the first of them.
	Creates uint32 `json:"creates"`
}
