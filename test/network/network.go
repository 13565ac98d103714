// Package network makes a network whose every packet passes through the process of the test: each node has a network
// namespace and an address of its own, and what one sends to another is delivered, lost, held up or dropped as the link
// between the two, in this direction, says. Real programs with real TCP connections notice nothing of it, so there is
// one tool for partitions, also one-way and partial ones, for loss and for delay. It needs nothing of the kernel but
// namespaces and TUN devices, and leaves nothing behind: it ends with its process.
package network

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNotPermitted: this process may not make networks.
var ErrNotPermitted = errors.New("networks can be made by root (CAP_NET_ADMIN, CAP_SYS_ADMIN) where /dev/net/tun is")

// Link is how one end's packets fare on their way to another. The zero value delivers them at once.
type Link struct {
	Cut    bool
	Loss   float64       // the share of packets that is lost, 0 to 1
	Delay  time.Duration // of each packet
	Jitter time.Duration // more delay, at random up to this; packets stay in order
}

// Clients is the end at which the namespace of this process is. Nodes are counted from 1.
const Clients = 0

// Network is a star of links between nodes and clients. Its methods are safe for concurrent use.
type Network struct {
	ends  []*end
	links [][]*link // from, to
	work  sync.WaitGroup
	done  chan struct{}
	once  sync.Once

	mu   sync.Mutex
	errs []error // what broke; Close returns it
}

// end is a node, or the clients.
type end struct {
	address netip.Addr
	device  *os.File
	thread  chan func() // runs in the end's namespace; nil: it is that of this process
}

type link struct {
	state atomic.Pointer[Link]
	queue chan packet
}

type packet struct {
	due  time.Time
	data []byte
}

const (
	// packetSize is what devices take at once. More than an Ethernet, so that the same data cost fewer of them.
	packetSize = 9000
	// queueLength is how many packets are on a link before those that come are lost, as in a switch.
	queueLength = 2048
	// maxNetworks is how many there can be on one machine.
	maxNetworks = 256
)

// New makes a network. The error wraps ErrNotPermitted where that is not possible.
func New(nodes int) (_ *Network, err error) {
	n := &Network{done: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make network: %w", err), n.Close())
		}
	}()
	prefix, err := n.openClients()
	if err != nil {
		return nil, err
	}
	for i := 1; i <= nodes; i++ {
		if err := n.openNode(prefix, byte(i)); err != nil {
			return nil, fmt.Errorf("node %d: %w", i, err)
		}
	}
	for from := range n.ends {
		n.links = append(n.links, nil)
		for to := range n.ends {
			l := &link{queue: make(chan packet, queueLength)}
			l.state.Store(&Link{})
			n.links[from] = append(n.links[from], l)
			n.work.Go(func() { n.carry(l, n.ends[to].device) })
		}
	}
	for from, e := range n.ends {
		n.work.Go(func() { n.route(from, e.device) })
	}
	return n, nil
}

// openClients makes the device of the clients, and with it finds a range of addresses that is free: a device has one name
// for each. The ranges are those that are reserved for test networks. It is drawn, so that a network seldom has the
// addresses of the one before, to which the kernel may still have connections that nobody has ended.
func (n *Network) openClients() (netip.Addr, error) {
	var last error
	first := rand.IntN(maxNetworks)
	for i := range maxNetworks {
		number := (first + i) % maxNetworks
		prefix := netip.AddrFrom4([4]byte{198, 18, byte(number), 0})
		device, err := openDevice(fmt.Sprintf("quorate%d", number), within(prefix, 254))
		if err == nil {
			n.ends = append(n.ends, &end{address: within(prefix, 254), device: device})
			return prefix, nil
		}
		if last = err; !errors.Is(err, unix.EBUSY) {
			break
		}
	}
	return netip.Addr{}, last
}

func within(prefix netip.Addr, last byte) netip.Addr {
	b := prefix.As4()
	b[3] = last
	return netip.AddrFrom4(b)
}

func (n *Network) openNode(prefix netip.Addr, i byte) error {
	e := &end{address: within(prefix, i), thread: make(chan func())}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine, and the namespace with its last process
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err != nil {
			err = fmt.Errorf("make namespace: %w", permission(err))
		}
		made <- err
		if err != nil {
			return
		}
		for f := range e.thread {
			f()
		}
	}()
	if err := <-made; err != nil {
		return err
	}
	n.ends = append(n.ends, e)
	return n.Do(int(i), func() error {
		if err := bringUp("lo"); err != nil {
			return err
		}
		var err error
		e.device, err = openDevice("net0", e.address)
		return err
	})
}

// Do calls f on the thread of node i: sockets that it makes and processes that it starts are in the node's network. What
// it starts with Pdeathsig set gets the signal when the network is closed.
func (n *Network) Do(i int, f func() error) error {
	result := make(chan error, 1)
	n.ends[i].thread <- func() { result <- f() }
	return <-result
}

// Host is the address of node i, for nodes and clients alike.
func (n *Network) Host(i int) string { return n.ends[i].address.String() }

// Set changes the link between two ends in one direction.
func (n *Network) Set(from, to int, l Link) { n.links[from][to].state.Store(&l) }

// broke notes that an end cannot send any more, unless that is because of Close.
func (n *Network) broke(end int, err error) {
	if errors.Is(err, os.ErrClosed) {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.errs = append(n.errs, fmt.Errorf("network: read what end %d sends: %w", end, err))
}

// Close ends the network and returns what was wrong with it. The processes of its nodes should have ended before.
func (n *Network) Close() error {
	var errs []error
	n.once.Do(func() {
		close(n.done)
		for _, e := range n.ends {
			if e.device != nil {
				errs = append(errs, e.device.Close())
			}
			if e.thread != nil {
				close(e.thread)
			}
		}
		n.work.Wait()
		errs = append(errs, n.errs...)
	})
	return errors.Join(errs...)
}

// route takes what an end sends and puts it on its link.
func (n *Network) route(from int, device *os.File) {
	buffer := make([]byte, packetSize)
	for {
		size, err := device.Read(buffer)
		if err != nil {
			n.broke(from, err)
			return
		}
		to := n.destination(buffer[:size])
		if to < 0 {
			continue
		}
		l := n.links[from][to]
		state := l.state.Load()
		if state.Loss > 0 && rand.Float64() < state.Loss {
			continue
		}
		due := time.Now().Add(state.Delay)
		if state.Jitter > 0 {
			due = due.Add(rand.N(state.Jitter))
		}
		select {
		case l.queue <- packet{due: due, data: append([]byte(nil), buffer[:size]...)}:
		default:
		}
	}
}

// destination is the end that a packet is for, -1 if none.
func (n *Network) destination(data []byte) int {
	const header, version, offset = 20, 4, 16
	if len(data) < header || data[0]>>4 != version {
		return -1
	}
	var address [4]byte
	copy(address[:], data[offset:])
	for i, e := range n.ends {
		if e.address == netip.AddrFrom4(address) {
			return i
		}
	}
	return -1
}

// carry delivers what is on a link when it is due. What is under way when the link is cut is lost with it.
func (n *Network) carry(l *link, device *os.File) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case p := <-l.queue:
			if wait := time.Until(p.due); wait > 0 {
				timer.Reset(wait)
				select {
				case <-timer.C:
				case <-n.done:
					return
				}
			}
			if !l.state.Load().Cut {
				_, _ = device.Write(p.data) // a packet that a device does not take is lost, as packets are
			}
		case <-n.done:
			return
		}
	}
}

// openDevice makes a TUN device in the namespace of the calling thread: whoever reads it gets the packets that are sent to
// it, and what is written to it has arrived. Its whole /24 is reached through it.
func openDevice(name string, address netip.Addr) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", permission(err))
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err == nil {
		err = configure(name, address)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make device %s: %w", name, permission(err)), unix.Close(fd))
	}
	// Only now: what is polled before it is attached never becomes ready.
	return os.NewFile(uintptr(fd), name), nil
}

func configure(name string, address netip.Addr) error {
	mtu := func(r *unix.Ifreq) error { r.SetUint32(packetSize); return nil }
	ip := func(b [4]byte) func(*unix.Ifreq) error {
		return func(r *unix.Ifreq) error { return r.SetInet4Addr(b[:]) }
	}
	for _, step := range []struct {
		request uint
		fill    func(*unix.Ifreq) error
	}{
		{unix.SIOCSIFMTU, mtu},
		{unix.SIOCSIFADDR, ip(address.As4())},
		{unix.SIOCSIFNETMASK, ip([4]byte{255, 255, 255, 0})},
	} {
		if err := control(name, step.request, step.fill); err != nil {
			return err
		}
	}
	return bringUp(name)
}

func bringUp(name string) error {
	return control(name, unix.SIOCSIFFLAGS, func(r *unix.Ifreq) error { r.SetUint16(unix.IFF_UP); return nil })
}

// control makes one request to the interface of this name.
func control(name string, request uint, fill func(*unix.Ifreq) error) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("configure %s: %w", name, err)
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq(name)
	if err == nil {
		err = fill(r)
	}
	if err == nil {
		err = unix.IoctlIfreq(fd, request, r)
	}
	if err != nil {
		return fmt.Errorf("configure %s: %w", name, permission(err))
	}
	return nil
}

// permission tells apart what this process may not do, or what this machine does not have.
func permission(err error) error {
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("%w: %w", ErrNotPermitted, err)
	}
	return err
}
