"""Reads the command line, the only module that does, and calls the room that answers."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sft_recipes.config import loader
from sft_recipes.config.gpu_types import find_gpu_type
from sft_recipes.config.schema import Recipe
from sft_recipes.launch import run_selection
from sft_recipes.planner import lr_schedule, render, suggest
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime import env, run_dir
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.log import to_console
from sft_recipes.runtime.units import GIB

if TYPE_CHECKING:
    from sft_recipes.launch.node_launchers import NodeLaunchers
    from sft_recipes.launch.topology import HardwareRequest


log = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; `python -m sft_recipes --help` lists the verbs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; the exit code is that of the contract (0 done, 1 a fault, 2 the user's input is wrong)."""
    code = _obey(arguments)
    if code == 2 and (logs := os.environ.get("SFT_RECIPES_LOGS")):
        Path(logs, "rejected").touch()  # for slurm/launch.sh: srun may return the signal that killed the other nodes
    return code


def _obey(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that knows ASCII alone still gets its line
    to_console()
    env.silence_telemetry()
    env.limit_thread_spin()
    try:
        parser = _parser()
        parsed, rest = parser.parse_known_args(arguments)
        _take_overrides(parser, parsed, rest)
        return int(parsed.verb(parsed) or 0)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `… | head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if error.errno in (errno.ENAMETOOLONG, errno.EACCES, errno.EROFS) else 1


def _take_overrides(parser: argparse.ArgumentParser, parsed: argparse.Namespace, rest: list[str]) -> None:
    """argparse stops taking `key=value` at the first option; those behind it are taken here."""
    unknown = [word for word in rest if "=" not in word or word.startswith("-") or not hasattr(parsed, "overrides")]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    if rest:
        parsed.overrides += rest


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sft_recipes", description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)

    verb = verbs.add_parser("recipes", help="the recipes in a table")
    verb.set_defaults(verb=_list)

    verb = verbs.add_parser("plan", help="settle every number of a run; starts nothing")
    _add_recipe(verb)
    verb.add_argument("--json", action="store_true", help="for machines")
    verb.add_argument("--explain", action="store_true", help="where each value came from")
    verb.set_defaults(verb=_plan)

    verb = verbs.add_parser("inspect", help="what the loss will see: real rows, and what became of all of them")
    _add_recipe(verb)
    verb.add_argument("--rows", metavar="N", help="rows to show (default: 3; with --json all)")
    verb.add_argument("--html", metavar="FILE", help="write a page")
    verb.add_argument("--json", action="store_true", help="for machines: an object a row; the report to standard error")
    verb.set_defaults(verb=_inspect)

    verb = verbs.add_parser(
        "sanity", help="tries a run on a few rows before GPUs are taken for hours; leaves a receipt"
    )
    _add_recipe(verb)
    verb.add_argument("--devices", metavar="0,2", help="GPUs by id")
    verb.set_defaults(verb=_sanity)

    verb = verbs.add_parser("train", help="the run; goes on with an unfinished one of the same plan")
    _add_recipe(verb)
    verb.add_argument("--devices", metavar="0,2", help="GPUs by id")
    verb.add_argument("--name", help="the run's name (default: RECIPE-N)")
    verb.add_argument("--resume", action="store_true", help="an error where there is nothing to go on with")
    verb.add_argument(
        "--allow-change", default="", metavar="KEY,…", help="go on although these differ from the run's plan"
    )
    verb.add_argument(
        "--strict-versions", action="store_true", help="refuse to go on with other versions of the libraries"
    )
    verb.add_argument("--dry-run", action="store_true", help="print the command that would start the ranks")
    verb.set_defaults(verb=_train)

    verb = verbs.add_parser("report", help="a page on a run: curves, samples, plan, diagnosis")
    verb.add_argument("run", help="a run's name or folder")
    verb.set_defaults(verb=_report)

    verb = verbs.add_parser("diagnose", help="what is wrong with a run, on what evidence, and what to change")
    verb.add_argument("run", help="a run's name or folder")
    verb.add_argument("--json", action="store_true", help="for machines")
    verb.set_defaults(verb=_diagnose)

    verb = verbs.add_parser("status", help="where a run stands: its job, last figures, time left")
    verb.add_argument("run", help="a run's name or folder")
    verb.add_argument("--json", action="store_true", help="for machines")
    verb.set_defaults(verb=_status)

    verb = verbs.add_parser("schedules", help="learning-rate curves for a recipe's own number of steps")
    _add_recipe(verb)
    verb.add_argument("--run", help="a run, whose own number of steps is taken")
    verb.add_argument("--with", dest="others", default="", metavar="NAME,…", help="other schedules of transformers")
    verb.add_argument("--plot", metavar="FILE", help="a .png or .svg to draw them to")
    verb.set_defaults(verb=_schedules)

    verb = verbs.add_parser("tensorboard", help="serves the figures of all runs on this machine alone")
    verb.add_argument("--port", default="6006")
    verb.set_defaults(verb=_tensorboard)

    verb = verbs.add_parser("generate", help="let what was trained answer")
    verb.add_argument("run", help="a run's name or folder")
    verb.add_argument("--prompt", help="one prompt (default: lines from standard input)")
    verb.set_defaults(verb=_generate)

    verb = verbs.add_parser("download", help="bring model, tokenizer and data; the run then needs no network")
    verb.add_argument("recipe", help="a name from `list`")
    verb.add_argument("overrides", nargs="*", metavar="key=value")
    verb.set_defaults(verb=_download)

    verb = verbs.add_parser("verify-resume", help="proves that a run resumes exactly: takes recorded steps of it again")
    verb.add_argument("run", help="a run's name or folder")
    verb.set_defaults(verb=_verify_resume)

    verb = verbs.add_parser("doctor", help="is this machine fit; exit code 1 where something is red")
    verb.add_argument("--gpus", metavar="N", help="how many a run would take")
    verb.add_argument("--json", action="store_true", help="for machines: an object a finding")
    verb.set_defaults(verb=_doctor)

    verb = verbs.add_parser("merge", help="adapters and the model that they were trained on as one model")
    verb.add_argument("run", help="a run's name or folder")
    verb.set_defaults(verb=_merge)
    return parser


def _add_recipe(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", help="a name from `list`")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="trainer.learning_rate=1.0e-5")
    verb.add_argument("--gpus", metavar="N", help="GPUs over all nodes; 0 is the CPU")
    verb.add_argument("--processes", metavar="N", help="ranks on the CPU, with --gpus 0")
    verb.add_argument("--nodes", metavar="N")
    verb.add_argument("--gpu-type", help="GPU type (h100-80g, …: docs/models.md) or GiB of memory")


def _recipe(parsed: argparse.Namespace) -> Recipe:
    return loader.load(parsed.recipe, parsed.overrides)


def _hardware_request(parsed: argparse.Namespace) -> HardwareRequest:
    from sft_recipes.launch.topology import HardwareRequest, parse_integer

    options = (("gpus", 0), ("processes", 1), ("nodes", 1))
    gpus, processes, nodes = (
        None if (text := getattr(parsed, name)) is None else parse_integer(text, name.upper(), least)
        for name, least in options
    )
    return HardwareRequest(gpus, processes, nodes, parsed.gpu_type, getattr(parsed, "devices", None))


def _list(_parsed: argparse.Namespace) -> None:
    from sft_recipes.launch.topology import plan_topology

    rows = [["recipe", "row", "model", "method", "parallelism", "hardware", "memory per GPU", "effective batch"]]
    for name in loader.names():
        recipe = loader.load(name)
        plan = plans.resolve(recipe, plan_topology(recipe))
        memory = plan.memory_bytes_per_gpu
        rows.append(
            [
                name,
                plan.size,
                recipe.model.name_or_path or "built from scratch",
                plan.method,
                plan.parallelism,
                f"{plan.gpus} x {plan.gpu_type}" if plan.gpus else "CPU",
                f"{memory['total'] / GIB:.0f} GiB" if memory and plan.gpus else "",
                str(plan.effective_batch_size),
            ]
        )
    print(render.format_table(rows))


def _plan(parsed: argparse.Namespace) -> None:
    from sft_recipes.launch.topology import plan_topology

    recipe = _recipe(parsed)
    if parsed.gpus and "," in parsed.gpus:
        _compare(parsed, recipe)
        return
    topology = plan_topology(recipe, _hardware_request(parsed))
    plan = plans.resolve(recipe, topology)
    plan = dataclasses.replace(
        plan,
        fewest_gpus=suggest.smallest_gpu_count(recipe, topology.gpu_type) if plan.fits is not None else None,
        cheapest_change=suggest.cheapest_change(recipe, topology) if plan.fits is False else None,
    )
    print(plans.to_json(plan) if parsed.json else render.format_plan(plan, parsed.explain))


def _compare(parsed: argparse.Namespace, recipe: Recipe) -> None:
    """`--gpus 1,2,4,8,16`: the same recipe on each, one line a count."""
    from sft_recipes.launch.topology import parse_integer

    alone = next((name for name in ("nodes", "processes", "explain") if getattr(parsed, name)), None)
    if alone:
        raise UserError(f"{alone.upper()}: says nothing where GPUS={parsed.gpus} compares several; name one count")
    gpu_type = parsed.gpu_type or recipe.hardware.gpu_type
    compared: list[tuple[int, plans.Plan | str]] = []
    for text in parsed.gpus.split(","):
        gpus = parse_integer(text, "GPUS", 1)
        try:
            compared.append((gpus, plans.resolve(recipe, suggest.topology_for(gpus, gpu_type))))
        except UserError as error:
            compared.append((gpus, str(error)))
    if parsed.json:
        content = [{"gpus": n, "refused": p} if isinstance(p, str) else dataclasses.asdict(p) for n, p in compared]
        print(json.dumps(content, indent=2))
    else:
        print(render.format_comparison(compared))


def _inspect(parsed: argparse.Namespace) -> None:
    from sft_recipes.data import inspect, prepare, validate
    from sft_recipes.launch.topology import parse_integer, plan_topology

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # looking at rows needs no GPU, nor DeepSpeed's warning of none
    most = None if parsed.rows is None else parse_integer(parsed.rows, "ROWS", 1)
    if parsed.html and not Path(parsed.html).absolute().parent.is_dir():
        raise UserError(f"HTML: no folder {Path(parsed.html).parent} to write {Path(parsed.html).name} to")
    recipe = _recipe(parsed)
    plan = plans.resolve(recipe, plan_topology(recipe, _hardware_request(parsed)))
    with contextlib.redirect_stdout(sys.stderr):  # --json prints rows only
        prepared = prepare.prepare(plan, rows_only=True)
    rows = inspect.load_rows(plan, prepared)
    try:
        validate.check_limits(plan, rows.details)
        plan, refused = plans.with_prepared_data(plan, prepared), ""
    except UserError as error:  # the rows can be looked at all the same
        refused = str(error)
    shown = inspect.to_json(rows, most) if parsed.json else inspect.to_text(rows, most or 3, _colours())
    for line in shown:
        print(line)
    report = [*inspect.report(plan, rows), *([validate.format_line("error", refused)] if refused else [])]
    print("\n".join(report), file=sys.stderr if parsed.json else sys.stdout)
    if parsed.html:
        Path(parsed.html).write_text(inspect.to_html(plan, rows, most or 3), encoding="utf-8")
        print(f"written: {parsed.html}", file=sys.stderr)


def _colours() -> bool:
    """Whether standard output is a terminal that has not been told otherwise (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _topology(parsed: argparse.Namespace, recipe: Recipe) -> Topology:
    from sft_recipes.launch.topology import available_topology, from_slurm

    return available_topology(recipe, _hardware_request(parsed), from_slurm(os.environ))


def _checked(parsed: argparse.Namespace) -> tuple[Recipe, Topology, plans.Plan]:
    """The plan on the hardware that is here, once the hardware can carry it."""
    from sft_recipes.launch.topology import check_host_memory, unlisted, visible_gpus

    env.reporters()
    env.sanity_is_skipped()
    recipe = _recipe(parsed)
    topology = _topology(parsed, recipe)
    plan = plans.resolve(recipe, topology)
    check_host_memory(plan)
    for product in unlisted(visible_gpus() if plan.gpu_type and find_gpu_type(plan.gpu_type) is None else []):
        _say(f"{product} is not in the table of GPU types: planned by its memory, {plan.gpu_type} GiB, without hours")
    if plan.fits is False:
        raise UserError(
            f"recipe {recipe.name} {plans.describe_shortage(plan)}. The cheapest change that fits: "
            f"{_way_out(recipe, topology)} (`make plan RECIPE={recipe.name}` shows the parts)"
        )
    return recipe, topology, plan


def _sanity(parsed: argparse.Namespace) -> int:
    return _on_all_nodes(parsed, _try_out)


def _train(parsed: argparse.Namespace) -> int:
    from sft_recipes.launch import slurm

    with slurm.batch_signals():
        return _on_all_nodes(parsed, _carry_out)


def _on_all_nodes(parsed: argparse.Namespace, verb: Callable[[argparse.Namespace, NodeLaunchers | None], int]) -> int:
    """Has node 0 of a Slurm job decide, and the others follow; elsewhere there is this machine alone."""
    from sft_recipes.launch import slurm, stop_request

    try:
        slurm.await_run(getattr(parsed, "name", None))
        with slurm.node_launchers(os.environ) as peers:
            leads = peers is None or peers.is_leader
            code = slurm.follow(peers) if peers and not leads else verb(parsed, peers)
    except stop_request.StoppedError:
        return slurm.stopped_before_rendezvous(os.environ)
    if leads and code not in (run_dir.EXIT_FAULT, run_dir.EXIT_STOPPED):
        slurm.forget(os.environ)
    return code


def _try_out(parsed: argparse.Namespace, peers: NodeLaunchers | None) -> int:
    from sft_recipes.launch import launch, preflight, slurm

    recipe, topology, plan = _checked(parsed)
    if peers is None:
        preflight.check_gpus(plan)
    if code := slurm.check_nodes(peers, plan):
        return code
    return launch.run_sanity_check(plan, lambda: suggest.lighter_overrides(recipe, topology), peers)


def _carry_out(parsed: argparse.Namespace, peers: NodeLaunchers | None) -> int:
    from sft_recipes.launch import launch, preflight, run_lock, slurm
    from sft_recipes.launch.topology import check_disk

    if parsed.name is not None:
        run_dir.check_name(parsed.name)
    recipe, topology, plan = _checked(parsed)
    allow_change = tuple(key for key in parsed.allow_change.split(",") if key)
    request = run_selection.RunRequest(parsed.name, parsed.resume, allow_change, parsed.strict_versions)
    start = run_selection.select(plan, request, run_lock.locked_runs())
    run = start.run_dir
    for note in start.notes:
        log.info(note)
    if run.state() == "finished":
        if run.final.is_dir():
            log.info(f"{run.path} is finished; its model is in {run.final} (start another run with NAME=…)")
            return 0
        log.info(f"{run.path} is finished, but {run.final} is missing: writing it again")
    if parsed.dry_run:
        print(launch.dry_run_command(plan, run))
        return 0
    if peers is None:
        preflight.check_gpus(plan)
    check_disk(plan, run)
    if error := slurm.no_progress(start):
        log.error(error)
        return run_dir.EXIT_NO_PROGRESS
    with run_lock.lock(run):
        code = slurm.check_nodes(peers, plan)
        return code or launch.start_run(start, lambda: suggest.lighter_overrides(recipe, topology), peers)


def _replay(parsed: argparse.Namespace, peers: NodeLaunchers | None) -> int:
    from sft_recipes.tools import verify_resume

    return verify_resume.run(run_dir.find(parsed.run), peers)


def _way_out(recipe: Recipe, topology: Topology) -> str:
    """What this machine's GPUs can carry; else how many would be needed."""
    from sft_recipes.launch.topology import visible_gpus

    here = suggest.cheapest_change(recipe, topology, most_gpus=len(visible_gpus()))
    fewest = suggest.smallest_gpu_count(recipe, topology.gpu_type)
    return here or (f"{fewest} GPUs, more than are here" if fewest else "none, take a larger gpu_type")


def _generate(parsed: argparse.Namespace) -> int:
    from sft_recipes.tools import generate

    folder = run_dir.find(parsed.run)
    prompts = [parsed.prompt] if parsed.prompt is not None else (line.rstrip("\n") for line in sys.stdin)
    return generate.main(folder, prompts)


def _download(parsed: argparse.Namespace) -> None:
    from sft_recipes.data import download

    downloaded = download.download(_recipe(parsed))
    for name, folder in downloaded:
        _say(f"{name}: {folder}")
    if not downloaded:
        _say("nothing to download: model and data are local")


def _merge(parsed: argparse.Namespace) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # merging is on the CPU, and bitsandbytes and peft prefer a visible GPU
    from sft_recipes.tools import merge_adapters

    folder = run_dir.find(parsed.run)
    _say(f"model      {merge_adapters.merge(folder)}, which `make generate` and transformers load")


def _verify_resume(parsed: argparse.Namespace) -> int:
    return _on_all_nodes(parsed, _replay)


def _report(parsed: argparse.Namespace) -> None:
    from sft_recipes.monitor import diagnose, metrics_log, report

    folder = run_dir.find(parsed.run)
    run = metrics_log.read(folder)
    folder.report.write_text(report.page(run, diagnose.diagnose(run)), encoding="utf-8")
    _say(f"report     {folder.report}")


def _diagnose(parsed: argparse.Namespace) -> int:
    from sft_recipes.monitor import diagnose, metrics_log

    run = metrics_log.read(run_dir.find(parsed.run))
    findings = diagnose.diagnose(run)
    if parsed.json:
        print(diagnose.to_json(findings))
    else:
        print("\n".join(diagnose.text(run, findings)))
    return int(diagnose.has_errors(findings))


def _status(parsed: argparse.Namespace) -> None:
    from sft_recipes.launch import run_lock, slurm
    from sft_recipes.tools import status

    try:
        folder = run_dir.find(parsed.run)
    except UserError:
        if asked := slurm.query_job_of_run(parsed.run):  # it waits for its nodes
            print(json.dumps({"job": asked}, indent=2) if parsed.json else status.job_line(asked))
            return
        raise
    starts = run_dir.read_json(folder.manifest).get("starts") or [{}]
    asked = slurm.query_job(starts[-1].get("job", {}).get("id")) or slurm.query_job_of_run(folder.name)
    found = status.facts(folder, run_lock.holder(folder), asked)
    print(json.dumps(found, indent=2) if parsed.json else "\n".join(status.text(found)))


def _schedules(parsed: argparse.Namespace) -> None:
    from sft_recipes.data import prepare
    from sft_recipes.launch.topology import plan_topology
    from sft_recipes.monitor import lr_plot as drawing

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # preparing rows needs no GPU, nor DeepSpeed's warning of none
    if parsed.plot:
        drawing.check_path(Path(parsed.plot))
    if parsed.run:
        plan = plans.read(run_dir.find(parsed.run).plan)
    else:
        recipe = _recipe(parsed)
        plan = plans.resolve(recipe, plan_topology(recipe, _hardware_request(parsed)))
        if prepare.is_local(plan):
            plan = plans.with_prepared_data(plan, prepare.prepare(plan, rows_only=True))
    total, warmup = lr_schedule.steps_of(plan)
    curves = lr_schedule.curves(plan, [name for name in parsed.others.split(",") if name])
    about = "" if plan.data_prepared else "about "
    how = "" if plan.data_prepared else ", an estimate until the data is prepared (RUN=… has a run's own)"
    print(f"{plan.recipe}: {about}{total:,} optimizer steps{how}, {warmup:,} of them warm-up, {plan.lr_scheduler_type}")
    print(drawing.table(curves, warmup))
    if parsed.plot:
        drawing.plot(curves, warmup, plan.learning_rate, plan.recipe, Path(parsed.plot))
        _say(f"plot       {parsed.plot}")


def _doctor(parsed: argparse.Namespace) -> int:
    from sft_recipes.launch.topology import parse_integer
    from sft_recipes.tools import doctor

    failed = False
    for result in doctor.run_checks(None if parsed.gpus is None else parse_integer(parsed.gpus, "GPUS", 0)):
        _say(json.dumps(dataclasses.asdict(result)) if parsed.json else str(result))
        failed = failed or result.status == "error"
    return int(failed)


def _tensorboard(parsed: argparse.Namespace) -> int:
    from sft_recipes.launch import command
    from sft_recipes.launch.topology import parse_integer

    port = parse_integer(parsed.port, "PORT", 1)
    if port > 65535:
        raise UserError(f"PORT: {port} is no port; wanted 1 to 65535")
    arguments = command.tensorboard(port)
    os.execv(arguments[0], arguments)


def _say(line: str) -> None:
    print(line, flush=True)
