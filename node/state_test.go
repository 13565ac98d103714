package node

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/quorate/quorate/replication/apply"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

func TestStates(t *testing.T) {
	var seen []string
	s := &states{changed: func(s state) { seen = append(seen, s.name) }}
	for _, step := range []struct {
		name    string
		changes bool
	}{
		{stateStarting, true}, {stateStarting, false}, {stateCatchingUp, true}, {stateActive, true},
		{stateRecovering, true}, {stateCatchingUp, true}, {stateFailed, true},
		{stateRecovering, false}, {stateActive, false}, {stateFailed, false}, // it takes somebody to look
		{stateStopping, true}, {stateFailed, false}, {stateActive, false},
	} {
		before := s.current()
		if got := s.set(step.name, step.name); got != step.changes {
			t.Errorf("from %s to %s: %v", before.name, step.name, got)
		}
	}
	want := []string{stateStarting, stateCatchingUp, stateActive, stateRecovering, stateCatchingUp, stateFailed, stateStopping}
	if !slices.Equal(seen, want) {
		t.Errorf("told %q, want %q", seen, want)
	}
	s = &states{}
	s.set(stateRecovering, "one reason")
	if !s.set(stateRecovering, "another reason") || s.current().reason != "another reason" {
		t.Error("a new reason of the same state is not told")
	}
	if s.set(stateFailed, "first"); s.set(stateFailed, "second") || s.current().reason != "first" {
		t.Error("the first reason to fail does not stay")
	}
	expected := "# HELP quorate_node_state 1 for the state that the node is in, 0 for the others.\n# TYPE quorate_node_state gauge\n"
	for _, name := range slices.Sorted(slices.Values(allStates)) {
		expected += fmt.Sprintf("quorate_node_state{state=%q} %d\n", name, map[bool]int{true: 1}[name == stateFailed])
	}
	if err := testutil.CollectAndCompare(s, strings.NewReader(expected)); err != nil {
		t.Error(err)
	}
}

func TestWhatIsHopeless(t *testing.T) {
	for _, c := range []struct {
		err      error
		hopeless bool
		reason   string
	}{
		{fmt.Errorf("apply: %w", &apply.Divergence{CSN: 7, Operation: "UPDATE", Table: "public.t", Expected: 1}), true, "apply: apply transaction 7 UPDATE public.t"},
		{fmt.Errorf("decode log entry 3: %w", txn.ErrCorrupt), true, "decode log entry 3"},
		{fmt.Errorf("decode log entry 3: %w", &codec.VersionError{Version: 9}), true, "decode log entry 3"},
		{fmt.Errorf("apply: %w", apply.ErrServerLost), false, serverAway},
		{errServerStopped, false, serverAway},
		{errors.New("apply: no space left on device"), false, "apply: no space left on device"},
	} {
		if got := hopeless(c.err); got != c.hopeless {
			t.Errorf("%v: hopeless %v", c.err, got)
		}
		if got := reasonOf(c.err); !strings.HasPrefix(got, c.reason) {
			t.Errorf("%v: reason %q", c.err, got)
		}
	}
}

func TestPatience(t *testing.T) {
	var p patience
	var waits []time.Duration
	for range 8 {
		waits = append(waits, p.wait())
	}
	want := []time.Duration{0, firstWait, 2 * firstWait, 4 * firstWait, 8 * firstWait, 16 * firstWait, 32 * firstWait, lastWait}
	if !slices.Equal(waits, want) {
		t.Errorf("waits %v, want %v", waits, want)
	}
	if p.lasted(lasting - 1); p.wait() != lastWait {
		t.Error("an incarnation that ended soon is begun again at once")
	}
	if p.lasted(lasting); p.wait() != 0 {
		t.Error("the first attempt after a good time waits")
	}
}
