package node

import (
	"testing"
	"time"
)

func TestThrottle(t *testing.T) {
	for _, tc := range []struct {
		lag   uint64
		delay time.Duration
		wait  bool
	}{
		{0, 0, false}, {100, 0, false}, {101, maxDelay / 100, false}, {150, maxDelay / 2, false}, {199, 99 * maxDelay / 100, false},
		{200, 0, true}, {1 << 60, 0, true},
	} {
		delay, wait := throttle(tc.lag, 100)
		if delay.Round(time.Microsecond) != tc.delay || wait != tc.wait {
			t.Errorf("lag %d: %v, %v; want %v, %v", tc.lag, delay, wait, tc.delay, tc.wait)
		}
	}
}
