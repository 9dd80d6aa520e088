#!/bin/bash
# Runs once, when the PostgreSQL image makes its cluster: the role that pgvault logs in as, with no more than it needs.
set -euo pipefail

psql -v ON_ERROR_STOP=1 -v password="$PGVAULT_ROLE_PASSWORD" -U "$POSTGRES_USER" -d "$POSTGRES_DB" <<'SQL'
create role pgvault login replication password :'password';
grant pg_monitor to pgvault;
grant execute on function pg_backup_start(text, boolean) to pgvault;
grant execute on function pg_backup_stop(boolean) to pgvault;
grant execute on function pg_switch_wal() to pgvault;
grant execute on function pg_create_restore_point(text) to pgvault;
SQL
# "all" in pg_hba.conf does not include replication connections.
echo "host replication pgvault all scram-sha-256" >>"$PGDATA/pg_hba.conf"
