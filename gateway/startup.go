package gateway

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/quorate/quorate/gateway/sqllex"
	"github.com/quorate/quorate/internal/logkey"
)

const (
	maxStartup = 10000 // bytes, as in PostgreSQL

	versionCancel = 80877102
	versionSSL    = 80877103
	versionGSS    = 80877104
)

// serve runs one client connection from its first byte to its last.
func (g *Gateway) serve(conn net.Conn) {
	log := g.log.With(logkey.Client, conn.RemoteAddr().String())
	start := time.Now()
	_ = conn.SetDeadline(start.Add(g.cfg.StartupTimeout)) // fails on a closed connection only; reading tells
	client, version, body, err := g.negotiate(conn)
	if err != nil {
		g.fail(client, err)
		log.Debug("client gone before startup", logkey.Error, err)
		return
	}
	// Before version 17 libpq sends requests to cancel without TLS, and PostgreSQL takes them, whatever pg_hba.conf says.
	encrypted := client != conn || version == versionCancel
	if err := g.admit(clientAddress(conn), encrypted); err != nil {
		g.fail(client, err)
		log.Info("client refused", logkey.Error, err)
		return
	}
	if version == versionCancel {
		g.cancelRequest(body)
		_ = client.Close() // the protocol has no answer to a cancel request
		return
	}
	if n := g.clients.Add(1); n > int64(g.cfg.MaxConnections) {
		g.clients.Add(-1)
		g.fail(client, errTooMany)
		return
	}
	defer g.clients.Add(-1)
	s, err := g.startSession(client, version, body)
	if err != nil {
		g.fail(client, err)
		log.Info("client not admitted", logkey.Error, err)
		return
	}
	defer g.unregister(s)
	_ = client.SetDeadline(time.Time{})
	if g.ctx.Err() != nil { // Close has set its deadlines before ours were taken away
		s.stop()
	}
	s.log = log.With(logkey.PID, s.pid)
	// The server's own log knows the gateway only, and the process.
	s.log.Debug("client connected", "tls", client != conn)
	s.run()
}

// fail tells the client why it is not served, if it can be told in a line.
func (g *Gateway) fail(client net.Conn, err error) {
	var e *sqlError
	var p *protocolError
	switch {
	case errors.As(err, &e):
	case errors.As(err, &p):
		e = &sqlError{code: codeProtocol, message: p.Error()}
	default:
		return
	}
	fatal := *e
	fatal.severity = "FATAL"
	g.metrics.refused.WithLabelValues(e.code).Inc()
	_ = client.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = client.Write(fatal.append(nil)) // it is being turned away
}

// negotiate answers requests for encryption and returns the startup or cancel request behind them.
func (g *Gateway) negotiate(conn net.Conn) (client net.Conn, version uint32, body []byte, err error) {
	client = conn
	for range 4 { // SSL, GSS, and then the real thing; more is nonsense
		var header [4]byte
		if _, err = io.ReadFull(client, header[:1]); err != nil {
			return client, 0, nil, fmt.Errorf("read startup packet: %w", err)
		}
		if header[0] == 0x16 && client == conn && g.cfg.TLS != nil { // a TLS ClientHello: sslnegotiation=direct
			if client, err = g.startTLS(conn, header[:1]); err != nil {
				return conn, 0, nil, err
			}
			continue
		}
		if err = readStartup(client, header[1:]); err != nil {
			return client, 0, nil, err
		}
		length := binary.BigEndian.Uint32(header[:])
		if length < 8 || length > maxStartup {
			return client, 0, nil, &protocolError{fmt.Sprintf("startup packet has invalid length %d", length)}
		}
		body = make([]byte, length-4)
		if err = readStartup(client, body); err != nil {
			return client, 0, nil, err
		}
		version, body = binary.BigEndian.Uint32(body), body[4:]
		switch version {
		case versionSSL:
			if g.cfg.TLS == nil || client != conn {
				_, err = client.Write([]byte{'N'})
			} else if _, err = conn.Write([]byte{'S'}); err == nil {
				client, err = g.startTLS(conn, nil)
			}
		case versionGSS:
			_, err = client.Write([]byte{'N'})
		default:
			return client, version, body, nil
		}
		if err != nil {
			return conn, 0, nil, fmt.Errorf("answer request for encryption: %w", err)
		}
	}
	return client, 0, nil, &protocolError{"too many requests for encryption"}
}

// readStartup reads more of a startup packet that has begun. Who has sent a part of one, and says that nothing follows, is told.
func readStartup(client io.Reader, b []byte) error {
	_, err := io.ReadFull(client, b)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return &protocolError{"startup packet is incomplete"}
	}
	if err != nil {
		return fmt.Errorf("read startup packet: %w", err)
	}
	return nil
}

// startTLS does the handshake. Nothing of the stream has been read ahead, so bytes that someone in the middle slipped
// in before the handshake are taken for part of it and make it fail.
func (g *Gateway) startTLS(conn net.Conn, read []byte) (net.Conn, error) {
	cfg := g.cfg.TLS
	if len(read) > 0 {
		cfg = cfg.Clone()
		cfg.NextProtos = []string{"postgresql"}
		conn = &prefixedConn{Conn: conn, prefix: read}
	}
	c := tls.Server(conn, cfg)
	ctx, cancel := context.WithTimeout(g.ctx, g.cfg.StartupTimeout)
	defer cancel()
	if err := c.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("TLS handshake: %w", err)
	}
	return c, nil
}

// prefixedConn gives back bytes that were read to see what they are.
type prefixedConn struct {
	net.Conn
	prefix []byte
}

func (c *prefixedConn) Read(p []byte) (int, error) {
	if len(c.prefix) > 0 {
		n := copy(p, c.prefix)
		c.prefix = c.prefix[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// cancelRequest passes a client's cancel request on, if its key is right.
func (g *Gateway) cancelRequest(body []byte) {
	if len(body) < 8 {
		return
	}
	pid := binary.BigEndian.Uint32(body)
	g.mu.Lock()
	s := g.sessions[pid]
	g.mu.Unlock()
	if s == nil || subtle.ConstantTimeCompare(s.secret, body[4:]) != 1 {
		g.log.Debug("cancel request with a wrong key", logkey.PID, pid)
		return
	}
	s.cancelByClient()
}

// startSession connects to the server, relays the authentication and returns the session when the server is ready.
func (g *Gateway) startSession(client net.Conn, version uint32, body []byte) (_ *session, err error) {
	life := g.serverLife() // first of all: afterwards the node may cease to accept
	if g.cfg.Accepting != nil {
		if err := g.cfg.Accepting(); err != nil {
			return nil, &sqlError{code: codeCannotConnect, message: "the node does not accept connections now: " + err.Error()}
		}
	}
	if g.draining.Load() || g.ctx.Err() != nil {
		return nil, &sqlError{code: codeCannotConnect, message: "the node is shutting down"}
	}
	if version>>16 != 3 {
		return nil, &sqlError{code: codeUnsupported,
			message: fmt.Sprintf("unsupported frontend protocol %d.%d: the gateway supports 3.0 to 3.2", version>>16, version&0xffff)}
	}
	packet, wishReadOnly, err := g.rewriteStartup(version, body, client.RemoteAddr())
	if err != nil {
		return nil, err
	}
	dialer := net.Dialer{Timeout: g.cfg.StartupTimeout}
	server, err := dialer.DialContext(g.ctx, g.cfg.ServerNetwork, g.cfg.ServerAddress)
	if err != nil {
		g.log.Warn("connect to server", logkey.Error, err)
		return nil, &sqlError{code: codeCannotConnect, message: "the node's PostgreSQL server cannot be reached"}
	}
	s := newSession(g, client, server)
	s.wish.Store(wishReadOnly)
	defer func() {
		if err != nil {
			_ = server.Close() // the error at hand says why
		}
	}()
	_ = server.SetDeadline(time.Now().Add(g.cfg.StartupTimeout))
	if _, err := server.Write(packet); err != nil {
		return nil, fmt.Errorf("send startup packet: %w", err)
	}
	if err := s.authenticate(); err != nil {
		return nil, err
	}
	_ = server.SetDeadline(time.Time{})
	if err := g.register(s, life); err != nil {
		return nil, err
	}
	if err := s.toClient.flush(); err != nil {
		g.unregister(s)
		return nil, fmt.Errorf("write to client: %w", err)
	}
	return s, nil
}

// rewriteStartup checks a startup packet and returns the one for the server. The last word on
// default_transaction_read_only is the gateway's: what is set here is also what RESET goes back to.
func (g *Gateway) rewriteStartup(version uint32, body []byte, from net.Addr) (packet []byte, wishReadOnly bool, err error) {
	var user, database, options string
	packet = binary.BigEndian.AppendUint32(make([]byte, 4, len(body)+96), version)
	for len(body) > 0 && body[0] != 0 {
		k, rest, ok1 := cstring(body)
		v, rest, ok2 := cstring(rest)
		if !ok1 || !ok2 {
			return nil, false, &protocolError{"startup packet is not terminated"}
		}
		body = rest
		key, value := string(k), string(v)
		switch strings.ToLower(key) {
		case "user":
			user = value
		case "database":
			database = value
		case "options":
			options = value
			continue
		case "replication":
			switch strings.ToLower(value) {
			case "false", "off", "no", "0":
			default:
				return nil, false, errReplication
			}
			continue
		default:
			drop, wish, e := startupSetting(key, value)
			if e != nil {
				return nil, false, e
			}
			if drop {
				wishReadOnly = wish
				continue
			}
		}
		packet = appendCString(appendCString(packet, key), value)
	}
	if len(body) != 1 {
		return nil, false, &protocolError{"startup packet is not terminated"}
	}
	if user == "" {
		return nil, false, errNoUser
	}
	if database == "" {
		database = user
	}
	if database != g.cfg.Database {
		return nil, false, databaseError(database, g.cfg.Database)
	}
	options, wish, err := rewriteOptions(options, g.cfg.Settings, from)
	if err != nil {
		return nil, false, err
	}
	packet = appendCString(packet, "options")
	packet = appendCString(packet, options)
	packet = append(packet, 0)
	binary.BigEndian.PutUint32(packet, uint32(len(packet)))
	return packet, wishReadOnly || wish, nil
}

// clientSetting tells a session's SQL where its client connects from, as host:port. Like all settings of quorate it is true, as
// far as no function that the client calls has set another value.
const clientSetting = "quorate.client_address"

// startupSetting judges a setting given at startup. drop says that it is the gateway's to keep.
func startupSetting(key, value string) (drop, wishReadOnly bool, err error) {
	key = strings.ToLower(strings.ReplaceAll(key, "-", "_"))
	if strings.HasPrefix(key, "quorate.") {
		return false, false, refusals[sqllex.OwnSetting]
	}
	switch key {
	case "default_transaction_read_only":
		switch strings.ToLower(value) {
		case "on", "true", "yes", "1", "t", "y", "tr", "tru", "ye":
			return true, true, nil
		}
		return true, false, nil
	case "default_transaction_isolation":
		if strings.EqualFold(value, "serializable") {
			return false, false, errIsolation
		}
	case "session_replication_role":
		if !strings.EqualFold(value, "origin") {
			return false, false, errReplicaRole
		}
	case "client_encoding":
		if unsafeEncoding(value) {
			return false, false, errEncoding
		}
	}
	return false, false, nil
}

// rewriteOptions goes through the server options that a client gives ("-c name=value --name=value …", split at
// blanks, backslash quotes), takes default_transaction_read_only out and sets it to on, and adds the gateway's settings and
// where the client is.
func rewriteOptions(options string, settings map[string]string, from net.Addr) (out string, wishReadOnly bool, err error) {
	words := splitOptions(options)
	var kept []string
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		kept = append(kept, "-c", name+"="+settings[name])
	}
	for i := 0; i < len(words); i++ {
		word := words[i]
		setting, whole := "", []string{word}
		switch {
		case word == "-c" && i+1 < len(words):
			i++
			setting, whole = words[i], append(whole, words[i])
		case strings.HasPrefix(word, "-c"):
			setting = word[2:]
		case strings.HasPrefix(word, "--"):
			setting = word[2:]
		}
		name, value, _ := strings.Cut(setting, "=")
		drop, wish, err := startupSetting(name, value)
		if err != nil {
			return "", false, err
		}
		if drop {
			wishReadOnly = wish
			continue
		}
		kept = append(kept, whole...)
	}
	kept = append(kept, "-c", clientSetting+"="+from.String(), "-c", "default_transaction_read_only=on")
	for i, w := range kept {
		kept[i] = strings.NewReplacer(`\`, `\\`, " ", `\ `, "\t", "\\\t", "\n", "\\\n").Replace(w)
	}
	return strings.Join(kept, " "), wishReadOnly, nil
}

// splitOptions splits as pg_split_opts does.
func splitOptions(s string) (words []string) {
	for i := 0; i < len(s); {
		for i < len(s) && strings.IndexByte(" \t\n\r\f\v", s[i]) >= 0 {
			i++
		}
		if i == len(s) {
			break
		}
		var w []byte
		for ; i < len(s) && strings.IndexByte(" \t\n\r\f\v", s[i]) < 0; i++ {
			if s[i] == '\\' && i+1 < len(s) {
				i++
			}
			w = append(w, s[i])
		}
		words = append(words, string(w))
	}
	return words
}

// unsafeEncoding reports whether a character of the encoding may have an ASCII byte behind its first one.
func unsafeEncoding(name string) bool {
	var b strings.Builder
	for _, c := range strings.ToLower(name) {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' {
			b.WriteRune(c)
		}
	}
	switch b.String() {
	case "sjis", "shiftjis", "mskanji", "win932", "windows932", "shiftjis2004", "big5", "win950", "windows950",
		"gbk", "win936", "windows936", "gb18030", "uhc", "win949", "windows949", "johab":
		return true
	}
	return false
}

// authenticate relays between client and server until the server is ready for queries. The client's side is left
// in the buffer of toClient.
func (s *session) authenticate() error {
	flush := func() error { return s.toClient.flush() }
	var login proof
	for {
		m, err := s.srv.next(flush)
		if err != nil {
			return fmt.Errorf("read from server: %w", err)
		}
		if m, err = s.srv.whole(m); err != nil {
			return fmt.Errorf("read from server: %w", err)
		}
		body := m.body()
		switch m.typ {
		case 'R':
			kind, err := authenticationKind(body)
			if err != nil {
				return err
			}
			if err := login.authentication(kind, clientAddress(s.client), s.g.cfg.TrustLoopback); err != nil {
				return err
			}
			if kind == 10 {
				s.toClient.buf = appendMechanisms(s.toClient.buf, body[4:])
			} else {
				s.toClient.buf = append(s.toClient.buf, m.data...)
			}
			switch kind {
			case 3, 5, 7, 8, 9, 10, 11: // the client has to answer
				if err := s.relayPassword(); err != nil {
					return err
				}
			}
		case 'K':
			if len(body) < 8 {
				return &protocolError{"short backend key from server"}
			}
			// The process id stays: clients compare it with the one in notifications. The secret is ours.
			s.pid = binary.BigEndian.Uint32(body)
			s.serverKey = append([]byte(nil), body[4:]...)
			s.secret = make([]byte, len(s.serverKey))
			_, _ = rand.Read(s.secret) // never fails
			b, at := begin(s.toClient.buf, 'K')
			s.toClient.buf = end(append(append(b, body[:4]...), s.secret...), at)
		case 'S':
			if err := s.parameter(m); err != nil {
				return err
			}
		case 'Z':
			if s.pid == 0 || len(body) != 1 || body[0] != 'I' {
				return &protocolError{"server is ready without a key"}
			}
			s.toClient.buf = append(s.toClient.buf, m.data...)
			return nil
		case 'E':
			s.toClient.buf = append(s.toClient.buf, m.data...)
			_ = s.toClient.flush() // the server has said why
			return errors.New("server refused the connection: " + string(errorField(body, 'M')))
		default:
			s.toClient.buf = append(s.toClient.buf, m.data...)
		}
	}
}

// relayPassword passes one answer of the client's on.
func (s *session) relayPassword() error {
	m, err := s.cli.next(s.toClient.flush)
	if err != nil {
		return fmt.Errorf("read from client: %w", err)
	}
	if m.typ != 'p' || m.size() > 64<<10 {
		return &protocolError{fmt.Sprintf("expected password response, got message type %q", m.typ)}
	}
	if m, err = s.cli.whole(m); err != nil {
		return fmt.Errorf("read from client: %w", err)
	}
	if _, err := s.toServer.conn.Write(m.data); err != nil {
		return fmt.Errorf("write to server: %w", err)
	}
	return nil
}

// appendMechanisms appends a SASL request without channel binding: it would bind to the gateway's TLS, of which the
// server knows nothing.
func appendMechanisms(b, list []byte) []byte {
	b, at := begin(b, 'R')
	b = binary.BigEndian.AppendUint32(b, 10)
	for len(list) > 0 && list[0] != 0 {
		name, rest, ok := cstring(list)
		if !ok {
			break
		}
		if !strings.HasSuffix(string(name), "-PLUS") {
			b = appendCString(b, string(name))
		}
		list = rest
	}
	return end(append(b, 0), at)
}

// sendCancel sends a cancel request to the server and waits until it has acted on it: it closes the connection then.
func (s *session) sendCancel() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, s.g.cfg.ServerNetwork, s.g.cfg.ServerAddress)
	if err != nil {
		s.g.log.Warn("connect to server to cancel", logkey.PID, s.pid, logkey.Error, err)
		return
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
	b := binary.BigEndian.AppendUint32(nil, uint32(12+len(s.serverKey)))
	b = binary.BigEndian.AppendUint32(b, versionCancel)
	b = binary.BigEndian.AppendUint32(b, s.pid)
	b = append(b, s.serverKey...)
	if _, err := conn.Write(b); err == nil {
		_, _ = conn.Read(make([]byte, 1)) // EOF says that it is done
	}
}
