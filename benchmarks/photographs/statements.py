"""The paper's statements on Tables 1 to 3, checked one by one.

Each compares variants seed by seed, over the seeds that all of them have, and is omitted as long as
there is none. With the paper's own numbers, all statements hold.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise, permutations
from statistics import fmean

from benchmarks.grid import Statement, difference, every, gain_in_words, outcome, some
from benchmarks.photographs.numbers import METRICS, PLACES, TITLES, Results, gains, mean, shared
from benchmarks.photographs.plan import (
    CONV,
    CONV_POOL,
    DILATIONS,
    PLAIN,
    POOL,
    POOLING,
    TABLE1,
    Network,
    Variant,
)


def statements(results: Mapping[Network, Results]) -> list[Statement]:
    """All statements that the finished runs can confirm or refute."""
    found = [
        statement
        for network, of_network in results.items()
        for metric in METRICS[network]
        for check in (_layers, _dilations)
        for statement in check(of_network, metric, f"{TITLES[network]}, {metric}")
    ]
    for network in POOLING:
        found += _pooling(results.get(network, {}), TITLES[network])
    return [*found, *_best_dilations(results), *_table2(results.get("rfcn", {}))]


def _layers(found: Results, metric: str, where: str) -> Iterator[Statement]:
    of = shared(found, TABLE1, metric)
    if not of:
        return
    added = {variant: difference(of[variant], of[PLAIN]) for variant in TABLE1[1:]}
    numbers = ", ".join(f"{v.layers}: {gain_in_words(gain)}" for v, gain in added.items())
    helps = every(map(outcome, added.values()))
    yield Statement(f"{where}: deformable layers help", helps, f"Gain by layers {numbers}")
    first, last = added[TABLE1[1]], difference(of[TABLE1[-1]], of[CONV])
    # In the paper, going from 3 to 6 layers adds less than the first layer, in every network.
    yield Statement(
        f"{where}: the gain saturates: the last 3 of 6 layers add less than 1 layer alone",
        every((outcome(first), outcome(difference(first, last)))),
        f"1 layer adds {gain_in_words(first)}, the last 3 add {gain_in_words(last)}",
    )


def _dilations(found: Results, metric: str, where: str) -> Iterator[Statement]:
    if of := shared(found, DILATIONS, metric):
        low, *between, high = DILATIONS
        ahead = (
            every(outcome(difference(of[variant], of[end])) for end in (low, high))
            for variant in between
        )
        means = ", ".join(f"{v.dilation}: {mean(values):.1f}" for v, values in of.items())
        yield Statement(
            f"{where}: larger dilation helps up to a point: one in between is ahead "
            f"of dilation {low.dilation} and of {high.dilation}",
            some(ahead),
            f"Dilation {means} ({len(of[low])} seeds)",
        )
    if of := shared(found, (*DILATIONS, CONV), metric):
        over = {v.dilation: difference(of[CONV], of[v]) for v in DILATIONS}
        yield Statement(
            f"{where}: deformable convolution is best: no dilation is ahead of it",
            every(outcome(gain, ties=True) for gain in over.values()),
            ", ".join(f"{gain_in_words(gain)} over dilation {d}" for d, gain in over.items()),
        )


def _pooling(found: Results, where: str) -> Iterator[Statement]:
    metrics = half, strict = "mAP@0.5", "mAP@0.7"
    gain = {metric: gains(found, POOL, metric) for metric in metrics}
    if more := difference(gain[strict], gain[half]):
        numbers = f"{gain_in_words(gain[half])} at IoU 0.5, {gain_in_words(gain[strict])} at 0.7"
        helps = outcome(gain[strict])
        yield Statement(f"{where}: deformable pooling helps at IoU 0.7", helps, numbers)
        most = outcome(more)
        yield Statement(f"{where}: deformable pooling helps most at IoU 0.7", most, numbers)
    for metric in metrics:
        if of := shared(found, (CONV, POOL, CONV_POOL), metric):
            over = [difference(of[CONV_POOL], of[other]) for other in (CONV, POOL)]
            yield Statement(
                f"{where}, {metric}: both together are best",
                every(map(outcome, over)),
                f"{gain_in_words(over[0])} over deformable convolution, "
                f"{gain_in_words(over[1])} over deformable pooling",
            )


def _best_dilations(results: Mapping[Network, Results]) -> Iterator[Statement]:
    """Networks differ if each of two does better with its best dilation than with the other's."""
    scores: dict[Network, dict[Variant, dict[int, float]]] = {
        network: of
        for network, found in results.items()
        if (of := shared(found, DILATIONS, METRICS[network][0]))
    }
    if len(scores) < 2:
        return
    best: dict[Network, Variant] = {}
    for network, of in scores.items():
        means = {variant: mean(values) for variant, values in of.items()}
        best[network] = max(means, key=means.__getitem__)

    def prefers(network: Network, other: Variant) -> bool:
        of, own = scores[network], best[network]
        return own != other and outcome(difference(of[own], of[other])) is True

    differs = any(prefers(a, best[b]) and prefers(b, best[a]) for a, b in permutations(best, 2))
    (first, *others) = set(best.values())
    alike = not others and all(
        prefers(network, other) for network in best for other in DILATIONS if other != first
    )
    numbers = ", ".join(f"{TITLES[network]}: {v.dilation}" for network, v in best.items())
    yield Statement(
        "the best dilation differs by task",
        True if differs else False if alike else None,
        f"Best dilation by the mean {numbers}",
    )


def _table2(found: Results) -> Iterator[Statement]:
    of_seed = {seed: one["dilation"] for seed, one in found.get(CONV, {}).items()}
    layers = {
        rows[0]["layer"]: {
            place: {seed: row[place]["mean"] for seed, row in zip(of_seed, rows, strict=True)}
            for place in PLACES
        }
        for rows in zip(*of_seed.values(), strict=True)
    }
    every_value = [v for of in layers.values() for values in of.values() for v in values.values()]
    if not layers or None in every_value:
        return
    numbers = "; ".join(
        f"{name}: {', '.join(f'{place} {fmean(of[place].values()):.2f}' for place in PLACES)}"
        for name, of in layers.items()
    )

    def grows(*places: str) -> bool | None:
        return every(
            outcome(difference(of[larger], of[smaller]))
            for of in layers.values()
            for smaller, larger in pairwise(places)
        )

    where = "R-FCN, 3 layers"
    yield Statement(
        f"{where}: effective dilation grows with the object in every layer",
        grows("small", "medium", "large"),
        numbers,
    )
    yield Statement(
        f"{where}: effective dilation on the background lies between that on medium and on large "
        "objects in every layer",
        grows("medium", "background", "large"),
        numbers,
    )
    # The paper shows this (Table 2) without a comment.
    yield Statement(
        f"{where}: effective dilation grows from layer to layer",
        every(
            outcome(difference(later[place], earlier[place]))
            for earlier, later in pairwise(layers.values())
            for place in PLACES
        ),
        numbers,
    )
