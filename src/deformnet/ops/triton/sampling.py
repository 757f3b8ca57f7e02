"""What a tap of a deformable convolution reads: where, from which pixels, which value.

Letters: P = Ho*Wo output positions of an image, C channels, K taps.
"""

import triton
import triton.language as tl


@triton.jit
def rows(tile, count, positions, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Of the rows of a tile: whether there are so many, their images, positions within them."""
    row = tile * tl.full((), BLOCK, tl.int64 if WIDE else tl.int32) + tl.arange(0, BLOCK)
    real = row < count
    row = tl.where(real, row, 0)
    image = row // positions
    return real, image, row - image * positions


@triton.jit
def positions_read(
    offset, image, position, real, group, tap,
    offset_groups, taps, kernel_w, positions, out_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The positions (y, x) that a tap reads, in pixels."""
    channel = (image * offset_groups + group) * taps * 2 + 2 * tap
    shift_y = tl.load(offset + channel * positions + position, mask=real, other=0)
    shift_x = tl.load(offset + (channel + 1) * positions + position, mask=real, other=0)
    row, column = position // out_w, position % out_w
    y = row * stride_h - pad_h + (tap // kernel_w) * dilation_h
    x = column * stride_w - pad_w + (tap % kernel_w) * dilation_w
    return y.to(DTYPE) + shift_y.to(DTYPE), x.to(DTYPE) + shift_x.to(DTYPE)


@triton.jit
def cell(y, x, height, width, MSRA: tl.constexpr):
    """The four pixels around (y, x), how far it lies from the first, and what may be read.

    Returns:
        The pixel (top, left) and the fractions (down, right); whether anything is read there;
        whether the position is not a number.
    """
    first = 0.0 if MSRA else -1.0
    undefined = (y != y) | (x != x)
    within = (y >= first) & (y < height) & (x >= first) & (x < width)
    # From here on all positions are finite and small.
    y, x = tl.where(within, y, 0.0), tl.where(within, x, 0.0)
    if MSRA:
        # Beyond the last row or column the value stays what it is there.
        y, x = tl.minimum(y, height - 1), tl.minimum(x, width - 1)
    top, left = tl.floor(y), tl.floor(x)
    return top.to(tl.int32), left.to(tl.int32), y - top, x - left, within, undefined


@triton.jit
def corner(image, y, x, within, channel, real_channel, height, width, channels):
    """Places of the pixel (y, x) in the map, [rows, channels], and whether it has them."""
    inside = within & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    # An image's index is wide where places are.
    pixel = image * height * width + tl.where(inside, y.to(image.dtype) * width + x, 0)
    return (pixel * channels)[:, None] + channel[None, :], inside[:, None] & real_channel[None, :]


@triton.jit
def corners(
    input, image, top, left, within, channel, real_channel, height, width, channels,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The four pixels around each row's position, [rows, channels]: zero outside the map."""
    p00, m00 = corner(image, top, left, within, channel, real_channel, height, width, channels)
    p01, m01 = corner(image, top, left + 1, within, channel, real_channel, height, width, channels)
    p10, m10 = corner(image, top + 1, left, within, channel, real_channel, height, width, channels)
    p11, m11 = corner(
        image, top + 1, left + 1, within, channel, real_channel, height, width, channels
    )
    # Not a product with zero: the map may hold infinities and NaN.
    v00 = tl.load(input + p00, mask=m00, other=0).to(DTYPE)
    v01 = tl.load(input + p01, mask=m01, other=0).to(DTYPE)
    v10 = tl.load(input + p10, mask=m10, other=0).to(DTYPE)
    v11 = tl.load(input + p11, mask=m11, other=0).to(DTYPE)
    return v00, v01, v10, v11


@triton.jit
def mix(v00, v01, v10, v11, down, right, undefined):
    """The bilinear value between four corners."""
    up, before = 1 - down, 1 - right
    value = (
        v00 * (up * before)[:, None]
        + v01 * (up * right)[:, None]
        + v10 * (down * before)[:, None]
        + v11 * (down * right)[:, None]
    )
    return tl.where(undefined[:, None], float("nan"), value)
