package node

import (
	"testing"
	"time"

	"github.com/quorate/quorate/gateway"
	"github.com/quorate/quorate/internal/config"
)

func TestAccess(t *testing.T) {
	const s = time.Second
	for _, tc := range []struct {
		age, maxStaleness time.Duration
		reads             string
		want              gateway.Access
	}{
		{0, 10 * s, config.ReadsAllowed, gateway.ReadWrite},
		{3 * s, 10 * s, config.ReadsAllowed, gateway.ReadWrite},
		{3*s + 1, 10 * s, config.ReadsAllowed, gateway.ReadOnly},
		{10 * s, 10 * s, config.ReadsAllowed, gateway.ReadOnly},
		{10*s + 1, 10 * s, config.ReadsAllowed, gateway.NoAccess},
		{3 * s, 10 * s, config.ReadsRefused, gateway.ReadWrite},
		{3*s + 1, 10 * s, config.ReadsRefused, gateway.NoAccess},
		{2 * s, 1 * s, config.ReadsAllowed, gateway.NoAccess}, // reads must not be as old as a change of leader takes
	} {
		if got := access(tc.age, 3*s, tc.maxStaleness, tc.reads); got != tc.want {
			t.Errorf("%v after the last contact, max_staleness %v, reads_without_quorum %s: %d, want %d", tc.age, tc.maxStaleness, tc.reads, got, tc.want)
		}
	}
}
