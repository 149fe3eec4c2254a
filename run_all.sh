#!/usr/bin/env bash
# The one entry: finds or makes the Python environment, then runs a paper or the tests in it. See: bash run_all.sh help
set -euo pipefail

unset CDPATH
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
root=$PWD

papers() { # the papers that can be asked for, comma separated
    local file names=''
    for file in papers/*/paper.yaml; do
        [ ! -e "$file" ] || names+=", $(basename "$(dirname "$file")")"
    done
    echo "${names#, }"
}

usage() {
    cat <<EOF
Usage:
  bash run_all.sh paper=NAME [key=value ...]   a paper's tables and figures, into tables/NAME/SCALE/
  bash run_all.sh paper=NAME help              every key with its default, unit and allowed values
  bash run_all.sh tests [pytest arguments]     the test suite
  bash run_all.sh python [arguments]           the environment's Python, in the folder you are in
  bash run_all.sh help                         this text

Keys:
  paper      $(papers)
  scale      smoke (digits, minutes on two CPU cores), small (real images) or paper (published
             settings); default: paper where CUDA is there, else smoke
  only       cells to run, comma separated: table1, table1/imagenette/10, figure5a; default: all
  skip       cells to leave out, written as for only
  seeds      student seeds, comma separated: 0,1,2; default: those of the scale
  budget     start no cell after this time, cheapest cells first: 90s, 20m or 2h
  device     auto, cpu, cuda or cuda:N
  precision  auto (bf16 where the device has it, else fp32), bf16 or fp32
  data       root of the data sets; default: the environment variable DD_DATA
  out        where tables and figures are written; default: tables
  store      where trained networks and images are kept between runs; default: runs
  engine     local (this machine) or ray (also many machines; see docs/cluster.md)
  workers    stages at once on this machine; 0, the default: one, at smoke on a CPU one a core;
             with engine=ray as many as fit
  address    HOST:PORT of a running Ray cluster; default: one of this run's own, on this machine
  shared_store  false where the machines of a cluster share no folder: results then travel by Ray
  committed  true: where a paper tests the sets of another, those committed with its tables are
             read; false: distilled; default: true
  dry_run    true prints the plan and stops
  debug      true prints the whole traceback of an error

Environment:
  PYTHON     the Python to use, or to make .venv with; default: python3 where it satisfies
             requirements.txt, else .venv, made and filled on the first start
  DD_DATA    root of the data sets, where data= is not given
EOF
}

refuse() { # wrong usage: one sentence, what is allowed, status 2
    echo "run_all.sh: $1" >&2
    echo "See: bash run_all.sh help" >&2
    exit 2
}

absolute() { # a path of the caller, usable from the root of the repository
    case $1 in
        /* | '~'* | '' | none | null) echo "$1" ;;
        *) echo "$called_from/$1" ;;
    esac
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() { # sets $python to an interpreter that satisfies requirements.txt, making .venv where there is none
    local candidate base='' candidates=(python3 python)
    if [ -n "${PYTHON-}" ]; then
        case $PYTHON in */*) PYTHON=$(absolute "$PYTHON") ;; esac
        candidates=("$PYTHON")
        new_enough "$PYTHON" || { echo "run_all.sh: PYTHON=$PYTHON is no Python 3.10 or newer" >&2; exit 1; }
    fi
    for candidate in "${candidates[@]}" "$root/.venv/bin/python"; do
        if "$candidate" common/environment.py check >/dev/null 2>&1; then
            python=$candidate
            return
        fi
    done
    for candidate in "${candidates[@]}" python3.12 python3.11 python3.10; do
        if new_enough "$candidate"; then
            base=$candidate
            break
        fi
    done
    [ -n "$base" ] || { echo "run_all.sh: no Python 3.10 or newer was found; name one with PYTHON=..." >&2; exit 1; }
    "$base" common/environment.py make || exit
    python=$root/.venv/bin/python
}

keep_memory() { # glibc maps and unmaps large temporaries at every operation; keeping them is up to twice as fast
    [ "$(uname -s)" = Linux ] || return 0
    export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_-0}"
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_-1099511627776}"
}

prepare() { # sets $python and what it finds in its surroundings
    find_python
    keep_memory
    [ -z "${DD_DATA-}" ] || DD_DATA=$(absolute "$DD_DATA") # stays exported
}

run_paper() {
    local argument paper='' arguments=()
    for argument in "$@"; do
        case $argument in
            paper=*) paper=${argument#*=} ;;
            data=* | out=* | store=*) argument="${argument%%=*}=$(absolute "${argument#*=}")" ;;
        esac
        arguments+=("$argument")
    done
    [ -n "$paper" ] || refuse "paper= is missing; allowed: $(papers)"
    case ", $(papers), " in
        *", $paper, "*) ;;
        *) refuse "paper=$paper is unknown; allowed: $(papers)" ;;
    esac
    prepare
    exec "$python" -m papers.notebook "${arguments[@]}"
}

case ${1-} in
    help | --help | -h) usage ;;
    '') usage >&2; exit 2 ;;
    tests) prepare; exec "$python" -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "${@:2}" ;;
    python) # also `python -m common.datasets` from another folder
        prepare
        cd "$called_from"
        PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" "${@:2}"
        ;;
    *) run_paper "$@" ;;
esac
