"""The command line of the package."""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import claim
from benchmarks.claim.plan import BUDGETS, NETWORKS, runs, stored_result
from benchmarks.claim.report import report
from benchmarks.claim.training import result
from benchmarks.tables import conditions, describe


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claim", description=(claim.__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0, 1 / 3, 2 / 3, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", choices=NETWORKS, nargs="+", default=NETWORKS)
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
    todo = runs(options.strengths, options.seeds, options.networks)
    try:
        for run in todo:
            stored_result(run, budgets[run.network], options.out)
    except ValueError as error:
        parser.error(str(error))
    found = conditions()
    print(describe(found), flush=True)
    results: list[dict[str, Any]] = []
    tables = ""
    for run in todo:
        results.append(result(run, budgets[run.network], options.out))
        tables = report(results, found, options.out)
    print(tables)


if __name__ == "__main__":
    main()
