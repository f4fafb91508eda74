#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes $VENV from requirements.lock and installs the project into it, editable.
# What the system lacks is installed where we are root on Debian, and named otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

[ "$(uname -s)" = Linux ] && [ "$(uname -m)" = x86_64 ] ||
    die "optpoline runs on Linux on x86-64; this is $(uname -s) on $(uname -m)"
command -v "$PYTHON" >/dev/null || die "$PYTHON not found; install Python 3.11 or newer"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$("$PYTHON" -V) is too old: 3.11 or newer is needed, name one with make PYTHON=..."

missing=()
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
# The live tests and the demo compile C. The headers are a package of their own.
command -v gcc >/dev/null || missing+=(gcc)
command -v gcc >/dev/null && echo '#include <stdio.h>' | gcc -E - >/dev/null 2>&1 ||
    missing+=(libc6-dev)
# pip and apt speak TLS.
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)

if [ ${#missing[@]} -gt 0 ]; then
    line="apt-get install -y --no-install-recommends ${missing[*]}"
    command -v apt-get >/dev/null || die "missing: ${missing[*]} (Debian's names); install them"
    [ "$(id -u)" = 0 ] || die "missing: ${missing[*]}; as root run: $line"
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >&2 || say "apt-get update failed; trying with the lists that are there"
    $line -qq >&2 || die "could not install ${missing[*]}; as root run: $line"
fi

if ! "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "making $VENV with $("$PYTHON" -V)"
    "$PYTHON" -m venv --clear "$VENV"
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
say "installing the locked packages into $VENV"
"$VENV/bin/python" -m pip install --quiet --require-hashes --only-binary :all: -r requirements.lock
"$VENV/bin/python" -m pip install --quiet --no-deps --no-build-isolation --no-index --editable .
say "done: $VENV/bin/optpoline"
