package codec_test

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"reflect"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/quorate/quorate/internal/invariant"
	logv1 "github.com/quorate/quorate/proto/quorate/log/v1"
	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/codec"
)

// encode writes e with the Append function of its kind.
func encode(e codec.Entry) []byte {
	switch e.Kind {
	case codec.KindTransactions:
		return codec.AppendTransactions(nil, e.Transactions)
	case codec.KindChunk:
		return codec.AppendChunk(nil, e.Chunk)
	case codec.KindAbort:
		return codec.AppendAbort(nil, *e.Abort)
	case codec.KindHorizon:
		return codec.AppendHorizon(nil, e.Horizon)
	case codec.KindMember:
		return codec.AppendMember(nil, e.Member)
	case codec.KindBarrier:
		return codec.AppendBarrier(nil, *e.Barrier)
	case codec.KindFound:
		return codec.AppendFound(nil, e.Found)
	case codec.KindAdmit:
		return codec.AppendAdmit(nil, e.Admit)
	case codec.KindRemove:
		return codec.AppendRemove(nil, *e.Remove)
	case codec.KindToken:
		return codec.AppendToken(nil, e.Token)
	case codec.KindReserve:
		return codec.AppendReserve(nil, e.Reserve)
	}
	panic("entry of no kind")
}

// generated converts e to the type that protoc-gen-go made of log.proto.
func generated(e codec.Entry) *logv1.Entry {
	gid := func(g txn.GID) *logv1.GID {
		return &logv1.GID{Node: uint32(g.Node), Incarnation: g.Incarnation, Sequence: g.Sequence}
	}
	switch e.Kind {
	case codec.KindTransactions:
		batch := new(logv1.Transactions)
		for _, w := range e.Transactions {
			var keys []byte
			for _, k := range w.Keys {
				keys = append(append(keys, byte(k.Mode)), k.Key[:]...)
			}
			batch.Transactions = append(batch.Transactions, &logv1.WriteSet{
				Gid: gid(w.GID), Xid: uint64(w.XID), Database: []byte(w.Database), Base: uint64(w.Base), Seen: uint64(w.Seen),
				Keys: keys, Changes: w.Changes, Chunks: w.Chunks, Rows: w.Rows, Barrier: w.Barrier,
			})
		}
		return &logv1.Entry{Kind: &logv1.Entry_Transactions{Transactions: batch}}
	case codec.KindChunk:
		c := &logv1.Chunk{Gid: gid(e.Chunk.GID), Part: e.Chunk.Part, Data: e.Chunk.Data}
		return &logv1.Entry{Kind: &logv1.Entry_Chunk{Chunk: c}}
	case codec.KindAbort:
		a := &logv1.Abort{Gid: gid(e.Abort.GID), Reason: uint32(e.Abort.Reason)}
		return &logv1.Entry{Kind: &logv1.Entry_Abort{Abort: a}}
	case codec.KindHorizon:
		return &logv1.Entry{Kind: &logv1.Entry_Horizon{Horizon: &logv1.Horizon{Csn: uint64(e.Horizon)}}}
	case codec.KindMember:
		m := &logv1.Member{
			Node: uint32(e.Member.Node), Incarnation: e.Member.Incarnation, RaftAddress: e.Member.RaftAddress,
			GrpcAddress: e.Member.GRPCAddress, HttpAddress: e.Member.HTTPAddress, GatewayAddress: e.Member.GatewayAddress,
			Version: e.Member.Version, PostgresVersion: e.Member.PostgresVersion, Format: e.Member.Format,
		}
		return &logv1.Entry{Kind: &logv1.Entry_Member{Member: m}}
	case codec.KindBarrier:
		b := &logv1.Barrier{Id: gid(e.Barrier.ID), Purpose: e.Barrier.Purpose}
		return &logv1.Entry{Kind: &logv1.Entry_Barrier{Barrier: b}}
	case codec.KindFound:
		f := &logv1.Found{Cluster: e.Found.Cluster[:], MaxNodes: e.Found.MaxNodes}
		if !e.Found.Previous.IsZero() {
			f.Previous = e.Found.Previous[:]
		}
		for _, m := range e.Found.Founders {
			f.Founders = append(f.Founders, &logv1.Founder{Node: uint32(m.Node), Slot: m.Slot, Role: uint32(m.Role)})
		}
		return &logv1.Entry{Kind: &logv1.Entry_Found{Found: f}}
	case codec.KindAdmit:
		a := &logv1.Admit{
			Request: e.Admit.Request[:], Role: uint32(e.Admit.Role), Replaces: uint32(e.Admit.Replaces),
			RaftAddress: e.Admit.RaftAddress, GrpcAddress: e.Admit.GRPCAddress, HttpAddress: e.Admit.HTTPAddress,
			GatewayAddress: e.Admit.GatewayAddress, Version: e.Admit.Version, Format: e.Admit.Format,
		}
		if use := e.Admit.Token; !use.ID.IsZero() {
			a.Token, a.TokenHash, a.TokenTime = use.ID[:], use.Hash[:], use.Time
		}
		return &logv1.Entry{Kind: &logv1.Entry_Admit{Admit: a}}
	case codec.KindRemove:
		return &logv1.Entry{Kind: &logv1.Entry_Remove{Remove: &logv1.Remove{Node: uint32(e.Remove.Node), Reason: e.Remove.Reason}}}
	case codec.KindToken:
		return &logv1.Entry{Kind: &logv1.Entry_Token{Token: &logv1.Token{
			Id: e.Token.ID[:], Hash: e.Token.Hash[:], Uses: e.Token.Uses, Expires: e.Token.Expires, Time: e.Token.Time,
		}}}
	case codec.KindReserve:
		m := &logv1.Reserve{Node: uint32(e.Reserve.Node), All: e.Reserve.All}
		for _, s := range e.Reserve.Sequences {
			m.Sequences = append(m.Sequences, &logv1.Reservation{Name: s.Name, Value: s.Value})
		}
		return &logv1.Entry{Kind: &logv1.Entry_Reserve{Reserve: m}}
	}
	panic("entry of no kind")
}

// frame puts version and checksum before a payload.
func frame(body []byte) []byte {
	b := binary.LittleEndian.AppendUint32([]byte{codec.Version}, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
	return append(b, body...)
}

func hashes() *rapid.Generator[[]byte] { return rapid.SliceOfN(rapid.Byte(), 32, 32) }

func uints() *rapid.Generator[uint64] {
	return rapid.OneOf(rapid.Just(uint64(0)), rapid.Uint64Range(0, 300), rapid.Uint64())
}

func gids() *rapid.Generator[txn.GID] {
	return rapid.Custom(func(t *rapid.T) txn.GID {
		return txn.GID{
			Node:        txn.NodeID(rapid.Uint32().Draw(t, "node")),
			Incarnation: uints().Draw(t, "incarnation"),
			Sequence:    uints().Draw(t, "sequence"),
		}
	}).Filter(func(g txn.GID) bool { return !g.IsZero() })
}

func writeSets() *rapid.Generator[*txn.WriteSet] {
	key := rapid.Custom(func(t *rapid.T) txn.KeyUse {
		k := txn.KeyUse{Mode: txn.Mode(rapid.IntRange(1, txn.NumModes-1).Draw(t, "mode"))}
		binary.BigEndian.PutUint64(k.Key[4:], rapid.Uint64().Draw(t, "key"))
		return k
	})
	return rapid.Custom(func(t *rapid.T) *txn.WriteSet {
		w := &txn.WriteSet{
			GID:      gids().Draw(t, "gid"),
			XID:      txn.XID(uints().Draw(t, "xid")),
			Database: rapid.SampledFrom([]string{"", "postgres", "other", "caf\xe9"}).Draw(t, "database"),
			Base:     txn.CSN(uints().Draw(t, "base")),
			Seen:     txn.CSN(uints().Draw(t, "seen")),
			Keys:     rapid.SliceOfN(key, 0, 20).Draw(t, "keys"),
			Changes:  rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "changes"),
			Chunks:   rapid.Uint32Range(0, 200).Draw(t, "chunks"),
			Rows:     uints().Draw(t, "rows"),
			Barrier:  rapid.Bool().Draw(t, "barrier"),
		}
		return w
	})
}

func uuids() *rapid.Generator[txn.UUID] {
	return rapid.Custom(func(t *rapid.T) (u txn.UUID) {
		copy(u[:], rapid.SliceOfN(rapid.Byte(), len(u), len(u)).Draw(t, "uuid"))
		u[0] |= 1 // not zero
		return u
	})
}

func roles() *rapid.Generator[codec.Role] {
	return rapid.SampledFrom([]codec.Role{codec.RoleData, codec.RoleWitness})
}

func entries() *rapid.Generator[codec.Entry] {
	text := rapid.StringN(0, 40, codec.MaxText)
	return rapid.Custom(func(t *rapid.T) codec.Entry {
		e := codec.Entry{Kind: codec.Kind(rapid.IntRange(1, 11).Draw(t, "kind"))}
		switch e.Kind {
		case codec.KindTransactions:
			e.Transactions = rapid.SliceOfN(writeSets(), 1, 8).Draw(t, "transactions")
		case codec.KindChunk:
			e.Chunk = &codec.Chunk{
				GID:  gids().Draw(t, "gid"),
				Part: rapid.Uint32().Draw(t, "part"),
				Data: rapid.SliceOfN(rapid.Byte(), 0, 1000).Draw(t, "data"),
			}
		case codec.KindAbort:
			e.Abort = &codec.Abort{GID: gids().Draw(t, "gid"), Reason: txn.AbortReason(rapid.Byte().Draw(t, "reason"))}
		case codec.KindHorizon:
			e.Horizon = txn.CSN(uints().Draw(t, "horizon"))
		case codec.KindMember:
			e.Member = &codec.Member{
				Node:            txn.NodeID(rapid.Uint32Min(1).Draw(t, "node")),
				Incarnation:     uints().Draw(t, "incarnation"),
				RaftAddress:     text.Draw(t, "raft"),
				GRPCAddress:     text.Draw(t, "grpc"),
				HTTPAddress:     text.Draw(t, "http"),
				GatewayAddress:  text.Draw(t, "gateway"),
				Version:         text.Draw(t, "version"),
				PostgresVersion: text.Draw(t, "postgres"),
				Format:          rapid.Uint32().Draw(t, "format"),
			}
		case codec.KindBarrier:
			e.Barrier = &codec.Barrier{ID: gids().Draw(t, "gid"), Purpose: text.Draw(t, "purpose")}
		case codec.KindFound:
			founder := rapid.Custom(func(t *rapid.T) codec.Founder {
				return codec.Founder{Node: txn.NodeID(rapid.Uint32Min(1).Draw(t, "node")), Slot: rapid.Uint32().Draw(t, "slot"), Role: roles().Draw(t, "role")}
			})
			e.Found = &codec.Found{Cluster: uuids().Draw(t, "cluster"), Founders: rapid.SliceOfN(founder, 1, codec.MaxFounders).Draw(t, "founders")}
			e.Found.MaxNodes = rapid.Uint32Range(0, codec.MostNodes).Draw(t, "most")
			if rapid.Bool().Draw(t, "again") {
				e.Found.Previous = uuids().Draw(t, "previous")
			}
		case codec.KindAdmit:
			e.Admit = &codec.Admit{
				Request: uuids().Draw(t, "request"), Role: roles().Draw(t, "role"), Replaces: txn.NodeID(rapid.Uint32().Draw(t, "replaces")),
				RaftAddress: text.Draw(t, "raft"), GRPCAddress: text.Draw(t, "grpc"), HTTPAddress: text.Draw(t, "http"),
				GatewayAddress: text.Draw(t, "gateway"), Version: text.Draw(t, "version"), Format: rapid.Uint32().Draw(t, "format"),
			}
			if rapid.Bool().Draw(t, "with a token") {
				e.Admit.Token = codec.TokenUse{ID: uuids().Draw(t, "token"), Hash: codec.Hash(hashes().Draw(t, "hash")), Time: uints().Draw(t, "time")}
			}
		case codec.KindRemove:
			e.Remove = &codec.Remove{Node: txn.NodeID(rapid.Uint32Min(1).Draw(t, "node")), Reason: text.Draw(t, "reason")}
		case codec.KindToken:
			e.Token = &codec.Token{
				ID: uuids().Draw(t, "id"), Hash: codec.Hash(hashes().Draw(t, "hash")), Uses: rapid.Uint32().Draw(t, "uses"),
				Expires: uints().Draw(t, "expires"), Time: uints().Draw(t, "time"),
			}
		case codec.KindReserve:
			reservation := rapid.Custom(func(t *rapid.T) codec.Reservation {
				return codec.Reservation{Name: text.Draw(t, "name"), Value: rapid.Int64().Draw(t, "value")}
			})
			e.Reserve = &codec.Reserve{
				Node: txn.NodeID(rapid.Uint32Min(1).Draw(t, "node")), All: rapid.Bool().Draw(t, "all"),
			}
			if n := rapid.IntRange(0, 20).Draw(t, "sequences"); n > 0 {
				e.Reserve.Sequences = rapid.SliceOfN(reservation, n, n).Draw(t, "of them")
			}
		}
		return e
	})
}

// equal compares entries; an empty and a nil slice are the same.
func equal(a, b codec.Entry) bool {
	return reflect.DeepEqual(normal(a), normal(b))
}

func normal(e codec.Entry) codec.Entry {
	sets := e.Transactions
	e.Transactions = nil
	for _, w := range sets {
		c := *w
		c.Keys = append([]txn.KeyUse(nil), c.Keys...)
		c.Changes = append([]byte(nil), c.Changes...)
		e.Transactions = append(e.Transactions, &c)
	}
	if e.Chunk != nil {
		c := *e.Chunk
		c.Data = append([]byte(nil), c.Data...)
		e.Chunk = &c
	}
	return e
}

// The hand-written code and the generated one must write the same bytes and read each other's.
func TestSameAsGeneratedCode(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := entries().Draw(t, "entry")
		ours := encode(want)

		msg := generated(want)
		theirs, err := proto.MarshalOptions{Deterministic: true}.Marshal(msg)
		if err != nil {
			t.Fatalf("marshal with generated code: %v", err)
		}
		if string(ours) != string(frame(theirs)) {
			t.Fatalf("bytes differ\nours      %x\ngenerated %x", ours, frame(theirs))
		}

		got, err := codec.Decode(ours)
		if err != nil {
			t.Fatalf("decode: %v", err)
		}
		if !equal(got, want) {
			t.Fatalf("decoded %+v, want %+v", got, want)
		}
		back := new(logv1.Entry)
		if err := proto.Unmarshal(ours[5:], back); err != nil {
			t.Fatalf("unmarshal with generated code: %v", err)
		}
		if !proto.Equal(back, msg) {
			t.Fatalf("generated code read %v, want %v", back, msg)
		}
	})
}

func TestAppendKeepsPrefix(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := entries().Draw(t, "entry")
		if e.Kind != codec.KindTransactions {
			t.Skip("one kind is enough")
		}
		b := codec.AppendTransactions([]byte("before"), e.Transactions)
		if string(b) != "before"+string(encode(e)) {
			t.Fatalf("appended %x", b)
		}
	})
}

func sample() []*txn.WriteSet {
	w := &txn.WriteSet{
		GID: txn.GID{Node: 2, Incarnation: 0x9f86d081884c7d65, Sequence: 42}, XID: 774, Database: "postgres",
		Base: 1000, Seen: 1010, Rows: 4,
	}
	for i := range 9 {
		w.Keys = append(w.Keys, txn.KeyUse{Key: txn.Key{byte(i), 1, 2, 3}, Mode: txn.Mode(1 + i%6)})
	}
	for range 4 {
		w.Changes = append(w.Changes, "yI"+strings.Repeat("x", 120)...) // behind its length, 121
	}
	return []*txn.WriteSet{w}
}

// Every flipped bit must be noticed, and every truncation.
func TestDamage(t *testing.T) {
	good := codec.AppendTransactions(nil, sample())
	for n := range good {
		if _, err := codec.Decode(good[:n:n]); !errors.Is(err, txn.ErrCorrupt) {
			t.Fatalf("decode of the first %d of %d bytes: %v", n, len(good), err)
		}
	}
	for bit := range 8 * len(good) {
		bad := append([]byte(nil), good...)
		bad[bit/8] ^= 1 << (bit % 8)
		_, err := codec.Decode(bad)
		if bit < 8 {
			var version *codec.VersionError
			if !errors.As(err, &version) || version.Version != bad[0] || errors.Is(err, txn.ErrCorrupt) {
				t.Fatalf("decode of version %d: %v", bad[0], err)
			}
			continue
		}
		if !errors.Is(err, txn.ErrCorrupt) {
			t.Fatalf("decode with bit %d flipped: %v", bit, err)
		}
	}
}

func TestRefused(t *testing.T) {
	gid := "\x0a\x02\x08\x01" // field 1: node 1
	uuid := strings.Repeat("u", 16)
	entry := func(kind byte, body string) string { return string([]byte{kind<<3 | 2, byte(len(body))}) + body }
	tests := []struct{ name, body, want string }{
		{"nothing", "", "entry is empty"},
		{"unknown kind", entry(15, ""), "unknown kind 15"},
		{"two kinds", entry(3, gid) + entry(4, ""), "more than one kind"},
		{"same kind twice", entry(3, gid) + entry(3, gid), "field 3 after field 3"},
		{"no length", "\x08\x01", "wire type"},
		{"field zero", "\x02\x00", "tag"},
		{"length beyond the end", "\x1a\x05\x0a", "field 3"},
		{"empty batch", entry(1, ""), "batch of 0"},
		{"batch with an unknown field", entry(1, "\x0a\x04"+gid+"\x10\x01"), "unknown field 2"},
		{"transaction without GID", entry(1, "\x0a\x02\x10\x05"), "no global transaction id"},
		{"transaction with an unknown field", entry(1, "\x0a\x06"+gid+"\x58\x01"), "unknown field 11"},
		{"fields out of order", entry(1, "\x0a\x06\x10\x05"+gid), "field 1 after field 2"},
		{"field twice", entry(1, "\x0a\x08"+gid+"\x10\x05\x10\x05"), "field 2 after field 2"},
		{"keys cut off", entry(1, "\x0a\x07"+gid+"\x32\x01\x01"), "no multiple of 17"},
		{"key without mode", entry(1, "\x0a\x17"+gid+"\x32\x11"+strings.Repeat("\x00", 17)), "key with mode 0"},
		{"key with unknown mode", entry(1, "\x0a\x17"+gid+"\x32\x11"+strings.Repeat("\x07", 17)), "key with mode 7"},
		{"boolean above 1", entry(1, "\x0a\x06"+gid+"\x50\x02"), "2 is above 1"},
		{"node above 32 bits", entry(3, "\x0a\x06\x08\xff\xff\xff\xff\x1f"), "is above 4294967295"},
		{"group", entry(4, "\x0b\x0c"), "wire type"},
		{"chunk without GID", entry(2, "\x10\x01"), "chunk without"},
		{"abort without GID", entry(3, "\x10\x01"), "abort without"},
		{"member without node", entry(5, ""), "member without"},
		{"member with bad UTF-8", entry(5, "\x08\x01\x1a\x01\xff"), "not UTF-8"},
		{"barrier with unknown field", entry(6, "\x18\x01"), "unknown field 3"},
		{"founding by nobody", entry(7, "\x0a\x10"+uuid), "without a cluster or founders"},
		{"founding twice", entry(7, "\x0a\x10"+uuid+"\x0a\x10"+uuid), "unknown field 1"},
		{"short UUID", entry(7, "\x0a\x01x"), "1 bytes are no UUID"},
		{"UUID of zeros", entry(7, "\x0a\x10"+strings.Repeat("\x00", 16)), "of zeros"},
		{"founder without node", entry(7, "\x0a\x10"+uuid+"\x1a\x00"), "founder without"},
		{"too many founders", string(binary.AppendUvarint([]byte{7<<3 | 2}, uint64(18+4*65))) + "\x0a\x10" + uuid + strings.Repeat("\x1a\x02\x08\x01", 65), "unknown field 3"},
		{"unknown role", entry(8, "\x0a\x10"+uuid+"\x10\x02"), "2 is above 1"},
		{"admission without request", entry(8, "\x18\x01"), "admission without"},
		{"removal of nobody", entry(9, ""), "removal of no node"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e, err := codec.Decode(frame([]byte(tt.body)))
			if !errors.Is(err, txn.ErrCorrupt) || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("decode gave %+v, error %v, want one with %q", e, err, tt.want)
			}
		})
	}
}

func TestTooManyTransactions(t *testing.T) {
	body := strings.Repeat("\x0a\x00", codec.MaxTransactions+1)
	head := binary.AppendUvarint([]byte{1<<3 | 2}, uint64(len(body)))
	b := frame(append(head, body...))
	allocated := testing.AllocsPerRun(1, func() {
		if _, err := codec.Decode(b); !errors.Is(err, txn.ErrCorrupt) {
			t.Fatalf("decode: %v", err)
		}
	})
	if allocated > 20 {
		t.Fatalf("%v allocations for an entry that is refused", allocated)
	}
}

// What Decode refuses must not be written: every node would stop at the entry.
func TestAppendRefuses(t *testing.T) {
	tests := map[string]func(){
		"empty batch": func() { codec.AppendTransactions(nil, nil) },
		"no GID":      func() { codec.AppendTransactions(nil, []*txn.WriteSet{{}}) },
		"bad mode": func() {
			codec.AppendTransactions(nil, []*txn.WriteSet{{GID: txn.GID{Node: 1}, Keys: []txn.KeyUse{{}}}})
		},
		"long database": func() {
			codec.AppendTransactions(nil, []*txn.WriteSet{{GID: txn.GID{Node: 1}, Database: strings.Repeat("d", codec.MaxText+1)}})
		},
		"chunk":   func() { codec.AppendChunk(nil, &codec.Chunk{}) },
		"abort":   func() { codec.AppendAbort(nil, codec.Abort{}) },
		"member":  func() { codec.AppendMember(nil, &codec.Member{}) },
		"found":   func() { codec.AppendFound(nil, &codec.Found{Cluster: txn.UUID{1}}) },
		"admit":   func() { codec.AppendAdmit(nil, &codec.Admit{}) },
		"remove":  func() { codec.AppendRemove(nil, codec.Remove{}) },
		"token":   func() { codec.AppendToken(nil, &codec.Token{}) },
		"reserve": func() { codec.AppendReserve(nil, &codec.Reserve{}) },
	}
	for name, write := range tests {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if _, ok := recover().(invariant.Violation); !ok {
					t.Fatal("was written")
				}
			}()
			write()
		})
	}
}

// Texts of an announcement are repaired rather than refused.
func TestMemberTextsAreRepaired(t *testing.T) {
	b := codec.AppendMember(nil, &codec.Member{Node: 1, Version: "v\xff1", HTTPAddress: strings.Repeat("é", codec.MaxText)})
	e, err := codec.Decode(b)
	if err != nil {
		t.Fatalf("decode: %v", err)
	}
	if e.Member.Version != "v1" || len(e.Member.HTTPAddress) != codec.MaxText {
		t.Fatalf("decoded version %q and an address of %d bytes", e.Member.Version, len(e.Member.HTTPAddress))
	}
}

func TestAllocations(t *testing.T) {
	batch := make([]*txn.WriteSet, 0, 16)
	for range cap(batch) {
		batch = append(batch, sample()...)
	}
	b := codec.AppendTransactions(nil, batch)
	if n := testing.AllocsPerRun(100, func() { codec.AppendTransactions(b[:0], batch) }); n != 0 {
		t.Errorf("encoding into a buffer with room: %v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() { _, _ = codec.Decode(b) }); n > 4 {
		t.Errorf("decoding a batch: %v allocations", n)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(codec.AppendTransactions(nil, sample())[5:])
	f.Add(codec.AppendChunk(nil, &codec.Chunk{GID: txn.GID{Node: 1}, Part: 2, Data: []byte("data")})[5:])
	f.Add(codec.AppendAbort(nil, codec.Abort{GID: txn.GID{Node: 1}, Reason: txn.AbortEvicted})[5:])
	f.Add(codec.AppendHorizon(nil, 77)[5:])
	f.Add(codec.AppendMember(nil, &codec.Member{Node: 3, Version: "1", GRPCAddress: "127.0.0.1:1"})[5:])
	f.Add(codec.AppendBarrier(nil, codec.Barrier{ID: txn.GID{Node: 1}, Purpose: "checksum"})[5:])
	f.Add(codec.AppendFound(nil, &codec.Found{Cluster: txn.UUID{1}, Previous: txn.UUID{2}, Founders: []codec.Founder{{Node: 1}, {Node: 2, Slot: 1, Role: codec.RoleWitness}}})[5:])
	f.Add(codec.AppendAdmit(nil, &codec.Admit{Request: txn.UUID{1}, Replaces: 2, GRPCAddress: "127.0.0.1:1"})[5:])
	f.Add(codec.AppendRemove(nil, codec.Remove{Node: 2, Reason: "reason"})[5:])
	f.Add(codec.AppendAdmit(nil, &codec.Admit{Request: txn.UUID{1}, Token: codec.TokenUse{ID: txn.UUID{2}, Hash: codec.Hash{3}, Time: 4}})[5:])
	f.Add(codec.AppendToken(nil, &codec.Token{ID: txn.UUID{1}, Hash: codec.Hash{2}, Uses: 3, Expires: 4, Time: 5})[5:])
	f.Fuzz(func(t *testing.T, body []byte) {
		_, _ = codec.Decode(body) // header and all
		e, err := codec.Decode(frame(body))
		if err != nil {
			if !errors.Is(err, txn.ErrCorrupt) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		again, err := codec.Decode(encode(e))
		if err != nil || !equal(e, again) {
			t.Fatalf("decoded %+v, and when written again %+v, error %v", e, again, err)
		}
		// Whatever we accept the generated code reads alike.
		msg := new(logv1.Entry)
		if err := proto.Unmarshal(body, msg); err != nil {
			t.Fatalf("generated code refuses what was accepted: %v", err)
		}
		if !proto.Equal(msg, generated(e)) {
			t.Fatalf("generated code reads %v, we %v", msg, generated(e))
		}
	})
}

func BenchmarkAppendTransactions(b *testing.B) {
	batch := sample()
	dst := codec.AppendTransactions(nil, batch)
	b.SetBytes(int64(len(dst)))
	b.ReportAllocs()
	for b.Loop() {
		dst = codec.AppendTransactions(dst[:0], batch)
	}
}

func BenchmarkDecode(b *testing.B) {
	for _, size := range []struct {
		name string
		n    int
	}{{"batch=1", 1}, {"batch=16", 16}} {
		b.Run(size.name, func(b *testing.B) {
			var batch []*txn.WriteSet
			for range size.n {
				batch = append(batch, sample()...)
			}
			src := codec.AppendTransactions(nil, batch)
			b.SetBytes(int64(len(src)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := codec.Decode(src); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
