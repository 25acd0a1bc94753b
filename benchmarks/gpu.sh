#!/usr/bin/env bash
# Runs the measurements that need a GPU, most informative first, in tasks of under nine minutes each.
#
#     benchmarks/gpu.sh            # all remaining tasks, sequentially
#     benchmarks/gpu.sh 3          # the next three
#     benchmarks/gpu.sh --list     # name, question, state
#     benchmarks/gpu.sh NAME       # one task
#
# Exit code and seconds of a task are written to benchmarks/results/.gpu/NAME, its measurements to the JSON files in
# benchmarks/results. A task is killed after 530 s; a failed one runs again only by its NAME. Durations on a GPU are not
# measured: no task has been run on one. PYTHON selects another Python than .venv's; PYTHONPATH is kept. BASELINES is the
# folder of benchmarks/baselines/install.sh; without it the comparisons have no other trainers. TMPDIR needs 40 GB for recipe
# 1b, and 80 GB for the comparisons with 8b-lora and its random weights; recipe 8b is planned for a GPU of 141 GB, and its
# tasks fail at once on a smaller one.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-.venv/bin/python}
export HF_HUB_OFFLINE=1 PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
state=benchmarks/results/.gpu
mkdir -p "$state"

command -v "$python" > /dev/null || {
    echo "error: gpu.sh: $python not found. Run make setup, or set PYTHON" >&2
    exit 2
}
export PYTHON=$python # for docker/smoke.sh too

tasks=() # NAME|QUESTION|COMMAND, in which python is $python|CASE, the last argument of the command
add() { tasks+=("$1|$2|$3|${4:-}"); }
cases=$("$python" - "${BASELINES:-}" << 'PYTHON'
import sys

sys.path[:0] = ["benchmarks", "."]
import bench, comparison, memory

groups = {
    "bench": bench.cases(True), "ablations": bench.ablations(True), "memory": memory.cases(True),
    "comparison": comparison.installed(sys.argv[1]),
}
print(*(f"{group}|{name}" for group, names in groups.items() for name in names), sep="\n")
PYTHON
) || exit
each() { # PREFIX QUESTION COMMAND GROUP: add a task for each case of the group that has none yet
    local group case name task
    while IFS='|' read -r group case; do
        [ "$group" = "$4" ] || continue
        name=$1-${case//[ ,\']/_}
        for task in "${tasks[@]}"; do [ "${task%%|*}" != "$name" ] || continue 2; done
        add "$name" "$2" "$3" "$case"
    done <<< "$cases"
}
py() { echo "python benchmarks/$*"; }
memory='does the plan forecast the real peak of memory?'
speed='how fast is training (MFU), and how much memory does it use?'
bench=$(py bench.py --repeats 1)

# First what the other tasks depend on.
add doctor 'can this machine train: driver, CUDA, flash-attn, all-reduce, disk?' 'python -m sft_recipes doctor --gpus 1'
add attention 'which attention implementations are correct, and how fast?' "$(py attention.py)"
add smoke 'does tiny train to the golden losses, resume, and generate?' 'docker/smoke.sh --no-container'
add first-run 'does 1b pass its sanity check, train, save and generate?' "$(py first_run.py)"
# One task of each kind, from the smallest model to the largest.
add memory-1b__4k__checkpointing "$memory" "$(py memory.py)" '1b, 4k, checkpointing'
add bench-1b__4k "$speed" "$bench" '1b, 4k'
add memory-8b-lora__4k__checkpointing "$memory" "$(py memory.py)" '8b-lora, 4k, checkpointing'
add bench-8b-lora__4k "$speed" "$bench" '8b-lora, 4k'
add memory-8b__4k__checkpointing "$memory" "$(py memory.py)" '8b, 4k, checkpointing'
add bench-8b__4k "$speed" "$bench" '8b, 4k'
add bench-1b__4k__activations_kept 'what does activation checkpointing cost?' "$bench" '1b, 4k, activations kept'
add step 'what does a step cost compared with a minimal training loop?' "$(py metrics.py --device cuda 3)"
each ablation 'what does one option cost or save?' "$(py bench.py --ablations --repeats 1)" ablations
for recipe in 1b 8b-lora; do
    each "comparison-$recipe" 'how fast compared with other trainers?' \
        "$(py comparison.py --rounds 1 --recipe $recipe ${BASELINES:+--baselines $BASELINES})" comparison
done
# The rest of each kind.
each memory "$memory" "$(py memory.py)" memory
each bench "$speed" "$bench" bench
add saving 'what does a save cost compared with a plain write?' "$(py saving.py --device cuda)"
for repeat in 2 3; do
    each "bench-$repeat" 'how much do repeats differ?' "$(py bench.py --repeats $repeat)" bench
done

case ${1:-} in --list) ;; *)
    "$python" -c 'import sys; from sft_recipes.launch.topology import gpu_type_of, visible_gpus; sys.exit(gpu_type_of(visible_gpus()) is None)' || {
        echo "error: gpu.sh: found no GPU. Use --list to print the tasks" >&2
        exit 2
    } ;;
esac

run_task() { # NAME|QUESTION|COMMAND|CASE
    local name question command_line case began code command
    IFS='|' read -r name question command_line case <<< "$1"
    read -ra command <<< "$command_line"
    [ "${command[0]}" != python ] || command[0]=$python
    began=$SECONDS
    echo "== $name: $question"
    timeout --kill-after=20 530 "${command[@]}" ${case:+"$case"}
    code=$?
    echo "exit code $code after $((SECONDS - began)) s" | tee "$state/$name"
    return $code
}

case ${1:-} in
    --list)
        for task in "${tasks[@]}"; do
            IFS='|' read -r name question _ <<< "$task"
            printf '%-42s %-64s %s\n' "$name" "$question" "$(cat "$state/$name" 2> /dev/null || echo 'not done')"
        done ;;
    "" | [1-9] | [1-9][0-9])
        left=${1:-${#tasks[@]}} failed=0
        for task in "${tasks[@]}"; do
            [ "$left" -gt 0 ] || break
            [ ! -e "$state/${task%%|*}" ] || continue
            run_task "$task" || failed=1
            left=$((left - 1))
        done
        exit "$failed" ;;
    *)
        for task in "${tasks[@]}"; do
            [ "${task%%|*}" != "$1" ] || { run_task "$task"; exit; }
        done
        echo "error: gpu.sh: no task $1. Use --list to print the tasks" >&2
        exit 2 ;;
esac
