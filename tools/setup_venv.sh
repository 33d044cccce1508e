# Sourced by demo.sh and test.sh: makes .venv in the repository and installs hpcdit into it, unless that was done.
# Needs: $root, the repository. Argument: the extras to install, for example "mpich,dev". Sets $python.

# shellcheck shell=bash
# shellcheck disable=SC2154  # root is set by the script that sources this file

fail() {
    echo "hpcdit: $1" >&2
    exit 2
}

find_python() { # Prints the path of a Python that is new enough, python3 itself if it is.
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

make_venv() {
    local base
    base=$(find_python) || fail "Python 3.11 or newer is missing (found: $(python3 --version 2>/dev/null || echo none)); install it first"
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "the venv module of $base is missing; on Debian and Ubuntu: apt install python3-venv"
    echo "making .venv with $base"
    "$base" -m venv --clear "$root/.venv"
}

setup_venv() { # EXTRAS
    local stamp want
    python=$root/.venv/bin/python
    stamp=$root/.venv/hpcdit-${1//,/-}.stamp
    "$python" -c 'import pip' 2>/dev/null || make_venv
    # All that decides what is installed: another interpreter, another place or other requirements install anew.
    want=$(cd "$root" && { "$python" -VV; pwd; cat setup.cfg pyproject.toml tools/constraints-cpu.txt; } | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        echo "installing hpcdit into .venv (the first time takes a minute or two)"
        "$python" -m pip install -qq --disable-pip-version-check --constraint "$root/tools/constraints-cpu.txt" \
            --editable "${root}[$1]" || fail "the installation failed, see above; start the same command again to retry"
        echo "$want" >"$stamp"
    fi
    PATH=$root/.venv/bin:$PATH
}

setup_venv "$1"
