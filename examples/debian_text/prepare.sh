#!/usr/bin/env bash
# Builds the Debian text corpus, English to one language, down to fairseq's data-bin folders.
#
#   examples/debian_text/prepare.sh [en TGT] [--out DIR] [--bpe-size N] [--fetch DIR] [--deb-dir DIR] ...
#
# Default: en de into examples/debian_text/data/en-de. `prepare.sh --help` lists all options.
# Runs in the active Python environment, the one in which ap-fairseq is installed. Finished steps are not repeated.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if ! command -v python3 >/dev/null; then
    echo "prepare.sh: error: no python3 on PATH; activate the environment in which ap-fairseq is installed" >&2
    exit 1
fi
exec python3 "$here/debian_text.py" "$@"
