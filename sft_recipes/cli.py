"""The command line: one table of commands, each a function that parses nothing else."""

import argparse
import contextlib
import dataclasses
import errno
import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sft_recipes.config import loader, model_recipe
from sft_recipes.config.schema import AUTO, Recipe
from sft_recipes.config.sizes import RECIPES
from sft_recipes.launch import launch, node_checks, placement, run_selection
from sft_recipes.launch import topology as topologies
from sft_recipes.monitor import diagnose, lr_plot, metrics_log, report
from sft_recipes.planner import lr_schedule, render, suggest
from sft_recipes.planner import plan as plans
from sft_recipes.planner.choose import Configuration
from sft_recipes.runtime import env, run_dir
from sft_recipes.runtime.atomic_write import write_atomic
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.log import to_console
from sft_recipes.runtime.units import GIB
from sft_recipes.tools import doctor, generate, publish, serve, status, verify_resume
from sft_recipes.tools import sweep as sweeps

log = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}. List the commands with `python -m sft_recipes --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (docs/reference.md)."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # an ASCII terminal still gets its line
    to_console()
    env.silence_telemetry()
    env.limit_thread_spin()
    try:
        parsed = _parse(arguments)
        return int(parsed.run_command(parsed) or 0)
    except UserError as error:
        log.error(" ".join(str(error).split()))
        return 2
    except BrokenPipeError:  # `… | head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        log.error(error)
        return 2 if error.errno in (errno.ENAMETOOLONG, errno.EACCES, errno.EROFS) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command. Its overrides get the `key=value` that argparse does not collect: those after the
    first option, and the first one where no recipe is named."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    unknown = [text for text in rest if "=" not in text or text.startswith("-") or not hasattr(parsed, "overrides")]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    if "=" in (getattr(parsed, "recipe", None) or ""):  # without a recipe the first override takes its place
        parsed.recipe, rest = None, [parsed.recipe, *rest]
    if rest:
        parsed.overrides += rest
    return parsed


_Argument = tuple[str, dict[str, Any]]  # name and options of `ArgumentParser.add_argument`


def _argument(name: str, help_text: str, **options: Any) -> _Argument:
    return name, {"help": help_text, **options}


def _flag(name: str, help_text: str) -> _Argument:
    return _argument(name, help_text, action="store_true")


def _integer(name: str, least: int, help_text: str, **options: Any) -> _Argument:
    variable = name.removeprefix("--").upper()
    return _argument(name, help_text, type=lambda text: placement.parse_integer(text, variable, least), **options)


def _gpu_counts(text: str) -> int | list[int]:
    counts = text.split(",")
    numbers = [placement.parse_integer(count, "GPUS", 1 if len(counts) > 1 else 0) for count in counts]
    return numbers if len(numbers) > 1 else numbers[0]


_RUN = _argument("run", "name or directory of a run")
_JSON = _flag("--json", "print JSON; for rows and checks one object per line")
_TASKS = _argument("--tasks", "tasks of lm-evaluation-harness; for eval `default` if not given", metavar="TASK,…")
_RECIPE = (
    _argument("recipe", "name of a recipe (`recipes` lists them); not needed with --model", nargs="?"),
    _argument("overrides", "a recipe key and its value: trainer.learning_rate=1.0e-5", nargs="*", metavar="key=value"),
    _argument("--model", "model to fine-tune, a Hub name or a folder: alone, or instead of the recipe's"),
    _argument(
        "--method",
        "with --model and without a recipe: full (default), lora or qlora",
        choices=("full", "lora", "qlora"),
    ),
)
_HARDWARE = (
    *_RECIPE,
    _argument("--gpus", "GPUs over all nodes; 0 is the CPU; for plan also 1,2,4", type=_gpu_counts, metavar="N"),
    _integer("--processes", 1, "ranks on the CPU, with --gpus 0", metavar="N"),
    _integer("--nodes", 1, "nodes", metavar="N"),
    _argument("--gpu-type", "GPU type (h100-80g, …: docs/models.md) or GiB of memory"),
)
_TRAINING = (
    *_HARDWARE,
    _argument("--init-from", "start a new run from the last weights of this finished one", metavar="NAME"),
    _flag("--overfit", "train and validate on eight rows; fail unless the loss approaches zero"),
)
_RUN_OPTIONS = (
    _argument("--name", "name of the run (default: RECIPE-N)"),
    _flag("--resume", "fail if there is no run to resume; ignore earlier attempts without progress"),
    _argument("--allow-change", "resume although these keys of the plan changed", default="", metavar="KEY,…"),
    _flag("--strict-versions", "fail if library versions differ from the last start"),
)


def commands() -> list[tuple[Any, ...]]:
    """Return all commands in the order of `--help`: name, one line of help, function, arguments."""
    return [
        ("recipes", "list the recipes", _list_recipes),
        (
            "recipe", "write recipes/NAME.yaml for a model, to edit", _write_recipe, *_HARDWARE,
            _argument("--name", "name of the recipe"),
        ),
        (
            "plan", "print every number of a run without starting it", _plan, *_TRAINING, _JSON,
            _flag("--explain", "print the source of each value"),
        ),
        (
            "inspect", "show tokenized rows with their loss mask, and what happened to all rows", _inspect, *_TRAINING,
            _integer("--rows", 1, "rows to show (default: 3; all with --json)", metavar="N"), _JSON,
        ),
        ("download", "download model, tokenizer and data of a recipe, tasks of `eval`", _download, *_RECIPE, _TASKS),
        ("sanity", "run the sanity check of a plan and cache its result", _sanity, *_TRAINING),
        (
            "train", "start a run, or resume an unfinished one of the same plan", _train, *_TRAINING,
            *_RUN_OPTIONS, _flag("--dry-run", "print the command that starts the ranks"),
        ),
        (
            "prepare", "prepare a run for `train` on several nodes: plan, data, folder", _prepare,
            *_TRAINING, *_RUN_OPTIONS,
        ),
        (
            "sweep", "compare values of a recipe key by short runs", _sweep, *_HARDWARE,
            _argument("--name", "name of the sweep (default: RECIPE-sweep-KEY)"),
            _argument("--lr", "learning rates (default: three over the size class's range)", metavar="LR,LR"),
            _argument("--values", "another key and its values: trainer.weight_decay=0.01,0.1", metavar="KEY=V,V"),
            _integer("--seeds", 1, "runs of each value (default: 1)", metavar="N", default=1),
            _argument("--fraction", "epochs of each run (default: 0.25)", type=float, default=0.25, metavar="X"),
            _flag("--keep", "keep the models of the runs"),
            _flag("--slurm", "submit the runs as a Slurm array"),
        ),
        ("status", "print state, latest metrics and remaining time of a run", _status, _RUN, _JSON),
        ("diagnose", "find problems of a run, with evidence and the change to make", _diagnose, _RUN, _JSON),
        ("report", "write an HTML report of a run", _report, _RUN),
        ("verify-resume", "prove bit for bit that a run resumes exactly", _verify_resume, _RUN),
        (
            "schedules", "print learning rates over the steps of a recipe or run", _schedules, *_HARDWARE,
            _argument("--run", "take plan and steps of this run"),
            _argument("--with", "schedules to compare with", dest="others", default="", metavar="NAME,…"),
            _argument("--plot", "write a .png or .svg", metavar="FILE"),
        ),
        (
            "generate", "generate completions with a trained model", _generate, _RUN,
            _argument("--prompt", "one prompt (default: one per line of standard input)"),
        ),
        ("merge", "merge LoRA adapters into their base model", _merge, _RUN),
        (
            "publish", "upload the model of a finished run to the Hub, with a model card", _publish, _RUN,
            _argument("--repo", "repository on the Hub: owner/name", metavar="OWNER/NAME"),
            _argument("--license", "license of a model whose base has no known one: an id of the Hub", metavar="ID"),
            _flag("--merged", "publish the merged model instead of the adapters"),
            _flag("--public", "create a public repository (default: private)"),
            _flag("--card-only", "write the model card, list what would be uploaded, upload nothing"),
        ),
        (
            "serve", "serve the model of a finished run on 127.0.0.1 with an OpenAI-compatible API", _serve, _RUN,
            _integer("--port", 1, "port (default: 8000)", default=8000, metavar="N"),
            _argument("--server-arguments", "more arguments of the server", default="", metavar="TEXT"),
        ),
        ("check-serving", "compare tokens and completions of a server with those of the run", _check_serving, _RUN),
        (
            "eval", "compare a run's trained and base model by lm-evaluation-harness", _eval, _RUN, _TASKS,
            _integer("--limit", 1, "items per task, for a trial", metavar="N"),
            _argument("--harness-args", "more arguments of `lm_eval run`", type=shlex.split, default=[], metavar="'…'"),
        ),
        (
            "doctor", "check this machine; exit code 1 on an error", _doctor, _JSON,
            _integer("--gpus", 0, "GPUs that a run would use", metavar="N"),
        ),
    ]  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(prog="sft_recipes", description="Supervised fine-tuning recipes", allow_abbrev=False)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for name, help_text, run_command, *arguments in commands():
        subparser = subparsers.add_parser(name, help=help_text, description=help_text)
        for argument, options in arguments:
            subparser.add_argument(argument, **options)
        subparser.set_defaults(run_command=run_command)
    return parser


def _recipe(parsed: argparse.Namespace, default_data: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe of the command, after tracing its model's layers if forecasts for GPUs need that."""
    from sft_recipes.data import model_trace
    from sft_recipes.planner import memory

    recipe, gpus = _read_recipe(parsed, default_data), getattr(parsed, "gpus", None)
    model, modes = recipe.model, memory.trace_modes(recipe.precision, recipe.lora)
    if (recipe.hardware.gpus if gpus is None else gpus) and model_trace.needs_trace(model.architecture, modes):
        name = model.name_or_path or recipe.name
        print(f"tracing the layers of {name} for the forecasts, once (some seconds)", file=sys.stderr, flush=True)
        if problem := model_trace.trace(model.architecture, modes):
            print(f"no forecast of memory and time: the layers cannot be traced ({problem})", file=sys.stderr)
    return recipe


def _read_recipe(parsed: argparse.Namespace, default_data: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe of RECIPE, of MODEL, or of RECIPE with the model of MODEL.

    Args:
        default_data: values of `data` for MODEL without DATA, which is rejected otherwise.
    """
    overfit = getattr(parsed, "overfit", False)
    if parsed.recipe and parsed.method:
        raise UserError(f"METHOD: found {parsed.method}, but RECIPE={parsed.recipe} has a method. Remove one")
    if parsed.model is None:
        if parsed.recipe is None:
            raise UserError("RECIPE: not set. Set RECIPE or MODEL")
        return loader.load(parsed.recipe, parsed.overrides, overfit)
    from sft_recipes.data import model_files

    facts, method = model_files.describe_model(parsed.model), parsed.method or "full"
    model_recipe.check_method(method, parsed.model, facts.quantization)
    if parsed.recipe is not None:
        values = {"model.name_or_path": parsed.model, "model.from_scratch": False}
        values |= {"model.architecture": facts.architecture} if facts.architecture else {}
        return loader.load(parsed.recipe, parsed.overrides, overfit, values)
    gpus, nodes, gpu_type = (getattr(parsed, name, None) for name in ("gpus", "nodes", "gpu_type"))  # not of download
    available = topologies.visible_gpus()
    count = len(available) if gpus is None else max(gpus) if isinstance(gpus, list) else gpus
    values = model_recipe.settings(parsed.model, facts.parameters, facts.positions, facts.architecture, method, count)
    values |= {"hardware.gpus": count, "hardware.nodes": nodes or suggest.nodes_for(count)}
    gpu_type = gpu_type or topologies.gpu_type_of(available)
    values |= {"hardware.gpu_type": gpu_type} if count and gpu_type else {}
    values |= {"model.revision": facts.revision} if facts.revision else {}
    if not any(override.startswith("data.train=") for override in parsed.overrides):
        if default_data is None:
            raise UserError(f"DATA: not set. Name the rows that {parsed.model} is trained on: DATA=my.jsonl")
        values |= default_data
    parsed.recipe = model_recipe.name_of(parsed.model, method)
    return loader.load(parsed.recipe, parsed.overrides, overfit, values, from_file=False)


def _resolve(parsed: argparse.Namespace, recipe: Recipe, topology: plans.Topology) -> plans.Plan:
    """Return the plan, with the run that `--init-from` names."""
    plan = plans.resolve(recipe, topology)
    return run_selection.start_from(plan, parsed.init_from) if parsed.init_from else plan


def _hardware_request(parsed: argparse.Namespace) -> topologies.HardwareRequest:
    if isinstance(parsed.gpus, list):
        raise UserError(f"GPUS: found {parsed.gpus}, expected one number; only plan compares several")
    return topologies.HardwareRequest(parsed.gpus, parsed.processes, parsed.nodes, parsed.gpu_type)


def _list_recipes(_parsed: argparse.Namespace) -> None:
    rows = [["recipe", "size class", "model", "method", "parallelism", "hardware", "memory per GPU", "effective batch"]]
    for name in loader.names():
        recipe = loader.load(name)
        plan = plans.resolve(recipe, topologies.plan_topology(recipe))
        hardware = f"{plan.gpus} x {plan.gpu_type}" if plan.gpus else "CPU"
        memory = f"{(plan.memory_bytes_per_gpu or {'total': 0})['total'] / GIB:.0f} GiB" if plan.gpus else ""
        model, batch = recipe.model.name_or_path or "from scratch", str(plan.effective_batch_size)
        rows.append([name, plan.size, model, plan.method, plan.parallelism, hardware, memory, batch])
    print(render.format_table(rows))


def _write_recipe(parsed: argparse.Namespace) -> None:
    """Write `recipes/NAME.yaml` for a model, with the plan's choice as comments."""
    if parsed.model is None or parsed.recipe or not parsed.name:
        raise UserError("recipe: set MODEL and NAME, and no RECIPE: it writes recipes/NAME.yaml")
    path = RECIPES / f"{run_dir.RunDir.named(parsed.name).name}.yaml"
    if path.exists():
        raise UserError(f"NAME: {path} exists, and nothing is overwritten. Remove it, or set another NAME")
    recipe = _recipe(parsed, model_recipe.default_data())
    topology = topologies.plan_topology(recipe, _hardware_request(parsed))
    plan = plans.resolve(recipe, topology)
    if plan.fits is False:
        change = suggest.cheapest_change(recipe, topology) or "none, use larger GPUs"
        raise UserError(f"MODEL: {plan.model} {plans.describe_shortage(plan)}. Cheapest change that fits: {change}")
    hardware = f"{plan.gpus} x {plan.gpu_type}" if plan.gpus else "the CPU"
    start = f"make train RECIPE={parsed.name} GPUS={plan.gpus}"
    title = f"{plan.model}, {plan.method} fine-tuning on {hardware}. Written by `make recipe`; edit it.\n    {start}"
    write_atomic(path, model_recipe.to_yaml(recipe, title, Configuration.of(plan).overrides))
    log.info(f"wrote recipes/{path.name}: {Configuration.of(plan)}. Start it with {start}")


def _plan(parsed: argparse.Namespace) -> None:
    recipe = _recipe(parsed)
    if isinstance(parsed.gpus, list):
        _compare(parsed, recipe)
        return
    topology = topologies.plan_topology(recipe, _hardware_request(parsed))
    plan = _resolve(parsed, recipe, topology)
    plan = dataclasses.replace(
        plan,
        fewest_gpus=suggest.smallest_gpu_count(recipe, topology.gpu_type) if plan.fits is not None else None,
        cheapest_change=suggest.cheapest_change(recipe, topology) if plan.fits is False else None,
    )
    print(plans.to_json(plan) if parsed.json else render.format_plan(plan, parsed.explain))


def _compare(parsed: argparse.Namespace, recipe: Recipe) -> None:
    """Print the plan on each of several GPU counts (`--gpus 1,2,4,8,16`), one line each."""
    compared: list[tuple[int, plans.Plan | str]] = []
    for gpus in parsed.gpus:
        try:
            request = topologies.HardwareRequest(gpus, parsed.processes, parsed.nodes, parsed.gpu_type)
            compared.append((gpus, plans.resolve(recipe, topologies.plan_topology(recipe, request))))
        except UserError as error:
            compared.append((gpus, str(error)))
    if parsed.json:
        content = [{"gpus": n, "rejected": p} if isinstance(p, str) else dataclasses.asdict(p) for n, p in compared]
        print(json.dumps(content, indent=2))
    else:
        print(render.format_comparison(compared))


def _inspect(parsed: argparse.Namespace) -> None:
    from sft_recipes.data import inspect, prepare, validate

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # rows need no GPU; avoids DeepSpeed's warning
    recipe = _recipe(parsed)
    plan = _resolve(parsed, recipe, topologies.plan_topology(recipe, _hardware_request(parsed)))
    with contextlib.redirect_stdout(sys.stderr):  # --json prints rows only
        prepared = prepare.prepare(plan, rows_only=True)
    details = run_dir.read_json(Path(prepared.folder) / "details.json")
    errors: list[str] = []
    try:
        validate.check_limits(plan, details)
        plan = plans.with_prepared_data(plan, prepared)
    except UserError as error:  # the rows are shown although they cannot be trained
        errors.append(validate.format_line("error", str(error)))
    text = inspect.to_text(plan, prepared, details, parsed.rows or 3)
    for line in inspect.to_json(prepared, parsed.rows) if parsed.json else text:
        print(line)
    summary = [*inspect.report(plan, prepared, details), *errors]
    print("\n".join(summary), file=sys.stderr if parsed.json else sys.stdout)


def _resolve_here(parsed: argparse.Namespace, place: placement.Placement | None) -> run_selection.Resolved:
    """Return the plan on this machine's hardware.

    Raises:
        UserError: the plan does not fit.
    """
    env.reporters()
    env.sanity_is_skipped()
    recipe = _recipe(parsed)
    topology = topologies.available_topology(recipe, _hardware_request(parsed), place)
    plan = _resolve(parsed, recipe, topology)
    topologies.check_host_memory(plan)
    if plan.fits is False:
        change = f"{_suggest_fix(recipe, topology)} (`make plan RECIPE={recipe.name}` lists the parts)"
        raise UserError(f"recipe {recipe.name} {plans.describe_shortage(plan)}. Cheapest change that fits: {change}")

    def replan(parallelism: str) -> plans.Plan:
        return _resolve(parsed, dataclasses.replace(recipe, parallelism=parallelism), topology)

    chosen_again = replan if recipe.parallelism == AUTO else None
    return run_selection.Resolved(plan, lambda: suggest.lighter_overrides(recipe, topology), chosen_again)


def _sanity(parsed: argparse.Namespace) -> int:
    place = placement.from_environment(os.environ)
    if place is not None and place.nodes > 1:
        raise UserError("sanity: runs on one node. On several `train` runs it before the first step")
    resolved = _resolve_here(parsed, place)
    node_checks.check_gpus(resolved.plan)
    return launch.run_sanity_check(resolved.plan, resolved.suggest_cheaper)


def _prepare(parsed: argparse.Namespace) -> int:
    if parsed.name is None:
        raise UserError("NAME: not set. `train` finds the run by its name on each node: set --name")
    return _start_run(parsed, placement.from_environment(os.environ, whole_job=True), trains=False)


def _train(parsed: argparse.Namespace) -> int:
    place = placement.from_environment(os.environ)
    if place is not None and place.nodes > 1 and not parsed.dry_run:
        return _train_node(parsed, place)
    nodes = _hardware_request(parsed).nodes or 1
    if place is None and nodes > 1:
        fix = f"Use sbatch --nodes={nodes} slurm/{parsed.recipe}.sh, or set PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR"
        raise UserError(f"NODES: found {nodes}, and this process has no place among them. {fix}")
    return _start_run(parsed, place, trains=True)


def _start_run(parsed: argparse.Namespace, place: placement.Placement | None, trains: bool) -> int:
    allow_change = tuple(key for key in parsed.allow_change.split(",") if key)
    request = run_selection.RunRequest(parsed.name, parsed.resume, allow_change, parsed.strict_versions)
    dry_run = trains and parsed.dry_run
    return launch.start_run(request, place, trains, lambda: _resolve_here(parsed, place), dry_run)


def _train_node(parsed: argparse.Namespace, place: placement.Placement) -> int:
    if parsed.name is None:
        raise UserError(f"NAME: not set, expected the run that `prepare` has made for {place.nodes} nodes")
    recipe = _recipe(parsed)

    def suggest_cheaper(plan: plans.Plan) -> list[str]:
        return suggest.lighter_overrides(recipe, plans.Topology(plan.gpus, plan.world_size, plan.nodes, plan.gpu_type))

    return launch.train_node(parsed.name, place, suggest_cheaper)


def _sweep(parsed: argparse.Namespace) -> int:
    options = [parsed.recipe] if parsed.recipe else []
    for name in ("model", "method", "gpus", "processes", "nodes", "gpu_type"):
        if (value := getattr(parsed, name)) is not None:
            options += [f"--{name.replace('_', '-')}", str(value)]
    recipe = _recipe(parsed)
    rest = {"seeds": parsed.seeds, "fraction": parsed.fraction, "overrides": list(parsed.overrides)}
    sweep = sweeps.make(recipe, parsed.name, parsed.lr, parsed.values, **rest)
    topology = topologies.plan_topology(recipe, _hardware_request(parsed))
    for value in sweep.values:  # rejects a wrong value before the first run
        run = _parse(["train", *options, *sweep.overrides_of(recipe, value, 0)])
        plan = plans.resolve(_recipe(run), topology)
    log.info(sweeps.describe_cost(sweep, plan))
    return sweeps.run(sweep, recipe, lambda more: main(["train", *options, *more]), parsed.keep, parsed.slurm)


def _suggest_fix(recipe: Recipe, topology: plans.Topology) -> str:
    """Return the cheapest change for this machine's GPUs, else the number of GPUs needed."""
    change = suggest.cheapest_change(recipe, topology, max_gpus=len(topologies.visible_gpus()))
    fewest = suggest.smallest_gpu_count(recipe, topology.gpu_type)
    return change or (f"{fewest} GPUs, more than this machine has" if fewest else "none, use a larger GPU type")


def _generate(parsed: argparse.Namespace) -> int:
    prompts = [parsed.prompt] if parsed.prompt is not None else (line.rstrip("\n") for line in sys.stdin)
    return generate.main(run_dir.find(parsed.run), prompts)


def _download(parsed: argparse.Namespace) -> None:
    from sft_recipes.data import download

    downloaded = download.download(_recipe(parsed))
    for name, folder in downloaded:
        log.info(f"{name}: {folder}")
    if parsed.tasks:
        from sft_recipes.tools import evaluate

        evaluate.download(parsed.tasks)


def _merge(parsed: argparse.Namespace) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # merges on the CPU; bitsandbytes and peft prefer a visible GPU
    from sft_recipes.tools import merge_adapters

    log.info(f"model      {merge_adapters.merge(run_dir.find(parsed.run))} (for `make generate` and transformers)")


def _publish(parsed: argparse.Namespace) -> None:
    folder = run_dir.find(parsed.run)
    if parsed.card_only:
        publish.write_card(folder, generate.find_model(folder, parsed.merged), parsed.repo, parsed.license)
        return
    if not parsed.repo:
        raise UserError("REPO: not set, expected a repository on the Hub. Set REPO=owner/name, or CARD_ONLY=1")
    publish.publish(folder, parsed.repo, parsed.license, parsed.merged, parsed.public)


def _serve(parsed: argparse.Namespace) -> None:
    server = serve.configure(run_dir.find(parsed.run), parsed.port, parsed.server_arguments)
    name = "vLLM" if server.is_vllm else "transformers serve"
    log.info(f"serving    {server.url}/v1 by {name}, model {server.model} (Ctrl-C stops it)")
    serve.run(server)


def _check_serving(parsed: argparse.Namespace) -> int:
    from sft_recipes.tools import check_serving

    return check_serving.main(run_dir.find(parsed.run))


def _eval(parsed: argparse.Namespace) -> None:
    from sft_recipes.tools import evaluate

    comparison = evaluate.evaluate(
        run_dir.find(parsed.run), parsed.tasks or "default", parsed.limit, parsed.harness_args
    )
    print(evaluate.to_text(comparison), flush=True)
    _report(parsed)


def _verify_resume(parsed: argparse.Namespace) -> int:
    place = placement.from_environment(os.environ)
    if place is not None:
        place.attempt += f"-{os.environ.get('SLURM_STEP_ID', '')}"
    return verify_resume.run(run_dir.find(parsed.run), place if place and place.nodes > 1 else None)


def _report(parsed: argparse.Namespace) -> None:
    folder = run_dir.find(parsed.run)
    run = metrics_log.read(folder)
    folder.report.write_text(report.page(run, diagnose.diagnose(run)), encoding="utf-8")
    log.info(f"report     {folder.report}")


def _diagnose(parsed: argparse.Namespace) -> int:
    run = metrics_log.read(run_dir.find(parsed.run))
    findings = diagnose.diagnose(run)
    print(diagnose.to_json(findings) if parsed.json else "\n".join(diagnose.text(run, findings)))
    return int(diagnose.has_errors(findings))


def _status(parsed: argparse.Namespace) -> None:
    facts = status.facts(run_dir.find(parsed.run))
    print(json.dumps(facts, indent=2) if parsed.json else "\n".join(status.text(facts)))


def _schedules(parsed: argparse.Namespace) -> None:
    if parsed.plot:
        lr_plot.check_path(Path(parsed.plot))
    if parsed.run:
        plan = plans.read(run_dir.find(parsed.run).plan)
    else:
        recipe = _recipe(parsed)
        plan = plans.resolve(recipe, topologies.plan_topology(recipe, _hardware_request(parsed)))
    total, warmup = lr_schedule.steps_of(plan)
    curves = lr_schedule.curves(plan, [name for name in parsed.others.split(",") if name])
    estimate = "" if plan.data_prepared else " (estimated until the data is prepared; RUN=… takes those of a run)"
    print(f"{plan.recipe}: {plan.lr_scheduler_type}, {total:,} optimizer steps{estimate}, {warmup:,} warm-up steps")
    print(lr_plot.table(curves, warmup))
    if parsed.plot:
        lr_plot.plot(curves, plan.recipe, Path(parsed.plot))
        log.info(f"plot       {parsed.plot}")


def _doctor(parsed: argparse.Namespace) -> int:
    failed = False
    for result in doctor.run_checks(parsed.gpus):
        print(json.dumps(dataclasses.asdict(result)) if parsed.json else str(result), flush=True)
        failed = failed or result.status == "error"
    return int(failed)
