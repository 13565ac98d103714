package certify

import "github.com/quorate/quorate/txn"

// SetWindow makes the certifier move its epoch as often as a test needs.
func (c *Certifier) SetWindow(window txn.CSN) { c.window = window }
