package txn_test

import (
	"testing"

	"github.com/quorate/quorate/txn"
)

func TestUUID(t *testing.T) {
	u := txn.NewUUID()
	if u.IsZero() || u == txn.NewUUID() || !(txn.UUID{}).IsZero() {
		t.Errorf("drawn: %s", u)
	}
	back, err := txn.ParseUUID(u.String())
	if err != nil || back != u || u.String()[14] != '4' {
		t.Errorf("%s became %s: %v", u, back, err)
	}
	// It is on disks and in logs: it must not change.
	if got := txn.DeriveUUID("example").String(); got != "b50530b1-8e12-8b4d-ac34-afc514ed2c57" {
		t.Errorf("derived %s", got)
	}
	if txn.DeriveUUID("a") == txn.DeriveUUID("b") {
		t.Error("two texts give one UUID")
	}
	for _, bad := range []string{"", "x", u.String()[1:], u.String() + "0", "0f6d2a4e-8d3b-4d6b-9a0e-6f5c3b2a1dzz", "0f6d2a4e08d3b04d6b09a0e06f5c3b2a1d00"} {
		if got, err := txn.ParseUUID(bad); err == nil {
			t.Errorf("%q is read as %s", bad, got)
		}
	}
}
