"""``LogQuantCache``: the layers of a model together."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ..attention import compiled
from ..config import LogQuantConfig
from ..files import fingerprint, read, write
from ..quantizer.calibration import Calibration, calibration_of, with_calibration
from ..residual.trained import residual_of, with_residual
from .fixed_size import FixedSize
from .layer import LogQuantLayer
from .layout import Rows
from .left_behind import LeftBehind
from .mapped import MappedAllocator
from .other_layers import check_sliding, put_together, take_apart
from .report import LayerReport, report_of
from .shared import Shared
from .sizes import tensors_in
from .slots import Slots
from .static import StaticLayer
from .storage import Allocator

FILE_VERSION = 1
KIND = "cache"


class LogQuantCache(DynamicCache):
    """A KV cache that keeps old tokens in 2 bits and a few hundred exact ones, dense near the end.

    Use it where a ``DynamicCache`` would be used; layers with full attention are LogQuant layers, all others (sliding
    windows, linear attention) what transformers would have made::

        cache = LogQuantCache(model.config)
        model.generate(**inputs, **logquant.as_argument(cache))

    Args:
        config: the model's configuration.
        quantization: what to keep exact and how to store the rest.
        max_length: given, the cache is of fixed size, with room for so many positions, and a step of decoding needs no
            Python: ``generate`` compiles it by itself on a GPU, as with a ``StaticCache``
            (:mod:`logquant.cache.static`).
        page_directory: given, pages are in files there, memory-mapped, so that they may be more than fits into memory;
            on a CPU (:mod:`logquant.cache.mapped`).
        **options: fields of :class:`logquant.LogQuantConfig` given directly, as in ``LogQuantCache(config, bits=4)``.

    Raises:
        TypeError: ``quantization`` together with ``options``, or an unknown option.
        ValueError: an invalid option, a head dimension that pages cannot hold, a calibration or residual of another
            model, or ``recall``, ``prune``, ``evict`` or ``page_directory`` with a ``max_length``, or ``evict`` with a
            ``page_directory``.
        FileNotFoundError: a calibration or residual names a file that is not there.
        NotADirectoryError: no such ``page_directory``.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        quantization: LogQuantConfig | None = None,
        *,
        max_length: int | None = None,
        page_directory: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if quantization is not None and options:
            raise TypeError(f"give either quantization or its fields, got both: {', '.join(options)}")
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be the model's configuration (model.config), got {type(config).__name__}")
        self.quantization = with_residual(with_calibration(quantization or LogQuantConfig(**options)))
        layers = DynamicCache(config=config).layers
        of_layers = _of_layers(self.quantization, config, layers)
        rows = Rows((self._empty_slots(config),))
        for learnt in calibration_of(self.quantization), residual_of(self.quantization):
            if learnt is not None:
                learnt.check(config, [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer])
        self.config, self._text_config = config, config.get_text_config(decoder=True)
        self.left_behind = LeftBehind(config)
        self._given = False
        own = [each for each, layer in zip(of_layers, layers, strict=True) if type(layer) is DynamicLayer]
        if layers and not own:
            warnings.warn(
                "no layer of this model has full attention, which is all that a LogQuant cache quantises: it saves "
                "nothing here over a DynamicCache",
                UserWarning,
                stacklevel=2,
            )
        allocator = Allocator(own)
        if page_directory is not None:
            for name, option in ("max_length", max_length), ("evict", self.quantization.evict):
                if option is not None:
                    raise ValueError(f"{name} does not go with page_directory: got {name}={option!r}")
            allocator = MappedAllocator(own, page_directory)
        self._shared = Shared(allocator)
        self._fixed = None if max_length is None else FixedSize(config, of_layers, self._shared, rows, max_length)
        # Not DynamicCache's own __init__, which would make other layers. It is the base because transformers asks for
        # it where a cache must be able to crop and select rows (EncoderDecoderCache).
        Cache.__init__(
            self,
            layers=self._fixed.layers
            if self._fixed is not None
            else [
                LogQuantLayer(of_layers[i], self._shared, rows, i) if type(layer) is DynamicLayer else layer
                for i, layer in enumerate(layers)
            ],
        )

    @property
    def max_length(self) -> int | None:
        """How many positions there is room for; None in a cache that grows."""
        return None if self._fixed is None else self._fixed.max_length

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
        if self._fixed is not None and not torch.compiler.is_compiling():
            self._fixed.arrive(layer_idx, key_states.shape[2])
        if isinstance(layer, StaticLayer) and layer.can_step(key_states):
            # What other attention is called with shows only where nothing is compiled (attention/handle.py).
            fused = not torch.compiler.is_compiling() or self._text_config._attn_implementation == "logquant"
            return layer.step(key_states, value_states) if fused else layer.append_step(key_states, value_states)
        if torch.compiler.is_compiling() and isinstance(layer, LogQuantLayer) and self._reads_plainly(layer):
            length = layer.length + key_states.shape[2]
            both: tuple[Tensor, Tensor] = compiled.read_layer(key_states, value_states, layer._layer_id, length)
            return both
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return updated

    def _reads_plainly(self, layer: LogQuantLayer) -> bool:
        """Whether the model's attention takes plain tensors and there is something to dequantise."""
        return layer.is_initialized and self._text_config._attn_implementation != "logquant"

    def __bool__(self) -> bool:
        """True, but for an empty cache of a model like Phi-3, which would throw it away before a long prompt."""
        if not self.left_behind.may_be:
            return True
        length = int(super().get_seq_length())
        self.left_behind.asked_for_truth(length)
        return length > 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that the layer holds, those of padding included."""
        length: int = super().get_seq_length(layer_idx)
        if self.left_behind.may_be and not torch.compiler.is_compiling():
            self.left_behind.asked_for_length(int(length))
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
        """Whether ``generate`` is to compile by itself: with a ``max_length``."""
        self.left_behind.kept()
        return self.max_length is not None and all(layer.is_compileable for layer in self.layers)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As of any cache; who asks for the mask of a step is about to take it (:meth:`make_room`)."""
        if not torch.compiler.is_compiling():
            self.make_room()
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def make_room(self) -> None:
        """Between steps of a cache of fixed size: tokens that are due leave the window, so that another step fits.

        ``generate`` calls this by itself. If you compile a model and call it in your own loop, without masks that are
        made outside of it, call this before each step: without it, a step that finds no room raises an error on a CPU,
        and gives NaN on a GPU. Reads from the device only where tokens may be due.

        Raises:
            ValueError: all ``max_length`` positions are held; nothing has changed.
        """
        if self._fixed is not None:
            self._fixed.make_room()

    def resize(self, max_length: int) -> None:
        """Have room for ``max_length`` positions from now on; what is held is copied.

        Raises:
            ValueError: the cache is not of fixed size, has other layers, or holds more.
        """
        if self._fixed is None:
            raise ValueError("resize is for caches with a max_length, and this one grows by itself")
        self._fixed.resize(max_length)

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
            ValueError: a positive number, or tokens would have to come back that KV heads have dropped, or put into
                clusters.
        """
        for layer in self.layers:
            if isinstance(layer, LogQuantLayer):
                layer.check_crop(tokens_to_remove)
        check_sliding(self.layers, tokens_to_remove)
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
        return [report_of(i, layer) for i, layer in enumerate(self.layers)]

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
            layers.append({"kind": _kind(layer), "state": state})
        described: dict[str, Any] = {
            "version": FILE_VERSION,
            "settings": self._settings(),
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

    def _settings(self) -> dict[str, Any]:
        """The settings as a file has them: without the calibration, which is in it, and with the residual's file."""
        settings = {name: value for name, value in asdict(self.quantization).items() if name != "calibration"}
        trained = residual_of(self.quantization)
        return settings | {"residual": None if trained is None else trained.setting}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel | PreTrainedConfig,
        device: torch.device | str | None = None,
        max_length: int | None = None,
    ) -> LogQuantCache:
        """Read a cache that :meth:`save` has written.

        Args:
            path: the file.
            model: the model that the cache is for, or its configuration.
            device: where the tensors go; by default the model's device, or the CPU.
            max_length: as of a new cache; the file says nothing of it.

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
        settings = LogQuantConfig(**described["settings"], calibration=calibration)
        cache = cls(config, settings, max_length=max_length)
        kinds = [_kind(layer) for layer in cache.layers]
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
        lengths = {layer.length for layer in self.layers if isinstance(layer, LogQuantLayer)}
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
        lengths = [layer.length if isinstance(layer, LogQuantLayer) else layer.get_seq_length() for layer in layers]
        ahead = [(layer, min(lengths) - length) for layer, length in zip(layers, lengths, strict=True)]
        for layer, more in ahead:
            check_sliding([layer], more)
        for layer, more in ahead:
            if more:
                layer.crop(more)
        return min(lengths)


def _of_layers(quantization: LogQuantConfig, config: PreTrainedConfig, layers: list[Any]) -> list[LogQuantConfig]:
    """The settings of each layer (ValueError: a head dimension that its pages cannot hold, or there is no such layer).

    Args:
        quantization: of the cache.
        config: the model's configuration.
        layers: as a ``DynamicCache`` has them.
    """
    found = [quantization.of_layer(i, len(layers)) for i in range(len(layers))]
    head_dim = getattr(config.get_text_config(decoder=True), "head_dim", None)
    for each, layer in zip(found, layers, strict=True):
        if head_dim and type(layer) is DynamicLayer:
            each.page_format(head_dim)
    return found


def _kind(layer: object) -> str:
    """The kind of a layer, as files say it: those of fixed size hold the same."""
    return LogQuantLayer.__name__ if isinstance(layer, LogQuantLayer) else type(layer).__name__
