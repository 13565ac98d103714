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
	"golang.org/x/sys/unix"

	"github.com/quorate/quorate/internal/pgserver/pgtest"
)

// BenchmarkClone holds a clone against a plain copy of the same server in the same run: BASE_BACKUP read over the server's
// own socket, with a manifest, unpacked and flushed, as pg_basebackup does it, with no other process on the way and nothing checked. Both
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
	var ratios, cpu, seconds []float64
	for b.Loop() {
		r.run("CHECKPOINT")
		plain, plainCPU := timed(b, func() error { return plainCopy(b.Context(), r, filepath.Join(r.dir, "plain")) })
		r.run("CHECKPOINT")
		target := r.target()
		clone, cloneCPU := timed(b, func() error { _, err := Receive(b.Context(), r.conn, target); return err })
		for _, dir := range []string{filepath.Join(r.dir, "plain"), target.Dir} {
			if err := os.RemoveAll(dir); err != nil {
				b.Fatal(err)
			}
		}
		ratios, cpu, seconds = append(ratios, clone/plain), append(cpu, cloneCPU/float64(size)), append(seconds, clone)
		b.Logf("%d MiB: plain copy %.2f s (CPU %.2f s), clone %.2f s (CPU %.2f s), ratio %.2f", size, plain, plainCPU, clone, cloneCPU, clone/plain)
	}
	slices.Sort(ratios)
	slices.Sort(cpu)
	slices.Sort(seconds)
	b.ReportMetric(ratios[len(ratios)/2], "clone/plain")
	b.ReportMetric(float64(size)/seconds[len(seconds)/2], "MiB/s")
	b.ReportMetric(cpu[len(cpu)/2]*1e3, "ms-CPU/MiB")
}

// timed returns how long f took, and how long processors worked for it in this process: donor and receiver, without PostgreSQL.
func timed(b *testing.B, f func() error) (took, cpu float64) {
	b.Helper()
	used := func() float64 {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
	}
	began, before := time.Now(), used()
	if err := f(); err != nil {
		b.Fatal(err)
	}
	return time.Since(began).Seconds(), used() - before
}

// plainCopy is a base backup with the WAL in it.
func plainCopy(ctx context.Context, r *rig, dir string) error {
	conn, err := r.source.Connect(ctx, true)
	if err != nil {
		return err
	}
	defer closeConn(ctx, conn)
	conn.Frontend().SendQuery(&pgproto3.Query{String: "BASE_BACKUP (CHECKPOINT 'fast', WAL true, WAIT false, MANIFEST 'yes', TARGET 'client')"})
	if err := conn.Frontend().Flush(); err != nil {
		return err
	}
	in, out := io.Pipe()
	go func() {
		manifest := false // the last of it, which is not looked at
		for {
			m, err := conn.ReceiveMessage(ctx)
			if err != nil {
				out.CloseWithError(err)
				return
			}
			switch m := m.(type) {
			case *pgproto3.CopyData:
				manifest = manifest || m.Data[0] == 'm'
				if m.Data[0] == 'd' && !manifest {
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
