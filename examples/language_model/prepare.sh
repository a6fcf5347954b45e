#!/usr/bin/env bash
# Builds the text of the language models, down to fairseq's data-bin. `prepare.sh --help` lists all options.
# Runs in the active Python environment, the one in which ap-fairseq is installed. Finished steps are not repeated.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec python3 "$here/prepare.py" "$@"
