"""Output projections that make up for the inputs they lose: least squares on the parent's own activations.

With S the second moments of the inputs h of a projection M (down, or attention output), and K the inputs that stay,
M' = M S[:, K] (S[K, K] + lambda I)^-1 minimises E ||M h - M' h_K||^2 + lambda ||M'||^2: what the inputs that go could
have been predicted to add is added by those that stay. A factor for the smaller fan-in would then be one too many.
lambda is relative to the mean second moment of the inputs that stay; without it M' may become huge where inputs nearly
depend on each other. A 4.5M Llama (loss 2.32) with half of its neurons begins at 2.44 instead of 2.55, and with half of
its heads at 2.69 instead of 2.98.

n inputs, k of them stay, m outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.spec import Slot, TensorSpec
from dynaconv.arch.surgery import Rewrite
from dynaconv.artifacts.tensors import CheckpointReader
from dynaconv.convert.importance import Importance
from dynaconv.convert.selection import Kept
from dynaconv.errors import ArtifactError

ROWS = 1024  # rows of S that are read at once
MOMENTS = {"attention": "attention_moments", "ffn": "neuron_moments"}
INPUTS = {"attention": "v_dim", "ffn": "ffn"}  # an axis that only the output projection of this part contracts


def refit(checkpoint: Checkpoint, importance: Importance, kept: Kept, ridge: float) -> Callable[[Slot], Rewrite | None]:
    """What to do to the output projections of ``checkpoint`` before inputs are taken from them.

    Args:
        checkpoint: The parent.
        importance: With second moments.
        kept: What stays.
        ridge: lambda over the mean second moment of the inputs that stay, above 0.

    Raises:
        ArtifactError: ``importance`` was measured without second moments.
    """
    if importance.moments is None and importance.measured:
        raise ArtifactError(
            "a refit needs second moments, and the importance was measured without",
            hint="measure it again with importance.second_moments=true",
        )

    def rewrite(slot: Slot) -> Rewrite | None:
        spec, moments = slot.spec, importance.moments
        if slot.layer is None or moments is None or not refitted(spec):
            return None
        assert spec.contracts is not None
        inputs = spec.dimensions[spec.contracts].positions(checkpoint.sizes, _index(kept, slot.layer).get)
        name = f"layers.{slot.layer}.{MOMENTS[spec.part]}"
        if len(inputs) == moments.info(name).shape[0]:  # nothing goes
            return None
        return lambda tensor: _in_place(tensor, spec, inputs, moments, name, ridge)

    return rewrite


def refitted(spec: TensorSpec) -> bool:
    """Whether ``spec`` is an output projection."""
    return spec.part in INPUTS and spec.contracts is not None and INPUTS[spec.part] in spec.axes[spec.contracts]


def solve_refit(matrix: Tensor, moments: Callable[[int, int], Tensor], inputs: Tensor, ridge: float) -> Tensor:
    """M' (m, k) float32 for the matrix M (m, n).

    Args:
        matrix: M.
        moments: Gives rows ``[start, stop)`` of S (n, n).
        inputs: K, (k,) int64.
        ridge: lambda over the mean of the diagonal of S[K, K].

    Raises:
        ArtifactError: S is not a matrix of second moments.
    """
    count = len(inputs)
    square, target = torch.empty(count, count, dtype=torch.float64), torch.zeros(len(matrix), count)
    place = torch.full((matrix.shape[1],), -1)
    place[inputs] = torch.arange(count)
    for start in range(0, matrix.shape[1], ROWS):  # S is symmetric, so its rows are its columns
        rows = moments(start, min(start + ROWS, matrix.shape[1]))[:, inputs]
        target.addmm_(matrix[:, start : start + len(rows)].float(), rows)
        to = place[start : start + len(rows)]
        square[to[to >= 0]] = rows[to >= 0].double()
    strength = ridge * float(square.diagonal().mean())
    if strength <= 0:  # inputs that are always 0: nothing can be made up for
        return matrix[:, inputs].float()
    square.diagonal().add_(strength)
    factor, failed = torch.linalg.cholesky_ex(square)
    if failed:
        raise ArtifactError("second moments are not positive definite", hint="raise subclone.refit_ridge")
    del square
    for piece in torch.split(target, ROWS):
        half = torch.linalg.solve_triangular(factor, piece.T.double(), upper=False)  # cholesky_solve copies the factor
        piece.copy_(torch.linalg.solve_triangular(factor.mT, half, upper=True).T)
    return target


def refit_peak_bytes(inputs: int, kept: int, outputs: int, itemsize: int) -> int:
    """Largest memory of a refit: S[K, K] and its factor in float64, M before and after, M' and what is solved at once.

    Args:
        inputs: n.
        kept: k.
        outputs: m.
        itemsize: Bytes of a stored weight.
    """
    moments = 16 * kept * kept + 4 * ROWS * (inputs + kept)
    return moments + 2 * itemsize * inputs * outputs + 4 * kept * outputs + 24 * min(ROWS, outputs) * kept


def _index(kept: Kept, layer: int) -> Mapping[str, Tensor]:
    return {"ffn": kept.ffn[layer], "q_head": kept.heads[layer], "v_dim": kept.value[layer]}


def _in_place(
    tensor: Tensor, spec: TensorSpec, inputs: Tensor, moments: CheckpointReader, name: str, ridge: float
) -> Tensor:
    """``tensor`` with M' in the columns that stay; the others are about to go."""
    matrix = tensor if spec.contracts == 1 else tensor.T
    fitted = solve_refit(matrix, lambda start, stop: moments.read_rows(name, start, stop), inputs, ridge)
    changed = matrix.clone()
    changed[:, inputs] = fitted.to(tensor.dtype)
    return changed if spec.contracts == 1 else changed.T
