package clone

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
)

// maxManifest bounds the manifest: about 150 bytes for each file of a data directory.
const maxManifest = 1 << 30

// errCorrupt: what arrived is not what the donor's PostgreSQL says it has sent.
var errCorrupt = errors.New("the copy is damaged")

// received is what was received of a file.
type received struct {
	size int64
	crc  uint32 // Castagnoli
}

// checkManifest compares what was received with PostgreSQL's own list of what it has sent.
func checkManifest(text []byte, systemID uint64, files map[string]received) error {
	// The last line holds the hash of those before it.
	end := bytes.LastIndex(bytes.TrimRight(text, "\n"), []byte("\n")) + 1
	sum := sha256.Sum256(text[:end])
	var m struct {
		Version  int    `json:"PostgreSQL-Backup-Manifest-Version"`
		SystemID uint64 `json:"System-Identifier"` // since version 2
		Files    []struct {
			Path      string
			Encoded   string `json:"Encoded-Path"` // hexadecimal, of a path that is not UTF-8
			Size      int64
			Algorithm string `json:"Checksum-Algorithm"`
			Checksum  string // of the bytes as they lie in memory
		}
		Checksum string `json:"Manifest-Checksum"`
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return fmt.Errorf("%w: read its manifest: %w", errCorrupt, err)
	}
	if m.Checksum != hex.EncodeToString(sum[:]) {
		return fmt.Errorf("%w: the manifest's checksum is %x, it says %q", errCorrupt, sum, m.Checksum)
	}
	if m.Version >= 2 && m.SystemID != systemID {
		return fmt.Errorf("%w: the manifest is of system %d, the donor is %d", errCorrupt, m.SystemID, systemID)
	}
	missing := maps.Clone(files)
	for _, f := range m.Files {
		if f.Encoded != "" {
			path, err := hex.DecodeString(f.Encoded)
			if err != nil {
				return fmt.Errorf("%w: the manifest has path %q: %w", errCorrupt, f.Encoded, err)
			}
			f.Path = string(path)
		}
		got, ok := files[f.Path]
		if !ok {
			return fmt.Errorf("%w: file %q did not arrive", errCorrupt, f.Path)
		}
		delete(missing, f.Path)
		if got.size != f.Size {
			return fmt.Errorf("%w: file %q has %d bytes instead of %d", errCorrupt, f.Path, got.size, f.Size)
		}
		if f.Algorithm != "CRC32C" {
			return fmt.Errorf("%w: file %q has a checksum of kind %q", errCorrupt, f.Path, f.Algorithm)
		}
		// PostgreSQL writes the four bytes in the order of the machine, which is little endian wherever Go and it both run.
		want, err := strconv.ParseUint(f.Checksum, 16, 32)
		if err != nil {
			return fmt.Errorf("%w: file %q has checksum %q: %w", errCorrupt, f.Path, f.Checksum, err)
		}
		if swapped := got.crc<<24 | got.crc>>24 | got.crc<<8&0xff0000 | got.crc>>8&0xff00; uint32(want) != swapped {
			return fmt.Errorf("%w: file %q has checksum %08x instead of %s", errCorrupt, f.Path, swapped, f.Checksum)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w: file %q is not in the manifest", errCorrupt, slices.Sorted(maps.Keys(missing))[0])
	}
	return nil
}
