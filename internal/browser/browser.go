// Package browser drives a real, headless Chromium in tests.
package browser

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/heapprofiler"
	cdplog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/memory"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// Options of a tab. The zero value is a desktop.
type Options struct {
	Width, Height int64   // of the window, in CSS pixels; 0 is 1440 by 900, of a phone 390 by 844
	Scale         float64 // device pixels for each of those; 0 is 1
	Phone         bool    // touch, and a narrow window
	Dark          bool    // what the system prefers
	ReducedMotion bool
	// Trusted names files with certificates, in PEM, of which the servers' are accepted whoever has signed them, and those
	// alone besides what everybody accepts.
	Trusted []string
	// Noisy tabs may have errors on their console: those of a network that the test has broken.
	Noisy bool
}

func (o *Options) defaults() {
	if o.Width == 0 {
		o.Width, o.Height = 1440, 900
		if o.Phone {
			o.Width, o.Height = 390, 844
		}
	}
	if o.Scale == 0 {
		o.Scale = 1
	}
}

// Tab is a page in a browser of its own, which ends with the test.
type Tab struct {
	t   testing.TB
	ctx context.Context
}

// startTimeout bounds the start of the browser on a busy machine, actionTimeout everything that it does.
const (
	startTimeout  = 60 * time.Second
	actionTimeout = 30 * time.Second
)

// Open starts a browser. What its page writes to the console as an error, and every exception, fails the test.
func Open(t testing.TB, o Options) *Tab {
	t.Helper()
	program, err := find()
	if err != nil {
		t.Fatal(err)
	}
	o.defaults()
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(program), chromedp.UserDataDir(filepath.Join(t.TempDir(), "profile")),
		chromedp.WindowSize(int(o.Width), int(o.Height)), chromedp.WSURLReadTimeout(startTimeout),
		chromedp.DisableGPU, chromedp.Flag("disable-dev-shm-usage", true), chromedp.Flag("no-proxy-server", true))
	if len(o.Trusted) > 0 {
		var hashes []string
		for _, file := range o.Trusted {
			hash, err := keyHash(file)
			if err != nil {
				t.Fatal(err)
			}
			hashes = append(hashes, hash)
		}
		options = append(options, chromedp.Flag("ignore-certificate-errors-spki-list", strings.Join(hashes, ",")))
	}
	if os.Geteuid() == 0 {
		options = append(options, chromedp.NoSandbox) // Chromium's own condition for running as root
	}
	allocated, free := chromedp.NewExecAllocator(context.Background(), options...)
	tab := &Tab{t: t}
	var settings []chromedp.ContextOption
	if !o.Noisy {
		settings = append(settings, chromedp.WithListener(tab.watchConsole()))
	}
	var closeTab context.CancelFunc
	tab.ctx, closeTab = chromedp.NewContext(allocated, settings...)
	t.Cleanup(func() {
		// Cancel, unlike the bare function, waits until the browser has ended: its profile is removed next.
		if err := chromedp.Cancel(tab.ctx); err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("close the browser: %v", err)
		}
		closeTab()
		free()
	})
	// The browser starts with the first action, and it lives as long as the context of that, which so has no time limit.
	if err := chromedp.Do(tab.ctx, call(cdplog.Enable, cdp.Empty{})); err != nil {
		t.Fatalf("start the browser: %v", err)
	}
	tab.Run(call(emulation.SetTimezoneOverride, emulation.SetTimezoneOverrideParams{TimezoneID: "UTC"}))
	tab.Emulate(o)
	return tab
}

// keyHash returns the hash by which Chromium knows a certificate's key.
func keyHash(file string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("read certificate: %w", err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return "", fmt.Errorf("read certificate: %s holds none", file)
	}
	certificate, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return "", fmt.Errorf("read certificate %s: %w", file, err)
	}
	sum := sha256.Sum256(certificate.RawSubjectPublicKeyInfo)
	return base64.StdEncoding.EncodeToString(sum[:]), nil
}

// Emulate makes the tab another device, of another taste.
func (b *Tab) Emulate(o Options) {
	b.t.Helper()
	o.defaults()
	scheme, motion := "light", "no-preference"
	if o.Dark {
		scheme = "dark"
	}
	if o.ReducedMotion {
		motion = "reduce"
	}
	b.Run(
		call(emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{
			Width: o.Width, Height: o.Height, DeviceScaleFactor: o.Scale, Mobile: o.Phone,
		}),
		call(emulation.SetTouchEmulationEnabled, emulation.SetTouchEmulationEnabledParams{Enabled: o.Phone}),
		call(emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
			{Name: "prefers-color-scheme", Value: scheme}, {Name: "prefers-reduced-motion", Value: motion},
		}}),
	)
}

// call makes an action of a command of the protocol.
func call[P, R any](command cdp.Command[P, R], params P) chromedp.Action[chromedp.Void] {
	return chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, command, params)
		return err
	})
}

// find returns Chromium's path.
func find() (string, error) {
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", errors.New("chromium is missing: apt-get install chromium")
}

// watchConsole returns a listener whose findings fail the test at its end.
func (b *Tab) watchConsole() func(any) {
	var mu sync.Mutex
	var seen []string
	b.t.Cleanup(func() {
		mu.Lock()
		defer mu.Unlock()
		for _, text := range seen {
			b.t.Errorf("the page's console: %s", text)
		}
	})
	return func(event any) {
		text := ""
		switch e := event.(type) {
		case *runtime.EventExceptionThrown:
			text = e.ExceptionDetails.Text
			if x := e.ExceptionDetails.Exception; x != nil {
				text += ": " + x.Description
			}
		case *cdplog.EventEntryAdded:
			if e.Entry.Level == cdplog.EntryLevelError {
				text = e.Entry.Text + " " + e.Entry.URL
			}
		}
		if text != "" {
			mu.Lock()
			defer mu.Unlock()
			seen = append(seen, text)
		}
	}
}

// Run runs actions of chromedp, which wait for the elements that they name.
func (b *Tab) Run(actions ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, actionTimeout)
	defer cancel()
	if err := chromedp.Do(ctx, actions...); err != nil {
		b.t.Fatalf("browser: %v", err)
	}
}

// Open goes to an address and waits until it is loaded.
func (b *Tab) Open(url string) {
	b.t.Helper()
	b.Run(chromedp.Navigate(url))
}

// Value returns what a JavaScript expression is, of a type that JSON has.
func Value[T any](b *Tab, expression string) T {
	b.t.Helper()
	value, err := evaluate[T](b, expression)
	if err != nil {
		b.t.Fatalf("browser: evaluate %s: %v", expression, err)
	}
	return value
}

func evaluate[T any](b *Tab, expression string) (T, error) {
	ctx, cancel := context.WithTimeout(b.ctx, actionTimeout)
	defer cancel()
	return chromedp.Run(ctx, chromedp.Evaluate[T](expression))
}

// navigating is the code of Chromium's error when the page went away while it evaluated something.
const navigating = -32000

// Visible returns the text that a person sees in the elements that a selector finds, one line each.
func (b *Tab) Visible(selector string) string {
	b.t.Helper()
	return Value[string](b, visible(selector))
}

// visible is a JavaScript expression.
func visible(selector string) string {
	return fmt.Sprintf(`Array.from(document.querySelectorAll(%q)).filter((e) => e.checkVisibility()).map((e) => e.innerText.replace(/\s+/g, " ").trim()).join("\n")`, selector)
}

// AwaitText waits until the visible text of the elements that a selector finds contains something, and returns after how
// long.
func (b *Tab) AwaitText(within time.Duration, selector, contains string) time.Duration {
	b.t.Helper()
	return b.Await(within, fmt.Sprintf("%q in %s", contains, selector), fmt.Sprintf(`(%s).includes(%q)`, visible(selector), contains))
}

// Await waits until a JavaScript expression is true, and returns after how long. It asks again and again from outside,
// because a page with a strict policy does not evaluate text itself.
func (b *Tab) Await(within time.Duration, what, expression string) time.Duration {
	b.t.Helper()
	begin := time.Now()
	for {
		is, err := evaluate[bool](b, expression)
		took := time.Since(begin)
		if is {
			return took
		}
		var gone *cdproto.Error // in a page that is loaded anew it is not true yet
		if err != nil && !(errors.As(err, &gone) && gone.Code == navigating) {
			b.t.Fatalf("browser: evaluate %s: %v", expression, err)
		}
		if took > within {
			b.t.Fatalf("the page did not show %s within %v:\n%s", what, within, Value[string](b, `document.body.innerText`))
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Click clicks on the first element that a selector finds.
func (b *Tab) Click(selector string) {
	b.t.Helper()
	b.Run(chromedp.Click(chromedp.CSS(selector)))
}

// Type types into the first element that a selector finds.
func (b *Tab) Type(selector, text string) {
	b.t.Helper()
	b.Run(chromedp.SendKeys(chromedp.CSS(selector), text))
}

// Key presses a key, of those in package kb or a letter.
func (b *Tab) Key(key string) {
	b.t.Helper()
	b.Run(chromedp.KeyEvent(key))
}

// Screenshot writes a PNG of the page down to a height, 0 for all of it.
func (b *Tab) Screenshot(path string, height int64) {
	b.t.Helper()
	Value[bool](b, `(scrollTo({ top: 0, behavior: "instant" }), true)`) // what sticks to the window's edge would be in the midst of it
	size := Value[[]float64](b, `[innerWidth, document.documentElement.scrollHeight]`)
	clip := &page.Viewport{Width: size[0], Height: size[1], Scale: 1}
	if height != 0 {
		clip.Height = float64(height)
	}
	beyond := true
	var shot []byte
	b.Run(chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		result, err := cdp.Call(ctx, t, page.CaptureScreenshot, page.CaptureScreenshotParams{Clip: clip, CaptureBeyondViewport: &beyond})
		shot = result.Data
		return err
	}))
	if err := writePNG(path, shot); err != nil {
		b.t.Fatal(err)
	}
}

func writePNG(path string, shot []byte) error {
	small, err := reduce(shot)
	if err != nil {
		return fmt.Errorf("reduce the screenshot: %w", err)
	}
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("create the screenshot: %w", err)
	}
	encoder := png.Encoder{CompressionLevel: png.BestCompression}
	return errors.Join(encoder.Encode(f, small), f.Close())
}

// Memory is what a page takes up, after its garbage was collected.
type Memory struct {
	Heap      int64 // bytes that the page's objects take
	Nodes     int64 // of all documents, those too that are not shown any more
	Listeners int64
}

// Memory measures the page.
func (b *Tab) Memory() (m Memory) {
	b.t.Helper()
	b.Run(chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		if _, err := cdp.Call(ctx, t, heapprofiler.CollectGarbage, cdp.Empty{}); err != nil {
			return err
		}
		heap, err := cdp.Call(ctx, t, runtime.GetHeapUsage, cdp.Empty{})
		if err != nil {
			return err
		}
		counters, err := cdp.Call(ctx, t, memory.GetDOMCounters, cdp.Empty{})
		m = Memory{Heap: int64(heap.UsedSize), Nodes: counters.Nodes, Listeners: counters.JsEventListeners}
		return err
	}))
	return m
}

// Reload loads the page again.
func (b *Tab) Reload() {
	b.t.Helper()
	b.Run(chromedp.Reload())
}

// Clear empties an input.
func (b *Tab) Clear(selector string) {
	b.t.Helper()
	Value[bool](b, fmt.Sprintf(`((e) => { e.value = ""; return e.dispatchEvent(new Event("input")); })(document.querySelector(%q))`, selector))
}

// Focus gives an element the focus.
func (b *Tab) Focus(selector string) {
	b.t.Helper()
	b.Run(chromedp.Focus(chromedp.CSS(selector)))
}
