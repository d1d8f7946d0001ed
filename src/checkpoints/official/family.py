"""What all families of the release share: reading a configuration, moving weights, describing a model of ours.

A family is a table of settings and two tables of weight names; a weight of ours is made of one or several of the release's, stacked
along the rows.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from src.components.backbone import Backbone
from src.components.canon import POINTS, CanonConfig
from src.components.feedforward import FeedForward
from src.components.mixers.base import Mixer

# A weight of ours -> the release's weights that it stacks, each with its number of rows (None: all of ours).
Names = dict[str, dict[str, int | None]]

# Every key of the release's trainer: its type and its default; None: no default, or derived from other keys.
KEYS: dict[str, tuple[type, Any]] = {
    "dim": (int, 512),
    "n_layers": (int, 8),
    "n_heads": (int, None),
    "n_kv_heads": (int, None),
    "head_dim": (int, None),
    "hidden_dim": (int, None),
    "vocab_size": (int, None),
    "norm_eps": (float, 1e-5),
    "rope_theta": (float, 10_000.0),
    "rope_dim": (int, None),
    "qk_norm": (bool, False),
    "weight_tying": (bool, False),
    "canon_set": (str, ""),
    "canon_kernel": (int, 4),
    "canon_residual": (bool, True),
    "canon_activation": (bool, False),
    "canon_bias": (bool, False),
    "zeyuan_layernorm": (bool, False),
    "mlp_type": (str, None),
    "mamba_ssm": (int, 256),
    "z_loss": (bool, False),  # of the loss, not of the model
}
_CANON = ("canon_set", "canon_kernel", "canon_residual", "canon_activation", "canon_bias")
COMMON = ("dim", "n_layers", "n_heads", "vocab_size", "hidden_dim", *_CANON, "z_loss")
NORM_EPS: float = KEYS["norm_eps"][1]

_GIVEN = "official_config"  # the attribute of a converted model


class Family(ABC):
    """One family of the release."""

    model_names: ClassVar[tuple[str, ...]]
    mixer_class: ClassVar[type[Mixer]]
    keys: ClassVar[tuple[str, ...]]  # those that it reads, besides COMMON
    layer_prefix: ClassVar[str]
    top_names: ClassVar[Mapping[str, str]]
    points: ClassVar[str] = "".join(POINTS)  # the letters that mean something to it; the release ignores the others
    unused: ClassVar[tuple[str, ...]] = ()  # weights of a block that the release stores as zeros and does not read

    @abstractmethod
    def mixer(self, settings: dict[str, Any], rope_pairing: Any, dim: int, canon: CanonConfig, layer: int) -> Mixer:
        """The mixer of one block."""

    @abstractmethod
    def describe_mixer(self, mixer: Any) -> dict[str, Any]:
        """The settings that a mixer of ours shows. Raises a ValueError with the reason when the release has no such mixer."""

    @abstractmethod
    def layer_names(self, settings: dict[str, Any]) -> Names:
        """Weights of one block: names without ``blocks.i.`` to names without ``layer_prefix``."""

    def default_hidden_dim(self, dim: int) -> int:
        """Inner width of the feed-forward when the configuration has none."""
        return 2 * dim

    def has_feedforward(self, settings: dict[str, Any]) -> bool:
        """Whether blocks have a feed-forward half."""
        return True

    def describe_feedforward(self, feedforward: FeedForward | None) -> dict[str, Any]:
        """The settings that a SwiGLU, or its absence, shows; raises as ``describe_mixer`` does."""
        if feedforward is None:
            raise ValueError("it has no feed-forward")
        return {"hidden_dim": feedforward.hidden_dim}

    def training_name(self, name: str) -> str:
        """A weight's name as ``layer_names`` and ``top_names`` have it."""
        return name

    def export_name(self, name: str, names: str) -> str:
        """The reverse of ``training_name`` for the wanted set of names."""
        return name

    # ---------------------------------------------------------------------------------------------------- configuration

    def settings(self, config: dict[str, Any]) -> dict[str, Any]:
        """The value of each key that the family reads, widths worked out. Raises a ValueError naming what makes no sense."""
        keys = (*COMMON, *self.keys)
        given = {key: value for key, value in config.items() if key != "model_name" and value not in (None, "")}
        for key, value in given.items():
            if key not in KEYS:
                known = f"keys of {self.model_names[0]} are {', '.join(keys)}"
                raise ValueError(f"official config key {key!r} is not known; {known}")
            _check_value(key, value)
            if key not in keys and value != KEYS[key][1]:
                raise ValueError(f"official config {key}={value!r}: {self.model_names[0]} has no such setting")
        settings = {key: given.get(key, KEYS[key][1]) for key in keys}
        for key in ("n_heads", "vocab_size"):
            if settings[key] is None:
                raise ValueError(f"official config key {key!r} must be given")
        dim, heads = settings["dim"], settings["n_heads"]
        if dim % heads and not settings.get("head_dim"):
            raise ValueError(f"official config n_heads={heads}: does not divide dim={dim}")
        settings["canon_set"] = self._letters(settings["canon_set"])
        settings["hidden_dim"] = settings["hidden_dim"] or self.default_hidden_dim(dim)
        return settings

    def build(self, settings: dict[str, Any], rope_pairing: str) -> Backbone:
        """A model with these settings, on the default device."""

        def feedforward(**parts: Any) -> FeedForward:
            return FeedForward(hidden_dim=settings["hidden_dim"], **parts)

        return Backbone(
            vocab_size=settings["vocab_size"],
            dim=settings["dim"],
            depth=settings["n_layers"],
            pattern="M",
            mixers={"M": lambda **parts: self.mixer(settings, rope_pairing, **parts)},
            feedforward=feedforward if self.has_feedforward(settings) else None,
            canon=CanonConfig(
                positions=settings["canon_set"],
                kernel_size=settings["canon_kernel"],
                residual=settings["canon_residual"],
                activation="silu" if settings["canon_activation"] else None,
            ),
            norm_eps=settings.get("norm_eps", NORM_EPS),
            tie_embeddings=settings.get("weight_tying", False),
        )

    def describe(self, model: Backbone) -> dict[str, Any]:
        """The reverse of ``build``: the keys and values that mean this model. Raises a ValueError when there are none."""
        cannot = f"the release's {self.model_names[0]} cannot express"
        blocks, canon = [], model.canon
        for layer, block in enumerate(model.blocks):
            try:
                blocks.append(self._describe_block(block))
                _check_alike(blocks[0], blocks[-1])
            except ValueError as error:
                raise ValueError(f"{cannot} block {layer}: {error}") from error
        config = {
            "model_name": self.model_names[0],
            "dim": model.dim,
            "n_layers": model.depth,
            "vocab_size": model.vocab_size,
            "canon_set": self._letters(canon.positions),
            "canon_kernel": canon.kernel_size,
            "canon_residual": canon.residual,
            "canon_activation": canon.activation is not None,
            "canon_bias": canon.bias,
            "norm_eps": model.norm.eps,
            "weight_tying": model.tie_embeddings,
        } | blocks[0]
        fixed = [key for key in config if key in KEYS and key not in (*COMMON, *self.keys)]
        for key in (*fixed, "canon_bias"):
            if config[key] != KEYS[key][1]:
                raise ValueError(f"{cannot} this model: {key} is {config[key]}, which can only be {KEYS[key][1]}")
        if model.norm.eps != blocks[0].get("norm_eps", model.norm.eps):
            difference = f"norm_eps is {blocks[0]['norm_eps']} inside the mixer and {model.norm.eps} outside"
            raise ValueError(f"{cannot} this model: {difference}")
        return {key: value for key, value in config.items() if key not in fixed}

    def _describe_block(self, block: Any) -> dict[str, Any]:
        mixer, feedforward = getattr(block, "mixer", None), getattr(block, "feedforward", None)
        if type(mixer) is not self.mixer_class:
            raise ValueError(f"its mixer is {type(mixer).__name__}, not {self.mixer_class.__name__}")
        if feedforward is not None:
            if type(feedforward) is not FeedForward:
                raise ValueError(f"its feed-forward is {type(feedforward).__name__}, not SwiGLU")
            if not feedforward.gated or feedforward.activation != "silu":
                kind = f"gated={feedforward.gated}, activation={feedforward.activation}"
                raise ValueError(f"its feed-forward has {kind}; SwiGLU has gated=True, activation=silu")
        return self.describe_mixer(mixer) | self.describe_feedforward(feedforward)

    def _letters(self, canon_set: str) -> str:
        return "".join(letter for letter in canon_set if letter in self.points)

    # ---------------------------------------------------------------------------------------------------------- weights

    def load(self, net: Backbone, settings: dict[str, Any], state_dict: dict[str, Tensor]) -> None:
        """Fills a model on the meta device. Raises a ValueError naming weights that are missing, misshapen or left over."""
        source = {self.training_name(name): weight.detach() for name, weight in state_dict.items()}
        target, missing, names = {}, [], self.layer_names(settings)
        for name, weight in net.state_dict().items():
            pieces = self._pieces(name, names)
            if name == "head.weight" and net.tie_embeddings:
                source.pop("output.weight", None)
            elif name.split(".", 2)[-1] in self.unused:
                like = [source.pop(piece) for piece in pieces if piece in source] or list(target.values())
                target[name] = torch.zeros(weight.shape, dtype=like[0].dtype, device=like[0].device)
            else:
                missing += [piece for piece in pieces if piece not in source]
                if not missing:
                    target[name] = _stack(pieces, source, weight.shape)
        if missing:
            raise ValueError(f"the official weights lack {_listed(missing)}, which this configuration needs")
        if source:
            raise ValueError(
                f"the official weights hold {_listed(sorted(source))}, for which this configuration has no place"
            )
        if net.tie_embeddings:
            target["head.weight"] = target["embedding.weight"]
        net.load_state_dict(target, assign=True)
        if net.tie_embeddings:
            net.head.weight = net.embedding.weight

    def weights(self, model: Backbone, settings: dict[str, Any], names: str) -> dict[str, Tensor]:
        """The weights of a model under the release's names, copied."""
        if names not in ("training", "hugging_face"):
            raise ValueError(f"names={names!r}: choose training or hugging_face")
        weights, table = {}, self.layer_names(settings)
        for name, weight in model.state_dict().items():
            if name == "head.weight" and model.tie_embeddings:
                continue
            pieces = self._pieces(name, table)
            rows = [weight.shape[0] if count is None else count for count in pieces.values()]
            for piece, part in zip(pieces, weight.split(rows), strict=True):
                weights[self.export_name(piece, names)] = part.clone()
        return weights

    def _pieces(self, name: str, layer_names: Names) -> dict[str, int | None]:
        match = re.match(r"^blocks\.(\d+)\.(.+)$", name)
        if match is None:
            return {self.top_names[name]: None}
        prefix = self.layer_prefix.format(match[1])
        return {prefix + piece: rows for piece, rows in layer_names[match[2]].items()}


def _check_value(key: str, value: Any) -> None:
    kind = KEYS[key][0]
    if not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"official config {key}={value!r}: must be of type {kind.__name__}")
    if kind is int and value < 1:
        raise ValueError(f"official config {key}={value!r}: at least 1")
    if key == "canon_set" and any(letter not in POINTS for letter in str(value)):
        raise ValueError(f"official config canon_set={value!r}: letters are {' '.join(POINTS)}")
    if key == "canon_bias" and value:
        raise ValueError("official config canon_bias=True: the release refuses it as well")


def _check_alike(first: dict[str, Any], other: dict[str, Any]) -> None:
    for key in first | other:
        if first.get(key) != other.get(key):
            raise ValueError(f"{key} is {other.get(key)}, and {first.get(key)} in block 0")


def whole(names: dict[str, str]) -> dict[str, dict[str, int | None]]:
    """A table of weights that the release stores as we do."""
    return {ours: {theirs: None} for ours, theirs in names.items()}


def require(options: dict[str, tuple[Any, Any]]) -> None:
    """Raises a ValueError naming the options, each (found, expected), that differ from the release's."""
    differing = [f"{key} is {found}, not {expected}" for key, (found, expected) in options.items() if found != expected]
    if differing:
        raise ValueError(", ".join(differing))


def remember(model: Backbone, config: dict[str, Any], described: dict[str, Any]) -> None:
    """Keeps the configuration that a model was read from with the model (not with its weights)."""
    setattr(model, _GIVEN, (dict(config), described))


def remembered(model: Backbone, described: dict[str, Any]) -> dict[str, Any]:
    """What ``remember`` kept, as long as the model still is what it was; else nothing."""
    config, before = getattr(model, _GIVEN, ({}, None))
    return config if before == described else {}


def _stack(pieces: dict[str, int | None], source: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """Takes the pieces out of the source and stacks them to a weight of this shape."""
    for piece, rows in pieces.items():
        expected = (shape[0] if rows is None else rows, *shape[1:])
        if tuple(source[piece].shape) != expected:
            found = tuple(source[piece].shape)
            raise ValueError(f"the official weight {piece!r} has shape {found}; this configuration needs {expected}")
    return torch.cat([source.pop(piece) for piece in pieces])


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
