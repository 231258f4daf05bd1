#!/usr/bin/env bash
# Runs pytest in .venv with the given arguments and passes its exit status through.
#
# The whole suite (the argument `test`) runs in two parts: on two cores what starts no SGLang server,
# then, one after the other, what does. Two pairs at once starve each other on two cores: SGLang's
# decode servers then take a prefill server that answers late for dead, and fail its requests.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Chosen once: a run that goes past midnight must not draw twice.
export KAIROS_FLAGS_SEED=${KAIROS_FLAGS_SEED:-$(date +%Y%m%d)}

fakes=test/fault/test_router_faults.py
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
    # shellcheck disable=SC2046
    .venv/bin/python -m sglang_kairos.other_sglang $(PYTHONPATH=test .venv/bin/python test/helpers/trees.py) || exit 1
    run -n 2 --dist worksteal "${others[@]}" test/unit test/sim "$fakes"
    run "${others[@]}" --ignore "$fakes" test/e2e test/fault
else
    run "$@"
fi
if [[ $ran == no ]]; then
    echo "pytest found no tests: that is a failure here" >&2
    status=5
fi
exit "$status"
