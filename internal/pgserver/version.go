// Package pgserver finds, fetches, initialises, starts and stops the PostgreSQL server that a node manages, and
// judges the settings of one that it does not. It knows nothing of replication.
//
// Linux only: it relies on /proc, pidfds and flock.
package pgserver

import (
	"fmt"
	"regexp"
	"strconv"
)

// MinMajor is the oldest PostgreSQL that can be a node: 17 brought flushed logical messages and the immediate
// streaming of open transactions.
const MinMajor = 17

// Version is a PostgreSQL release. Minor is 0 for a beta or development version.
type Version struct{ Major, Minor int }

// String returns for example "18.4".
func (v Version) String() string { return strconv.Itoa(v.Major) + "." + strconv.Itoa(v.Minor) }

// Num returns the form of server_version_num, for example 180004.
func (v Version) Num() int { return v.Major*10000 + v.Minor }

// FromNum reads server_version_num of PostgreSQL 10 and later.
func FromNum(n int) Version { return Version{Major: n / 10000, Minor: n % 10000} }

var versionPattern = regexp.MustCompile(`^(?:postgres \(PostgreSQL\) |PostgreSQL )?(\d{1,4})(?:\.(\d{1,4}))?`)

// ParseVersion reads what "postgres --version", "pg_config --version", SHOW server_version or the file PG_VERSION
// say, distribution suffixes included: "postgres (PostgreSQL) 18.4 (Debian 18.4-1)", "19beta1", "17".
func ParseVersion(s string) (Version, error) {
	m := versionPattern.FindStringSubmatch(s)
	if m == nil {
		return Version{}, fmt.Errorf("parse PostgreSQL version: %q has none", s)
	}
	major, err := strconv.Atoi(m[1])
	if err != nil {
		return Version{}, fmt.Errorf("parse PostgreSQL version %q: %w", s, err)
	}
	minor := 0
	if m[2] != "" {
		if minor, err = strconv.Atoi(m[2]); err != nil {
			return Version{}, fmt.Errorf("parse PostgreSQL version %q: %w", s, err)
		}
	}
	return Version{Major: major, Minor: minor}, nil
}
