package clone

import (
	"encoding/binary"
	"io"
	"slices"
	"sync"

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

// ServerOptions are for the gRPC server that a Donor is registered with, which cannot serve without.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{grpc.ForceServerCodecV2(newCodec()), grpc.WriteBufferSize(ioBuffer)}
}

// DialOptions are for the connections that Receive is given. Without them it works too, slower.
func DialOptions() []grpc.DialOption {
	return []grpc.DialOption{grpc.WithReadBufferSize(ioBuffer)}
}

// codec is gRPC's own for protobuf, but for the chunks of an archive, whose bytes it leaves where they are: the other one would
// copy them twice on either side, to buffers of 1 MiB that it clears before. On the wire they are the same.
//
// It writes such a chunk when it is given an archive, and reads it into one buffer, which the next one overwrites; so a codec that
// reads belongs to one stream.
type codec struct {
	encoding.CodecV2
	buffer []byte
}

func newCodec() *codec { return &codec{CodecV2: encoding.GetCodecV2(proto.Name)} }

// archive is sent in place of a CloneChunk. When the bytes are on their way they go back to where they are from.
type archive struct {
	bytes *[]byte
	from  *buffers
}

// buffers lends buffers for archives. gRPC's own lend them cleared.
type buffers struct{ free sync.Pool }

// Get implements mem.BufferPool. The buffer is empty, and has room for chunkSize.
func (b *buffers) Get(int) *[]byte {
	if is, ok := b.free.Get().(*[]byte); ok {
		*is = (*is)[:0]
		return is
	}
	made := make([]byte, 0, chunkSize)
	return &made
}

// Put implements mem.BufferPool.
func (b *buffers) Put(is *[]byte) { b.free.Put(is) }

// archiveTag begins a CloneChunk that is of the archive: field 2, of the kind that has a length.
const archiveTag = 2<<3 | uint64(protowire.BytesType)

// Marshal implements encoding.CodecV2.
func (c *codec) Marshal(v any) (mem.BufferSlice, error) {
	a, ok := v.(archive)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	head := protowire.AppendVarint(protowire.AppendVarint(nil, archiveTag), uint64(len(*a.bytes)))
	return mem.BufferSlice{mem.SliceBuffer(head), mem.NewBuffer(a.bytes, a.from)}, nil
}

// Unmarshal implements encoding.CodecV2.
func (c *codec) Unmarshal(data mem.BufferSlice, v any) error {
	if chunk, ok := v.(*pb.CloneChunk); ok && c.readArchive(data) {
		chunk.Kind = &pb.CloneChunk_Archive{Archive: c.buffer}
		return nil
	}
	return c.CodecV2.Unmarshal(data, v)
}

// readArchive reads the content of a chunk that has nothing but a part of the archive, and reports whether it is one.
func (c *codec) readArchive(data mem.BufferSlice) bool {
	r := data.Reader()
	defer r.Close()
	if tag, err := binary.ReadUvarint(r); err != nil || tag != archiveTag {
		return false
	}
	if n, err := binary.ReadUvarint(r); err != nil || n != uint64(r.Remaining()) {
		return false
	}
	c.buffer = slices.Grow(c.buffer[:0], r.Remaining())[:r.Remaining()]
	_, err := io.ReadFull(r, c.buffer)
	return err == nil
}
