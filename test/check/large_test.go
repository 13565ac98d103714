package check_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/quorate/quorate/test/check"
)

// large makes a history of many sessions in which each transaction works on lists and registers of the moment. Pairs
// of transactions overlap, and so skew each other's writes, which is permitted and makes components to look at.
func large(transactions int) check.History {
	random := rand.New(rand.NewPCG(1, 3))
	lists, registers := map[string][]int64{}, map[string]int64{}
	h := make(check.History, 0, transactions)
	for i := range transactions {
		epoch := i / 2000
		list := fmt.Sprintf("list%d.%d", epoch, random.IntN(20))
		other := fmt.Sprintf("list%d.%d", epoch, random.IntN(20))
		register := fmt.Sprintf("register%d.%d", epoch, random.IntN(20))
		start := time.Duration(i) * 10
		op := check.Op{
			Start: start, End: start + 5 + 10*time.Duration(i%2), Process: i % 30, Node: i % 3,
			Isolation: check.RepeatableRead, Outcome: check.OK,
		}
		op.Do = append(op.Do,
			check.Action{Do: check.List, Key: list, List: lists[list]},
			check.Action{Do: check.List, Key: other, List: lists[other]},
			check.Action{Do: check.Read, Key: register, Value: registers[register]},
			check.Action{Do: check.Append, Key: list, Value: int64(i + 1)},
			check.Action{Do: check.Write, Key: register, Value: int64(i + 1)},
		)
		full := lists[list]
		lists[list] = append(full[:len(full):len(full)], int64(i+1))
		registers[register] = int64(i + 1)
		h = append(h, op)
	}
	return h
}

// TestLargeHistory: one stale read among many transactions; and a cycle that goes around all of them.
func TestLargeHistory(t *testing.T) {
	h := large(10_000)
	if err := check.Judge(h, check.PerNode).Err(); err != nil {
		t.Fatal(err)
	}
	end := h[len(h)-1].End
	old := h[7_001]
	stale := check.Op{
		Start: end + 1, End: end + 2, Process: old.Process, Node: old.Node,
		Isolation: check.RepeatableRead, Outcome: check.OK, Do: old.Do[:1],
	}
	report := check.Judge(append(h[:len(h):len(h)], stale), check.PerSession)
	if len(report.Anomalies) != 1 || !report.Has("stale read") {
		t.Errorf("got %v, want a stale read", report.Err())
	}

	// The first transaction reads what the last one wrote.
	h[0].Do = append(h[0].Do, check.Action{Do: check.Read, Key: h[len(h)-1].Do[4].Key, Value: h[len(h)-1].Do[4].Value})
	report = check.Judge(h, check.PerSession)
	if len(report.Anomalies) != 1 || !report.Has("G1c (circular information flow), out of order") {
		t.Errorf("got %v, want a read of what is written later", report.Err())
	}
}

func BenchmarkJudge(b *testing.B) {
	h := large(100_000)
	b.Run("correct", func(b *testing.B) {
		for b.Loop() {
			check.Judge(h, check.PerNode)
		}
	})
	h[0].Do = append(h[0].Do, check.Action{Do: check.Read, Key: h[len(h)-1].Do[4].Key, Value: h[len(h)-1].Do[4].Value})
	b.Run("one cycle around everything", func(b *testing.B) {
		for b.Loop() {
			check.Judge(h, check.PerNode)
		}
	})
}
