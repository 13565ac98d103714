package admin_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/quorate/quorate/admin"
)

func TestProbes(t *testing.T) {
	healthy := admin.Probe{Node: 1, State: "active", Role: "follower", Writes: true, Reads: true, Server: true, Alive: true, Lag: 50}
	leader := healthy
	leader.Role = "leader"
	cutOff := healthy
	cutOff.Writes = false
	starting := admin.Probe{Node: 1, State: "starting", Alive: true}
	stuck := healthy
	stuck.Alive = false
	behind := healthy
	behind.Lag = admin.DefaultReadinessLag + 1
	for _, tc := range []struct {
		name  string
		probe admin.Probe
		path  string
		want  int
	}{
		{"healthy", healthy, "/read-write", 200},
		{"healthy", healthy, "/read-only", 200},
		{"healthy", healthy, "/read-only?lag=49", 503},
		{"healthy", healthy, "/health", 200},
		{"healthy", healthy, "/liveness", 200},
		{"healthy", healthy, "/readiness", 200},
		{"healthy", healthy, "/readiness?lag=50", 200},
		{"healthy", healthy, "/readiness?lag=49", 503},
		{"healthy", healthy, "/leader", 503},
		{"leader", leader, "/leader", 200},
		{"cut off", cutOff, "/read-write", 503},
		{"cut off", cutOff, "/read-only", 200},
		{"behind", behind, "/readiness", 503},
		{"behind", behind, "/read-only", 200},
		{"starting", starting, "/read-write", 503},
		{"starting", starting, "/read-only", 503},
		{"starting", starting, "/health", 503},
		{"starting", starting, "/readiness", 503},
		{"starting", starting, "/leader", 503},
		{"starting", starting, "/liveness", 200},
		{"stuck", stuck, "/liveness", 503},
		{"nonsense", healthy, "/readiness?lag=-1", 400},
		{"nonsense", healthy, "/readiness?lag=10MB", 400},
		{"nonsense", healthy, "/readiness?lag=", 400},
		{"nonsense", healthy, "/readiness?lag=1&lag=2", 400},
		{"nonsense", healthy, "/readiness?lag=99999999999999999999", 400},
		{"nonsense", healthy, "/readiness?log=5", 400},
		{"nonsense", healthy, "/readiness?lag=%zz", 400},
		{"nonsense", healthy, "/health?lag=5", 400},
		{"nonsense", healthy, "/unhealthy", 404},
	} {
		handler := admin.HandleProbe(func() admin.Probe { return tc.probe })
		for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodOptions} {
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, httptest.NewRequest(method, tc.path, nil))
			if w.Code != tc.want {
				t.Errorf("%s: %s %s: %d, want %d", tc.name, method, tc.path, w.Code, tc.want)
			}
			var body map[string]any
			if tc.want == 404 {
				continue
			}
			if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil || tc.want == 400 && body["error"] == nil || tc.want == 200 && body["node"] != 1.0 {
				t.Errorf("%s: %s %s: body %s, %v", tc.name, method, tc.path, w.Body, err)
			}
		}
	}
	w := httptest.NewRecorder()
	admin.HandleProbe(func() admin.Probe { return healthy }).ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/health", nil))
	if w.Code != http.StatusMethodNotAllowed || w.Header().Get("Allow") == "" {
		t.Errorf("POST: %d, %v", w.Code, w.Header())
	}
}
