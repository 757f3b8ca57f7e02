"""The command line of the package."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from benchmarks import photographs
from benchmarks.grid import claimed
from benchmarks.photographs.figures import draw
from benchmarks.photographs.plan import (
    NETWORKS,
    TABLES,
    Job,
    finished,
    jobs,
    require_same_proposals,
    stored_result,
    tuning_jobs,
)
from benchmarks.photographs.processes import in_processes
from benchmarks.photographs.report import report, tuning_table
from benchmarks.photographs.training import prepare, proposals_digest
from benchmarks.tables import conditions, describe
from deformnet._errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.photographs",
        description=(photographs.__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, help="data set in VOC layout")
    parser.add_argument("--tables", type=int, choices=TABLES, nargs="+", default=TABLES)
    parser.add_argument("--networks", choices=NETWORKS, nargs="+", default=NETWORKS)
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="default: five for deeplab, three for detectors"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--fraction", type=float, default=1, help="of the training iterations")
    parser.add_argument(
        "--tune", action="store_true", help="compare settings on images of the training split"
    )
    parser.add_argument(
        "--print", action="store_true", help="print the tables of the finished runs"
    )
    parser.add_argument(
        "--draw",
        choices=("photographs", "boxes"),
        help="draw Figures 5 to 7 of the finished runs, over photographs or over boxes alone",
    )
    options = parser.parse_args()
    if not 0 < options.fraction < math.inf:
        parser.error(
            f"argument --fraction: expected a positive finite number, but got {options.fraction}"
        )
    if options.jobs < 1:
        parser.error(f"argument --jobs: expected at least 1, but got {options.jobs}")
    chosen = options.networks, options.seeds, options.fraction
    if not options.print and options.data is None:
        parser.error("expected --data, a data set in VOC layout")
    if options.draw:
        files, lacking = draw(options.out, options.data, photographs=options.draw == "photographs")
        print(*files, *lacking, sep="\n")
        sys.exit(0 if files else 1)
    todo = tuning_jobs(*chosen) if options.tune else jobs(options.tables, *chosen)
    try:
        if not options.print:
            missing = [job for job in todo if stored_result(job, options.out) is None]
            print(describe(conditions()), flush=True)
            torch.set_num_threads(options.jobs)
            _prepare(missing, options.data, options.out, "tuning" if options.tune else "runs")
            if not in_processes(options.jobs, todo, options.data, options.out):
                sys.exit(1)
        print(tuning_table(options.out) if options.tune else report(options.out))
    except UserError as error:
        parser.error(str(error))


def _prepare(
    missing: Sequence[Job], data: Path, out: Path, kind: Literal["runs", "tuning"]
) -> None:
    """Prepares the jobs, and requires that they use the same proposals as the finished ones."""
    with claimed(out / "locks" / "preparation", wait=True):
        prepare(missing, data, out)
    to_come = (
        {"name": job.name, "run": job.run.to_json(), "proposals": proposals_digest(job, out)}
        for job in missing
    )
    require_same_proposals([*finished(out, kind), *to_come])


if __name__ == "__main__":
    main()
