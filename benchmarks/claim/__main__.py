"""The command line of the package."""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import claim
from benchmarks.claim import control
from benchmarks.claim.plan import (
    BUDGETS,
    NETWORKS,
    Job,
    control_runs,
    runs,
    stored_result,
    tuning_jobs,
)
from benchmarks.claim.report import report
from benchmarks.claim.training import result
from benchmarks.tables import conditions, describe


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claim", description=(claim.__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--part",
        choices=("claim", "control", "tuning"),
        default="claim",
        help="gain by strength; warp alone, size alone and both; comparison of settings",
    )
    parser.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        default=[0, 1 / 3, 2 / 3, 1],
        help="strengths from 0 to 1; control and tuning use only the largest",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--networks",
        choices=NETWORKS,
        nargs="+",
        help="default: deeplab and rfcn; for control and tuning, deeplab-lite0",
    )
    parser.add_argument("--fraction", type=float, default=1, help="of the training iterations")
    options = parser.parse_args()
    if not all(0 <= strength <= 1 for strength in options.strengths):
        parser.error(
            f"argument --strengths: expected numbers from 0 to 1, but got {options.strengths}"
        )
    if not 0 < options.fraction < math.inf:
        parser.error(
            f"argument --fraction: expected a positive finite number, but got {options.fraction}"
        )
    budgets = {
        name: replace(budget, steps=max(1, round(options.fraction * budget.steps)))
        for name, budget in BUDGETS.items()
    }
    strongest = max(options.strengths)
    if options.part == "claim":
        networks = options.networks or ("deeplab", "rfcn")
        chosen = runs(options.strengths, options.seeds, networks)
        todo = [Job(run, budgets[run.network]) for run in chosen]
    elif options.part == "control":
        chosen = control_runs(strongest, options.seeds, options.networks or ("deeplab-lite0",))
        todo = [Job(run, budgets[run.network]) for run in chosen]
    else:
        todo = tuning_jobs(strongest, budgets, options.networks or ("deeplab-lite0",))
    try:
        for job in todo:
            stored_result(job, options.out)
    except ValueError as error:
        parser.error(str(error))
    found = conditions()
    print(describe(found), flush=True)
    results: list[dict[str, Any]] = []
    tables = ""
    for job in todo:
        results.append(one := result(job, options.out))
        print(f"{job.folder}/{job.run.name}: {one['score']:.1f}", flush=True)
        if options.part == "claim":
            tables = report(results, found, options.out)
        elif options.part == "control":
            tables = control.report(results, found, options.out)
        else:
            tables = control.tuning_table(results)
    print(tables)


if __name__ == "__main__":
    main()
