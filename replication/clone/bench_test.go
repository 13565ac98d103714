package clone

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
)

// BenchmarkClone holds a clone against a plain copy of the same server in the same run: BASE_BACKUP read over the server's
// own socket, unpacked and flushed, as pg_basebackup does it, with no other process on the way and nothing checked. Both
// begin with a checkpoint that was just made. QUORATE_CLONE_MIB says how much there is to copy, 100 if not set.
func BenchmarkClone(b *testing.B) {
	size := 100
	if text := os.Getenv("QUORATE_CLONE_MIB"); text != "" {
		var err error
		if size, err = strconv.Atoi(text); err != nil {
			b.Fatal(err)
		}
	}
	r := newRigIn(b, pgtest.Options{}, pgtest.Dir(b, false))
	r.run("CREATE TABLE large AS SELECT i, repeat(md5(i::text), 30) AS filler FROM generate_series(1, " + fmt.Sprint(size*1024) + ") i")
	var ratios, seconds []float64
	for b.Loop() {
		r.run("CHECKPOINT")
		plain := timed(b, func() error { return plainCopy(b.Context(), r, filepath.Join(r.dir, "plain")) })
		r.run("CHECKPOINT")
		target := r.target()
		clone := timed(b, func() error { _, err := Receive(b.Context(), r.conn, target); return err })
		for _, dir := range []string{filepath.Join(r.dir, "plain"), target.Dir} {
			if err := os.RemoveAll(dir); err != nil {
				b.Fatal(err)
			}
		}
		ratios, seconds = append(ratios, clone/plain), append(seconds, clone)
		b.Logf("%d MiB: plain copy %.2f s, clone %.2f s, ratio %.2f", size, plain, clone, clone/plain)
	}
	slices.Sort(ratios)
	slices.Sort(seconds)
	b.ReportMetric(ratios[len(ratios)/2], "clone/plain")
	b.ReportMetric(float64(size)/seconds[len(seconds)/2], "MiB/s")
}

func timed(b *testing.B, f func() error) float64 {
	b.Helper()
	began := time.Now()
	if err := f(); err != nil {
		b.Fatal(err)
	}
	return time.Since(began).Seconds()
}

// plainCopy is a base backup with the WAL in it.
func plainCopy(ctx context.Context, r *rig, dir string) error {
	conn, err := r.source.Connect(ctx, true)
	if err != nil {
		return err
	}
	defer closeConn(ctx, conn)
	conn.Frontend().SendQuery(&pgproto3.Query{String: "BASE_BACKUP (CHECKPOINT 'fast', WAL true, WAIT false, TARGET 'client')"})
	if err := conn.Frontend().Flush(); err != nil {
		return err
	}
	in, out := io.Pipe()
	go func() {
		for {
			m, err := conn.ReceiveMessage(ctx)
			if err != nil {
				out.CloseWithError(err)
				return
			}
			switch m := m.(type) {
			case *pgproto3.CopyData:
				if m.Data[0] == 'd' {
					if _, err := out.Write(m.Data[1:]); err != nil {
						return
					}
				}
			case *pgproto3.ErrorResponse:
				out.CloseWithError(errors.New(m.Message))
				return
			case *pgproto3.ReadyForQuery:
				out.Close()
				return
			}
		}
	}()
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	archive := tar.NewReader(in)
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		name := filepath.Join(dir, h.Name)
		if h.Typeflag == tar.TypeDir {
			if err := os.MkdirAll(name, 0o700); err != nil {
				return err
			}
			continue
		}
		f, err := os.Create(name)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, archive)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return err
	}
	return flushAll(ctx, dir)
}
