"""The rules: what each operator demands of its operands' layouts.

One file for each family. A rule takes the operator and the algebra and returns the layouts of the result, a list
of axes for one output, a tuple of lists for several:

    @rule("aten.linear.default")
    def linear(operator: Operator, algebra: Algebra) -> Axes: ...
"""

from graphprune.coupling.rules.registry import moves_numbers as moves_numbers
from graphprune.coupling.rules.registry import rule as rule
from graphprune.coupling.rules.registry import rule_for as rule_for
from graphprune.coupling.rules.registry import vanishing_of as vanishing_of
