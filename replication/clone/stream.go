package clone

import (
	"bytes"
	"context"
	"fmt"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// confirmEvery is how much WAL is passed on before the server is told that it may recycle it.
const confirmEvery = 16 << 20

// sendWAL passes on the WAL from the segment where the backup begins up to the target, which is set meanwhile.
func (t *transfer) sendWAL(ctx context.Context, conn *pgconn.PgConn) error {
	if t.start.timeline > 1 {
		history, err := pglogrepl.TimelineHistory(ctx, conn, int32(t.start.timeline))
		if err != nil {
			return fmt.Errorf("read history of timeline %d: %w", t.start.timeline, err)
		}
		if err := t.put(&pb.CloneChunk{Kind: &pb.CloneChunk_Timeline{Timeline: &pb.CloneTimeline{
			Name: history.FileName, Content: history.Content,
		}}}); err != nil {
			return err
		}
	}
	// The receiver may be slow, and the server is not to take that for silence.
	if err := execute(ctx, conn, "SET wal_sender_timeout = 0"); err != nil {
		return fmt.Errorf("stream WAL: %w", err)
	}
	at := t.start.lsn - t.start.lsn%txn.LSN(t.server.segmentSize)
	if err := pglogrepl.StartReplication(ctx, conn, t.slot, pglogrepl.LSN(at), pglogrepl.StartReplicationOptions{
		Mode: pglogrepl.PhysicalReplication, Timeline: int32(t.start.timeline),
	}); err != nil {
		return fmt.Errorf("stream WAL: %w", err)
	}
	confirmed := at
	confirm := func() error {
		confirmed = at
		if err := pglogrepl.SendStandbyStatusUpdate(ctx, conn, pglogrepl.StandbyStatusUpdate{WALWritePosition: pglogrepl.LSN(at)}); err != nil {
			return fmt.Errorf("confirm WAL: %w", err)
		}
		return nil
	}
	for target := txn.LSN(0); target == 0 || at < target; {
		data, err := receiveWAL(ctx, conn, at, confirm)
		if err != nil {
			return err
		}
		if err := t.put(&pb.CloneChunk{Kind: &pb.CloneChunk_Wal{Wal: &pb.CloneWAL{Lsn: uint64(at), Data: data}}}); err != nil {
			return err
		}
		t.sent.Add(uint64(len(data)))
		at += txn.LSN(len(data))
		if at >= confirmed+confirmEvery {
			if err := confirm(); err != nil {
				return err
			}
		}
		if target == 0 {
			select {
			case target = <-t.target:
			default: // more will come, whether the donor is idle or not: what flushes the target
			}
		}
	}
	return nil
}

// receiveWAL returns what comes next, which must begin at a position.
func receiveWAL(ctx context.Context, conn *pgconn.PgConn, at txn.LSN, confirm func() error) ([]byte, error) {
	for {
		m, err := conn.ReceiveMessage(ctx)
		if err != nil {
			return nil, fmt.Errorf("stream WAL: %w", err)
		}
		switch m := m.(type) {
		case *pgproto3.CopyData:
			switch {
			case len(m.Data) > 0 && m.Data[0] == pglogrepl.XLogDataByteID:
				w, err := pglogrepl.ParseXLogData(m.Data[1:])
				if err != nil {
					return nil, fmt.Errorf("stream WAL: %w", err)
				}
				if txn.LSN(w.WALStart) != at {
					return nil, fmt.Errorf("stream WAL: it goes on at %s instead of %s", txn.LSN(w.WALStart), at)
				}
				return bytes.Clone(w.WALData), nil
			case len(m.Data) > 0 && m.Data[0] == pglogrepl.PrimaryKeepaliveMessageByteID:
				k, err := pglogrepl.ParsePrimaryKeepaliveMessage(m.Data[1:])
				if err != nil {
					return nil, fmt.Errorf("stream WAL: %w", err)
				}
				if k.ReplyRequested {
					if err := confirm(); err != nil {
						return nil, err
					}
				}
			default:
				return nil, fmt.Errorf("stream WAL: unknown message %.1q", m.Data)
			}
		case *pgproto3.ErrorResponse:
			return nil, fmt.Errorf("stream WAL: %w", pgconn.ErrorResponseToPgError(m))
		case *pgproto3.NoticeResponse, *pgproto3.ParameterStatus:
		default: // the server stops
			return nil, fmt.Errorf("stream WAL: it ended at %s (%T)", at, m)
		}
	}
}
