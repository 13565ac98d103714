package apply

import (
	"testing"
)

func TestRows(t *testing.T) {
	c := newCluster(t, 18, `CREATE TABLE account (id int PRIMARY KEY, balance numeric, note text)`)
	p := start(t, c.config())
	p.apply(c.run(
		"INSERT INTO account SELECT n, n * 1.50, NULL FROM generate_series(1, 10) n",
		"UPDATE account SET balance = balance + 1 WHERE id < 4",
		"UPDATE account SET id = id + 100, note = 'it''s' WHERE id = 5",
		"DELETE FROM account WHERE id = 7",
	))
	c.equal("account")
}
