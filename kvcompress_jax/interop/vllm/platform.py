"""vLLM's platform with our backend: where a configuration is checked before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.interop.vllm import gate, metrics, settings, tables
from kvcompress_jax.interop.vllm.model_files import outline
from kvcompress_jax.interop.vllm.offload.options import FINGERPRINT, SPEC, read_options
from kvcompress_jax.models.errors import ModelError
from kvcompress_jax.paged.layout import PAGE_SIZES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WORKER = "kvcompress_jax.interop.vllm.worker.CompressionWorker"
SCHEDULER = "kvcompress_jax.interop.vllm.scheduler.CompressedScheduler"
BACKEND = "kvcompress_jax.interop.vllm.backend.CompressedBackend"
FLOOR_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "kvcompress_jax.interop.vllm.worker_cpu.FloorCpuWorker",
    "vllm.v1.worker.gpu_worker.Worker": "kvcompress_jax.interop.vllm.worker_cuda.FloorCudaWorker",
}


class CompressedPlatform:
    """Mixed into the platform that vLLM would have chosen."""

    device_type: str  # of that platform

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuses what cannot be compressed, and sets block size, scheduler and worker extension.

        Raises:
          ConfigError: names the setting, what was expected and what came.
          QualityError: the configuration has a bound that the model is not known to keep.
        """
        super().check_and_update_config(vllm_config)  # type: ignore[misc]
        if vllm_config.model_config is None:
            return
        cache = vllm_config.cache_config
        given = cache.block_size if cache.user_specified_block_size else None
        if given is not None and given not in PAGE_SIZES:
            raise ConfigError(f"block_size: expected one of {PAGE_SIZES}, got {given}")
        config = settings.read_config(given)
        for name, expected, got in _requirements(vllm_config):
            if expected != got:
                raise ConfigError(
                    f"{name}: expected {expected} with KV compression, got {got}; set"
                    f" {settings.ENABLE_VARIABLE}=0 to run without compression"
                )
        model = vllm_config.model_config
        gate.check(config, model.model, revision=model.revision)
        tables.check_files(config, model.model, revision=model.revision)
        _prepare_offloading(vllm_config)
        cache.block_size = config.page_size
        cache.user_specified_block_size = True  # vLLM would choose again
        scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
        scheduler.scheduler_cls = SCHEDULER
        if parallel.worker_extension_cls not in ("", WORKER):
            raise ConfigError(
                f"worker_extension_cls: expected none with KV compression, got"
                f" {parallel.worker_extension_cls}"
            )
        parallel.worker_extension_cls = WORKER
        prepare_floors(vllm_config, config)
        metrics.collect_from_workers()

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """Our backend, whatever vLLM would have chosen.

        Raises:
          ConfigError: the user chose another.
        """
        if selected_backend is not None and selected_backend.name != "CUSTOM":
            raise ConfigError(
                f"attention backend: expected none or CUSTOM with KV compression, got"
                f" {selected_backend.name}; set {settings.ENABLE_VARIABLE}=0 to use it"
            )
        return BACKEND


def prepare_floors(vllm_config: VllmConfig, config: CompressionConfig) -> None:
    """Puts in the worker that asks for more memory in floor layers, where there are such.

    Raises:
      ConfigError: the engine is of a kind in which that cannot be.
    """
    from kvcompress_jax.interop.vllm.carve import floors_differ

    if not floors_differ(config, settings.fine_share(config)):
        return
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size != 1:
        raise ConfigError(
            "pipeline_parallel_size: expected 1 with floor_layers, got"
            f" {parallel.pipeline_parallel_size}"
        )
    worker = parallel.worker_cls
    if worker not in (*FLOOR_WORKERS, *FLOOR_WORKERS.values()):
        raise ConfigError(
            f"worker_cls: expected one of {list(FLOOR_WORKERS)} with floor_layers, got {worker}"
        )
    parallel.worker_cls = FLOOR_WORKERS.get(worker, worker)


def _prepare_offloading(vllm_config: VllmConfig) -> None:
    """Checks the options of offloading, and says which model it is where pages outlive the engine.

    Raises:
      ConfigError: see above.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return
    extra = transfer.kv_connector_extra_config
    if read_options(extra).disk_path is None:
        return
    model = vllm_config.model_config
    try:
        extra[FINGERPRINT] = outline(model.model, model.revision).fingerprint
    except ModelError as e:
        raise ConfigError(
            f"disk_path: expected a model that can be told from others: {e}"
        ) from None


def _connector(vllm_config: VllmConfig) -> str | None:
    """What stands in the way, of the KV connector: None or its name."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return None
    extra = transfer.kv_connector_extra_config
    if transfer.kv_connector == "OffloadingConnector" and extra.get("spec_name") == SPEC:
        return None
    return f"{transfer.kv_connector} with spec_name={extra.get('spec_name')}"


def _requirements(vllm_config: VllmConfig) -> list[tuple[str, object, object]]:
    """(setting, what it must be, what it is)."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    own = (None, SCHEDULER)
    scheduler = vllm_config.scheduler_config.scheduler_cls
    return [
        ("speculative decoding", None, speculative and speculative.method),
        ("multi-head latent attention", False, bool(model.use_mla)),
        ("encoder-decoder model", False, bool(model.is_encoder_decoder)),
        ("runner", "generate", model.runner_type),
        ("kv_cache_dtype", "auto", vllm_config.cache_config.cache_dtype),
        ("KV connector other than OffloadingConnector with " + SPEC, None, _connector(vllm_config)),
        ("decode context parallel size", 1, parallel.decode_context_parallel_size),
        ("scheduler_cls", None, None if scheduler in own else scheduler),
        ("micro-batches (DBO)", False, bool(parallel.enable_dbo)),
    ]
