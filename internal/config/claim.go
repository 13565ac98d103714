package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"go.yaml.in/yaml/v3"

	"github.com/quorate/quorate/txn"
)

// identity is what a data directory remembers of whose it is.
type identity struct {
	Cluster string     `yaml:"cluster"`
	Node    txn.NodeID `yaml:"node"`
}

// ClaimDataDir makes the data directory where it is missing and writes into it, in the file "identity", which node of
// which cluster it belongs to. A directory that belongs to another is refused and left as it is.
func (c Config) ClaimDataDir() error {
	if err := os.MkdirAll(c.DataDir, 0o755); err != nil {
		return fmt.Errorf("make data directory: data_dir %q: %w", c.DataDir, err)
	}
	name := filepath.Join(c.DataDir, "identity")
	text, err := os.ReadFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return c.writeIdentity(name)
	case err != nil:
		return fmt.Errorf("read identity of data directory: %w", err)
	}
	var have identity
	if err := yaml.Unmarshal(text, &have); err != nil || have == (identity{}) {
		return fmt.Errorf("read identity of data directory: %s does not hold cluster and node (%v): "+
			"it was damaged, or data_dir %q is not a node's", name, err, c.DataDir)
	}
	if have.Cluster != c.Cluster {
		return fmt.Errorf("data_dir %q belongs to cluster %q: cluster is %q", c.DataDir, have.Cluster, c.Cluster)
	}
	if have.Node != c.Node {
		return fmt.Errorf("data_dir %q belongs to node %s of cluster %q: node is %s", c.DataDir, have.Node, have.Cluster, c.Node)
	}
	return nil
}

func (c Config) writeIdentity(name string) error {
	text, err := yaml.Marshal(identity{c.Cluster, c.Node})
	if err != nil {
		return fmt.Errorf("write identity of data directory: %w", err)
	}
	return writeFile(name, text)
}
