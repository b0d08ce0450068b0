"""Settings: those of LogQuant, and those of vLLM that it cannot serve."""

from __future__ import annotations

from typing import Any

from ...config import LogQuantConfig

_OPTIONS = ("calibration", "sinks", "bits", "key_bits", "value_bits", "key_columns", "allocate_bits", "fine_values")
# Five such pages and two sinks fill a block of bfloat16 with heads of 64 or 128.
_PAGES: dict[str, Any] = {"fine_values": 8, "key_columns": 1.75, "sinks": 2}


def config_of(vllm_config: Any) -> LogQuantConfig:
    """The settings under ``additional_config["logquant"]``, of those of :class:`logquant.LogQuantConfig`.

    They say what pages are like; which tokens are packed, and when, is always the same here (step.py). Pages of 2 bits
    are larger by default than those of a LogQuantConfig, and lose less.

    Raises:
        ValueError: an unknown setting, or as LogQuantConfig.
    """
    additional = vllm_config.additional_config
    options = additional.get("logquant", {}) if isinstance(additional, dict) else {}
    return config_from(options, "additional_config['logquant']")


def config_from(options: Any, name: str) -> LogQuantConfig:
    """The settings that ``options`` say, as :func:`config_of`; an error calls them ``name``."""
    if not isinstance(options, dict):
        raise ValueError(f"{name} must be a dict, got {options!r}")
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise ValueError(f"{name} must be among {', '.join(_OPTIONS)}; got {', '.join(unknown)}")
    bits = {"bits", "key_bits", "value_bits"} & options.keys()
    return LogQuantConfig(**({} if bits else _PAGES) | options)


def drafts(vllm_config: Any) -> bool:
    """Whether a step may bring tokens that are taken back afterwards."""
    return vllm_config.speculative_config is not None


def check_drafts(vllm_config: Any, most: int) -> None:
    """Refuse more drafts a step than blocks are made for.

    Raises:
        ValueError: saying how many there are, and may be.
    """
    if drafts(vllm_config) and (count := vllm_config.speculative_config.num_speculative_tokens) > most:
        raise ValueError(f"speculative_config's num_speculative_tokens must be at most {most} here, got {count}")


def check(vllm_config: Any) -> None:
    """Refuse what would give wrong results or save nothing.

    Raises:
        ValueError: naming the setting of vLLM, and what is needed.
    """
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    wrong = [
        (
            vllm_config.kv_transfer_config is not None,
            "kv_transfer_config: KV connectors copy blocks whose contents they do not know",
        ),
        (
            scheduler.disable_hybrid_kv_cache_manager,
            "disable_hybrid_kv_cache_manager: exact tokens would be kept forever",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "decode_context_parallel_size or prefill_context_parallel_size above 1",
        ),
        (
            parallel.use_ubatching,
            "enable_dbo or ubatch_size: nobody has tried a batch in two halves",
        ),
        (
            vllm_config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16"),
            f"kv_cache_dtype {vllm_config.cache_config.cache_dtype}: exact tokens have the model's dtype, and "
            "additional_config['logquant'] says how many bits the others have",
        ),
        (
            drafts(vllm_config) and vllm_config.speculative_config.method != "ngram",
            "speculative_config with another method than ngram: nobody has tried what draft models would cache",
        ),
    ]
    if reasons := [reason for is_so, reason in wrong if is_so]:
        raise ValueError("LogQuant's KV cache cannot be used with " + "; ".join(reasons))
