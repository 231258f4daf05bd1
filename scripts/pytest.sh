#!/usr/bin/env bash
# Runs pytest in .venv with the given arguments and passes its exit status through.
#
# The whole suite (the argument `test`) runs in two parts, each on two cores: what starts no SGLang
# server, then what does, two files at a time. Such a test waits for most of its time.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

others=() whole=no
for word in "$@"; do
    if [[ $word == test ]]; then whole=yes; else others+=("$word"); fi
done

run() { .venv/bin/python -m pytest -q "$@"; }

if [[ $whole == yes ]]; then
    run -n 2 --dist worksteal "${others[@]}" test/unit test/sim
    first=$?
    run -n 2 --dist loadfile --no-loadscope-reorder "${others[@]}" test/e2e test/fault
    status=$?
    # 5: no test of this part was asked for, of the other some were.
    if ((first != 0 && first != 5)) || ((status == 5)); then status=$first; fi
else
    run "$@"
    status=$?
fi
if ((status == 5)); then
    echo "pytest found no tests: that is a failure here" >&2
fi
exit "$status"
