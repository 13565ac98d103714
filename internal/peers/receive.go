package peers

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Silence is after how long without a message a stream counts as broken whose server has something to say every second.
// Without such a limit a stream from a node that is frozen, or cut off, stays open for minutes.
const Silence = 5 * time.Second

// Receive opens a stream and calls took with each message, until that returns an error, the stream ends, nothing has come
// for Silence, or ctx ends. It returns the reason, never nil.
func Receive[T any](ctx context.Context, open func(context.Context) (grpc.ServerStreamingClient[T], error), took func(*T) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silent := status.Errorf(codes.Unavailable, "nothing has come for %v", Silence)
	silence := time.AfterFunc(Silence, func() { cancel(silent) })
	defer silence.Stop()
	stream, err := open(ctx)
	for err == nil {
		var message *T
		if message, err = stream.Recv(); err == nil {
			silence.Stop() // whoever takes it may take its time
			err = took(message)
			silence.Reset(Silence)
		}
	}
	if context.Cause(ctx) == silent {
		return silent
	}
	return err
}
