package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	"google.golang.org/grpc"

	"github.com/quorate/quorate/internal/peers"
	pb "github.com/quorate/quorate/proto/quorate/v1"
)

// follower prints events as they happen, each once. What it has printed of each member is all that it remembers, so it goes
// on where it was, whoever was away meanwhile.
type follower struct {
	*asking
	out   io.Writer
	log   io.Writer // for what is not an event
	conn  *grpc.ClientConn
	req   *pb.FollowRequest
	after map[uint32]*pb.EventCursor
	away  bool // it was said that there is no contact
}

// run prints the latest events that a request selects, and then those that happen, until ctx ends. Only a node that does
// not answer in the beginning is an error: that is most likely a mistake.
func (f *follower) run(ctx context.Context, req *pb.EventsRequest) error {
	f.after = make(map[uint32]*pb.EventCursor)
	f.req = &pb.FollowRequest{Local: req.Local, AtLeast: req.AtLeast, Kind: req.Kind, SinceMs: req.SinceMs}
	if f.req.SinceMs == 0 { // of a member that does not answer now, what happens from now on
		f.req.SinceMs = time.Now().UnixMilli()
	}
	var latest *pb.EventsResponse
	err := f.ask(ctx, "get events", func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		latest, err = pb.NewObserveClient(conn).Events(ctx, req)
		return err
	})
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	for _, u := range latest.Unreachable {
		f.say("node %d does not answer: %s", u.Node, u.Reason)
	}
	for _, c := range latest.Cursors {
		f.after[c.Node] = c
	}
	slices.Reverse(latest.Events) // the newest came first
	if err := f.took(latest.Events); err != nil {
		return err
	}
	if f.conn, err = f.dial(); err != nil {
		return err
	}
	defer f.conn.Close()
	for {
		f.req.After = nil
		for _, c := range f.after {
			f.req.After = append(f.req.After, c)
		}
		err := peers.Receive(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[pb.FollowResponse], error) {
			return pb.NewObserveClient(f.conn).Follow(ctx, f.req)
		}, func(r *pb.FollowResponse) error { return f.took(r.Events) })
		switch {
		case ctx.Err() != nil:
			return nil // interrupted: that is how it ends
		case !passing(err):
			return fmt.Errorf("follow events by way of %s: %w", f.address, said(err))
		}
		if !f.away {
			f.away = true
			f.say("no contact with %s: %v", f.address, said(err))
		}
		select {
		case <-time.After(retry):
		case <-ctx.Done():
			return nil
		}
	}
}

// say tells something that is no event.
func (f *follower) say(format string, args ...any) { fmt.Fprintf(f.log, format+"\n", args...) }

// took prints events, and notes that they are printed.
func (f *follower) took(all []*pb.Event) error {
	if f.away {
		f.away = false
		f.say("in contact with %s again", f.address)
	}
	for _, e := range all {
		if err := f.print(newEventForm(e)); err != nil {
			return &writeError{err}
		}
		if at := f.after[e.Node]; at == nil || f.conn != nil || e.Number > at.Number {
			f.after[e.Node] = &pb.EventCursor{Node: e.Node, Number: e.Number, TimeMs: e.TimeMs}
		}
	}
	return nil
}

func (f *follower) print(e eventForm) error {
	switch f.format {
	case "json":
		return json.NewEncoder(f.out).Encode(e)
	case "yaml":
		if _, err := fmt.Fprintln(f.out, "---"); err != nil {
			return err
		}
		return printYAML(f.out, e)
	}
	s := screen{colored: f.colored(f.out)}
	// What is to come is not known: the columns are as wide as most of it is.
	s.aligned(e.cells(), []int{23, 2, 7, 15})
	_, err := io.WriteString(f.out, s.text.String())
	return err
}
