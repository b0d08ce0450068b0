"""``LogQuantCache``: the layers of a model together."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ..attention import compiled
from ..config import LogQuantConfig
from ..files import fingerprint, read, write
from ..quantizer.calibration import Calibration, calibration_of, with_calibration
from .layer import LogQuantLayer
from .layout import Rows
from .left_behind import LeftBehind
from .other_layers import put_together, take_apart
from .shared import Shared
from .sizes import tensors_in
from .slots import Slots
from .storage import Allocator

FILE_VERSION = 1
KIND = "cache"


class LayerReport(NamedTuple):
    """What one layer of a cache holds.

    Attributes:
        layer: its index.
        kind: its class.
        exact, packed: tokens of all rows that are exact (uncommitted ones among them) and that are quantised; None
            where a layer is not LogQuant's. With ``evict`` the mean over KV heads.
        nbytes: bytes of its tensors.
        bits_per_element: of its tensors, for each element of the keys and values of its tokens; None if it has none.
    """

    layer: int
    kind: str
    exact: int | None
    packed: int | None
    nbytes: int
    bits_per_element: float | None


class LogQuantCache(DynamicCache):
    """A KV cache that keeps old tokens in 2 bits and a few hundred exact ones, dense near the end.

    Use it where a ``DynamicCache`` would be used; layers with full attention are LogQuant layers, all others (sliding
    windows, linear attention) what transformers would have made::

        cache = LogQuantCache(model.config)
        model.generate(**inputs, **logquant.as_argument(cache))

    Args:
        config: the model's configuration.
        quantization: what to keep exact and how to store the rest.
        **options: fields of :class:`logquant.LogQuantConfig` given directly, as in ``LogQuantCache(config, bits=4)``.

    Raises:
        TypeError: ``quantization`` together with ``options``, or an unknown option.
        ValueError: an invalid option, a head dimension that pages cannot hold, or a calibration of another model.
    """

    def __init__(self, config: PreTrainedConfig, quantization: LogQuantConfig | None = None, **options: Any) -> None:
        if quantization is not None and options:
            raise TypeError(f"give either quantization or its fields, got both: {', '.join(options)}")
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be the model's configuration (model.config), got {type(config).__name__}")
        self.quantization = with_calibration(quantization or LogQuantConfig(**options))
        head_dim = getattr(config.get_text_config(decoder=True), "head_dim", None)
        if head_dim:
            self.quantization.page_format(head_dim)
        rows = Rows((self._empty_slots(config),))
        layers = DynamicCache(config=config).layers
        if (calibration := calibration_of(self.quantization)) is not None:
            calibration.check(config, [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer])
        self.config, self._text_config = config, config.get_text_config(decoder=True)
        self.left_behind = LeftBehind(config)
        self._given = False
        own = sum(type(layer) is DynamicLayer for layer in layers)
        if layers and not own:
            warnings.warn(
                "no layer of this model has full attention, which is all that a LogQuant cache quantises: it saves "
                "nothing here over a DynamicCache",
                UserWarning,
                stacklevel=2,
            )
        self._shared = Shared(Allocator(own))
        # Not DynamicCache's own __init__, which would make other layers. It is the base because transformers asks for
        # it where a cache must be able to crop and select rows (EncoderDecoderCache).
        Cache.__init__(
            self,
            layers=[
                LogQuantLayer(self.quantization, self._shared, rows, i) if type(layer) is DynamicLayer else layer
                for i, layer in enumerate(layers)
            ],
        )

    def _empty_slots(self, config: PreTrainedConfig) -> Slots:
        """Where the tokens of a sequence without any are."""
        text = config.get_text_config(decoder=True)
        head_dim = getattr(text, "head_dim", None)
        if head_dim is None and hasattr(text, "num_attention_heads"):
            head_dim = text.hidden_size // text.num_attention_heads
        return Slots.empty(self.quantization, head_dim)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens to a layer, and return what attention is to see (:meth:`LogQuantLayer.update`)."""
        layer = self.layers[layer_idx]
        if torch.compiler.is_compiling() and isinstance(layer, LogQuantLayer) and self._reads_plainly(layer):
            length = layer.get_seq_length() + key_states.shape[2]
            both: tuple[Tensor, Tensor] = compiled.read_layer(key_states, value_states, layer._layer_id, length)
            return both
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return updated

    def _reads_plainly(self, layer: LogQuantLayer) -> bool:
        """Whether the model's attention takes plain tensors and there is something to dequantise."""
        return layer.is_initialized and self._text_config._attn_implementation != "logquant"

    def __bool__(self) -> bool:
        """True, but for an empty cache of a model like Phi-3, which would throw it away before a long prompt."""
        length = super().get_seq_length()
        self.left_behind.asked_for_truth(length)
        return length > 0 or not self.left_behind.may_be

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that the layer holds, those of padding included."""
        length: int = super().get_seq_length(layer_idx)
        self.left_behind.asked_for_length(length)
        return length

    @property
    def _is_user_defined(self) -> bool:
        """What ``generate`` writes here where it begins with a given cache."""
        return self._given

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        if self.config.is_encoder_decoder:
            raise ValueError(
                f"{self.config.model_type} has self-attention and cross-attention, and would mix them in a "
                "LogQuantCache or throw it away: give EncoderDecoderCache(cache, DynamicCache(config=model.config))"
            )
        self._given = value

    @property
    def is_compileable(self) -> bool:
        """False: ``generate`` is not to compile by itself (:mod:`logquant.attention.compiled`)."""
        self.left_behind.kept()
        return False

    def __iter__(self) -> Iterator[tuple[Tensor | None, ...]]:
        """Keys and values of each layer, dequantised, and its sliding window, as those of a ``DynamicCache``."""
        for layer in self.layers:
            yield tuple(getattr(layer, name, None) for name in ("keys", "values", "_sliding_window_tensor"))

    def set_padding(self, attention_mask: Tensor | None) -> None:
        """Say which positions are padding, for attention implementations that do not tell (all but logquant and sdpa).

        Args:
            attention_mask: ``[B, positions]``, 0 where there is padding, of all positions up to those that come next;
                None if there is none. It holds until the next call.

        Raises:
            ValueError: another number of dimensions.
        """
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be [batch, positions], got {list(attention_mask.shape)}")
        self._shared.padding = attention_mask

    def set_drafts(self, drafts: int | None) -> None:
        """Say how many of the positions that come next are speculative
        (:meth:`LogQuantLayer.activate_past_recording`).

        Args:
            drafts: the newest so many. None, if that is not known: all of them, or none if the cache is empty. It holds
                until the next call.
        """
        self._shared.speculative = drafts

    def commit(self) -> None:
        """The tokens that came last take their places, those that the rule says in pages, before the next ones come."""
        for layer in self.layers:
            if isinstance(layer, LogQuantLayer):
                layer.commit()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` positions of all layers (:meth:`LogQuantLayer.crop`), or of none.

        Raises:
            ValueError: a positive number, or tokens that ``prune`` has dropped would have to come back.
        """
        for layer in self.layers:
            if isinstance(layer, LogQuantLayer):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors the cache holds."""
        own = [layer for layer in self.layers if isinstance(layer, LogQuantLayer)]
        shared = {id(layer.rows): layer.rows.nbytes for layer in own}
        return sum(layer.nbytes for layer in own) + sum(shared.values()) + self._other_nbytes

    @property
    def full_precision_nbytes(self) -> int:
        """Bytes a ``DynamicCache`` holds after the same tokens."""
        own = [layer for layer in self.layers if isinstance(layer, LogQuantLayer)]
        return sum(layer.full_precision_nbytes for layer in own) + self._other_nbytes

    @property
    def _other_nbytes(self) -> int:
        others = [layer for layer in self.layers if not isinstance(layer, LogQuantLayer)]
        return sum(t.nbytes for layer in others for t in tensors_in(vars(layer)))

    def report(self) -> list[LayerReport]:
        """What each layer holds."""
        lines = []
        for i, layer in enumerate(self.layers):
            kind = type(layer).__name__
            if not isinstance(layer, LogQuantLayer):
                lines.append(LayerReport(i, kind, None, None, sum(t.nbytes for t in tensors_in(vars(layer))), None))
                continue
            rows = layer.rows
            batch = layer.batch_size if layer.is_initialized else 1
            copies = batch if rows.alike else 1
            exact, packed = (copies * sum(getattr(s, name) for s in rows.slots) for name in ("exact", "packed"))
            if layer.is_initialized and (ragged := layer.held.ragged) is not None:
                packed = ragged.tokens(layer.format.page_tokens)
            exact += batch * (layer.get_seq_length() - rows.length)
            bits = None
            if exact + packed:
                heads = layer.held.storage.window_k.shape[1]
                elements = (exact + packed) * heads * (layer.format.head_dim + layer.format.value_dim)
                bits = 8 * layer.nbytes / elements
            lines.append(LayerReport(i, kind, exact, packed, layer.nbytes, bits))
        return lines

    # ------------------------------------------------------------------------------------- moving, saving, recovering
    def to(self, device: torch.device | str) -> LogQuantCache:
        """Move all tensors to ``device``; the tokens that come next must be there."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device)
            if isinstance(value, torch.device):
                return torch.empty(0, device=device).device
            if isinstance(value, dict):
                return {key: moved(item) for key, item in value.items()}
            return [moved(item) for item in value] if isinstance(value, list) else value

        for layer in self.layers:
            if isinstance(layer, LogQuantLayer):
                layer.to(device)
            else:
                vars(layer).update(moved(vars(layer)))
        return self

    def save(self, path: str | os.PathLike[str], model: PreTrainedModel | None = None) -> None:
        """Write the cache to a safetensors file. A file that is there is replaced once the new one is complete.

        Args:
            path: where to.
            model: given, the file also tells its weights from others with the same configuration.

        Raises:
            OSError: the file cannot be written, as on a full disk; nothing is left of it, and the cache is unchanged.
            ValueError: some layers have more tokens than others (:meth:`rewind`).
        """
        self.check_layers_agree()
        self.commit()
        tensors: dict[str, Tensor] = {}
        layers, rows = [], None
        for i, layer in enumerate(self.layers):
            if isinstance(layer, LogQuantLayer):
                own, state = layer.state()
                tensors |= {f"layers.{i}.{name}": t.detach().cpu().contiguous() for name, t in own.items()}
                rows = layer.rows if rows is None and layer.is_initialized else rows
            else:
                state = take_apart(vars(layer), f"layers.{i}", tensors)
            layers.append({"kind": type(layer).__name__, "state": state})
        described: dict[str, Any] = {
            "version": FILE_VERSION,
            "settings": {name: value for name, value in asdict(self.quantization).items() if name != "calibration"},
            "model": fingerprint(model if model is not None else self.config),
            "layers": layers,
        }
        if rows is not None:
            own, described["rows"] = rows.state()
            tensors |= own
        if (calibration := calibration_of(self.quantization)) is not None:
            own, described["calibration"] = calibration.state()
            tensors |= own
        write(path, KIND, tensors, described)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel | PreTrainedConfig,
        device: torch.device | str | None = None,
    ) -> LogQuantCache:
        """Read a cache that :meth:`save` has written.

        Args:
            path: the file.
            model: the model that the cache is for, or its configuration.
            device: where the tensors go; by default the model's device, or the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged file, one of another format version, or of another model.
        """
        path = Path(path)
        tensors, described = read(path, KIND, FILE_VERSION)
        if device is None:
            device = model.device if isinstance(model, PreTrainedModel) else "cpu"
        device = torch.device(device)
        for part, digest in fingerprint(model).items():
            if described["model"].get(part, digest) != digest:
                raise ValueError(f"{path} was made by another model: its {part} differs from that of the model given")
        calibration = None
        if "calibration" in described:
            calibration = Calibration.from_state(tensors, described["calibration"])
        config = model if isinstance(model, PreTrainedConfig) else model.config
        cache = cls(config, LogQuantConfig(**described["settings"], calibration=calibration))
        kinds = [type(layer).__name__ for layer in cache.layers]
        if kinds != [layer["kind"] for layer in described["layers"]]:
            raise ValueError(f"{path} has other kinds of layers than a cache of this model: {kinds}")
        rows = None
        if "rows" in described:
            rows = Rows.restored(cache._empty_slots(config), tensors, described["rows"])
        for i, (layer, saved) in enumerate(zip(cache.layers, described["layers"], strict=True)):
            if isinstance(layer, LogQuantLayer):
                prefix = f"layers.{i}."
                own = {
                    name.removeprefix(prefix): t.to(device) for name, t in tensors.items() if name.startswith(prefix)
                }
                layer.restore(rows, own, saved["state"])
            else:
                vars(layer).update(put_together(saved["state"], tensors, device))
        return cache

    def check_layers_agree(self) -> None:
        """Refuse if some layers have more tokens than others (ValueError), as after an error within a forward pass."""
        lengths = {layer.get_seq_length() for layer in self.layers if isinstance(layer, LogQuantLayer)}
        if len(lengths - {0}) > 1:
            raise ValueError(
                f"the layers of the cache hold {sorted(lengths)} tokens: a forward pass ended early; rewind() the cache"
            )

    def rewind(self) -> int:
        """After an error within a forward pass: remove the tokens that only the first layers have.

        The tokens of one pass are removed without a trace (:meth:`LogQuantLayer.crop`).

        Returns:
            How many tokens there are now.

        Raises:
            RuntimeError: a sliding or linear layer has forgotten what it would need; :meth:`reset` the cache then.
        """
        layers = [layer for layer in self.layers if isinstance(layer, CacheLayerMixin) and hasattr(layer, "crop")]
        length = min(layer.get_seq_length() for layer in layers)
        for layer in layers:
            if layer.get_seq_length() > length:
                layer.crop(length - layer.get_seq_length())
        return length
