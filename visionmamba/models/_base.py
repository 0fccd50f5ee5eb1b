"""What timm expects of every model and every family shares; a family brings its stem, its trunk and its head."""

# no "from __future__ import annotations": FX copies forward's annotations into the code that TorchScript then reads

import torch
import torch.nn as nn
from timm.models._features import feature_take_indices

__all__ = ["VisionModel"]

_WITHOUT_DECAY = ("pos_embed", "cls_token", "A_log", "D", "direction_B", "conv_bias", "dt_proj_bias")


class VisionModel(nn.Module):
    """A classifier and backbone whose trunk is a list of levels, blocks or stages, with a feature each.

    A subclass has the trunk under the name in ``trunk``, ``feature_info`` for each level, ``norm`` after the last, and
    implements :meth:`num_levels`, :meth:`forward_trunk`, :meth:`finish`, :meth:`forward_head`, :meth:`init_weights` and
    :meth:`reset_classifier`.
    """

    trunk = "blocks"

    def reset_modules(self) -> None:
        """Let every module initialise itself as when it is constructed (after the model was made on ``meta``)."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def init_unless_meta(self) -> None:
        """Initialise a model that was just constructed, if it has memory."""
        if not next(self.parameters()).is_meta:
            self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of embeddings, dynamics and stacked biases.

        Vim's authors did decay ``A_log`` and its backward twin, against Mamba's and their own intention: remove them
        from the set to repeat it.
        """
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in _WITHOUT_DECAY}

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the wanted intermediates do not need; what no longer fits their channels goes in any case.

        Args:
            indices: As for :meth:`forward_intermediates`.
            prune_norm: Remove the final norm.
            prune_head: Remove the classifier.

        Returns:
            The indices of the levels that are taken.
        """
        take_indices, max_index = feature_take_indices(self.num_levels(), indices)
        setattr(self, self.trunk, getattr(self, self.trunk)[: max_index + 1])
        channels = self.feature_info[max_index]["num_chs"]
        fits = channels == self.num_features
        if prune_norm or not fits:
            self.norm = nn.Identity()
        if not fits:
            self.num_features = self.head_hidden_size = channels
        if prune_head or not fits:
            self.reset_classifier(0, "")
        return take_indices

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the features of blocks or stages, as timm does.

        Args:
            x: Input, ``(B, in_chans, ...)``.
            indices: Last n levels if an int, these levels if a list, all if absent.
            return_prefix_tokens: Return pairs of features and class tokens ``(B, class tokens, C)``, where there are.
            norm: Apply the final norm to them, where it fits: to every block's, or to the last stage's.
            stop_early: Do not compute levels after the last one asked for.
            output_fmt: ``"NCHW"`` for channels first, ``(B, C, *grid)``; ``"NHWC"`` for channels last; ``"NLC"`` for
                patch tokens in raster order.
            intermediates_only: Return the list alone.

        Returns:
            The list of features, or :meth:`forward_features`' result and the list.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"output_fmt: expected NCHW, NHWC or NLC, got {output_fmt}")
        levels = self.num_levels()
        take_indices, max_index = feature_take_indices(levels, indices)
        if stop_early and not torch.jit.is_scripting():
            levels = max_index + 1
        x, features, prefixes = self.forward_trunk(x, take_indices, levels, norm)
        if output_fmt == "NCHW":
            features = [feature.movedim(-1, 1).contiguous() for feature in features]
        elif output_fmt == "NLC":
            features = [feature.flatten(1, -2) for feature in features]
        if not torch.jit.is_scripting() and return_prefix_tokens and prefixes:
            features = list(zip(features, prefixes, strict=True))
        if intermediates_only:
            return features
        return self.finish(x, levels), features

    def num_levels(self) -> int:
        """Return the number of blocks or stages."""
        raise NotImplementedError

    def forward_trunk(
        self, x: torch.Tensor, take: list[int], levels: int, norm: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Run the stem and the trunk.

        Args:
            x: Input, ``(B, in_chans, ...)``.
            take: Levels whose features are wanted.
            levels: How many levels to run; a scripted model runs all.
            norm: Apply the final norm to the features, see :meth:`forward_intermediates`.

        Returns:
            The last level's output, the features ``(B, *grid, C)``, and each one's class tokens if there are any.
        """
        raise NotImplementedError

    def finish(self, x: torch.Tensor, levels: int) -> torch.Tensor:
        """Apply the final norm to the output of the trunk's first ``levels`` levels, where it fits."""
        raise NotImplementedError

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised output of the trunk: a map or volume ``(B, *grid, C)``, or tokens ``(B, L, C)``."""
        none: list[int] = []
        levels = self.num_levels()
        x, _, _ = self.forward_trunk(x, none, levels, False)
        return self.finish(x, levels)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify the trunk's output; with ``pre_logits`` return what the classifier is given."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits ``(B, num_classes)`` of ``(B, in_chans, ...)``, or pooled features without a classifier."""
        return self.forward_head(self.forward_features(x))
