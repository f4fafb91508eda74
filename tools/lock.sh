#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Writes requirements.lock anew from pyproject.toml, for every Python we support at once.
# Argument: a Python that can make virtual environments. Names no registry: the file is
# valid with whichever index the reader's pip is set up for.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: lock.sh PYTHON}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet uv==0.13.8
head -3 requirements.lock >"$scratch/lock"
"$scratch/venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --no-emit-find-links --no-annotate --no-header \
    --extra dev pyproject.toml >>"$scratch/lock"
cp "$scratch/lock" requirements.lock
