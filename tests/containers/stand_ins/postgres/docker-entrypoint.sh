#!/bin/bash
# What the stacks use of the published image's entry point: POSTGRES_USER, _PASSWORD, _DB and their _FILE forms,
# /docker-entrypoint-initdb.d/*.{sh,sql} at the first start, becoming the user postgres when started as root.
set -Eeuo pipefail

from_file() {
    local name="$1" file_name="${1}_FILE"
    if [ -n "${!file_name:-}" ]; then
        export "$name"="$(<"${!file_name}")"
    fi
}

if [ "${1:0:1}" = - ]; then
    set -- postgres "$@"
fi
if [ "$1" != postgres ]; then
    exec "$@"
fi
if [ "$(id -u)" = 0 ]; then
    mkdir -p "$PGDATA"
    chmod 700 "$PGDATA"
    find "$PGDATA" \! -user postgres -exec chown postgres '{}' +
    exec setpriv --reuid postgres --regid postgres --init-groups "$0" "$@"
fi
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    from_file POSTGRES_PASSWORD
    from_file POSTGRES_USER
    from_file POSTGRES_DB
    user="${POSTGRES_USER:-postgres}"
    if [ -z "${POSTGRES_PASSWORD:-}" ]; then
        echo 'error: POSTGRES_PASSWORD or POSTGRES_PASSWORD_FILE must be set' >&2
        exit 1
    fi
    initdb --username="$user" --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD") --auth-host=scram-sha-256 \
        --auth-local=trust
    printf '\nhost all all all scram-sha-256\n' >> "$PGDATA/pg_hba.conf"
    pg_ctl --pgdata="$PGDATA" --options="-c listen_addresses=''" --wait start
    database="${POSTGRES_DB:-$user}"
    if [ "$database" != postgres ]; then
        createdb --username="$user" "$database"
    fi
    for file in /docker-entrypoint-initdb.d/*; do
        case "$file" in
            *.sql) psql --set=ON_ERROR_STOP=1 --username="$user" --dbname="$database" --file="$file" ;;
            *.sh) bash "$file" ;;
        esac
    done
    pg_ctl --pgdata="$PGDATA" --mode=fast --wait stop
    unset POSTGRES_PASSWORD
fi
exec "$@" -c listen_addresses='*'
