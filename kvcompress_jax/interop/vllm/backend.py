"""vLLM's attention backend: attention to compressed pages, in memory that vLLM manages."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from kvcompress_jax.interop.vllm import settings
from kvcompress_jax.paged.layout import PAGE_SIZES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from kvcompress_jax.interop.vllm.group import Group
    from kvcompress_jax.interop.vllm.step import Step

logger = init_logger(__name__)

HEAD_SIZES = [32, 64, 80, 96, 112, 128, 160, 192, 224, 256]


class CompressedBackend(AttentionBackend):
    """Registered as vLLM's CUSTOM backend, and chosen by our platform."""

    accept_output_buffer = True
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[CompressedImpl]:
        return CompressedImpl

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return list(PAGE_SIZES)  # vLLM's block is our page; the platform sets its size

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return HEAD_SIZES

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # a layer's memory is in one piece

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return True  # ours alone, which the platform checks: blocks are no pieces of memory here

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Asks for the bytes that a token takes here; vLLM then hands out more tokens."""
        from kvcompress_jax.interop.vllm.carve import content_bytes, layer_layout

        if spec.state_content_bytes is not None:
            return spec
        config = settings.read_config(spec.block_size)
        if not config.compresses:
            return spec
        if type(spec) is not FullAttentionSpec or spec.head_size != spec.head_size_v:
            raise NotImplementedError(
                "KV compression: expected full attention with keys and values of one size, got"
                f" {spec}: set {settings.ENABLE_VARIABLE}=0 to run without"
            )
        layout = layer_layout(
            config, heads=spec.num_kv_heads, dim=spec.head_size, dtype=dtype_name(spec.dtype)
        )
        content = content_bytes(
            config,
            layout,
            raw_share=settings.raw_share(),
            fine_share=settings.fine_share(config),
        )
        return dataclasses.replace(spec, dtype=torch.uint8, state_content_bytes=content)


class StepBuilder(AttentionMetadataBuilder["StepMetadata"]):
    """Plans each step, once for all layers: one of these for each kind of memory that they have."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        from kvcompress_jax.interop.vllm.group import group_of
        from kvcompress_jax.interop.vllm.model_files import Source

        model, ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
        rank = get_tensor_model_parallel_rank() if ranks > 1 else 0
        self.group = group_of(
            vllm_config,
            kv_cache_spec,
            Source(model.model, model.revision, rank=rank, ranks=ranks),
            layer_names,
            dtype=dtype_name(model.dtype),
            blocks=vllm_config.cache_config.num_gpu_blocks,
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StepMetadata:
        """Reads what vLLM scheduled; the arrays are small and on the CPU already, or nearly."""
        common = common_attn_metadata
        rows = common.num_reqs
        lengths = common.seq_lens[:rows].cpu().numpy()
        columns = -(-int(lengths.max(initial=1)) // self.kv_cache_spec.block_size)
        step = self.group.plan(
            self.layer_names[0],
            common.query_start_loc_cpu[: rows + 1].numpy(),
            lengths,
            common.block_table_tensor[:rows, :columns].cpu().numpy(),
        )
        return StepMetadata(group=self.group, step=step, tokens=common.num_actual_tokens)


@dataclasses.dataclass
class StepMetadata:
    """What each layer gets."""

    group: Group
    step: Step
    tokens: int


class CompressedImpl(AttentionImpl):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Raises NotImplementedError for a layer that cannot be compressed: an error at start is
        better than a cache that is not what its owner thinks."""
        refused = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            f"kv_cache_dtype={kv_cache_dtype}": kv_cache_dtype != "auto",
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "keys and values of another layer": kv_sharing_target_layer_name is not None,
            "learned attention sinks": sinks is not None,
            f"head size {head_size}": head_size not in HEAD_SIZES,
        }
        for what, found in refused.items():
            if found:
                raise NotImplementedError(
                    f"KV compression: a layer with {what} is not supported; set"
                    f" {settings.ENABLE_VARIABLE}=0 to run without"
                )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = None
        self.soft_cap = float(logits_soft_cap) if logits_soft_cap else None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: StepMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes attention to `output`, [tokens, heads, dim]; zeros in profiling runs."""
        if attn_metadata is None:
            return output.zero_()
        tokens = attn_metadata.tokens
        memory = attn_metadata.group.memory(layer.layer_name, kv_cache)
        memory.forward(
            query[:tokens],
            key[:tokens],
            value[:tokens],
            output[:tokens],
            attn_metadata.step,
            scale=self.scale,
            soft_cap=self.soft_cap,
        )
        return output


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, float16 or float32."""
    return str(dtype).removeprefix("torch.")
