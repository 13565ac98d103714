package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Load reads, completes and validates a configuration file. The error is an *Error if the file could be read.
func Load(name string) (Config, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	dir, err := filepath.Abs(filepath.Dir(name))
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	c, err := Parse(text, dir)
	var wrong *Error
	if errors.As(err, &wrong) {
		wrong.File = name
	}
	return c, err
}

// Parse is Load of the contents of a file in dir, an absolute path.
func Parse(text []byte, dir string) (Config, error) {
	var c Config
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	decoder.KnownFields(true)
	if err := decoder.Decode(&c); err != nil && err != io.EOF { // an empty file lacks everything, which Validate says
		return Config{}, &Error{Problems: explain(text, err)}
	}
	if err := decoder.Decode(new(yaml.Node)); err != io.EOF {
		return Config{}, &Error{Problems: []Problem{{Message: "the file holds more than one document"}}}
	}
	c.complete(dir)
	return c, c.Validate()
}

// Save writes the configuration to a file, in one step. Load gives it back.
func (c Config) Save(name string) error {
	text, err := yaml.Marshal(c)
	if err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	return writeFile(name, text, 0o644)
}

// writeFile replaces a file in one step that survives a power failure.
func writeFile(name string, text []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	defer os.Remove(f.Name()) // there only when something below failed
	_, err = f.Write(text)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err == nil {
		err = syncDir(filepath.Dir(name))
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// complete fills in the defaults and makes paths absolute.
func (c *Config) complete(dir string) {
	path := func(p *string) {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	text := func(p *string, value string) {
		if *p == "" {
			*p = value
		}
	}
	path(&c.DataDir)
	listed, _ := c.listed()
	text(&c.Role, listed.Role)
	text(&c.Role, RoleData)
	c.Advertise.complete(listed, c.Listen)
	pg := &c.Postgres
	if pg.Managed {
		if c.DataDir != "" {
			text(&pg.DataDir, filepath.Join(c.DataDir, "pgdata"))
		}
		text(&pg.Host, "127.0.0.1")
		text(&pg.Auth, "scram-sha-256")
		path(&pg.DataDir)
		path(&pg.SocketDir)
		path(&pg.BinDir)
	}
	path(&pg.PasswordFile)
	c.completeSecurity(path)
	if !c.Witness() {
		text(&pg.Superuser, "postgres")
		text(&pg.Database, "postgres")
		orDefault(&pg.Port, 5432)
	}
	orDefault(&c.MaxNodes, defaultMaxNodes)
	orDefault(&c.Apply.Workers, 8)
	orDefault(&c.Limits.Clients, 100)
	orDefault(&c.Limits.Message, 64<<20)
	orDefault(&c.Limits.CaptureMemory, 64<<20)
	orDefault(&c.Limits.ApplyTransactions, 4096)
	orDefault(&c.Limits.ApplyMemory, 64<<20)
	orDefault(&c.Limits.Log, 512<<20)
	orDefault(&c.Limits.CloneWAL, 16<<30)
	orDefault(&c.Limits.Lag, 8192)
	orDefault(&c.Limits.LagPatience, 5*time.Second)
	orDefault(&c.CommitTimeout, defaultCommitTimeout)
	text(&c.ReadsWithoutQuorum, ReadsAllowed)
	orDefault(&c.MaxStaleness, defaultMaxStaleness)
	c.Heartbeat.complete()
	orDefault(&c.Tracing.Sample, defaultSample)
	text(&c.Log.Level, "info")
	text(&c.Log.Format, "text")
}

// complete takes what is missing from this node's entry in the list of members, and what is not there from where it
// listens, if that names a host.
func (a *Advertise) complete(listed Member, listen Listen) {
	for _, f := range []struct {
		address        *string
		listed, listen string
	}{
		{&a.Gateway, listed.Gateway, listen.Gateway}, {&a.GRPC, listed.GRPC, listen.GRPC},
		{&a.HTTP, listed.HTTP, listen.HTTP}, {&a.Raft, listed.Raft, listen.Raft},
	} {
		orDefault(f.address, f.listed)
		if namesHost(f.listen) {
			orDefault(f.address, f.listen)
		}
	}
}

func orDefault[T comparable](p *T, value T) {
	var zero T
	if *p == zero {
		*p = value
	}
}

var (
	atLine     = regexp.MustCompile(`^(?:yaml: )?line (\d+): (.*)$`)
	unknownKey = regexp.MustCompile(`^field (\S+) not found in type \S+$`)
	wrongType  = regexp.MustCompile("^cannot unmarshal (\\S+) (?:`(.*)` )?into (\\S+)$")
)

// explain turns the decoder's errors, which know lines and Go types, into ones that name fields.
func explain(text []byte, err error) []Problem {
	messages := []string{err.Error()}
	var wrong *yaml.TypeError
	if errors.As(err, &wrong) {
		messages = wrong.Errors
	}
	fields := map[int]string{}
	var document yaml.Node
	if yaml.Unmarshal(text, &document) == nil { // if not, then there are no fields to name
		nameLines(&document, "", fields)
	}
	var problems []Problem
	for _, message := range messages {
		p := Problem{Message: strings.TrimPrefix(message, "yaml: ")}
		if m := atLine.FindStringSubmatch(message); m != nil {
			p.Line, _ = strconv.Atoi(m[1]) // the pattern holds digits only
			p.Field, p.Message = fields[p.Line], m[2]
		}
		if m := unknownKey.FindStringSubmatch(p.Message); m != nil {
			p.Message = "there is no such field"
			if p.Field == "" {
				p.Field = m[1]
			}
		} else if m := wrongType.FindStringSubmatch(p.Message); m != nil {
			p.Value, p.Message = m[2], "must be "+typeName(m[3])
		}
		problems = append(problems, p)
	}
	return problems
}

func typeName(goType string) string {
	switch goType {
	case "int", "int64", "txn.NodeID", "uint32":
		return "a whole number"
	case "bool":
		return "true or false"
	case "time.Duration":
		return "a duration such as 500ms or 10s"
	case "string":
		return "a text"
	}
	switch {
	case strings.HasPrefix(goType, "[]"):
		return "a list"
	default:
		return "a group of fields"
	}
}

// nameLines notes for each line the field whose value begins there, or whose key stands there.
func nameLines(n *yaml.Node, field string, fields map[int]string) {
	if _, ok := fields[n.Line]; !ok && field != "" {
		fields[n.Line] = field
	}
	switch n.Kind {
	case yaml.DocumentNode:
		for _, child := range n.Content {
			nameLines(child, field, fields)
		}
	case yaml.SequenceNode:
		for i, child := range n.Content {
			nameLines(child, fmt.Sprintf("%s[%d]", field, i), fields)
		}
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			key, value := n.Content[i], n.Content[i+1]
			name := key.Value
			if field != "" {
				name = field + "." + name
			}
			if key.Line == value.Line {
				fields[key.Line] = name // of several in one line ({a: 1, b: 2}) the last: the message has the value
			} else if _, ok := fields[key.Line]; !ok {
				fields[key.Line] = name
			}
			nameLines(value, name, fields)
		}
	}
}
