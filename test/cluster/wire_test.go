package cluster_test

import (
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"
)

func query(sql string) *pgproto3.Query { return &pgproto3.Query{String: sql} }

// errorState returns the SQLSTATE of an error message, "" for any other message.
func errorState(m pgproto3.BackendMessage) string {
	if e, ok := m.(*pgproto3.ErrorResponse); ok {
		return e.Code
	}
	return ""
}

// startup is a well-formed startup message.
func startup(t *testing.T) []byte {
	t.Helper()
	m := &pgproto3.StartupMessage{
		ProtocolVersion: pgproto3.ProtocolVersionNumber,
		Parameters:      map[string]string{"user": "postgres", "database": "postgres"},
	}
	b, err := m.Encode(nil)
	check(t, err)
	return b
}

// message is a message of the wire protocol whose length says what the caller wants.
func message(kind byte, length uint32, body string) []byte {
	b := append([]byte{kind}, binary.BigEndian.AppendUint32(nil, length)...)
	return append(b, body...)
}

// TestMalformedMessages sends what no driver sends. The connection may end; the node, and every other session, may
// not be touched.
func TestMalformedMessages(t *testing.T) {
	c, ctx := shared(t)
	create(t, ctx, c, "DROP TABLE IF EXISTS survivor", "CREATE TABLE survivor (id int PRIMARY KEY)")
	other := gateway(t, ctx, c, 1)
	must(t, ctx, other, "BEGIN")
	must(t, ctx, other, "INSERT INTO survivor VALUES (1)")
	u32 := func(v ...uint32) (b []byte) {
		for _, n := range v {
			b = binary.BigEndian.AppendUint32(b, n)
		}
		return b
	}
	hello := startup(t)
	for name, bytes := range map[string][]byte{
		"nothing":                          {},
		"half a length":                    {0, 0},
		"startup of length 0":              u32(0, 196608),
		"startup of length 4":              u32(4),
		"startup of 4 GiB":                 u32(0xffffffff, 196608),
		"startup of 2 GiB":                 u32(0x7fffffff, 196608),
		"startup without terminator":       append(u32(12, 196608), "user"...),
		"startup with an odd parameter":    append(u32(15, 196608), "user\x00a\x00"...),
		"startup without user":             append(u32(9, 196608), 0),
		"protocol 2":                       append(u32(9, 131072), 0),
		"protocol 99":                      append(u32(9, 99<<16), 0),
		"HTTP":                             []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
		"TLS hello without SSLRequest":     {0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc, 0x03, 0x03},
		"SSLRequest twice":                 append(u32(8, 80877103), u32(8, 80877103)...),
		"GSS, then SSL, then rubbish":      append(append(u32(8, 80877104), u32(8, 80877103)...), 1, 2, 3, 4, 5, 6, 7, 8),
		"cancel with a key nobody has":     u32(16, 80877102, 12345, 67890),
		"cancel of length 8":               u32(8, 80877102),
		"cancel of 100 MB":                 u32(100<<20, 80877102, 1, 2),
		"message of length 0":              append(hello[:len(hello):len(hello)], message('Q', 0, "")...),
		"message of length 3":              append(hello[:len(hello):len(hello)], message('Q', 3, "")...),
		"message of 4 GiB":                 append(hello[:len(hello):len(hello)], message('Q', 0xffffffff, "SELECT 1")...),
		"message of 2 GiB":                 append(hello[:len(hello):len(hello)], message('Q', 0x7ffffff0, "SELECT 1")...),
		"query without terminator":         append(hello[:len(hello):len(hello)], message('Q', 12, "SELECT 1")...),
		"unknown message type":             append(hello[:len(hello):len(hello)], message('~', 4, "")...),
		"message type 0":                   append(hello[:len(hello):len(hello)], message(0, 4, "")...),
		"half a query":                     append(hello[:len(hello):len(hello)], message('Q', 1000, "INSERT INTO survivor VALUES (2)")...),
		"bind with a negative count":       append(hello[:len(hello):len(hello)], message('B', 10, "\x00\x00\xff\xff\xff\xff")...),
		"parse with huge parameter count":  append(hello[:len(hello):len(hello)], message('P', 8, "\x00\x00\xff\xff")...),
		"bind of a parameter past the end": append(hello[:len(hello):len(hello)], message('B', 16, "\x00\x00\x00\x00\x00\x01\x7f\xff\xff\xff\x00\x00")...),
		"CopyData outside of COPY":         append(hello[:len(hello):len(hello)], message('d', 8, "data")...),
		"password nobody asked for":        append(hello[:len(hello):len(hello)], message('p', 8, "abc\x00")...),
		"describe of a bad kind":           append(hello[:len(hello):len(hello)], message('D', 6, "X\x00")...),
		"execute without a row limit":      append(hello[:len(hello):len(hello)], message('E', 5, "\x00")...),
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", c.Gateway(1))
			check(t, err)
			defer conn.Close()
			check(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
			// The node may have closed the connection before it has read everything.
			_, _ = conn.Write(bytes)
			if err := conn.(*net.TCPConn).CloseWrite(); err == nil {
				_, err = io.Copy(io.Discard, conn)
				if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
					t.Error("the node keeps the connection although the client has said that nothing follows")
				}
			}
		})
	}
	// Rubbish on the other ports as well.
	if !c.Attached() {
		for _, address := range []string{c.GRPC(1), c.HTTP(1), c.Raft(1)} {
			conn, err := net.Dial("tcp", address)
			check(t, err)
			_, err = conn.Write([]byte("\xff\xff\xff\xff\x00\x01rubbish\r\n\r\n"))
			check(t, err)
			check(t, conn.Close())
		}
	}
	must(t, ctx, other, "COMMIT")
	everywhere(t, ctx, c, int64(1), "SELECT count(*) FROM survivor")
}
