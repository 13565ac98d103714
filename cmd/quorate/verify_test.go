package main

import (
	"strings"
	"testing"

	pb "github.com/quorate/quorate/proto/quorate/v1"
)

func TestVerificationForms(t *testing.T) {
	equal := &pb.TableHash{Name: "public.accounts", Rows: 10, Hash: "00112233445566778899aabbccddeeff"}
	v := newVerification(&pb.VerifyResponse{Index: 104, Csn: 52, Differing: []string{"public.orders"}, Members: []*pb.MemberHashes{
		{Id: 1, Tables: []*pb.TableHash{equal, {Name: "public.orders", Rows: 3, Hash: "ffeeddccbbaa99887766554433221100"}}},
		{Id: 2, Tables: []*pb.TableHash{equal}},
		{Id: 3, Error: "the node is recovering"},
	}})
	var table, jsonText strings.Builder
	if err := printVerification(&table, v); err != nil {
		t.Fatal(err)
	}
	if err := printVerificationJSON(&jsonText, v); err != nil {
		t.Fatal(err)
	}
	golden(t, "verify.txt", table.String())
	golden(t, "verify.json", jsonText.String())
	for _, want := range []string{"members differ in public.orders", "node 3 did not take part: the node is recovering"} {
		if err := v.err(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
	v = newVerification(&pb.VerifyResponse{Index: 104, Csn: 52, Members: []*pb.MemberHashes{{Id: 1, Tables: []*pb.TableHash{equal}}}})
	if err := v.err(); err != nil {
		t.Error(err)
	}
}
