"""Constants of an ONNX graph whose values are computed when they are asked for.

An ONNX graph in the compiler holds no weights: each constant knows its shape and type and how to compute its values
from the tensor that the model owns. Values are made, packed and written one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

Array = NDArray[Any]
INT4, UINT4 = np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4)
FOUR_BIT_TYPES = (INT4, UINT4)


class LazyArray(LazyValues):  # type: ignore[misc]  # graphsurgeon has no types
    """Values that `compute` makes anew each time they are needed.

    Args:
        shape: of the values.
        dtype: their NumPy type; 4-bit ones are those of ml_dtypes.
        compute: makes the values, of that shape; elements that `astype(dtype)` keeps as they are.
        code_range: lowest and highest value that can occur, where that is known without computing.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: np.dtype[Any] | type,
        compute: Callable[[], Array],
        code_range: tuple[int, int] | None = None,
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.compute = compute
        self.code_range = code_range

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return stored_bytes(self.shape, self.dtype)

    @property
    def tensor(self) -> TensorProto:
        """The constant as a file holds it, without a name."""
        values = self.load()
        return helper.make_tensor("", onnx_type(self.dtype), self.shape, raw_bytes(values), raw=True)

    def load(self) -> Array:
        return self.compute().astype(self.dtype, copy=False)


def constant(name: str, values: Array) -> gs.Constant:
    """A constant that owns its (small) values, in any type."""
    return gs.Constant(name, LazyArray(values.shape, values.dtype, lambda: values))


def values_of(tensor: gs.Constant) -> Array:
    """The values of a constant, computed now and not kept (`gs.Constant.values` keeps them)."""
    return load(tensor._values)


def load(values: Array | LazyValues) -> Array:
    """Values that may be lazy, computed now."""
    array: Array = values if isinstance(values, np.ndarray) else values.load()
    return array


def dtype_of(tensor: gs.Tensor) -> np.dtype[Any]:
    """The NumPy type of a tensor; graphsurgeon holds ONNX's number where it knows no NumPy type."""
    if isinstance(tensor.dtype, int):
        return numpy_type(tensor.dtype)
    dtype: np.dtype[Any] = np.dtype(tensor.dtype)
    return dtype


def type_range(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Lowest and highest value of an integer type."""
    if dtype in FOUR_BIT_TYPES:
        return (-8, 7) if dtype == INT4 else (0, 15)
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def code_range(codes: gs.Constant) -> tuple[int, int]:
    """Lowest and highest code of a constant; computed only where no pass has said how far they reach. 0 if empty."""
    known: tuple[int, int] | None = getattr(codes._values, "code_range", None)
    if known is not None:
        return known
    values = values_of(codes)
    return (int(values.min()), int(values.max())) if values.size else (0, 0)


def element_count(shape: Sequence[int]) -> int:
    """Elements of a tensor; 1 for a scalar."""
    return int(np.prod(shape, dtype=np.int64))


def stored_bytes(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Bytes that a file needs for a tensor: two elements a byte at 4 bits, an odd last one padded."""
    count = element_count(shape)
    return (count + 1) // 2 if dtype in FOUR_BIT_TYPES else count * dtype.itemsize


def numpy_type(data_type: int) -> np.dtype[Any]:
    """NumPy's type for ONNX's number of it; 4-bit types are those of ml_dtypes."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(data_type))


def onnx_type(dtype: np.dtype[Any]) -> int:
    """ONNX's number of a NumPy type."""
    return int(helper.np_dtype_to_tensor_dtype(dtype))


def raw_bytes(values: Array) -> bytes:
    """A tensor's bytes as ONNX stores them: little-endian, 4-bit elements packed."""
    if values.dtype in FOUR_BIT_TYPES:
        return pack_four_bit(values).tobytes()
    return np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def pack_four_bit(codes: Array) -> NDArray[np.uint8]:
    """Two codes a byte, the first in the low half, row by row; an odd last one is padded by 0.

    The layout of INT4 and UINT4 in onnx.proto3, `TensorProto.raw_data`.
    """
    halves = np.bitwise_and(codes.astype(np.int8).reshape(-1).view(np.uint8), np.uint8(0xF))
    if halves.size % 2:
        halves = np.append(halves, np.uint8(0))
    packed: NDArray[np.uint8] = np.bitwise_or(halves[0::2], np.left_shift(halves[1::2], np.uint8(4)))
    return packed


def of_proto(proto: TensorProto, base_dir: str = "") -> LazyArray:
    """The values of a file's constant, which stay packed, or outside, until they are needed."""
    dtype = numpy_type(proto.data_type)
    return LazyArray(tuple(proto.dims), dtype, lambda: np.array(numpy_helper.to_array(proto, base_dir)))
