/*
 * The commit protocol and the recovery of Quorate, for exhaustive checking by spin. README.md beside this file says
 * what stands for what. Every option of a loop below is one step: whatever may happen between two steps of the code,
 * above all a crash, may happen between two steps here.
 */

#ifndef T
#define T 2			/* transactions: the first of node 0, the others of node 1; or, with TWO_OWN, only the second of node 1 */
#endif
#ifndef SIDECAR_CRASHES
#define SIDECAR_CRASHES 1
#endif
#ifndef POSTGRES_CRASHES
#define POSTGRES_CRASHES 1
#endif
#ifndef KILLS
#define KILLS 1			/* ends of single server sessions, with or without their COMMIT */
#endif
#ifndef REPEATS
#define REPEATS 1		/* proposals that are sent a second time */
#endif
#ifndef SNAPSHOTS
#define SNAPSHOTS 1
#endif
#define N 2
#define L (T + REPEATS)		/* entries of the log */
#define W (T + REPEATS + 2)	/* transactions in a server's WAL, some more than there should be */

#ifdef TWO_OWN
#define origin(t) ((t) == 1 -> 1 : 0)
#else
#define origin(t) ((t) == 0 -> 0 : 1)
#endif
#define faulty(n) ((n) == 0)	/* nodes have only the log in common, so it is enough if one of them crashes */

/*
 * The properties. A run with ONLY=p looks at that one alone: so each planted bug shows that this property finds it.
 */
#define ORDER 1			/* no two nodes commit two transactions in different orders */
#define FIRST_COMMITTER 2	/* a transaction that commits has seen all committed ones that wrote the same row */
#define ACKNOWLEDGED 3		/* what a client was told is committed, the log says too */
#define ABORTED 4		/* what a client was told is aborted, commits nowhere */
#define ONCE 5			/* no transaction is in a database twice */
#define GAPLESS 6		/* a transaction is committed only directly after the one before it in the order */
#define TRUNCATION 7		/* what the log has forgotten, the server has not, whatever crashes */
#define COMPLETE 8		/* in the end every node is up and has everything, and every client an answer */
#ifndef ONLY
#define ONLY 0
#endif
#define property(p, holds) assert((ONLY != 0 && ONLY != p) || (holds))

/* ---- the log: an entry is there for good, on all nodes, once it is appended ---- */

byte logged[L];			/* the transaction of each entry */
byte verdict[L];		/* its CSN, or one of the following */
#define ABORT 254
#define DUPLICATE 255
byte entries;
byte order[L + 1];		/* by CSN, from 1 */
byte last;			/* CSN */
bit decided[T];
bit commits[T];

/* ---- transactions ---- */

bit row[T];			/* which one it writes; any */
byte seen[T];			/* applied at the origin when COMMIT came */
byte saw[T];			/* what was really committed there when it took its row: not known to the protocol */
byte inflight[T];		/* copies of its proposal on their way */
bit proposedTwice[T];

byte co[T];			/* what the coordinator and the gateway know of it */
#define NONE 0
#define REGISTERED 1
#define QUEUED 2		/* the marker is on disk, capture has the write set */
#define PROPOSED 3
#define DECIDED 4
#define RELEASED 5
#define TELLING 6		/* the server is lost: only the log's word is waited for */
#define FINISHED 7
bit lost[T];			/* the session has reported Lost */

byte be[T];			/* its server session, or its xid's status when that is gone */
/* NONE */
#define OPEN 1
#define SENT 2			/* COMMIT is on its way to the server */
#define COMMITTED 3
#define GONE 4			/* rolled back */

byte told[T];			/* the client's answer: NONE or one of these */
#define ACK 1
#define REFUSED 2
#define UNKNOWN 3

/* ---- PostgreSQL: its WAL is the database. A commit is asynchronous: on disk only when something flushes ---- */

#define at(n, i) ((n) * W + (i))
byte wal[N * W];		/* the transaction */
byte progress[N * W];		/* the CSN in the progress row that was committed with it, or right after it; or 0 */
bit ends[N * W];		/* the last of a commit: a group of transactions is committed at once */
byte size[N];
byte flushed[N];		/* at least so much of it is on disk */

/* ---- sidecars ---- */

bit up[N];
#define DOWN 0
#define UP 1
byte start[N];			/* CSN up to which the pipeline takes everything as applied */
byte applied[N];		/* booked as visible */
byte delivered[N];		/* entries of the log */
byte enqueued[N];		/* CSN */
bit suspended[N];		/* the server has restarted: nothing is let through */

byte head[N];			/* the local transaction whose turn it is */
#define WAITING 0
#define LET 1			/* released */
#define CONFIRMED 2		/* its session said COMMIT */
#define SETTLING 3		/* its xid's status is asked for */
#define FROM_LOG 4		/* it did not commit: a worker applies it */

byte worker[N];			/* the worker that commits the next group */
/* NONE */
#define COMMITTING 1		/* COMMIT is on its way */
#define DONE 2			/* the server has committed */
#define BROKEN 3		/* the connection broke, and the server may commit yet */
byte groupFirst[N];
byte groupLast[N];
byte groupRows[N];		/* what it has locked, a bit for each row */

byte snapshotIndex[N];		/* the log up to here is forgotten */
byte snapshotCSN[N];
byte flushing[N];		/* a snapshot is being made: */
#define WAIT 1			/* until everything in it is applied */
#define FLUSH 2			/* then flush */
byte flushIndex[N];
byte flushCSN[N];

/* ---- budgets ---- */

byte sidecarCrashes = SIDECAR_CRASHES;
byte postgresCrashes = POSTGRES_CRASHES;
byte kills = KILLS;
byte repeats = REPEATS;
byte snapshots = SNAPSHOTS;

/* Scratch: set and used within one step, then 0 again, so that it makes no states. */
byte i;
byte j;
byte k;
byte t;
byte ok;

/* ---- the log ---- */

/* What every certifier says of the entry. It is a function of the log, so it is worked out once. */
inline certify(x) {
	d_step {
		logged[entries] = x;
		ok = 1;
#ifndef BUG_NO_CERTIFY
		i = 1;
		do
		:: i <= last ->
			if
			:: order[i] != x && row[order[i]] == row[x] && i > seen[x] -> ok = 0
			:: else
			fi;
			i++
		:: else -> break
		od;
#endif
		if
#ifndef BUG_NO_DEDUPLICATION
		:: decided[x] -> verdict[entries] = DUPLICATE
		:: !decided[x] && !ok ->
#else
		:: !ok ->
#endif
			verdict[entries] = ABORT
		:: else ->
			i = 1;
			do
			:: i <= last ->
				property(FIRST_COMMITTER, order[i] == x || row[order[i]] != row[x] || saw[x] >= i);
				i++
			:: else -> break
			od;
			last++;
			order[last] = x;
			verdict[entries] = last;
			commits[x] = 1;
			property(ABORTED, told[x] != REFUSED)
		fi;
		decided[x] = 1;
		entries++;
		i = 0; ok = 0
	}
}

inline answer(x, a) {
	if
	:: told[x] == NONE ->
		told[x] = a;
		property(ACKNOWLEDGED, a != ACK || commits[x]);
		property(ABORTED, a != REFUSED || !commits[x])
	:: else
	fi
}

/* What plays no part any more, so that it makes no states. */
inline forget(x) {
	if
	:: inflight[x] == 0 && (decided[x] || co[x] != PROPOSED) -> seen[x] = 0; saw[x] = 0
	:: else
	fi
}

/* ---- PostgreSQL ---- */

/* The server commits x; e: it is the last of the transactions that are committed at once. */
inline append(n, x, e) {
	i = 0;
	do
	:: i < size[n] ->
		property(ONCE, wal[at(n, i)] != x);
		/* what is before x here must not be behind it there */
		j = 0; ok = 0;
		do
		:: j < size[1 - n] ->
			if
			:: wal[at(1 - n, j)] == x -> ok = 1
			:: wal[at(1 - n, j)] == wal[at(n, i)] -> property(ORDER, !ok)
			:: else
			fi;
			j++
		:: else -> break
		od;
		i++
	:: else -> break
	od;
	property(GAPLESS, size[n] < last && order[size[n] + 1] == x);
	wal[at(n, size[n])] = x;
	ends[at(n, size[n])] = e;
	size[n]++;
	i = 0; j = 0; ok = 0
}

/* j becomes the highest progress row. */
inline readProgress(n) {
	i = 0; j = 0;
	do
	:: i < size[n] ->
		if
		:: progress[at(n, i)] > j -> j = progress[at(n, i)]
		:: else
		fi;
		i++
	:: else -> break
	od;
	i = 0
}

inline flush(n) { flushed[n] = size[n] }

#define endFlushing(n) flushing[n] = NONE; flushIndex[n] = 0; flushCSN[n] = 0
#define endGroup(n) groupFirst[n] = 0; groupLast[n] = 0; groupRows[n] = 0

inline endSessions(n) {
	t = 0;
	do
	:: t < T ->
		if
		:: origin(t) == n && (be[t] == OPEN || be[t] == SENT) -> be[t] = GONE
		:: else
		fi;
		t++
	:: else -> break
	od;
	t = 0
}

/* The server loses its memory and comes back: the WAL ends at some commit that is at or past what was flushed. */
inline crashPostgres(n) {
	i = size[n];
	do
	:: i > flushed[n] && i > 0 -> i--		/* lose some more … */
	:: i == flushed[n] || ends[at(n, i - 1)] -> break	/* … or stop, between two commits */
	od;
	d_step {
		do
		:: size[n] > i ->
			size[n]--;
			t = wal[at(n, size[n])];
			if
			:: origin(t) == n && be[t] == COMMITTED -> be[t] = GONE
			:: else
			fi;
			wal[at(n, size[n])] = 0; progress[at(n, size[n])] = 0; ends[at(n, size[n])] = 0
		:: else -> break
		od;
		flush(n);
		endSessions(n);
		property(TRUNCATION, size[n] >= snapshotCSN[n]);
		worker[n] = NONE; endGroup(n);
		suspended[n] = up[n];
#ifndef BUG_FLUSH_ON_ANOTHER_CONNECTION
		endFlushing(n);
#endif
		i = 0; t = 0
	}
}

/* ---- the sidecar ---- */

/* What only memory held. A server session, or a COMMIT on its way to the server, outlives it. */
inline crashSidecar(n) {
	t = 0;
	do
	:: t < T ->
		if
		:: origin(t) == n && co[t] != NONE ->
			if
			:: co[t] != FINISHED -> answer(t, UNKNOWN)
			:: else
			fi;
			co[t] = NONE; lost[t] = 0
		:: else
		fi;
		t++
	:: else -> break
	od;
	t = 0;
	endIncarnation(n)
}

inline endIncarnation(n) {
	up[n] = DOWN; start[n] = 0; applied[n] = 0; delivered[n] = 0; enqueued[n] = 0;
	suspended[n] = 0; head[n] = WAITING;
	if
	:: worker[n] == COMMITTING || worker[n] == BROKEN -> worker[n] = COMMITTING
	:: else -> worker[n] = NONE; endGroup(n)
	fi;
	endFlushing(n)
}

inline book(n, csn) {
	applied[n] = csn;
	head[n] = WAITING
}

/* Its session did not see it commit, but it is visible: the last word to a lost transaction. */
inline visible(x) {
	if
	:: co[x] != NONE && co[x] != FINISHED -> co[x] = FINISHED; lost[x] = 0; answer(x, ACK)
	:: else
	fi
}

inline bookGroup(n) {
	if
	:: head[n] == FROM_LOG -> visible(order[groupLast[n]])
	:: else
	fi;
	book(n, groupLast[n]);
	worker[n] = NONE; endGroup(n)
}

/* Whether the row that x writes is locked at its origin, by the session of u or by a worker. */
#define lockedBy(u, x) ((u) != (x) && origin(u) == origin(x) && row[u] == row[x] && (be[u] == OPEN || be[u] == SENT))
#define lockedByWorker(x) ((worker[origin(x)] == COMMITTING || worker[origin(x)] == BROKEN) && (groupRows[origin(x)] & (1 << row[x])))
#if T == 2
#define locked(x) (lockedBy(0, x) || lockedBy(1, x) || lockedByWorker(x))
#else
#define locked(x) (lockedBy(0, x) || lockedBy(1, x) || lockedBy(2, x) || lockedByWorker(x))
#endif

/* A worker executes order[from … to] and is let through. Sessions that hold a lock in its way are evicted. */
inline commitGroup(n, from, to) {
	groupFirst[n] = from; groupLast[n] = to; worker[n] = COMMITTING;
	i = from;
	do
	:: i <= to ->
		groupRows[n] = groupRows[n] | (1 << row[order[i]]);
		t = 0;
		do
		:: t < T ->
			if
			:: t != order[i] && origin(t) == n && row[t] == row[order[i]] && be[t] == OPEN -> be[t] = GONE
			:: else
			fi;
			t++
		:: else -> break
		od;
		i++
	:: else -> break
	od;
	i = 0; t = 0
}

inline commitOfGroup(n) {
	k = groupFirst[n];
	do
	:: k <= groupLast[n] ->
		append(n, order[k], k == groupLast[n]);
		k++
	:: else -> break
	od;
	k = 0;
#ifndef BUG_PROGRESS_SEPARATE
	progress[at(n, size[n] - 1)] = groupLast[n];
#endif
}

#define next(n) (applied[n] + 1)
#define nextTxn(n) (order[applied[n] + 1])

#define tells(x, n) (origin(x) == n && co[x] == TELLING)
#if T == 2
#define telling(n) (tells(0, n) || tells(1, n))
#else
#define telling(n) (tells(0, n) || tells(1, n) || tells(2, n))
#endif

proctype Node(byte n) {
end:	do
	/* The machine delivers an entry: the coordinator hears of its own, the pipeline gets what commits. */
	:: atomic { up[n] == UP && delivered[n] < entries ->
		t = logged[delivered[n]]; k = verdict[delivered[n]];
		delivered[n]++;
		if
		:: k == DUPLICATE
		:: k == ABORT ->
			if
			:: origin(t) == n && co[t] == PROPOSED ->
				co[t] = FINISHED; lost[t] = 0;
				answer(t, REFUSED);
				if
				:: be[t] == OPEN -> be[t] = GONE
				:: else
				fi
			:: else
			fi
		:: else ->
			if
			:: origin(t) == n && co[t] == PROPOSED -> co[t] = DECIDED
			:: else
			fi;
			if
			:: k > start[n] ->
				property(GAPLESS, k == enqueued[n] + 1);
				enqueued[n] = k
			:: else
			fi
		fi;
		t = 0; k = 0 }

	/* The head's turn: a local transaction is released … */
	:: atomic { up[n] == UP && !suspended[n] && worker[n] == NONE && head[n] == WAITING && applied[n] < enqueued[n] && origin(nextTxn(n)) == n ->
		if
		:: co[nextTxn(n)] == DECIDED && !lost[nextTxn(n)] && faulty(n) ->
			head[n] = LET;
			co[nextTxn(n)] = RELEASED
		:: co[nextTxn(n)] == DECIDED && !lost[nextTxn(n)] && !faulty(n) ->
			append(n, nextTxn(n), 1);
			be[nextTxn(n)] = COMMITTED; co[nextTxn(n)] = FINISHED;
			answer(nextTxn(n), ACK);
			book(n, next(n))
		:: else ->
#if defined(BUG_NO_STATUS)
			head[n] = FROM_LOG;
			commitGroup(n, next(n), next(n))
#elif defined(BUG_OWN_TAKEN_AS_COMMITTED)
			visible(nextTxn(n));
			book(n, next(n))
#else
			head[n] = SETTLING
#endif
		fi }

	/* … and remote ones, as many as come one after the other, are committed by a worker. */
	:: atomic { up[n] == UP && !suspended[n] && worker[n] == NONE && head[n] == WAITING && applied[n] < enqueued[n] && origin(nextTxn(n)) != n ->
		k = next(n);
		do
		:: k < enqueued[n] && origin(order[k + 1]) != n -> k++
		:: break
		od;
		commitGroup(n, next(n), k);
		k = 0 }
#ifdef BUG_OUT_OF_TURN
	:: atomic { up[n] == UP && !suspended[n] && worker[n] == NONE && applied[n] + 2 <= enqueued[n] && origin(order[applied[n] + 2]) != n ->
		commitGroup(n, applied[n] + 2, applied[n] + 2) }
#endif

	/* The server commits a worker's group. */
	:: atomic { worker[n] == COMMITTING ->
		commitOfGroup(n);
		if
		:: !faulty(n) -> bookGroup(n)	/* nothing can come between */
		:: faulty(n) && up[n] == UP -> worker[n] = DONE
		:: else -> worker[n] = NONE; endGroup(n)	/* nobody hears of it */
		fi }
	:: atomic { worker[n] == DONE && up[n] == UP ->
#ifdef BUG_PROGRESS_SEPARATE
		progress[at(n, size[n] - 1)] = groupLast[n];
#endif
		bookGroup(n) }
	/* Its connection broke. The next one ends the old server process first, which may have committed; the progress tells. */
	:: atomic { faulty(n) && kills > 0 && worker[n] == COMMITTING && up[n] == UP -> kills--; worker[n] = BROKEN }
	:: atomic { worker[n] == BROKEN ->
		if
		:: commitOfGroup(n)
		:: skip
		fi;
		readProgress(n);
#ifdef BUG_COMMIT_REPEATED
		j = 0;
#endif
		if
		:: j >= groupLast[n] -> bookGroup(n)
		:: else -> commitGroup(n, groupFirst[n], groupLast[n])
		fi;
		j = 0 }

	/* The released local transaction's session has reported. */
	:: atomic { up[n] == UP && head[n] == CONFIRMED -> book(n, next(n)) }
	:: atomic { up[n] == UP && head[n] == LET && lost[nextTxn(n)] -> head[n] = SETTLING }
	:: atomic { up[n] == UP && !suspended[n] && head[n] == SETTLING ->
		if
		:: be[nextTxn(n)] == COMMITTED -> visible(nextTxn(n)); book(n, next(n))
		:: be[nextTxn(n)] == OPEN || be[nextTxn(n)] == SENT -> be[nextTxn(n)] = GONE
		:: else ->
#ifdef BUG_LOST_NOT_APPLIED
			visible(nextTxn(n));
			book(n, next(n))
#else
			head[n] = FROM_LOG;
			commitGroup(n, next(n), next(n))
#endif
		fi }

	/* A snapshot of the machine: everything in it must be on the server's disk before the log forgets it. */
	:: atomic { faulty(n) && up[n] == UP && !suspended[n] && snapshots > 0 && flushing[n] == NONE && delivered[n] > snapshotIndex[n] && enqueued[n] > snapshotCSN[n] ->
		snapshots--;
		flushing[n] = WAIT; flushIndex[n] = delivered[n]; flushCSN[n] = enqueued[n] }
#ifdef BUG_FLUSH_ON_ANOTHER_CONNECTION
	:: atomic { flushing[n] == WAIT && applied[n] >= flushCSN[n] -> flushing[n] = FLUSH }
	:: atomic { flushing[n] == FLUSH ->
#else
	/* On one connection throughout: the crash of the server between wait and flush ends it. */
	:: atomic { flushing[n] == WAIT && applied[n] >= flushCSN[n] ->
#endif
#ifndef BUG_NO_FLUSH
		if
		:: flushCSN[n] > start[n] ->	/* what the node started with is on disk already */
			flush(n);
#ifndef BUG_FLUSH_WITHOUT_PROGRESS
			/* with a progress row: the highest, and behind all that is applied */
			if
			:: progress[at(n, size[n] - 1)] < applied[n] -> progress[at(n, size[n] - 1)] = applied[n]
			:: else
			fi
#endif
		:: else
		fi;
#endif
		snapshotIndex[n] = flushIndex[n]; snapshotCSN[n] = flushCSN[n];
		property(TRUNCATION, size[n] >= snapshotCSN[n]);
		endFlushing(n) }

	/* Crashes. */
	:: atomic { faulty(n) && sidecarCrashes > 0 && up[n] != DOWN -> sidecarCrashes--; crashSidecar(n) }
	:: atomic { faulty(n) && postgresCrashes > 0 -> postgresCrashes--; crashPostgres(n) }

	/* It is noticed that the server is in another life: this incarnation has ended. Who waits for the log's word waits on. */
	:: atomic { up[n] == UP && suspended[n] ->
#ifdef BUG_RESTART_UNNOTICED
		suspended[n] = 0
#else
		t = 0;
		do
		:: t < T ->
			if
			:: origin(t) == n && (co[t] == REGISTERED || co[t] == QUEUED) -> co[t] = FINISHED; answer(t, REFUSED)
			:: origin(t) == n && co[t] == QUEUED -> inflight[t]++; co[t] = TELLING	/* it was just being proposed */
			:: origin(t) == n && co[t] == PROPOSED -> co[t] = TELLING
			:: origin(t) == n && (co[t] == DECIDED || co[t] == RELEASED) -> co[t] = FINISHED; answer(t, ACK)
			:: origin(t) != n || co[t] == NONE || co[t] == FINISHED
			fi;
			t++
		:: else -> break
		od;
		t = 0;
		endIncarnation(n)
#endif
	   }

	/* Recovery: end leftover sessions, make sure that what the server shows is on disk, see how far it is. */
	:: atomic { up[n] == DOWN && !telling(n) ->
		endSessions(n);
		worker[n] = NONE; endGroup(n);
#ifndef BUG_START_NOT_FLUSHED
		flush(n);
#endif
		readProgress(n);
		property(TRUNCATION, j >= snapshotCSN[n]);
		start[n] = j; applied[n] = j; enqueued[n] = j;
		delivered[n] = snapshotIndex[n];
		up[n] = UP;
		j = 0 }
	od
}

inline propose(x) {
	co[x] = PROPOSED;
	inflight[x]++;
#ifdef BUG_ACKNOWLEDGED_EARLY
	answer(x, ACK)
#endif
}

/* One client's transaction: its gateway session, the coordinator, and its proposals on the wire. */
proctype Transaction(byte x) {
end:	do
	/* It takes the lock on its row, and sees what is committed. */
	:: atomic { be[x] == NONE && told[x] == NONE && up[origin(x)] == UP && !suspended[origin(x)] && !locked(x) ->
		be[x] = OPEN;
		saw[x] = size[origin(x)];
		co[x] = REGISTERED }
	/* COMMIT: seen is read, then the marker flushes the WAL. */
	:: atomic { co[x] == REGISTERED && be[x] == OPEN ->
		seen[x] = applied[origin(x)];
		flush(origin(x));
		if
		:: faulty(origin(x)) -> co[x] = QUEUED
		:: else -> propose(x)
		fi }
	:: atomic { co[x] == QUEUED && !lost[x] -> propose(x) }
	/* What became of a proposal is not known: it is sent again. */
	:: atomic { co[x] == PROPOSED && x == 0 && repeats > 0 && !proposedTwice[x] ->
		repeats--;
		proposedTwice[x] = 1;
		inflight[x]++ }
	/* On the wire: into the log, or lost. Neither needs the origin to be alive. */
	:: atomic { inflight[x] > 0 -> inflight[x]--; certify(x); forget(x) }
	:: atomic { inflight[x] > 0 && (proposedTwice[x] || co[x] != PROPOSED) -> inflight[x]--; forget(x) }
	/* It was refused: certainly not in the log. */
	:: atomic { faulty(origin(x)) && co[x] == PROPOSED && inflight[x] == 1 && !proposedTwice[x] ->
		inflight[x]--;
		co[x] = FINISHED; lost[x] = 0;
		answer(x, REFUSED);
		if
		:: be[x] == OPEN -> be[x] = GONE
		:: else
		fi }
	/* The commit timeout: the client is told the truth, and its session ends. */
	:: atomic { faulty(origin(x)) && co[x] == PROPOSED && told[x] == NONE ->
#ifdef BUG_UNKNOWN_IS_ABORTED
		answer(x, REFUSED);
#else
		answer(x, UNKNOWN);
#endif
		if
		:: be[x] == OPEN -> be[x] = GONE
		:: else
		fi;
		lost[x] = 1 }
	/* The last word when the server is lost: the log's, or that it is not known. */
	:: atomic { co[x] == TELLING ->
		if
		:: decided[x] && commits[x] -> answer(x, ACK)
		:: decided[x] && !commits[x] -> answer(x, REFUSED)
		:: answer(x, UNKNOWN)
		fi;
		co[x] = FINISHED }
	/* Its turn: COMMIT goes to the server, the server commits, the session hears of it. */
	:: atomic { co[x] == RELEASED && be[x] == OPEN && !lost[x] -> be[x] = SENT }
	:: atomic { be[x] == SENT -> append(origin(x), x, 1); be[x] = COMMITTED }
	:: atomic { co[x] == RELEASED && be[x] == COMMITTED && !lost[x] ->
		co[x] = FINISHED;
		head[origin(x)] = CONFIRMED;
		answer(x, ACK) }
	/* The session dies, or the connection to it, whatever it has done. */
	:: atomic { faulty(origin(x)) && kills > 0 && (be[x] == OPEN || be[x] == SENT) -> kills--; be[x] = GONE }
	:: atomic { faulty(origin(x)) && kills > 0 && co[x] == RELEASED && be[x] != GONE && !lost[x] -> kills--; lost[x] = 1 }
	/* The gateway notices that it is gone. */
	:: atomic { be[x] == GONE && !lost[x] && co[x] != NONE && co[x] != FINISHED ->
		if
		:: co[x] < PROPOSED -> co[x] = FINISHED; answer(x, REFUSED)
		:: else -> lost[x] = 1
		fi }
	:: atomic { be[x] == GONE && co[x] == NONE && told[x] == NONE -> told[x] = UNKNOWN }
	od
}

init {
	atomic {
		i = 0;
		do
		:: i < T ->
			if
			:: row[i] = 0
			:: i > 0 -> row[i] = 1
			fi;
			i++
		:: else -> break
		od;
		i = 0;
		up[1] = UP;
		run Node(0);
		run Node(1);
		do
		:: i < T -> run Transaction(i); i++
		:: else -> break
		od;
		i = 0
	}
	/* Nothing can happen any more. */
	timeout ->
	d_step {
		do
		:: i < N ->
			property(COMPLETE, up[i] == UP && size[i] == last && applied[i] == last);
			i++
		:: else -> break
		od;
		i = 0;
		do
		:: i < T ->
			property(COMPLETE, told[i] != NONE);
			property(ACKNOWLEDGED, told[i] != ACK || commits[i]);
			i++
		:: else -> break
		od;
		i = 0
	}
}
