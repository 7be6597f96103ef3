"""Code generation: polynomials and their first and second derivatives as straight-line C++ for g++, nvcc and NVRTC.

`python -m rung.kernels.codegen` writes the generated headers, which are committed. To add an invariant, extend
`invariants/table.py`, the reference and `invariants.py` here; for a new operation write a module with `programs`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rung.kernels.codegen import edge_basis, invariants
from rung.kernels.codegen.emit import Program

__all__ = ["OPERATIONS", "sources"]

OPERATIONS: dict[str, Callable[[int], list[Program]]] = {
    "invariants": invariants.programs,
    "edge_basis": edge_basis.programs,
}
L_MAX = (1, 2, 3)
_FRAME = """\
// Written by `python -m rung.kernels.codegen`; do not edit.
// F is the type of a value (a number or a pack of numbers), T that of a number; arrays need only operator[].
#pragma once
#include "lanes.h"

namespace rung {{

{functions}

}}  // namespace rung
"""


def sources() -> dict[Path, str]:
    """Return the path and the text of each generated header."""
    kernels = Path(__file__).parent.parent
    texts = {}
    for op, programs in OPERATIONS.items():
        functions = [program.text() for l_max in L_MAX for program in programs(l_max)]
        texts[kernels / op / "generated.h"] = _FRAME.format(functions="\n\n".join(functions))
    return texts
