package node

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/quorate/quorate/replication/pg"
)

// TestReserve: what a node gives out stays within what the log knows as long as a burst between two looks is no longer than
// four times the one before, the log is told rarely, and a short sequence is not used up by it.
func TestReserve(t *testing.T) {
	for _, step := range []int64{16, -48, 1} {
		r := reserving{}
		random := rand.New(rand.NewPCG(1, uint64(step)))
		last, reserved, told, burst := 100*step, int64(0), 0, int64(200)
		for look := range 2000 {
			if look > 0 && (last-reserved)*step > 0 {
				t.Fatalf("step %d, look %d: %d was given out, reserved were values up to %d", step, look, last, reserved)
			}
			for _, d := range r.due([]pg.SequencePosition{{Name: "s", Last: last, Step: step, Room: 1 << 40}, {Name: "idle", Last: 5, Step: 16, Room: 1 << 40}}) {
				if d.Name == "s" {
					reserved = d.Value
					told++
				}
			}
			burst = min(burst*3, 1+random.Int64N(40))
			last += burst * step
		}
		if told > 200 {
			t.Errorf("step %d: the log was told %d times", step, told)
		}
	}
	r := reserving{}
	due := r.due([]pg.SequencePosition{{Name: "short", Last: 100, Step: 16, Room: 320}, {Name: "ended", Last: 90, Step: 16, Room: 0}})
	if len(due) != 2 || due[0].Value != 100+20*16 || due[1].Value != 90 {
		t.Errorf("short sequences: %+v", due)
	}
	if due = r.due([]pg.SequencePosition{{Name: "ended", Last: 90, Step: 16, Room: 0}}); len(due) != 0 {
		t.Errorf("a sequence that has not moved is told of again: %+v", due)
	}
	if due = r.due([]pg.SequencePosition{{Name: "ended", Last: 10, Step: 16, Room: 5}}); len(due) != 1 {
		t.Errorf("a sequence that was set back: %+v", due) // by setval: the values are its user's business
	}
}

// TestReserveInLog: a running node has the log know of what it gives out, before whoever asks for a value can have used it up.
func TestReserveInLog(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cfg := loneNode(t)
	n := openNode(t, ctx, cfg)
	run(t, ctx, cfg.Listen.Gateway, "CREATE TABLE t (id bigserial PRIMARY KEY)", "INSERT INTO t DEFAULT VALUES", "SELECT nextval('t_id_seq')")
	for n.current.Load().machine.Reserved(0)["public.t_id_seq"] < 17+leastReserve*16/2 {
		select {
		case <-ctx.Done():
			t.Fatalf("the log has %v", n.current.Load().machine.Reserved(0))
		case <-time.After(10 * time.Millisecond): // nobody is told of it
		}
	}
}
