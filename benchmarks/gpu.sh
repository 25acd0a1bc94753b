#!/usr/bin/env bash
# All that is measured on a GPU, in pieces of under nine minutes: one piece, the next ones, or their list.
#
#     benchmarks/gpu.sh            # all pieces that are not done, one after the other
#     benchmarks/gpu.sh 3          # the next three
#     benchmarks/gpu.sh --list     # what is done, what is not
#     benchmarks/gpu.sh NAME       # this one
#
# A piece is done when benchmarks/results/.gpu/NAME says so; what it found is in the JSON files of benchmarks/results. A
# piece that fails or takes too long says so there, and is tried again by its NAME alone. PYTHON names another Python
# than that of .venv; PEERS the folder of benchmarks/peers/install.sh, without which there are none beside. TMPDIR wants
# 80 GB: random weights of 8B, and what the ways save that beside.py compares.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-.venv/bin/python}
export HF_HUB_OFFLINE=1 PYTHONPATH=.
done_in=benchmarks/results/.gpu
mkdir -p "$done_in"

command -v "$python" > /dev/null || {
    echo "error: gpu.sh: there is no $python; make setup, or name one with PYTHON=" >&2
    exit 2
}
pieces=(
    "doctor|-m sft_recipes doctor --gpus 1"
    "attention|benchmarks/attention.py"
    "step|benchmarks/metrics.py --device cuda 3"
    "saving|benchmarks/saving.py --device cuda"
)
of() { # MODULE CALL: the names of what it would measure
    "$python" -c "import sys; sys.path[:0] = ['benchmarks', '.']; import $1; print(*$1.$2, sep='\n')"
}
# Adds a piece for each name that a module has, which goes to the script as one word.
each() { # PREFIX WORDS MODULE CALL
    local names case
    names=$(of "${@:3}") || exit
    while IFS= read -r case; do pieces+=("$1-${case//[ ,\']/_}|$2|$case"); done <<< "$names"
}
each bench "benchmarks/bench.py --repeats 1" bench 'cases(True)'
each memory benchmarks/memory.py memory 'cases(True)'
each ablation "benchmarks/bench.py --ablations --repeats 1" bench 'ablations(True)'
for recipe in 1b 8b-lora; do
    each "beside-$recipe" "benchmarks/beside.py --rounds 1 --recipe $recipe ${PEERS:+--peers $PEERS}" \
        beside "installed('${PEERS:-}')"
done
for again in 2 3; do # from one run to the next a machine differs too
    each "bench-$again" "benchmarks/bench.py --repeats $again" bench 'cases(True)'
done

case ${1:-} in --list) ;; *)
    "$python" -c 'import sys; from sft_recipes.launching.topology import card_of, visible_gpus; sys.exit(card_of(visible_gpus()) is None)' || {
        echo "error: gpu.sh: no GPU that is known is here, so nothing is measured; --list shows what there is" >&2
        exit 2
    } ;;
esac

piece() { # NAME|WORDS|A CASE
    local name words case began
    IFS='|' read -r name words case <<< "$1"
    began=$SECONDS
    echo "== $name"
    # shellcheck disable=SC2086  # the words are ours, and several
    timeout --kill-after=20 530 "$python" $words ${case:+"$case"}
    local code=$?
    echo "$code after $((SECONDS - began)) s" | tee "$done_in/$name"
    return $code
}

case ${1:-} in
    --list)
        for one in "${pieces[@]}"; do
            printf '%-34s %s\n' "${one%%|*}" "$(cat "$done_in/${one%%|*}" 2> /dev/null || echo 'not done')"
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
