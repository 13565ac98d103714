package consensus

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/quorate/quorate/txn"
)

// Every Raft connection begins with a greeting from the side that has dialled and one in answer. Raft's own messages
// say of which node they are, but not of which cluster, and not for whom: a node that was restored from a backup, or an
// address that somebody else has now, would be taken for a member.

// greeting is what both sides say first. Its layout is fixed for version 1; the fields are big endian.
type greeting struct {
	verdict  verdict // of an answer
	cluster  [16]byte
	from, to txn.NodeID
}

var greetingMagic = [8]byte{'Q', 'U', 'O', 'R', 'A', 'F', 'T', '\n'}

const (
	greetingVersion = 1
	greetingPrefix  = len(greetingMagic) + 1 // with the version: who says something else here need say nothing more
	greetingSize    = greetingPrefix + 1 + 16 + 4 + 4
)

// verdict is how a greeting was received.
type verdict uint8

const (
	welcome verdict = iota
	wrongVersion
	wrongCluster
	wrongNode
)

var verdicts = [...]string{
	"welcome", "it speaks another version of the protocol", "it belongs to another cluster", "another node has its address",
}

func (v verdict) String() string {
	if int(v) < len(verdicts) {
		return verdicts[v]
	}
	return fmt.Sprintf("it has answered %d", uint8(v))
}

// Why a connection was turned away, as the metric has it.
const (
	refusedTLS      = "tls"
	refusedGreeting = "greeting"
	refusedVersion  = "version"
	refusedCluster  = "cluster"
	refusedNode     = "node"
	refusedCrowded  = "crowded"
)

var refusals = []string{refusedTLS, refusedGreeting, refusedVersion, refusedCluster, refusedNode, refusedCrowded}

var (
	errNotGreeting     = errors.New("no greeting")
	errGreetingVersion = errors.New("greeting of another version")
)

func (g greeting) encode() []byte {
	b := append(greetingMagic[:len(greetingMagic):len(greetingMagic)], greetingVersion, byte(g.verdict))
	b = append(b, g.cluster[:]...)
	b = binary.BigEndian.AppendUint32(b, uint32(g.from))
	return binary.BigEndian.AppendUint32(b, uint32(g.to))
}

// readGreeting reads not a byte more than the greeting.
func readGreeting(r io.Reader) (g greeting, err error) {
	var b [greetingSize]byte
	if _, err := io.ReadFull(r, b[:greetingPrefix]); err != nil {
		return g, fmt.Errorf("%w: %w", errNotGreeting, err)
	}
	if !bytes.Equal(b[:len(greetingMagic)], greetingMagic[:]) {
		return g, errNotGreeting
	}
	if v := b[len(greetingMagic)]; v != greetingVersion {
		return g, fmt.Errorf("%w: %d", errGreetingVersion, v)
	}
	if _, err := io.ReadFull(r, b[greetingPrefix:]); err != nil {
		return g, fmt.Errorf("%w: %w", errNotGreeting, err)
	}
	rest := b[greetingPrefix:]
	g.verdict = verdict(rest[0])
	copy(g.cluster[:], rest[1:])
	g.from = txn.NodeID(binary.BigEndian.Uint32(rest[17:]))
	g.to = txn.NodeID(binary.BigEndian.Uint32(rest[21:]))
	return g, nil
}

// greet is the dialling side's part of the handshake with a node at address.
func (s *streamLayer) greet(c *trackedConn, to txn.NodeID, address string, deadline time.Time) error {
	if err := c.raw.SetDeadline(deadline); err != nil {
		return err
	}
	if s.clientTLS != nil {
		conf := s.clientTLS()
		if conf.ServerName == "" {
			conf = conf.Clone()
			conf.ServerName, _, _ = net.SplitHostPort(address)
		}
		if err := s.encrypt(c, tls.Client(c.raw, conf)); err != nil {
			return err
		}
	}
	if _, err := c.Conn.Write(greeting{cluster: s.cluster, from: s.node, to: to}.encode()); err != nil {
		return fmt.Errorf("send greeting: %w", err)
	}
	answer, err := readGreeting(c.Conn)
	if err != nil {
		return fmt.Errorf("read answer: %w", err)
	}
	switch {
	case answer.verdict != welcome:
		return errors.New(answer.verdict.String())
	case answer.cluster != s.cluster:
		return errors.New(wrongCluster.String())
	case answer.from != to || answer.to != s.node:
		return errors.New(wrongNode.String())
	}
	return c.raw.SetDeadline(time.Time{}) // Raft sets its own for each message
}

// receive is the accepting side's part. On an error it also returns why in one word.
func (s *streamLayer) receive(c *trackedConn) (reason string, err error) {
	if err := c.raw.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return refusedGreeting, err
	}
	if s.serverTLS != nil {
		if err := s.encrypt(c, tls.Server(c.raw, s.serverTLS)); err != nil {
			return refusedTLS, err
		}
	}
	g, err := readGreeting(c.Conn)
	answer := greeting{cluster: s.cluster, from: s.node, to: g.from}
	switch {
	case errors.Is(err, errGreetingVersion):
		reason, answer.verdict = refusedVersion, wrongVersion
	case err != nil:
		return refusedGreeting, err // somebody else altogether
	case g.cluster != s.cluster:
		reason, answer.verdict, answer.cluster = refusedCluster, wrongCluster, [16]byte{} // which is none of its business
	case g.to != s.node:
		reason, answer.verdict = refusedNode, wrongNode
	}
	if _, err := c.Conn.Write(answer.encode()); err != nil {
		return refusedGreeting, fmt.Errorf("answer greeting: %w", err)
	}
	if answer.verdict != welcome {
		return reason, fmt.Errorf("from %s, node %s: %s", c.raw.RemoteAddr(), g.from, reason)
	}
	return "", c.raw.SetDeadline(time.Time{})
}

// encrypt puts TLS on top of a connection, within its deadline, and looks who is there.
func (s *streamLayer) encrypt(c *trackedConn, secured *tls.Conn) error {
	if err := secured.HandshakeContext(context.Background()); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	if s.verifyPeer != nil {
		if err := s.verifyPeer(secured.ConnectionState()); err != nil {
			return fmt.Errorf("TLS: %w", err)
		}
	}
	c.Conn = secured
	return nil
}
