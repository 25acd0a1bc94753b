#!/usr/bin/env bash
# All that only a GPU can tell, the most informative first, in pieces of under nine minutes each.
#
#     benchmarks/gpu.sh            # all pieces that are not done, one after the other
#     benchmarks/gpu.sh 3          # the next three
#     benchmarks/gpu.sh --list     # name, what it answers, state
#     benchmarks/gpu.sh NAME       # this one
#
# A piece's exit code and seconds are written to benchmarks/results/.gpu/NAME, its measurements to the JSON files of
# benchmarks/results. A piece is cut off after 530 s; one that failed is tried again by its NAME alone. How long each
# takes on a GPU is not measured: none of them has been run on one. PYTHON names another Python than .venv's; packages
# that it finds by PYTHONPATH are kept. PEERS is the folder of benchmarks/peers/install.sh; without it the comparisons
# have no peers. TMPDIR needs 40 GB for recipe 1b, and 80 GB for the comparisons with 8b-lora and its random weights;
# recipe 8b is planned for a GPU of 141 GB, and its pieces fail at once on a smaller one.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-.venv/bin/python}
export HF_HUB_OFFLINE=1 PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
done_in=benchmarks/results/.gpu
mkdir -p "$done_in"

command -v "$python" > /dev/null || {
    echo "error: gpu.sh: there is no $python; make setup, or name one with PYTHON=" >&2
    exit 2
}
export PYTHON=$python # docker/smoke.sh takes it too

pieces=() # NAME|QUESTION|COMMAND, in which python is $python|A CASE, which is one word of the command
add() { pieces+=("$1|$2|$3|${4:-}"); }
cases=$("$python" - "${PEERS:-}" << 'PYTHON'
import sys

sys.path[:0] = ["benchmarks", "."]
import bench, beside, memory

groups = {
    "bench": bench.cases(True), "ablations": bench.ablations(True), "memory": memory.cases(True),
    "beside": beside.installed(sys.argv[1]),
}
print(*(f"{group}|{name}" for group, names in groups.items() for name in names), sep="\n")
PYTHON
) || exit
each() { # PREFIX QUESTION COMMAND GROUP: a piece for each of the group's cases that has none yet
    local group case name one
    while IFS='|' read -r group case; do
        [ "$group" = "$4" ] || continue
        name=$1-${case//[ ,\']/_}
        for one in "${pieces[@]}"; do [ "${one%%|*}" != "$name" ] || continue 2; done
        add "$name" "$2" "$3" "$case"
    done <<< "$cases"
}
py() { echo "python benchmarks/$*"; }
memory='does the plan forecast the real peak of memory?'
speed='how fast is training (MFU), and what does it hold?'
bench=$(py bench.py --repeats 1)

# What decides whether anything else is worth running.
add doctor 'is the machine fit: driver, CUDA, flash-attn, links, disk?' 'python -m sft_recipes doctor --gpus 1'
add attention 'which attention implementations are right here, and how fast?' "$(py attention.py)"
add smoke 'does tiny train to the golden losses, resume, and answer?' 'docker/smoke.sh --no-container'
add first-run 'does 1b pass its sanity check, train, save and answer?' "$(py first_run.py)"
# One row of each kind, from the model that surely fits to the largest.
add memory-1b__4k__checkpointing "$memory" "$(py memory.py)" '1b, 4k, checkpointing'
add bench-1b__4k "$speed" "$bench" '1b, 4k'
add memory-8b-lora__4k__checkpointing "$memory" "$(py memory.py)" '8b-lora, 4k, checkpointing'
add bench-8b-lora__4k "$speed" "$bench" '8b-lora, 4k'
add memory-8b__4k__checkpointing "$memory" "$(py memory.py)" '8b, 4k, checkpointing'
add bench-8b__4k "$speed" "$bench" '8b, 4k'
add bench-1b__4k__activations_kept 'what does activation checkpointing cost?' "$bench" '1b, 4k, activations kept'
add step 'what does a step pay next to a minimal training loop?' "$(py metrics.py --device cuda 3)"
each ablation 'what does one knob cost or save?' "$(py bench.py --ablations --repeats 1)" ablations
for recipe in 1b 8b-lora; do
    each "beside-$recipe" 'how fast compared with other trainers?' \
        "$(py beside.py --rounds 1 --recipe $recipe ${PEERS:+--peers $PEERS})" beside
done
# The rest of each table.
each memory "$memory" "$(py memory.py)" memory
each bench "$speed" "$bench" bench
add saving 'what does a save cost next to a plain write?' "$(py saving.py --device cuda)"
for again in 2 3; do
    each "bench-$again" 'how much do repeats differ?' "$(py bench.py --repeats $again)" bench
done

case ${1:-} in --list) ;; *)
    "$python" -c 'import sys; from sft_recipes.launch.topology import gpu_type_of, visible_gpus; sys.exit(gpu_type_of(visible_gpus()) is None)' || {
        echo "error: gpu.sh: no GPU that is known is here, so nothing is measured; --list shows what there is" >&2
        exit 2
    } ;;
esac

piece() { # NAME|QUESTION|COMMAND|A CASE
    local name question words case began code command
    IFS='|' read -r name question words case <<< "$1"
    read -ra command <<< "$words"
    [ "${command[0]}" != python ] || command[0]=$python
    began=$SECONDS
    echo "== $name: $question"
    timeout --kill-after=20 530 "${command[@]}" ${case:+"$case"}
    code=$?
    echo "exit code $code after $((SECONDS - began)) s" | tee "$done_in/$name"
    return $code
}

case ${1:-} in
    --list)
        for one in "${pieces[@]}"; do
            IFS='|' read -r name question _ <<< "$one"
            printf '%-42s %-64s %s\n' "$name" "$question" "$(cat "$done_in/$name" 2> /dev/null || echo 'not done')"
        done ;;
    "" | [1-9] | [1-9][0-9])
        left=${1:-${#pieces[@]}} failed=0
        for one in "${pieces[@]}"; do
            [ "$left" -gt 0 ] || break
            [ ! -e "$done_in/${one%%|*}" ] || continue
            piece "$one" || failed=1
            left=$((left - 1))
        done
        exit "$failed" ;;
    *)
        for one in "${pieces[@]}"; do
            [ "${one%%|*}" != "$1" ] || { piece "$one"; exit; }
        done
        echo "error: gpu.sh: no piece $1; --list names them" >&2
        exit 2 ;;
esac
