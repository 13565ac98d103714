package cluster_test

import (
	"bytes"
	"encoding/binary"
	"net"
	"slices"
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

// TestMalformedMessages sends what no driver sends. The client is told what is wrong, if it listens; the connection may end; the
// node, and every other session, may not be touched.
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
	// after returns messages behind a startup message.
	after := func(messages ...[]byte) []byte { return slices.Concat(startup(t), slices.Concat(messages...)) }
	parse, err := (&pgproto3.Parse{Query: "SELECT $1::int"}).Encode(nil)
	check(t, err)
	sync := message('S', 4, "")
	const incomplete = "startup packet is incomplete"
	for name, test := range map[string]struct {
		bytes []byte
		state string // of the error, "" if there is nobody to tell
		says  string // with what is wrong
	}{
		"nothing":                          {nil, "", ""},
		"half a length":                    {[]byte{0, 0}, "08P01", incomplete},
		"startup of length 0":              {u32(0, 196608), "08P01", "startup packet has invalid length 0"},
		"startup of length 4":              {u32(4), "08P01", "startup packet has invalid length 4"},
		"startup of 4 GiB":                 {u32(0xffffffff, 196608), "08P01", "startup packet has invalid length 4294967295"},
		"startup of 2 GiB":                 {u32(0x7fffffff, 196608), "08P01", "startup packet has invalid length 2147483647"},
		"half a startup":                   {startup(t)[:20], "08P01", incomplete},
		"startup without terminator":       {append(u32(12, 196608), "user"...), "08P01", "startup packet is not terminated"},
		"startup with an odd parameter":    {append(u32(15, 196608), "user\x00a\x00"...), "08P01", "startup packet is not terminated"},
		"startup without user":             {append(u32(9, 196608), 0), "28000", "no user name specified"},
		"protocol 2":                       {append(u32(9, 131072), 0), "0A000", "unsupported frontend protocol 2.0"},
		"protocol 99":                      {append(u32(9, 99<<16), 0), "0A000", "unsupported frontend protocol 99.0"},
		"HTTP":                             {[]byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), "08P01", "startup packet has invalid length 1195725856"},
		"TLS hello without SSLRequest":     {[]byte{0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc, 0x03, 0x03}, "08P01", "startup packet has invalid length 369295618"},
		"SSLRequest twice":                 {u32(8, 80877103, 8, 80877103), "", ""},
		"GSS, then SSL, then rubbish":      {u32(8, 80877104, 8, 80877103, 0x01020304, 0x05060708), "08P01", "startup packet has invalid length 16909060"},
		"SSLRequest for ever":              {u32(8, 80877103, 8, 80877103, 8, 80877103, 8, 80877103, 8, 80877103), "08P01", "too many requests for encryption"},
		"cancel with a key nobody has":     {u32(16, 80877102, 12345, 67890), "", ""},
		"cancel of length 8":               {u32(8, 80877102), "", ""},
		"cancel of 100 MB":                 {u32(100<<20, 80877102, 1, 2), "08P01", "startup packet has invalid length 104857600"},
		"message of length 0":              {after(message('Q', 0, "")), "08P01", "message 'Q' has invalid length 0"},
		"message of length 3":              {after(message('Q', 3, "")), "08P01", "message 'Q' has invalid length 3"},
		"message of 4 GiB":                 {after(message('Q', 0xffffffff, "SELECT 1")), "08P01", "message 'Q' has invalid length 4294967295"},
		"message of 2 GiB":                 {after(message('Q', 0x7ffffff0, "SELECT 1")), "08P01", "message 'Q' has invalid length 2147483632"},
		"query without terminator":         {after(message('Q', 12, "SELECT 1")), "08P01", "query string is not terminated"},
		"unknown message type":             {after(message('~', 4, "")), "08P01", "unexpected message type '~' from client"},
		"message type 0":                   {after(message(0, 4, "")), "08P01", `unexpected message type '\x00' from client`},
		"half a query":                     {after(message('Q', 1000, "INSERT INTO survivor VALUES (2)")), "", ""},
		"bind with a negative count":       {after(parse, message('B', 10, "\x00\x00\xff\xff\xff\xff"), sync), "08P01", "insufficient data left in message"},
		"parse with huge parameter count":  {after(message('P', 8, "\x00\x00\xff\xff"), sync), "08P01", "insufficient data left in message"},
		"bind of a parameter past the end": {after(parse, message('B', 16, "\x00\x00\x00\x00\x00\x01\x7f\xff\xff\xff\x00\x00"), sync), "08P01", "insufficient data left in message"},
		"parse without terminator":         {after(message('P', 8, "name"), sync), "08P01", "malformed Parse"},
		"sync with a body":                 {after(message('S', 8, "body")), "08P01", "malformed Sync"},
		"password nobody asked for":        {after(message('p', 8, "abc\x00")), "08P01", "unexpected message type 'p' from client"},
		"describe of a bad kind":           {after(message('D', 6, "X\x00"), sync), "08P01", "invalid DESCRIBE message subtype 88"},
		"execute without a row limit":      {after(message('E', 5, "\x00")), "08P01", "malformed Execute"},
		// What is left of a COPY that has failed looks like this: the protocol wants it ignored.
		"CopyData outside of COPY": {after(message('d', 8, "data"), message('c', 4, ""), message('Q', 23, "SELECT 1/0 AS goes\x00")), "22012", "division by zero"},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", c.Gateway(1))
			check(t, err)
			defer conn.Close()
			check(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
			// The node may have closed the connection before it has read everything.
			_, _ = conn.Write(test.bytes)
			var answer []byte
			told := func() bool {
				at := bytes.Index(answer, []byte("\x00C"+test.state+"\x00"))
				return at >= 0 && bytes.Contains(answer[at:], []byte(test.says))
			}
			leave := func() { _ = conn.(*net.TCPConn).CloseWrite() } // fails if the node has left first
			if test.state == "" || test.says == incomplete {
				leave()
			}
			for buffer := make([]byte, 4096); err == nil; {
				var n int
				n, err = conn.Read(buffer)
				if answer = append(answer, buffer[:n]...); told() {
					leave()
				}
			}
			if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
				t.Error("the node keeps the connection, and does not say what is wrong")
			}
			if test.state != "" && !told() || test.state == "" && bytes.Contains(answer, []byte("\x00VFATAL\x00")) {
				t.Errorf("it is told %q, %v; want SQLSTATE %q and %q", answer, err, test.state, test.says)
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
