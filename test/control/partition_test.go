package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/quorate/quorate/test/cluster"
	"github.com/quorate/quorate/test/network"
)

// Two of three nodes cannot reach each other. The third shows which two, and soon after the network has healed nothing
// of it is left.
func TestPartialPartition(t *testing.T) {
	net, err := network.New(3)
	if errors.Is(err, network.ErrNotPermitted) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := net.Close(); err != nil {
			t.Error(err)
		}
	})
	_, ctx := start(t) // for the binary
	c, err := cluster.Start(ctx, cluster.Options{Binary: fixture.binary, Network: net})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.Stop(), c.Destroy()); err != nil {
			t.Error(err)
		}
	})
	// ages returns, as node 3 shows it, how long ago one node heard another.
	ages := func() (map[[2]int]float64, error) {
		out, err := c.Status(ctx, 3, "-o", "json")
		if err != nil {
			return nil, err
		}
		var s struct {
			Members []struct {
				ID    int
				Hears []struct {
					Node       int
					AgeSeconds *float64 `json:"age_seconds"`
				}
			}
		}
		if err := json.Unmarshal(out, &s); err != nil {
			return nil, err
		}
		all := make(map[[2]int]float64)
		for _, m := range s.Members {
			for _, h := range m.Hears {
				if h.AgeSeconds != nil {
					all[[2]int{m.ID, h.Node}] = *h.AgeSeconds
				}
			}
		}
		return all, nil
	}
	whole := func() error {
		all, err := ages()
		if err != nil {
			return err
		}
		for hearer := 1; hearer <= 3; hearer++ {
			for other := 1; other <= 3; other++ {
				if age, ok := all[[2]int{hearer, other}]; hearer != other && (!ok || age > 1) {
					return fmt.Errorf("ages are %v", all)
				}
			}
		}
		return nil
	}
	await(t, ctx, "everybody to hear everybody", whole)
	net.Set(1, 2, network.Link{Cut: true})
	net.Set(2, 1, network.Link{Cut: true})
	await(t, ctx, "the two not to hear each other", func() error {
		all, err := ages()
		if err != nil {
			return err
		}
		if all[[2]int{1, 2}] < 8 || all[[2]int{2, 1}] < 8 || all[[2]int{3, 1}] > 1.5 || all[[2]int{3, 2}] > 1.5 || all[[2]int{1, 3}] > 1.5 || all[[2]int{2, 3}] > 1.5 {
			return fmt.Errorf("ages are %v", all)
		}
		return nil
	})
	net.Set(1, 2, network.Link{})
	net.Set(2, 1, network.Link{})
	took := await(t, ctx, "everybody to hear everybody again", whole)
	t.Logf("whole again %v after the network", took.Round(time.Millisecond))
	if took > 10*time.Second {
		t.Error("that is too long: connections have not been given up while they were cut")
	}
}
