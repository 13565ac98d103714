package layout

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const (
	module = "github.com/quorate/quorate/"
	root   = "../.."
)

// arrows are the allowed imports within the module; "x/*" is everything below x. Interfaces belong to the consumer, so
// that a missing arrow is rarely a reason to add one: node is the only package that knows all others and brings them
// together.
var arrows = map[string][]string{
	"cmd/quorate": {"node", "proto/quorate/v1", "txn", "internal/*"}, // the command line is a gRPC client
	"node": {"gateway", "admin", "heartbeat", "events", "dashboard", "txn", "txn/*", "replication", "replication/*", "consensus",
		"proto/quorate/v1", "proto/quorate/consensus/v1", // who may call what
		"internal/authz", "internal/config", "internal/peers", "internal/pgserver", "internal/pki", "internal/logkey", "internal/invariant", "internal/otlp"},

	"gateway":   {"gateway/*", "txn", leaves},
	"gateway/*": {"txn", leaves},
	"admin":     {"proto/quorate/v1", "internal/peers", "txn", leaves}, // asks the other members
	"heartbeat": {"proto/quorate/v1", "txn", leaves},                   // what travels between members, and what they make of it
	"events":    {"txn", leaves},                                       // a file log of its own, so that nothing else must work for it
	"dashboard": {"proto/quorate/v1", "internal/authz", "internal/pki", "txn", leaves},
	"consensus": {"proto/quorate/consensus/v1", "txn", leaves}, // bytes in, ordered bytes out: no transactions

	"replication":         {"txn/certify", "txn/codec", "txn", leaves},
	"replication/pg":      {"txn", leaves},
	"replication/capture": {"replication/pg", "txn", leaves},
	"replication/apply":   {"replication/pg", "txn", leaves},
	"replication/clone":   {"proto/quorate/v1", "replication/pg", "txn", leaves}, // one sidecar streams to another

	"txn":         {}, // the vocabulary
	"txn/certify": {"txn", "internal/invariant"},
	"txn/codec":   {"proto/quorate/log/v1", "txn", leaves},
	"txn/coord":   {"txn/codec", "txn", leaves},
	"proto/*":     {},

	"internal/config":          {"txn"},
	"internal/peers":           {"txn"},                     // connections to the other members
	"internal/pki":             {"internal/reload", leaves}, // certificates
	"internal/reload":          {leaves},
	"internal/authz":           {"internal/pki", "internal/reload", leaves}, // who may do what, over gRPC and HTTP
	"internal/pgserver":        {"internal/logkey"},
	"internal/pgserver/pgtest": {"internal/pgserver"},
	"internal/invariant":       {},
	"internal/otlp":            {"txn", leaves}, // spans, in bytes
	"internal/logkey":          {},
	"internal/layout":          {},
	"internal/browser":         {}, // a real Chromium, for tests

	// Histories are judged by what shares no code, and so no error, with what made them.
	"test/check":   {},
	"test/check/*": {"test/check"},

	"test/*": {"test/*", "internal/pgserver", "internal/pgserver/pgtest", "internal/browser"}, // a cluster is tested from outside
}

// leaves may be used everywhere: they import nothing and start nothing. internal/config and internal/pgserver are not
// among them, because only what wires a node has business with files and processes.
const leaves = "leaves"

var leafPackages = []string{"internal/invariant", "internal/logkey"}

type goPackage struct {
	ImportPath   string
	Name         string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

func packages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-e", "-json=ImportPath,Name,Imports,TestImports,XTestImports", "./...")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []goPackage
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// matches reports whether a package falls under a pattern of arrows.
func matches(pattern, name string) bool {
	if above, ok := strings.CutSuffix(pattern, "/*"); ok {
		return strings.HasPrefix(name, above+"/")
	}
	if pattern == leaves {
		return slices.Contains(leafPackages, name)
	}
	return pattern == name
}

// allowed returns what a package may import: its own line, else the longest pattern that covers it.
func allowed(name string) ([]string, bool) {
	if to, ok := arrows[name]; ok {
		return to, true
	}
	for above := path.Dir(name); above != "."; above = path.Dir(above) {
		if to, ok := arrows[above+"/*"]; ok {
			return to, true
		}
	}
	return nil, false
}

func TestArrows(t *testing.T) {
	for _, p := range packages(t) {
		name := strings.TrimPrefix(p.ImportPath, module)
		to, ok := allowed(name)
		if !ok {
			t.Errorf("package %s is not in the layout: add it to arrows, if it belongs there", name)
			continue
		}
		for _, imported := range p.Imports {
			other, ours := strings.CutPrefix(imported, module)
			if ours && !slices.ContainsFunc(to, func(pattern string) bool { return matches(pattern, other) }) {
				t.Errorf("%s imports %s, which the layout does not allow", name, other)
			}
		}
		// Tests may take other packages to help them, but nothing from above.
		for _, imported := range append(p.TestImports, p.XTestImports...) {
			other, ours := strings.CutPrefix(imported, module)
			above := other == "node" || strings.HasPrefix(other, "cmd/") || strings.HasPrefix(other, "test/")
			if ours && above && other != name && !strings.HasPrefix(name, "test/") {
				t.Errorf("a test of %s imports %s, which is above it", name, other)
			}
		}
		if slices.Contains([]string{"util", "utils", "common", "helper", "helpers", "misc", "base"}, p.Name) {
			t.Errorf("package %s: a package is named after what it provides", name)
		}
	}
}

// sources calls visit for every file of the repository that people have written.
func sources(t *testing.T, visit func(name string)) {
	t.Helper()
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if slices.Contains([]string{".git", ".tools", "bin", "demo", "node_modules"}, rel) || d.Name() == "testdata" {
				return filepath.SkipDir
			}
			return nil
		}
		if d.Type().IsRegular() {
			visit(filepath.ToSlash(rel))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Nodes log through the slog.Logger they are given. Only commands print.
func TestNobodyPrints(t *testing.T) {
	sources(t, func(name string) {
		if path.Ext(name) != ".go" || strings.HasPrefix(name, "cmd/") || strings.HasPrefix(name, "test/") {
			return
		}
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, name), nil, 0)
		if err != nil {
			t.Errorf("parse %s: %v", name, err)
			return
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch call := n.(type) {
			case *ast.SelectorExpr:
				if x, ok := call.X.(*ast.Ident); ok {
					switch called := fmt.Sprintf("%s.%s", x.Name, call.Sel.Name); called {
					case "fmt.Print", "fmt.Println", "fmt.Printf", "slog.Info", "slog.Warn", "slog.Error", "slog.Debug", "slog.Default":
						t.Errorf("%s uses %s", name, called)
					}
				}
			case *ast.CallExpr:
				if f, ok := call.Fun.(*ast.Ident); ok && (f.Name == "print" || f.Name == "println") {
					t.Errorf("%s uses %s", name, f.Name)
				}
			}
			return true
		})
	})
}

// What is fetched comes through the clients of registries, under their configuration: no address of one belongs here.
// Nor does the name of anybody's machine or directory.
var foreign = regexp.MustCompile(`registry\.npmjs|proxy\.golang|sum\.golang|deb\.debian|apt\.postgresql|/(home|Users|root|work)/[a-z]`)

func TestNothingForeign(t *testing.T) {
	sources(t, func(name string) {
		if name == "internal/layout/layout_test.go" || name == "go.sum" {
			return
		}
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if found := foreign.Find(text); found != nil {
			t.Errorf("%s contains %q", name, found)
		}
	})
}
