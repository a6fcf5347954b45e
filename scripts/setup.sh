#!/usr/bin/env bash
# Makes the virtual environment .venv and installs the package with its development tools; quick when it is all there.
# Sourced by test.sh, and by quickstart.sh, which sets `extras` to nothing and so does without those tools.
# AP_PYTHON names another interpreter than python3 (3.11 or 3.12).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${AP_PYTHON:-python3}

"$python" - <<'PY' || exit 1
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f"ap-fairseq needs Python 3.11 or 3.12, for which ve-fairseq has wheels; {sys.executable} is "
             f"{sys.version.split()[0]}. Set AP_PYTHON=/path/to/python3.11.")
PY

if [ ! -e "$root/.venv/bin/activate" ]; then  # the last thing that venv writes: without ensurepip it stops before
  echo "setup: creating $root/.venv"
  "$python" -m venv --clear "$root/.venv"
fi
# shellcheck disable=SC1091
source "$root/.venv/bin/activate"

wanted=$(sha256sum "$root/setup.py" "${BASH_SOURCE[0]}" | sha256sum)
extras=${extras-[dev]}
if ! grep -qsF "$wanted $extras" "$root/.venv/ap-fairseq.installed"; then
  if ! command -v nvidia-smi >/dev/null && ! python -c 'import torch' 2>/dev/null; then
    echo "setup: no GPU here, installing torch 2.13.0 first: the CPU build, if pip's index has it"
    python -m pip install -q torch==2.13.0
  fi
  echo "setup: installing ap-fairseq"
  python -m pip install -q -e "$root$extras"
  # fairseq looks for a bare name, --user-dir ap_fairseq, beside itself; pip puts the package there unless it is editable.
  ln -sfn "$root/ap_fairseq" "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ap_fairseq"
  echo "$wanted $extras" > "$root/.venv/ap-fairseq.installed"
fi
