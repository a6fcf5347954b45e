# Sourced by run.sh and prepare.sh of the examples, which run in the active Python environment.
if ! command -v python3 >/dev/null; then
    echo "${0##*/}: error: no python3 on PATH; activate the environment in which ap-fairseq is installed" >&2
    exit 1
fi
# Give freed memory back to torch, not to the system: on a CPU a fifth faster, as no page is faulted in twice.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
