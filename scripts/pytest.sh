#!/usr/bin/env bash
# Runs pytest in .venv with the given arguments and passes its exit status through.
#
# The whole suite (the argument `test`) runs in three parts: on two cores what starts no SGLang server,
# then what does, two files at a time (such a test waits for much of its time), and by themselves
# those that measure.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

measuring=test/e2e/test_profile.py
others=() whole=no
for word in "$@"; do
    if [[ $word == test ]]; then whole=yes; else others+=("$word"); fi
done

ran=no status=0
run() {
    .venv/bin/python -m pytest -q "$@"
    local ended=$?
    # 5: no test of this part was asked for; of another some were.
    if ((ended != 5)); then ran=yes; fi
    if ((ended != 5 && status == 0)); then status=$ended; fi
}

if [[ $whole == yes ]]; then
    run -n 2 --dist worksteal "${others[@]}" test/unit test/sim
    run -n 2 --dist loadfile --no-loadscope-reorder "${others[@]}" --ignore "$measuring" test/e2e test/fault
    run "${others[@]}" "$measuring"
else
    run "$@"
fi
if [[ $ran == no ]]; then
    echo "pytest found no tests: that is a failure here" >&2
    status=5
fi
exit "$status"
