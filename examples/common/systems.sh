#!/usr/bin/env bash
# The systems that the examples compare; sourced.

# masks_of NAME SHARE: the ap-masks flags of a system that prunes SHARE of the pairs.
masks_of() {
  local every=(--encoder-self "$2" --decoder-self "$2" --cross "$2")
  case $1 in
    importance) echo --total "$2" --criterion importance --smooth 32 ;;
    per-kind) echo "${every[@]}" ;;
    encoder_self) echo --encoder-self "$2" ;;
    decoder_self) echo --decoder-self "$2" ;;
    cross) echo --cross "$2" ;;
    random) echo "${every[@]}" --criterion random ;;
    window) echo "${every[@]}" --criterion window ;;
    percentile) echo "${every[@]}" --criterion percentile ;;
    all-kept) ;;
    *)
      echo "error: unknown system $1; known: importance per-kind encoder_self decoder_self cross random window percentile" \
        "all-kept" >&2
      return 2 ;;
  esac
}

# recorded_for SYSTEM...: the ap-record flags without which the masks of these systems cannot be made.
recorded_for() {
  case " $* " in
    *" importance "*) echo --importance ;;
  esac
}
