#!/usr/bin/env bash
# The inner loop: lint, types, sentences, the picture of imports, and the unit tests that start no
# process and wait for nothing. Runs all of them whatever fails. Arguments go to pytest.
#
# Left out, and part of `make test`: real servers, the simulator's tests, and the unit tests that
# TIMED in test/conftest.py names (processes, ports, the router's connections).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The folders that `make lint` reads too: the Makefile has the one list.
read -ra checked <<<"${CHECKED:?not set: run it by make check}"

python=.venv/bin/python failed=()
check() {
    local name=$1
    shift
    "$@" || failed+=("$name")
}

check "ruff" $python -m ruff check -q "${checked[@]}"
check "ruff format" $python -m ruff format -q --check "${checked[@]}"
check "mypy" $python -m mypy
check "english" $python scripts/english.py
check "imports" $python scripts/import_picture.py
check "unit tests" $python -m pytest -q -n 2 --dist worksteal --part pure test/unit "$@"

if ((${#failed[@]})); then
    printf 'check failed: %s\n' "$(IFS=,; echo "${failed[*]}")" >&2
    exit 1
fi
echo "check passed in $SECONDS s"
