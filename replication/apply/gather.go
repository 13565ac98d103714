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

// maxParameters bounds the text and the plan of a statement for many rows, of which the server keeps one for each session.
const maxParameters = 4096

// maxGathering bounds for how many tables rows are gathered at a time.
const maxGathering = 8

// gathered are a table's rows that have not been sent.
type gathered struct {
	relation *relation
	rows     []gatheredRow
	values   []column // of all rows, one after another
	bytes    int
}

type gatheredRow struct {
	csn     txn.CSN
	message []byte
}

// gather adds a row to what is inserted into r.
func (s *session) gather(r *relation, csn txn.CSN, message []byte, values []column) {
	g := s.gathered(r)
	g.rows = append(g.rows, gatheredRow{csn, message})
	g.values = append(g.values, values...)
	g.bytes += len(message)
	if r.ordered || s.ordered || len(g.rows) == statementRows[0] || g.bytes >= batchBytes {
		s.insert(g)
	}
}

func (s *session) gathered(r *relation) *gathered {
	for _, g := range s.gathering {
		if g.relation == r {
			return g
		}
	}
	if len(s.gathering) == maxGathering {
		s.insert(s.gathering[0])
	}
	g := &gathered{}
	if last := len(s.spare) - 1; last >= 0 {
		g, s.spare = s.spare[last], s.spare[:last]
	}
	g.relation = r
	s.gathering = append(s.gathering, g)
	return g
}

// settle sends what has to come before a change of r: what was gathered for the table, under whatever description, or
// for any table if r has triggers that may look at them.
func (s *session) settle(r *relation, inserts bool) {
	for i := 0; i < len(s.gathering); {
		g := s.gathering[i]
		if r.ordered || g.relation == r && !inserts || g.relation != r && g.relation.name == r.name && g.relation.schema == r.schema {
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

// insert adds what was gathered for a table to the batch.
func (s *session) insert(g *gathered) {
	r, rows, values := g.relation, g.rows, g.values
	for len(rows) > 0 {
		n := 1
		for _, size := range statementRows {
			if size <= len(rows) && len(r.columns) > 0 && size*len(r.columns) <= maxParameters {
				n = size
				break
			}
		}
		s.shape = append(s.shape[:0], 'I', byte(n))
		s.run(s.statements.find(r.remember(s.shape, func() string { return r.insertText(n) })), values[:n*len(r.columns)])
		s.expected.push(expectation{csn: rows[0].csn, relation: r, message: rows[0].message, rows: int64(n)})
		rows, values = rows[n:], values[n*len(r.columns):]
	}
	s.drop(g)
}

// drop forgets what was gathered for a table.
func (s *session) drop(g *gathered) {
	clear(g.rows)
	clear(g.values)
	*g = gathered{rows: g.rows[:0], values: g.values[:0]}
	s.gathering = slices.DeleteFunc(s.gathering, func(other *gathered) bool { return other == g })
	s.spare = append(s.spare, g)
}
