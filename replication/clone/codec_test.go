package clone

import (
	"bytes"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pb "github.com/quorate/quorate/proto/quorate/v1"
)

// TestCodec: the two codecs write the same bytes and read each other's, however these come, and what is no whole archive chunk is
// left to protobuf's.
func TestCodec(t *testing.T) {
	ours := newCodec()
	stock := ours.CodecV2
	chunks := map[string]*pb.CloneChunk{
		"archive": {Kind: &pb.CloneChunk_Archive{Archive: bytes.Repeat([]byte("archive"), 50_000)}},
		"little":  {Kind: &pb.CloneChunk_Archive{Archive: []byte{1}}},
		"empty":   {Kind: &pb.CloneChunk_Archive{}},
		"wal":     {Kind: &pb.CloneChunk_Wal{Wal: &pb.CloneWAL{Lsn: 7, Data: []byte("wal")}}},
		"beat":    {},
	}
	for name, c := range chunks {
		var message any = c
		if a, ok := c.Kind.(*pb.CloneChunk_Archive); ok {
			message = archive{&a.Archive, new(buffers)}
		}
		a, err := ours.Marshal(message)
		if err != nil {
			t.Fatal(err)
		}
		b, err := stock.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		wire := a.Materialize()
		if !bytes.Equal(wire, b.Materialize()) {
			t.Errorf("%s: not what protobuf writes", name)
		}
		for _, size := range []int{1, 3, 16 << 10, len(wire) + 1} {
			var parts mem.BufferSlice
			for rest := wire; len(rest) > 0; rest = rest[min(size, len(rest)):] {
				parts = append(parts, mem.SliceBuffer(rest[:min(size, len(rest))]))
			}
			got := new(pb.CloneChunk)
			if err := ours.Unmarshal(parts, got); err != nil || !proto.Equal(got, c) {
				t.Errorf("%s in parts of %d bytes: %v, %.100v", name, size, err, got)
			}
		}
	}
	part := func(length uint64, content, more string) []byte {
		return append(append(protowire.AppendVarint([]byte{byte(archiveTag)}, length), content...), more...)
	}
	for name, wire := range map[string][]byte{
		"cut off": part(9, "abc", ""), "with more": part(3, "abc", "\x1a\x00"), "twice": part(3, "abc", "\x12\x01z"), "no length": {byte(archiveTag)}, "huge": part(1<<63, "abc", ""),
	} {
		got, want := new(pb.CloneChunk), new(pb.CloneChunk)
		parts := mem.BufferSlice{mem.SliceBuffer(wire)}
		if err, asStock := ours.Unmarshal(parts, got), stock.Unmarshal(parts, want); (err == nil) != (asStock == nil) || !proto.Equal(got, want) {
			t.Errorf("%s: %v, %v; protobuf says %v, %v", name, got, err, want, asStock)
		}
	}
}
