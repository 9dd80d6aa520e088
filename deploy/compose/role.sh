#!/bin/bash
# Runs once, when the PostgreSQL image makes its cluster: the role that pgvault logs in as, with no more than it needs to
# stream WAL and to take remote backups.
set -euo pipefail

psql -v ON_ERROR_STOP=1 -v password="$PGVAULT_ROLE_PASSWORD" -U "$POSTGRES_USER" -d "$POSTGRES_DB" <<'SQL'
create role pgvault login replication password :'password';
SQL
# "all" in pg_hba.conf does not include replication connections.
echo "host replication pgvault all scram-sha-256" >>"$PGDATA/pg_hba.conf"
