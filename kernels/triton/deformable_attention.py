"""Multi-scale deformable attention in Triton (Zhu et al. 2021, Deformable DETR, eq. 3): samples never go to memory.

A program takes some queries of one head and image: for each level and point it gathers the four pixels around the
sample, all channels at a time, and adds them up weighted. Sums are float32. The backward pass walks the same samples;
several of them may touch one pixel, so the values' gradients are added up by atomics, in no fixed order.
"""

import triton
import triton.language as tl

__all__ = ["deformable_attention", "deformable_attention_backward"]


@triton.jit
def _corner(value_ptr, base, row, column, inside, height, width, step, channel, mask):
    """Return one pixel's channels ``(queries, channels)``, 0 outside of the map, and where they lie."""
    present = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = base + (row * width + column).to(tl.int64)[:, None] * step + channel[None, :]
    present = present[:, None] & mask
    return tl.load(value_ptr + place, mask=present, other=0.0).to(tl.float32), place, present


@triton.jit
def _sample(locations_ptr, weights_ptr, point, queries, height, width):
    """Return a sample's weight, whether it touches the map, its upper left pixel and its place within the pixels."""
    x = tl.load(locations_ptr + 2 * point, mask=queries, other=0.0).to(tl.float32) * width - 0.5
    y = tl.load(locations_ptr + 2 * point + 1, mask=queries, other=0.0).to(tl.float32) * height - 0.5
    weight = tl.load(weights_ptr + point, mask=queries, other=0.0).to(tl.float32)
    inside = queries & (x >= -1) & (x < width) & (y >= -1) & (y < height)
    x, y = tl.where(inside, x, 0.0), tl.where(inside, y, 0.0)
    column, row = tl.floor(x), tl.floor(y)
    return weight, inside, row.to(tl.int32), column.to(tl.int32), y - row, x - column


@triton.jit
def deformable_attention(
    value_ptr, sizes_ptr, starts_ptr, locations_ptr, weights_ptr, out_ptr, tokens, num_queries, channels,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """BLOCK queries of one head of one image. ``CHANNELS``: a power of two, at least ``channels``."""
    head, heads, image = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, CHANNELS)
    queries, mask = query < num_queries, (channel < channels)[None, :]
    slot = (image * num_queries + query) * heads + head
    step = heads * channels
    out = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for level in range(0, LEVELS):
        height = tl.load(sizes_ptr + 2 * level).to(tl.int32)
        width = tl.load(sizes_ptr + 2 * level + 1).to(tl.int32)
        base = (image * tokens + tl.load(starts_ptr + level)) * step + head * channels
        for i in range(0, POINTS):
            point = (slot * LEVELS + level) * POINTS + i
            weight, inside, row, column, dy, dx = _sample(locations_ptr, weights_ptr, point, queries, height, width)
            v00, _, _ = _corner(value_ptr, base, row, column, inside, height, width, step, channel, mask)
            v01, _, _ = _corner(value_ptr, base, row, column + 1, inside, height, width, step, channel, mask)
            v10, _, _ = _corner(value_ptr, base, row + 1, column, inside, height, width, step, channel, mask)
            v11, _, _ = _corner(value_ptr, base, row + 1, column + 1, inside, height, width, step, channel, mask)
            dx, dy = dx[:, None], dy[:, None]
            top, bottom = v00 + dx * (v01 - v00), v10 + dx * (v11 - v10)
            out += weight[:, None] * (top + dy * (bottom - top))
    place = slot[:, None] * channels + channel[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=queries[:, None] & mask)


@triton.jit
def deformable_attention_backward(
    dout_ptr, value_ptr, sizes_ptr, starts_ptr, locations_ptr, weights_ptr, dvalue_ptr, dlocations_ptr, dweights_ptr,
    tokens, num_queries, channels,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """The same queries; ``dvalue`` is float32 and starts at zero."""
    head, heads, image = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, CHANNELS)
    queries, mask = query < num_queries, (channel < channels)[None, :]
    slot = (image * num_queries + query) * heads + head
    step = heads * channels
    place = slot[:, None] * channels + channel[None, :]
    dout = tl.load(dout_ptr + place, mask=queries[:, None] & mask, other=0.0).to(tl.float32)
    for level in range(0, LEVELS):
        height = tl.load(sizes_ptr + 2 * level).to(tl.int32)
        width = tl.load(sizes_ptr + 2 * level + 1).to(tl.int32)
        base = (image * tokens + tl.load(starts_ptr + level)) * step + head * channels
        for i in range(0, POINTS):
            point = (slot * LEVELS + level) * POINTS + i
            weight, inside, row, column, dy, dx = _sample(locations_ptr, weights_ptr, point, queries, height, width)
            v00, p00, m00 = _corner(value_ptr, base, row, column, inside, height, width, step, channel, mask)
            v01, p01, m01 = _corner(value_ptr, base, row, column + 1, inside, height, width, step, channel, mask)
            v10, p10, m10 = _corner(value_ptr, base, row + 1, column, inside, height, width, step, channel, mask)
            v11, p11, m11 = _corner(value_ptr, base, row + 1, column + 1, inside, height, width, step, channel, mask)
            s00, s01 = tl.sum(dout * v00, axis=1), tl.sum(dout * v01, axis=1)
            s10, s11 = tl.sum(dout * v10, axis=1), tl.sum(dout * v11, axis=1)
            top, bottom = s00 + dx * (s01 - s00), s10 + dx * (s11 - s10)
            left, right = s00 + dy * (s10 - s00), s01 + dy * (s11 - s01)
            tl.store(dweights_ptr + point, top + dy * (bottom - top), mask=queries)
            tl.store(dlocations_ptr + 2 * point, weight * width * (right - left), mask=queries)
            tl.store(dlocations_ptr + 2 * point + 1, weight * height * (bottom - top), mask=queries)
            weighted = weight[:, None] * dout
            dx, dy = dx[:, None], dy[:, None]
            tl.atomic_add(dvalue_ptr + p00, (1 - dy) * (1 - dx) * weighted, mask=m00, sem="relaxed")
            tl.atomic_add(dvalue_ptr + p01, (1 - dy) * dx * weighted, mask=m01, sem="relaxed")
            tl.atomic_add(dvalue_ptr + p10, dy * (1 - dx) * weighted, mask=m10, sem="relaxed")
            tl.atomic_add(dvalue_ptr + p11, dy * dx * weighted, mask=m11, sem="relaxed")
