package authz

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/quorate/quorate/internal/pki"
)

// NewToken draws a bearer token and returns it with the line that stands for it in a file of tokens. The line does not
// give the token away: it has 130 random bits, so that one round of SHA-256 is enough.
func NewToken(role pki.Role, name string) (token, line string, err error) {
	if role != pki.Read && role != pki.Operate {
		return "", "", fmt.Errorf("make token: role %s must be read or operate", role)
	}
	if !validName(name) {
		return "", "", fmt.Errorf("make token: name %q must have 1 to 64 printable characters without spaces", name)
	}
	token = rand.Text()
	return token, fmt.Sprintf("%s %s %s\n", role, fingerprint(token), name), nil
}

func fingerprint(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

func validName(name string) bool {
	return name != "" && len(name) <= 64 && !strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' })
}

// tokens are those of a file, by their hashes.
type tokens []tokenEntry

type tokenEntry struct {
	hash   [sha256.Size]byte
	caller Caller
}

const (
	maxTokens    = 1000
	maxTokenFile = 1 << 20
)

// readTokens reads a file with a token in each line, as NewToken returns it. Empty lines, and what follows a #, do
// not count. A line that makes no sense makes the whole file unusable: it may be the one that takes a right away.
func readTokens(name string) (tokens, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("read tokens: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read tokens: %w", err)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("read tokens: %s has mode %04o, so that others can add to it: chmod go-w %s", name, info.Mode().Perm(), name)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxTokenFile+1))
	if err != nil {
		return nil, fmt.Errorf("read tokens: %w", err)
	}
	if len(text) > maxTokenFile {
		return nil, fmt.Errorf("read tokens: %s has more than %d bytes", name, maxTokenFile)
	}
	var list tokens
	lines := bufio.NewScanner(bytes.NewReader(text))
	for number := 1; lines.Scan(); number++ {
		line, _, _ := strings.Cut(lines.Text(), "#")
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		entry, err := parseToken(fields)
		if err != nil {
			return nil, fmt.Errorf("read tokens: %s, line %d: %w", name, number, err)
		}
		if list = append(list, entry); len(list) > maxTokens {
			return nil, fmt.Errorf("read tokens: %s has more than %d", name, maxTokens)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read tokens: %s: %w", name, err)
	}
	return list, nil
}

func parseToken(fields []string) (e tokenEntry, err error) {
	if len(fields) != 3 {
		return e, fmt.Errorf("it has %d fields, must have role, hash and name", len(fields))
	}
	role, err := pki.ParseRole(fields[0])
	if err != nil || role == pki.Node {
		return e, fmt.Errorf("role %q must be read or operate", fields[0])
	}
	hash, err := hex.DecodeString(fields[1])
	if err != nil || len(hash) != sha256.Size {
		return e, fmt.Errorf("the second field must be the SHA-256 of the token, %d hexadecimal digits", 2*sha256.Size)
	}
	if !validName(fields[2]) {
		return e, fmt.Errorf("name %q must have 1 to 64 printable characters", fields[2])
	}
	return tokenEntry{[sha256.Size]byte(hash), Caller{Name: fields[2], Role: role}}, nil
}

// find returns whose token it is; role None if nobody's. How long it takes tells nothing of the tokens there are.
func (t tokens) find(token string) Caller {
	hash := sha256.Sum256([]byte(token))
	found := Caller{}
	for i := range t {
		if subtle.ConstantTimeCompare(hash[:], t[i].hash[:]) == 1 {
			found = t[i].caller
		}
	}
	return found
}
