#!/bin/sh
# Signs images in their registry with a key, and verifies them; by cosign, without a transparency log, so offline too.
#
#   scripts/sign.sh keys                                       writes cosign.key (secret) and cosign.pub
#   scripts/sign.sh sign cosign.key IMAGE@sha256:… [BILL…]     signs a digest, attaches bills of materials
#   scripts/sign.sh verify cosign.pub IMAGE@sha256:…           exit code 0 only if the image is signed with that key
#   scripts/sign.sh bill cosign.pub IMAGE@sha256:… KIND        the same, and prints its bill: spdxjson or cyclonedx
#
# COSIGN_PASSWORD is the password of the key. Only digests are taken: what a tag names may change meanwhile.
set -eu

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

digest_only() {
    case "$1" in
        *@sha256:*) ;;
        *)
            echo "error: '$1' names no digest; see docker inspect --format '{{index .RepoDigests 0}}' IMAGE" >&2
            exit 2
            ;;
    esac
}

command -v cosign > /dev/null || {
    echo "error: cosign is not installed; Debian's newer suites and its own releases have it" >&2
    exit 1
}
[ $# -ge 1 ] || usage
action="$1"
shift

work="$(mktemp -d)"
trap 'rm -r "$work"' EXIT
case "$action" in
    keys)
        cosign generate-key-pair
        ;;
    sign)
        [ $# -ge 2 ] || usage
        key="$1" image="$2"
        shift 2
        digest_only "$image"
        cosign signing-config create --out "$work/services.json" # none: no log, no time stamp
        cosign sign --yes --key "$key" --signing-config "$work/services.json" "$image"
        for bill in "$@"; do
            case "$bill" in
                *.spdx.json) kind=spdxjson ;;
                *.cdx.json) kind=cyclonedx ;;
                *)
                    echo "error: '$bill' is no bill of materials: *.spdx.json or *.cdx.json" >&2
                    exit 2
                    ;;
            esac
            cosign attest --yes --key "$key" --signing-config "$work/services.json" --type "$kind" --predicate "$bill" \
                "$image"
        done
        ;;
    verify)
        [ $# -eq 2 ] || usage
        digest_only "$2"
        cosign verify --key "$1" --insecure-ignore-tlog=true "$2" > /dev/null
        echo "signed: $2"
        ;;
    bill)
        [ $# -eq 3 ] || usage
        digest_only "$2"
        cosign verify-attestation --key "$1" --insecure-ignore-tlog=true --type "$3" "$2" > "$work/attested.json"
        python3 - "$work/attested.json" << 'END'
import base64, json, sys
envelope = json.loads(open(sys.argv[1], encoding="utf-8").readline())
print(json.dumps(json.loads(base64.b64decode(envelope["payload"]))["predicate"], indent=1))
END
        ;;
    *)
        usage
        ;;
esac
