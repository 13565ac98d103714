package node

import (
	"testing"
	"time"

	"github.com/quorate/quorate/consensus"
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

func TestAsOf(t *testing.T) {
	begin := time.Now()
	at := func(seconds int) time.Time { return begin.Add(time.Duration(seconds) * time.Second) }
	fresh := func(seconds int) *time.Time { shown := at(seconds); return &shown }
	for _, tc := range []struct {
		name        string
		since, last int
		fresh       *time.Time
		want        time.Time
	}{
		{"lags, without a gap", 0, 100, fresh(90), at(100)},
		{"has caught up after a gap", 50, 100, fresh(50), at(100)},
		{"hears again, has not caught up", 50, 100, fresh(49), at(49)},
		{"nothing is shown yet", 50, 100, nil, at(100)},
	} {
		if got := asOf(consensus.Contact{Since: at(tc.since), At: at(tc.last)}, tc.fresh); !got.Equal(tc.want) {
			t.Errorf("%s: as of %v after the beginning, want %v", tc.name, got.Sub(begin), tc.want.Sub(begin))
		}
	}
}
