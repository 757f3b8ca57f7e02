"""The paper's statements on Tables 1 to 3, checked one by one."""

from collections.abc import Iterator, Mapping
from statistics import fmean

from benchmarks.grid import Statement, gain_in_words
from benchmarks.photographs.numbers import METRICS, PLACES, TITLES, Results, gains, mean, scores
from benchmarks.photographs.plan import (
    CONV,
    CONV_POOL,
    DILATIONS,
    PLAIN,
    POOL,
    POOLING,
    TABLE1,
    Network,
)


def statements(results: Mapping[Network, Results]) -> list[Statement]:
    """All statements that the finished runs can confirm or refute, by their means over seeds."""
    found = [
        statement
        for network, of_network in results.items()
        for metric in METRICS[network]
        for statement in _of_metric(of_network, metric, f"{TITLES[network]}, {metric}")
    ]
    for network in POOLING:
        found += _pooling(results.get(network, {}), TITLES[network])
    return [*found, *_best_dilations(results), *_table2(results.get("rfcn", {}))]


def _of_metric(found: Results, metric: str, where: str) -> Iterator[Statement]:
    layered = [variant for variant in TABLE1 if variant.layers and variant in found]
    steps = {variant: gains(found, variant, metric) for variant in layered}
    if PLAIN in found and len(layered) == len(TABLE1) - 1:
        numbers = ", ".join(f"{v.layers}: {gain_in_words(gain)}" for v, gain in steps.items())
        helps = all(mean(gain) > 0 for gain in steps.values())
        yield Statement(f"{where}: deformable layers help", helps, f"Gain by layers {numbers}")
        last = gains(found, TABLE1[-1], metric, over=CONV)
        yield Statement(
            f"{where}: the gain saturates",
            mean(last) < mean(steps[CONV]),
            f"3 layers add {gain_in_words(steps[CONV])}, the other 3 add {gain_in_words(last)}",
        )
    dilated = [variant for variant in DILATIONS if variant in found]
    if len(dilated) == len(DILATIONS):
        means = {variant: mean(scores(found, variant, metric)) for variant in dilated}
        best = max(means, key=means.__getitem__)
        yield Statement(
            f"{where}: larger dilation helps up to a point",
            best not in (DILATIONS[0], DILATIONS[-1]),
            "Dilation " + ", ".join(f"{v.dilation}: {value:.1f}" for v, value in means.items()),
        )
        if CONV in found:
            gain = gains(found, CONV, metric, over=best)
            yield Statement(
                f"{where}: deformable convolution is better than any dilation",
                mean(gain) > 0,
                f"{gain_in_words(gain)} over dilation {best.dilation}",
            )


def _pooling(found: Results, where: str) -> Iterator[Statement]:
    if not {PLAIN, POOL} <= found.keys():
        return
    at_half, strict = (gains(found, POOL, metric) for metric in ("mAP@0.5", "mAP@0.7"))
    numbers = f"{gain_in_words(at_half)} at IoU 0.5, {gain_in_words(strict)} at 0.7"
    yield Statement(f"{where}: deformable pooling helps at IoU 0.7", mean(strict) > 0, numbers)
    more = mean(strict) > mean(at_half)
    yield Statement(f"{where}: deformable pooling helps most at IoU 0.7", more, numbers)
    if {CONV, CONV_POOL} <= found.keys():
        for metric in ("mAP@0.5", "mAP@0.7"):
            over = {other: gains(found, CONV_POOL, metric, over=other) for other in (CONV, POOL)}
            yield Statement(
                f"{where}, {metric}: both together are best",
                all(mean(gain) > 0 for gain in over.values()),
                f"{gain_in_words(over[CONV])} over deformable convolution, "
                f"{gain_in_words(over[POOL])} over deformable pooling",
            )


def _best_dilations(results: Mapping[Network, Results]) -> Iterator[Statement]:
    best: dict[str, int] = {}
    for network, found in results.items():
        if all(variant in found for variant in DILATIONS):
            metric = METRICS[network][0]
            means = {v.dilation: mean(scores(found, v, metric)) for v in DILATIONS}
            best[TITLES[network]] = max(means, key=means.__getitem__)
    if len(best) > 1:
        numbers = ", ".join(f"{title}: {dilation}" for title, dilation in best.items())
        differs = len(set(best.values())) > 1
        yield Statement("the best dilation differs by task", differs, f"Best dilation {numbers}")


def _table2(found: Results) -> Iterator[Statement]:
    by_seed = [one["dilation"] for one in found.get(CONV, {}).values()]
    if not by_seed:
        return
    layers: dict[str, dict[str, float]] = {}
    for same in zip(*by_seed, strict=True):
        spreads = {place: [layer[place]["mean"] for layer in same] for place in PLACES}
        if any(None in values for values in spreads.values()):
            return
        layers[same[0]["layer"]] = {place: fmean(values) for place, values in spreads.items()}
    numbers = "; ".join(
        f"{name}: {', '.join(f'{place} {value:.2f}' for place, value in of_layer.items())}"
        for name, of_layer in layers.items()
    )
    yield Statement(
        "R-FCN, 3 layers: effective dilation grows with the object in every layer",
        all(it["small"] < it["medium"] < it["large"] for it in layers.values()),
        numbers,
    )
    yield Statement(
        "R-FCN, 3 layers: that on the background lies between medium and large objects",
        all(it["medium"] < it["background"] < it["large"] for it in layers.values()),
        numbers,
    )
