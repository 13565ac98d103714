package config

import (
	"fmt"
	"maps"
	"net"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/quorate/quorate/txn"
)

const (
	defaultCommitTimeout = 10 * time.Second
	defaultMaxStaleness  = 10 * time.Second
)

// The values of Config.ReadsWithoutQuorum.
const (
	ReadsAllowed = "allow"
	ReadsRefused = "refuse"
)

// Problem is one thing that is wrong with a configuration.
type Problem struct {
	Line    int    // in the file, 0 if not known
	Field   string // for example "members[1].raft"
	Value   string
	Message string
}

// Error lists everything that is wrong with a configuration.
type Error struct {
	File     string
	Problems []Problem
}

// Error returns one line for each problem, with field and value.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("configuration")
	if e.File != "" {
		b.WriteString(" " + e.File)
	}
	for _, p := range e.Problems {
		b.WriteString("\n  ")
		if p.Line > 0 {
			fmt.Fprintf(&b, "line %d: ", p.Line)
		}
		if p.Field != "" {
			b.WriteString(p.Field)
			if p.Value != "" {
				fmt.Fprintf(&b, ": %q", p.Value)
			}
			b.WriteString(": ")
		}
		b.WriteString(p.Message)
	}
	return b.String()
}

// validator collects problems.
type validator struct{ problems []Problem }

func (v *validator) add(field, value, format string, args ...any) {
	v.problems = append(v.problems, Problem{Field: field, Value: value, Message: fmt.Sprintf(format, args...)})
}

func (v *validator) required(field, value string) {
	if value == "" {
		v.add(field, "", "is required")
	}
}

func (v *validator) within(field string, value, low, high int64) {
	if value < low || value > high {
		v.add(field, strconv.FormatInt(value, 10), "must be from %d to %d", low, high)
	}
}

func (v *validator) size(field string, value, low, high Size) {
	if value < low || value > high {
		v.add(field, value.String(), "must be from %s to %s", low, high)
	}
}

func (v *validator) oneOf(field, value string, choices ...string) {
	for _, c := range choices {
		if value == c {
			return
		}
	}
	v.add(field, value, "must be one of %s", strings.Join(choices, ", "))
}

// address checks host:port; dialled addresses need a host that others can reach.
func (v *validator) address(field, value string, dialled bool) {
	if value == "" {
		v.add(field, "", "is required")
		return
	}
	host, port, err := net.SplitHostPort(value)
	if err != nil {
		v.add(field, value, "must be host:port")
		return
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		v.add(field, value, "port %q must be from 1 to 65535", port)
	}
	if dialled && !reachable(host) {
		v.add(field, value, "must name a host that the other members can reach")
	}
}

// reachable reports whether a host can mean the same everywhere.
func reachable(host string) bool {
	ip := net.ParseIP(host)
	return host != "" && (ip == nil || !ip.IsUnspecified())
}

func namesHost(address string) bool {
	host, _, err := net.SplitHostPort(address)
	return err == nil && reachable(host)
}

var clusterName = regexp.MustCompile(`^[a-z0-9_-]{1,63}$`)

// maxMembers bounds the voters: beyond it every commit waits for ever more disks, and no fault needs it.
const maxMembers = 9

// defaultMaxNodes and mostNodes are for max_nodes: each node's share of a sequence is what that leaves.
const (
	defaultMaxNodes = 16
	mostNodes       = 64
)

// Validate returns an *Error with every problem, or nil. It looks at the configuration only, not at the machine.
func (c Config) Validate() error {
	v := &validator{}
	if !clusterName.MatchString(c.Cluster) {
		v.add("cluster", c.Cluster, "is required: 1 to 63 of a-z, 0-9, - and _")
	}
	v.oneOf("role", c.Role, RoleData, RoleWitness)
	v.required("data_dir", c.DataDir)
	if !c.Witness() {
		c.Postgres.validate(v)
	} else if !reflect.ValueOf(c.Postgres).IsZero() {
		v.add("postgres", "", "a witness has none")
	}
	c.validateAddresses(v)
	c.validateSecurity(v)
	c.validateMembers(v)
	v.within("max_nodes", int64(c.MaxNodes), 1, mostNodes)
	v.within("apply.workers", int64(c.Apply.Workers), 1, 256)
	v.within("limits.clients", int64(c.Limits.Clients), 1, 10000)
	v.size("limits.message", c.Limits.Message, 64<<10, 1<<30)
	v.size("limits.capture_memory", c.Limits.CaptureMemory, 1<<20, 1<<40)
	v.within("limits.apply_transactions", int64(c.Limits.ApplyTransactions), 1, 1<<20)
	v.size("limits.apply_memory", c.Limits.ApplyMemory, 1<<20, 1<<40)
	v.size("limits.log", c.Limits.Log, 1<<20, 1<<40)
	v.size("limits.clone_wal", c.Limits.CloneWAL, 1<<30, 1<<50)
	v.within("limits.lag", int64(c.Limits.Lag), 16, 1<<30)
	if c.Limits.LagPatience < time.Second || c.Limits.LagPatience > time.Hour {
		v.add("limits.lag_patience", c.Limits.LagPatience.String(), "must be from 1s to 1h")
	}
	if c.CommitTimeout < 100*time.Millisecond || c.CommitTimeout > time.Hour {
		v.add("commit_timeout", c.CommitTimeout.String(), "must be from 100ms to 1h")
	}
	v.oneOf("reads_without_quorum", c.ReadsWithoutQuorum, ReadsAllowed, ReadsRefused)
	if c.MaxStaleness < time.Second || c.MaxStaleness > 24*time.Hour {
		v.add("max_staleness", c.MaxStaleness.String(), "must be from 1s to 24h")
	}
	c.Heartbeat.validate(v)
	c.Tracing.validate(v)
	v.oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error")
	v.oneOf("log.format", c.Log.Format, "text", "json")
	if len(v.problems) > 0 {
		return &Error{Problems: v.problems}
	}
	return nil
}

// managedNames are settings that follow from other fields, which would otherwise be contradicted.
var managedNames = map[string]string{
	"port": "postgres.port", "listen_addresses": "postgres.host", "unix_socket_directories": "postgres.socket_dir",
	"data_directory": "postgres.data_dir", "wal_level": "nothing: it must be logical",
}

var settingName = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_.]*$`)

func (p Postgres) validate(v *validator) {
	v.within("postgres.port", int64(p.Port), 1, 65535)
	if p.Managed {
		if p.Host != "*" && net.ParseIP(p.Host) == nil {
			v.add("postgres.host", p.Host, "must be an IP address to listen on")
		}
		if n := len(p.SocketDir); n > 92 {
			v.add("postgres.socket_dir", p.SocketDir, "has %d bytes, more than 92, which is what a Unix socket's address has room for", n)
		}
		v.oneOf("postgres.auth", p.Auth, "scram-sha-256", "trust")
		if p.Auth == "scram-sha-256" && p.PasswordFile == "" {
			v.add("postgres.password_file", "", "is required unless postgres.auth is trust")
		}
		for _, name := range slices.Sorted(maps.Keys(p.Settings)) {
			value := p.Settings[name]
			switch field, ok := managedNames[strings.ToLower(name)]; {
			case ok:
				v.add("postgres.settings."+name, value, "must not be set here; use %s", field)
			case !settingName.MatchString(name):
				v.add("postgres.settings."+name, value, "is not the name of a setting")
			}
		}
		return
	}
	v.required("postgres.host", p.Host)
	for _, f := range []struct{ name, value string }{
		{"bin_dir", p.BinDir}, {"data_dir", p.DataDir}, {"socket_dir", p.SocketDir}, {"auth", p.Auth},
	} {
		if f.value != "" {
			v.add("postgres."+f.name, f.value, "is only for a managed server (postgres.managed: true)")
		}
	}
	if len(p.Settings) > 0 {
		v.add("postgres.settings", "", "is only for a managed server (postgres.managed: true)")
	}
}

func (c Config) validateAddresses(v *validator) {
	// Two listeners of one process on one port would fail late and say little.
	listeners := map[string]string{}
	if c.Postgres.Managed {
		listeners[net.JoinHostPort(c.Postgres.Host, strconv.Itoa(c.Postgres.Port))] = "postgres.port"
	}
	for _, l := range []struct{ field, address string }{
		{"listen.gateway", c.Listen.Gateway}, {"listen.grpc", c.Listen.GRPC}, {"listen.http", c.Listen.HTTP}, {"listen.raft", c.Listen.Raft},
	} {
		if l.field == "listen.gateway" && c.Witness() {
			if l.address != "" {
				v.add(l.field, l.address, "a witness has no clients")
			}
			continue
		}
		v.address(l.field, l.address, false)
		if other, ok := listeners[l.address]; ok && l.address != "" {
			v.add(l.field, l.address, "is the address of %s too", other)
		}
		listeners[l.address] = l.field
	}
	if len(c.Members) > 0 {
		return // which say it
	}
	for _, a := range []struct {
		field, address, listen string
		required               bool
	}{
		{"raft", c.Advertise.Raft, c.Listen.Raft, true}, {"grpc", c.Advertise.GRPC, c.Listen.GRPC, true},
		{"http", c.Advertise.HTTP, c.Listen.HTTP, false}, {"gateway", c.Advertise.Gateway, c.Listen.Gateway, false},
	} {
		switch {
		case a.address != "":
			v.address("advertise."+a.field, a.address, true)
		case a.required && a.listen != "":
			v.add("advertise."+a.field, "", "is required, because listen.%s is %q, which is nowhere that other members could connect to", a.field, a.listen)
		}
	}
}

// validateMembers checks the list that founds a cluster, if there is one.
func (c Config) validateMembers(v *validator) {
	if len(c.Members) == 0 {
		if c.Node != 0 {
			v.add("node", c.Node.String(), "is given out by the cluster, unless a list of members founds it")
		}
		return
	}
	if c.Node == 0 {
		v.add("node", "", "is required, at least 1: which of the members this node is")
	}
	if len(c.Members) > maxMembers {
		v.add("members", strconv.Itoa(len(c.Members)), "more than %d members", maxMembers)
	}
	ids, addresses := map[txn.NodeID]string{}, map[string]string{}
	for i, m := range c.Members {
		field := fmt.Sprintf("members[%d]", i)
		if m.ID == 0 {
			v.add(field+".id", "", "is required, at least 1")
		} else if other, ok := ids[m.ID]; ok {
			v.add(field+".id", m.ID.String(), "is the id of %s too", other)
		}
		ids[m.ID] = field
		v.oneOf(field+".role", m.Role, "", RoleData, RoleWitness)
		if m.ID == c.Node && m.Witness() != c.Witness() {
			v.add(field+".role", m.Role, "is not this node's role, which is %s", c.Role)
		}
		v.address(field+".raft", m.Raft, true)
		v.address(field+".grpc", m.GRPC, true)
		if m.HTTP != "" {
			v.address(field+".http", m.HTTP, true)
		}
		if m.Gateway != "" {
			v.address(field+".gateway", m.Gateway, true)
		}
		for _, a := range []struct{ field, address string }{{".raft", m.Raft}, {".grpc", m.GRPC}, {".http", m.HTTP}, {".gateway", m.Gateway}} {
			if a.address == "" {
				continue
			}
			if other, ok := addresses[a.address]; ok {
				v.add(field+a.field, a.address, "is the address of %s too", other)
			}
			addresses[a.address] = field + a.field
		}
	}
	data := 0
	for _, m := range c.Members {
		if !m.Witness() {
			data++
		}
	}
	switch {
	case data == 0:
		v.add("members", "", "has witnesses only, and nobody with data")
	case data > c.MaxNodes:
		v.add("max_nodes", strconv.Itoa(c.MaxNodes), "is less than the %d members with data", data)
	}
	if _, ok := ids[c.Node]; !ok && c.Node != 0 {
		v.add("node", c.Node.String(), "is not among the members")
	}
}
