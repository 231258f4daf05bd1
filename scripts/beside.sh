#!/usr/bin/env bash
# Installs what tests need beside .venv, below out/, each only where it is not there yet:
#
#   scripts/beside.sh load-generators   an environment for each of requirements/load-generators-*.txt
#   scripts/beside.sh front-ends        an environment for each of requirements/front-ends-*.txt
#   scripts/beside.sh nixl              requirements/nixl.txt in a folder for PYTHONPATH
#   scripts/beside.sh dynamo            requirements/dynamo.txt likewise, and the SGLang that it pins
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

# environments KIND PYTHON: PYTHON is a command that prints which one to build with.
environments() {
    local pins name python=
    for pins in requirements/"$1"-*.txt; do
        name=out/$1/$(basename "${pins#requirements/"$1"-}" .txt)
        cmp -s "$pins" "$name/pins.txt" && continue
        python=${python:-$($2)}
        printf 'installing %s in %s\n' "$(grep -v '^#' "$pins" | paste -sd ' ')" "$name"
        rm -rf "$name"
        "$python" -m venv "$name"
        "$name/bin/python" -m pip install -q --disable-pip-version-check -r "$pins"
        cp "$pins" "$name/pins.txt"
    done
}

own_python() { printf '.venv/bin/python\n'; }

# folder NAME: what is pinned, and nothing of what it declares, in out/NAME.
folder() {
    cmp -s "requirements/$1.txt" "out/$1/pins.txt" && return
    printf 'installing requirements/%s.txt in out/%s\n' "$1" "$1"
    rm -rf "out/$1"
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --target "out/$1" \
        -r "requirements/$1.txt"
    cp "requirements/$1.txt" "out/$1/pins.txt"
}

case ${1:-} in
    load-generators) environments load-generators python_312 ;;
    front-ends) environments front-ends own_python ;;
    nixl) folder nixl ;;
    dynamo)
        folder dynamo
        .venv/bin/python -m sglang_kairos.other_sglang 0.5.21
        ;;
    *) fail "load-generators, front-ends, nixl or dynamo, got '${1:-}'" ;;
esac
