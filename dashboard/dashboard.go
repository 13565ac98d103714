// Package dashboard serves the page on which operators see their cluster and act on it: one HTML, one style sheet and
// one script, embedded; what they show is pushed over one stream of server-sent events. Nothing is loaded from
// elsewhere.
//
// Who somebody is, and that a request comes from the page and not by way of another site's, is for whoever serves this
// package to find out; it decides what one may do.
package dashboard

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/quorate/quorate/internal/logkey"
	"github.com/quorate/quorate/txn"
)

// Source is the node, as far as the page needs it, safe for concurrent use. Neither View nor Counters may wait for
// anything: they are for times when nothing works.
type Source interface {
	// View is asked a few times a second while somebody looks.
	View() View
	// Counters is asked once a second, always.
	Counters() Counters
	// Act does what an operator asks for and returns, when it is done, what to tell. Errors are gRPC statuses, whose
	// messages are shown.
	Act(ctx context.Context, a Action) (string, error)
}

// Action is something to be done to a node.
type Action struct {
	Name string // one of the constants below
	Node txn.NodeID
}

// The actions.
const (
	Drain    = "drain"
	Resume   = "resume"
	Transfer = "transfer" // leadership, to the node
	Remove   = "remove"
	Resync   = "resync"
)

// destructive tells of every action whether its node's name must be typed.
var destructive = map[string]bool{Drain: false, Resume: false, Transfer: false, Remove: true, Resync: true}

// Role is what somebody may do.
type Role int

// The roles; each may do what the ones before may.
const (
	Nobody Role = iota
	Reader
	Operator
)

// Config of a Dashboard.
type Config struct {
	Source Source // required
	// Role tells what somebody who makes a request may do. It is asked again and again while a page is open. Required.
	Role func(*http.Request) Role
	// Name is who makes a request, for the log. Nil: that is not known.
	Name func(*http.Request) string
	// Login takes a form with the field "token" and answers 204 if from now on Role knows the browser, 401 otherwise.
	// Logout ends that. Nil means that there are no tokens, and it makes no sense to ask for one.
	Login, Logout http.HandlerFunc
	Logger        *slog.Logger // required
	// Interval is how often what is shown is looked at, 0 for 250 ms.
	Interval time.Duration
}

const (
	// sampling is how far the points of the charts lie apart, remembered how many are kept: ten minutes.
	sampling   = time.Second
	remembered = 600
	// listed is how many conflicts, and how many events, a page gets at once and keeps.
	listed = 200
	// waiting is how many transactions are shown.
	waiting = 100
	// maxStreams bounds how many pages are served at once.
	maxStreams = 64
)

// Dashboard is an http.Handler for "/" and everything below "/dashboard/". It is safe for concurrent use.
type Dashboard struct {
	cfg   Config
	mux   http.Handler
	files map[string]file
	wake  chan struct{} // somebody has begun to look
	// patience is how long a page may take nothing before its stream ends; it comes again.
	patience time.Duration

	mu      sync.Mutex    // guards the rest
	news    chan struct{} // closed, and replaced, when there is something new
	streams int
	history []sample // the newest last
	taken   uint64   // how many samples there have been
	stages  []string // of a commit
	now     *frame   // nil while nobody looks
}

// frame is what is shown now, by parts, encoded once for all who look.
type frame struct {
	sequence  uint64 // rises with each
	at        int64  // Unix milliseconds
	parts     [numParts]part
	conflicts []listing[Conflict]
	events    []listing[Event]
}

// listing is an item of a list, and the frame in which what is known of it last changed: where a conflict was may be found
// out late, and a node that was away tells of events from before others'.
type listing[T item] struct {
	item    T
	changed uint64
}

type item interface {
	comparable
	id() string
}

func (c Conflict) id() string { return c.ID }
func (e Event) id() string    { return e.ID }

// listings are the newest items of a list, with the frames of those that were there before.
func listings[T item](items []T, before []listing[T], sequence uint64) []listing[T] {
	items = items[max(0, len(items)-listed):]
	if slices.EqualFunc(items, before, func(one T, old listing[T]) bool { return one == old.item }) {
		return before // as in nearly every frame
	}
	known := make(map[string]listing[T], len(before))
	for _, old := range before {
		known[old.item.id()] = old
	}
	all := make([]listing[T], len(items))
	for i, one := range items {
		all[i] = listing[T]{one, sequence}
		if old := known[one.id()]; old.item == one {
			all[i] = old
		}
	}
	return all
}

// news are the items that have changed since a frame.
func news[T item](all []listing[T], since uint64) (found []T) {
	for _, one := range all {
		if one.changed > since {
			found = append(found, one.item)
		}
	}
	return found
}

// part is one part of the page, and the frame in which it last changed.
type part struct {
	text    json.RawMessage
	changed uint64
}

const (
	partVerdict = iota
	partCluster
	partNodes
	partLinks
	partTransactions
	partSilent
	numParts
)

var partNames = [numParts]string{"verdict", "cluster", "nodes", "links", "transactions", "silent"}

// New returns a Dashboard, which shows nothing until it runs.
func New(c Config) (*Dashboard, error) {
	if c.Interval == 0 {
		c.Interval = 250 * time.Millisecond
	}
	files, err := loadFiles()
	if err != nil {
		return nil, err
	}
	d := &Dashboard{cfg: c, files: files, wake: make(chan struct{}, 1), patience: 10 * time.Second, news: make(chan struct{})}
	d.mux = d.routes()
	return d, nil
}

// Run keeps what is shown up to date, until ctx ends.
func (d *Dashboard) Run(ctx context.Context) error {
	ticks := time.NewTicker(d.cfg.Interval)
	defer ticks.Stop()
	before, read := d.cfg.Source.Counters(), time.Now()
	var sequence uint64
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticks.C:
		case <-d.wake:
		}
		// Half an interval early is on time, or every fourth tick would wait for the fifth.
		if apart := time.Since(read); apart >= sampling-d.cfg.Interval/2 {
			now := d.cfg.Source.Counters()
			d.remember(&before, &now, apart)
			before, read = now, time.Now()
		}
		if !d.watched() {
			continue
		}
		sequence++
		view := d.cfg.Source.View()
		if err := d.show(sequence, &view); err != nil {
			d.cfg.Logger.Error("the dashboard cannot be shown", logkey.Error, err)
		}
	}
}

// remember adds a point to the charts, from two readings that lie that far apart.
func (d *Dashboard) remember(before, now *Counters, apart time.Duration) {
	s := between(before, now, time.Now(), apart)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stages = make([]string, len(now.Stages))
	for i, stage := range now.Stages {
		d.stages[i] = stage.Name
	}
	d.taken++
	if len(d.history) == remembered {
		copy(d.history, d.history[1:])
		d.history = d.history[:remembered-1]
	}
	d.history = append(d.history, s)
}

func (d *Dashboard) watched() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.streams > 0
}

// show makes a view the newest frame. Parts that are as before keep the sequence at which they changed, so that nobody
// is sent them again.
func (d *Dashboard) show(sequence uint64, v *View) error {
	for i := range v.Nodes {
		if v.Nodes[i].Actions == nil {
			v.Nodes[i].Actions = []string{}
		}
	}
	v.Transactions = v.Transactions[:min(len(v.Transactions), waiting)]
	f := &frame{sequence: sequence, at: time.Now().UnixMilli()}
	for i, value := range [numParts]any{assess(v), v.Cluster, list(v.Nodes), list(v.Links), list(v.Transactions), list(v.Silent)} {
		text, err := json.Marshal(value)
		if err != nil {
			return fmt.Errorf("encode %s: %w", partNames[i], err)
		}
		f.parts[i] = part{text: text, changed: sequence}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.streams == 0 {
		return nil // the last has gone meanwhile: whoever comes next gets what is true then
	}
	before := d.now
	if before == nil {
		before = &frame{}
	}
	for i, old := range before.parts {
		if string(old.text) == string(f.parts[i].text) {
			f.parts[i] = old
		}
	}
	f.conflicts, f.events = listings(v.Conflicts, before.conflicts, sequence), listings(v.Events, before.events, sequence)
	d.now = f
	close(d.news)
	d.news = make(chan struct{})
	return nil
}

// list makes an empty list of none, for readers in JavaScript.
func list[T any](of []T) []T {
	if of == nil {
		return []T{}
	}
	return of
}

// cursor is what one page has been sent. The page that has seen nothing has the zero value.
type cursor struct {
	sequence uint64
	samples  uint64
	stages   []string
}

// update is what a page is sent.
type update struct {
	First     bool       `json:"first,omitempty"` // what was shown before is void
	At        int64      `json:"at"`
	Build     string     `json:"build,omitempty"`     // of the page; another one means: load it again
	Stages    []string   `json:"stages,omitempty"`    // of a commit, in their order
	Samples   []sample   `json:"samples,omitempty"`   // to be appended
	Conflicts []Conflict `json:"conflicts,omitempty"` // to be added, or to replace the one of the same ID
	Events    []Event    `json:"events,omitempty"`    // the same
	parts     [numParts]json.RawMessage
}

// encode adds the parts to the rest as they are: as a field each would be read through once more for each page.
func (u *update) encode() ([]byte, error) {
	text, err := json.Marshal(u)
	if err != nil {
		return nil, err
	}
	for i, part := range u.parts {
		if part != nil {
			text = fmt.Appendf(text[:len(text)-1], ",%q:%s}", partNames[i], part)
		}
	}
	return text, nil
}

// since returns what has changed since c and moves c, or nil and what to wait for. However slow a page is, nothing
// piles up for it: it is sent the newest of everything when it can take it.
func (d *Dashboard) since(c *cursor) (*update, <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.now
	if f == nil || f.sequence == c.sequence {
		return nil, d.news
	}
	u := &update{First: c.sequence == 0, At: f.at}
	if u.First {
		u.Build = d.build()
	}
	if len(d.stages) > 0 && !slices.Equal(d.stages, c.stages) { // none are known without PostgreSQL
		u.Stages, c.stages = d.stages, d.stages
	}
	for i, part := range f.parts {
		if part.changed > c.sequence {
			u.parts[i] = part.text
		}
	}
	missing := min(d.taken-c.samples, uint64(len(d.history)))
	// Copied, because the history is moved in place.
	u.Samples = append(u.Samples, d.history[uint64(len(d.history))-missing:]...)
	u.Conflicts, u.Events = news(f.conflicts, c.sequence), news(f.events, c.sequence)
	c.sequence, c.samples = f.sequence, d.taken
	return u, d.news
}

// attach counts a page; it reports false when there are too many.
func (d *Dashboard) attach() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.streams == maxStreams {
		return false
	}
	d.streams++
	select {
	case d.wake <- struct{}{}:
	default: // it is about to look anyway
	}
	return true
}

func (d *Dashboard) detach() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.streams--; d.streams == 0 {
		d.now = nil
	}
}
