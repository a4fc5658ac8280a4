"""Square Attack: random search with windows, a black-box attack that asks the model for its logits and nothing else.

Andriushchenko et al. 2020 (arXiv:1912.00049), Algorithms 1 to 3, with the settings of the standard AutoAttack (Croce
and Hein 2020, arXiv:2003.01690). Differs from AutoAttack's implementation in four ways:

- Each sample draws its own windows and signs from its key. There one window serves the whole batch, so that a sample's
  result hangs on who shares the batch.
- Windows may touch the last row and column, as in the paper. There the draw stops one short of them.
- L-inf: a window that would change nothing (a sign drawn once more where it already is) is drawn with the opposite
  signs, rather than spend a query on the image that was asked last. The paper's authors draw again until it changes.
- L2: the tiles of the start are centred in images of any height and width; there they are laid out for squares.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_peft import keyed_random
from robust_peft.attacks.victim import Confirm, as_victim
from robust_peft.threat import ThreatModel

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After these queries of 10,000 a window's share of the pixels is halved (the paper's section 5)."""
_BLOCK = 64
"""Queries whose random numbers are drawn in one call: a call for each would cost as much as the rest of the query."""


@dataclass(frozen=True)
class Square:
    """``queries`` times: put a random window into the best image so far, and keep it if the margin grew.

    A sample that is misclassified already is attacked like any other: the image itself is not asked about.

    Args:
        threat: Norm, budget and box.
        queries: Windows tried in each restart, at least 1. The start, of stripes (L-inf) or tiles (L2), is one query
            more.
        p_init: Share of the pixels that the first windows cover, in (0, 1]. Later ones are smaller.
        restarts: Independent starts. The adversarial image kept is one that fools the model, if any does, or else the
            one with the highest margin.
        rescale_schedule: Shrink the windows over ``queries`` as over the paper's 10,000. False, as in the standard
            AutoAttack: by the number of the query, so that 5,000 of them end with larger windows.
        early_stop: Take a sample out of the batch once it is misclassified. False: nobody leaves the batch, for models
            that couple its samples; a misclassified one goes on with its image unchanged.

    Raises:
        ValueError: For a value out of range.
    """

    threat: ThreatModel
    queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1
    rescale_schedule: bool = False
    early_stop: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.threat, ThreatModel):
            raise ValueError(f"threat should be a ThreatModel. Found threat = {self.threat!r}.")
        for name in ("queries", "restarts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} should be an integer of at least 1. Found {name} = {value!r}.")
        p = self.p_init
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 < p <= 1:
            raise ValueError(f"p_init should be a number above 0 and at most 1. Found p_init = {p!r}.")
        for name in ("rescale_schedule", "early_stop"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} should be True or False. Found {name} = {value!r}.")

    def __str__(self) -> str:
        return f"Square-{self.queries}{f' x{self.restarts}' if self.restarts > 1 else ''} {self.threat}"

    def share(self, query: int) -> float:
        """The share of the pixels that the window of a query covers, before rounding; queries count from 0."""
        if self.rescale_schedule:
            query = int(query / self.queries * 10000)
        return self.p_init / 2 ** bisect_left(_HALVINGS, query)

    def window_size(self, query: int, height: int, width: int) -> int:
        """The side of the window of a query, in pixels."""
        size = round(math.sqrt(self.share(query) * height * width))
        if self.threat.norm == "l2":
            # Odd and at least 3, so that the pattern has two halves with a centre each.
            size = max(size, 3) | 1
        return min(max(size, 1), height, width)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *, keys: Tensor | None = None) -> Tensor:
        """Adversarial images. The model is attacked in eval mode, without gradients, and left as it was.

        Args:
            model: Pixels of shape `[B, C, H, W]` in the threat's box to logits of shape `[B, K]`.
            images: Images of shape `[B, C, H, W]` in the box.
            labels: Labels of shape `[B]`, int64.
            keys: The samples' random keys of shape `[B]` (`robust_peft.keyed_random`). None: drawn from torch's
                generator.

        Returns:
            Images of the shape and dtype of ``images``, inside ball and box.

        Raises:
            ValueError: If the images are not in the box or have another number of dimensions.
        """
        self.threat.check_images(images)
        return self.perturb(model, images, labels, keys=keys)

    @torch.no_grad()
    def perturb(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        keys: Tensor | None = None,
        confirm: Confirm | None = None,
    ) -> Tensor:
        """As calling the attack, without the check of the pixel range.

        Where ``confirm`` is given, a misclassified sample is done only if it agrees, and is attacked on if not.
        """
        if images.dim() != 4:
            raise ValueError(f"images should have the shape [B, C, H, W]. Found {list(images.shape)}.")
        if len(images) == 0:
            return images.detach().clone()
        if keys is None:
            keys = keyed_random.fresh_keys(len(images), images.device)
        images = images.detach().contiguous()
        everyone = torch.arange(len(images), device=images.device)
        adv_images = images.clone()
        adv_margins = torch.full((len(images),), -torch.inf, device=images.device)
        fooled = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        with as_victim(model):
            for restart in range(self.restarts):
                rows = everyone[~fooled] if self.early_stop else everyone
                clean, own_keys = images[rows], keyed_random.derive(keys[rows], restart)
                best, margins, numbers = clean, adv_margins.new_full((len(rows),), -torch.inf), own_keys
                for query in range(-1, self.queries):
                    if fooled.all() if len(rows) == len(images) else len(rows) == 0:
                        return adv_images
                    if query == -1:
                        candidates = self._start(clean, keyed_random.derive(own_keys, 0))
                    else:
                        pass
        return adv_images
