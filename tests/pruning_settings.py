"""How a recipe of the tests prunes: LHSPG in few steps, or another method, which has no such schedule."""

from __future__ import annotations

SCHEDULE = """\
  warmup_steps: 1
  periods: 2
  period_steps: 2
  settle_steps: 1"""


def prunes_by(settings: str) -> tuple[str, str]:
    """Return what replaces the schedule in a recipe: more settings, and the schedule where the method reads one."""
    others = "method: " in settings and "method: lhspg" not in settings
    return SCHEDULE, f"  {settings}" if others else f"{SCHEDULE}\n  {settings}"
