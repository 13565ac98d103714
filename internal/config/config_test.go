package config

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/quorate/quorate/txn"
)

const sampleFile = "../../configs/quorate.yaml"

func TestSample(t *testing.T) {
	c, err := Load(sampleFile)
	if err != nil {
		t.Fatal(err)
	}
	if c.Self().Gateway != "10.0.0.1:6432" || c.Postgres.DataDir != "/var/lib/quorate/node1/pgdata" ||
		c.CommitTimeout != 10*time.Second || c.Limits.Message != 64<<20 || c.Apply.Workers != 8 {
		t.Errorf("sample: %+v", c)
	}
}

// What the sample shows as defaults are the defaults, and it shows every field.
func TestSampleIsComplete(t *testing.T) {
	text, err := os.ReadFile(sampleFile)
	if err != nil {
		t.Fatal(err)
	}
	commented := regexp.MustCompile(`(?m)^( *)# ?( *(?:- \{|[a-z_]+:( |$)))`)
	all := commented.ReplaceAllString(string(text), "$1$2")
	shown, err := Parse([]byte(all), "/")
	if err != nil {
		t.Fatalf("the sample with everything in it: %v\n%s", err, all)
	}
	if shown.Postgres.Settings["shared_buffers"] == "" || shown.Postgres.BinDir == "" || shown.Postgres.SocketDir == "" {
		t.Errorf("the sample does not show everything: %+v", shown.Postgres)
	}
	shown.Tracing.Endpoint = ""
	plain, err := Load(sampleFile)
	if err != nil {
		t.Fatal(err)
	}
	if len(shown.Gateway.Clients) == 0 || shown.HTTP.Tokens == "" {
		t.Errorf("the sample does not show everything: %+v %+v", shown.Gateway, shown.HTTP)
	}
	shown.Gateway.Clients, shown.HTTP.Tokens = nil, ""
	shown.Postgres.Settings, shown.Postgres.BinDir, shown.Postgres.SocketDir = nil, "", ""
	if !reflect.DeepEqual(shown, plain) {
		t.Errorf("the sample shows other defaults\n%+v\nthan there are\n%+v", shown, plain)
	}
	var missing []string
	var walk func(reflect.Type)
	walk = func(typ reflect.Type) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
			if !strings.Contains(all, name+":") {
				missing = append(missing, typ.Name()+"."+name)
			}
			switch f.Type.Kind() {
			case reflect.Struct:
				walk(f.Type)
			case reflect.Slice:
				walk(f.Type.Elem())
			}
		}
	}
	walk(reflect.TypeFor[Config]())
	if len(missing) > 0 {
		t.Errorf("the sample lacks %v", missing)
	}
}

const members = `members: [{id: 1, raft: "h:6401", grpc: "h:6201"}]`

const minimal = `
cluster: c
node: 1
data_dir: data
postgres: {managed: true, auth: trust}
listen: {gateway: ":6001", grpc: "127.0.0.1:6201", http: "localhost:6301", raft: "[::1]:6401"}
` + members + "\n"

func TestPathsAreRelativeToTheFile(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "quorate.yaml")
	if err := os.WriteFile(name, []byte(minimal), 0o644); err != nil {
		t.Fatal(err)
	}
	c, err := Load(name)
	if err != nil {
		t.Fatal(err)
	}
	if c.DataDir != filepath.Join(dir, "data") || c.Postgres.DataDir != filepath.Join(dir, "data/pgdata") {
		t.Errorf("directories are %s, %s", c.DataDir, c.Postgres.DataDir)
	}
	if err := c.Save(name); err != nil {
		t.Fatal(err)
	}
	if again, err := Load(name); err != nil || !reflect.DeepEqual(c, again) {
		t.Errorf("saved and loaded: %v\n%+v\nwas\n%+v", err, again, c)
	}
}

func TestErrorsNameFieldAndValue(t *testing.T) {
	for _, tc := range []struct{ from, to, want string }{
		{"node: 1", "nodde: 1", "line 3: nodde: there is no such field"},
		{"node: 1", "node: one", `line 3: node: "one": must be a whole number`},
		{"node: 1", "node: -1", `line 3: node: "-1": must be a whole number`},
		{"node: 1", "node: 2", `node: "2": is not among the members`},
		{"cluster: c", "cluster: Ä", `cluster: "Ä": `},
		{"cluster: c", "cluster: c\npostgress: 5", "line 3: postgress: there is no such field"},
		{"data_dir: data", "data_dir:", "data_dir: is required"},
		{`":6001"`, `":66001"`, `listen.gateway: ":66001": port "66001" must be from 1 to 65535`},
		{`":6001"`, `"6001"`, `listen.gateway: "6001": must be host:port`},
		{`":6001"`, `"[::1]:6401"`, `listen.raft: "[::1]:6401": is the address of listen.gateway too`},
		{`":6001"`, `"127.0.0.1:5432"`, `listen.gateway: "127.0.0.1:5432": is the address of postgres.port too`},
		{`"h:6401"`, `"0.0.0.0:6401"`, `members[0].raft: "0.0.0.0:6401": must name a host`},
		{`"h:6401"`, `"h:6201"`, `members[0].grpc: "h:6201": is the address of members[0].raft too`},
		{"auth: trust", "auth: md5", `postgres.auth: "md5": must be one of`},
		{"auth: trust", "port: 5433", `postgres.password_file: is required`},
		{"auth: trust", "auth: trust, port: 70000", `postgres.port: "70000": must be from 1 to 65535`},
		{"auth: trust", "auth: trust, colour: red", "there is no such field"},
		{"auth: trust", "auth: trust, settings: {port: 5}", `postgres.settings.port: "5": must not be set here; use postgres.port`},
		{"managed: true, auth: trust", "bin_dir: /b, host: h", `postgres.bin_dir: "/b": is only for a managed server`},
		{"managed: true, auth: trust", "managed: false", `postgres.host: is required`},
		{"node: 1", "node: 1\ncommit_timeout: 50ms", `commit_timeout: "50ms": must be from 100ms to 1h`},
		{"node: 1", "node: 1\ncommit_timeout: soon", `line 4: commit_timeout: "soon": must be a duration`},
		{"node: 1", "node: 1\nreads_without_quorum: maybe", `reads_without_quorum: "maybe": must be one of allow, refuse`},
		{"node: 1", "node: 1\nmax_staleness: 500ms", `max_staleness: "500ms": must be from 1s to 24h`},
		{"node: 1", "node: 1\nlimits: {message: 1GB}", `line 4: limits.message: "1GB" is not a size`},
		{"node: 1", "node: 1\nlimits: {message: 1KiB}", `limits.message: "1KiB": must be from 64KiB to 1GiB`},
		{"node: 1", "node: 1\nlimits: {lag: 5}", `limits.lag: "5": must be from 16 to`},
		{"node: 1", "node: 1\nlimits: {lag_patience: 5ms}", `limits.lag_patience: "5ms": must be from 1s to 1h`},
		{"node: 1", "node: 1\nheartbeat: {interval: 10ms}", `heartbeat.interval: "10ms": must be from 50ms to 5s`},
		{"node: 1", "node: 1\nheartbeat: {interval: 500ms, timeout: 1s}", `heartbeat.timeout: "1s": must be from 1.5s, three times heartbeat.interval, to 1m`},
		{"node: 1", "node: 1\nheartbeat: {timeout: 2m}", `heartbeat.timeout: "2m0s": must be from 750ms`},
		{"node: 1", "node: 1\nmax_nodes: 65", `max_nodes: "65": must be from 1 to 64`},
		{members, `members: [{id: 1, raft: "h:6401", grpc: "h:6201"}, {id: 2, raft: "g:6401", grpc: "g:6201"}]` + "\nmax_nodes: 1", `max_nodes: "1": is less than the 2 members with data`},
		{"node: 1", "node: 1\ntracing: {sample: 2}", `tracing.sample: "2": must be from 0.0001 to 1`},
		{"node: 1", "node: 1\ntracing: {endpoint: \"collector:4318\"}", `tracing.endpoint: "collector:4318": must be a URL`},
		{"node: 1", "node: 1\nlog: {level: loud}", `log.level: "loud": must be one of`},
		{"node: 1", "node: 1\nmembers: {}", "already defined"},
		{"node: 1", "node: [", "line"},
		{`"127.0.0.1:6201"`, `":6201"`, `listen.grpc: ":6201": is reached from elsewhere`},
		{`"localhost:6301"`, `"10.0.0.1:6301"`, `listen.http: "10.0.0.1:6301": is reached from elsewhere`},
		{`"[::1]:6401"`, `"node1:6401"`, `listen.raft: "node1:6401": is reached from elsewhere`},
		{"node: 1", "node: 1\ntls: {ca: ca.crt}", `tls.key: is required`},
		{"node: 1", "node: 1\ngateway: {tls: {require: true}}", `gateway.tls.require: "true": needs`},
		{"node: 1", "node: 1\ngateway: {tls: {cert: c}}", `gateway.tls.key: is required`},
		{"node: 1", "node: 1\ngateway: {clients: [{from: here, access: allow}]}", `gateway.clients[0].from: "here": must be a network`},
		{"node: 1", "node: 1\ngateway: {clients: [{from: 10.0.0.0/8, access: yes}]}", `gateway.clients[0].access: "yes": must be one of`},
		{"node: 1", "node: 1\ngateway: {clients: [{from: 10.0.0.0/8, access: tls}]}", `gateway.clients[0].access: "tls": needs`},
		{"node: 1", "", "node: is required"},
		{members, "", `node: "1": is given out by the cluster`},
		{"node: 1\n", "role: king\n", `role: "king": must be one of data, witness`},
		{"node: 1", "node: 1\nrole: witness", "postgres: a witness has none"},
		{"node: 1", "node: 1\nrole: witness", `listen.gateway: ":6001": a witness has no clients`},
		{"node: 1", "node: 1\nrole: witness", "members[0].role: is not this node's role, which is witness"},
		{`grpc: "h:6201"}`, `grpc: "h:6201", role: witness}`, "members: has witnesses only"},
	} {
		text := strings.Replace(minimal, tc.from, tc.to, 1)
		if text == minimal {
			t.Fatalf("%q is not in the text", tc.from)
		}
		_, err := Parse([]byte(text), "/d")
		var wrong *Error
		if !errors.As(err, &wrong) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error\n%v\ndoes not say\n%s", tc.to, err, tc.want)
		}
	}
}

// A longer interval needs nothing else.
func TestHeartbeat(t *testing.T) {
	for text, want := range map[string]Heartbeat{
		"":                             {250 * time.Millisecond, time.Second},
		"heartbeat: {interval: 100ms}": {100 * time.Millisecond, time.Second},
		"heartbeat: {interval: 2s}":    {2 * time.Second, 8 * time.Second},
		"heartbeat: {timeout: 3s}":     {250 * time.Millisecond, 3 * time.Second},
	} {
		if c, err := Parse([]byte(minimal+text), "/d"); err != nil || c.Heartbeat != want {
			t.Errorf("%q: %+v, %v; want %+v", text, c.Heartbeat, err, want)
		}
	}
}

func TestEverythingAtOnce(t *testing.T) {
	_, err := Parse(nil, "/d")
	var wrong *Error
	if !errors.As(err, &wrong) {
		t.Fatal(err)
	}
	for _, field := range []string{"cluster", "data_dir", "postgres.host", "listen.gateway", "listen.grpc", "listen.http", "listen.raft"} {
		if !strings.Contains(err.Error(), "\n  "+field+": ") {
			t.Errorf("%s is not named by\n%v", field, err)
		}
	}
}

// With certificates a node may listen everywhere, and the gateway offers clients the same ones.
func TestTLSPaths(t *testing.T) {
	text := strings.Replace(minimal, `"127.0.0.1:6201"`, `":6201"`, 1) + "tls: {ca: ca.crt, cert: n.crt, key: /k/n.key}\n"
	c, err := Parse([]byte(text), "/d")
	if err != nil {
		t.Fatal(err)
	}
	if c.TLS != (TLS{CA: "/d/ca.crt", Cert: "/d/n.crt", Key: "/k/n.key"}) || c.Gateway.TLS != (GatewayTLS{Cert: "/d/n.crt", Key: "/k/n.key"}) {
		t.Errorf("%+v, %+v", c.TLS, c.Gateway.TLS)
	}
	for from, want := range map[string]string{"10.1.2.3": "10.1.2.3/32", "10.1.2.3/8": "10.0.0.0/8", "::1": "::1/128", "::ffff:10.0.0.1": "10.0.0.1/32"} {
		if got, err := (ClientRule{From: from}).Prefix(); err != nil || got.String() != want {
			t.Errorf("%s is %v, %v", from, got, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	sample, err := os.ReadFile(sampleFile)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sample)
	f.Add([]byte(minimal))
	f.Add([]byte("a: &a [*a]\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse(text, "/d")
		if err != nil {
			_ = err.Error()
			return
		}
		if err := c.Validate(); err != nil {
			t.Errorf("accepted, but invalid: %v", err)
		}
	})
}

func TestSize(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := Size(rapid.Int64Range(0, 1<<62).Draw(t, "size"))
		if got, err := ParseSize(s.String()); err != nil || got != s {
			t.Fatalf("%d is written %q and read %d, %v", int64(s), s, int64(got), err)
		}
	})
	for _, text := range []string{"", "-1", "1.5MiB", "MiB", "9999999999999GiB", "1 MiB"} {
		if got, err := ParseSize(text); err == nil {
			t.Errorf("%q is %d, want an error", text, int64(got))
		}
	}
}

func TestClaimDataDir(t *testing.T) {
	c, err := Parse([]byte(minimal), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var claimed Identity
	for range 2 {
		if claimed, err = c.ClaimDataDir(); err != nil || claimed.Node != 1 || claimed.State != StateMember || claimed.ClusterID.IsZero() {
			t.Fatalf("%+v: %v", claimed, err)
		}
	}
	other := c
	other.Cluster = "d"
	if _, err := other.ClaimDataDir(); err == nil || !strings.Contains(err.Error(), `belongs to cluster "c": cluster is "d"`) {
		t.Errorf("another cluster: %v", err)
	}
	other = c
	other.Node = 2
	if _, err := other.ClaimDataDir(); err == nil || !strings.Contains(err.Error(), `belongs to node 1 of cluster "c": node is 2`) {
		t.Errorf("another node: %v", err)
	}
	// Without a list of members it is the directory that says who the node is.
	joined := c
	joined.Node, joined.Members = 0, nil
	if got, err := joined.ClaimDataDir(); err != nil || joined.Node != 1 || !reflect.DeepEqual(got, claimed) {
		t.Errorf("%+v: %v", got, err)
	}
	joined.DataDir = t.TempDir()
	if _, err := joined.ClaimDataDir(); !errors.Is(err, ErrNoIdentity) || !strings.Contains(err.Error(), "quorate init") {
		t.Errorf("a directory of nobody: %v", err)
	}
	if err := os.WriteFile(filepath.Join(c.DataDir, "identity"), []byte("garbage"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ClaimDataDir(); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("damaged identity: %v", err)
	}
}

func TestAdvertise(t *testing.T) {
	parse := func(listen, more string) (Config, error) {
		return Parse([]byte("cluster: c\ndata_dir: d\ntls: {ca: a, cert: c, key: k}\npostgres: {managed: true, auth: trust}\nlisten: "+listen+"\n"+more), "/d")
	}
	const named = `{gateway: "h:1", grpc: "h:2", http: "h:3", raft: "h:4"}`
	const everywhere = `{gateway: ":1", grpc: "0.0.0.0:2", http: ":3", raft: "[::]:4"}`
	if c, err := parse(named, ""); err != nil || c.Advertise != (Advertise{"h:1", "h:2", "h:3", "h:4"}) {
		t.Errorf("%+v: %v", c.Advertise, err)
	}
	if c, err := parse(everywhere, `advertise: {grpc: "x:2", raft: "x:4"}`); err != nil || c.Advertise != (Advertise{GRPC: "x:2", Raft: "x:4"}) {
		t.Errorf("%+v: %v", c.Advertise, err)
	}
	_, err := parse(everywhere, "")
	for _, want := range []string{`advertise.raft: is required, because listen.raft is "[::]:4"`, "advertise.grpc: is required"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error\n%v\ndoes not say\n%s", err, want)
		}
	}
	if _, err := parse(named, `advertise: {raft: "0.0.0.0:4"}`); err == nil || !strings.Contains(err.Error(), "must name a host") {
		t.Errorf("an address that means nothing elsewhere: %v", err)
	}
	const witness = "cluster: c\nrole: witness\ntls: {ca: a, cert: c, key: k}\ndata_dir: d\nlisten: {grpc: \"h:2\", http: \"h:3\", raft: \"h:4\"}"
	if c, err := Parse([]byte(witness), "/d"); err != nil || !c.Witness() || c.Advertise.GRPC != "h:2" {
		t.Errorf("%+v: %v", c, err)
	}
}

// Transaction ids are given out again by a server that was set back: those of an incarnation are known by its bounds.
func TestServerGave(t *testing.T) {
	s := Server{}
	for _, i := range []Incarnation{{ID: 7, XID: 100}, {ID: 8, XID: 200}, {ID: 9, XID: 200}, {ID: 10, XID: 250}} {
		s = s.Begin(i).Speak()
	}
	for _, x := range []struct {
		incarnation uint64
		xid         txn.XID
		gave        bool
	}{
		{7, 99, false}, {7, 100, true}, {7, 199, true}, {7, 200, false},
		{8, 199, false}, {8, 200, false}, {9, 200, true}, {9, 249, true}, {9, 250, false}, {10, 250, true}, {10, 1 << 40, true},
		{6, 99, true}, {6, 100, false}, // from before they were written down
	} {
		if got := s.Gave(x.incarnation, x.xid); got != x.gave || !s.Knows(x.incarnation) {
			t.Errorf("incarnation %d, id %d: %v", x.incarnation, x.xid, got)
		}
	}
	s = s.CaughtUp()
	if s.Knows(9) || s.Knows(6) || s.Gave(9, 249) || s.Gave(6, 99) || !s.Gave(10, 250) {
		t.Errorf("when it has caught up: %+v", s)
	}
	// Starts that fail leave the ids of those before where they were, and the name of the latest.
	for id := uint64(11); id < 100; id++ {
		s = s.Begin(Incarnation{ID: id, XID: txn.XID(300 + id)})
	}
	if len(s.Incarnations) != 3 || !s.Gave(10, 310) || s.Gave(10, 311) || s.Knows(50) || !s.Knows(98) || !s.Gave(99, 399) || s.Gave(99, 398) {
		t.Errorf("after starts that failed: %+v", s)
	}
	if s = s.Speak().Begin(Incarnation{ID: 100, XID: 500}).Begin(Incarnation{ID: 101, XID: 500}); !s.Knows(99) || !s.Gave(99, 499) || s.Gave(99, 500) {
		t.Errorf("one that the log knows of is forgotten: %+v", s)
	}
	if !(Server{}).CaughtUp().IsZero() {
		t.Error("a server out of nothing")
	}
}
