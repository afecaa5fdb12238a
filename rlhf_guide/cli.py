"""The command `rlhf-guide`: run the course, report its results, check the machine, publish.

rlhf-guide verify
rlhf-guide run --profile cpu
rlhf-guide report runs/cpu
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .errors import GuideError, ParameterError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 1 after printing what is wrong and what to do."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except GuideError as error:
        print(f"error: {error}", file=sys.stderr)
        print(*error.__notes__, sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; finished stages are kept, the same command goes on.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlhf-guide",
        description="From raw preference data to three iterations of online DPO, notebook by "
        "notebook.",
    )
    parser.add_argument("--version", action="version", version=f"rlhf-guide {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_run(commands)
    _add_report(commands)
    check = commands.add_parser("verify", help="check versions, device, weights, memory, disk")
    check.set_defaults(command=_verify)
    names = commands.add_parser("parameters", help="list every parameter and a profile's values")
    names.add_argument("--profile", help="smoke, cpu, gpu or paper")
    names.set_defaults(command=_parameters)
    put = commands.add_parser("publish", help="write a cpu run's outputs into notebooks/")
    put.add_argument("run", help="the run folder")
    put.add_argument("--notebooks", help="folder of the notebooks")
    put.add_argument("--timings-only", action="store_true", help="store the times, any profile")
    put.set_defaults(command=_publish)
    _add_scale(commands)
    _add_study(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser("run", help="execute the notebooks in order, resuming where it broke")
    run.add_argument("--profile", help="smoke, cpu (default), gpu or paper")
    run.add_argument("--only", help="notebooks by number, as in 02-05 or 02,04")
    run.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="replace one number"
    )
    run.add_argument(
        "--one-of-several",
        action="store_true",
        help="a --set for notebooks that --only leaves out is no error: another job runs those",
    )
    run.add_argument("--run-dir", help="the run folder; by default runs/<profile>")
    run.add_argument("--notebooks", help="folder of the notebooks")
    network = run.add_mutually_exclusive_group()
    network.add_argument("--allow-network", action="store_true", help="allow downloads")
    network.add_argument("--no-network", action="store_true", help="block every connection")
    run.set_defaults(command=_run)


def _add_scale(commands: argparse._SubParsersAction) -> None:
    config = commands.add_parser("config", help="print where a configuration of accelerate lies")
    config.add_argument("name", help="ddp, fsdp2, zero2 or zero3")
    config.set_defaults(command=_config)
    costs = commands.add_parser("plan", help="steps, memory, hours and price of every stage")
    costs.add_argument("--profile", help="smoke, cpu, gpu or paper (default)", default="paper")
    costs.add_argument("--gpus", type=int, default=8, help="number of GPUs (default 8)")
    costs.add_argument("--gpu", default="h100-80gb", help="a100-80gb, h100-80gb or h200-141gb")
    costs.add_argument("--strategy", help="ddp, zero2, zero3 or fsdp2; by default what is usual")
    costs.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="replace one number"
    )
    costs.add_argument("--json", action="store_true", help="print one JSON array instead")
    costs.set_defaults(command=_plan)
    card = commands.add_parser("card", help="write a model card or a data card from a stage")
    card.add_argument("run", help="the run folder")
    card.add_argument("stage", help="a finished stage: data, sft, reward_model, ...")
    card.add_argument("--push", metavar="REPO", help="then upload to this Hub repository, private")
    card.set_defaults(command=_card)


def _add_study(commands: argparse._SubParsersAction) -> None:
    study = commands.add_parser("study", help="repeat trainings over seeds, for chapters 03 and 12")
    study.add_argument("name", choices=("online_seeds", "online_arms", "reward_data"))
    study.add_argument("--profile", help="smoke, cpu (default), gpu or paper")
    study.add_argument("--run-dir", help="the run folder; by default runs/<profile>")
    study.add_argument("--seeds", type=int, default=3)
    study.add_argument("--keep", action="store_true", help="store the result in the package")
    study.set_defaults(command=_study)


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser("report", help="print a run's results and write report.html")
    report.add_argument("run", help="the run folder")
    report.add_argument("--json", action="store_true", help="print one JSON object instead")
    report.add_argument(
        "--readme",
        nargs="?",
        const="README.md",
        metavar="FILE",
        help="also rewrite the results block of the README",
    )
    report.set_defaults(command=_report)


def _run(options: argparse.Namespace) -> int:
    from .course import parse_settings, run_course
    from .workspace import shown

    overrides = parse_settings(options.set)
    if options.allow_network:
        overrides["allow_download"] = True
    workspace = run_course(
        profile=options.profile,
        only=options.only,
        overrides=overrides,
        run_dir=options.run_dir and Path(options.run_dir).absolute(),
        notebooks=options.notebooks,
        block_network=options.no_network,
        say=lambda line: print(line, flush=True),
        one_of_several=options.one_of_several,
    )
    print(f"Results: rlhf-guide report {shown(workspace.path)}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from . import report
    from .workspace import shown

    workspace = report.open_finished(options.run)
    page = report.write_html(workspace)
    if options.readme:
        report.write_readme(workspace, Path(options.readme))
    if options.json:
        print(json.dumps(report.collect(workspace), indent=1))
    else:
        print(report.as_text(workspace))
        print(f"\nWith figures: {shown(page)}")
    return 0


def _config(options: argparse.Namespace) -> int:
    from .launch import config_path

    print(config_path(options.name))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from . import plan
    from .course import parse_settings
    from .files import plain
    from .profiles import load_profile

    profile = load_profile(options.profile, **parse_settings(options.set))
    stages = plan.plan(profile, options.gpus, options.gpu, options.strategy)
    if options.json:
        print(
            json.dumps([{**plain(stage), "warning": stage.warning} for stage in stages], indent=1)
        )
    else:
        print(plan.as_text(stages))
    return 0


def _card(options: argparse.Namespace) -> int:
    from . import cards
    from .report import open_finished
    from .workspace import shown

    stage = open_finished(options.run).load(options.stage)
    print(f"wrote {shown(cards.write_card(stage))}")
    if options.push:
        print(f"uploaded to {cards.push(stage, options.push)}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from .verify import as_text, verify

    checks = verify()
    print(as_text(checks))
    return 0 if all(check.ok for check in checks) else 1


def _parameters(options: argparse.Namespace) -> int:
    from .profiles import load_profile, parameter_names, parameter_value

    profile = load_profile(options.profile)
    for name, kind in parameter_names().items():
        print(f"{name:<40} {kind.__name__:<6} {parameter_value(profile, name)!r}")
    return 0


def _study(options: argparse.Namespace) -> int:
    from . import online_arms, online_seeds, studies
    from .machine import keep_freed_memory
    from .notebook import quieten
    from .profiles import load_profile
    from .workspace import open_run, shown

    if options.seeds < 1:
        raise ParameterError(f"--seeds is {options.seeds}; a study needs at least one.")
    quieten()
    keep_freed_memory()
    ws = open_run(load_profile(options.profile), options.run_dir)
    run = {
        "online_seeds": online_seeds.run_seeds,
        "online_arms": online_arms.run_arms,
        "reward_data": studies.run_reward_data,
    }
    stage = run[options.name](ws, options.seeds)
    print(f"finished: {shown(studies.keep(stage) if options.keep else stage.dir)}")
    return 0


def _publish(options: argparse.Namespace) -> int:
    from .publish import publish, record_timings

    if options.timings_only:
        print(f"wrote {record_timings(options.run).name}")
        return 0
    for path in publish(options.run, options.notebooks):
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
