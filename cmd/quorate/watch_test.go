package main

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "github.com/quorate/quorate/proto/quorate/v1"
)

// watched is a node that notes nothing itself, while another one does.
type watched struct{ pb.UnimplementedObserveServer }

func (watched) Watch(_ *pb.WatchRequest, to grpc.ServerStreamingServer[pb.View]) error {
	for to.Context().Err() == nil {
		if err := to.Send(&pb.View{Node: 1, Cluster: "c", LastEvent: 1}); err != nil {
			return err
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-to.Context().Done():
		}
	}
	return nil
}

func (watched) Events(context.Context, *pb.EventsRequest) (*pb.EventsResponse, error) {
	return &pb.EventsResponse{Events: []*pb.Event{{Node: 1, Number: 1, TimeMs: 1000, Text: "before"}}, Cursors: []*pb.EventCursor{{Node: 1, Number: 1}}}, nil
}

func (watched) Follow(req *pb.FollowRequest, to grpc.ServerStreamingServer[pb.FollowResponse]) error {
	if len(req.After) == 1 && req.After[0].Number == 1 && req.SinceMs > 0 {
		if err := to.Send(&pb.FollowResponse{Events: []*pb.Event{{Node: 2, Number: 5, TimeMs: 2000, Text: "afterwards"}}}); err != nil {
			return err
		}
	}
	<-to.Context().Done()
	return nil
}

// writeFunc is an io.Writer.
type writeFunc func([]byte) (int, error)

func (f writeFunc) Write(b []byte) (int, error) { return f(b) }

// What other members note is shown as well, when the asked node has noted nothing new.
func TestWatchShowsEventsOfOthers(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	pb.RegisterObserveServer(server, watched{})
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	var shown string
	a := asking{output: output{format: "table", color: "never"}, timeout: 10 * time.Second}
	w := watcher{asking: &a, conn: conn, endless: true, out: writeFunc(func(b []byte) (int, error) {
		if shown = string(b); strings.Contains(shown, "afterwards") {
			cancel()
		}
		return len(b), nil
	})}
	if err := w.run(ctx); err != nil {
		t.Error(err)
	}
	if after, before := strings.Index(shown, "afterwards"), strings.Index(shown, "before"); after < 0 || before < after {
		t.Errorf("shown is, in the end,\n%s", shown)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	server.Stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
