#!/usr/bin/env bash
# Builds the corpus from English into many languages, down to fairseq's data-bin folders.
#
#   examples/libreoffice_one_to_many/prepare.sh [--languages TGT ...] [--out DIR] [--bpe-size N] [--deb-dir DIR] ...
#
# Default: 17 languages into examples/libreoffice_one_to_many/data/en-many. `prepare.sh --help` lists all options.
# Runs in the active Python environment, the one in which ap-fairseq is installed. Finished steps are not repeated.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if ! command -v python3 >/dev/null; then
    echo "prepare.sh: error: no python3 on PATH; activate the environment in which ap-fairseq is installed" >&2
    exit 1
fi
exec python3 "$here/one_to_many.py" "$@"
