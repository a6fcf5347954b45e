"""How the attention kinds of one model differ, in sentences made from its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ap_fairseq.pruning.summary import LayerSummary, of_kinds
from ap_fairseq.report.analysis import BROAD, PATTERNS, Concentration, KeptMass
from ap_fairseq.report.systems import UNKNOWN, System
from ap_fairseq.sites import AttentionKind

ALIKE = 0.02  # shares that differ by less are called alike
NO_ATTENTION = "The recorded model has no attention of this kind left."


def overview(
    measured: Mapping[AttentionKind, Concentration],
    kept: Mapping[AttentionKind, KeptMass],
    masks: str | None,
    summary: Iterable[LayerSummary],
) -> dict[AttentionKind, str]:
    """Return one sentence about each kind: what pruning it costs, and how many of its heads follow positions.

    Args:
        masks: name of the masks that *summary* is about, or None.
    """
    rows = {row.kind: row for row in of_kinds(summary)}
    sentences = {}
    for kind, c in measured.items():
        half, limit = kept[kind].kind.at(0.5), kept[kind].kind.sparsity[-1]
        if masks is not None:
            row = rows[kind.value]
            shares = f"prune {row.effective:.1%} of the pairs and keep {row.kept_mass:.1%} of the attention mass"
            cost = f"Masks “{masks}” {shares}"
        elif half is not None:
            cost = f"Half of the pairs hold {half:.1%} of the attention mass"
        else:
            cost = f"At most {limit:.1%} of the pairs can be pruned without --empty-rows"
        counts = _pattern_counts(c)
        named = c.patterns.size - counts.pop(BROAD, 0)
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        patterns = f" ({listed})" if named else ""
        sentences[kind] = f"{cost}; positional heads: {named} of {c.patterns.size}{patterns}."
    return sentences


def differences(
    measured: Mapping[AttentionKind, Concentration],
    kept: Mapping[AttentionKind, KeptMass],
    nominal_half: Mapping[AttentionKind, float],
    systems: list[System],
) -> dict[str, str]:
    """Return a paragraph for each aspect on which there are data.

    Args:
        nominal_half: effective sparsity of each kind at a nominal 50%.
    """
    paragraphs = {}
    if measured:
        paragraphs |= {
            "What can be pruned": _prunability(kept),
            "Entropy": _entropy(measured),
            "Positions": _positions(measured),
            "Patterns": _patterns(measured),
            "Heads": _heads(kept),
            "Layers": _layers(kept),
            "Nominal sparsity": _nominal(nominal_half),
        }
    paragraphs["Translation quality"] = _scores(systems)
    return {aspect: text for aspect, text in paragraphs.items() if text}


def _prunability(kept: Mapping[AttentionKind, KeptMass]) -> str:
    parts = []
    for sparsity in (0.5, 0.8, 0.9):
        reached = {kind.value: curve.kind.at(sparsity) for kind, curve in kept.items()}
        shares = {name: share for name, share in reached.items() if share is not None}
        if shares:
            parts.append(f"At {sparsity:.0%} effective sparsity, {_ranking(shares, 'keeps', 'of its attention mass')}.")
    limits = {kind.value: curve.kind.sparsity[-1] for kind, curve in kept.items()}
    limited = [f"{limit:.0%} of {name}" for name, limit in limits.items() if limit < 0.9]
    if limited:
        parts.append(f"As guaranteed cells are kept, at most {_join(limited)} can be pruned without --empty-rows.")
    gains = {}
    for kind, curve in kept.items():
        half, even = curve.kind.at(0.5), curve.even.at(0.5)
        if half is not None and even is not None:
            gains[kind.value] = half - even
    if gains:
        listed = ", ".join(f"{100 * gain:+.0f} points for {name}" for name, gain in gains.items())
        parts.append(f"Compared with uniform attention, that is {listed} at 50%.")
    return " ".join(parts)


def _entropy(measured: Mapping[AttentionKind, Concentration]) -> str:
    relative = {kind.value: c.average("relative_entropy") for kind, c in measured.items()}
    order = sorted(relative, key=relative.get)
    bits = ", ".join(
        f"{name} {measured[AttentionKind(name)].average('entropy'):.2f} bits ({relative[name]:.0%})" for name in order
    )
    text = f"Entropy of the mean attention, in brackets relative to uniform attention: {bits}."
    if len(order) > 1:
        if relative[order[-1]] - relative[order[0]] < ALIKE:
            text += " The kinds are about equally concentrated."
        else:
            text += f" {order[0]} is the most concentrated kind, {order[-1]} the least."
    return text


def _positions(measured: Mapping[AttentionKind, Concentration]) -> str:
    names = {
        "near_diagonal": "within one position of the diagonal",
        "first": "on the first column",
        "end": "on the last source token",
    }
    parts = []
    for place, words in names.items():
        shares = [
            f"{kind.value} {c.average(place):.0%} ({_against(c.average(place), c.uniform[place])})"
            for kind, c in measured.items()
            if place in c.heads
        ]
        if shares:
            parts.append(f"Attention mass {words}: {', '.join(shares)}.")
    return " ".join(parts)


def _against(share: float, uniform: float) -> str:
    if uniform <= 0:
        return "uniform attention: 0%"
    ratio = share / uniform
    if 0.9 <= ratio <= 1.1:
        return f"uniform attention: {uniform:.0%}"
    return f"{ratio:.1f} times the {uniform:.0%} of uniform attention"


def _patterns(measured: Mapping[AttentionKind, Concentration]) -> str:
    parts = []
    for kind, c in measured.items():
        found = [f"{count} {name}" for name, count in _pattern_counts(c).items()]
        parts.append(f"{kind.value} {', '.join(found)}")
    return f"Heads by pattern: {'; '.join(parts)}."


def _pattern_counts(c: Concentration) -> dict[str, int]:
    counts = {name: int((c.patterns == name).sum()) for name in (*PATTERNS, BROAD)}
    return {name: count for name, count in counts.items() if count}


def _heads(kept: Mapping[AttentionKind, KeptMass]) -> str:
    """How much heads of one kind differ at 50%, those that reach it."""
    parts = []
    for kind, curve in kept.items():
        flat = [(layer, head, one.at(0.5)) for layer, row in enumerate(curve.heads) for head, one in enumerate(row)]
        flat = [entry for entry in flat if entry[2] is not None]
        if len(flat) < 2:
            continue
        low, high = min(flat, key=lambda e: e[2]), max(flat, key=lambda e: e[2])
        if high[2] - low[2] < ALIKE:
            parts.append(f"{kind.value} {low[2]:.0%} to {high[2]:.0%}, all alike")
        else:
            least, most = (f"{share:.0%} (layer {layer}, head {head})" for layer, head, share in (low, high))
            parts.append(f"{kind.value} {least} to {most}")
    return f"Kept mass of single heads with half of their pairs pruned: {'; '.join(parts)}." if parts else ""


def _layers(kept: Mapping[AttentionKind, KeptMass]) -> str:
    parts = []
    for kind, curve in kept.items():
        shares = [one.at(0.5) for one in curve.layers]
        if len(shares) < 2 or None in shares:
            continue
        if max(shares) - min(shares) < ALIKE:
            parts.append(f"{kind.value} {min(shares):.0%} to {max(shares):.0%}, all alike")
            continue
        steps = np.diff(shares)
        trend = "rising" if (steps > 0).all() else "falling" if (steps < 0).all() else "without a trend"
        parts.append(f"{kind.value} {shares[0]:.0%} in the first layer, {shares[-1]:.0%} in the last, {trend}")
    return f"Kept mass of layers with half of their pairs pruned: {'; '.join(parts)}." if parts else ""


def _nominal(nominal_half: Mapping[AttentionKind, float]) -> str:
    shares = _join([f"{share:.1%} in {kind.value}" for kind, share in nominal_half.items()])
    return f"At a nominal 50%, the published percentile criterion would prune these shares of existing pairs: {shares}."


def _scores(systems: list[System]) -> str:
    """Compare systems with one pruned kind with the same training and seed without masks, or else with dense."""
    unpruned = {(s.variant, s.seed): s for s in systems if s.series not in (None, UNKNOWN) and not s.pruned}
    dense = {system.seed: system for system in systems if system.series is None}
    parts = []
    for system in systems:
        reference = unpruned.get((system.variant, system.seed), dense.get(system.seed, dense.get(None)))
        if len(system.pruned) == 1 and reference is not None:
            (kind,) = system.pruned
            change = system.scores["BLEU"] - reference.scores["BLEU"]
            parts.append(
                f"{kind} at {system.sparsity[kind]:.0%} {change:+.2f} ({system.name} against {reference.name})"
            )
    return f"Change in BLEU with a single kind pruned: {'; '.join(parts)}." if parts else ""


def _ranking(shares: Mapping[str, float], verb: str, what: str) -> str:
    order = sorted(shares, key=shares.get, reverse=True)
    text = f"{order[0]} {verb} {shares[order[0]]:.0%} {what}"
    rest = [f"{name} {shares[name]:.0%}" for name in order[1:]]
    if not rest:
        return text
    text += f", {_join(rest)}"
    gap = shares[order[0]] - shares[order[-1]]
    if gap < ALIKE:
        return text + ": no kind is easier to prune than another"
    return text + f"; {order[0]} is the easiest to prune and {order[-1]} the hardest, {100 * gap:.0f} points apart"


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
