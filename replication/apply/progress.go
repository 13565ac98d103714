package apply

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/quorate/quorate/internal/invariant"
	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
)

// Each transaction that a worker applies also inserts its CSN into one of two tables without an index. So the highest
// CSN there is exactly how far the workers have come, whatever crashed, and costs a few microseconds.
//
// A replication origin's remote_lsn, made for this, does not serve: the server moves it also when a transaction
// aborts (RecordTransactionAbort), so a worker that dies while it holds its COMMIT would count as having committed.
// One row for each worker, updated in place, would grow an ever longer chain of versions under an old snapshot.
//
// To the same end the CSN up to which everything is visible is inserted from time to time, in a transaction whose commit
// is flushed, and with it all earlier ones: also the node's own, which write no progress. See Pipeline.Flush.
//
// The tables take turns, an era of CSNs each. When one of an era is durable, the other table holds only what is superseded
// and is truncated: by flush, for that is what writes progress also where all transactions are the node's own.
const (
	eraBits  = 16
	maxItems = 1 << (eraBits - 2) // so that workers seldom hold a row of the next era, which keeps the table from being truncated
)

var progressTables = [2]string{"quorate.applied_even", "quorate.applied_odd"}

const (
	haveProgress = `SELECT to_regclass('quorate.applied_even') IS NOT NULL AND to_regclass('quorate.applied_odd') IS NOT NULL`
	// The lock, for the transaction, keeps two sessions from creating them at once.
	createProgress = `SELECT pg_advisory_xact_lock(hashtextextended('quorate.applied', 0));
CREATE SCHEMA IF NOT EXISTS quorate;
CREATE TABLE IF NOT EXISTS quorate.applied_even (csn bigint NOT NULL) WITH (autovacuum_enabled = off);
CREATE TABLE IF NOT EXISTS quorate.applied_odd (csn bigint NOT NULL) WITH (autovacuum_enabled = off)`
	highestProgress = `(SELECT coalesce(max(csn), 0) FROM (SELECT csn FROM quorate.applied_even UNION ALL SELECT csn FROM quorate.applied_odd) AS both_eras)`
)

var insertProgress = [2]string{
	"INSERT INTO quorate.applied_even VALUES ($1)",
	"INSERT INTO quorate.applied_odd VALUES ($1)",
}

func era(csn txn.CSN) uint64 { return uint64(csn) >> eraBits }

// prepareProgress creates the tables where they are missing.
func prepareProgress(ctx context.Context, c *pgconn.PgConn) error {
	rows, err := query(ctx, c, haveProgress)
	if err != nil || rows[0][0] == "t" {
		return err
	}
	return exec(ctx, c, createProgress)
}

// Progress returns how far this database is after a crash of PostgreSQL, the sidecar or both: everything up to there is
// committed, and of what follows nothing that this node applies from the log; what became of the node's own, only
// pg_xact_status knows. It first ends what is left of apply sessions of an earlier life, which might commit yet. conn is a superuser's, in the database that is
// applied to.
func Progress(ctx context.Context, conn *pgconn.PgConn) (txn.CSN, error) {
	if err := endSessions(ctx, conn, sessionPrefix+"%"); err != nil {
		return 0, fmt.Errorf("read progress: end earlier apply sessions: %w", err)
	}
	rows, err := query(ctx, conn, haveProgress)
	if err != nil {
		return 0, fmt.Errorf("read progress: %w", err)
	}
	if rows[0][0] != "t" {
		return 0, nil // nothing was ever applied
	}
	if rows, err = query(ctx, conn, "SELECT "+highestProgress); err != nil {
		return 0, fmt.Errorf("read progress: %w", err)
	}
	return parseProgress(rows)
}

// parseProgress reads the last column of the only row.
func parseProgress(rows [][]string) (txn.CSN, error) {
	if len(rows) != 1 || len(rows[0]) == 0 {
		return 0, fmt.Errorf("read progress: %d rows", len(rows))
	}
	n, err := strconv.ParseUint(rows[0][len(rows[0])-1], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read progress: %w", err)
	}
	return txn.CSN(n), nil
}

// truncateProgress empties the table of the other eras, once for each era. csn, which is durable, is in the table of its own.
// What was visible after it may have reached the next era meanwhile: then the other table is left as it is, and nobody adds to
// it while it is looked at. If somebody uses it at present, then next time: what is in there only takes space.
func (p *Pipeline) truncateProgress(ctx context.Context, c *pgconn.PgConn, csn txn.CSN) error {
	if p.truncated.Swap(era(csn)) == era(csn) {
		return nil
	}
	return exec(ctx, c, fmt.Sprintf(`SET lock_timeout = '20ms';
DO $$BEGIN
	LOCK TABLE %[1]s;
	IF NOT EXISTS (SELECT FROM %[1]s WHERE csn > %[2]d) THEN TRUNCATE %[1]s; END IF;
END$$`, progressTables[(era(csn)+1)%2], csn))
}

// Durable returns the CSN up to which everything is known to be on disk: a crash does not take it back.
func (p *Pipeline) Durable() txn.CSN { return txn.CSN(p.durable.Load()) }

// Flush returns when everything up to csn is visible and on disk, and Progress will say so. It is what must happen
// before the log may forget these transactions, because commits are asynchronous.
func (p *Pipeline) Flush(ctx context.Context, csn txn.CSN) error {
	if err := p.WaitFor(ctx, csn); err != nil {
		return fmt.Errorf("flush up to transaction %d: %w", csn, err)
	}
	select {
	case p.flushing <- struct{}{}:
		defer func() { <-p.flushing }()
	case <-ctx.Done():
		return fmt.Errorf("flush up to transaction %d: %w", csn, ctx.Err())
	}
	if p.Durable() >= csn {
		return nil
	}
	if err := p.flush(ctx, p.Applied()); err != nil {
		return fmt.Errorf("flush up to transaction %d: %w", csn, err)
	}
	invariant.Check(p.Durable() >= csn, "apply: flushed up to %d, not %d", p.Durable(), csn)
	return nil
}

// flush makes everything up to csn, which is visible, durable. One at a time: see flushing.
func (p *Pipeline) flush(ctx context.Context, csn txn.CSN) error {
	c, err := p.connect(ctx)
	if err != nil {
		return err
	}
	// The record of this commit follows those of the others in the WAL, so flushing it flushes them.
	err = exec(ctx, c, sessionSettings+"; SET application_name = '"+sessionPrefix+"flush'; SET synchronous_commit = on")
	if err == nil {
		err = prepareProgress(ctx, c)
	}
	if err == nil {
		_, err = query(ctx, c, insertProgress[era(csn)%2], strconv.FormatUint(uint64(csn), 10))
	}
	if err == nil {
		p.durable.Store(uint64(csn))
		if err := p.truncateProgress(ctx, c, csn); err != nil {
			p.log.Info("the progress table of the last era is not truncated now", logkey.CSN, uint64(csn), logkey.Error, err)
		}
	}
	return errors.Join(err, c.Close(context.WithoutCancel(ctx)))
}

// keepDurable bounds what has to be done again, or asked about, after a crash.
func (p *Pipeline) keepDurable(ctx context.Context) error {
	ticker := time.NewTicker(p.cfg.FlushEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		err := p.Flush(ctx, p.Applied())
		if errors.Is(err, ErrServerLost) {
			return err
		}
		if err != nil && ctx.Err() == nil {
			p.log.Warn("cannot make durable what is visible", logkey.CSN, uint64(p.Applied()), logkey.Error, err)
		}
	}
}
