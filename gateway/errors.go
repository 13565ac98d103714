package gateway

import (
	"cmp"
	"fmt"
	"strconv"
	"unicode/utf8"

	"github.com/quorate/quorate/gateway/sqllex"
	"github.com/quorate/quorate/txn"
)

// SQLSTATEs that the gateway looks for or sends.
const (
	codeReadOnly           = "25006" // read_only_sql_transaction
	codeInFailed           = "25P02" // in_failed_sql_transaction
	codeWarning            = "01000" // warning
	codeCannotChange       = "55P02" // cant_change_runtime_param
	codeNoActive           = "25P01" // no_active_sql_transaction
	codeActive             = "25001" // active_sql_transaction
	codeNoStatement        = "26000" // invalid_sql_statement_name
	codeDuplicateStatement = "42P05" // duplicate_prepared_statement
	codeCanceled           = "57014" // query_canceled
	codeSerialization      = "40001"
	codeUnsupported        = "0A000"
	codeUnknownOutcome     = "08007"
	codeProtocol           = "08P01"
	codeShutdown           = "57P01"
	codeCannotConnect      = "57P03"
	codeTooMany            = "53300"
	codeConnectionFailed   = "08006"
	codeTooLarge           = "54000"
	codeAuthorization      = "28000" // invalid_authorization_specification
	codeResources          = "53000" // insufficient_resources
	codeInternal           = "XX000"
)

// sqlError is an error as a client sees it.
type sqlError struct {
	severity string // "" is ERROR
	code     string
	message  string
	detail   string
	hint     string
}

// Error makes sqlError an error, for logs.
func (e *sqlError) Error() string { return e.message + " (SQLSTATE " + e.code + ")" }

// append appends the ErrorResponse.
func (e *sqlError) append(b []byte) []byte { return e.appendAs(b, 'E') }

func (e *sqlError) appendAs(b []byte, typ byte) []byte {
	severity := e.severity
	if severity == "" {
		severity = "ERROR"
	}
	b, at := begin(b, typ)
	for _, f := range [...]struct {
		field byte
		value string
	}{{'S', severity}, {'V', severity}, {'C', e.code}, {'M', e.message}, {'D', e.detail}, {'H', e.hint}} {
		if f.value != "" {
			b = appendCString(append(b, f.field), f.value)
		}
	}
	return end(append(b, 0), at)
}

const retryHint = "The transaction might succeed if retried."

// The errors that do not depend on a statement's kind.
var (
	errNoQuorum = &sqlError{code: codeReadOnly, message: "cannot commit: no quorum",
		detail: "This node cannot reach a majority of the cluster, so nothing was changed.",
		hint:   "Connect to a node with quorum, or retry when it is back."}
	errCutOff = &sqlError{severity: "FATAL", code: codeCannotConnect,
		message: "terminating connection: no quorum",
		detail:  "This node cannot reach a majority of the cluster, and what can be read here may be too old by now.",
		hint:    "Connect to another node."}
	errBehind = &sqlError{severity: "FATAL", code: codeCannotConnect,
		message: "terminating connection: this node is behind the others",
		detail:  "Its PostgreSQL cannot keep up with what the cluster commits, and the other nodes do not wait for it any more.",
		hint:    "Connect to another node."}
	errShutdown = &sqlError{severity: "FATAL", code: codeShutdown,
		message: "terminating connection: the gateway is shutting down"}
	errServerLost = &sqlError{severity: "FATAL", code: codeConnectionFailed,
		message: "the node's PostgreSQL server has closed the connection"}
	errTooMany = &sqlError{severity: "FATAL", code: codeTooMany, message: "sorry, too many clients already",
		hint: "Raise the gateway's limit on connections, or use a connection pool."}
	errNoUser      = &sqlError{severity: "FATAL", code: codeAuthorization, message: "no user name specified in startup packet"}
	errReplication = &sqlError{severity: "FATAL", code: codeUnsupported,
		message: "replication connections are not supported through the gateway",
		hint:    "Connect to the node's PostgreSQL server itself."}
	errFunctionCall = &sqlError{code: codeUnsupported, message: "the function call protocol is not supported",
		hint: "Call the function with SELECT."}
	errEncoding = &sqlError{severity: "FATAL", code: codeUnsupported,
		message: "this client encoding is not supported through the gateway",
		detail:  "In it a byte of a character may look like a backslash, so the end of a string cannot be told.",
		hint:    "Use UTF8 or a single-byte encoding."}
	errSavepointOutside = &sqlError{code: codeNoActive, message: "SAVEPOINT can only be used in transaction blocks"}
	errNoBegin          = &sqlError{code: codeSerialization, message: "the transaction could not be begun", hint: retryHint}
	errForgotten        = &sqlError{code: codeSerialization, message: "a function has deallocated the gateway's prepared statements",
		hint: retryHint}
	errIsolation   = refusals[sqllex.Serializable]
	errReplicaRole = refusals[sqllex.ReplicationRole]

	errShared = &sqlError{code: codeUnsupported,
		message: "cannot commit: the transaction has changed what is not replicated",
		detail:  "A function, DO or EXECUTE in it has changed a role, membership or settings of roles, a database, a tablespace, a subscription, an event trigger or a large object.",
		hint:    hintEveryNode}
)

// warnNoTransaction is PostgreSQL's answer to COMMIT or ROLLBACK outside a block.
var warnNoTransaction = &sqlError{severity: "WARNING", code: codeNoActive, message: "there is no transaction in progress"}

func evictedError(by txn.CSN) *sqlError {
	return &sqlError{code: codeSerialization,
		message: "could not serialize access: transaction was aborted by replicated transaction " + strconv.FormatUint(uint64(by), 10),
		detail:  "It held a lock that an already committed transaction from another node needed.",
		hint:    retryHint}
}

// abortError is what the client gets for a verdict.
func abortError(ev txn.Event) *sqlError {
	switch ev.Reason {
	case txn.AbortNoQuorum:
		return errNoQuorum
	case txn.AbortBehind: // it passes, and drivers know what to do
		return &sqlError{code: codeSerialization, message: "cannot commit: a PostgreSQL server of the cluster is behind",
			detail: "This node's server, or another active node's, still has to apply what was committed before. Nothing was changed.",
			hint:   retryHint}
	case txn.AbortConflict:
		return &sqlError{code: codeSerialization,
			message: "could not serialize access due to concurrent update on another node",
			detail:  "It conflicts with replicated transaction " + strconv.FormatUint(uint64(ev.With), 10) + ".",
			hint:    retryHint}
	case txn.AbortCapture: // no serialization failure: whoever retries those would try for ever
		return &sqlError{code: codeResources, message: "cannot commit: the changes of the transaction could not be read from the server",
			detail: "Nothing was changed.",
			hint:   "The node's log says why: a full spill directory, perhaps, or a value too large to replicate."}
	case txn.AbortHorizon:
		return &sqlError{code: codeSerialization,
			message: "could not serialize access: the transaction is too old to be certified",
			hint:    "Keep transactions shorter, then retry."}
	default:
		return &sqlError{code: codeSerialization,
			message: "could not serialize access: transaction was aborted (" + ev.Reason.String() + ")", hint: retryHint}
	}
}

func unknownError(gid txn.GID) *sqlError {
	return &sqlError{severity: "FATAL", code: codeUnknownOutcome,
		message: "commit outcome unknown for transaction " + gid.String(),
		detail:  "It may have been committed, or may still be.",
		hint:    "Ask for the outcome by this identifier before retrying."}
}

func visibleError(gid txn.GID) *sqlError {
	return &sqlError{severity: "FATAL", code: codeShutdown,
		message: "terminating connection: transaction " + gid.String() + " was committed from the log",
		detail:  "Its session was rolled back, or its server lost, before its turn came; settings, temporary tables and cursors are gone.",
		hint:    "Reconnect. Do not repeat the transaction: it is committed."}
}

// noQuorumError is the server's refusal to write in a transaction that is read only for lack of quorum.
func noQuorumError(refusal string) *sqlError {
	return &sqlError{code: codeReadOnly, message: refusal + ": no quorum", detail: errNoQuorum.detail, hint: errNoQuorum.hint}
}

func databaseError(name, only string) *sqlError {
	return &sqlError{severity: "FATAL", code: codeUnsupported,
		message: fmt.Sprintf("database %q is not served by this cluster", name),
		hint:    fmt.Sprintf("Connect to database %q.", only)}
}

// hintEveryNode: a session of the server itself is read only until it says otherwise.
const hintEveryNode = "Do it on every node's PostgreSQL server itself, in the same way, after SET default_transaction_read_only = off."

// refusals has an error for every sqllex.Refusal.
var refusals = map[sqllex.Refusal]*sqlError{
	sqllex.Serializable: {message: "isolation level SERIALIZABLE is not supported",
		detail: "Serializable snapshot isolation works within one server only.",
		hint:   "Use REPEATABLE READ, which detects write conflicts across all nodes."},
	sqllex.TwoPhase: {message: "two-phase commit by clients is not supported",
		hint: "COMMIT itself is atomic on all nodes."},
	sqllex.ConcurrentIndex: {message: "CONCURRENTLY is not supported for replicated definitions",
		hint: "Leave out CONCURRENTLY."},
	sqllex.DatabaseDDL: {message: "definitions and rights of databases are not replicated",
		hint: "The cluster replicates one database."},
	sqllex.TablespaceDDL: {message: "tablespaces are not replicated",
		hint: hintEveryNode},
	sqllex.RoleDDL: {message: "roles and membership in them are not replicated yet",
		hint: hintEveryNode},
	sqllex.SharedComment: {message: "comments and labels on objects shared by all databases are not replicated",
		hint: hintEveryNode},
	sqllex.AlterSystem: {message: "the server's configuration is not replicated",
		hint: "Do it on each node's PostgreSQL server itself."},
	sqllex.Subscription: {message: "subscriptions are not supported",
		detail: "What they apply would be committed on one node only."},
	sqllex.OwnPublication: {message: "publication \"quorate\" belongs to the cluster"},
	sqllex.EventTrigger: {message: "event triggers are not replicated",
		hint: hintEveryNode},
	sqllex.LargeObject: {message: "large objects are not replicated", hint: "Use a bytea column."},
	sqllex.CatalogLock: {message: "locking a system catalog is not supported",
		detail: "It could stop replication."},
	sqllex.ReplicationRole: {message: "session_replication_role cannot be set through the gateway",
		detail: "Definitions made in that mode would not be replicated."},
	sqllex.ExplainedCreation: {message: "EXPLAIN ANALYZE cannot create a table",
		detail: "No event trigger would see it.", hint: "Create the table, or EXPLAIN the query alone."},
	sqllex.OwnSetting: {code: codeCannotChange, message: "settings of quorate tell about the node and cannot be changed"},
	sqllex.OwnSchema:  {message: "schema \"quorate\" belongs to the node and is not replicated"},
}

func init() {
	for _, e := range refusals {
		e.code = cmp.Or(e.code, codeUnsupported)
	}
}

// shiftPosition returns an ErrorResponse whose positions in the statement are moved by n characters.
func shiftPosition(m []byte, n int) []byte {
	value := errorField(m[5:], 'P')
	pos, err := strconv.Atoi(string(value))
	if err != nil || n == 0 {
		return m
	}
	out, at := begin(nil, m[0])
	for body := m[5:]; len(body) > 0 && body[0] != 0; {
		field := body[0]
		value, rest, ok := cstring(body[1:])
		if !ok {
			return m
		}
		if field == 'P' {
			value = strconv.AppendInt(nil, int64(pos+n), 10)
		}
		out = append(append(append(out, field), value...), 0)
		body = rest
	}
	return end(append(out, 0), at)
}

func runes(b []byte) int { return utf8.RuneCount(b) }
