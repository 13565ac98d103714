package replication

import (
	"errors"
	"testing"

	"pgregory.net/rapid"

	"github.com/quorate/quorate/txn"
	"github.com/quorate/quorate/txn/certify"
	"github.com/quorate/quorate/txn/codec"
)

func token(n int, uses uint32, expires, at uint64) []byte {
	return codec.AppendToken(nil, &codec.Token{ID: request(n), Hash: codec.Hash{byte(n)}, Uses: uses, Expires: expires, Time: at})
}

func admitBy(n, token int, at uint64) []byte {
	return codec.AppendAdmit(nil, &codec.Admit{Request: request(n), Token: codec.TokenUse{ID: request(token), Hash: codec.Hash{byte(token)}, Time: at}})
}

func TestTokens(t *testing.T) {
	r := newRecorder()
	r.entry(found(cluster, txn.UUID{}, 1))
	admitted := func(want bool, request_ int, entry []byte) {
		t.Helper()
		r.entry(entry)
		if got := r.Admitted(request(request_)) != 0; got != want {
			t.Errorf("request %d is admitted: %v, want %v", request_, got, want)
		}
	}
	use := func(token int, at uint64) codec.TokenUse {
		return codec.TokenUse{ID: request(token), Hash: codec.Hash{byte(token)}, Time: at}
	}
	check := func(want error, u codec.TokenUse) {
		t.Helper()
		if got := r.CheckToken(u); !errors.Is(got, want) {
			t.Errorf("token %v: %v, want %v", u, got, want)
		}
	}
	check(ErrTokenUnknown, use(1, 100))
	admitted(false, 1, admitBy(1, 1, 100))
	r.entry(token(1, 1, 200, 100))
	check(nil, use(1, 199))
	check(ErrTokenUnknown, codec.TokenUse{ID: request(1), Hash: codec.Hash{9}, Time: 199}) // another secret
	check(ErrTokenUnknown, codec.TokenUse{ID: request(9), Time: 199})                      // the zero hash of no token
	check(ErrTokenExpired, use(1, 200))
	admitted(false, 2, admitBy(2, 1, 200))
	admitted(true, 3, admitBy(3, 1, 199))
	check(ErrTokenUsed, use(1, 150))
	admitted(false, 4, admitBy(4, 1, 150)) // the second of two at once
	admitted(true, 3, admitBy(3, 1, 500))  // asked again: the same answer
	r.entry(token(1, 5, 900, 150))         // the same id again does not revive it
	check(ErrTokenUsed, use(1, 150))

	r.entry(token(2, 2, 1000, 150))
	admitted(true, 5, admitBy(5, 2, 160))
	r.entry(token(2, 0, 0, 160)) // taken back
	check(ErrTokenUsed, use(2, 160))
	admitted(false, 6, admitBy(6, 2, 160))
	if list := r.Tokens(); len(list) != 2 || list[1].Uses != 0 {
		t.Errorf("tokens: %+v", list)
	}
	r.entry(token(3, 1, 5000, 1000)) // those that have expired by then are forgotten
	if list := r.Tokens(); len(list) != 1 || list[0].ID != request(3) {
		t.Errorf("tokens: %+v", list)
	}
	r.entry(token(4, 1, 1000, 1000)) // expired from the beginning
	check(ErrTokenUnknown, use(4, 999))
	for n := range 2 * maxTokens {
		r.entry(token(100+n, 1, 9000, 1000))
	}
	if list := r.Tokens(); len(list) != maxTokens {
		t.Errorf("there are %d tokens, at most %d may be", len(list), maxTokens)
	}
	check(nil, use(3, 1001))
}

// What two machines make of one log is the same, with a snapshot between or without.
func TestTokensInSnapshots(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		one, two := newRecorder(), newRecorder()
		for _, m := range []*recorder{one, two} {
			m.entry(found(cluster, txn.UUID{}, 1))
		}
		for i := range rapid.IntRange(1, 30).Draw(t, "entries") {
			var entry []byte
			id, at := rapid.IntRange(1, 4).Draw(t, "token"), rapid.Uint64Range(0, 20).Draw(t, "at")
			if rapid.Bool().Draw(t, "admit") {
				entry = admitBy(i+1, id, at)
			} else {
				entry = token(id, uint32(rapid.IntRange(0, 3).Draw(t, "uses")), rapid.Uint64Range(0, 30).Draw(t, "expires"), at)
			}
			one.entry(entry)
			two.entry(entry)
			if rapid.IntRange(0, 5).Draw(t, "snapshot") == 0 {
				b := image(t, two.Machine)
				two.certifier, two.tokens = certify.New(certify.Config{}), nil
				if err := two.Restore(b); err != nil {
					t.Fatal(err)
				}
			}
		}
		a, b := one.Tokens(), two.Tokens()
		if len(a) != len(b) || one.Membership().Highest != two.Membership().Highest {
			t.Fatalf("%+v\nand with snapshots\n%+v", a, b)
		}
		for i := range a {
			if a[i] != b[i] {
				t.Fatalf("%+v\nand with snapshots\n%+v", a, b)
			}
		}
	})
}
