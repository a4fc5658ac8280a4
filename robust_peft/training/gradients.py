"""The pair of gradients that the surgery combines: clean and adversarial, over the trainable parameters alone.

Both live in one buffer of shape `[2, P]`, so that accumulating, reducing over ranks and combining are one operation
each. The order matters: the operator is nonlinear, so gradients are averaged over accumulation and ranks first and
combined second (DistributedDataParallel would average too late, or not at all: `torch.autograd.grad` goes past its
hooks). Frozen parameters have no place in the buffer, so nothing can be misaligned as in the official code, which
flattens the parameters that have a gradient and writes back over all.

Each parameter's piece lies in the parameter's own memory order (channels_last, say), so that gradients are added, and
read by a fused optimizer, element beside element. A fused optimizer does not look at strides: given a gradient in
another order, it steps every weight by some other weight's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Surgery = Callable[[Tensor], Tensor]


class GradientPair:
    """Sums of per-sample gradients, clean in row 0 and adversarial in row 1, with a few counts behind them.

    Args:
        parameters: Names and trainable parameters.
        measured: Which of them the angle is measured on (the weights go to all); None for all.
        rows: 2 for the pair; 1 where one weighted loss is enough.
        extras: How many numbers travel with the gradients through the one all-reduce.

    Raises:
        ValueError: If there is no trainable parameter, or none is measured.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        measured: Callable[[str], bool] | None = None,
        rows: int = 2,
        extras: int = 0,
    ) -> None:
        if not parameters:
            raise ValueError("The model has no trainable parameter; robust_peft.attach makes some.")
        self.parameters = [parameter for _, parameter in parameters]
        self.sizes = [parameter.numel() for parameter in self.parameters]
        # Strides with gaps or overlaps have no place in a buffer without: empty_like does not take them over.
        self._strides = [torch.empty_like(parameter, device="meta").stride() for parameter in self.parameters]
        device = self.parameters[0].device
        double = any(parameter.dtype == torch.float64 for parameter in self.parameters)
        dtype = torch.float64 if double else torch.float32
        size = sum(self.sizes)
        self._flat = torch.zeros(rows * size + extras, device=device, dtype=dtype)
        self.rows = self._flat[: rows * size].view(rows, size)
        self.extras = self._flat[rows * size :]
        self._views = [self._pieces(row) for row in self.rows]
        self.update = torch.zeros(size, device=device, dtype=dtype)
        self._measured: list[int] | None = None
        if measured is not None:
            self._measured = [i for i, (name, _) in enumerate(parameters) if measured(name)]
            if not self._measured:
                raise ValueError('conflict_params="adapters" needs trainable adapter parameters. Found none.')

    def clear(self) -> None:
        """Start a new optimizer step."""
        self._flat.zero_()

    def add(self, row: int, loss_sum: Tensor, *, retain_graph: bool = False) -> None:
        """Add the gradient of a loss summed over samples to a row. Parameters that it does not reach get nothing."""
        grads = torch.autograd.grad(loss_sum, self.parameters, retain_graph=retain_graph, allow_unused=True)
        reached = [(view, grad) for view, grad in zip(self._views[row], grads, strict=True) if grad is not None]
        if reached:
            views, found = zip(*reached, strict=True)
            torch._foreach_add_(list(views), list(found))

    def reduce(self, all_reduce: Callable[[Tensor], Tensor] | None) -> None:
        """Sum gradients and extras over the ranks, in one all-reduce."""
        if all_reduce is not None:
            self._flat.copy_(all_reduce(self._flat))

    def gramian(self, scope: str = "all") -> Tensor:
        """Inner products of the rows: `[2, 2]` for scope "all", `[T, 2, 2]`, one for each tensor, for "tensor"."""
        if scope == "tensor":
            return torch.stack([_inner_products(part) for part in self.rows.split(self.sizes, dim=1)])
        if self._measured is None:
            return _inner_products(self.rows)
        parts = self.rows.split(self.sizes, dim=1)
        return torch.stack([_inner_products(parts[i]) for i in self._measured]).sum(dim=0)

    def combine(self, weights: Tensor) -> Tensor:
        """The update ``weights @ rows`` of shape `[P]`; weights of shape `[2]`, or `[T, 2]` for each tensor its own."""
        weights = weights.to(self.rows.dtype)
        if weights.dim() == 1:
            torch.mv(self.rows.T, weights, out=self.update)
        else:
            for target, part, weight in zip(
                self.update.split(self.sizes), self.rows.split(self.sizes, dim=1), weights, strict=True
            ):
                torch.mv(part.T, weight, out=target)
        return self.update

    def write(self) -> None:
        """Make the update each parameter's ``.grad``."""
        for parameter, piece in zip(self.parameters, self._pieces(self.update), strict=True):
            parameter.grad = piece.to(parameter.dtype)

    def flat_parameters(self) -> Tensor:
        """A copy of the trainable parameters, of shape `[P]`, in the order of the update."""
        flat = torch.empty_like(self.update)
        torch._foreach_copy_(self._pieces(flat), [parameter.detach() for parameter in self.parameters])
        return flat

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        """Views of a tensor of shape `[P]`, each of the shape and in the memory order of its parameter."""
        parts = zip(flat.split(self.sizes), self.parameters, self._strides, strict=True)
        return [piece.as_strided(parameter.shape, strides) for piece, parameter, strides in parts]


def _inner_products(rows: Tensor) -> Tensor:
    """``rows @ rows.T`` for two rows; by dot products, which no setting lets run in TF32 or bfloat16 as matrices do."""
    clean, adv = rows
    mixed = torch.dot(clean, adv)
    return torch.stack([torch.dot(clean, clean), mixed, mixed, torch.dot(adv, adv)]).view(2, 2)
