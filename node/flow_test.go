package node

import (
	"testing"
	"time"

	pb "github.com/quorate/quorate/proto/quorate/v1"
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

// TestBehind: nobody waits for a witness, which applies nothing, however many transactions there have been; nor for who is
// not active.
func TestBehind(t *testing.T) {
	for name, tc := range map[string]struct {
		health *pb.Health
		lag    uint64
		counts bool
	}{
		"behind":      {&pb.Health{State: stateActive, AppliedCsn: ptr(uint64(999_990))}, 10, true},
		"ahead of us": {&pb.Health{State: stateActive, AppliedCsn: ptr(uint64(1_000_001))}, 0, true},
		"nothing yet": {&pb.Health{State: stateActive, AppliedCsn: ptr(uint64(0))}, 1_000_000, true},
		"a witness":   {&pb.Health{State: stateActive}, 0, false},
		"retired":     {&pb.Health{State: stateCatchingUp, AppliedCsn: ptr(uint64(1))}, 0, false},
	} {
		if lag, counts := behind(tc.health, 1_000_000); lag != tc.lag || counts != tc.counts {
			t.Errorf("%s: %d, %v; want %d, %v", name, lag, counts, tc.lag, tc.counts)
		}
	}
}
