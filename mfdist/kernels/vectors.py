"""Vectors of float32 in numba's kernels: sixteen lanes that the compiler keeps in registers, or one, by the same code.

LLVM makes poor vectors of short loops whose length it does not know; here the kernels say what they want. A *lane
token* picks the flavour of an operation, by its type: ``SIXTEEN`` a vector, ``ONE`` a plain float32. So a row of 33
columns is two vectors and a scalar, by one body:

    for d in range(0, 32, 16): body(SIXTEEN, row, d)
    for d in range(32, 33):    body(ONE, row, d)

Arithmetic is as written (no reordering), so that results do not depend on how the loops around it were compiled:
``total`` adds lanes k and k + 8, then k and k + 4, and so on.
"""

from __future__ import annotations

import operator
from typing import Any, cast

from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16
SIXTEEN, ONE = (None,) * LANES, (None,)
"""Lane tokens."""


class VectorType(types.Type):
    """Sixteen float32."""

    def __init__(self) -> None:
        super().__init__("float32 x 16")


vector_type = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, described: Any) -> None:
        from llvmlite import ir

        super().__init__(manager, described, ir.VectorType(ir.FloatType(), LANES))  # type: ignore[no-untyped-call]


def _is_vector(token: Any) -> bool:
    return len(token) == LANES


def _place(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: bool) -> Any:
    from llvmlite import ir

    pointer = builder.gep(context.make_array(array_type)(context, builder, array).data, [index])
    return builder.bitcast(pointer, ir.VectorType(ir.FloatType(), LANES).as_pointer()) if vector else pointer


@intrinsic
def _load(typingctx: Any, token: Any, array: Any, index: Any) -> Any:
    """Lanes of a contiguous float32 ``array`` from ``index`` on."""
    vector = _is_vector(token)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _place(context, builder, signature.args[1], arguments[1], arguments[2], vector)
        return builder.load(place, align=4)

    return (vector_type if vector else types.float32)(token, array, types.intp), generate


@intrinsic
def _store(typingctx: Any, token: Any, array: Any, index: Any, value: Any) -> Any:
    """Write lanes to a contiguous float32 ``array`` from ``index`` on."""
    vector = _is_vector(token)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _place(context, builder, signature.args[1], arguments[1], arguments[2], vector)
        builder.store(arguments[3], place, align=4)
        return context.get_dummy_value()

    return types.void(token, array, types.intp, vector_type if vector else types.float32), generate


def _filled(builder: Any, value: Any) -> Any:
    """A vector whose lanes all are ``value``."""
    from llvmlite import ir

    kind = ir.VectorType(ir.FloatType(), LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


@intrinsic
def _spread(typingctx: Any, token: Any, value: Any) -> Any:
    """``value`` in every lane."""
    vector = _is_vector(token)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _filled(builder, arguments[1]) if vector else arguments[1]

    return (vector_type if vector else types.float32)(token, types.float32), generate


@intrinsic
def _total(typingctx: Any, value: Any) -> Any:
    """The sum of the lanes, float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir

        found, width = arguments[0], LANES
        if value == vector_type:
            while width > 1:
                width //= 2
                picks = [ir.Constant(ir.VectorType(ir.IntType(32), width), [first + k for k in range(width)])
                         for first in (0, width)]  # fmt: skip
                found = builder.fadd(*(builder.shuffle_vector(found, found, pick) for pick in picks))
            found = builder.extract_element(found, ir.Constant(ir.IntType(32), 0))
        return found

    return types.float32(value), generate


def _lanes_of(builder: Any, value: Any, kind: Any, vector: bool) -> Any:
    """``value`` of ``kind``, in every lane where a vector is wanted and it is none."""
    return _filled(builder, value) if vector and kind != vector_type else value


def _called(name: str, context: Any, builder: Any, kinds: Any, values: Any) -> Any:
    """LLVM's function ``name`` of float32 or, where one of them is a vector, of vectors."""
    from llvmlite import ir

    insert: Any = cgutils.get_or_insert_function
    vector = vector_type in kinds
    one = context.get_value_type(vector_type if vector else types.float32)
    suffix = f"v{LANES}f32" if vector else "f32"
    function = insert(builder.module, ir.FunctionType(one, [one] * len(kinds)), f"llvm.{name}.{suffix}")
    return builder.call(function, [_lanes_of(builder, *each, vector) for each in zip(values, kinds, strict=True)])


def _kinds(*given: Any) -> tuple[Any, list[Any]]:
    """(what an operation gives, what it takes)."""
    return (
        vector_type if vector_type in given else types.float32,
        [kind if kind == vector_type else types.float32 for kind in given],
    )


@intrinsic
def _root(typingctx: Any, a: Any) -> Any:
    """The square root."""
    found, taken = _kinds(a)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _called("sqrt", context, builder, signature.args, arguments)

    return found(*taken), generate


@intrinsic
def _fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once; a float32 beside a vector counts for every lane."""
    found, taken = _kinds(a, b, c)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _called("fma", context, builder, signature.args, arguments)

    return found(*taken), generate


load: Any = _load
store: Any = _store
spread: Any = _spread
total: Any = _total
root: Any = _root
fma: Any = _fma


class _Binary(AbstractTemplate):
    """Types of an operation between vectors, or between a vector and a float32."""

    def generic(self, args: Any, kws: Any) -> Any:
        if vector_type in args and set(args) <= {vector_type, types.float32}:
            return vector_type(*args)
        return None


def _operator(symbol: Any, name: str) -> None:
    typed, lowered = cast(Any, infer_global), cast(Any, lower_builtin)
    typed(symbol)(type(f"_{name}", (_Binary,), {"key": symbol}))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sides = zip(arguments, signature.args, strict=True)
        return getattr(builder, name)(*(_lanes_of(builder, value, kind, True) for value, kind in sides))

    for sides in ((vector_type, vector_type), (vector_type, types.float32), (types.float32, vector_type)):
        lowered(symbol, *sides)(generate)


for _symbol, _name in (
    (operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv"),
):  # fmt: skip
    _operator(_symbol, _name)
