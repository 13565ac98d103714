package dashboard_test

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/quorate/quorate/internal/browser"
)

// screenshotsVariable names the directory that "make screenshots" has the pictures of the documentation put into.
const screenshotsVariable = "QUORATE_SCREENSHOTS"

// maxScreenshot is in bytes: everybody who clones the repository gets them.
const maxScreenshot = 150_000

// TestScreenshots takes the pictures of the documentation, of a real cluster.
func TestScreenshots(t *testing.T) {
	dir := os.Getenv(screenshotsVariable)
	if dir == "" {
		t.Skipf("%s names no directory: see make screenshots", screenshotsVariable)
	}
	dir, err := filepath.Abs(dir)
	check(t, err)
	check(t, os.MkdirAll(dir, 0o755))
	c, ctx := open(t, 1, 1, 1, 2, 2, 3)
	tab := browser.Open(t, browser.Options{Noisy: true})
	tab.Open(page(c, 1))
	take := func(state string) {
		for name, o := range map[string]browser.Options{
			"desktop-light": {}, "desktop-dark": {Dark: true},
			"phone-light": {Phone: true, Scale: 2}, "phone-dark": {Phone: true, Scale: 2, Dark: true},
		} {
			height := int64(1500)
			if o.Phone {
				height = 1100
			}
			tab.Emulate(o)
			pause(ctx, time.Second) // for the page to take its new shape
			path := filepath.Join(dir, "dashboard-"+state+"-"+name+".png")
			tab.Screenshot(path, height)
			info, err := os.Stat(path)
			check(t, err)
			if info.Size() > maxScreenshot {
				t.Errorf("%s has %d bytes, and may have %d", path, info.Size(), maxScreenshot)
			}
		}
	}
	tab.AwaitText(patience, "#verdict", "Healthy")
	tab.Click("#range label")
	tab.Await(5*time.Minute, "a picture's worth of history", `document.querySelectorAll("#conflict-rows tr").length > 10 && performance.now() > 125000`)
	take("healthy")

	check(t, c.KillNode(ctx, 3))
	tab.AwaitText(patience, "#node-3 ~ .chip", "not reached")
	pause(ctx, 8*time.Second)
	take("degraded")

	signal(t, c, syscall.SIGSTOP, 2)
	tab.AwaitText(patience, "#verdict", "No quorum")
	pause(ctx, 3*time.Second)
	take("no-quorum")
	signal(t, c, syscall.SIGCONT, 2)
}
