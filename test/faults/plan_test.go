package faults_test

import (
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/quorate/quorate/test/faults"
)

func TestPlan(t *testing.T) {
	kinds := slices.Concat(faults.OnProcesses, faults.OnNetwork)
	plan := faults.Plan(1, 10*time.Minute, kinds)
	if again := faults.Plan(1, 10*time.Minute, kinds); !reflect.DeepEqual(plan, again) {
		t.Error("the same seed gives another plan")
	}
	if other := faults.Plan(2, 10*time.Minute, kinds); reflect.DeepEqual(plan, other) {
		t.Error("another seed gives the same plan")
	}
	dealt, roles, overlaps := map[faults.Kind]int{}, map[faults.Role]int{}, 0
	for i, f := range plan {
		dealt[f.Kind]++
		roles[f.Role]++
		if f.For <= 0 || f.At >= 10*time.Minute {
			t.Errorf("impossible: %v", f)
		}
		if i > 0 && f.At <= plan[i-1].At {
			t.Errorf("%v comes after %v", f, plan[i-1])
		}
		if i > 0 && f.At < plan[i-1].At+plan[i-1].For {
			overlaps++
		}
	}
	least, most := len(plan), 0
	for _, kind := range kinds {
		least, most = min(least, dealt[kind]), max(most, dealt[kind])
	}
	if least == 0 || most > least+1 {
		t.Errorf("kinds are not dealt evenly: %v", dealt)
	}
	if roles[faults.Leader] == 0 || roles[faults.Follower] == 0 || overlaps == 0 || overlaps == len(plan)-1 {
		t.Errorf("no variety: roles %v, %d of %d overlap", roles, overlaps, len(plan))
	}
}
