"""The bridge: aliases are aliases, and what could only be copied is refused by name."""

import gc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from kvcompress_jax.interop.dlpack import (  # noqa: E402
    ALIGNMENT_BYTES,
    DTYPES,
    BridgeError,
    fence,
    to_jax,
    to_torch,
    write_back,
)


@pytest.fixture(params=["cpu", "cuda"], autouse=True)
def device(request):
    """Where tensors and arrays are made."""
    both = torch.cuda.is_available() and jax.default_backend() == "gpu"
    if request.param == "cuda" and not both:
        pytest.skip("there is no GPU, or only one of the two sees it")
    torch.set_default_device(request.param)
    with jax.default_device(jax.devices(request.param)[0]):
        yield torch.zeros(1).device
    torch.set_default_device("cpu")


def zeros(*shape, dtype=torch.float32):
    """Zeros of any type; PyTorch makes none of some."""
    return torch.zeros(*shape, dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aliases_both_ways(dtype):
    tensor = zeros(4, 64, dtype=dtype)
    array = to_jax(tensor, "x")
    assert array.dtype == DTYPES[dtype] and array.shape == (4, 64)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    back = to_torch(array, "x")
    assert back.dtype == dtype and back.data_ptr() == tensor.data_ptr()


def test_alias_sees_later_writes_and_a_copy_would_not():
    tensor = zeros(256)
    alias, copy = to_jax(tensor, "x"), jnp.array(to_jax(tensor, "x"), copy=True)
    total = jax.jit(jnp.sum)
    assert total(alias) == 0 and total(copy) == 0
    tensor.fill_(1)
    assert total(alias) == 256
    assert total(copy) == 0


def test_alias_keeps_memory_alive():
    tensor = torch.full((1 << 20,), 2.0)
    array = to_jax(tensor, "x")
    del tensor
    gc.collect()
    others = [torch.zeros(1 << 20) for _ in range(4)]
    assert float(array.min()) == 2.0
    view = to_torch(jnp.full((1 << 20,), 3.0), "y")
    gc.collect()
    more = [jnp.zeros(1 << 20).block_until_ready() for _ in range(4)]
    assert float(view.min()) == 3.0
    del others, more


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64, torch.float64, torch.complex64])
def test_narrowing_is_refused(dtype):
    tensor = torch.zeros(64, dtype=torch.float32).to(dtype)
    with pytest.raises(BridgeError, match=rf"positions: expected one of float32.*got {dtype}"[:40]):
        to_jax(tensor, "positions")


def test_jax_alone_would_narrow_in_silence():
    """The fact that the check stands for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert jax.dlpack.from_dlpack(torch.tensor([2**40])).dtype == jnp.int32


@pytest.mark.parametrize("share", [1 / 16, 1 / 4, 1 / 2])
def test_misaligned_memory_is_refused(share, device):
    base = torch.zeros(4096, dtype=torch.uint8)
    alignment = ALIGNMENT_BYTES[device.type]
    offset = int(share * alignment)
    start = -base.data_ptr() % 64
    message = f"page: expected memory aligned to {alignment} .* {offset} past"
    with pytest.raises(BridgeError, match=message):
        to_jax(base[start + offset : start + offset + 1024], "page")
    aligned = base[start + 64 : start + 1024]
    assert to_jax(aligned, "page").unsafe_buffer_pointer() == aligned.data_ptr()


STRIDED = {
    "slice": lambda x: x[..., :4],
    "step": lambda x: x[::2],
    "chunk": lambda x: x.chunk(2, dim=2)[1],
    "transpose": lambda x: x.transpose(1, 2),
    "expand": lambda x: x[:1].expand(5, 2, 4, 16),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_views_that_are_not_contiguous_are_refused(view):
    with pytest.raises(BridgeError, match=r"key: expected a contiguous tensor, got shape \["):
        to_jax(view(zeros(4, 2, 4, 16)), "key")


def test_contiguous_part_is_an_alias():
    tensor = zeros(4, 2, 4, 16)
    part = tensor[1]
    array = to_jax(part, "x")
    part.fill_(5)
    assert float(array.sum()) == 5 * part.numel()
    assert float(tensor.sum()) == 5 * part.numel()


def test_gradient_other_devices_and_lazy_tensors_are_refused():
    with pytest.raises(BridgeError, match="w: expected no requires_grad"):
        to_jax(torch.nn.Parameter(torch.zeros(64)), "w")
    with pytest.raises(BridgeError, match="w: expected a tensor on cpu or cuda, got meta"):
        to_jax(torch.zeros(64, device="meta"), "w")
    with pytest.raises(BridgeError, match="w: expected a plain strided tensor"):
        to_jax(torch.zeros(8, 8).to_sparse(), "w")
    assert to_jax(torch.nn.Parameter(torch.zeros(64)).detach(), "w").shape == (64,)
    with torch.inference_mode():
        assert to_jax(torch.zeros(64), "w").shape == (64,)


def test_empty_and_scalar():
    assert to_jax(torch.empty(0, 4), "x").shape == (0, 4)
    assert float(to_jax(torch.tensor(3.0), "x")) == 3.0
    assert to_torch(jnp.zeros((0, 4)), "x").shape == (0, 4)


def test_arrays_that_torch_has_no_type_for_are_refused():
    with pytest.raises(BridgeError, match=r"codes: expected one of float32.*got int4"):
        to_torch(jnp.zeros(64, jnp.int4), "codes")
    with pytest.raises(BridgeError, match="codes: expected an array, got a tracer"):
        jax.jit(lambda x: to_torch(x, "codes"))(jnp.zeros(64))


def test_a_result_is_there_before_torch_sees_it():
    """The computation reads an alias for tens of milliseconds; torch overwrites it at once."""
    size = 512
    tensor = torch.ones(size, size)
    product = jax.jit(lambda x: x @ x @ x @ x @ x @ x @ x @ x)
    alias = to_jax(tensor, "x")
    product(alias).block_until_ready()
    result = to_torch(product(alias), "product")
    tensor.zero_()
    assert float(result.min()) == float(size) ** 7 == float(result.max())


def test_write_back_writes_all_or_rows():
    target = zeros(4, 8)
    alias = to_jax(target, "pool")
    write_back(target, jnp.ones((4, 8)), "pool")
    assert float(alias.sum()) == 32
    write_back(target, jnp.full((3, 8), 3.0), "pool", rows=torch.tensor([3, -1, 1]))
    np.testing.assert_array_equal(np.asarray(alias)[:, 0], [1, 3, 1, 3])


def test_write_back_refuses_what_does_not_fit(device):
    target = zeros(4, 8)
    for array in (jnp.ones((4, 8), jnp.bfloat16), jnp.ones((4, 7)), jnp.ones((1, 8))):
        with pytest.raises(BridgeError, match=rf"pool: expected float32\[4, 8\] on {device}, got "):
            write_back(target, array, "pool")
    with pytest.raises(BridgeError, match=r"pool: expected float32\[1, 8\]"):
        write_back(target, jnp.ones((2, 8)), "pool", rows=torch.tensor([3]))
    assert float(target.sum()) == 0


def test_after_a_fence_jax_sees_what_torch_wrote(device):
    """A GPU computes the product for milliseconds after torch has returned."""
    size = 4096 if device.type == "cuda" else 64
    tensor = torch.zeros(size, size)
    alias = to_jax(tensor, "x")
    total = jax.jit(jnp.sum)
    assert float(total(alias)) == 0
    tensor.fill_(1)
    half = torch.full((size, size), 0.5)
    for _ in range(20):
        tensor.copy_(half @ tensor / (size // 2))
    fence(device)
    assert float(total(alias)) == size**2
