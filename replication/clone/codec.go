package clone

import (
	"encoding/binary"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	pb "github.com/quorate/quorate/proto/quorate/v1"
)

// ioBuffer is how much goes to or comes from the network in one system call, when there is as much. gRPC's own 32 KiB are two of
// HTTP/2's frames. Connections that have nothing to say have no such buffer, unless they are encrypted.
const ioBuffer = 256 << 10

// ServerOptions are for the gRPC server that a Donor is registered with. Without them it serves clones too, slower.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{grpc.ForceServerCodecV2(newCodec()), grpc.WriteBufferSize(ioBuffer)}
}

// DialOptions are for the connections that Receive is given. They are the same for it as ServerOptions for a Donor.
func DialOptions() []grpc.DialOption {
	return []grpc.DialOption{grpc.WithReadBufferSize(ioBuffer)}
}

// codec is gRPC's own for protobuf, but for the chunks of an archive, whose bytes it leaves where they are: the other one would
// copy them twice on either side, to buffers of 1 MiB that it clears before. On the wire they are the same.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

// archiveTag begins a CloneChunk that is of the archive: field 2, of the kind that has a length.
const archiveTag = 2<<3 | uint64(protowire.BytesType)

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if chunk, ok := v.(*pb.CloneChunk); ok {
		if a, ok := chunk.Kind.(*pb.CloneChunk_Archive); ok {
			head := protowire.AppendVarint(protowire.AppendVarint(nil, archiveTag), uint64(len(a.Archive)))
			return mem.BufferSlice{mem.SliceBuffer(head), mem.SliceBuffer(a.Archive)}, nil
		}
	}
	return c.CodecV2.Marshal(v)
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	if chunk, ok := v.(*pb.CloneChunk); ok {
		if archive, ok := cutArchive(data); ok {
			chunk.Kind = &pb.CloneChunk_Archive{Archive: archive}
			return nil
		}
	}
	return c.CodecV2.Unmarshal(data, v)
}

// cutArchive returns the content of a chunk that has nothing but a part of the archive.
func cutArchive(data mem.BufferSlice) ([]byte, bool) {
	r := data.Reader()
	defer r.Close()
	if tag, err := binary.ReadUvarint(r); err != nil || tag != archiveTag {
		return nil, false
	}
	if n, err := binary.ReadUvarint(r); err != nil || n != uint64(r.Remaining()) {
		return nil, false
	}
	archive := make([]byte, r.Remaining())
	_, err := io.ReadFull(r, archive)
	return archive, err == nil
}
