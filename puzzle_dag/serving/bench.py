"""`vllm bench serve`, several runs in one process: importing vLLM takes about 9 s, more than a short run itself.

Run as `python -m puzzle_dag.serving.bench RUNS.json`, where RUNS.json lists the argument lists. Each run writes its
result under a partial name; it gets its own name, which the caller waits for, once the run is over.
"""

import json
import sys
from pathlib import Path

PARTIAL = ".partial"
"""Ending of a result's name while its run lasts."""


def main(arguments: list[str]) -> None:
    """Run the benchmarks that a file lists."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench_serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for run in json.loads(Path(arguments[0]).read_text()):
        settings = parser.parse_args(run)
        bench_serve(settings)
        written = Path(settings.result_dir) / settings.result_filename
        written.rename(written.with_name(written.name.removesuffix(PARTIAL)))


if __name__ == "__main__":
    main(sys.argv[1:])
