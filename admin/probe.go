package admin

import (
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strconv"

	"github.com/quorate/quorate/txn"
)

// Probe is how a node is, for load balancers. It is shown to everybody who can connect: it holds no secret.
type Probe struct {
	Node   txn.NodeID `json:"node"`
	State  string     `json:"state"`
	Role   string     `json:"role"`
	Writes bool       `json:"read_write"` // clients can commit writes
	Reads  bool       `json:"read_only"`  // clients can connect and read
	// Server: PostgreSQL runs and the node is active.
	Server bool `json:"healthy"`
	// Alive: the process does its work, whatever comes of it. Starting it anew mends nothing else.
	Alive bool `json:"alive"`
	// Lag is how many transactions the node is behind the newest that it has heard of.
	Lag uint64 `json:"lag"`
}

// DefaultReadinessLag is the most that a node may lag and be ready, unless the request says otherwise. It is where a node
// ceases to take new transactions into the log.
const DefaultReadinessLag = 2048

// probes are the paths, named as Patroni's users know them, and when each is fine.
var probes = map[string]func(p Probe, lag uint64) bool{
	"/read-write": func(p Probe, _ uint64) bool { return p.Writes },
	"/read-only":  func(p Probe, lag uint64) bool { return p.Reads && p.Lag <= lag },
	"/health":     func(p Probe, _ uint64) bool { return p.Server },
	"/liveness":   func(p Probe, _ uint64) bool { return p.Alive },
	"/readiness":  func(p Probe, lag uint64) bool { return p.Server && p.Reads && p.Lag <= lag },
	"/leader":     func(p Probe, _ uint64) bool { return p.Server && p.Role == Leader.String() },
}

// ProbePaths are the paths that HandleProbe answers, in order.
func ProbePaths() []string {
	var paths []string
	for path := range probes {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	return paths
}

// HandleProbe returns the handler for ProbePaths. It answers GET, HEAD and OPTIONS with 200 or 503 and a Probe as JSON.
// "?lag=N", on /readiness and /read-only, is how many transactions the node may be behind; what is no such number gets
// 400, so that a mistake does not take every node out of service, or none, unnoticed. probe must be cheap.
func HandleProbe(probe func() Probe) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fine, ok := probes[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		switch r.Method {
		case http.MethodGet, http.MethodHead, http.MethodOptions:
		default:
			w.Header().Set("Allow", "GET, HEAD, OPTIONS")
			answer(w, http.StatusMethodNotAllowed, problem{"use GET, HEAD or OPTIONS"})
			return
		}
		lag, mistake := allowedLag(r.URL)
		if mistake != "" {
			answer(w, http.StatusBadRequest, problem{mistake})
			return
		}
		p, status := probe(), http.StatusServiceUnavailable
		if fine(p, lag) {
			status = http.StatusOK
		}
		answer(w, status, p)
	})
}

// allowedLag reads the query of a probe.
func allowedLag(u *url.URL) (lag uint64, mistake string) {
	lag = 1<<64 - 1
	if u.Path == "/readiness" {
		lag = DefaultReadinessLag
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return 0, "the query cannot be read"
	}
	for name, values := range query {
		if name != "lag" || u.Path != "/readiness" && u.Path != "/read-only" {
			return 0, "there is no parameter " + strconv.Quote(name) + " here"
		}
		n, err := strconv.ParseUint(values[0], 10, 64)
		if err != nil || len(values) > 1 {
			return 0, "lag must be a whole number of transactions, such as 100"
		}
		lag = n
	}
	return lag, ""
}

type problem struct {
	Error string `json:"error"`
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // who asked may be gone
}
