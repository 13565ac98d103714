package cluster

import (
	"bufio"
	"context"
	"fmt"
	"strconv"
	"strings"
)

// Metrics reads the metrics of node i, by name with labels as they are written.
func (c *Cluster) Metrics(ctx context.Context, i int) (map[string]float64, error) {
	response, err := c.getHTTP(ctx, i, "/metrics")
	if err != nil {
		return nil, fmt.Errorf("metrics of node %d: %w", i, err)
	}
	defer response.Body.Close()
	metrics := map[string]float64{}
	lines := bufio.NewScanner(response.Body)
	for lines.Scan() {
		line := lines.Text()
		at := strings.LastIndexByte(line, ' ')
		if at < 0 || strings.HasPrefix(line, "#") {
			continue
		}
		value, err := strconv.ParseFloat(line[at+1:], 64)
		if err != nil {
			return nil, fmt.Errorf("metrics of node %d: %q: %w", i, line, err)
		}
		metrics[line[:at]] = value
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("metrics of node %d: %w", i, err)
	}
	return metrics, nil
}
