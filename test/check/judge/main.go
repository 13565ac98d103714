// Command judge judges a history that a failed run has left: go run ./test/check/judge [-freshness node] FILE
package main

import (
	"flag"
	"fmt"
	"os"

	"github.com/quorate/quorate/test/check"
)

func main() {
	freshness := flag.String("freshness", "session", "which reads must see what was acknowledged before: those of the same `session`, node, or everywhere")
	flag.Parse()
	report, err := judge(*freshness, flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "judge:", err)
		os.Exit(2)
	}
	fmt.Print(report)
	if report.Err() != nil {
		os.Exit(1)
	}
}

func judge(freshness string, args []string) (check.Report, error) {
	levels := map[string]check.Freshness{"session": check.PerSession, "node": check.PerNode, "everywhere": check.Everywhere}
	level, ok := levels[freshness]
	if !ok || len(args) != 1 {
		return check.Report{}, fmt.Errorf("usage: judge [-freshness session|node|everywhere] FILE")
	}
	file, err := os.Open(args[0])
	if err != nil {
		return check.Report{}, fmt.Errorf("open history: %w", err)
	}
	defer file.Close()
	history, err := check.ReadHistory(file)
	if err != nil {
		return check.Report{}, err
	}
	return check.Judge(history, level), nil
}
