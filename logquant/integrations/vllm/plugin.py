"""What vLLM calls in each of its processes, before it has a configuration."""

from __future__ import annotations

import logging
from typing import Any

BACKEND = "logquant.integrations.vllm.backend.LogQuantBackend"
# Those whose interfaces this was written for; vLLM changes them from one to the next.
VERSIONS = ("0.32",)


def unsupported(version: str) -> str | None:
    """Why this version of vLLM cannot be used, or None if it can."""
    if ".".join(version.split(".")[:2]) in VERSIONS:
        return None
    wanted = " or ".join(f"{v}.*" for v in VERSIONS)
    return (
        f"LogQuant's KV cache for vLLM needs vLLM {wanted}, got {version}; attention_backend='CUSTOM' is not LogQuant"
    )


def register() -> None:
    """Make LogQuant vLLM's backend ``CUSTOM``; calling it again does no harm.

    With another version of vLLM, logs a warning and leaves it as it is: a plugin is loaded for users who do not ask
    for it, too.
    """
    import vllm

    if reason := unsupported(vllm.__version__):
        logging.getLogger("vllm.logquant").warning(reason)
        return
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    if current_platform.is_cpu():
        _let_cpu_choose(type(current_platform), AttentionBackendEnum.CUSTOM)


def _let_cpu_choose(platform: Any, custom: Any) -> None:
    """Have the CPU platform honour a chosen backend; 0.32 takes its own whatever is asked for, unlike CUDA's."""
    original = platform.get_attn_backend_cls
    if getattr(original, "logquant", False):
        return

    def get_attn_backend_cls(cls: Any, selected_backend: Any, *args: Any, **kwargs: Any) -> Any:
        if selected_backend != custom:
            return original(selected_backend, *args, **kwargs)
        asked = kwargs["attn_selector_config"] if "attn_selector_config" in kwargs else args[0]
        reasons = custom.get_class().validate_configuration(device_capability=None, **asked._asdict())
        if reasons:
            raise ValueError(f"attention_backend CUSTOM (LogQuant) cannot serve this model: {'; '.join(reasons)}")
        return custom.get_path()

    get_attn_backend_cls.logquant = True  # type: ignore[attr-defined]
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
