#!/usr/bin/env bash
# Runs every script of findings/, one after the other, and sums up. Exit code 1 if one did not end as
# its head says. What each printed is in out/findings/.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PATH=$PWD/.venv/bin:$PATH # their python3 is the one that Kairos was built with
mkdir -p out/findings
passed=0 failed=0
for script in findings/*.sh; do
    name=$(basename "$script" .sh) log=out/findings/$(basename "$script" .sh).log began=$SECONDS
    if bash "$script" >"$log" 2>&1 </dev/null; then
        result=pass passed=$((passed + 1))
    else
        result=FAIL failed=$((failed + 1))
    fi
    printf '%s %4d s  %s\n' "$result" $((SECONDS - began)) "$name"
    if [[ $result == FAIL ]]; then tail -n 5 "$log" | sed 's/^/            /'; fi
done
printf '%d as described, %d not, %d s; logs in out/findings/\n' "$passed" "$failed" "$SECONDS"
((failed == 0))
