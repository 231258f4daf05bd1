#!/usr/bin/env bash
# Builds .venv: all it takes to run, test and demonstrate Kairos on a machine without a GPU.
#
# Safe to run at any time. With nothing to do it ends within a second; after a change of requirements
# it updates .venv in place; a .venv that is half built, damaged or moved it builds anew. Two runs at
# once wait for each other. pip uses whatever configuration this machine has.
#
#   KAIROS_PYTHON        the Python to build with (default: the first usable of python3.11, 3.12, 3.13, python3)
#   KAIROS_TORCH_INDEX   one more package index to look for torch in, such as one with CPU builds
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv LOG=out/bootstrap.log
readonly LOCK=requirements/constraints-cpu.txt NODEPS=requirements/cpu-nodeps.txt
# The oldest supported SGLang lies beside the newest, in a folder of its own: $VENV/sglang-0.5.16. The
# tests fetch one more; `kairos sglang VERSION` any.
readonly OLDEST=0.5.16 OTHERS=python/sglang_kairos/other_sglang.py
# Present while .venv may hold a half-installed package; what .venv was built from; what is in it.
readonly BUILDING=$VENV/.kairos-building STAMP=$VENV/.kairos-stamp FILES=$VENV/.kairos-files
readonly DEBIAN_PACKAGES="libibverbs1 librdmacm1 libnuma1"
readonly NEEDED_MB=5000 STEPS=8

export LC_ALL=C PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_USER

step=0 step_log_start=0

# One line: what failed. What to do.
fail() {
    printf 'bootstrap: %s\n' "$*" >&2
    exit 1
}

# run_step NAME COMMAND…: shows "[n/m] NAME … seconds"; the command's output goes to the log.
run_step() {
    local name=$1 start=$SECONDS
    shift
    step=$((step + 1))
    printf '[%d/%d] %s … ' "$step" "$STEPS" "$name"
    printf '\n===== [%d/%d] %s: %s\n' "$step" "$STEPS" "$name" "$*" >>"$LOG"
    step_log_start=$(wc -l <"$LOG")
    if ! "$@" >>"$LOG" 2>&1 </dev/null; then
        printf 'failed\n'
        fail "step $step of $STEPS ($name) failed: $(diagnosis) Log: $LOG"
    fi
    printf '%d s\n' "$((SECONDS - start))"
}

step_log() { tail -n "+$((step_log_start + 1))" "$LOG"; }

network_failed() {
    step_log | grep -E 'ConnectionError|NewConnectionError|[Tt]imed out|TimeoutError|name resolution|Connection (reset|refused|aborted)|IncompleteRead|IncompleteDownload|ProxyError|SSLError|50[0234] (Server|Client) Error|HTTP error 50[0234]|Remote end closed|Failed to fetch' >/dev/null
}

# The cause and the cure, from this step's log. Failures that cannot have left a package half
# installed also remove the mark, so that the next run goes on instead of starting anew.
diagnosis() {
    local missing cause
    missing=$(step_log | awk '
        /No matching distribution found for/ { sub(/.*found for /, ""); name = $1 }
        previous ~ /have no matching distributions available/ { name = $1 }
        { previous = $0 }
        END { print name }')
    missing=$(grep "^$missing==" "$LOCK" || echo "$missing")
    cause=$(step_log | grep -E 'ERROR|Error|error:|^E:' | tail -n 1 | cut -c1-240 || true)
    if step_log | grep 'No space left on device' >/dev/null; then
        echo "the disk is full. Free $NEEDED_MB MB and run again."
    elif network_failed; then
        rm -f "$BUILDING"
        echo "no connection to the package index, tried twice. Check the network and 'pip config list', then run again."
    elif [[ -n $missing ]]; then
        rm -f "$BUILDING"
        echo "pip's index has no $missing for $("$VENV/bin/python" -V). Name one that has it (PIP_EXTRA_INDEX_URL; for torch also KAIROS_TORCH_INDEX), then run again."
    else
        echo "${cause:-no message}. Run again; if it comes back, 'make distclean' first."
    fi
}

# Sets $python to one that can build the environment.
find_python() {
    local candidate found older="" bare=""
    for candidate in ${KAIROS_PYTHON:+"$KAIROS_PYTHON"} python3.11 python3.12 python3.13 python3 /usr/bin/python3; do
        found=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.version_info >= (3, 11), sys.executable)' 2>/dev/null) || found=""
        case $found in
        "") ;;
        *" True "*)
            python=${found#* True }
            "$python" -c 'import ensurepip, venv' 2>/dev/null && return
            bare=${found%% *}
            ;;
        *) older="${found%% *} (${found#* False })" ;;
        esac
        [[ -z ${KAIROS_PYTHON:-} ]] || fail "KAIROS_PYTHON=$KAIROS_PYTHON is no Python 3.11 or newer with its venv module. Set it to one, or unset it."
    done
    [[ -z $bare ]] || fail "Python $bare is here without its venv module. Install it (Debian, Ubuntu: apt-get install python$bare-venv) or set KAIROS_PYTHON=/path/to/python3.11."
    fail "needs Python 3.11 or newer, found ${older:-none}. Install one (Debian 12, Ubuntu 24.04: apt-get install python3-venv) or set KAIROS_PYTHON=/path/to/python3.11."
}

# What .venv is made from, and where: a virtual environment cannot be moved.
inputs() { cat pyproject.toml "$LOCK" "$NODEPS" "$OTHERS" scripts/bootstrap.sh | sha256sum; }
where() { printf 'at %s\n' "$PWD"; }

# Every installed file, caches and the start-up hook apart (`kairos cpu uninstall`).
list_files() {
    # shellcheck disable=SC2046
    (cd "$VENV" && find bin lib $(compgen -G 'sglang-*' || true) $(compgen -G beside || true) -name __pycache__ -prune -o \( -type f -o -type l \) ! -name kairos_cpu.pth -print) | sort
}

hook_file() { compgen -G "$VENV/lib/python3*/site-packages/kairos_cpu.pth" >/dev/null; }

# Sets $state to good, stale (an update in place will do) or the reason to build anew.
look() {
    local missing
    if [[ ! -e $VENV ]]; then
        state="there is none yet"
    elif [[ -e $BUILDING ]]; then
        state="the last build was cut off"
    elif ! "$VENV/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        state="its Python is broken or older than 3.11"
    elif [[ ! -e $STAMP || ! -e $FILES ]]; then
        state=stale
    elif ! grep -Fx "$(where)" "$STAMP" >/dev/null; then
        state="it was moved or copied here"
    else
        missing=$(list_files | comm -23 "$FILES" -)
        if [[ -n $missing ]]; then
            state="files are missing from it, such as ${missing%%$'\n'*}"
        elif ! grep -Fx "$(inputs)" "$STAMP" >/dev/null; then
            state=stale
        elif grep -x 'with the CPU hook' "$STAMP" >/dev/null && ! hook_file; then
            state=stale
        else
            state=good
        fi
    fi
}

check_disk() {
    local free
    free=$(df -Pm . | awk 'NR == 2 { print $4 }')
    ((free >= NEEDED_MB)) || fail "needs $NEEDED_MB MB of free disk here, there are $free. Free some and run again."
}

pip_get() {
    "$VENV/bin/python" -m pip install "$@" && return
    network_failed || return 1
    echo "===== the network failed: once more in 5 s"
    sleep 5
    "$VENV/bin/python" -m pip install "$@"
}

# Byte code is written as modules are first imported: of most of these 22,000 files that is never.
pip_install() { pip_get --no-compile -c "$LOCK" "$@"; }

install_oldest() {
    rm -rf "$VENV"/sglang-* "$VENV"/beside
    "$VENV/bin/python" -m sglang_kairos.other_sglang "$OLDEST"
}

make_venv() {
    if [[ $state != stale ]]; then
        find "$VENV" -mindepth 1 -maxdepth 1 ! -name "${BUILDING##*/}" -exec rm -rf {} + || return 1
        "$python" -m venv "$VENV" || return 1
    fi
    pip_install pip setuptools
}

# Mooncake loads these; its wheel does not bring them.
libraries_load() {
    "$VENV/bin/python" -c 'import ctypes; [ctypes.CDLL(name) for name in ("libibverbs.so.1", "librdmacm.so.1", "libnuma.so.1")]'
}

# shellcheck disable=SC2086
install_libraries() {
    libraries_load && return
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y --no-install-recommends $DEBIAN_PACKAGES && return
    apt-get update && apt-get install -y --no-install-recommends $DEBIAN_PACKAGES
}

check_libraries() {
    libraries_load 2>/dev/null && return
    if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
        rm -f "$BUILDING"
        fail "Mooncake needs system libraries. Run: sudo apt-get install -y $DEBIAN_PACKAGES (elsewhere: libibverbs, librdmacm and libnuma), then run again."
    fi
}

has_gpu() {
    "$VENV/bin/python" -c 'import sys; from sglang_kairos.cpu.runtime import cuda_present; sys.exit(not cuda_present())'
}

install_hook() {
    if has_gpu; then
        echo "there is a GPU: stock SGLang needs no help"
    else
        "$VENV/bin/python" -m sglang_kairos.cpu install
    fi
}

try_imports() {
    local modules="torch, mooncake.engine, sglang_kairos"
    hook_file && modules="$modules, torchvision, sglang_router, sglang.srt.entrypoints.http_server"
    "$VENV/bin/python" -c "import $modules"
}

seal() {
    list_files >"$FILES"
    {
        inputs
        where
        hook_file && echo "with the CPU hook"
        true
    } >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
    rm -f "$BUILDING"
}

mkdir -p out
if command -v flock >/dev/null; then
    exec 9>out/.bootstrap.lock
    flock -n 9 || {
        echo "bootstrap: another run is at work; waiting for it"
        flock 9
    }
fi

look
if [[ $state == good ]]; then
    echo "bootstrap: $VENV is up to date"
    exit 0
fi

trap 'printf "\nbootstrap: interrupted. Run again.\n" >&2; exit 130' INT TERM HUP
: >"$LOG"
if [[ $state == stale ]]; then
    echo "bootstrap: updating $VENV (details: $LOG)"
else
    find_python
    check_disk
    echo "bootstrap: building $VENV with $python: $state (some minutes; details: $LOG)"
    echo "bootstrap: should pip fetch a PyTorch with CUDA (GBs), KAIROS_TORCH_INDEX can name an index with CPU builds"
fi
mkdir -p "$VENV"
touch "$BUILDING"

run_step "Python environment" make_venv
check_libraries
run_step "system libraries of Mooncake" install_libraries
run_step "PyTorch" \
    pip_install ${KAIROS_TORCH_INDEX:+--extra-index-url "$KAIROS_TORCH_INDEX"} torch
run_step "Kairos and the packages of $LOCK" \
    pip_install --no-build-isolation -e '.[cpu,sim,dev]'
run_step "SGLang" pip_install --no-deps -r "$NODEPS"
run_step "SGLang, the oldest beside it" install_oldest
run_step "CPU runtime" install_hook
run_step "trial import" try_imports
seal
echo "bootstrap: $VENV is ready after $SECONDS s"
