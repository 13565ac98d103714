package sqllex

import (
	_ "embed"
	"strings"
)

// builtinList names the functions of pg_catalog (PostgreSQL 17 and 18) of which no form is volatile, without those
// that only serve the server's insides. A test compares it with a real server's pg_proc.
//
//go:embed builtins.txt
var builtinList string

// harmless are volatile built-ins that change no table, and forms that look like a call but are not one.
const harmless = `clock_timestamp timeofday random random_normal gen_random_uuid uuidv4 uuidv7 currval lastval
pg_sleep pg_sleep_for pg_sleep_until pg_database_size pg_indexes_size pg_relation_size pg_table_size
pg_tablespace_size pg_total_relation_size pg_is_in_recovery pg_advisory_lock pg_advisory_lock_shared
pg_advisory_unlock pg_advisory_unlock_all pg_advisory_unlock_shared pg_advisory_xact_lock
pg_advisory_xact_lock_shared pg_try_advisory_lock pg_try_advisory_lock_shared pg_try_advisory_xact_lock
pg_try_advisory_xact_lock_shared pg_cancel_backend pg_terminate_backend pg_blocking_pids pg_current_wal_lsn
pg_current_wal_flush_lsn pg_current_wal_insert_lsn pg_partition_tree pg_partition_ancestors pg_stat_clear_snapshot
pg_sequence_last_value pg_xact_status txid_status pg_last_wal_replay_lsn pg_last_wal_receive_lsn pg_export_snapshot
set_config pg_lock_status pg_show_all_file_settings
copy select from where and or not in exists any all some case when then else on using by values as over filter
group having limit offset union except intersect distinct lateral rows join returning is like ilike between
row array coalesce nullif greatest least cast extract overlay position substring trim treat normalize grouping
cube rollup sets collation xmlelement xmlforest xmlparse xmlpi xmlroot xmlserialize xmlconcat xmlattributes
xmlexists xmltable xmlnamespaces json_object json_array json_scalar json_serialize json_exists json_query
json_value json_table json_objectagg json_arrayagg json columns
numeric decimal dec char character varchar nchar bit varying timestamp timestamptz time timetz interval float
precision zone bpchar varbit materialized escape costs analyze verbose format buffers timing summary wal settings
generic_plan memory serialize`

var builtins = func() map[string]struct{} {
	m := make(map[string]struct{}, 1024)
	for _, list := range []string{builtinList, harmless} {
		for name := range strings.FieldsSeq(list) {
			m[name] = struct{}{}
		}
	}
	return m
}()
