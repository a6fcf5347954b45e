#!/usr/bin/env bash
# Give freed memory back to torch, not to the system: on a CPU a fifth faster, as no page is faulted in twice.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec python3 "$here/../common/recipe.py" "$here" "$@"
