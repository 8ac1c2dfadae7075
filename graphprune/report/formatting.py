"""Numbers as people read them."""

from __future__ import annotations


def count(value: int) -> str:
    """Return a whole number with its thousands apart: ``134,515,008``."""
    return f"{value:,}"


def number(value: float) -> str:
    """Return a measured number with three to five digits that matter: ``17.42``, ``1,250``, ``3.1e-6``."""
    size = abs(value)
    if size >= 1e9 or 0 < size < 0.001:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 or size == 0 else f"{value:.3g}"


def share(value: float) -> str:
    """Return a share in 0 to 1 as a percentage: ``26.3 %``."""
    return f"{100 * value:.1f} %"


def change(before: float, after: float) -> str:
    """Return the relative change, signed: ``+18.9 %`` or ``−26.3 %``; a dash if `before` is zero."""
    if before == 0:
        return "–"
    percent = 100 * (after / before - 1)
    sign = "−" if percent < 0 else "+"
    return f"{sign}{abs(percent):.1f} %"


def against_dense(loss: float) -> str:
    """Return how far a loss is above the dense model's, or below, which is better: ``0.12 above``, ``0.03 below``."""
    return f"{number(abs(loss))} {'below' if loss < 0 else 'above'}"


def times(ratio: float) -> str:
    """Return a ratio: ``3.41×``."""
    return f"{number(ratio)}×"


def size(value: int) -> str:
    """Return bytes in decimal units: ``269.1 MB``."""
    amount = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.95:
            return f"{value} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:,.1f} TB"


def duration(seconds: float) -> str:
    """Return a time: ``0.42 s``, ``12.3 s``, ``4 min 07 s`` or ``2 h 05 min``."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
