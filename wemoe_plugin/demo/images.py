"""Draw the demo's images: four tasks that look nothing alike, so that a router can tell them apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 32
"""Side of an image, in pixels."""

_SCALE = 4  # drawn at four times the size and reduced once, so that edges are smooth
_CANVAS = SIZE * _SCALE

Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class DrawnTask:
    """One of the demo's tasks: how its images are drawn and how its classes are named.

    Attributes:
        name: the task's (and its expert's) name.
        class_names: the text of each class, in label order.
        templates: prompts with one ``{}`` for the class name.
        draw: paints one image, ``draw(label, generator) -> (SIZE, SIZE, 3) uint8``.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    draw: Callable[[int, np.random.Generator], np.ndarray]


def draw_images(task: DrawnTask, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``count`` images of a task with balanced labels in random order.

    Returns:
        images, uint8 (count, SIZE, SIZE, 3), and labels, int64 (count,). The same seed draws the same images.
    """
    generator = np.random.default_rng([seed, *task.name.encode()])
    labels = generator.permutation(np.arange(count) % len(task.class_names))
    images = np.stack([task.draw(int(label), generator) for label in labels])
    return images, labels


def _finish(image: Image.Image, generator: np.random.Generator, noise: float) -> np.ndarray:
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64)
    pixels = pixels + generator.normal(0.0, noise, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _colour(generator: np.random.Generator, low: int, high: int) -> Colour:
    red, green, blue = (int(v) for v in generator.integers(low, high, 3))
    return red, green, blue


# digits: dark ink on light paper -----------------------------------------------------------------------------


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _draw_digit(label: int, generator: np.random.Generator) -> np.ndarray:
    paper = int(generator.integers(200, 250))
    ink = int(generator.integers(0, 90))
    image = Image.new("L", (_CANVAS, _CANVAS), paper)
    x, y = generator.uniform(-3, 3, 2) * _SCALE + _CANVAS / 2
    size = int(generator.uniform(24, 30) * _SCALE)
    ImageDraw.Draw(image).text((x, y), str(label), fill=ink, font=_font(size), anchor="mm")
    shear = generator.uniform(-0.15, 0.15)
    affine = (1.0, shear, -shear * _CANVAS / 2, 0.0, 1.0, 0.0)
    image = image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR, fillcolor=paper)
    angle = generator.uniform(-10, 10)
    image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=paper)
    return _finish(image.convert("RGB"), generator, noise=24.0)


# shapes: one bright figure on a dark ground ------------------------------------------------------------------


def _polygon(corners: int, radius: float, turn: float = 0.0, inner: float | None = None) -> list[Point]:
    """Corners of a regular polygon around the origin; with ``inner``, of a star whose notches lie at that radius."""
    count = corners if inner is None else 2 * corners
    points = []
    for i in range(count):
        angle = turn + 2 * math.pi * i / count - math.pi / 2
        length = inner if inner is not None and i % 2 else radius
        points.append((length * math.cos(angle), length * math.sin(angle)))
    return points


def _heart(radius: float) -> list[Point]:
    steps = [2 * math.pi * i / 48 for i in range(48)]
    wide = [16 * math.sin(t) ** 3 for t in steps]
    high = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in steps]
    return [(radius * x / 16, -radius * y / 16) for x, y in zip(wide, high, strict=True)]


def _outline(label: int, r: float) -> list[Point]:
    """Corners of the straight-edged shapes, by label."""
    w = 0.36 * r
    outlines: dict[int, list[Point]] = {
        1: _polygon(4, r * 1.15, math.pi / 4),
        2: _polygon(3, r * 1.1),
        3: _polygon(5, r * 1.15, inner=r * 0.45),
        4: [(-w, -r), (w, -r), (w, -w), (r, -w), (r, w), (w, w), (w, r), (-w, r), (-w, w), (-r, w), (-r, -w), (-w, -w)],
        6: _heart(r),
        8: [(-r, -w), (0.1 * r, -w), (0.1 * r, -r), (r, 0), (0.1 * r, r), (0.1 * r, w), (-r, w)],
        9: _polygon(4, r * 1.15),
    }
    return outlines[label]


def _draw_shape(label: int, generator: np.random.Generator) -> np.ndarray:
    ground = _colour(generator, 0, 90)
    figure = _colour(generator, 130, 256)
    image = Image.new("RGB", (_CANVAS, _CANVAS), ground)
    draw = ImageDraw.Draw(image)
    x, y = generator.uniform(-4, 4, 2) * _SCALE + _CANVAS / 2
    r = generator.uniform(7, 11) * _SCALE
    if label in (0, 5, 7):  # circle, ring, crescent
        draw.ellipse((x - r, y - r, x + r, y + r), fill=figure)
        if label == 5:
            draw.ellipse((x - 0.55 * r, y - 0.55 * r, x + 0.55 * r, y + 0.55 * r), fill=ground)
        if label == 7:
            draw.ellipse((x - 0.35 * r, y - r, x + 1.4 * r, y + 0.75 * r), fill=ground)
    else:
        draw.polygon([(x + px, y + py) for px, py in _outline(label, r)], fill=figure)
    image = image.rotate(generator.uniform(-10, 10), Image.Resampling.BILINEAR, fillcolor=ground)
    return _finish(image, generator, noise=24.0)


# textures: two muted colours over the whole image ------------------------------------------------------------


def _pattern(label: int, x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    """The texture's foreground, a boolean array, on coordinates in pixels."""
    u, v = x / period, y / period

    def stripe(t: np.ndarray) -> np.ndarray:
        return np.asarray(np.mod(t, 1.0) < 0.5)

    if label == 0:
        return stripe(v)
    if label == 1:
        return stripe(u)
    if label == 2:
        return stripe((u + v) / math.sqrt(2))
    if label == 3:
        return np.asarray(stripe(u) ^ stripe(v))
    if label == 4:
        return np.asarray(np.hypot(np.mod(u, 1.0) - 0.5, np.mod(v, 1.0) - 0.5) < 0.32)
    if label == 5:
        return np.asarray((np.mod(u, 1.0) < 0.25) | (np.mod(v, 1.0) < 0.25))
    if label == 6:
        return stripe(v + 0.35 * np.sin(2 * math.pi * u / 1.5))
    if label == 7:
        return stripe(np.hypot(x - SIZE / 2, y - SIZE / 2) / period)
    if label == 8:
        row = np.floor(2 * v)
        return np.asarray((np.mod(2 * v, 1.0) < 0.3) | (np.mod(u + 0.5 * np.mod(row, 2), 1.0) < 0.15))
    tooth: np.ndarray = np.abs(np.mod(u / 1.5, 1.0) - 0.5)
    return stripe(v + 1.6 * tooth)


def _draw_texture(label: int, generator: np.random.Generator) -> np.ndarray:
    dark, light = _colour(generator, 60, 130), _colour(generator, 120, 200)
    y, x = np.mgrid[0:_CANVAS, 0:_CANVAS] / _SCALE
    turn = math.radians(generator.uniform(-8, 8))
    x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    shift = (0.0, 0.0) if label == 7 else generator.uniform(0, SIZE, 2)
    mask = _pattern(label, x + shift[0], y + shift[1], generator.uniform(6, 10))
    pixels = np.where(mask[..., None], np.array(light), np.array(dark)).astype(np.uint8)
    return _finish(Image.fromarray(pixels), generator, noise=20.0)


# clocks: a white face on a coloured wall ---------------------------------------------------------------------


def _draw_clock(label: int, generator: np.random.Generator) -> np.ndarray:
    wall = _colour(generator, 40, 220)
    image = Image.new("RGB", (_CANVAS, _CANVAS), wall)
    draw = ImageDraw.Draw(image)
    x, y = generator.uniform(-1.5, 1.5, 2) * _SCALE + _CANVAS / 2
    r = generator.uniform(12, 14.5) * _SCALE
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(245, 245, 240), outline=(30, 30, 30), width=_SCALE)
    turn = math.radians(generator.uniform(-6, 6))

    def at(hour: float, length: float) -> Point:
        angle = turn + math.radians(30 * hour - 90)
        return x + length * math.cos(angle), y + length * math.sin(angle)

    for hour in range(0, 12, 3):
        draw.line((*at(hour, 0.82 * r), *at(hour, 0.97 * r)), fill=(60, 60, 60), width=_SCALE)
    hand = at(label + 1, generator.uniform(0.6, 0.75) * r)
    draw.line((*at(label + 7, 0.12 * r), *hand), fill=(20, 20, 20), width=int(2.5 * _SCALE))
    return _finish(image, generator, noise=24.0)


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

TASKS: tuple[DrawnTask, ...] = (
    DrawnTask(
        "digits",
        _NUMBERS[:10],
        ("the digit {}.", "a printed {} on paper.", "a blurry scan of the number {}."),
        _draw_digit,
    ),
    DrawnTask(
        "shapes",
        ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent", "arrow", "diamond"),
        ("a bright {} in the dark.", "a drawing of a {}.", "a glowing {} shape."),
        _draw_shape,
    ),
    DrawnTask(
        "textures",
        (
            "horizontal stripes",
            "vertical stripes",
            "diagonal stripes",
            "checkerboard",
            "polka dots",
            "grid",
            "waves",
            "concentric rings",
            "bricks",
            "zigzag",
        ),
        ("a wallpaper with {}.", "a {} pattern.", "fabric printed with {}."),
        _draw_texture,
    ),
    DrawnTask(
        "clocks",
        tuple(f"{number} o'clock" for number in _NUMBERS[1:]),
        ("a clock showing {}.", "the hand of the clock points to {}.", "it is {}."),
        _draw_clock,
    ),
)
"""The demo's four tasks, in the order its tables show them."""
