package main

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/quorate/quorate/proto/quorate/v1"
)

var update = flag.Bool("update", false, "write golden files instead of comparing with them")

func TestStatusForms(t *testing.T) {
	s := newClusterStatus(&pb.StatusResponse{
		Cluster: "demo-0123abcd", Node: 1, Leader: 2, Term: 7, CommitIndex: 104, Csn: 52,
		Members: []*pb.Member{
			{Id: 1, RaftAddress: "127.0.0.1:6401", GrpcAddress: "127.0.0.1:6201", HttpAddress: "127.0.0.1:6301", GatewayAddress: "127.0.0.1:6001",
				State: "catching-up", Reason: "12 transactions behind", Role: pb.Role_ROLE_FOLLOWER, Term: 7, CommitIndex: 100, AppliedIndex: 90,
				Csn: 50, AppliedCsn: proto.Uint64(40), Lag: proto.Uint64(12), Version: "v0.1.0", PostgresVersion: "18.4", LastContactMs: proto.Uint64(0),
				Health: &pb.Health{State: "catching-up", Quorum: true, Role: "follower", PostgresUp: proto.Bool(true)},
				Hears:  []*pb.Heard{{Node: 2, AgeSeconds: proto.Float64(0.125), RoundTripSeconds: proto.Float64(0.001)}, {Node: 3, Loss: 1}}},
			{Id: 2, RaftAddress: "127.0.0.1:6402", GrpcAddress: "127.0.0.1:6202", HttpAddress: "127.0.0.1:6302", GatewayAddress: "127.0.0.1:6002",
				State: "active", AcceptsWrites: true, Role: pb.Role_ROLE_LEADER, Term: 7, CommitIndex: 104, AppliedIndex: 104,
				Csn: 52, AppliedCsn: proto.Uint64(52), Lag: proto.Uint64(0), Version: "v0.1.0", PostgresVersion: "18.4", LastContactMs: proto.Uint64(0),
				Health: &pb.Health{State: "active", Quorum: true, Role: "leader", PostgresUp: proto.Bool(true), CommitsPerSecond: 1234.5}},
			{Id: 3, RaftAddress: "127.0.0.1:6403", GrpcAddress: "127.0.0.1:6203", HttpAddress: "127.0.0.1:6303", GatewayAddress: "127.0.0.1:6003",
				State: "no contact", Reason: "connection refused", LastContactMs: proto.Uint64(90_000)},
		},
	})
	s.view = &pb.View{Voters: 3, VotersHeard: 2}
	for name, o := range map[string]output{
		"status.txt": {format: "table", color: "auto"}, "status.color.txt": {format: "table", color: "always"},
		"status.json": {format: "json", color: "auto"}, "status.yaml": {format: "yaml", color: "auto"},
	} {
		var out strings.Builder
		if err := o.write(&out, s, s.show); err != nil {
			t.Fatal(err)
		}
		golden(t, name, out.String())
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	name = filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", name, got, want)
	}
}
