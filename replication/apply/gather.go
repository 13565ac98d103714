package apply

import (
	"slices"

	"github.com/quorate/quorate/txn"
)

// Rows to be inserted are gathered by table and go out as statements of many rows, which cost a fraction of as many
// statements: a bulk load, and the log or history to which each transaction of a group adds a row.
//
// So a row may be inserted later than other tables' changes that followed it. In one transaction of a session whose
// session_replication_role is replica nothing sees that, since foreign keys are not checked, but triggers and rules that are
// enabled for replicas: a table that has some is touched row by row, in order. Whatever else happens to the same table
// comes after what was gathered for it.
//
// Of a statement of many rows only the server's message tells which row failed. Where it matters, because the failure
// is final, the transaction is executed once more, row by row: see worker.recover.

// statementRows are the numbers of rows that statements have; a few numbers, so that there are few statements to prepare.
var statementRows = [...]int{64, 16, 4, 1}

// maxParameters is how many a statement can have: their number is an Int16 in the protocol, without a sign.
const maxParameters = 65535

// gathered are a table's rows that have not been sent.
type gathered struct {
	rows   []gatheredRow
	values []column // of all rows, one after another
	bytes  int
}

type gatheredRow struct {
	csn     txn.CSN
	message []byte
}

// gather adds a row to what is inserted into r.
func (s *session) gather(r *relation, csn txn.CSN, message []byte, values []column) {
	if len(r.gathered.rows) == 0 {
		s.gathering = append(s.gathering, r)
	}
	r.gathered.rows = append(r.gathered.rows, gatheredRow{csn, message})
	r.gathered.values = append(r.gathered.values, values...)
	r.gathered.bytes += len(message)
	if r.ordered || s.ordered || len(r.gathered.rows) == statementRows[0] || r.gathered.bytes >= batchBytes {
		s.insert(r)
	}
}

// settle sends what has to come before a change of r: what was gathered for the table, under whatever description, or
// for any table if r has triggers that may look at them.
func (s *session) settle(r *relation, inserts bool) {
	for i := 0; i < len(s.gathering); {
		g := s.gathering[i]
		if r.ordered || g == r && !inserts || g != r && g.name == r.name && g.schema == r.schema {
			s.insert(g)
		} else {
			i++
		}
	}
}

// insertAll sends all that was gathered.
func (s *session) insertAll() {
	for len(s.gathering) > 0 {
		s.insert(s.gathering[0])
	}
}

// insert adds what was gathered for r to the batch.
func (s *session) insert(r *relation) {
	columns, rows, values := len(r.columns), r.gathered.rows, r.gathered.values
	for len(rows) > 0 {
		n := 1
		for _, size := range statementRows {
			if size <= len(rows) && columns > 0 && size*columns <= maxParameters {
				n = size
				break
			}
		}
		s.shape = append(s.shape[:0], 'I', byte(n))
		s.run(s.statements.find(r.remember(s.shape, func() string { return r.insertText(n) })), values[:n*columns])
		s.expected.push(expectation{csn: rows[0].csn, relation: r, message: rows[0].message, rows: int64(n)})
		rows, values = rows[n:], values[n*columns:]
	}
	s.drop(r)
}

// drop forgets what was gathered for r.
func (s *session) drop(r *relation) {
	clear(r.gathered.rows)
	clear(r.gathered.values)
	r.gathered = gathered{rows: r.gathered.rows[:0], values: r.gathered.values[:0]}
	s.gathering = slices.DeleteFunc(s.gathering, func(g *relation) bool { return g == r })
}
