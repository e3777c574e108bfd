"""Commands of the checkout: `python -m assets refresh | status | scenario add FILE | scenario remove NAME | sweep | demo | ui`."""

import argparse
import contextlib
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

from puzzle_dag.console import say
from resources.workspace import project_root

_INTERRUPTED = 130
"""Exit status of a command that was told to stop, as shells have it."""


class _PlainLines(logging.Formatter):
    """Lines as the library wrote them: Dagster, which files them in the run's log, puts job, run and step before each."""

    def format(self, record: logging.LogRecord) -> str:
        """Return "07:49:46 message"."""
        message = getattr(record, "dagster_meta", {}).get("orig_message", record.getMessage())
        line = f"{self.formatTime(record, '%H:%M:%S')} {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _quiet() -> None:
    """Keep our own progress lines; Dagster, transformers and vLLM tell far more than a person wants to read."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in ("dagster", "transformers", "vllm", "httpx", "matplotlib", "lm_eval", "datasets", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _refresh(args: argparse.Namespace) -> int:
    from assets.refresh import ANEW, Outcome, refresh
    from resources.instance import open_instance

    def tell(outcome: Outcome) -> None:
        say(f"{outcome.state:>9}  {outcome.item}  {outcome.seconds:.1f} s  ({'; '.join(outcome.reasons)})")

    anew = [item for option, assets in ANEW.items() for item in _anew(option, assets, getattr(args, option, None))]
    with open_instance(args.root) as instance:
        record = refresh(args.root, args.profile, instance, select=args.select, remake=args.remake, anew=anew, on_outcome=tell)
    for check in record.failed_checks:
        say(f"    check  {check} did not pass")
    failed, waits = record.of("failed"), record.of("waits")
    counts = f"{len(record.ran)} materialized, {len(record.of('fresh'))} fresh, {len(failed)} failed, {len(waits)} waiting"
    say(f"{counts}; {record.seconds:.1f} s")
    return 0 if record.ok else 1


def _anew(option: str, assets: tuple[str, ...], asked: list[str] | None) -> list[str]:
    """Return the items of `--retrain [ITEM ...]` and the like: all of the option's assets where none is named."""
    for item in asked or ():
        if item.partition("[")[0] not in assets:
            raise ValueError(f"--{option} {item}: takes {', '.join(assets)}, or a partition of one")
    return [] if asked is None else asked or list(assets)


def _status(args: argparse.Namespace) -> int:
    from assets.status import describe_status
    from resources.instance import open_instance

    with open_instance(args.root) as instance:
        say("\n".join(describe_status(args.root, args.profile, instance)))
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from assets.sweeps import write_sweep
    from puzzle_dag.config.sweep import read_sweep, read_sweeps

    conf = args.root / "conf"
    sweeps = [read_sweep(conf, name) for name in args.names] or read_sweeps(conf, args.profile)
    if not sweeps:
        raise ValueError(f"conf/sweeps has no sweep of profile {args.profile}; docs/scenario.md says how to write one")
    code = 0
    for sweep in sweeps:
        swept = write_sweep(args.root, sweep)
        say(f"sweep {sweep.name}: {len(swept.written)} scenarios written, {len(swept.unchanged)} as before, {len(swept.retired)} retired")
    for profile in dict.fromkeys(sweep.profile for sweep in sweeps):
        code = max(code, _refresh(argparse.Namespace(root=args.root, profile=profile, select=[], remake=[])))
    return code


def _add_scenario(args: argparse.Namespace) -> int:
    from assets.scenarios import add_scenario

    scenario = add_scenario(args.root, args.profile, args.file)
    command = f"python -m assets refresh --profile {args.profile}"
    say(f"scenario {scenario.name} is in conf/scenarios and in profile {args.profile}; run `{command}`")
    return 0


def _remove_scenario(args: argparse.Namespace) -> int:
    from assets.scenarios import remove_scenario

    moved = remove_scenario(args.root, args.profile, args.name)
    where = "; its file stays" if moved is None else f"; its file is now {moved.relative_to(args.root)}"
    say(f"scenario {args.name} is no more solved by profile {args.profile}{where}, and its results are kept")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from assets.demo import run_demo

    return 0 if run_demo(args.root, args.profile, say).ok else 1


def _ui(args: argparse.Namespace) -> int:
    from resources.instance import dagster_home
    from resources.pages import serve_pages

    environment = {**os.environ, "DAGSTER_HOME": str(dagster_home(args.root)), "PYTHONPATH": str(args.root)}
    command = [sys.executable, "-m", "dagster", "dev", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(args.port)]
    with serve_pages(args.root / "var") as address, contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how it is ended
        say(f"HTML reports: {address}")
        return subprocess.call(command, cwd=args.root, env=environment)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m assets", description=__doc__)
    parser.set_defaults(root=project_root())
    commands = parser.add_subparsers(required=True)
    profile = argparse.ArgumentParser(add_help=False)
    profile.add_argument("--profile", default=os.environ.get("PUZZLE_DAG_PROFILE", "tiny"), help="name of a file in conf/profiles")

    refresh = commands.add_parser("refresh", parents=[profile], help="bring everything that is stale up to date")
    wanted = 'only these: "asset" or "asset[partition]"'
    refresh.add_argument("--select", nargs="*", action="extend", default=[], metavar="ASSET", help=wanted)
    refresh.add_argument("--remake", nargs="*", action="extend", default=[], metavar="ASSET", help="run these even where they are fresh")
    for option, what in (
        ("retrain", "train anew what the store has"),
        ("rescore", "score anew"),
        ("remeasure", "measure anew"),
        ("regrade", "grade anew"),
    ):
        said = f"{what}, and replace it; all, or only these"
        refresh.add_argument(f"--{option}", nargs="*", action="extend", default=None, metavar="ITEM", help=said)
    refresh.set_defaults(run=_refresh)
    status = commands.add_parser("status", parents=[profile], help="say what is stale and why")
    status.set_defaults(run=_status)
    scenario = commands.add_parser("scenario", help="scenarios of a profile").add_subparsers(required=True)
    add = scenario.add_parser("add", parents=[profile], help="add a scenario, or replace one")
    add.add_argument("file", type=Path)
    add.set_defaults(run=_add_scenario)
    remove = scenario.add_parser("remove", parents=[profile], help="solve a scenario no more; its results stay")
    remove.add_argument("name")
    remove.set_defaults(run=_remove_scenario)
    sweep = commands.add_parser("sweep", parents=[profile], help="write the scenarios of the profile's sweeps, then refresh")
    sweep.add_argument("names", nargs="*", metavar="NAME", help="files in conf/sweeps; all of the profile by default")
    sweep.set_defaults(run=_sweep)
    demo = commands.add_parser("demo", parents=[profile], help="refresh, then print the results, the times and the path of the report")
    demo.set_defaults(run=_demo)
    ui = commands.add_parser("ui", help="Dagster's webserver and daemon over var/dagster")
    ui.add_argument("--port", type=int, default=3000)
    ui.set_defaults(run=_ui)
    return parser


def _is_interruption(error: BaseException) -> bool:
    if isinstance(error, KeyboardInterrupt):
        return True
    from dagster import DagsterExecutionInterruptedError

    return isinstance(error, DagsterExecutionInterruptedError)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; a mistake of the user's ends it with a message, not with a stack trace."""
    args = _parser().parse_args(arguments)
    _quiet()
    try:
        code: int = args.run(args)
    except ValueError as error:  # every mistake of a user's is one, and says what to fix
        sys.stderr.write(f"error: {error}\n")
        return 2
    except BaseException as error:
        if not _is_interruption(error):
            raise
        sys.stderr.write("\ninterrupted: what was finished is kept, and the next refresh goes on from there\n")
        return _INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
