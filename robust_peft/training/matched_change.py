"""Methods compared at one length: the change that Vanilla(0.5) would have made to the parameters.

Under AdamW, and with clipping, the length of a gradient hardly shows in the step that is taken, so methods are made
equally long behind the optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robust_peft.training.gradients import GradientPair
from robust_peft.training.state import RunState


class MatchedChange:
    """Scales each change of the parameters to the length that Vanilla(0.5) would have changed them by from there.

    A second optimizer, of the same kind and settings and at the same learning rate, is fed with Vanilla(0.5)'s
    combination of the same gradients. Its step is measured and taken back, so that its moments live along the
    parameters' real way. The length is the L2 norm over all trainable parameters; weight decay is part of the change
    on both sides.

    It costs what that optimizer remembers (for AdamW two numbers for each trainable parameter), two copies of the
    parameters during the step, and one more wait for the device.

    Args:
        pair: Both gradients.
        optimizer: The real one.

    Raises:
        ValueError: If the pair has one row only.
    """

    def __init__(self, pair: GradientPair, optimizer: Any) -> None:
        if len(pair.rows) == 1:
            raise ValueError("match_change needs both gradients: measure_conflict=True.")
        self.pair, self.optimizer = pair, optimizer
        self.shadow = type(optimizer)([dict(group) for group in optimizer.param_groups])
        self._parameters: list[Tensor] = [*pair.parameters]
        self._starts: list[Tensor] = []

    def gradient(self) -> Tensor:
        """Vanilla(0.5)'s update, of shape `[P]`; overwrites the pair's own."""
        return self.pair.combine(self.pair.rows.new_full((2,), 0.5)).clone()

    @torch.no_grad()
    def measure(self, gradient: Tensor, run: RunState) -> Tensor:
        """Take the second optimizer's step and take it back.

        Args:
            gradient: Vanilla(0.5)'s update, clipped and without float16's loss scale.
            run: Holds the second optimizer's state, for saving and resuming.

        Returns:
            The length of the change, a scalar.
        """
        pair = self.pair
        if run.vanilla_optimizer is not None and not self.shadow.state:
            self.shadow.load_state_dict(run.vanilla_optimizer)
        for own, group in zip(self.shadow.param_groups, self.optimizer.param_groups, strict=True):
            own["lr"] = group["lr"]
        self._starts = [parameter.detach().clone() for parameter in self._parameters]
        held = pair.update.clone()
        pair.update.copy_(gradient)
        pair.write()
        self.shadow.step()
        self.shadow.zero_grad(set_to_none=True)
        pair.update.copy_(held)
        length = self._length()
        torch._foreach_copy_(self._parameters, self._starts)
        run.vanilla_optimizer = self.shadow.state_dict()
        return length

    @torch.no_grad()
    def scale(self, length: Tensor) -> float:
        """Bring the real change, made since `measure`, to this length.

        Returns:
            The factor; 1 where the parameters did not change, as nothing has no direction to be made longer in.
        """
        found = self._length()
        factor = torch.where(found > 0, length / found, torch.ones_like(found))
        for parameter, start in zip(self._parameters, self._starts, strict=True):
            # lerp gives the parameter itself, to the bit, where the factor is 1.
            parameter.copy_(start.lerp(parameter, factor.to(parameter.dtype)))
        self._starts = []
        return factor.item()

    def _length(self) -> Tensor:
        changes = torch._foreach_sub(self._parameters, self._starts)
        return torch.stack(torch._foreach_norm(changes)).double().norm()
