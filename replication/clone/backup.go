package clone

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	pb "github.com/quorate/quorate/proto/quorate/v1"
	"github.com/quorate/quorate/txn"
)

// backup is a BASE_BACKUP under way. The server answers with two results, the start and the tablespaces, then with one
// stream of messages that holds archive and manifest, and at last with the end.
type backup struct{ conn *pgconn.PgConn }

type backupStart struct {
	lsn      txn.LSN
	timeline uint32
	bytes    uint64 // of the archive, estimated
}

func (b *backup) begin(ctx context.Context, spread bool) (s backupStart, err error) {
	checkpoint := "fast"
	if spread {
		checkpoint = "spread"
	}
	// CRC-32C finds what a disk or a network spoils; who could forge it could forge the data. WAIT is for archived WAL.
	b.conn.Frontend().SendQuery(&pgproto3.Query{String: "BASE_BACKUP (LABEL 'quorate clone', PROGRESS true, CHECKPOINT '" + checkpoint +
		"', WAIT false, MANIFEST 'yes', MANIFEST_CHECKSUMS 'CRC32C', TARGET 'client')"})
	if err := b.conn.Frontend().Flush(); err != nil {
		return s, fmt.Errorf("ask for a base backup: %w", err)
	}
	for result := 0; ; {
		m, err := b.receive(ctx)
		if err != nil {
			return s, err
		}
		switch m := m.(type) {
		case *pgproto3.DataRow:
			switch {
			case result == 0 && len(m.Values) == 2: // where the backup begins
				if s.lsn, err = parseLSN(string(m.Values[0])); err != nil {
					return s, err
				}
				tli, err := strconv.ParseUint(string(m.Values[1]), 10, 32)
				if err != nil {
					return s, fmt.Errorf("begin a base backup: timeline: %w", err)
				}
				s.timeline = uint32(tli)
			case result == 1 && len(m.Values) == 3: // a tablespace: its OID, its place and its size in KiB
				if m.Values[0] != nil {
					return s, fmt.Errorf("%w: the donor has tablespace %s in %s", errUnsupported, m.Values[0], m.Values[1])
				}
				kib, err := strconv.ParseUint(string(m.Values[2]), 10, 54)
				if err != nil {
					return s, fmt.Errorf("begin a base backup: size: %w", err)
				}
				s.bytes = kib << 10
			default:
				return s, fmt.Errorf("begin a base backup: unexpected row of %d values in result %d", len(m.Values), result)
			}
		case *pgproto3.CommandComplete:
			result++
		case *pgproto3.CopyOutResponse:
			if result != 2 {
				return s, fmt.Errorf("begin a base backup: data after %d results", result)
			}
			return s, nil
		case *pgproto3.RowDescription:
		default:
			return s, fmt.Errorf("begin a base backup: unexpected message %T", m)
		}
	}
}

// receive returns the next message that matters. It is good until the next call.
func (b *backup) receive(ctx context.Context) (pgproto3.BackendMessage, error) {
	for {
		m, err := b.conn.ReceiveMessage(ctx)
		if err != nil {
			return nil, fmt.Errorf("receive a base backup: %w", err)
		}
		switch m := m.(type) {
		case *pgproto3.ErrorResponse:
			return nil, fmt.Errorf("receive a base backup: %w", pgconn.ErrorResponseToPgError(m))
		case *pgproto3.NoticeResponse, *pgproto3.ParameterStatus:
		default:
			return m, nil
		}
	}
}

// sendFiles passes archive and manifest on.
func (t *transfer) sendFiles(ctx context.Context, b *backup) error {
	from := &t.donor.buffers
	buffer := from.Get(chunkSize)
	manifest := false
	flush := func() error {
		if len(*buffer) == 0 {
			return nil
		}
		var m any = archive{buffer, from} // which is gRPC's from here on
		if manifest {
			m = &pb.CloneChunk{Kind: &pb.CloneChunk_Manifest{Manifest: &pb.CloneManifest{Data: *buffer}}}
		}
		t.sent.Add(uint64(len(*buffer)))
		buffer = from.Get(chunkSize)
		return t.put(m)
	}
	archives := 0
	for {
		m, err := b.receive(ctx)
		if err != nil {
			return err
		}
		switch m := m.(type) {
		case *pgproto3.CopyData:
			if len(m.Data) == 0 {
				return errors.New("receive a base backup: empty message")
			}
			switch m.Data[0] {
			case 'd':
				if *buffer = append(*buffer, m.Data[1:]...); len(*buffer) >= chunkSize-(32<<10) {
					if err := flush(); err != nil {
						return err
					}
				}
			case 'n': // the archive of a tablespace begins
				if archives++; archives > 1 {
					name, _, _ := bytes.Cut(m.Data[1:], []byte{0})
					return fmt.Errorf("%w: the donor has a tablespace (archive %s)", errUnsupported, name)
				}
			case 'm':
				if err := flush(); err != nil {
					return err
				}
				manifest = true
			case 'p': // its own progress
			default:
				return fmt.Errorf("receive a base backup: unknown message %q", m.Data[0])
			}
		case *pgproto3.CopyDone:
			if err := flush(); err != nil {
				return err
			}
		case *pgproto3.ReadyForQuery:
			return nil
		case *pgproto3.RowDescription, *pgproto3.DataRow, *pgproto3.CommandComplete: // where the backup ended
		default:
			return fmt.Errorf("receive a base backup: unexpected message %T", m)
		}
	}
}
