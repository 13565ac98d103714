package dashboard

import "time"

// SetPatience sets how long a page may take nothing.
func (d *Dashboard) SetPatience(p time.Duration) { d.patience = p }

// Watched reports whether anybody looks.
func (d *Dashboard) Watched() bool { return d.watched() }
