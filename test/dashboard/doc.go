// Package dashboard tests the page on which operators see their cluster: in a real browser, with a real cluster, by what
// is visible.
package dashboard
