#!/usr/bin/env bash
# Installs what tests need beside .venv, below out/, each only where it is not there yet:
#
#   scripts/beside.sh load-generators   an environment for each of requirements/load-generators-*.txt
#   scripts/beside.sh nixl              requirements/nixl.txt in a folder for PYTHONPATH
#
#   KAIROS_PYTHON_312   a Python ≥ 3.12 (default: python3.13, python3.12 or python3, or pyenv's)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'beside: %s\n' "$*" >&2
    exit 1
}

# A Python that inference-perf takes; the other two are content with it.
python_312() {
    local candidate
    for candidate in "${KAIROS_PYTHON_312:-}" python3.13 python3.12 python3 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23].*/bin/python; do
        if [[ -n $candidate ]] &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.12 or newer found; KAIROS_PYTHON_312=/path/to/python names one"
}

load_generators() {
    local pins name python=
    for pins in requirements/load-generators-*.txt; do
        name=${pins#requirements/load-generators-}
        name=out/load-generators/${name%.txt}
        cmp -s "$pins" "$name/pins.txt" && continue
        python=${python:-$(python_312)}
        printf 'installing %s in %s\n' "$(grep -v '^#' "$pins")" "$name"
        rm -rf "$name"
        "$python" -m venv "$name"
        "$name/bin/python" -m pip install -q --disable-pip-version-check -r "$pins"
        cp "$pins" "$name/pins.txt"
    done
}

nixl() {
    cmp -s requirements/nixl.txt out/nixl/pins.txt && return
    printf 'installing NIXL in out/nixl\n'
    rm -rf out/nixl
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --target out/nixl \
        -r requirements/nixl.txt
    cp requirements/nixl.txt out/nixl/pins.txt
}

case ${1:-} in
    load-generators) load_generators ;;
    nixl) nixl ;;
    *) fail "load-generators or nixl, got '${1:-}'" ;;
esac
