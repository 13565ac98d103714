// Package invariant states what must hold. A broken invariant is a programmer's error or corrupted state, never
// bad input: continuing could acknowledge what is not so, therefore the process stops.
package invariant

import "fmt"

// Violation is what a broken invariant panics with.
type Violation struct{ Message string }

func (v Violation) Error() string { return "invariant violated: " + v.Message }

// Check panics with a Violation unless ok holds. Keep it cheap: it is always on.
func Check(ok bool, format string, args ...any) {
	if !ok {
		panic(Violation{fmt.Sprintf(format, args...)})
	}
}
