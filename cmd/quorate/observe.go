package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	pb "github.com/quorate/quorate/proto/quorate/v1"
)

// asking is a command that asks one question of a node and shows the answer.
type asking struct {
	target
	output
	timeout time.Duration
}

func (a *asking) flags(cmd *cobra.Command) {
	a.target.flags(cmd)
	a.output.flags(cmd)
	cmd.Flags().DurationVar(&a.timeout, "timeout", 5*time.Second, "how long to wait for an answer")
}

func (a *asking) complete() error {
	if err := a.output.complete(); err != nil {
		return err
	}
	return a.target.complete()
}

// ask calls f with a connection and a time limit. what says what for, in an error.
func (a *asking) ask(ctx context.Context, what string, f func(context.Context, *grpc.ClientConn) error) error {
	if err := a.complete(); err != nil {
		return err
	}
	conn, err := a.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	if err := f(ctx, conn); err != nil {
		return fmt.Errorf("%s from %s: %w", what, a.address, said(err))
	}
	return nil
}

// said puts an error of a call in the words of whoever made it.
func said(err error) error {
	if s, ok := status.FromError(err); ok && err != nil {
		return fmt.Errorf("%s (%s)", s.Message(), s.Code())
	}
	return err
}

// firstView asks for the cluster as a node sees it.
func firstView(ctx context.Context, conn *grpc.ClientConn) (*pb.View, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := pb.NewObserveClient(conn).Watch(ctx, &pb.WatchRequest{})
	if err != nil {
		return nil, err
	}
	return stream.Recv()
}

func viewCommand(use, short, long string, show func(*screen, viewForm)) *cobra.Command {
	var a asking
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long, GroupID: groupLook, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.ask(cmd.Context(), "get "+use, func(ctx context.Context, conn *grpc.ClientConn) error {
				v, err := firstView(ctx, conn)
				if err != nil {
					return err
				}
				form := newViewForm(v)
				return a.write(cmd.OutOrStdout(), form, func(s *screen) { show(s, form) })
			})
		},
	}
	a.flags(cmd)
	return cmd
}

func nodesCommand() *cobra.Command {
	return viewCommand("nodes", "Show each member: how it is, how far, how busy",
		"Show each member as the asked node has last heard of it, directly or by way of others. Ages tell how old that is.",
		func(s *screen, v viewForm) { s.summary(v); s.nodes(v) })
}

func heartbeatsCommand() *cobra.Command {
	return viewCommand("heartbeats", "Show who hears whom",
		"Show how long ago each member last heard each other one. A row is who hears, a column who is heard: where only one of the two "+
			"directions between nodes is old, connections can be made one way only. Then round trip, loss and jitter as each receiver measures them.",
		func(s *screen, v viewForm) { s.matrix(v); s.links(v) })
}

func transactionsCommand() *cobra.Command {
	var a asking
	var limit uint32
	var local bool
	cmd := &cobra.Command{
		Use:   "transactions [GID]",
		Short: "Show transactions that are on their way, or what became of one",
		Long: "Show the transactions between COMMIT and being visible, on all members, the oldest first. With a GID (quorate.current_gid(), or from " +
			"an error 08007): what became of that transaction, by the log as the asked node has it: committed, aborted, in doubt (not decided here yet) " +
			"or unknown (decided too long ago, or nobody's).\n\n" +
			"Stages at the origin: marker, sending, queued, proposed, in doubt, decided, released; elsewhere: waiting, executing, executed, committing, evicted.",
		GroupID: groupLook,
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return a.ask(cmd.Context(), "look up a transaction", func(ctx context.Context, conn *grpc.ClientConn) error {
					return a.lookup(ctx, cmd, conn, args[0])
				})
			}
			return a.ask(cmd.Context(), "get transactions", func(ctx context.Context, conn *grpc.ClientConn) error {
				r, err := pb.NewObserveClient(conn).Transactions(ctx, &pb.TransactionsRequest{Limit: limit, Local: local})
				if err != nil {
					return err
				}
				form := transactionsForm{[]transactionForm{}, newSilentForms(r.Unreachable)}
				for _, t := range r.Transactions {
					form.Transactions = append(form.Transactions, newTransactionForm(t))
				}
				return a.write(cmd.OutOrStdout(), form, func(s *screen) {
					var rows [][]cell
					for _, t := range form.Transactions {
						rows = append(rows, []cell{text(t.GID), number(t.Node), {text: t.Stage, style: stageStyle(t.Stage)}, seconds(t.AgeSeconds), orUnknown(t.CSN), orUnknown(t.PID)})
					}
					s.list("no transactions are on their way", []string{"gid", "node", "stage", "age", "csn", "pid"}, rows)
					s.silent(form.Unreachable)
				})
			})
		},
	}
	a.flags(cmd)
	cmd.Flags().Uint32Var(&limit, "limit", 100, "how many to show of each node, at most 1000")
	cmd.Flags().BoolVar(&local, "local", false, "only those of the asked node")
	return cmd
}

func (a *asking) lookup(ctx context.Context, cmd *cobra.Command, conn *grpc.ClientConn, gid string) error {
	r, err := pb.NewObserveClient(conn).Lookup(ctx, &pb.LookupRequest{Gid: gid})
	if err != nil {
		return err
	}
	form := lookupForm{GID: gid, Status: r.Status}
	if r.InFlight != nil {
		t := newTransactionForm(r.InFlight)
		form.InFlight = &t
	}
	if r.Conflict != nil {
		c := newConflictForm(r.Conflict)
		form.Conflict = &c
	}
	return a.write(cmd.OutOrStdout(), form, func(s *screen) {
		s.printf("%s: %s", gid, form.Status)
		if t := form.InFlight; t != nil {
			s.printf("on its way at node %d, %s, for %s", t.Node, t.Stage, seconds(t.AgeSeconds).text)
		}
		if c := form.Conflict; c != nil {
			s.printf("it lost to %s", winner(*c)+where(*c))
		}
	})
}

func conflictsCommand() *cobra.Command {
	var a asking
	var limit uint32
	var local bool
	cmd := &cobra.Command{
		Use:   "conflicts",
		Short: "Show which transactions lost to which, and where",
		Long: "Show the latest transactions that were aborted because another one came first, the newest first. \"certification\": the log decided. " +
			"\"eviction\": the transaction stood in the way of one that was decided already; table and key are what that one waited for, as far as they " +
			"could be found out. Conflicts are kept in memory, 512 at least.",
		GroupID: groupLook,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.ask(cmd.Context(), "get conflicts", func(ctx context.Context, conn *grpc.ClientConn) error {
				r, err := pb.NewObserveClient(conn).Conflicts(ctx, &pb.ConflictsRequest{Limit: limit, Local: local})
				if err != nil {
					return err
				}
				form := conflictsForm{[]conflictForm{}, newSilentForms(r.Unreachable)}
				for _, c := range r.Conflicts {
					form.Conflicts = append(form.Conflicts, newConflictForm(c))
				}
				return a.write(cmd.OutOrStdout(), form, func(s *screen) {
					var rows [][]cell
					for _, c := range form.Conflicts {
						rows = append(rows, []cell{clock(c.Time), text(c.Kind), number(c.Node), text(dash(c.GID)), text(winner(c)), place(c.Table), place(c.Key)})
					}
					s.list("no conflicts are remembered", []string{"time", "kind", "node", "loser", "lost to", "table", "key"}, rows)
					s.silent(form.Unreachable)
				})
			})
		},
	}
	a.flags(cmd)
	cmd.Flags().Uint32Var(&limit, "limit", 100, "how many to show, at most 1000")
	cmd.Flags().BoolVar(&local, "local", false, "only those that the asked node knows of")
	return cmd
}

// winner names who came first, as far as that is known.
func winner(c conflictForm) string {
	if c.WinnerGID == "" {
		return fmt.Sprintf("csn %d", c.WinnerCSN)
	}
	return fmt.Sprintf("%s (csn %d)", c.WinnerGID, c.WinnerCSN)
}

// place is a table or a key, which of a conflict is not always known.
func place(name string) cell {
	if name == "" {
		return cell{text: "unknown", style: dim}
	}
	return text(name)
}

func where(c conflictForm) string {
	if c.Table+c.Key == "" {
		return ""
	}
	return strings.TrimRight(" at "+c.Table+" "+c.Key, " ")
}

func eventsCommand() *cobra.Command {
	var a asking
	var limit uint32
	var local, follow bool
	var since time.Duration
	var severity, kind string
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show what has happened: elections, losses, recoveries",
		Long: "Show what has happened, as each member has noted it, the newest first: elections, members lost and heard again, quorum lost and regained, " +
			"recoveries, fencing. Members keep their events on disk, some thousands each. Times are of the clock of the member that noted it.\n\n" +
			"With --follow the latest events come first, the oldest of them first, and then those that happen, until interrupted; each member's in their order and " +
			"each once, also when the asked node, or another, was away in between. With -o json each event is a line, with -o yaml a document.",
		GroupID: groupLook,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			least, ok := map[string]pb.Severity{"info": pb.Severity_SEVERITY_INFO, "warning": pb.Severity_SEVERITY_WARNING, "error": pb.Severity_SEVERITY_ERROR}[severity]
			if !ok {
				return usage("severity", strconv.Quote(severity), "must be info, warning or error")
			}
			if since < 0 {
				return usage("since", since.String(), "must not be negative")
			}
			req := &pb.EventsRequest{Limit: limit, Local: local, AtLeast: least, Kind: kind}
			if since > 0 {
				req.SinceMs = time.Now().Add(-since).UnixMilli()
			}
			if follow {
				f := follower{asking: &a, out: cmd.OutOrStdout(), log: cmd.ErrOrStderr()}
				return f.run(cmd.Context(), req)
			}
			return a.ask(cmd.Context(), "get events", func(ctx context.Context, conn *grpc.ClientConn) error {
				r, err := pb.NewObserveClient(conn).Events(ctx, req)
				if err != nil {
					return err
				}
				form := eventsForm{[]eventForm{}, newSilentForms(r.Unreachable)}
				for _, e := range r.Events {
					form.Events = append(form.Events, newEventForm(e))
				}
				return a.write(cmd.OutOrStdout(), form, func(s *screen) {
					s.events(form.Events)
					s.silent(form.Unreachable)
				})
			})
		},
	}
	a.flags(cmd)
	cmd.Flags().Uint32Var(&limit, "limit", 50, "how many to show, at most 1000; with --follow, how many of those that have happened")
	cmd.Flags().BoolVar(&local, "local", false, "only those that the asked node has noted")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with those that happen")
	cmd.Flags().DurationVar(&since, "since", 0, "only those of the latest `time`, such as 90m; 0: all")
	cmd.Flags().StringVar(&severity, "severity", "info", "at least this: info, warning or error")
	cmd.Flags().StringVar(&kind, "kind", "", "only this `kind`, such as leader or quorum_lost")
	_ = cmd.RegisterFlagCompletionFunc("severity", cobra.FixedCompletions([]string{"info", "warning", "error"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// summary says in a line whether the cluster can commit, and how much more may fail.
func (s *screen) summary(v viewForm) {
	s.line(cell{text: "cluster " + v.Cluster, style: bold}, text(", "), quorumCell(v.Quorum, int(v.VotersHeard), int(v.Voters)), text(", "), leaderCell(v.Leader),
		text(fmt.Sprintf(", term %d; seen by node %d", v.Term, v.Node)))
}

func leaderCell(leader uint32) cell {
	if leader == 0 {
		return cell{text: "no leader known", style: bad}
	}
	return text(fmt.Sprintf("leader %d", leader))
}

// quorumCell says how many voters are heard of how many, and how many more may fail.
func quorumCell(quorum bool, heard, voters int) cell {
	spare := heard - (voters/2 + 1)
	switch {
	case !quorum:
		return cell{text: fmt.Sprintf("NO QUORUM (%d of %d heard)", heard, voters), style: bad}
	case spare <= 0 && voters > 1:
		return cell{text: fmt.Sprintf("quorum, %d of %d heard, none more may fail", heard, voters), style: fair}
	}
	as := good
	if heard < voters {
		as = fair
	}
	return cell{text: fmt.Sprintf("quorum, %d of %d heard, %d more may fail", heard, voters, max(spare, 0)), style: as}
}

func stateStyle(state string) style {
	switch state {
	case "active":
		return good
	case "failed", "no contact":
		return bad
	}
	return fair
}

func stageStyle(stage string) style {
	if stage == "in doubt" {
		return bad
	}
	return plain
}

func yesNo(yes bool) cell {
	if yes {
		return text("yes")
	}
	return cell{text: "no", style: bad}
}

func (s *screen) nodes(v viewForm) {
	head := []string{"node", "role", "state", "writes", "lag", "queue", "commits/s", "aborts/s", "clients", "server", "disk free", "wal kept", "slot lag", "up", "heard"}
	var rows [][]cell
	for _, n := range v.Nodes {
		row := []cell{number(n.ID)}
		h := n.Health
		if h == nil {
			row = append(row, text("unknown"), cell{text: "no contact", style: bad}, yesNo(false))
			for range 10 {
				row = append(row, unknown())
			}
		} else {
			state := cell{text: h.State, style: stateStyle(h.State)}
			if !n.Heard {
				state = cell{text: "no contact", style: bad}
			}
			server := cell{text: h.PostgresVersion}
			switch {
			case h.PostgresUp == nil:
				server = cell{text: "none", style: dim}
			case !*h.PostgresUp:
				server = cell{text: "down", style: bad}
			}
			row = append(row, text(h.Role), state, yesNo(h.AcceptsWrites && n.Heard), maybe(n.Lag), number(h.QueueTransactions),
				rate(h.CommitsPerSecond), rate(h.AbortsPerSecond), number(h.Sessions), server, size(h.DiskFreeBytes), size(h.WALKeptBytes), size(h.SlotLagBytes), seconds(h.UptimeSeconds))
		}
		heard := unknown()
		if n.ReportAgeSeconds != nil {
			heard = age(*n.ReportAgeSeconds, v.HeartbeatTimeoutSeconds)
		}
		rows = append(rows, append(row, heard))
	}
	s.table(head, rows)
	for _, n := range v.Nodes {
		if n.Health != nil && n.Health.Reason != "" {
			s.printf("node %d: %s", n.ID, n.Health.Reason)
		}
	}
}

// matrix shows ages: who hears, downwards, and who is heard, across.
func (s *screen) matrix(v viewForm) {
	head := []string{"hears"}
	for _, n := range v.Nodes {
		head = append(head, strconv.FormatUint(uint64(n.ID), 10))
	}
	var rows [][]cell
	for _, hearer := range v.Nodes {
		row := []cell{number(hearer.ID)}
		for _, other := range v.Nodes {
			at := slices.IndexFunc(hearer.Hears, func(h heardForm) bool { return h.Node == other.ID })
			switch {
			case hearer.ID == other.ID:
				row = append(row, cell{text: "·", style: dim, right: true})
			case at < 0:
				row = append(row, cell{text: "?", style: bad, right: true})
			case hearer.Hears[at].AgeSeconds == nil:
				row = append(row, cell{text: "never", style: bad, right: true})
			default:
				row = append(row, age(*hearer.Hears[at].AgeSeconds, v.HeartbeatTimeoutSeconds))
			}
		}
		rows = append(rows, row)
	}
	s.table(head, rows)
}

// links shows what is measured of each direction.
func (s *screen) links(v viewForm) {
	var rows [][]cell
	for _, hearer := range v.Nodes {
		for _, h := range hearer.Hears {
			roundTrip := unknown()
			if h.RoundTripSeconds != nil {
				roundTrip = seconds(*h.RoundTripSeconds)
			}
			loss := cell{text: strconv.FormatFloat(100*h.Loss, 'f', 0, 64) + " %", right: true}
			if h.Loss > 0 {
				loss.style = fair
			}
			rows = append(rows, []cell{text(fmt.Sprintf("%d → %d", h.Node, hearer.ID)), roundTrip, loss, seconds(h.JitterSeconds)})
		}
	}
	s.line()
	s.table([]string{"from → to", "round trip", "loss", "jitter"}, rows)
}

func (s *screen) events(all []eventForm) {
	var rows [][]cell
	for _, e := range all {
		rows = append(rows, e.cells())
	}
	s.list("no events", []string{"time", "node", "severity", "kind", "what"}, rows)
}

// cells are an event's row in a table.
func (e eventForm) cells() []cell {
	as := map[string]style{"warning": fair, "error": bad}[e.Severity]
	words := e.Text
	if again := e.Fields["repetitions"]; again != "" {
		words += " (and " + again + " times more)"
	}
	return []cell{clock(e.Time), number(e.Node), {text: e.Severity, style: as}, text(e.Kind), text(words)}
}

func (s *screen) list(none string, head []string, rows [][]cell) {
	if len(rows) == 0 {
		s.printf("%s", none)
		return
	}
	s.table(head, rows)
}

func (s *screen) silent(all []silentForm) {
	for _, u := range all {
		s.line(cell{text: fmt.Sprintf("node %d did not answer: %s", u.Node, u.Reason), style: fair})
	}
}

func age(s, limit float64) cell {
	c := seconds(s)
	c.style = good
	if s > limit {
		c.style = bad
	}
	return c
}

// seconds writes a time with as many digits as matter.
func seconds(s float64) cell {
	d := time.Duration(s * float64(time.Second))
	switch {
	case d < 10*time.Millisecond:
		d = d.Round(10 * time.Microsecond)
	case d < time.Second:
		d = d.Round(time.Millisecond)
	case d < time.Minute:
		d = d.Round(100 * time.Millisecond)
	default:
		d = d.Round(time.Second)
	}
	return cell{text: strings.Replace(d.String(), "µs", "us", 1), right: true}
}

// clock is local time, as people's other logs have it.
func clock(t time.Time) cell { return text(t.Local().Format("2006-01-02 15:04:05.000")) }

func rate(r float64) cell { return cell{text: strconv.FormatFloat(r, 'f', 0, 64), right: true} }

func size(n uint64) cell {
	f, unit := float64(n), 0
	for f >= 1024 && unit < 4 {
		f, unit = f/1024, unit+1
	}
	return cell{text: strconv.FormatFloat(f, 'f', 1, 64) + " " + [...]string{"B", "KiB", "MiB", "GiB", "TiB"}[unit], right: true}
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func orUnknown[T uint32 | uint64](n T) cell {
	if n == 0 {
		return unknown()
	}
	return number(n)
}
