"""Specs: the settings of a codec or a reducer as one line of text, in call syntax.

    error_feedback(gather(topk(density=0.01)))

A *member* is a frozen dataclass that inherits from `Spec`; its fields are its settings. `str(member)` prints it and
`parse` reads it back, `parse(str(member), ...) == member`. Only literals and known names are read: the text goes
through `ast` against a literal registry and is never evaluated. Length and depth are bounded, in both directions.

**How a member is printed.** Fields at their defaults are left out; a member without arguments prints as its bare
name. The leading fields that are required or hold members form the *head*; it is printed by position up to its last
member, `after(two_stage(uniform), steps=100)`, and everything else by keyword: `topk(density=0.01)`,
`partition(small=dense, large=low_rank(rank=4), min_size=1024)`.

**What else is read.** Any field by position or keyword, tuples and lists (both become tuples), an int for a float,
`inf` and `nan` for a float, and a bare name where the field is annotated `str`: `cast(dtype=bf16)`. An alias takes the
other arguments of what it stands for: `bf16(stochastic=True)`. A dict has texts for keys and members for values, which
may be specs in quotes: `by_name({'*.bias': dense, '*': 'topk(density=0.01)'})`.
"""

from __future__ import annotations

from mpicomp.specs.parsing import MAX_CHARS, parse
from mpicomp.specs.printing import MAX_BITS, MAX_DEPTH, Frozen, Spec

__all__ = ["MAX_BITS", "MAX_CHARS", "MAX_DEPTH", "Frozen", "Spec", "parse"]
