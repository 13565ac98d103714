package capture

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestBulkReaderPausesOnlyInBulk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &bulkReader{Reader: strings.NewReader("abcdef")}
		read := func(want time.Duration) {
			t.Helper()
			start := time.Now()
			if n, err := r.Read(make([]byte, 1)); n != 1 || err != nil {
				t.Fatalf("%d, %v", n, err)
			}
			if took := time.Since(start); took != want {
				t.Errorf("took %s, not %s", took, want)
			}
		}
		read(0) // before the stream begins
		r.stream = &stream{unmarked: bulkMessages}
		read(0)
		r.stream.unmarked++
		read(0)
		read(bulkPause)
		time.Sleep(bulkPause)
		read(0)               // the server was slower
		r.stream.unmarked = 0 // a marker has come
		read(0)
	})
}
