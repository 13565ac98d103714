package pgserver

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// Preset asks the programs for a number that was decided when they were built, block_size or wal_block_size say. No server
// runs and none is needed.
func (in Install) Preset(ctx context.Context, name string) (int, error) {
	dir, err := os.MkdirTemp("", "quorate-preset-") // postgres wants to see a configuration file
	if err != nil {
		return 0, fmt.Errorf("ask postgres for %s: %w", name, err)
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "postgresql.conf"), nil, 0o600); err != nil {
		return 0, fmt.Errorf("ask postgres for %s: %w", name, err)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(in.BinDir, "postgres"), "-C", name, "-D", dir)
	cmd.Env = serverEnvironment()
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("ask postgres for %s: %w: %s", name, err, strings.TrimSpace(said.String()))
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		return 0, fmt.Errorf("ask postgres for %s: %w", name, err)
	}
	return n, nil
}
