"""Vectors of 16 numbers for kernels that numba compiles; LLVM cuts them up where registers are shorter.

Loops over single numbers would leave it to the compiler to find vectors, which it does not where codes are unpacked.
Memory is given as an address (int64) and a place in elements. Only imported where numba is installed. Ships with every
exported model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16


class Vector(types.Type):
    """The type of a vector in compiled code."""


class _Floats(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, FLOATS)


class _Integers(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, INTEGERS)


class Floats(Vector):
    """16 float32."""

    def __init__(self) -> None:
        super().__init__("16 x float32")


class Integers(Vector):
    """16 int32."""

    def __init__(self) -> None:
        super().__init__("16 x int32")


FLOATS, INTEGERS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
register_model(Floats)(_Floats)
register_model(Integers)(_Integers)

_floats, _integers, _place, _number = Floats(), Integers(), types.int64, types.float32


def _vector(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def _read(builder: Any, address: Any, place: Any, element: ir.Type, size: int) -> Any:
    loaded = builder.load(_pointer(builder, address, place, _vector(element), size))
    loaded.align = size
    return loaded


def _pointer(builder: Any, address: Any, place: Any, kind: ir.Type, size: int) -> Any:
    moved = builder.add(address, builder.mul(place, ir.Constant(place.type, size)))
    return builder.inttoptr(moved, kind.as_pointer())


def _spread(builder: Any, value: Any, kind: ir.VectorType) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(INTEGERS, [0] * LANES))


def _integer(builder: Any, value: Any) -> Any:
    return _spread(builder, builder.trunc(value, ir.IntType(32)), INTEGERS)


_Generate = Callable[[Any, Any, Any, Any], Any]


@intrinsic
def zeros(context: Any) -> tuple[Any, _Generate]:
    """Zeros."""
    return _floats(), lambda context, builder, signature, args: ir.Constant(FLOATS, [0.0] * LANES)


@intrinsic
def floats(context: Any, address: Any, place: Any) -> tuple[Any, _Generate]:
    """16 float32 from ``place`` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _read(builder, *args, ir.FloatType(), 4)

    return _floats(_place, _place), generate


@intrinsic
def bfloats(context: Any, address: Any, place: Any) -> tuple[Any, _Generate]:
    """16 bfloat16 as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.zext(_read(builder, *args, ir.IntType(16), 2), INTEGERS)
        return builder.bitcast(builder.shl(wide, ir.Constant(INTEGERS, [16] * LANES)), FLOATS)

    return _floats(_place, _place), generate


@intrinsic
def halves(context: Any, address: Any, place: Any) -> tuple[Any, _Generate]:
    """16 float16 as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(_read(builder, *args, ir.HalfType(), 2), FLOATS)

    return _floats(_place, _place), generate


@intrinsic
def octets(context: Any, address: Any, place: Any) -> tuple[Any, _Generate]:
    """16 bytes as int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(_read(builder, *args, ir.IntType(8), 1), INTEGERS)

    return _integers(_place, _place), generate


@intrinsic
def store(context: Any, address: Any, place: Any, value: Any) -> tuple[Any, _Generate]:
    """Writes 16 float32 from ``place`` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        written = builder.store(args[2], _pointer(builder, args[0], args[1], FLOATS, 4))
        written.align = 4
        return context.get_dummy_value()

    return types.void(_place, _place, _floats), generate


@intrinsic
def number(context: Any, address: Any, place: Any) -> tuple[Any, _Generate]:
    """One float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, *args, ir.FloatType(), 4))

    return _number(_place, _place), generate


@intrinsic
def prefetch(context: Any, address: Any) -> tuple[Any, _Generate]:
    """Has the cache line at ``address``, which may be anywhere, read ahead."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line, flag = ir.IntType(8), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [line.as_pointer(), flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", [line.as_pointer()], kind)
        builder.call(
            function,
            [
                builder.inttoptr(args[0], line.as_pointer()),
                ir.Constant(flag, 0),
                ir.Constant(flag, 3),
                ir.Constant(flag, 1),
            ],
        )
        return context.get_dummy_value()

    return types.void(_place), generate


@intrinsic
def integers(context: Any, address: Any, place: Any) -> tuple[Any, _Generate]:
    """16 int32, or 64 bytes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _read(builder, *args, ir.IntType(32), 4)

    return _integers(_place, _place), generate


@intrinsic
def no_integers(context: Any) -> tuple[Any, _Generate]:
    """Zeros."""
    return _integers(), lambda context, builder, signature, args: ir.Constant(INTEGERS, [0] * LANES)


@intrinsic
def ones(context: Any, address: Any, place: Any) -> tuple[Any, _Generate]:
    """64 bytes, 1 where one of the 64 bits at ``place`` is set, the lowest first."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.load(_pointer(builder, *args, ir.IntType(64), 8))
        bits.align = 1
        wide = ir.VectorType(ir.IntType(8), 4 * LANES)
        mask = builder.bitcast(bits, ir.VectorType(ir.IntType(1), 4 * LANES))
        chosen = builder.select(mask, ir.Constant(wide, [1] * 4 * LANES), ir.Constant(wide, [0] * 4 * LANES))
        return builder.bitcast(chosen, INTEGERS)

    return _integers(_place, _place), generate


@intrinsic
def cut(context: Any, packed: Any, shift: Any, mask: Any) -> tuple[Any, _Generate]:
    """``(packed >> shift) & mask``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.and_(builder.lshr(args[0], _integer(builder, args[1])), _integer(builder, args[2]))

    return _integers(_integers, _place, _place), generate


@intrinsic
def joined(context: Any, packed: Any, shift: Any, mask: Any, bits: Any) -> tuple[Any, _Generate]:
    """``((packed << shift) & mask) | bits``, read as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        moved = builder.shl(args[0], _integer(builder, args[1]))
        found = builder.or_(builder.and_(moved, _integer(builder, args[2])), _integer(builder, args[3]))
        return builder.bitcast(found, FLOATS)

    return _floats(_integers, _place, _place, _place), generate


@intrinsic
def converted(context: Any, value: Any) -> tuple[Any, _Generate]:
    """int32 as float32."""
    return _floats(_integers), lambda context, builder, signature, args: builder.sitofp(args[0], FLOATS)


@intrinsic
def twice(context: Any, address: Any, place: Any) -> tuple[Any, _Generate]:
    """8 bytes as float32, each twice: lanes 0 and 1 have the first."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = ir.VectorType(ir.IntType(8), LANES // 2)
        loaded = builder.load(_pointer(builder, *args, half, 1))
        loaded.align = 1
        order = ir.Constant(INTEGERS, [lane // 2 for lane in range(LANES)])
        spread = builder.shuffle_vector(loaded, ir.Constant(half, ir.Undefined), order)
        return builder.sitofp(builder.zext(spread, INTEGERS), FLOATS)

    return _floats(_place, _place), generate


@intrinsic
def dots(context: Any, total: Any, packed: Any, address: Any, place: Any) -> tuple[Any, _Generate]:
    """``total`` plus, in each lane, four unsigned bytes of ``packed`` times four signed ones from ``place`` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total, packed, address, place = args
        wide = ir.VectorType(ir.IntType(8), 4 * LANES)
        codes, signed = builder.bitcast(packed, wide), _read_bytes(builder, address, place, wide)
        if _has_dot_products():
            kind = ir.FunctionType(INTEGERS, [INTEGERS, wide, wide])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
            return builder.call(function, [total, codes, signed])
        long = ir.VectorType(ir.IntType(32), 4 * LANES)
        kind, name = ir.FunctionType(INTEGERS, [INTEGERS, long]), "llvm.vector.partial.reduce.add.v16i32.v64i32"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, [total, builder.mul(builder.zext(codes, long), builder.sext(signed, long))])

    return _integers(_integers, _integers, _place, _place), generate


def _read_bytes(builder: Any, address: Any, place: Any, kind: ir.VectorType) -> Any:
    loaded = builder.load(_pointer(builder, address, place, kind, 1))
    loaded.align = 1
    return loaded


@functools.cache
def _has_dot_products() -> bool:
    return bool(binding.get_host_cpu_features().get("avx512vnni"))


@intrinsic
def weighed(context: Any, high: Any, low: Any) -> tuple[Any, _Generate]:
    """``128 * high + low`` as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        moved = builder.shl(args[0], ir.Constant(INTEGERS, [7] * LANES))
        return builder.sitofp(builder.add(moved, args[1]), FLOATS)

    return _floats(_integers, _integers), generate


@intrinsic
def product(context: Any, a: Any, b: Any) -> tuple[Any, _Generate]:
    """``a * b``."""
    return _floats(_floats, _floats), lambda context, builder, signature, args: builder.fmul(*args)


@intrinsic
def plus(context: Any, a: Any, b: Any) -> tuple[Any, _Generate]:
    """``a + b``."""
    return _floats(_floats, _floats), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def multiply_add(context: Any, a: Any, b: Any, c: Any) -> tuple[Any, _Generate]:
    """``a * b + c``, rounded once where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        fused = ("contract",)
        return builder.fadd(builder.fmul(args[0], args[1], flags=fused), args[2], flags=fused)

    return _floats(_floats, _floats, _floats), generate


@intrinsic
def splat(context: Any, value: Any) -> tuple[Any, _Generate]:
    """The same number 16 times."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _spread(builder, args[0], FLOATS)

    return _floats(_number), generate


@intrinsic
def total(context: Any, value: Any) -> tuple[Any, _Generate]:
    """The sum of the 16, half by half."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found, count = args[0], LANES
        while count > 1:
            half, kind = count // 2, ir.VectorType(ir.IntType(32), count // 2)
            lower = builder.shuffle_vector(found, found, ir.Constant(kind, [*range(half)]))
            upper = builder.shuffle_vector(found, found, ir.Constant(kind, [*range(half, count)]))
            found, count = builder.fadd(lower, upper), half
        return builder.extract_element(found, ir.Constant(ir.IntType(32), 0))

    return _number(_floats), generate
