package cluster_test

import (
	"errors"
	"testing"

	"github.com/quorate/quorate/test/cluster"
	"github.com/quorate/quorate/test/network"
)

// TestSeparate: nodes on a network of their own, each started by itself, are a cluster.
func TestSeparate(t *testing.T) {
	net, err := network.New(3)
	if errors.Is(err, network.ErrNotPermitted) {
		t.Skip(err)
	}
	check(t, err)
	t.Cleanup(func() { check(t, net.Close()) })
	c, ctx := private(t, cluster.Options{Binary: command(t, withRace), Network: net})
	create(t, ctx, c, "CREATE TABLE there (id int PRIMARY KEY)")
	for i := 1; i <= c.Nodes; i++ {
		must(t, ctx, gateway(t, ctx, c, i), "INSERT INTO there VALUES ($1)", i)
	}
	check(t, c.Verify(ctx))
	check(t, c.Stop())
	check(t, c.Resume(ctx))
	everywhere(t, ctx, c, int64(3), "SELECT count(*) FROM there")
	check(t, c.Stop())
}
