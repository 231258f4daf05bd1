#!/usr/bin/env bash
# The old place of contrib/air_gapped/setup.sh; it works for one release.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../contrib/air_gapped/setup.sh" "$@"
