#!/usr/bin/env bash
# Checks commit.pml exhaustively: as it is it must hold, and with each planted bug the named property must not.
# Needs spin and gcc. Everything is built in a temporary directory.
set -euo pipefail
cd "$(dirname "$0")"
model=$PWD/commit.pml
command -v spin >/dev/null || { echo "spin is missing: apt-get install spin"; exit 1; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cp "$model" .

# run OPTIMISATION DEFINES…; leaves what the verifier says in out.
run() {
  local optimisation=$1
  shift
  spin -a "$@" commit.pml >spin.out || { cat spin.out; exit 1; }
  gcc "$optimisation" -w -DSAFETY -DMEMLIM=8000 -o pan pan.c
  ./pan -m1000000 -n -w22 >out 2>&1
}

failed=0
holds() { # WHAT DEFINES…
  local what=$1 begun=$SECONDS
  shift
  run -O2 "$@"
  if grep -q 'errors: 0' out && ! grep -q 'Search not completed\|max search depth' out; then
    printf 'holds   %-58s %s states, %d s\n' "$what" "$(awk '/states, stored/ {print $1}' out)" $((SECONDS - begun))
  else
    printf 'BROKEN  %s\n' "$what"
    cat out
    spin -t -g "$@" commit.pml | tail -60 || true
    failed=1
  fi
}

breaks() { # BUG PROPERTY DEFINES…
  local bug=$1 property=$2
  shift 2
  run -O0 "-DBUG_$bug" "-DONLY=$property" "$@"
  if grep -q 'assertion violated' out; then
    printf 'breaks  %-16s by %s\n' "$property" "$bug"
  else
    printf 'BROKEN  the model does not notice %s by %s\n' "$bug" "$property"
    cat out
    failed=1
  fi
}

holds 'one own, one remote; every fault once' -DT=2
holds 'one own, one remote; two crashes of each kind' -DT=2 -DSIDECAR_CRASHES=2 -DPOSTGRES_CRASHES=2 -DKILLS=0 -DREPEATS=0
holds 'one own, two remote; crashes' -DT=3 -DKILLS=0 -DREPEATS=0 -DSNAPSHOTS=0
holds 'two own, one remote; crashes' -DT=3 -DTWO_OWN -DKILLS=0 -DREPEATS=0 -DSNAPSHOTS=0

breaks OUT_OF_TURN ORDER
breaks NO_CERTIFY FIRST_COMMITTER
breaks ACKNOWLEDGED_EARLY ACKNOWLEDGED
breaks UNKNOWN_IS_ABORTED ABORTED
breaks NO_DEDUPLICATION ONCE
breaks PROGRESS_SEPARATE ONCE
breaks NO_STATUS ONCE
breaks COMMIT_REPEATED ONCE
breaks OWN_TAKEN_AS_COMMITTED GAPLESS
breaks RESTART_UNNOTICED GAPLESS
breaks NO_FLUSH TRUNCATION
breaks FLUSH_WITHOUT_PROGRESS TRUNCATION
breaks START_NOT_FLUSHED TRUNCATION
breaks FLUSH_ON_ANOTHER_CONNECTION TRUNCATION
breaks LOST_NOT_APPLIED COMPLETE

exit $failed
