package check

import (
	"cmp"
	"slices"
	"time"
)

// event is a point in the one order of everything: a transaction takes a snapshot, or it commits. There are also
// events that belong to no transaction, which only stand between others to save edges.
type event = int32

// kinds is a set of kinds of edges.
type kinds uint16

const (
	within   kinds = 1 << iota // from one event of a transaction to the next
	ww                         // wrote the version before
	wr                         // wrote the version that was read
	rw                         // read the version before
	session                    // came first, in a place where the later one must see it
	order                      // was over before the other began, so it commits before it
	serial                     // commit before snapshot: what serializability would ask for and nobody promised
	depend   = ww | wr | rw
	clock    = session | order
	promised = within | depend | clock
)

// edge says that its event comes before another one, and why: for a dependency, the key and the versions at both ends.
type edge struct {
	to   event
	kind kinds
	key  int32
	from int64
	over int64
}

// graph is a directed graph of events. No order of events explains the history if it has a cycle.
type graph struct {
	op  []int32 // the transaction of an event, or none
	out [][]edge
}

const none = -1

func (g *graph) event(op int) event {
	g.op = append(g.op, int32(op))
	g.out = append(g.out, nil)
	return event(len(g.op) - 1)
}

func (g *graph) edge(from event, e edge) { g.out[from] = append(g.out[from], e) }

// stamp is an event, or what stands for it, at a time of the clock.
type stamp struct {
	at time.Duration
	event
	value int64 // what it wrote, for the edge
}

// chain adds edges that say: each of ends comes before each of starts that is later by the clock. All pairs would be
// too many, so there is an event for each end, in a row, and edges lead into the row and out of it. The result has,
// for each end in the order given, its place in the row.
func (g *graph) chain(template edge, ends, starts []stamp) []event {
	places := make([]event, len(ends))
	byTime := make([]int, len(ends))
	for i := range byTime {
		byTime[i] = i
	}
	slices.SortStableFunc(byTime, func(a, b int) int { return cmp.Compare(ends[a].at, ends[b].at) })
	starts = slices.SortedStableFunc(slices.Values(starts), func(a, b stamp) int { return cmp.Compare(a.at, b.at) })
	next, last := 0, event(none)
	leave := func(until time.Duration) {
		for ; next < len(starts) && starts[next].at <= until; next++ {
			if last != none {
				e := template
				e.to, e.over = starts[next].event, starts[next].value
				g.edge(last, e)
			}
		}
	}
	for _, i := range byTime {
		leave(ends[i].at)
		place := g.event(none)
		places[i] = place
		if last != none {
			e := template
			e.to = place
			g.edge(last, e)
		}
		if ends[i].event != none {
			e := template
			e.to, e.from = place, ends[i].value
			g.edge(ends[i].event, e)
		}
		last = place
	}
	leave(1<<63 - 1)
	return places
}

// components returns the strongly connected components of more than one event, by edges of some kinds only: Tarjan's
// algorithm, with its recursion on a stack of its own.
func (g *graph) components(allowed kinds) [][]event {
	const unvisited = 0
	var (
		found   [][]event
		index   = make([]int32, len(g.out)) // order of visit, from 1
		low     = make([]int32, len(g.out))
		on      = make([]bool, len(g.out)) // on the stack
		stack   []event
		visited int32
	)
	type frame struct {
		event
		edge int
	}
	var frames []frame
	enter := func(v event) {
		visited++
		index[v], low[v], on[v] = visited, visited, true
		stack = append(stack, v)
		frames = append(frames, frame{v, 0})
	}
	for root := range g.out {
		if index[root] != unvisited {
			continue
		}
		enter(event(root))
		for len(frames) > 0 {
			f := &frames[len(frames)-1]
			v := f.event
			if f.edge < len(g.out[v]) {
				e := &g.out[v][f.edge]
				f.edge++
				switch {
				case e.kind&allowed == 0:
				case index[e.to] == unvisited:
					enter(e.to)
				case on[e.to]:
					low[v] = min(low[v], index[e.to])
				}
				continue
			}
			frames = frames[:len(frames)-1]
			if len(frames) > 0 {
				above := frames[len(frames)-1].event
				low[above] = min(low[above], low[v])
			}
			if low[v] == index[v] {
				at := len(stack) - 1
				for stack[at] != v { // from the end: the component is all that is above
					at--
				}
				for _, w := range stack[at:] {
					on[w] = false
				}
				if len(stack)-at > 1 {
					found = append(found, slices.Clone(stack[at:]))
				}
				stack = stack[:at]
			}
		}
	}
	return found
}

// step is an edge between two transactions, however many events it passed.
type step struct {
	from, to int // transactions
	edge
}

// searchEffort bounds how many edges are looked at in search of the shortest cycle of one component.
const searchEffort = 1_000_000

// place is an event on the way of a search. fresh is set as long as the way has not left the transaction that it began
// with: an event that belongs to no transaction may lead right back, and that is no cycle.
type place struct {
	event
	fresh bool
}

// reached is how a search came to a place.
type reached struct {
	cost int
	from place
	by   edge
}

// cycle returns a cycle of a component with the fewest edges between transactions. It is the shortest there is, unless
// the component is so large that looking for it would take too long. It returns nothing for a component that is no cycle
// of several transactions.
func (g *graph) cycle(component []event, allowed kinds) []step {
	inside := make(map[event]bool, len(component))
	for _, v := range component {
		inside[v] = true
	}
	var best []step
	shortest, effort := int(^uint(0)>>1), 0
	for _, v := range component {
		// Each cycle passes a transaction by its last event.
		if g.op[v] == none || !g.last(v) {
			continue
		}
		if effort > searchEffort && best != nil {
			break
		}
		// Breadth first in steps that cost: those that stay in a transaction, or in a row between two, cost nothing.
		start := place{v, true}
		seen := map[place]reached{start: {}}
		closed := reached{cost: shortest}
		now, later := []place{start}, []place(nil)
		for depth := 0; closed.cost == shortest && len(now) > 0 && depth < shortest; depth++ {
			for k := 0; k < len(now); k++ {
				at := now[k]
				if seen[at].cost != depth {
					continue // it was reached more cheaply meanwhile
				}
				for _, e := range g.out[at.event] {
					effort++
					if e.kind&allowed == 0 || !inside[e.to] {
						continue
					}
					to, cost := place{e.to, at.fresh}, depth
					switch op := g.op[e.to]; {
					case e.kind&(within|serial) != 0 || op == none:
					case op != g.op[v]:
						to.fresh = false
						cost++
					case at.fresh:
						continue
					default:
						if cost+1 < closed.cost {
							closed = reached{cost + 1, at, e}
						}
						continue
					}
					if before, ok := seen[to]; ok && before.cost <= cost {
						continue
					}
					seen[to] = reached{cost, at, e}
					if cost == depth {
						now = append(now, to)
					} else {
						later = append(later, to)
					}
				}
			}
			now, later = later, now[:0]
		}
		if closed.cost == shortest {
			continue
		}
		shortest = closed.cost
		way := []edge{closed.by}
		for at := closed.from; at != start; at = seen[at].from {
			way = append(way, seen[at].by)
		}
		slices.Reverse(way)
		best = g.steps(v, way)
	}
	return best
}

// last reports whether an event is the last of its transaction.
func (g *graph) last(v event) bool {
	for _, e := range g.out[v] {
		if e.kind == within {
			return false
		}
	}
	return true
}

// steps turns the edges of a cycle of events into those of one of transactions.
func (g *graph) steps(start event, way []edge) []step {
	var steps []step
	from, open := int(g.op[start]), false // open: the last step has not come to a transaction yet
	for _, e := range way {
		if e.kind&(within|serial) != 0 {
			continue
		}
		if !open {
			steps, open = append(steps, step{from: from, edge: e}), true
		} else if e.over != 0 {
			steps[len(steps)-1].over = e.over
		}
		if op := g.op[e.to]; op != none {
			steps[len(steps)-1].to = int(op)
			from, open = int(op), false
		}
	}
	return steps
}
