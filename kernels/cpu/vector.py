"""Sixteen float32 lanes as one numba value, and the elementary functions the kernels need on them.

A ``Float32x16`` is an LLVM ``<16 x float>``: one AVX-512 register, two AVX ones or four of NEON or SSE; LLVM splits it
for the machine at hand, so the code below is vector code everywhere and nothing depends on its loop vectoriser.
Addresses are plain integers (bytes): the kernels resolve batch, direction and channel once and then walk.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import njit, types
from numba.core.imputils import lower_builtin
from numba.core.typing import signature
from numba.extending import intrinsic, models, register_model, type_callable

LANES = 16
VECTOR_BYTES = 4 * LANES

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_V = ir.VectorType(_F32, LANES)
_V_INT = ir.VectorType(_I32, LANES)
_V_MASK = ir.VectorType(ir.IntType(1), LANES)


class _Float32x16(types.Type):
    def __init__(self):
        super().__init__(name="Float32x16")


Float32x16 = _Float32x16()


@register_model(_Float32x16)
class _Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _V)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_V, [float(value)] * LANES)


def _constant_int(value: int) -> ir.Constant:
    return ir.Constant(_V_INT, [value] * LANES)


def _splat(builder, scalar):
    """Copy a float into every lane."""
    vector = builder.insert_element(ir.Constant(_V, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(vector, ir.Constant(_V, ir.Undefined), ir.Constant(_V_INT, [0] * LANES))


def _pointer(builder, address, pointee):
    return builder.inttoptr(address, pointee.as_pointer())


def _declare(builder, name, returns, arguments):
    module = builder.module
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(returns, arguments), name)


def _multiply_add(builder, a, b, c):
    # fmuladd: fused where the machine fuses, two instructions (not a library call) where it does not.
    return builder.call(_declare(builder, "llvm.fmuladd.v16f32", _V, [_V, _V, _V]), [a, b, c])


def _at_least(builder, x, floor: float):
    # In this order NaN stays NaN, and x86 does it in one instruction.
    return builder.select(builder.fcmp_ordered("<", x, _constant(floor)), _constant(floor), x)


def _operator(function, build):
    @type_callable(function)
    def typing(_context):
        def typer(a, b):
            if a is Float32x16 and b is Float32x16:
                return Float32x16
            return None

        return typer

    @lower_builtin(function, Float32x16, Float32x16)
    def lower(_context, builder, _signature, arguments):
        return build(builder)(*arguments)


_operator(operator.add, lambda builder: builder.fadd)
_operator(operator.sub, lambda builder: builder.fsub)
_operator(operator.mul, lambda builder: builder.fmul)
_operator(operator.truediv, lambda builder: builder.fdiv)


@intrinsic
def splat(_context, value):
    """The float ``value`` in every lane."""

    def code(context, builder, signature, arguments):
        return _splat(builder, context.cast(builder, arguments[0], signature.args[0], types.float32))

    return signature(Float32x16, value), code


@intrinsic
def broadcast(_context, address):
    """The float32 at ``address`` in every lane."""

    def code(_context, builder, _signature, arguments):
        return _splat(builder, builder.load(_pointer(builder, arguments[0], _F32), align=4))

    return Float32x16(types.int64), code


@intrinsic
def load(_context, address):
    """Sixteen float32 from ``address``."""

    def code(_context, builder, _signature, arguments):
        return builder.load(_pointer(builder, arguments[0], _V), align=4)

    return Float32x16(types.int64), code


@intrinsic
def store(_context, address, value):
    """Write sixteen float32 to ``address``."""

    def code(_context, builder, _signature, arguments):
        builder.store(arguments[1], _pointer(builder, arguments[0], _V), align=4)

    return types.void(types.int64, Float32x16), code


def _mask(builder, lanes):
    """The mask whose first ``lanes`` bits are set."""
    count = builder.trunc(lanes, _I32)
    vector = builder.insert_element(ir.Constant(_V_INT, ir.Undefined), count, ir.Constant(_I32, 0))
    vector = builder.shuffle_vector(vector, ir.Constant(_V_INT, ir.Undefined), ir.Constant(_V_INT, [0] * LANES))
    return builder.icmp_signed("<", ir.Constant(_V_INT, list(range(LANES))), vector)


@intrinsic
def _load_masked(_context, address, lanes):
    def code(_context, builder, _signature, arguments):
        name = "llvm.masked.load.v16f32.p0"
        function = _declare(builder, name, _V, [_V.as_pointer(), _I32, _V_MASK, _V])
        pointer = _pointer(builder, arguments[0], _V)
        return builder.call(function, [pointer, ir.Constant(_I32, 4), _mask(builder, arguments[1]), _constant(0)])

    return Float32x16(types.int64, types.int64), code


@intrinsic
def _store_masked(_context, address, value, lanes):
    def code(context, builder, _signature, arguments):
        name = "llvm.masked.store.v16f32.p0"
        function = _declare(builder, name, ir.VoidType(), [_V, _V.as_pointer(), _I32, _V_MASK])
        pointer = _pointer(builder, arguments[0], _V)
        builder.call(function, [arguments[1], pointer, ir.Constant(_I32, 4), _mask(builder, arguments[2])])
        return context.get_dummy_value()

    return types.void(types.int64, Float32x16, types.int64), code


@njit
def load_lanes(address, lanes):
    """The first ``lanes`` float32 from ``address``; 0 in the other lanes, whose memory is not touched."""
    if lanes == LANES:
        return load(address)
    return _load_masked(address, lanes)


@njit
def store_lanes(address, value, lanes):
    """Write the first ``lanes`` lanes to ``address``."""
    if lanes == LANES:
        store(address, value)
    else:
        _store_masked(address, value, lanes)


@intrinsic
def multiply_add(_context, a, b, c):
    """``a * b + c``."""

    def code(_context, builder, _signature, arguments):
        return _multiply_add(builder, *arguments)

    return Float32x16(Float32x16, Float32x16, Float32x16), code


def _polynomial(builder, x, coefficients):
    """Horner's rule; coefficients from the lowest power."""
    value = _constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = _multiply_add(builder, value, x, _constant(coefficient))
    return value


# 2^f on [-1/2, 1/2], minimax in relative error (9e-8) with the constant term held at 1.
_EXP2 = (1.0, 0.6931469775987162, 0.24022242084635118, 0.05550733743574179, 0.009671512688148911, 0.0013264727247117118)
# log1p(e) / e on [0, 1], minimax in relative error (3e-8).
_LOG1P = (
    0.9999999698801615, -0.4999949314309303, 0.33319096840434775, -0.2484298239742737, 0.19106007297197095,
    -0.13663246666117757, 0.0782259597266056, -0.029505242387986724, 0.005232694908717886,
)  # fmt: skip
_LOG2E = 1.4426950408889634
_ROUND = 1.5 * 2.0**23  # adding it rounds to an integer, which then sits in the low bits of the sum
_LOWEST, _HIGHEST = -87.33, 88.37  # exp is a normal float32 in between


def _exp(builder, x):
    # exp(x) = 2^n 2^f with n = round(x log2(e)). The product is fused into both additions, so it is never rounded and
    # far from 0 the result keeps its relative accuracy. n is added to the exponent's bits.
    shifted = _multiply_add(builder, x, _constant(_LOG2E), _constant(_ROUND))
    minus_n = builder.fsub(_constant(_ROUND), shifted)
    power = _polynomial(builder, _multiply_add(builder, x, _constant(_LOG2E), minus_n), _EXP2)
    exponent = builder.shl(builder.bitcast(shifted, _V_INT), _constant_int(23))
    result = builder.bitcast(builder.add(builder.bitcast(power, _V_INT), exponent), _V)
    # Ordered: NaN, whose bits survived the above, stays NaN. No result is subnormal, which would be slow.
    return builder.select(builder.fcmp_ordered("<", x, _constant(_LOWEST)), _constant(0.0), result)


@intrinsic
def exp(_context, x):
    """The exponential of each lane, within 2 ulp; 0 below the normal numbers, saturates near 2^127, NaN stays NaN."""

    def code(_context, builder, _signature, arguments):
        x = arguments[0]
        return _exp(builder, builder.select(builder.fcmp_ordered(">", x, _constant(_HIGHEST)), _constant(_HIGHEST), x))

    return Float32x16(Float32x16), code


def _exp_of_minus_magnitude(builder, x):
    return _exp(builder, builder.bitcast(builder.or_(builder.bitcast(x, _V_INT), _constant_int(-(2**31))), _V))


@intrinsic
def softplus(_context, x):
    """``log(1 + exp(x))`` of each lane, within about 3e-7 relative; 0 below -87.

    Computed as max(x, 0) + log1p(exp(-|x|)): above 20 it is x itself, as in PyTorch, and it keeps its relative accuracy
    where it is tiny.
    """

    def code(_context, builder, _signature, arguments):
        x = arguments[0]
        small = _exp_of_minus_magnitude(builder, x)
        positive = _at_least(builder, x, 0.0)
        return _multiply_add(builder, small, _polynomial(builder, small, _LOG1P), positive)

    return Float32x16(Float32x16), code


@intrinsic
def sigmoid(_context, x):
    """``1 / (1 + exp(-x))`` of each lane, relatively accurate on both sides."""

    def code(_context, builder, _signature, arguments):
        x = arguments[0]
        small = _exp_of_minus_magnitude(builder, x)
        numerator = builder.select(builder.fcmp_ordered("<", x, _constant(0.0)), small, _constant(1.0))
        return builder.fdiv(numerator, builder.fadd(small, _constant(1.0)))

    return Float32x16(Float32x16), code


def _fold(builder, a, b, distance):
    """Add lanes ``distance`` apart of two vectors; where bit ``distance`` of the lane is 0 comes a's sum, else b's."""
    low = [i if not i & distance else LANES + (i ^ distance) for i in range(LANES)]
    high = [i ^ distance for i in low]
    return builder.fadd(
        builder.shuffle_vector(a, b, ir.Constant(_V_INT, low)), builder.shuffle_vector(a, b, ir.Constant(_V_INT, high))
    )


@intrinsic
def sum_lanes_of_16(_context, address):
    """The sums over the lanes of 16 consecutive vectors at ``address``, as one vector; always in the same order."""

    def code(_context, builder, _signature, arguments):
        vectors = []
        for i in range(LANES):
            place = builder.add(arguments[0], ir.Constant(_I64, VECTOR_BYTES * i))
            vectors.append(builder.load(_pointer(builder, place, _V), align=4))
        for distance in (8, 4, 2, 1):
            vectors = [_fold(builder, vectors[i], vectors[i + distance], distance) for i in range(distance)]
        return vectors[0]

    return Float32x16(types.int64), code


@intrinsic
def load_float(_context, address):
    """The float32 at ``address``."""

    def code(_context, builder, _signature, arguments):
        return builder.load(_pointer(builder, arguments[0], _F32), align=4)

    return types.float32(types.int64), code


@intrinsic
def store_float(_context, address, value):
    """Write one float32 to ``address``."""

    def code(_context, builder, _signature, arguments):
        builder.store(arguments[1], _pointer(builder, arguments[0], _F32), align=4)

    return types.void(types.int64, types.float32), code


@intrinsic
def load_int32(_context, address):
    """The int32 at ``address``, as int64."""

    def code(_context, builder, _signature, arguments):
        return builder.sext(builder.load(_pointer(builder, arguments[0], _I32), align=4), _I64)

    return types.int64(types.int64), code


@intrinsic
def load_int64(_context, address):
    """The int64 at ``address``."""

    def code(_context, builder, _signature, arguments):
        return builder.load(_pointer(builder, arguments[0], _I64), align=8)

    return types.int64(types.int64), code


@intrinsic
def fetch_add(_context, address):
    """Atomically add 1 to the int64 at ``address`` and return what was there."""

    def code(_context, builder, _signature, arguments):
        return builder.atomic_rmw("add", _pointer(builder, arguments[0], _I64), ir.Constant(_I64, 1), "seq_cst")

    return types.int64(types.int64), code


@intrinsic
def as_pointer(_context, address):
    """An address as the pointer that ``numba.carray`` takes."""

    def code(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), code


@intrinsic
def insert(_context, vector, lane, value):
    """The vector with one lane replaced."""

    def code(_context, builder, _signature, arguments):
        vector, lane, value = arguments
        return builder.insert_element(vector, value, builder.trunc(lane, _I32))

    return Float32x16(Float32x16, types.int64, types.float32), code


@intrinsic
def extract(_context, vector, lane):
    """One lane of a vector."""

    def code(_context, builder, _signature, arguments):
        return builder.extract_element(arguments[0], builder.trunc(arguments[1], _I32))

    return types.float32(Float32x16, types.int64), code
