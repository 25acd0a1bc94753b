"""Signs in what a run learns: losses, gradients and the learning rate. Thresholds are the plan's guards.

The figures have noise: a sign is believed where it stands well outside what the run's own lines scatter.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from statistics import median

from sft_recipes.config import sizes
from sft_recipes.config.schema import CONVERGED_ACCURACY
from sft_recipes.monitor import advice, stats
from sft_recipes.monitor.advice import Finding
from sft_recipes.monitor.metrics_log import Points, Run, number

LEAST_LOSS = 0.1  # nats a token: what moves by less is no spike and no rise, and what is below has nothing to learn
FAR = 3.0  # times a learning rate is beyond its size row: no longer a choice, but a slip
STRANGER_LOSS = 4.0  # nats a token: a model that knows its language is below


def divergence(run: Run) -> Finding | None:
    """Loss or gradient norm is no number, or the loss rose and did not come back."""
    places: list[str] = []
    broken = _not_a_number(run)
    if run.state == "diverged":
        told = run.manifest.get("diverged") or {}
        figures = f"loss {told.get('loss', '?')}, gradient norm {told.get('grad_norm', '?')}"
        step, places = told.get("step"), told.get("rows") or []
        evidence = f"the run stopped itself: {told.get('what', 'a loss that is no number')} ({figures})"
        evidence += f"; the rows of that step: {', '.join(map(str, places[:5]))}" if places else ""
    else:
        step, evidence = broken or _risen(run)
    if step is None and run.state != "diverged":
        return None
    steps = [advice.rate(run, 1 / 3), advice.rows(run, places)]
    return Finding("divergence", "red", step, evidence, steps[::-1] if places else steps)


def _not_a_number(run: Run) -> tuple[int, str] | None:
    for line in run.training + run.validation:
        for key in ("loss", "grad_norm", "eval_loss"):
            value = number(line.get(key))
            if value is not None and not math.isfinite(value):
                return line["step"], f"{key} is {value}"
    return None


def _risen(run: Run) -> tuple[int | None, str]:
    """Since when the loss has risen for good; above its own lowest, or above where it began."""
    points = run.points("loss")
    losses = stats.values(points)
    if len(losses) < 6:
        return None, ""
    width = _width(losses)
    smoothed = stats.smooth(losses, width)
    end, lowest = smoothed[-1], min(smoothed)
    if end - lowest > _believable_rise(losses, width, lowest):
        step = points[smoothed.index(lowest) + width - 1][0]
        return step, f"training loss rose from {lowest:.3g} to {end:.3g} and did not come back"
    begin = losses[0]
    if end - begin > max(LEAST_LOSS, begin * max(0.3, 6 * stats.noise(losses))):
        return points[0][0], f"training loss began at {begin:.3g} and stays at {end:.3g}"
    return None, ""


def _width(losses: Sequence[float]) -> int:
    """Lines to smooth over: a tenth of the run."""
    return min(max(len(losses) // 10, 5 if len(losses) >= 10 else 3), 50)


def _believable_rise(losses: Sequence[float], width: int, level: float) -> float:
    """What a smoothed loss has to rise by, in nats: six of its standard deviations, as the lowest of many is low."""
    return max(LEAST_LOSS, level * max(0.15, 6 * stats.of_median(stats.noise(losses), width)))


def instability(run: Run) -> Finding | None:
    """Several spikes, a hump, or gradients that explode."""
    spikes = stats.episodes([*_spikes(run), *run.warned("loss_spike")], max(run.monitor.window, _interval(run)))
    signs = []
    if len(spikes) >= max(3, run.last_step / 3000):
        signs.append((spikes[0], f"the loss spiked {len(spikes)} times (steps {_few(spikes)})"))
    high = _above_for_long(run)
    if high is not None:
        signs.append((high, f"the gradient norm stays above {run.monitor.grad_norm_above:g} from step {high}"))
    hump = _hump(run)
    if hump is not None:
        signs.append((hump, f"the training loss rose from step {hump} and came back later"))
    times = _beyond_its_row(run)
    if times >= FAR:
        signs.append((1, f"the learning rate is {times:.0f} times the highest of row {run.plan['size']}"))
    if not signs:
        return None
    lower = advice.rate_of_the_row(run) if times > 1 else advice.rate(run, 1 / 2)
    return Finding(
        "instability",
        "yellow" if len(signs) == 1 and FAR <= times < 3 * FAR else "red",
        min(step for step, _ in signs),
        "; ".join(said for _, said in signs),
        [lower, *advice.longer_warmup(run), advice.rows(run)],
    )


def _beyond_its_row(run: Run) -> float:
    """How many times the learning rate is above the highest of its size row, or below the lowest (then below 1); 1
    within the row, and where nearly every token is right already."""
    row, rate = sizes.size_classes().get(str(run.plan.get("size"))), run.plan.get("learning_rate")
    right = stats.values(run.points("mean_token_accuracy"))[-3:]
    if row is None or not isinstance(rate, (int, float)) or (right and median(right) > CONVERGED_ACCURACY):
        return 1.0
    least, most = row.cells["learning_rate"].range or (rate, rate)
    return max(rate / most, 1.0) if rate >= least else rate / least


def _spikes(run: Run) -> list[int]:
    """Lines whose loss stands out of the twenty before them. A line is a mean of steps, so it shows large spikes."""
    points, found = run.points("loss"), []
    losses = stats.values(points)
    for place in range(8, len(losses)):
        before = losses[max(0, place - 20) : place]
        middle = median(before)
        deviation = stats.ROBUST * median([abs(loss - middle) for loss in before])
        if losses[place] - middle > max(LEAST_LOSS, middle / 4, run.monitor.loss_spike * deviation):
            found.append(points[place][0])
    return found


def _above_for_long(run: Run) -> int | None:
    """The step from which the gradient norm was high on neighbouring lines, or on every tenth.

    A model that begins with norms near the limit is not one whose gradients explode: they have to have grown, or to be
    far above it.
    """
    points = run.points("grad_norm")
    begin = median(stats.values(points)[:3]) if points else 0.0
    limit = max(run.monitor.grad_norm_above, min(2 * begin, 3 * run.monitor.grad_norm_above))
    long = _long(run, stats.stretches(points, lambda norm: norm > limit))
    high = [step for step, norm in points if norm > limit]
    starts = [*long, *high[:1]] if len(high) >= max(5, len(points) / 10) else long
    unusual = begin <= run.monitor.grad_norm_above / 2
    return min([*starts, *(run.warned("exploding_gradients") if unusual else [])], default=None)


def _long(run: Run, found: list[Points]) -> list[int]:
    """Where stretches begin that have three lines and the guards' window of steps."""
    return [part[0][0] for part in found if len(part) >= 3 and part[-1][0] - part[0][0] >= run.monitor.window]


def _hump(run: Run) -> int | None:
    points = run.points("loss")
    losses = stats.values(points)
    if len(losses) < 20:
        return None
    width = _width(losses)
    smoothed = stats.smooth(losses, width)
    lowest = list(itertools.accumulate(smoothed, min))
    spread = 8 * stats.of_median(stats.noise(losses), width)  # the highest of many windows over the lowest of many
    for place, (here, low) in enumerate(zip(smoothed, lowest, strict=True)):
        if here - low > max(LEAST_LOSS, low * max(0.15, spread)):
            return points[place][0]
    return None


def vanishing_gradients(run: Run) -> Finding | None:
    """Gradients so small that no weight moves."""
    limit = run.monitor.grad_norm_below
    low = _long(run, stats.stretches(run.points("grad_norm"), lambda norm: norm < limit))
    starts = [*low, *run.warned("vanishing_gradients")]
    if not starts:
        return None
    return Finding(
        "vanishing_gradients",
        "red",
        min(starts),
        f"the gradient norm stays below {limit:g} from step {min(starts)}: the weights do not move",
        [
            f"see that the loss looks at the assistant's words: `{advice.inspect(run)}`",
            f"see that weights are trained at all: trained_parameters is {run.plan.get('trained_parameters')}",
            "precision: bf16 with weights whose numbers it holds, or fp32 to tell rounding from a cut graph",
        ],
    )


def overfitting(run: Run) -> Finding | None:
    """Validation loss turns while training loss falls on; yellow where it has only stopped falling."""
    evaluations = run.points("eval_loss")
    losses = stats.values(evaluations)
    if len(losses) < 3 or len(run.points("loss")) < 3:
        return None
    best = losses.index(min(losses))
    rise, enough = _rise_from(losses, best)
    since, severity = (best, "red") if rise > enough else (len(losses) // 2, "yellow")
    if severity == "yellow" and not _stopped_falling(losses, since):
        return None
    trained = _trained_loss(run, evaluations)
    gap, gap_before = losses[-1] - trained[-1], losses[since] - trained[since]
    noise = stats.of_median(stats.noise(stats.values(run.points("loss"))), _lines_between(run)) * trained[since]
    noise *= 2 if severity == "red" else 4  # a rise is a second witness
    grown = gap - gap_before > run.monitor.overfitting_gap / (2 if severity == "red" else 1) + noise
    falling = trained[since] - trained[-1] > max(0.02 * trained[since], noise)
    if gap <= run.monitor.overfitting_gap or not grown or not falling:
        return None
    step, moved = evaluations[best][0], "rose" if severity == "red" else "went"
    kept = "final/" if run.state == "finished" else f"best-{step}/"
    return Finding(
        "overfitting",
        severity,
        step,
        f"validation loss {moved} from {losses[since]:.3g} (step {evaluations[since][0]}) to {losses[-1]:.3g}, "
        f"training loss fell from {trained[since]:.3g} to {trained[-1]:.3g}, the gap grew to {gap:.2g}; "
        f"{kept} is the best step, {step}",
        [
            f"{advice.rate(run, 1 / 2)}; up to three times lower",
            *advice.fewer_epochs(run, step),
            *advice.more_weight_decay(run),
            "more data, and more varied: data.train takes a list of sources",
        ],
    )


def _rise_from(losses: Sequence[float], best: int) -> tuple[float, float]:
    """How far validation is above its best at the end, and what it has to be: one evaluation has to say it louder."""
    after = losses[best + 1 :]
    share = 0.05 if len(after) < 2 else 0.02
    end = sum(after[-2:]) / 2 if len(after) >= 2 else losses[-1]
    return end - losses[best], max(share, share * losses[best], 4 * stats.zigzag(losses))


def _stopped_falling(losses: Sequence[float], middle: int) -> bool:
    if len(losses) < 6:
        return False
    return losses[middle] - min(losses[middle:]) <= max(0.01 * losses[middle], 2 * stats.zigzag(losses))


def _lines_between(run: Run) -> int:
    """Training lines to take for one evaluation: those since the last one, 3 to 20."""
    evaluations = run.points("eval_loss")
    return min(max(len(run.points("loss")) // max(len(evaluations), 1), 3), 20)


def _trained_loss(run: Run, evaluations: Points) -> list[float]:
    """The training loss around each evaluation: the median of the lines before it."""
    points, count = run.points("loss"), _lines_between(run)
    losses, steps = stats.values(points), [step for step, _ in points]
    ends = [max(bisect.bisect_right(steps, step), 1) for step, _ in evaluations]
    return [median(losses[max(0, end - count) : end]) for end in ends]


def plateau(run: Run) -> Finding | None:
    """The model does not learn: neither loss falls, or the learning rate is far below its row; and something is left
    to learn."""
    warmup, points = run.planned("warmup_steps") or 0, run.points("loss")
    after = [point for point in points if point[0] > warmup]
    losses = stats.values(after)
    if len(losses) < 3 or losses[-1] < LEAST_LOSS:
        return None
    begin, _, end = stats.blocks(losses, 3)
    said = f"since warm-up the training loss fell by {1 - end / max(begin, 1e-8):.1%}, from {begin:.3g} to {end:.3g}"
    look = f"or see that there is something to learn: `{advice.inspect(run)}`"
    times = _beyond_its_row(run)
    if times <= 1 / FAR:
        said += f"; the learning rate is {1 / times:.0f} times below the lowest of row {run.plan['size']}"
        severity = "yellow" if times > 1 / (3 * FAR) else "red"
        return Finding("plateau", severity, after[0][0], said, [advice.rate_of_the_row(run), look])
    if not _stands_still(run, after, warmup):
        return None
    return Finding("plateau", "red", after[0][0], said, [advice.rate(run, 2), look])


def _stands_still(run: Run, after: Points, warmup: int) -> bool:
    """Whether the loss behind the warm-up stays where it is, beyond doubt, and had not fallen before."""
    steps, losses = run.planned("optimizer_steps") or run.last_step, stats.values(after)
    if len(after) < 12 or after[-1][0] - after[0][0] < max(20, steps / 4):
        return False
    begin, _, end = stats.blocks(losses, 3)
    fall, part = 1 - end / max(begin, 1e-8), len(losses) // 3
    unsure = 2 * math.sqrt(2) * stats.of_median(stats.noise(losses), part)
    accuracy = stats.values(run.points("mean_token_accuracy"))[-part:]
    validation = stats.values(run.points("eval_loss"))
    moved = abs(1 - min(validation[1:]) / validation[0]) if len(validation) >= 4 and validation[0] > 0 else None
    return not (
        fall >= run.monitor.plateau
        or end < LEAST_LOSS
        or (accuracy and median(accuracy) > CONVERGED_ACCURACY)
        or (max(unsure, fall + unsure / 2) > run.monitor.plateau if moved is None else moved > run.monitor.plateau)
        or (
            _fall_since_the_first_line(run.points("loss"), warmup, end) > 2 * run.monitor.plateau
            and end < STRANGER_LOSS
        )
    )


def _fall_since_the_first_line(points: Points, warmup: int, end: float) -> float:
    """The share that the loss fell by since it began: a strong model learns most of it while it warms up."""
    early = [loss for step, loss in points if step <= warmup / 2]
    begin = median(early if len(early) >= 3 else [loss for _, loss in points[:3]])
    return 1 - end / max(begin, 1e-8)


def forgetting(run: Run) -> Finding | None:
    """The loss on retained rows is higher than before the first step."""
    points = run.points("eval_retention_loss")
    before, last = points[0][1], min(stats.values(points[-2:] if len(points) > 2 else points[-1:]))
    if last - before <= max(0.05, 0.05 * before):
        return None
    evaluations = run.points("eval_loss")
    best = min(evaluations, key=lambda point: point[1])[0] if evaluations else points[-1][0]
    there = dict(points).get(best, points[-1][1])
    since = next(step for step, loss in points if loss - before > max(0.05, 0.05 * before))
    return Finding(
        "forgetting",
        "red",
        since,
        f"the loss on the retained rows was {before:.3g} before, {there:.3g} at the best step {best}, "
        f"{points[-1][1]:.3g} at step {points[-1][0]}",
        [advice.rate(run, 1 / 2), *advice.fewer_epochs(run, since), *_keep_what_was_known(run)],
    )


def _keep_what_was_known(run: Run) -> list[str]:
    data, size = run.section("data"), str(run.plan.get("size"))
    train = data.get("train") or "YOUR_ROWS"
    kept = ", ".join(
        [*(train if isinstance(train, list) else [train]), str(data.get("retention_eval") or "RETAINED_ROWS")]
    )
    found = [f"`data.train: [{kept}]`, with rows that data.retention_eval does not have, so that it stays a measure"]
    if run.plan.get("method") == "full":
        row = f"lora-{size}" if f"lora-{size}" in sizes.size_classes() else "lora-…"
        found.append(f"LoRA, which learns less and forgets less: `size: {row}` and `lora: {{r: 16, alpha: 32}}`")
    return found


def schedule(run: Run) -> Finding | None:
    """The learning rate that was logged is not the plan's."""
    logged, peak = run.points("learning_rate"), run.planned("learning_rate")
    for step, rate in logged:
        planned = run.scheduled(step)
        # A cosine's end is a difference of nearly equal numbers, hence the second term.
        if planned is not None and abs(rate - planned) > 1e-6 * abs(planned) + 1e-9 * peak:
            highest = max(stats.values(logged))
            return Finding(
                "schedule",
                "red",
                step,
                f"the learning rate is {rate:.4g} at step {step} where the plan has {planned:.4g}; the highest logged "
                f"is {highest:.4g}, the plan's peak {peak:.4g} after {run.planned('warmup_steps')} of "
                f"{run.planned('optimizer_steps')} steps",
                [
                    "find what sets it besides the plan: a callback, an optimizer or a scheduler of your own",
                    f"the plan's curve: `make schedules RECIPE={run.plan.get('recipe')}`",
                ],
            )
    return None


def _interval(run: Run) -> int:
    """Steps between two log lines."""
    steps = [line["step"] for line in run.training]
    return int(median([after - before for before, after in itertools.pairwise(steps)])) if len(steps) > 1 else 1


def _few(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:5])) + (", …" if len(steps) > 5 else "")
