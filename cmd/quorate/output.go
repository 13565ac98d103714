package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"
)

// output is how a command shows what it has found out.
type output struct {
	format string
	color  string
}

var (
	formats = []string{"table", "json", "yaml"}
	colors  = []string{"auto", "always", "never"}
)

// flags adds to a command what output is read from.
func (o *output) flags(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&o.format, "output", "o", "table", "`format`: table, json or yaml")
	cmd.Flags().StringVar(&o.color, "color", "auto", "`when` to colour tables: auto (on a terminal, unless $NO_COLOR is set), always or never")
	// The only error is that there is no such flag.
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("color", cobra.FixedCompletions(colors, cobra.ShellCompDirectiveNoFileComp))
}

func (o *output) complete() error {
	if !slices.Contains(formats, o.format) {
		return usage("output", strconv.Quote(o.format), "must be one of %s", strings.Join(formats, ", "))
	}
	if !slices.Contains(colors, o.color) {
		return usage("color", strconv.Quote(o.color), "must be one of %s", strings.Join(colors, ", "))
	}
	return nil
}

// write shows v: as JSON or YAML with the same names, or as show writes it for people.
func (o *output) write(w io.Writer, v any, show func(*screen)) error {
	switch o.format {
	case "json":
		return printJSON(w, v)
	case "yaml":
		return printYAML(w, v)
	}
	s := screen{colored: o.colored(w)}
	show(&s)
	_, err := io.WriteString(w, s.text.String())
	return err
}

func (o *output) colored(w io.Writer) bool {
	if o.color != "auto" {
		return o.color == "always"
	}
	return isTerminal(w) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// printYAML goes by way of JSON, which is YAML: so names and order are the same.
func printYAML(w io.Writer, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var node yaml.Node
	if err := yaml.Unmarshal(text, &node); err != nil {
		return err
	}
	block(&node)
	e := yaml.NewEncoder(w)
	e.SetIndent(2)
	if err := e.Encode(&node); err != nil {
		return err
	}
	return e.Close()
}

// block drops JSON's brackets and needless quotes.
func block(n *yaml.Node) {
	n.Style = 0
	for _, child := range n.Content {
		block(child)
	}
}

// style is how a piece of text looks where there are colours. What it means is in the text as well.
type style string

const (
	plain style = ""
	good  style = "32"
	fair  style = "33"
	bad   style = "31;1"
	bold  style = "1"
	dim   style = "2"
)

// cell is a piece of text in a table.
type cell struct {
	text  string
	style style
	right bool // aligned
}

func text(s string) cell { return cell{text: s} }

// number is aligned to the right.
func number[T uint32 | uint64](n T) cell {
	return cell{text: strconv.FormatUint(uint64(n), 10), right: true}
}

// unknown stands for what is not known: no zero that looks like knowledge.
func unknown() cell { return cell{text: "-", style: dim, right: true} }

// maybe is a number, if it is known.
func maybe(n *uint64) cell {
	if n == nil {
		return unknown()
	}
	return number(*n)
}

// screen is text for people.
type screen struct {
	colored bool
	text    strings.Builder
}

func (s *screen) paint(text string, as style) string {
	if !s.colored || as == plain {
		return text
	}
	return "\x1b[" + string(as) + "m" + text + "\x1b[0m"
}

// line writes pieces of text one after another, and ends the line.
func (s *screen) line(pieces ...cell) {
	for _, p := range pieces {
		s.text.WriteString(s.paint(printable(p.text), p.style))
	}
	s.text.WriteByte('\n')
}

func (s *screen) printf(format string, args ...any) { s.line(text(fmt.Sprintf(format, args...))) }

// table writes rows in columns.
func (s *screen) table(head []string, rows [][]cell) {
	all := [][]cell{make([]cell, len(head))}
	for i, name := range head {
		all[0][i] = cell{text: name, style: bold}
		if len(rows) > 0 && rows[0][i].right {
			all[0][i].right = true
		}
	}
	all = append(all, rows...)
	widths := make([]int, len(head))
	for _, row := range all {
		for i := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(printable(row[i].text)))
		}
	}
	for _, row := range all {
		s.aligned(row, widths)
	}
}

// aligned writes a row in columns of at least these widths; what has no width ends the line.
func (s *screen) aligned(row []cell, widths []int) {
	var line strings.Builder
	for i, c := range row {
		words, pad := printable(c.text), ""
		if i < len(widths) {
			pad = strings.Repeat(" ", max(0, widths[i]-utf8.RuneCountInString(words)))
		}
		if i > 0 {
			line.WriteString("  ")
		}
		switch {
		case c.right:
			line.WriteString(pad + s.paint(words, c.style))
		case i == len(row)-1:
			line.WriteString(s.paint(words, c.style))
		default:
			line.WriteString(s.paint(words, c.style) + pad)
		}
	}
	s.text.WriteString(strings.TrimRight(line.String(), " ") + "\n")
}

// printable keeps text from the cluster, values of users' keys among it, from acting on the terminal.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == utf8.RuneError {
			return '·'
		}
		return r
	}, text)
}
