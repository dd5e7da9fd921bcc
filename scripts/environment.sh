# Makes .venv in the repository and installs a requirements file into it; sourced by quickstart.sh and test.sh.
# Run again, it does nothing unless that file has changed. Needs bash and Python 3.10 to 3.13 with venv, nothing else.

find_python() {  # the first interpreter of a version that the pinned packages exist for; PYTHON=... chooses another
    local name
    for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: no Python 3.10 to 3.13 with the venv module is found. Install one (on Debian or Ubuntu:" >&2
    echo "apt install python3 python3-venv) or name it: PYTHON=/path/to/python bash $0" >&2
    return 1
}

make_environment() {  # make_environment requirements.txt
    local python stamp start=$SECONDS
    stamp=".venv/installed-$(cat requirements*.txt | cksum | cut -d' ' -f1)-$1"
    [ -f "$stamp" ] && return
    python=$(find_python)
    echo "== environment: .venv with $1 (once, a few minutes)"
    # one that was killed while it was made has a Python and no pip, or half of it
    if ! ls .venv/made .venv/installed-* >/dev/null 2>&1 || ! .venv/bin/python -c '' 2>/dev/null; then
        rm -rf .venv
        "$python" -m venv .venv
        touch .venv/made
    fi
    .venv/bin/python -m pip install --disable-pip-version-check --quiet -r "$1"
    touch "$stamp"
    echo "environment: $((SECONDS - start)) s"
}
