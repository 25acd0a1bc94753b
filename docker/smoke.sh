#!/usr/bin/env bash
# Proves an image before hours are spent in it. Run inside of it (`make smoke` does), by a user that is not root, with a
# root that cannot be written and no network:
#
#     docker/smoke.sh [--cpu] [--no-container] [--record]
#
# --cpu     leaves out what needs CUDA; the rest is the same
# --no-container  outside of an image, from a checkout: does not check that the process is confined, and trains under
#           zero3_offload only if the operator that it compiles can be (nvcc). PYTHON names the Python (default: python)
# --record  writes the losses of one process to docker/golden.json instead of comparing with it (a writable checkout)
#
# Says each step on standard error; one JSON object on standard output at the end; exit code 1 where a step failed.
# shellcheck disable=SC2329  # steps are called by their names
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cpu='' record='' confined=1 python=${PYTHON:-python}
for argument; do
    case $argument in
        --cpu) cpu=1 ;;
        --no-container) confined='' ;;
        --record) record=1 ;;
        *) echo "error: smoke.sh: unknown argument $argument; it takes --cpu and --no-container" >&2; exit 2 ;;
    esac
done
if [ -n "$cpu" ]; then
    gpus=0 engines=(single ddp zero2 zero3 fsdp2)
else
    gpus=$(nvidia-smi --list-gpus 2> /dev/null | grep -c . || true)
    [ "$gpus" -gt 0 ] || { echo "error: smoke.sh: no GPU here; give the container one, or say --cpu" >&2; exit 2; }
    engines=(single zero2)
    [ "$gpus" -eq 1 ] || engines+=(ddp zero1 zero3 fsdp2)
    [ -z "$confined" ] && ! command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" > /dev/null || engines+=(zero3_offload)
fi
[ -z "$record" ] || engines=(single)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export RUNS_DIR=$work/runs HF_HUB_OFFLINE=1 REPORT_TO=none SANITY=skip

# Twenty steps of the embedded recipe in bf16, the same rows and steps under every engine and number of ranks up to 8.
settings=(precision=bf16 batch.effective_batch_size=8 batch.max_per_device_batch_size=4 data.max_eval_samples=64
    trainer.max_steps=20 trainer.eval_steps=10 trainer.save_steps=5 trainer.logging_steps=1 generation.show=0
    generation.exact_match=0)

sft() { "$python" -m sft_recipes "$@"; }

words_of() { # ENGINE NAME: sets `words`, what starts that run
    words=(train tiny --name "$2" "parallelism=$1" "${settings[@]}")
    if [ "$1" = single ]; then
        words+=(--gpus "$((gpus > 0))")
    elif [ "$gpus" -eq 0 ]; then
        words+=(--gpus 0 --processes 2)
    else
        words+=(--gpus "$gpus")
    fi
}

confined() {
    [ "$(id -u)" -ne 0 ] || { echo "runs as root"; return 1; }
    ! touch /opt/sft-recipes/written 2> /dev/null || { echo "the root file system can be written"; return 1; }
    ! grep -qvE '^ *(lo:|Inter-|face )' /proc/net/dev || { echo "there is a network"; return 1; }
    echo "user $(id -u), root read-only, no network"
}

engine() { # ENGINE
    words_of "$1" "$1"
    sft "${words[@]}"
    "$python" "$here/smoke.py" compare "$RUNS_DIR/$1" "$here/golden.json"
}

# Killed outright behind its first save, and started again: it ends as the run did that was not.
kill_and_resume() {
    words_of single killed
    "$python" -m sft_recipes "${words[@]}" &
    until grep -qs '"step": 8,' "$RUNS_DIR/killed/metrics.jsonl"; do
        kill -0 $! || return 1
        sleep 0.1
    done
    kill -KILL $!
    wait $! 2> /dev/null || true
    sft "${words[@]}" | tee "$work/resumed"
    grep -q 'going on from checkpoint-' "$work/resumed"
    "$python" "$here/smoke.py" same "$RUNS_DIR/killed" "$RUNS_DIR/single"
}

generate() {
    local said
    said=$(sft generate single --prompt 'Reverse these digits: 2718')
    [ -n "$said" ] || { echo "final/ answers with nothing"; return 1; }
    printf 'answers, after 20 steps: %s\n' "${said//$'\n'/ }"
}

failed=0
step() { # NAME COMMAND…
    local name=$1 began=$SECONDS code=0 line
    shift
    # Not `"$@" || …`, which would have bash go on behind a command that fails inside of it.
    set +e
    (set -euo pipefail; "$@") > "$work/log" 2>&1
    code=$?
    set -e
    line=$(grep --text -v '^ *$' "$work/log" | tail -n 1 || true)
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" $((SECONDS - began)) "$line" >> "$work/steps"
    if [ "$code" -eq 0 ]; then
        echo "PASS  $name  $line" >&2
    else
        failed=1
        echo "FAIL  $name  exit code $code" >&2
        tail -n 30 "$work/log" | sed 's/^/      /' >&2
    fi
}

if [ -n "$record" ]; then
    words_of single single
    sft "${words[@]}" >&2
    exec "$python" "$here/smoke.py" record "$RUNS_DIR/single" "$here/golden.json"
fi
[ -z "$confined" ] || step confined confined
step doctor sft doctor --gpus "$gpus"
[ -n "$cpu" ] || step attention "$python" "$here/smoke.py" attention
for one in "${engines[@]}"; do step "train: $one" engine "$one"; done
step kill-and-resume kill_and_resume
step generate generate
"$python" "$here/smoke.py" summary "$work/steps"
exit "$failed"
