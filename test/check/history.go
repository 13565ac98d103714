// Package check judges histories: what clients did to a database and what they were told. It knows nothing of the
// database but the promise that it is held to, snapshot isolation or read committed in one order of commits. See
// DESIGN.md for how.
package check

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

// Outcome is what a client knows of its transaction.
type Outcome string

const (
	OK      Outcome = "ok"      // it was told that the transaction has committed
	Failed  Outcome = "failed"  // it knows that the transaction has not committed and never will
	Unknown Outcome = "unknown" // maybe
)

// Isolation is the level that a transaction asked for.
type Isolation string

const (
	RepeatableRead Isolation = "repeatable read" // one snapshot for the transaction; first committer wins
	ReadCommitted  Isolation = "read committed"  // one snapshot for each action
)

// Op is one transaction.
type Op struct {
	// Start is when the client began it, End when the client knew the outcome, or that it never will; both since the
	// history began, by one clock.
	Start time.Duration `json:"start"`
	End   time.Duration `json:"end"`
	// Process is the session that ran it. A session is on one node and does one thing at a time; a client that connects
	// again has a new one.
	Process   int       `json:"process"`
	Node      int       `json:"node"`
	Kind      string    `json:"kind,omitempty"` // which workload it belongs to, for readers
	Name      string    `json:"gid,omitempty"`  // what the database calls it, if that was asked for
	Isolation Isolation `json:"isolation"`
	Outcome   Outcome   `json:"outcome"`
	Error     string    `json:"error,omitempty"` // what the client was told instead of success
	// Final is a read that was made when all work had ended and the node was known to have caught up: it must see
	// everything that was acknowledged anywhere.
	Final bool     `json:"final,omitempty"`
	Do    []Action `json:"do"`
}

// Verb is what an action does.
type Verb string

const (
	// Lists. Nobody appends the same value to a list twice. A list that is not there reads as empty.
	Append Verb = "append" // Key, Value
	List   Verb = "list"   // Key → List

	// Registers. Nobody writes the same value to a register twice, nor 0, which stands for no value yet.
	Write Verb = "write" // Key, Value
	Read  Verb = "read"  // Key → Value

	// Counters. One that was opened is an account: it must not be seen below zero, and balances, one snapshot of
	// all accounts, must add up to what they were opened with.
	Open     Verb = "open"     // Key, Value
	Add      Verb = "add"      // Key, Value
	Count    Verb = "count"    // Key → Value
	Balances Verb = "balances" // → Counts

	// Rows of tables. Row names one row for ever, Key is unique among the rows that live. In a table that refers to
	// another, Key is instead the key of a row there.
	Insert Verb = "insert" // Table, Refs, Row, Key
	Delete Verb = "delete" // Table, Refs → Row, Key; only when there was one to delete
	Scan   Verb = "scan"   // Table, Refs → Rows, all of them
)

// Action is one statement of a transaction. Which fields it has depends on the verb.
type Action struct {
	Do     Verb             `json:"do"`
	Key    string           `json:"key,omitempty"`
	Value  int64            `json:"value,omitempty"`
	List   []int64          `json:"list,omitempty"`
	Counts map[string]int64 `json:"counts,omitempty"`
	Table  string           `json:"table,omitempty"`
	Refs   string           `json:"refs,omitempty"`
	Row    int64            `json:"row,omitempty"`
	Rows   []Row            `json:"rows,omitempty"`
}

// Row is one row of a scan.
type Row struct {
	Row int64  `json:"row"`
	Key string `json:"key"`
}

// writes reports whether a transaction has changed anything.
func (o *Op) writes() bool {
	for i := range o.Do {
		switch o.Do[i].Do {
		case Append, Write, Open, Add, Insert, Delete:
			return true
		}
	}
	return false
}

// History is all transactions of all clients, in any order.
type History []Op

// WriteHistory writes a history as JSON, one transaction per line.
func WriteHistory(w io.Writer, h History) error {
	out := bufio.NewWriter(w)
	encoder := json.NewEncoder(out)
	for i := range h {
		if err := encoder.Encode(&h[i]); err != nil {
			return fmt.Errorf("write history: %w", err)
		}
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("write history: %w", err)
	}
	return nil
}

// ReadHistory reads what WriteHistory wrote.
func ReadHistory(r io.Reader) (History, error) {
	var h History
	for in := bufio.NewReader(r); ; {
		line, err := in.ReadBytes('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("read history: %w", err)
		}
		if len(bytes.TrimSpace(line)) > 0 {
			decoder := json.NewDecoder(bytes.NewReader(line))
			decoder.DisallowUnknownFields()
			var op Op
			if err := decoder.Decode(&op); err != nil {
				return nil, fmt.Errorf("read history: transaction %d: %w", len(h), err)
			}
			if err := op.validate(); err != nil {
				return nil, fmt.Errorf("read history: transaction %d: %w", len(h), err)
			}
			h = append(h, op)
		}
		if err != nil {
			return h, nil
		}
	}
}

// validate returns an error for what the checker would misunderstand.
func (o *Op) validate() error {
	switch {
	case o.Outcome != OK && o.Outcome != Failed && o.Outcome != Unknown:
		return fmt.Errorf("outcome is %q, not %s, %s or %s", o.Outcome, OK, Failed, Unknown)
	case o.Isolation != RepeatableRead && o.Isolation != ReadCommitted:
		return fmt.Errorf("isolation is %q, not %s or %s", o.Isolation, RepeatableRead, ReadCommitted)
	case o.End < o.Start:
		return fmt.Errorf("end is %v, before start at %v", o.End, o.Start)
	}
	return nil
}

// mostActions is how many actions of a transaction are shown: a final read has many, and what matters is said beside it.
const mostActions = 16

// longest is how many elements of a list are shown; the rest is at its beginning.
const longest = 8

// String writes an action as reports show it.
func (a Action) String() string {
	switch a.Do {
	case List:
		var b strings.Builder
		fmt.Fprintf(&b, "list %s [", a.Key)
		list := a.List
		if len(list) > longest {
			fmt.Fprintf(&b, "…%d more… ", len(list)-longest)
			list = list[len(list)-longest:]
		}
		for i, v := range list {
			if i > 0 {
				b.WriteByte(' ')
			}
			fmt.Fprint(&b, v)
		}
		return b.String() + "]"
	case Balances:
		var b strings.Builder
		b.WriteString("balances")
		for _, key := range slices.Sorted(maps.Keys(a.Counts)) {
			fmt.Fprintf(&b, " %s=%d", key, a.Counts[key])
		}
		return b.String()
	case Insert, Delete:
		return fmt.Sprintf("%s %s %d=%s", a.Do, a.table(), a.Row, a.Key)
	case Scan:
		var b strings.Builder
		fmt.Fprintf(&b, "scan %s", a.table())
		for _, row := range a.Rows {
			fmt.Fprintf(&b, " %d=%s", row.Row, row.Key)
		}
		return b.String()
	default:
		return fmt.Sprintf("%s %s %d", a.Do, a.Key, a.Value)
	}
}

func (a Action) table() string {
	if a.Refs == "" {
		return a.Table
	}
	return a.Table + "→" + a.Refs
}

// String writes a transaction as reports show it.
func (o Op) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v-%v p%d n%d", o.Start, o.End, o.Process, o.Node)
	if o.Isolation == ReadCommitted {
		b.WriteString(" rc")
	}
	if o.Final {
		b.WriteString(" final")
	}
	fmt.Fprintf(&b, " %s: ", o.Outcome)
	for i, action := range o.Do {
		if i > 0 {
			b.WriteString(", ")
		}
		if i == mostActions {
			fmt.Fprintf(&b, "… %d more", len(o.Do)-i)
			break
		}
		b.WriteString(action.String())
	}
	return b.String()
}
