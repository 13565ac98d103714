package network_test

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/quorate/quorate/test/network"
)

func open(t *testing.T) *network.Network {
	t.Helper()
	n, err := network.New(3)
	if errors.Is(err, network.ErrNotPermitted) {
		t.Skip(err)
	}
	check(t, err)
	t.Cleanup(func() { check(t, n.Close()) })
	return n
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// echo answers lines at node i.
func echo(t *testing.T, n *network.Network, i int) (address string) {
	t.Helper()
	var listener net.Listener
	check(t, n.Do(i, func() (err error) {
		listener, err = net.Listen("tcp", net.JoinHostPort(n.Host(i), "0"))
		return err
	}))
	t.Cleanup(func() { check(t, listener.Close()) })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				lines := bufio.NewScanner(conn)
				for lines.Scan() {
					if _, err := fmt.Fprintln(conn, lines.Text()); err != nil {
						return
					}
				}
			}()
		}
	}()
	return listener.Addr().String()
}

func dial(t *testing.T, n *network.Network, i int, address string) *bufio.ReadWriter {
	t.Helper()
	var conn net.Conn
	connect := func() (err error) {
		conn, err = net.DialTimeout("tcp", address, 5*time.Second)
		return err
	}
	if i == network.Clients {
		check(t, connect())
	} else {
		check(t, n.Do(i, connect))
	}
	t.Cleanup(func() { check(t, conn.Close()) })
	return bufio.NewReadWriter(bufio.NewReader(deadline{conn}), bufio.NewWriter(conn))
}

// patience is how long an answer is waited for that may not come.
const patience = 300 * time.Millisecond

// deadline bounds each read.
type deadline struct{ net.Conn }

func (d deadline) Read(b []byte) (int, error) {
	if err := d.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return 0, err
	}
	return d.Conn.Read(b)
}

func ask(t *testing.T, conn *bufio.ReadWriter, line string) (answer string, err error) {
	t.Helper()
	_, err = conn.WriteString(line + "\n")
	check(t, err)
	check(t, conn.Flush())
	answer, err = conn.ReadString('\n')
	return strings.TrimSpace(answer), err
}

func TestLinks(t *testing.T) {
	n := open(t)
	two := echo(t, n, 2)
	clients, one, three := dial(t, n, network.Clients, two), dial(t, n, 1, two), dial(t, n, 3, two)
	reach := func(conn *bufio.ReadWriter, line string, want bool) {
		t.Helper()
		if answer, err := ask(t, conn, line); (err == nil && answer == line) != want {
			t.Errorf("%s: answer %q, %v; want one: %v", line, answer, err, want)
		}
	}
	reach(clients, "from clients", true)
	reach(one, "from 1", true)
	reach(three, "from 3", true)

	n.Set(2, 1, network.Link{Cut: true}) // one way is enough to keep answers away
	reach(one, "answers are cut", false)
	reach(three, "from 3, while 1 is cut", true)
	n.Set(2, 1, network.Link{})
	answer, err := one.ReadString('\n') // TCP sends it again
	for errors.Is(err, errTimeout(err)) {
		answer, err = one.ReadString('\n')
	}
	check(t, err)
	if strings.TrimSpace(answer) != "answers are cut" {
		t.Errorf("after healing: %q", answer)
	}

	const delay = 50 * time.Millisecond
	n.Set(3, 2, network.Link{Delay: delay, Jitter: delay})
	began := time.Now()
	reach(three, "late", true)
	if took := time.Since(began); took < delay {
		t.Errorf("with a delay of %v it took %v", delay, took)
	}
	n.Set(3, 2, network.Link{Loss: 1})
	reach(three, "lost", false)
}

// errTimeout returns err if it is a timeout.
func errTimeout(err error) error {
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return err
	}
	return errors.New("no timeout")
}

// TestProcess: a program that is started in a namespace is on the node's network.
func TestProcess(t *testing.T) {
	n := open(t)
	var out []byte
	check(t, n.Do(2, func() (err error) {
		out, err = exec.Command("cat", "/proc/net/fib_trie").Output()
		return err
	}))
	if !strings.Contains(string(out), n.Host(2)) || strings.Contains(string(out), n.Host(1)+"\n") {
		t.Errorf("addresses in the namespace of node 2:\n%s", out)
	}
}

// TestLoss: with some loss TCP gets through, by sending again.
func TestLoss(t *testing.T) {
	n := open(t)
	n.Set(1, 2, network.Link{Loss: 0.2})
	n.Set(2, 1, network.Link{Loss: 0.2})
	conn := dial(t, n, 1, echo(t, n, 2))
	for i := range 20 {
		want := fmt.Sprint(i)
		answer, err := ask(t, conn, want)
		for errors.Is(err, errTimeout(err)) {
			answer, err = conn.ReadString('\n')
		}
		check(t, err)
		if strings.TrimSpace(answer) != want {
			t.Fatalf("answer %q, want %q", answer, want)
		}
	}
}
