package cluster_test

import (
	"context"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/quorate/quorate/test/cluster"
)

// raftLogDiskFull: the disk of the leader's Raft log is full. It leads no more, and is fenced: what is acknowledged it
// could not promise to keep. The others go on. With room, and started again, it has lost nothing and catches up.
func raftLogDiskFull(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	victim, _ := leaderOf(t, ctx, c)
	stopNode(t, ctx, c, victim)
	disk := ownDisk(t, filepath.Join(c.NodeDir(victim), "raft"))
	check(t, c.RunNode(ctx, victim))
	lead(t, ctx, c, victim)
	l := startLoad(t, ctx, c)
	disk.fill(64 << 10)
	awaitState(t, ctx, c, victim, "failed", "no space left on device")
	if _, err := c.Connect(ctx, victim); cluster.SQLState(err) != "57P03" || !strings.Contains(err.Error(), "no space left on device") {
		t.Errorf("connect to the node meanwhile: %v", err)
	}
	l.awaitCommits(ctx, 20, others(c, victim)...)
	// It answers, but without the one that would be taken away there would be no majority that stores anything.
	rest := others(c, victim)
	if out, err := c.Command(ctx, "remove", strconv.Itoa(rest[0]), "--address", c.GRPC(rest[1])); err == nil || !strings.Contains(err.Error()+out, "no space left on device") {
		t.Errorf("one of the two that can store was removed: %s, %v", out, err)
	}
	// A new start does not help as long as there is no room, and does no harm.
	stopNode(t, ctx, c, victim)
	check(t, c.StartNode(victim))
	awaitState(t, ctx, c, victim, "failed", "no space left on device")
	l.awaitCommits(ctx, 20, others(c, victim)...)
	stopNode(t, ctx, c, victim)
	disk.empty()
	check(t, c.StartNode(victim))
	l.awaitCommits(ctx, 20)
	awaitState(t, ctx, c, victim, "active", "")
	l.finish(ctx)
	stopNode(t, ctx, c, victim)
	disk.back()
	check(t, c.RunNode(ctx, victim))
}

// walDiskFull: the disk of a node's pg_wal is full, of which its PostgreSQL dies. The node says so, votes on, and comes
// back by itself when there is room.
func walDiskFull(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	const victim = 2
	stopNode(t, ctx, c, victim)
	disk := ownDisk(t, filepath.Join(c.NodeDir(victim), "pgdata", "pg_wal"))
	check(t, c.RunNode(ctx, victim))
	l := startLoad(t, ctx, c)
	disk.fill(64 << 10)
	awaitState(t, ctx, c, victim, "recovering", "No space left on device")
	if _, err := c.Connect(ctx, victim); cluster.SQLState(err) != "57P03" || !strings.Contains(err.Error(), "No space left on device") {
		t.Errorf("connect to the node meanwhile: %v", err)
	}
	l.awaitCommits(ctx, 20, others(c, victim)...)
	disk.empty()
	l.awaitCommits(ctx, 20)
	awaitState(t, ctx, c, victim, "active", "")
	l.finish(ctx)
	stopNode(t, ctx, c, victim)
	disk.back()
	check(t, c.RunNode(ctx, victim))
}

// stopNode stops a node, its PostgreSQL too, as an operator does.
func stopNode(t *testing.T, ctx context.Context, c *cluster.Cluster, i int) {
	t.Helper()
	pid, err := c.SidecarPID(i)
	check(t, err)
	check(t, syscall.Kill(pid, syscall.SIGTERM))
	check(t, c.AwaitEnd(ctx, pid))
}

// smallDisk is a directory on a file system of its own, which is not much larger than what was in it.
type smallDisk struct {
	t       *testing.T
	dir     string
	mounted bool
}

// ownDisk moves a directory that nobody uses to one. Files have holes where they had been allocated in advance, as on file
// systems that promise no room: elsewhere a full disk would be met once in 64 MiB only.
func ownDisk(t *testing.T, dir string) *smallDisk {
	t.Helper()
	aside := dir + ".aside"
	check(t, os.Rename(dir, aside))
	check(t, os.Mkdir(dir, 0o700))
	var used int64
	check(t, filepath.WalkDir(aside, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil {
			used += info.Size()
		}
		return err
	}))
	d := &smallDisk{t: t, dir: dir}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size="+strconv.FormatInt(used+64<<20, 10)); err != nil {
		check(t, os.Remove(dir))
		check(t, os.Rename(aside, dir))
		t.Skipf("a small file system cannot be mounted here: %v", err)
	}
	d.mounted = true
	t.Cleanup(d.unmount)
	own(t, dir, aside)
	d.copy(aside, dir)
	check(t, os.RemoveAll(aside))
	return d
}

// copy copies all that is in a directory. What is nothing but zeros becomes a hole.
func (d *smallDisk) copy(from, to string) {
	d.t.Helper()
	if out, err := exec.Command("cp", "-a", "--sparse=always", from+"/.", to).CombinedOutput(); err != nil {
		d.t.Fatalf("copy %s: %v: %s", from, err, out)
	}
}

// fill takes all room but what is to be left.
func (d *smallDisk) fill(left int64) {
	d.t.Helper()
	f, err := os.Create(d.ballast())
	check(d.t, err)
	var room syscall.Statfs_t
	check(d.t, syscall.Statfs(d.dir, &room))
	check(d.t, syscall.Fallocate(int(f.Fd()), 0, 0, int64(room.Bavail)*room.Bsize-left))
	check(d.t, f.Close())
}

func (d *smallDisk) empty() { check(d.t, os.Remove(d.ballast())) }

func (d *smallDisk) ballast() string { return filepath.Join(d.dir, "ballast") }

// back moves the directory, which nobody uses, to where it was.
func (d *smallDisk) back() {
	d.t.Helper()
	next := d.dir + ".next"
	check(d.t, os.Mkdir(next, 0o700))
	own(d.t, next, d.dir)
	d.copy(d.dir, next)
	d.unmount()
	check(d.t, os.Remove(d.dir))
	check(d.t, os.Rename(next, d.dir))
}

func (d *smallDisk) unmount() {
	if !d.mounted {
		return
	}
	d.mounted = false
	if err := syscall.Unmount(d.dir, syscall.MNT_DETACH); err != nil {
		d.t.Error(err)
	}
}
