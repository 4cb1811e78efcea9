"""Modulated heads. A head owns its weight and executes the readout inside its forward (under ZeRO-3 it is empty elsewhere).

Legend: B samples, S tokens, D width, V vocabulary, C channels, H height, W width of a grid, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadiff.config.parameters import head_outputs
from megadiff.config.schema import GridSpace, MaskedProcess, Model
from megadiff.kernels.gated_adaln import adaln
from megadiff.kernels.head_draw import head_draw
from megadiff.kernels.head_logits import head_logits
from megadiff.kernels.head_loss import head_loss
from megadiff.models.alignment import misalignment
from megadiff.models.embeddings import unpatchify
from megadiff.models.initial import Initial
from megadiff.models.layers import Modulation, Rule, linear_initial
from megadiff.types import (
    ALIGNMENT,
    Aligned,
    CrossEntropy,
    Dense,
    DrawRule,
    Prediction,
    Readout,
    RowKeys,
    RowLogits,
    SampledRows,
    Stream,
    TokenDraws,
    TokenLosses,
)

HEAD_NORM_EPS = 1e-6


class Head(nn.Module):
    """LayerNorm, modulation by the conditioning vector, one linear map. Everything it returns is float32."""

    def __init__(self, config: Model, name: str) -> None:
        super().__init__()
        self.name = name
        self.one_plus_scale = config.head_modulation == "one_plus_scale"
        self.rule: Rule = "zero" if config.gates == "zero" else "torch"
        # A plain scale that starts at zero, before a weight that starts at zero, would never get a gradient.
        ones = [1] if self.rule == "zero" and not self.one_plus_scale else []
        width = config.width_of(name)
        self.modulation = Modulation(width, 2, rule=self.rule, ones=ones)
        self.sizes = head_outputs(config.modalities[name].space), width
        self.make_parameters(*self.sizes)

    def make_parameters(self, outputs: int, width: int) -> None:
        self.weight = nn.Parameter(torch.empty(outputs, width))
        self.bias = nn.Parameter(torch.empty(outputs))

    def initial(self) -> dict[str, Initial]:
        return linear_initial(*self.sizes, self.rule)

    def normalised(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """LayerNorm and modulation of [B, S, D]."""
        shift, scale = self.modulation(conditioning)
        return adaln(tokens, shift, scale, None, HEAD_NORM_EPS, self.one_plus_scale)

    def refuse(self, readout: Readout) -> TypeError:
        return TypeError(f"the head of {self.name} cannot give {type(readout).__name__}")


class GridHead(Head):
    """Reads out the whole grid."""

    def __init__(self, config: Model, name: str, space: GridSpace) -> None:
        super().__init__(config, name)
        self.space = space

    def forward(self, tokens: Tensor, conditioning: Tensor, readout: Readout, grid: tuple[int, int] | None = None) -> Tensor:
        """[B, S, D], [B, D] -> [B, C, H, W]; `grid` is its rows and columns of patches, by default the space's."""
        if not isinstance(readout, Dense):
            raise self.refuse(readout)
        rows, columns = grid or self.space.patches
        hidden = self.normalised(tokens, conditioning)
        patches = F.linear(hidden.float(), self.weight.float(), self.bias.float())
        return unpatchify(patches, self.space.channels, self.space.patch_sides, rows, columns)


class TokenHead(Head):
    """Reads out losses, draws at chosen rows, their logits, or all logits; over the vocabulary, without the mask state.

    The released network's head has one more row, for the mask state. Here that row is a parameter of its own, which only the
    released loss reads, so that no logits have to be cut.
    """

    def __init__(self, config: Model, name: str) -> None:
        process = config.modalities[name].process
        self.has_mask_class = isinstance(process, MaskedProcess) and process.mask_class
        super().__init__(config, name)

    def make_parameters(self, outputs: int, width: int) -> None:
        super().make_parameters(outputs, width)
        self.mask_weight = nn.Parameter(torch.empty(1, width)) if self.has_mask_class else None
        self.mask_bias = nn.Parameter(torch.empty(1)) if self.has_mask_class else None

    def initial(self) -> dict[str, Initial]:
        own = super().initial()
        return {**own, "mask_weight": own["weight"], "mask_bias": own["bias"]}

    def forward(
        self, tokens: Tensor, conditioning: Tensor, readout: Readout, grid: tuple[int, int] | None = None
    ) -> Tensor | CrossEntropy | TokenDraws:
        """[B, S, D], [B, D] -> what the readout describes."""
        hidden = self.normalised(tokens, conditioning)
        match readout:
            case TokenLosses(targets, scored, weights, number, mask_class):
                losses = self.losses(hidden, targets, scored, weights, number)
                if not mask_class:
                    return losses
                return losses._replace(weighted=losses.weighted + self._of_mask_class(hidden, scored) * weights)
            case SampledRows(rows, branch_weights, keys, rule, _):
                return self.draws(hidden, rows, branch_weights, keys, rule)
            case RowLogits(rows):
                return self.logits(hidden, rows)
            case Dense():
                rows = torch.arange(hidden.shape[0] * hidden.shape[1], device=hidden.device)
                return self.logits(hidden, rows).view(*hidden.shape[:2], -1)
            case _:
                raise self.refuse(readout)

    def losses(
        self, hidden: Tensor, targets: Tensor, scored: Tensor, weights: Tensor, number: int | None = None
    ) -> CrossEntropy:
        """See `head_loss`."""
        return head_loss(hidden, self.weight, self.bias, targets, scored, weights, number)

    def draws(self, hidden: Tensor, rows: Tensor, weights: Tensor, keys: RowKeys, rule: DrawRule) -> TokenDraws:
        """See `head_draw`."""
        return head_draw(hidden, self.weight, self.bias, rows, weights, keys, rule)

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """See `head_logits`."""
        return head_logits(hidden, self.weight, self.bias, rows)

    def _of_mask_class(self, hidden: Tensor, scored: Tensor) -> Tensor:
        """softplus of the mask's logit, float32 [B, S], where scored.

        The released loss is a cross entropy over the log-probabilities of the tokens and the mask's logit m, which is that over
        the tokens alone plus log(1 + exp(m)).
        """
        if self.mask_weight is None or self.mask_bias is None:
            raise TypeError(f"the head of {self.name} has no class for the mask state")
        logits = F.linear(hidden.float(), self.mask_weight.float(), self.mask_bias.float())[..., 0]
        return F.softplus(logits) * scored


class Heads(nn.ModuleDict):
    """The last layer: a Stream and what to read out of it to a Prediction, in the model's order of modalities.

    The alignment loss needs no weights here: it compares the tapped tokens as they are.
    """

    def __init__(self, config: Model, names: Sequence[str]) -> None:
        super().__init__({name: head_of(config, name) for name in names})

    def forward(self, stream: Stream, readout: Mapping[str, Readout]) -> Prediction:
        prediction: Prediction = {
            name: head(stream.dense(name), stream.conditioning[name], readout[name], stream.grids.get(name))
            for name, head in self.items()
            if name in readout
        }
        aligned = readout.get(ALIGNMENT)
        if isinstance(aligned, Aligned) and stream.tapped is not None:
            prediction[ALIGNMENT] = misalignment(stream.tapped, aligned.features)
        return prediction


def head_of(config: Model, name: str) -> Head:
    """The head that a modality's space asks for."""
    space = config.modalities[name].space
    return GridHead(config, name, space) if isinstance(space, GridSpace) else TokenHead(config, name)
