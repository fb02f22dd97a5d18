#!/bin/sh
# Makes a virtual environment without pip and installs locks into it: wheels only, hashes checked.
# What no program needs at run time is left out: packages' own tests, debug symbols, headers, type stubs, and the
# sources of what is compiled. (Our own package keeps its sources: see install-source.sh.)
set -eu

venv="$1"
shift
export PIP_CACHE_DIR=/pip-cache
if [ -f /run/secrets/pip_ca ]; then
    export PIP_CERT=/run/secrets/pip_ca
fi
if [ -f /run/secrets/pip_conf ]; then
    export PIP_CONFIG_FILE=/run/secrets/pip_conf
fi
python3 -m venv --without-pip "$venv"
for lock in "$@"; do
    python3 -m pip --python "$venv/bin/python" --disable-pip-version-check install --quiet --no-compile \
        --only-binary :all: --require-hashes --requirement "$lock"
done

site="$(echo "$venv"/lib/python3*/site-packages)"
find "$site" -depth -type d \( -name tests -o -name test \) -exec rm -r {} +
find "$site" -depth -type d -path '*/apsw/sqlite_extra_binaries' -exec rm -r {} +
find "$site" -type f \( -name '*.pyi' -o -name '*.pxd' -o -name '*.pyx' -o -name '*.c' -o -name '*.h' -o -name '*.a' \) \
    -delete
# rich takes pygments along, whose 500 lexers nothing of ours asks for.
find "$site" -path '*/pygments/lexers/*' ! -name '__init__.py' ! -name '_mapping.py' ! -name 'python.py' \
    ! -name 'special.py' -delete
# What patchelf rewrote (libraries in *.libs folders, and modules that look for them there) strip would damage.
find "$site" -name '*.so' -not -path '*.libs/*' | while read -r library; do
    if ! readelf --dynamic "$library" | grep -q -E 'RPATH|RUNPATH'; then
        strip --strip-unneeded "$library"
    fi
done
# -b: beside where the source was, where Python takes it without one. Unchecked hashes make layers reproducible.
"$venv/bin/python" -m compileall -q -b -j 0 --invalidation-mode unchecked-hash "$site"
find "$site" -name '*.py' -delete
