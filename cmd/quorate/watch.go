package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/quorate/quorate/proto/quorate/v1"
)

// stale is the age from which on what is shown is said to be old. A node that has nothing new says so once a second.
const stale = 2 * time.Second

// retry is how long to wait before a node is asked again.
const retry = time.Second

func watchCommand() *cobra.Command {
	var a asking
	var count int
	cmd := &cobra.Command{
		Use:   "watch",
		Short: "Show the cluster as it changes",
		Long: "Show the cluster as it changes, until interrupted: members, who hears whom, the latest events. Changes are pushed by the node. When it cannot be " +
			"reached that is said, and it is asked again. With -o json each state is a line, with -o yaml a document.",
		GroupID: groupLook,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if count < 0 {
				return usage("count", fmt.Sprint(count), "must not be negative")
			}
			if err := a.complete(); err != nil {
				return err
			}
			conn, err := a.dial()
			if err != nil {
				return err
			}
			defer conn.Close()
			w := watcher{asking: &a, conn: conn, out: cmd.OutOrStdout(), left: count, endless: count == 0}
			w.live = a.format == "table" && isTerminal(w.out)
			return w.run(cmd.Context())
		},
	}
	a.flags(cmd)
	cmd.Flags().IntVarP(&count, "count", "n", 0, "end after so many states; 0: never")
	return cmd
}

// watcher shows views until it has shown enough.
type watcher struct {
	*asking
	conn    *grpc.ClientConn
	out     io.Writer
	live    bool // the screen is redrawn
	left    int
	endless bool

	view   *pb.View
	came   time.Time
	events []eventForm // the latest, of all members, the newest first
}

// The terminal's other screen is used, so that what was there before is there afterwards.
const (
	enterScreen = "\x1b[?1049h\x1b[?25l"
	leaveScreen = "\x1b[?25h\x1b[?1049l"
	home        = "\x1b[H"
	clearLine   = "\x1b[K"
	clearBelow  = "\x1b[J"
)

func (w *watcher) run(ctx context.Context) error {
	if w.live {
		fmt.Fprint(w.out, enterScreen)
		defer fmt.Fprint(w.out, leaveScreen)
	}
	for {
		err := w.follow(ctx)
		switch {
		case err == nil, ctx.Err() != nil:
			return nil // interrupted: that is how it ends
		case !passing(err):
			return fmt.Errorf("watch by way of %s: %w", w.address, said(err))
		}
		if err := w.show(fmt.Sprintf("no contact with %s: %v", w.address, said(err))); err != nil {
			return err
		}
		select {
		case <-time.After(retry):
		case <-ctx.Done():
			return nil
		}
	}
}

// passing reports whether a node that could not be asked may be asked again.
func passing(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Unknown:
		var out *writeError
		return !errors.As(err, &out)
	}
	return errors.Is(err, io.EOF)
}

// writeError is one of standard output.
type writeError struct{ err error }

func (e *writeError) Error() string { return e.err.Error() }
func (e *writeError) Unwrap() error { return e.err }

// follow shows what one stream brings. nil means that enough was shown.
func (w *watcher) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := pb.NewObserveClient(w.conn).Watch(ctx, &pb.WatchRequest{})
	if err != nil {
		return err
	}
	views, news, failed := make(chan *pb.View), make(chan *pb.FollowResponse), make(chan error, 2)
	go receive(ctx, stream, views, failed)
	if w.format == "table" {
		events, err := w.followEvents(ctx)
		if err != nil {
			return err
		}
		go receive(ctx, events, news, failed)
	}
	silence := time.NewTimer(stale)
	defer silence.Stop()
	for {
		select {
		case w.view = <-views:
			w.came = time.Now()
			silence.Reset(stale)
			if err := w.show(""); err != nil {
				return err
			}
			if w.left--; !w.endless && w.left <= 0 {
				return nil
			}
		case r := <-news: // shown with the next view, within a second
			w.note(r.Events)
		case <-silence.C:
			silence.Reset(stale)
			if err := w.show("no news from " + w.address); err != nil {
				return err
			}
		case err := <-failed:
			return err
		}
	}
}

// receive hands over what a stream brings, and then why it has ended.
func receive[T any](ctx context.Context, from grpc.ServerStreamingClient[T], to chan<- *T, failed chan<- error) {
	for {
		m, err := from.Recv()
		if err != nil {
			failed <- err
			return
		}
		select {
		case to <- m:
		case <-ctx.Done():
			return
		}
	}
}

// maxEvents is how many events fit below the rest.
const maxEvents = 8

// followEvents gets the latest events, of all members, and a stream of those that follow.
func (w *watcher) followEvents(ctx context.Context) (grpc.ServerStreamingClient[pb.FollowResponse], error) {
	began := time.Now()
	asking, cancel := context.WithTimeout(ctx, w.timeout)
	defer cancel()
	client := pb.NewObserveClient(w.conn)
	r, err := client.Events(asking, &pb.EventsRequest{Limit: maxEvents})
	if err != nil {
		return nil, err
	}
	w.events = nil
	w.note(r.Events)
	// Of a member that has not answered, what happens from now on.
	return client.Follow(ctx, &pb.FollowRequest{After: r.Cursors, SinceMs: began.UnixMilli()})
}

// note adds events to the latest.
func (w *watcher) note(all []*pb.Event) {
	for _, e := range all {
		w.events = append(w.events, newEventForm(e))
	}
	slices.SortStableFunc(w.events, func(a, b eventForm) int {
		return cmp.Or(b.Time.Compare(a.Time), cmp.Compare(a.Node, b.Node), cmp.Compare(b.Number, a.Number))
	})
	w.events = w.events[:min(len(w.events), maxEvents)]
}

// show shows the view, and what is wrong with it.
func (w *watcher) show(problem string) error {
	if w.view == nil && w.format != "table" || problem != "" && w.format != "table" {
		return nil // programs see the time in what they get
	}
	if err := w.print(problem); err != nil {
		return &writeError{err}
	}
	return nil
}

func (w *watcher) print(problem string) error {
	switch w.format {
	case "json":
		return json.NewEncoder(w.out).Encode(newViewForm(w.view))
	case "yaml":
		if _, err := fmt.Fprintln(w.out, "---"); err != nil {
			return err
		}
		return printYAML(w.out, newViewForm(w.view))
	}
	s := screen{colored: w.colored(w.out)}
	if problem != "" {
		since := ""
		if !w.came.IsZero() {
			since = fmt.Sprintf("; what follows is %s old", seconds(time.Since(w.came).Seconds()).text)
		}
		s.line(cell{text: "STALE: " + problem + since, style: bad})
	}
	if w.view != nil {
		v := newViewForm(w.view)
		s.summary(v)
		s.line()
		s.nodes(v)
		s.line()
		s.matrix(v)
		s.line()
		s.events(w.events)
	}
	text := s.text.String()
	if w.live {
		text = redraw(text)
	} else {
		text += "\n"
	}
	_, err := io.WriteString(w.out, text)
	return err
}

// redraw writes over what is on the screen: no flicker.
func redraw(text string) string {
	b := []byte(home)
	for _, c := range []byte(text) {
		if c == '\n' {
			b = append(b, clearLine+"\r"...)
		}
		b = append(b, c)
	}
	return string(b) + clearBelow
}
