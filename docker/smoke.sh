#!/usr/bin/env bash
# Tests an image in minutes. `make smoke` runs it inside the image, as a user other than root, with a read-only root file
# system and without network:
#
#     docker/smoke.sh [--cpu] [--no-container] [--record]
#
# --cpu           skip what needs CUDA
# --no-container  run from a checkout: skip the check of the confinement, and skip zero3_offload without nvcc, which
#                 compiles its operator. PYTHON selects the Python (default: python)
# --record        write the losses of one process to docker/golden.json instead of comparing (needs a writable checkout)
#
# Prints each step to standard error and, at the end, one JSON object to standard output. Exit code 1 if a step failed.
# shellcheck disable=SC2329  # steps are called by name
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cpu='' record='' confined=1 python=${PYTHON:-python}
for argument; do
    case $argument in
        --cpu) cpu=1 ;;
        --no-container) confined='' ;;
        --record) record=1 ;;
        *) echo "error: smoke.sh: unknown argument $argument, expected --cpu, --no-container or --record" >&2; exit 2 ;;
    esac
done
if [ -n "$cpu" ]; then
    gpus=0 strategies=(single ddp zero2 zero3 fsdp2)
else
    gpus=$(nvidia-smi --list-gpus 2> /dev/null | grep -c . || true)
    [ "$gpus" -gt 0 ] || { echo "error: smoke.sh: no GPU found. Give the container a GPU, or use --cpu" >&2; exit 2; }
    strategies=(single zero2)
    [ "$gpus" -eq 1 ] || strategies+=(ddp zero1 zero3 fsdp2)
    [ -z "$confined" ] && ! command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" > /dev/null || strategies+=(zero3_offload)
fi
[ -z "$record" ] || strategies=(single)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export RUNS_DIR=$work/runs HF_HUB_OFFLINE=1 REPORT_TO=none SANITY=skip

# Twenty steps of the built-in recipe, with the same rows and steps for every strategy and up to 8 ranks. In bf16, as on
# GPUs; with --cpu in fp32, since a CPU without AVX-512 emulates bf16, three times slower.
precision=bf16
[ -z "$cpu" ] || [ -n "$record" ] || precision=fp32
settings=("precision=$precision" batch.effective_batch_size=8 batch.max_per_device_batch_size=4 data.max_eval_samples=64
    trainer.max_steps=20 trainer.eval_steps=10 trainer.save_steps=5 trainer.logging_steps=1 generation.show=0
    generation.score=0)

sft() { "$python" -m sft_recipes "$@"; }

train_arguments() { # STRATEGY NAME: sets `arguments` of that run
    arguments=(train tiny --name "$2" "parallelism=$1" "${settings[@]}")
    if [ "$1" = single ]; then
        arguments+=(--gpus "$((gpus > 0))")
    elif [ "$gpus" -eq 0 ]; then
        arguments+=(--gpus 0 --processes 2)
    else
        arguments+=(--gpus "$gpus")
    fi
}

confined() {
    [ "$(id -u)" -ne 0 ] || { echo "runs as root"; return 1; }
    ! touch /opt/sft-recipes/written 2> /dev/null || { echo "the root file system is writable"; return 1; }
    ! grep -qvE '^ *(lo:|Inter-|face )' /proc/net/dev || { echo "the network is available"; return 1; }
    echo "user $(id -u), root read-only, no network"
}

train() { # STRATEGY
    train_arguments "$1" "$1"
    sft "${arguments[@]}"
    "$python" "$here/smoke.py" compare "$RUNS_DIR/$1" "$here/golden.json"
}

# Kill a run after its first save and resume it: its weights equal those of the uninterrupted run.
kill_and_resume() {
    train_arguments single killed
    "$python" -m sft_recipes "${arguments[@]}" &
    until grep -qs '"step": 8,' "$RUNS_DIR/killed/metrics.jsonl"; do
        kill -0 $! || return 1
        sleep 0.1
    done
    kill -KILL $!
    wait $! 2> /dev/null || true
    sft "${arguments[@]}" | tee "$work/resumed"
    grep -q 'from checkpoint-' "$work/resumed"
    "$python" "$here/smoke.py" compare_resumed "$RUNS_DIR/killed" "$RUNS_DIR/single"
}

generate() {
    local completion
    completion=$(sft generate single --prompt 'Reverse these digits: 2718')
    [ -n "$completion" ] || { echo "empty completion from final/"; return 1; }
    printf 'completion after 20 steps: %s\n' "${completion//$'\n'/ }"
}

failed=0
step() { # NAME COMMAND…
    local name=$1 began=$SECONDS code=0 line
    shift
    # Not `"$@" || …`: bash would then continue after a failing command inside of it.
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
    train_arguments single single
    sft "${arguments[@]}" >&2
    exec "$python" "$here/smoke.py" record "$RUNS_DIR/single" "$here/golden.json"
fi
[ -z "$confined" ] || step confined confined
step doctor sft doctor --gpus "$gpus"
[ -n "$cpu" ] || step attention "$python" "$here/smoke.py" attention
for strategy in "${strategies[@]}"; do step "train: $strategy" train "$strategy"; done
step kill-and-resume kill_and_resume
step generate generate
"$python" "$here/smoke.py" summary "$work/steps"
exit "$failed"
