package main

import (
	"strings"

	"github.com/spf13/cobra"
)

// examples are what the help of each command shows. A test holds each against the command's flags and arguments.
var examples = map[string]string{
	"init":                "quorate init --config /etc/quorate.yaml",
	"join":                "quorate join --config /etc/quorate.yaml --peer 10.0.0.1:7432 --token TOKEN",
	"run":                 "quorate run --config /etc/quorate.yaml",
	"doctor":              "quorate doctor --config /etc/quorate.yaml",
	"demo":                "quorate demo\nquorate demo --nodes 5 --dir /var/tmp/demo --base-port 7000",
	"version":             "quorate version",
	"log":                 "quorate log --data-dir /var/lib/quorate/node1 | tail -1",
	"recover":             "quorate recover --force-new-cluster --config /etc/quorate.yaml",
	"http-token":          "quorate http-token --name anna --role read --file /etc/quorate/http.tokens",
	"cert":                "quorate cert ca --dir ca",
	"cert ca":             "quorate cert ca --dir ca",
	"cert node":           "quorate cert node --dir ca --name node1 --host 10.0.0.1 --host node1.example",
	"cert client":         "quorate cert client --dir ca --name anna --role operate",
	"token":               "quorate token create --address 127.0.0.1:6201",
	"token create":        "quorate token create --address 127.0.0.1:6201 --ttl 10m",
	"token list":          "quorate token list --address 127.0.0.1:6201",
	"token revoke":        "quorate token revoke 3f9a --address 127.0.0.1:6201",
	"status":              "quorate status --address 127.0.0.1:6201\nquorate status --config /etc/quorate.yaml -o json\nquorate status --address 127.0.0.1:6201 --check >/dev/null || page-somebody",
	"watch":               "quorate watch --address 127.0.0.1:6201\nquorate watch --address 127.0.0.1:6201 -o json | jq .quorum",
	"nodes":               "quorate nodes --address 127.0.0.1:6201",
	"heartbeats":          "quorate heartbeats --address 127.0.0.1:6201",
	"transactions":        "quorate transactions --address 127.0.0.1:6201\nquorate transactions 2-9f86d081884c7d65-42 --address 127.0.0.1:6201",
	"conflicts":           "quorate conflicts --address 127.0.0.1:6201 --limit 20",
	"events":              "quorate events --config /etc/quorate.yaml --since 1h --severity warning\nquorate events --address 127.0.0.1:6201 --follow -o json | jq .text",
	"verify":              "quorate verify --address 127.0.0.1:6201",
	"remove":              "quorate remove 3 --address 127.0.0.1:6201 --reason 'its disk is broken'",
	"leave":               "quorate leave 3 --address 127.0.0.1:6201",
	"drain":               "quorate drain 3 --address 127.0.0.1:6201 --patience 1m",
	"resume":              "quorate resume 3 --address 127.0.0.1:6201",
	"promote":             "quorate promote 4 --address 127.0.0.1:6201",
	"demote":              "quorate demote 4 --address 127.0.0.1:6201",
	"resync":              "quorate resync 3 --address 127.0.0.1:6201",
	"transfer-leadership": "quorate transfer-leadership --to 2 --address 127.0.0.1:6201",
}

// showExamples gives a command and all below it their examples.
func showExamples(cmd *cobra.Command) {
	for _, sub := range cmd.Commands() {
		if text := examples[commandName(sub)]; text != "" {
			sub.Example = "  " + strings.ReplaceAll(text, "\n", "\n  ")
		}
		showExamples(sub)
	}
}

// commandName is what stands behind "quorate".
func commandName(cmd *cobra.Command) string {
	_, name, _ := strings.Cut(cmd.CommandPath(), " ")
	return name
}
