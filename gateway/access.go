package gateway

// Access is what the node's place in the cluster lets clients do.
type Access uint8

const (
	// ReadWrite: everything.
	ReadWrite Access = iota
	// ReadOnly: the node has no quorum. Transactions that begin now are read only, and those that have written cannot
	// commit.
	ReadOnly
	// NoAccess: nor may anything be read. Who connects is turned away by Config.Accepting; a session ends at its next
	// statement, but COMMIT and ROLLBACK are still answered.
	NoAccess
	// Behind: the same, because the node lags so far behind the others that they do not wait for it any more.
	Behind
)

func (g *Gateway) access() Access {
	if g.cfg.Access == nil {
		return ReadWrite
	}
	return g.cfg.Access()
}

// beginsReadOnly is asked whenever a transaction begins, be it that of a single statement: it is read only if the
// client wishes so or the node has no quorum. PostgreSQL itself then refuses what writes.
func (s *session) beginsReadOnly() bool {
	wish := s.wish.Load()
	fenced := !wish && s.g.access() != ReadWrite
	s.fenced.Store(fenced)
	return wish || fenced
}

// serve is called before anything is given to the server that may read. Its error ends the session, with a code by
// which connection pools give up a connection and drivers try another host: nothing else would get them away from
// this node.
func (s *session) serve() error {
	var why *sqlError
	switch s.g.access() {
	case NoAccess:
		why = errCutOff
	case Behind:
		why = errBehind
	default:
		return nil
	}
	s.g.metrics.refused.WithLabelValues(why.code).Inc()
	return s.finish(why)
}

// reportLocked tells the client whether its transactions are read only, if that is not what it was last told: drivers
// go by it when they look for a node that can write. Call with cmu held.
func (s *session) reportLocked() {
	readOnly := s.wish.Load() || s.g.access() != ReadWrite
	if readOnly != s.reported {
		s.reported = readOnly
		s.toClient.buf = appendParameter(s.toClient.buf, "default_transaction_read_only", onOff(readOnly))
	}
}

// appendReadyLocked appends ReadyForQuery, and before it what the client should know by then. Call with cmu held.
func (s *session) appendReadyLocked(status byte) {
	s.reportLocked()
	s.toClient.buf = appendReady(s.toClient.buf, status)
}
