#!/usr/bin/env bash
# Installs the gateways that test/e2e/test_front_ends.py runs, each in an environment of its own below
# out/front-ends (KAIROS_FRONT_ENDS names another folder): their packages must not mix with SGLang's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${KAIROS_FRONT_ENDS:-out/front-ends}
for list in requirements/front-ends-*.txt; do
    name=${list#requirements/front-ends-}
    name=${name%.txt}
    place=$folder/$name
    if [[ -x $place/bin/$name ]] && cmp -s "$list" "$place/installed.txt"; then
        continue
    fi
    echo "installing $name into $place"
    "${PYTHON:-python3}" -m venv --clear "$place"
    "$place/bin/python" -m pip install -q --disable-pip-version-check -r "$list"
    cp "$list" "$place/installed.txt"
done
