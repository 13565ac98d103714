package security

import (
	"context"
	"crypto/tls"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// What each role may call. A method that is not here is a node's.
var (
	open = []string{"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List", "/grpc.health.v1.Health/Watch"}
	read = []string{
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
		"/quorate.v1.Cluster/Status", "/quorate.v1.Cluster/Verify", "/quorate.v1.Membership/List",
		"/quorate.v1.Observe/Conflicts", "/quorate.v1.Observe/Events", "/quorate.v1.Observe/Follow", "/quorate.v1.Observe/Lookup",
		"/quorate.v1.Observe/Transactions", "/quorate.v1.Observe/Watch", "/quorate.v1.Tokens/List",
	}
	operate = []string{
		"/quorate.v1.Membership/Demote", "/quorate.v1.Membership/Drain", "/quorate.v1.Membership/Leave",
		"/quorate.v1.Membership/Promote", "/quorate.v1.Membership/Remove", "/quorate.v1.Membership/Resume",
		"/quorate.v1.Membership/Resync", "/quorate.v1.Membership/TransferLeadership",
		"/quorate.v1.Tokens/Create", "/quorate.v1.Tokens/Revoke",
	}
)

// roles calls every method there is with each role that is not enough for it.
func (o *outsider) roles(t *testing.T, ctx context.Context) {
	ours := loadAuthority(t, o.c.CertDir())
	dial := func(role string) *grpc.ClientConn {
		conn, err := grpc.NewClient("passthrough:///"+o.ports["grpc"], grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
			RootCAs: o.roots, Certificates: []tls.Certificate{ours.issue(t, role, -time.Hour, time.Hour)},
		})))
		check(t, err)
		t.Cleanup(func() { check(t, conn.Close()) })
		return conn
	}
	all := methods(t, ctx, dial("read"))
	if len(all) < len(open)+len(read) {
		t.Fatalf("there are %v", all)
	}
	for _, tc := range []struct {
		role string
		may  [][]string
	}{
		{"none", [][]string{open}},
		{"read", [][]string{open, read}},
		{"operate", [][]string{open, read, operate}},
	} {
		conn, may := dial(tc.role), slices.Concat(tc.may...)
		for _, method := range all {
			if slices.Contains(may, method) {
				// Who may look gets an answer; what acts is tested where it does.
				if !slices.Contains(operate, method) && refused(call(ctx, conn, method)) {
					t.Errorf("role %s is refused %s", tc.role, method)
				}
				continue
			}
			if code := call(ctx, conn, method); code != codes.PermissionDenied {
				t.Errorf("role %s calls %s: %s", tc.role, method, code)
			}
		}
	}
}

func refused(code codes.Code) bool {
	return code == codes.PermissionDenied || code == codes.Unauthenticated
}

// grpcurl is what administrators without our command line use: with a certificate it answers, without it does not.
func (o *outsider) grpcurl(t *testing.T, ctx context.Context) {
	const tool = "github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3"
	in := o.c.CertDir()
	run := func(args ...string) (string, error) {
		out, err := exec.CommandContext(ctx, "go", append([]string{"run", tool, "-max-time", "20", "-cacert", filepath.Join(in, "ca.crt")}, args...)...).CombinedOutput()
		return string(out), err
	}
	known := []string{"-cert", filepath.Join(in, "operator.crt"), "-key", filepath.Join(in, "operator.key"), o.ports["grpc"]}
	for call, want := range map[string]string{"list": "quorate.v1.Observe\n", "quorate.v1.Cluster/Status": `"acceptsWrites": true`} {
		if out, err := run(append(known[:len(known):len(known)], call)...); err != nil || !strings.Contains(out, want) {
			t.Errorf("%s with a certificate: %v\n%s", call, err, out)
		}
	}
	if out, err := run(o.ports["grpc"], "list"); err == nil || tells(out) {
		t.Errorf("without a certificate: %v\n%s", err, out)
	}
}

// call calls a method, whatever its kind, with an empty message.
func call(ctx context.Context, conn *grpc.ClientConn, method string) codes.Code {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err == nil {
		if err = stream.SendMsg(&emptypb.Empty{}); err == nil {
			err = stream.CloseSend()
		}
		if received := stream.RecvMsg(&emptypb.Empty{}); received != nil {
			err = received
		}
	}
	return status.Code(err)
}

// methods lists what the server serves.
func methods(t *testing.T, ctx context.Context, conn *grpc.ClientConn) []string {
	t.Helper()
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	check(t, err)
	ask := func(r *reflectionpb.ServerReflectionRequest) *reflectionpb.ServerReflectionResponse {
		check(t, stream.Send(r))
		answer, err := stream.Recv()
		check(t, err)
		return answer
	}
	var all []string
	services := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
	for _, s := range services.GetListServicesResponse().GetService() {
		files := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: s.Name}})
		for _, encoded := range files.GetFileDescriptorResponse().GetFileDescriptorProto() {
			var file descriptorpb.FileDescriptorProto
			check(t, proto.Unmarshal(encoded, &file))
			for _, service := range file.Service {
				if file.GetPackage()+"."+service.GetName() != s.Name {
					continue
				}
				for _, m := range service.Method {
					all = append(all, "/"+s.Name+"/"+m.GetName())
				}
			}
		}
	}
	check(t, stream.CloseSend())
	slices.Sort(all)
	return slices.Compact(all)
}
