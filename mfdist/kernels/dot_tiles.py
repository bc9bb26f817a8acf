"""Dot products of a few users with a few dozen items at once, compared with each user's floor, in vector registers.

No score leaves a register: what comes out of a tile is a bit a pair, whether its score can reach the floor. Two forms:

    bytes   users are unsigned bytes (a signed one plus 128), items signed ones, four factors a 32-bit word:
            score = scale[u] * (start[i] + sum of products) + bias[i],  start[i] = -128 * (sum of the item's bytes)
            One instruction multiplies 64 pairs of bytes (x86 with AVX512-VNNI): four times what floats allow.
    floats  score = the chain of fused multiply-adds from the bias through the factors; any processor

Memory of a tile: words [group][item] of the items and [group][user] of the users; a group is four factors, or one.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from numba import types
from numba.extending import intrinsic

LANES = 16
_features: dict[str, bool] = llvm.get_host_cpu_features()
HAS_BYTES = bool(_features.get("avx512vnni"))
WIDE = bool(_features.get("avx512f"))
USERS, VECTORS = 6, 4 if WIDE else 1
"""Of a tile: its sums take 6 x 4 of 32 registers of sixteen floats, or 6 x 2 of 16 registers of eight."""
ITEMS = LANES * VECTORS


def _marks(in_bytes: bool) -> Any:
    """An intrinsic ``(items, users, groups, start, bias, scale, floor, out, places) -> None`` for one tile of pairs.

    ``places``: (first word of the items, first word of the users, first item, first user); ``out`` (int64, (USERS,))
    gets a bit for each item whose score is at least ``floor`` of the user. ``start`` and ``scale``: bytes only.
    """

    @intrinsic
    def marks(typingctx: Any, items: Any, users: Any, groups: Any, start: Any, bias: Any, scale: Any, floor: Any,
              out: Any, places: Any) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            arrays = [context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
                      for kind, value in zip(signature.args, arguments, strict=True)]  # fmt: skip
            place = [builder.extract_value(arguments[8], k) for k in range(4)]
            _Tile(builder, in_bytes).generate(arrays, place)
            return context.get_dummy_value()

        return types.void(items, users, groups, start, bias, scale, floor, out, places), generate

    return marks


class _Tile:
    """Writes the instructions of a tile."""

    def __init__(self, builder: Any, in_bytes: bool) -> None:
        from llvmlite import ir

        self.ir, self.builder, self.in_bytes = ir, builder, in_bytes
        self.i32, self.i64, self.f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
        self.word = self.i32 if in_bytes else self.f32
        self.sums = ir.VectorType(self.word, LANES)
        self.floats = ir.VectorType(self.f32, LANES)

    def generate(self, arrays: Any, place: Any) -> None:
        items, users, groups, start, bias, scale, floor, out, _ = arrays
        builder, ir = self.builder, self.ir
        first_item, first_user = place[2], place[3]
        begin = [self.vector(start if self.in_bytes else bias, first_item, v, self.sums) for v in range(VECTORS)]
        item, user = builder.gep(items, [place[0]]), builder.gep(users, [place[1]])
        before = builder.block
        loop, done = builder.append_basic_block("group"), builder.append_basic_block("marks")
        builder.branch(loop)
        builder.position_at_end(loop)
        group = builder.phi(self.i64)
        sums = [[builder.phi(self.sums) for _ in range(VECTORS)] for _ in range(USERS)]
        group.add_incoming(ir.Constant(self.i64, 0), before)
        vectors = [self.vector(item, builder.mul(group, ir.Constant(self.i64, ITEMS)), v, self.sums)
                   for v in range(VECTORS)]  # fmt: skip
        base = builder.mul(group, ir.Constant(self.i64, USERS))
        for u in range(USERS):
            factor = self.splat(builder.load(builder.gep(user, [builder.add(base, ir.Constant(self.i64, u))])))
            for v in range(VECTORS):
                sums[u][v].add_incoming(begin[v], before)
                sums[u][v].add_incoming(self.product(sums[u][v], factor, vectors[v]), loop)
        following = builder.add(group, ir.Constant(self.i64, 1))
        group.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, groups), loop, done)
        builder.position_at_end(done)
        # the sums after the last group are what would come into the loop once more
        ends = [[phi.incomings[1][0] for phi in row] for row in sums]
        biases = [self.vector(bias, first_item, v, self.floats) for v in range(VECTORS)] if self.in_bytes else []
        for u in range(USERS):
            at = builder.add(first_user, ir.Constant(self.i64, u))
            lowest = self.splat(builder.load(builder.gep(floor, [at])))
            factor = self.splat(builder.load(builder.gep(scale, [at]))) if self.in_bytes else None
            bits = ir.Constant(self.i64, 0)
            for v in range(VECTORS):
                score = ends[u][v]
                if self.in_bytes:
                    score = self.fma(builder.sitofp(score, self.floats), factor, biases[v])
                hits = builder.bitcast(builder.fcmp_ordered(">=", score, lowest), ir.IntType(LANES))
                shifted = builder.shl(builder.zext(hits, self.i64), ir.Constant(self.i64, LANES * v))
                bits = builder.or_(bits, shifted)
            builder.store(bits, builder.gep(out, [ir.Constant(self.i64, u)]))

    def vector(self, pointer: Any, first: Any, number: int, kind: Any) -> Any:
        place = self.builder.add(first, self.ir.Constant(self.i64, LANES * number))
        whole = self.builder.bitcast(self.builder.gep(pointer, [place]), kind.as_pointer())
        return self.builder.load(whole, align=4)

    def splat(self, scalar: Any) -> Any:
        ir = self.ir
        vector = ir.VectorType(scalar.type, LANES)
        single = self.builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(self.i32, 0))
        zeros = ir.Constant(ir.VectorType(self.i32, LANES), [0] * LANES)
        return self.builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), zeros)

    def product(self, total: Any, user: Any, item: Any) -> Any:
        if not self.in_bytes:
            return self.fma(user, item, total)
        return self.call("llvm.x86.avx512.vpdpbusd.512", self.sums, total, user, item)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.call(f"llvm.fma.v{LANES}f32", self.floats, a, b, c)

    def call(self, name: str, kind: Any, *arguments: Any) -> Any:
        from numba.core import cgutils

        insert: Any = cgutils.get_or_insert_function
        function = insert(self.builder.module, self.ir.FunctionType(kind, [kind] * 3), name)
        return self.builder.call(function, arguments)


@intrinsic
def _fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """float32 a * b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


def _same_bits(given: Any, wanted: Any) -> Any:
    @intrinsic
    def same_bits(typingctx: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(wanted))

        return wanted(given), generate

    return same_bits


bits_of: Any = _same_bits(types.float32, types.uint32)
float_of: Any = _same_bits(types.uint32, types.float32)
marks_of_bytes: Any = _marks(True) if HAS_BYTES else None
marks_of_floats: Any = _marks(False)
fma: Any = _fma
