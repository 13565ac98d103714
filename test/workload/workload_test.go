package workload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/pgserver"
	"github.com/quorate/quorate/internal/pgserver/pgtest"
	"github.com/quorate/quorate/test/check"
)

// server starts a stock server, on which clients may write.
func server(t *testing.T) *pgserver.Server {
	t.Helper()
	return pgtest.Start(t, pgtest.Options{Tmpfs: true, Settings: pgserver.Settings{
		"default_transaction_read_only": "off", "synchronous_commit": "off", "deadlock_timeout": "100ms",
	}})
}

// start returns a workload on servers, whose tables are made.
func start(t *testing.T, o Options, servers ...*pgserver.Server) *Workload {
	t.Helper()
	for _, s := range servers {
		o.Nodes = append(o.Nodes, s.ConnString("postgres"))
	}
	w, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

// rounds runs a workload until its history has what a test waits for, which takes a second or two, or until it is too
// late. It returns the last judgement.
func rounds(t *testing.T, w *Workload, enough func(check.Report) bool) check.Report {
	t.Helper()
	for n := 1; ; n++ {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		w.Run(ctx)
		cancel()
		if err := w.Final(t.Context()); err != nil {
			t.Fatal(err)
		}
		report := check.Judge(w.History(), check.Everywhere)
		if n == 40 || enough(report) {
			t.Logf("%d rounds: %v", n, report.Counts)
			return report
		}
	}
}

// TestStockServer: what one PostgreSQL does is what its isolation levels promise, write skew included.
func TestStockServer(t *testing.T) {
	w := start(t, Options{Seed: 1, Clients: 3}, server(t))
	begin := time.Now()
	report := rounds(t, w, func(r check.Report) bool {
		return r.Err() != nil || time.Since(begin) > 2*time.Second && uncovered(w.History(), r) == nil
	})
	if err := errors.Join(report.Err(), uncovered(w.History(), report)); err != nil {
		t.Error(err)
	}
	for _, op := range w.History() {
		if op.Outcome == check.Unknown {
			t.Errorf("unknown outcome on a server that did not fail: %v: %s", op, op.Error)
		}
	}
}

// uncovered tells what a history should have and has not: write skew, which is shown to be allowed, and everything that
// clients can do.
func uncovered(h check.History, r check.Report) error {
	var errs []error
	if !slices.ContainsFunc(r.Permitted, func(a check.Anomaly) bool { return a.Name == "G2-item (write skew)" }) {
		errs = append(errs, errors.New("no write skew"))
	}
	done := map[string]map[check.Outcome]int{}
	verbs := map[check.Verb]int{}
	for _, op := range h {
		if done[op.Kind] == nil {
			done[op.Kind] = map[check.Outcome]int{}
		}
		done[op.Kind][op.Outcome]++
		for _, a := range op.Do {
			if op.Outcome == check.OK {
				verbs[a.Do]++
			}
		}
	}
	for _, kind := range Kinds() {
		if done[kind][check.OK] == 0 || done[kind][check.Failed] == 0 {
			errs = append(errs, fmt.Errorf("%s: %v; want some ok and some failed", kind, done[kind]))
		}
	}
	for _, verb := range []check.Verb{check.Append, check.List, check.Write, check.Read, check.Open, check.Add, check.Count, check.Balances, check.Insert, check.Delete, check.Scan} {
		if verbs[verb] == 0 {
			errs = append(errs, fmt.Errorf("nobody did %q", verb))
		}
	}
	return errors.Join(errs...)
}

// TestPlantedFaults: workloads and checker together find what is wrong with a server, or with what stands before it.
func TestPlantedFaults(t *testing.T) {
	one, two := server(t), server(t)
	exec := func(sql string) func(*testing.T, *Workload) {
		return func(t *testing.T, _ *Workload) {
			if _, err := pgtest.Connect(t, one, "postgres").Exec(t.Context(), sql); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, test := range []struct {
		name  string
		kinds []string
		plant func(*testing.T, *Workload)
		nodes []*pgserver.Server
		want  []string // one of them
	}{
		{"read committed where repeatable read was asked for: registers", []string{"register"}, weaken, nil, []string{"lost update"}},
		{"read committed where repeatable read was asked for: lists", []string{"append"}, weaken, nil, []string{"G-single (read skew)", "internal inconsistency"}},
		{"read committed where repeatable read was asked for: bank", []string{"bank"}, weaken, nil, []string{"unbalanced bank"}},
		{"read committed where repeatable read was asked for: counter", []string{"counter"}, weaken, nil, []string{"counter too low"}},
		{"acknowledged and rolled back", nil, forget, nil, []string{"lost append"}},
		{"no unique constraint", []string{"unique"}, exec("ALTER TABLE w_seat DROP CONSTRAINT w_seat_once"), nil, []string{"duplicate key"}},
		{"no foreign key", []string{"foreign"}, exec("ALTER TABLE w_child DROP CONSTRAINT w_child_of"), nil, []string{"orphan"}},
		{"half of a bulk", []string{"bulk"}, exec(`CREATE FUNCTION half() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN CASE WHEN NEW.part % 2 = 0 THEN NEW END; END $$;
			CREATE TRIGGER half BEFORE INSERT ON w_bulk FOR EACH ROW EXECUTE FUNCTION half()`), nil, []string{"unwritten value"}},
		{"two servers that know nothing of each other", []string{"append"}, tablesOn(two), []*pgserver.Server{one, two}, []string{"lost append", "incompatible order"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			nodes := test.nodes
			if nodes == nil {
				nodes = []*pgserver.Server{one}
			}
			w := start(t, Options{Seed: 2, Kinds: test.kinds, Clients: 4}, nodes...)
			test.plant(t, w)
			found := func(r check.Report) bool { return slices.ContainsFunc(test.want, r.Has) }
			if report := rounds(t, w, found); !found(report) {
				t.Errorf("want one of %q, got\n%v", test.want, report.Err())
			}
		})
	}
}

// weaken asks the server for less than the history says.
func weaken(_ *testing.T, w *Workload) { w.levels[check.RepeatableRead] = "READ COMMITTED" }

// forget acknowledges, now and then, what is not done.
func forget(_ *testing.T, w *Workload) {
	commit := w.commit
	w.commit = func(ctx context.Context, conn *pgx.Conn) (pgconn.CommandTag, error) {
		if rand.IntN(50) > 0 {
			return commit(ctx, conn)
		}
		_, err := conn.Exec(ctx, "ROLLBACK")
		return pgconn.NewCommandTag("COMMIT"), err
	}
}

func tablesOn(s *pgserver.Server) func(*testing.T, *Workload) {
	return func(t *testing.T, _ *Workload) { start(t, Options{}, s) }
}

// TestBrokenConnections: clients whose sessions are ended, again and again, come back, and know what they do not know.
func TestBrokenConnections(t *testing.T) {
	s := server(t)
	w := start(t, Options{Seed: 3, Clients: 4}, s)
	killer := pgtest.Connect(t, s, "postgres")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	const enough = 100
	killed := 0
	ended := make(chan error, 1)
	go func() {
		defer cancel()
		unknown := func(op check.Op) bool { return op.Outcome == check.Unknown }
		for (killed < enough || !slices.ContainsFunc(w.History(), unknown)) && ctx.Err() == nil {
			// The pause lets clients come to something before they are ended.
			var n int
			err := killer.QueryRow(t.Context(), `SELECT count(pg_terminate_backend(pid)) FROM pg_sleep(0.01), LATERAL (
				SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND state <> 'idle'
				ORDER BY random() LIMIT 1)`).Scan(&n)
			if err != nil {
				ended <- err
				return
			}
			killed += n
		}
		ended <- nil
	}()
	w.Run(ctx)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if err := w.Final(t.Context()); err != nil {
		t.Fatal(err)
	}
	report := check.Judge(w.History(), check.Everywhere)
	if err := report.Err(); err != nil {
		t.Error(err)
	}
	sessions := map[int]bool{}
	for _, op := range w.History() {
		sessions[op.Process] = true
		if op.Error != "" && op.Outcome == check.OK {
			t.Errorf("%v was acknowledged: %s", op, op.Error)
		}
	}
	t.Logf("%v in %d sessions, %d killed", report.Counts, len(sessions), killed)
	if killed < enough || len(sessions) < enough || report.Counts[check.OK] == 0 || report.Counts[check.Unknown] == 0 {
		t.Errorf("%d sessions, %d killed, outcomes %v", len(sessions), killed, report.Counts)
	}
}

// TestEndAfterCommit: a session that ends with the answer to COMMIT has committed.
func TestEndAfterCommit(t *testing.T) {
	w := start(t, Options{Kinds: []string{"skew"}, Clients: 2}, server(t))
	ended := &pgconn.PgError{Severity: "FATAL", Code: "57P01"}
	commit := w.commit
	w.commit = func(ctx context.Context, conn *pgx.Conn) (pgconn.CommandTag, error) {
		tag, err := commit(ctx, conn)
		if err == nil {
			err = errors.Join(ended, conn.Close(ctx))
		}
		return tag, err
	}
	r := rounds(t, w, func(r check.Report) bool { return r.Counts[check.OK] > 10 })
	if err := r.Err(); err != nil || r.Counts[check.OK] <= 10 || r.Counts[check.Unknown] > 0 {
		t.Errorf("%v %v", r.Counts, err)
	}
}

// TestRoam: a client whose node is not there goes on to the next, when it may.
func TestRoam(t *testing.T) {
	s := server(t)
	for _, roam := range []bool{false, true} {
		w := start(t, Options{Kinds: []string{"counter"}, Roam: roam}, s)
		w.options.Nodes = append(w.options.Nodes, nobody(t))
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		w.Run(ctx)
		sessions := map[int]bool{}
		for _, op := range w.History()[1:] { // without Setup
			sessions[op.Process] = true
			if op.Node != 1 {
				t.Errorf("%v: on a node that is not there", op)
			}
		}
		if want := map[bool]int{false: 1, true: 2}[roam]; len(sessions) != want {
			t.Errorf("roam %v: %d sessions, want %d", roam, len(sessions), want)
		}
	}
}

// nobody is the connection string of a server that is not there.
func nobody(t *testing.T) string {
	return fmt.Sprintf("postgres://127.0.0.1:%d/postgres", pgtest.FreePort(t))
}

// TestNobodyThere: without a server nothing is done, and the end of the context is the end.
func TestNobodyThere(t *testing.T) {
	w, err := New(Options{Nodes: []string{nobody(t)}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	w.Run(ctx)
	if len(w.History()) > 0 {
		t.Errorf("a history without a server: %v", w.History())
	}
	if w.Setup(t.Context()) == nil || w.Final(t.Context()) == nil {
		t.Error("no error without a server")
	}
}

func TestOptions(t *testing.T) {
	if _, err := New(Options{}); err == nil {
		t.Error("no error without nodes")
	}
	if _, err := New(Options{Nodes: []string{"x"}, Kinds: []string{"bank", "banks"}}); err == nil || !strings.Contains(err.Error(), `"banks"`) {
		t.Errorf("unknown kind: got %v", err)
	}
}

func TestOutcome(t *testing.T) {
	state := func(code string) error { return fmt.Errorf("commit: %w", &pgconn.PgError{Code: code}) }
	const before, after = false, true
	for _, test := range []struct {
		sent bool
		err  error
		want check.Outcome
	}{
		{after, nil, check.OK},
		{before, io.ErrUnexpectedEOF, check.Failed},
		{before, state("57P01"), check.Failed},
		{before, state("40001"), check.Failed},
		{before, state("08007"), check.Failed},
		{after, errRolledBack, check.Failed},
		{after, state("40001"), check.Failed},
		{after, state("40P01"), check.Failed},
		{after, state("23505"), check.Failed},
		{after, state("23503"), check.Failed},
		{after, state("25006"), check.Failed},
		{after, state("25P02"), check.Failed},
		{after, state("0A000"), check.Failed},
		{after, state("42P01"), check.Failed},
		{after, state("40003"), check.Unknown},
		{after, state("08007"), check.Unknown},
		{after, state("57P01"), check.Unknown},
		{after, state("57014"), check.Unknown},
		{after, state("XX000"), check.Unknown},
		{after, io.ErrUnexpectedEOF, check.Unknown},
		{after, context.DeadlineExceeded, check.Unknown},
		{before, errors.Join(errGiveUp, pgx.ErrTxClosed), check.Failed},
	} {
		if got := outcome(test.sent, test.err); got != test.want {
			t.Errorf("sent %v, error %v: got %s, want %s", test.sent, test.err, got, test.want)
		}
	}
}
