"""Commands of the checkout: `python -m assets refresh | status | scenario add FILE | demo | ui`."""

import argparse
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

from resources.workspace import project_root


def _say(line: str = "") -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


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
    from assets.refresh import Outcome, refresh
    from resources.instance import open_instance

    def tell(outcome: Outcome) -> None:
        _say(f"{outcome.state:>6}  {outcome.item}  {outcome.seconds:.1f} s  ({'; '.join(outcome.reasons)})")

    with open_instance(args.root) as instance:
        record = refresh(args.root, args.profile, instance, select=args.select, remake=args.remake, on_outcome=tell)
    for check in record.failed_checks:
        _say(f" check  {check} did not pass")
    failed, waits = record.of("failed"), record.of("waits")
    counts = f"{len(record.ran)} materialized, {len(record.of('fresh'))} fresh, {len(failed)} failed, {len(waits)} waiting"
    _say(f"{counts}; {record.seconds:.1f} s")
    return 0 if record.ok else 1


def _status(args: argparse.Namespace) -> int:
    from assets.refresh import refresh
    from resources.instance import open_instance

    with open_instance(args.root) as instance:
        record = refresh(args.root, args.profile, instance, dry=True)
    stale = [o for o in record.outcomes if o.state != "fresh"]
    width = max([len(str(o.item)) for o in stale], default=0)
    for outcome in stale:
        _say(f"{outcome.state:>6}  {outcome.item!s:<{width}}  {'; '.join(outcome.reasons)}")
    _say(f"{len(stale)} of {len(record.outcomes)} to bring up to date")
    return 0


def _add_scenario(args: argparse.Namespace) -> int:
    from assets.scenarios import add_scenario

    scenario = add_scenario(args.root, args.profile, args.file)
    command = f"python -m assets refresh --profile {args.profile}"
    _say(f"scenario {scenario.name} is in conf/scenarios and in profile {args.profile}; run `{command}`")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from assets.demo import run_demo

    return 0 if run_demo(args.root, args.profile, _say).ok else 1


def _ui(args: argparse.Namespace) -> int:
    from resources.instance import dagster_home

    environment = {**os.environ, "DAGSTER_HOME": str(dagster_home(args.root)), "PYTHONPATH": str(args.root)}
    command = [sys.executable, "-m", "dagster", "dev", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(args.port)]
    return subprocess.call(command, cwd=args.root, env=environment)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m assets", description=__doc__)
    parser.set_defaults(root=project_root())
    commands = parser.add_subparsers(required=True)
    profile = argparse.ArgumentParser(add_help=False)
    profile.add_argument("--profile", default=os.environ.get("PUZZLE_DAG_PROFILE", "tiny"), help="name of a file in conf/profiles")

    refresh = commands.add_parser("refresh", parents=[profile], help="bring everything that is stale up to date")
    refresh.add_argument("--select", nargs="*", default=[], metavar="ASSET", help='only these: "asset" or "asset[partition]"')
    refresh.add_argument("--remake", nargs="*", default=[], metavar="ASSET", help="run these even where they are fresh")
    refresh.set_defaults(run=_refresh)
    status = commands.add_parser("status", parents=[profile], help="say what is stale and why")
    status.set_defaults(run=_status)
    scenario = commands.add_parser("scenario", help="scenarios of a profile").add_subparsers(required=True)
    add = scenario.add_parser("add", parents=[profile], help="add a scenario, or replace one")
    add.add_argument("file", type=Path)
    add.set_defaults(run=_add_scenario)
    demo = commands.add_parser("demo", parents=[profile], help="refresh, then print the results, the times and the path of the report")
    demo.set_defaults(run=_demo)
    ui = commands.add_parser("ui", help="Dagster's webserver and daemon over var/dagster")
    ui.add_argument("--port", type=int, default=3000)
    ui.set_defaults(run=_ui)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; a mistake of the user's ends it with a message, not with a stack trace."""
    args = _parser().parse_args(arguments)
    _quiet()
    try:
        code: int = args.run(args)
    except ValueError as error:  # every mistake of a user's is one, and says what to fix
        sys.stderr.write(f"error: {error}\n")
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
