#!/usr/bin/env bash
# Runs pytest in .venv with the given arguments and passes its exit status through.
#
# The whole suite (the argument `test`) runs in three parts. First, on two cores, what has fake servers
# or waits for real time. Then what starts SGLang: two files at a time, since a pair leaves half of two
# cores idle. Beside that, in the time still left, what does not mind how slowly it runs; its report
# comes last. KAIROS_TEST_SERVER_FILES=1 runs the servers' files one after the other, for a slow or busy
# machine.
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
note() {
    # 2: interrupted, or a file cannot be read.
    if (($1 == 2)); then exit 2; fi
    # 5: no test of this part was asked for; of another some were.
    if (($1 != 5)); then ran=yes; fi
    if (($1 != 5 && status == 0)); then status=$1; fi
}

run() {
    .venv/bin/python -m pytest -q "$@"
    note $?
}

# Runs pytest with what is left of the machine, as the leader of a session of its own. Where Linux
# groups processes by session, it is the group's niceness that counts.
run_idle() {
    exec setsid bash -c '
        { echo 19 >/proc/self/autogroup; } 2>/dev/null
        exec nice -n 19 .venv/bin/python -m pytest -q "$@"' idle "$@"
}

if [[ $whole == yes ]]; then
    # shellcheck disable=SC2046
    .venv/bin/python -m sglang_kairos.other_sglang $(PYTHONPATH=test .venv/bin/python test/helpers/trees.py) || exit 1
    run -n 2 --dist worksteal --part timed "${others[@]}" test/unit "$fakes"

    report=$(mktemp)
    run_idle -n 2 --dist worksteal --part pure "${others[@]}" test/unit test/sim >"$report" 2>&1 &
    idle=$!
    trap 'if [[ -n $idle ]]; then kill -- "-$idle" 2>/dev/null; fi; rm -f "$report"' EXIT
    # A decode server takes a prefill server for dead that answers late this often; the default is 2.
    # On a busy machine that fails requests of stock SGLang too.
    export SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE=6
    run -n "${KAIROS_TEST_SERVER_FILES:-2}" --dist loadfile --no-loadscope-reorder "${others[@]}" --ignore "$fakes" test/e2e test/fault
    wait "$idle"
    ended=$? idle=
    cat "$report"
    note "$ended"
else
    run "$@"
fi
if [[ $ran == no ]]; then
    echo "pytest found no tests: that is a failure here" >&2
    status=5
fi
exit "$status"
