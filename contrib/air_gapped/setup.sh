#!/usr/bin/env bash
# Unpacks, installs and, once the parts that are needed are there, runs the benchmark. No network.
#   bash contrib/air_gapped/setup.sh PARTS_FOLDER INTO [arguments of benchmark.gpu.run …]
set -euo pipefail
parts=$1 into=$2
shift 2
python3 "$(dirname "${BASH_SOURCE[0]}")/install.py" "$parts" "$into"
if [[ ! -e $into/env.sh ]]; then
    exit 0
fi
. "$into/env.sh"
exec python3 -m benchmark.gpu.run "$@"
