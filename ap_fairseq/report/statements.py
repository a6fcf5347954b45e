"""How the attention kinds of one model differ, said in sentences whose every clause depends on its numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ap_fairseq.report.analysis import BROAD, PATTERNS, Concentration, KeptMass
from ap_fairseq.report.results import System
from ap_fairseq.sites import AttentionKind

ALIKE = 0.02  # shares that differ by less are called alike


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
    paragraphs = {
        "What can be pruned": _prunability(kept),
        "Breadth": _breadth(measured),
        "Places": _places(measured),
        "Patterns": _named(measured),
        "Heads": _heads(kept),
        "Layers": _layers(kept),
        "Nominal sparsity": _nominal(nominal_half),
        "Translation": _scores(systems),
    }
    return {aspect: text for aspect, text in paragraphs.items() if text}


def _prunability(kept: Mapping[AttentionKind, KeptMass]) -> str:
    parts = []
    for sparsity in (0.5, 0.8, 0.9):
        reached = {kind.value: curve.kind.at(sparsity) for kind, curve in kept.items()}
        shares = {name: share for name, share in reached.items() if share is not None}
        if shares:
            parts.append(f"At {sparsity:.0%} effective sparsity, {_ranking(shares, 'keeps', 'of its attention mass')}.")
    limits = {kind.value: curve.kind.sparsity[-1] for kind, curve in kept.items()}
    limited = [f"{name} by more than {limit:.0%}" for name, limit in limits.items() if limit < 0.9]
    if limited:
        parts.append(f"As guaranteed cells are never pruned, one cannot prune {_join(limited)}.")
    gains = {}
    for kind, curve in kept.items():
        half, even = curve.kind.at(0.5), curve.even.at(0.5)
        if half is not None and even is not None:
            gains[kind.value] = half - even
    if gains:
        listed = ", ".join(f"{100 * gain:+.0f} points for {name}" for name, gain in gains.items())
        parts.append(
            f"Against attention spread evenly over each sentence, for which short sentences alone decide what is kept, "
            f"that is {listed} at 50%."
        )
    return " ".join(parts)


def _breadth(measured: Mapping[AttentionKind, Concentration]) -> str:
    relative = {kind.value: float(c.heads["relative_entropy"].mean()) for kind, c in measured.items()}
    order = sorted(relative, key=relative.get)
    bits = ", ".join(
        f"{name} {measured[AttentionKind(name)].heads['entropy'].mean():.2f} bits ({relative[name]:.0%})"
        for name in order
    )
    text = f"Entropy of the mean attention, and its share of the entropy of evenly spread attention: {bits}."
    if len(order) > 1:
        if relative[order[-1]] - relative[order[0]] < ALIKE:
            text += " The kinds are about equally concentrated."
        else:
            text += f" {order[0]} is the most concentrated kind and {order[-1]} the broadest."
    return text


def _places(measured: Mapping[AttentionKind, Concentration]) -> str:
    names = {
        "near_diagonal": "within one position of the diagonal",
        "first": "on the first column",
        "end": "on the last source token",
    }
    parts = []
    for place, words in names.items():
        shares = [
            f"{kind.value} {c.heads[place].mean():.0%} ({_against(c.heads[place].mean(), c.uniform[place])})"
            for kind, c in measured.items()
            if place in c.heads
        ]
        if shares:
            parts.append(f"Mass {words}: {', '.join(shares)}.")
    return " ".join(parts)


def _against(share: float, uniform: float) -> str:
    if uniform <= 0:
        return "evenly spread attention would put none there"
    ratio = share / uniform
    if 0.9 <= ratio <= 1.1:
        return f"as evenly spread attention, {uniform:.0%}"
    return f"{ratio:.1f} times the {uniform:.0%} of evenly spread attention"


def _named(measured: Mapping[AttentionKind, Concentration]) -> str:
    parts = []
    for kind, c in measured.items():
        counts = {name: int((c.patterns == name).sum()) for name in PATTERNS}
        found = [f"{count} {name}" for name, count in counts.items() if count]
        broad = int((c.patterns == BROAD).sum())
        if found:
            parts.append(f"{kind.value} has {', '.join(found)} and {broad} broad of {c.patterns.size} heads")
        else:
            parts.append(f"all {c.patterns.size} heads of {kind.value} are broad")
    text = "; ".join(parts) + "."
    return text if text.startswith(tuple(AttentionKind)) else text[0].upper() + text[1:]


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
            parts.append(f"heads of {kind.value} are alike ({low[2]:.0%} to {high[2]:.0%})")
        else:
            least, most = (f"{share:.0%} (layer {layer}, head {head})" for layer, head, share in (low, high))
            parts.append(f"heads of {kind.value} range from {least} to {most}")
    return f"Mass that single heads keep when half of their own pairs go: {'; '.join(parts)}." if parts else ""


def _layers(kept: Mapping[AttentionKind, KeptMass]) -> str:
    parts = []
    for kind, curve in kept.items():
        shares = [one.at(0.5) for one in curve.layers]
        if len(shares) < 2 or None in shares:
            continue
        spread = max(shares) - min(shares)
        if spread < ALIKE:
            parts.append(f"layers of {kind.value} are alike ({min(shares):.0%} to {max(shares):.0%})")
            continue
        steps = np.diff(shares)
        trend = "rising with depth" if (steps > 0).all() else "falling with depth" if (steps < 0).all() else "unevenly"
        parts.append(f"{kind.value} goes from {shares[0]:.0%} in layer 0 to {shares[-1]:.0%} in the last, {trend}")
    return f"By layer, kept mass at 50%: {'; '.join(parts)}." if parts else ""


def _nominal(nominal_half: Mapping[AttentionKind, float]) -> str:
    shares = ", ".join(f"{share:.1%} of {kind.value}" for kind, share in nominal_half.items())
    return f"The authors' percentile at a nominal 50% would prune {shares} of the pairs that exist."


def _scores(systems: list[System]) -> str:
    """What pruning one kind alone costs: against the same training and seed without masks if there is, else dense."""
    unpruned = {(s.variant, s.seed): s for s in systems if s.series is not None and not s.pruned}
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
    return f"Change of BLEU when one kind alone is pruned: {'; '.join(parts)}." if parts else ""


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
