"""How the report writes numbers, tables, sections and where each figure comes from."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.study._report_data import Runs
from benchmarks.study._statistics import Interval

NOT_RUN = "not run"

#: What the arms are called in tables and figures.
LABELS = {
    "sgd": "SGD, momentum",
    "adam": "Adam(lr)",
    "adam_b1": "Adam(lr, b1)",
    "better_adam": "the better Adam on validation",
    "amsgrad": "AMSGrad",
    "radam": "RAdam",
    "nadam": "NAdam",
    "sophia": "Sophia",
    "rmsprop": "RMSProp",
    "lam_weight": "LAM per weight",
    "lam_layer": "LAM per layer",
    "lama_paper": "LAMA with the paper's settings",
    "lama": "tuned LAMA",
    "lama_ema": "tuned LAMA-EMA",
    "adam_matched": "Adam with LAMA's gain",
    "lama_frozen": "LAMA with frozen alpha",
    "lama_shuffled": "LAMA with shuffled alpha",
    "lama_flipped": "LAMA with flipped sign",
    "v1": "V1 relative curvature",
    "v1_shuffled": "V1 with shuffled alpha",
    "v2": "V2 one mode's optimum",
    "v3": "V3 YellowFin per layer",
    "v3_global": "V3 YellowFin, global",
    "v4": "V4 quasi-hyperbolic",
    "v4_fixed": "V4 with fixed nu",
    "v5": "V5 curvature caps the rate",
    "v6": "V6 curvature sets the rate",
    "v6_shuffled": "V6 with shuffled rates",
    "layer_momenta": "momentum per layer",
    "layer_rates": "learning rate per layer",
    "global_momentum": "one b1",
}


@dataclass
class Section:
    """One question: the sentence that answers it, then tables, pictures and limits."""

    title: str
    answer: str
    blocks: list[str] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)  # a long table's name and body
    sources: dict[str, list[str]] = field(default_factory=dict)  # workload -> ids

    def cite(self, workload: str, *runs: Runs | None) -> None:
        """Notes the lines that a figure of this section is from."""
        ids = self.sources.setdefault(workload, [])
        ids += [found.id for found in runs if found and found.id not in ids]

    def markdown(self) -> str:
        """The section as Markdown, without its long tables."""
        parts = [f"## {self.title}", f"**{self.answer}**", *self.blocks]
        return "\n\n".join(part for part in parts if part)

    def tables(self) -> str:
        """The long tables, and the lines that the figures come from."""
        parts = [f"### {summary}\n\n{body}" for summary, body in self.details if body]
        if any(self.sources.values()):
            parts.append(_sources(self.sources))
        return "\n\n".join(parts)


def label(arm: str) -> str:
    """The arm's name for a reader."""
    return LABELS.get(arm, arm.replace("_", " "))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns with a number in them to the right, words to the left."""
    rows = list(rows)
    columns = [[row[i][:1] for row in rows] for i in range(len(header))]
    align = ["--:" if set("".join(c)) & set("+<0123456789") else ":--" for c in columns]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, align, *rows))


def percent(interval: Interval) -> str:
    """An interval of a relative difference, in per cent."""
    scaled = Interval(*(100 * x for x in interval))
    return signed(scaled, " %")


def signed(interval: Interval, unit: str = "") -> str:
    """An estimate with its sign and, where there is one, its interval."""
    if math.isnan(interval.estimate):
        return "-"
    text = f"{_three(interval.estimate)}{unit}"
    if math.isnan(interval.low) or math.isnan(interval.high):
        return text
    return f"{text} [{_three(interval.low)}, {_three(interval.high)}]"


def number(value: float, digits: int = 3) -> str:
    """A number to a few significant digits; a dash for none."""
    if math.isnan(value):
        return "-"
    return "infinite" if math.isinf(value) else f"{value:.{digits}g}"


def p_value(p: float) -> str:
    """A p-value to two digits."""
    if math.isnan(p):
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.2g}"


def share(value: float) -> str:
    """A share, in per cent; nothing for none."""
    return f"{100 * value:.3g} %" if value else ""


def count(n: int, noun: str) -> str:
    """``1 workload``, ``2 workloads``."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def capital(text: str) -> str:
    """The text with a capital first letter, as a sentence begins."""
    return text[:1].upper() + text[1:]


def picture(name: str, alt: str) -> str:
    """A place for a picture, whose path the report fills in."""
    return f"![{alt}]({{pictures}}/{name})"


def _three(value: float) -> str:
    if math.isinf(value):
        return "+infinite" if value > 0 else "-infinite"
    magnitude = abs(value)
    return f"{value:+.0f}" if magnitude >= 100 else f"{value:+.{1 if magnitude >= 10 else 2}f}"


def _sources(sources: dict[str, list[str]]) -> str:
    rows = [
        (f"`{workload}.jsonl`", " ".join(f"`#{i}`" for i in ids))
        for workload, ids in sources.items()
        if ids
    ]
    return "### Lines that the figures come from\n\n" + table(("file", "id"), rows)
