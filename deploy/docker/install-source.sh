#!/bin/sh
# Builds the wheel of this source, installs it into a virtual environment and copies what came with it into a folder.
set -eu

venv="$1"
package="$2"
/opt/build/bin/python -m hatchling build --target wheel --directory /tmp/wheel
python3 -m pip --python "$venv/bin/python" --disable-pip-version-check install --quiet --no-compile --no-index --no-deps \
    /tmp/wheel/*.whl
cd "$venv"
"$venv/bin/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash lib/python3*/site-packages/agentic_flow
mkdir -p "$package"
cp -r --parents bin/agentic-flow lib/python3*/site-packages/agentic_flow* "$package"
