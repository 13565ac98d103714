package control

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

// grpcurl is what administrators without our command line use. It returns where it is.
func grpcurl(t *testing.T, ctx context.Context) string {
	t.Helper()
	path := filepath.Join(fixture.dir, "grpcurl")
	if _, err := os.Stat(path); err != nil {
		execute(t, ctx, []string{"GOBIN=" + fixture.dir}, "go", "install", "github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3")
	}
	return path
}

// calls has a request for each method that there is, which a cluster that works answers by that code. None of them changes
// anything. A stream goes on until the caller's time is over.
var calls = map[string]struct {
	request string
	code    codes.Code
}{
	"grpc.health.v1.Health/Check": {"", codes.OK},
	"grpc.health.v1.Health/List":  {"", codes.OK},
	"grpc.health.v1.Health/Watch": {"", codes.DeadlineExceeded},

	"grpc.reflection.v1.ServerReflection/ServerReflectionInfo":      {`{"list_services": ""}`, codes.OK},
	"grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": {`{"list_services": ""}`, codes.OK},

	"quorate.v1.Cluster/Status": {"", codes.OK},
	"quorate.v1.Cluster/Verify": {"", codes.OK},
	"quorate.v1.Cluster/Hash":   {"", codes.DeadlineExceeded},

	"quorate.v1.Observe/Watch":        {"", codes.DeadlineExceeded},
	"quorate.v1.Observe/Follow":       {"", codes.DeadlineExceeded},
	"quorate.v1.Observe/Events":       {`{"limit": 5}`, codes.OK},
	"quorate.v1.Observe/Conflicts":    {`{"limit": 1001}`, codes.InvalidArgument},
	"quorate.v1.Observe/Transactions": {`{"local": true}`, codes.OK},
	"quorate.v1.Observe/Lookup":       {`{"gid": "nonsense"}`, codes.InvalidArgument},

	"quorate.v1.Membership/List":               {"", codes.OK},
	"quorate.v1.Membership/Add":                {"", codes.InvalidArgument},
	"quorate.v1.Membership/Remove":             {`{"node": 99}`, codes.NotFound},
	"quorate.v1.Membership/Leave":              {`{"node": 99}`, codes.NotFound},
	"quorate.v1.Membership/Promote":            {`{"node": 99}`, codes.NotFound},
	"quorate.v1.Membership/Demote":             {`{"node": 99}`, codes.NotFound},
	"quorate.v1.Membership/Drain":              {`{"node": 99}`, codes.NotFound},
	"quorate.v1.Membership/Resume":             {`{"node": 99}`, codes.NotFound},
	"quorate.v1.Membership/Resync":             {`{"node": 99}`, codes.NotFound},
	"quorate.v1.Membership/TransferLeadership": {`{"to": 99}`, codes.NotFound},

	"quorate.v1.Tokens/List":   {"", codes.OK},
	"quorate.v1.Tokens/Create": {`{"ttl_seconds": 1, "uses": 5000}`, codes.InvalidArgument},
	"quorate.v1.Tokens/Revoke": {`{"id": "none"}`, codes.InvalidArgument},

	"quorate.v1.Heartbeat/Beat":           {"", codes.FailedPrecondition},
	"quorate.v1.Heartbeat/Recall":         {"", codes.FailedPrecondition},
	"quorate.v1.Recovery/Offer":           {"", codes.OK},
	"quorate.v1.Recovery/Clone":           {"", codes.FailedPrecondition},
	"quorate.consensus.v1.Consensus/Link": {"", codes.OK},
}

// Whatever the server tells of itself can be called, and answers in time.
func TestGRPCurl(t *testing.T) {
	c, ctx := start(t)
	tool := grpcurl(t, ctx)
	list := func(of ...string) []string {
		t.Helper()
		return strings.Fields(execute(t, ctx, nil, tool, append([]string{"-plaintext", c.GRPC(1), "list"}, of...)...))
	}
	called := 0
	for _, service := range list() {
		for _, name := range list(service) {
			dot := strings.LastIndexByte(name, '.')
			method := name[:dot] + "/" + name[dot+1:]
			call, known := calls[method]
			if !known {
				t.Errorf("there is no request for %s", method)
				continue
			}
			called++
			stream := call.code == codes.DeadlineExceeded
			var out []byte
			var problem string
			// Who is busy may take longer than a second to begin with a stream, or have no second for all members.
			for _, limit := range []time.Duration{map[bool]time.Duration{true: time.Second, false: patience}[stream], patience / 6} {
				cmd := exec.CommandContext(ctx, tool, "-plaintext", "-max-time", fmt.Sprint(limit.Seconds()), "-d", call.request, c.GRPC(1), method)
				began := time.Now()
				var said bytes.Buffer
				cmd.Stderr = &said
				out, _ = cmd.Output() // its exit code is looked at
				code, want := cmd.ProcessState.ExitCode(), int(call.code)
				if took := time.Since(began); took > limit+patience/2 {
					t.Errorf("%s: took %v, and had %v", method, took, limit)
				}
				if problem = ""; (code == want || code == 64+want) && (!stream || len(out) > 0) {
					break
				}
				problem = fmt.Sprintf("exit code %d, want %s; %s%s", code, call.code, out, &said)
			}
			if problem != "" {
				t.Errorf("%s: %s", method, problem)
			}
			switch method {
			case "quorate.v1.Cluster/Status":
				if !strings.Contains(string(out), `"acceptsWrites": true`) {
					t.Errorf("Status: %s", out)
				}
			case "quorate.v1.Observe/Events":
				var happened struct {
					Events []struct{ Kind string }
				}
				if err := json.Unmarshal(out, &happened); err != nil || len(happened.Events) != 5 {
					t.Errorf("Events: %s, %v", out, err)
				}
			case "grpc.health.v1.Health/Check":
				if !strings.Contains(string(out), `"SERVING"`) {
					t.Errorf("Health: %s", out)
				}
			}
		}
	}
	if called != len(calls) {
		t.Errorf("%d methods were called, of %d", called, len(calls))
	}
}
