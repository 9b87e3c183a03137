"""The square loss of the theory: half the squared distance to the target, so that its Hessian at a fit is J'J/n."""

from torch import Tensor

from corollary.base.errors import BadInput


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    r"""$\frac{1}{2n} \sum_i \lVert f(x_i) - y_i \rVert^2$, summed over outputs, the mean over samples.

    Args:
        outputs: `[n]` or `[n, outputs]`.
        targets: of the same shape; `[n]` also serves outputs `[n, 1]`. Classes are given as one-hot rows.
    Raises: BadInput, for targets of another shape.
    """
    flat = outputs.squeeze(-1) if outputs.ndim == targets.ndim + 1 and outputs.shape[-1] == 1 else outputs
    if flat.shape != targets.shape:
        raise BadInput(
            f"the square loss compares outputs {list(outputs.shape)} with targets of the same shape, "
            f"got {list(targets.shape)}; give classes as one-hot rows"
        )
    return 0.5 * (flat - targets).square().sum() / len(targets)
