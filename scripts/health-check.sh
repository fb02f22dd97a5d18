#!/bin/sh
# Health of a stack on a host without Python: containers, endpoints with retries, volumes, networks, use of resources.
# Needs sh, docker and curl. `agentic-flow doctor --stack` looks at more (who can reach whom, certificates, secrets).
#
#   scripts/health-check.sh [-d FOLDER] [-p PROJECT] [-n TRIES] [-u URL]...
#
# FOLDER is the stack's (certs/ca.crt in it is trusted), ./stack by default; URL a health route, such as
# https://localhost:3000/health/ready, by default those of ports 3000 and 9000. Exits with 1 when something is broken.
set -u

folder=stack project=agentic-flow tries=5 urls='' broken=0

usage() {
    echo "usage: $0 [-d FOLDER] [-p PROJECT] [-n TRIES] [-u URL]..." >&2
    exit 2
}

while getopts d:p:n:u: option; do
    case $option in
        d) folder=$OPTARG ;;
        p) project=$OPTARG ;;
        n) tries=$OPTARG ;;
        u) urls="$urls $OPTARG" ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -eq 0 ] || usage
[ -n "$urls" ] || urls='https://localhost:3000/health/ready https://localhost:9000/health/ready'

ok() { printf 'ok      %s\n' "$*"; }
bad() {
    printf 'broken  %s\n' "$*"
    broken=$((broken + 1))
}

for program in docker curl; do
    command -v "$program" >/dev/null 2>&1 || {
        echo "$program is not here" >&2
        exit 2
    }
done

if ! version=$(docker version --format '{{.Server.Version}}' 2>&1); then
    bad "engine: $version"
    exit 1
fi
ok "engine $version"

label="label=com.docker.compose.project=$project"
ids=$(docker ps --all --quiet --filter "$label")
[ -n "$ids" ] || bad "containers: none of the project $project"
for id in $ids; do
    line=$(docker inspect --format \
        '{{.Name}} {{.State.Status}} {{if .State.Health}}{{.State.Health.Status}}{{else}}-{{end}} {{.RestartCount}}' "$id") || continue
    # shellcheck disable=SC2086 # four words
    set -- $line
    case "$2 $3" in
        'running healthy' | 'running -') ok "container ${1#/}: $2, health $3, restarts $4" ;;
        *) bad "container ${1#/}: $2, health $3, restarts $4" ;;
    esac
done

for url in $urls; do
    attempt=1
    while :; do
        if [ -f "$folder/certs/ca.crt" ]; then
            said=$(curl --silent --show-error --max-time 5 --output /dev/null --write-out '%{http_code}' \
                --cacert "$folder/certs/ca.crt" "$url" 2>&1)
        else
            said=$(curl --silent --show-error --max-time 5 --output /dev/null --write-out '%{http_code}' "$url" 2>&1)
        fi
        if [ "$said" = 200 ]; then
            ok "endpoint $url"
            break
        fi
        if [ "$attempt" -ge "$tries" ]; then
            bad "endpoint $url: $said ($tries tries)"
            break
        fi
        attempt=$((attempt + 1))
        sleep 1
    done
done

for kind in volume network; do
    found=$(docker "$kind" ls --quiet --filter "$label" | wc -l)
    if [ "$found" -gt 0 ]; then ok "$kind: $found"; else bad "$kind: none of the project $project"; fi
done

if [ -n "$ids" ]; then
    # shellcheck disable=SC2086 # a list of ids
    docker stats --no-stream --format 'use     {{.Name}}: {{.MemUsage}} ({{.MemPerc}}), CPU {{.CPUPerc}}' $ids
fi
df -Ph "$(docker info --format '{{.DockerRootDir}}')" 2>/dev/null | awk 'NR == 2 { print "disk    " $4 " free of " $2 }'

if [ "$broken" -gt 0 ]; then
    echo "$broken broken"
    exit 1
fi
echo 'nothing is broken'
